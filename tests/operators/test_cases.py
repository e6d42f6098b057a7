"""The tests' own tools: what must fail does."""

from __future__ import annotations

import pytest
import torch

from support import cases

RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.1}


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [cases.CONV[2], cases.ATTENTION[4], cases.OFFSETS[4]], ids=cases.name
)
def test_a_wrong_result_is_outside_the_budget(case: cases.Case, dtype: torch.dtype) -> None:
    results = case.run(dtype, backend="reference")
    case.check(results, dtype)
    for name, result in results.items():
        wrong = result.clone()
        at = int(wrong.abs().argmax())
        for factor in (1 + RELATIVE[dtype], 0.0, float("nan")):
            wrong.view(-1)[at] = result.view(-1)[at] * factor
            with pytest.raises(AssertionError, match=name):
                case.check({**results, name: wrong}, dtype)


def test_unwritten_memory_is_not_a_number() -> None:
    made = torch.ones(2)
    for tensor in (
        torch.empty(2, 3),
        torch.empty_like(made),
        made.new_empty(3),
        torch.empty_strided((2, 2), (1, 2)),
        torch.empty(4, dtype=torch.float16),
    ):
        assert tensor.isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == 2**63 - 1).all()


def test_ids_and_inputs_are_stable() -> None:
    """Ids are unique, a case gives the same numbers twice, and the cast ones are the exact ones
    rounded."""
    ids = [name for name, _ in cases.CASES]
    assert len(set(ids)) == len(ids)
    for case in (cases.CONV[0], cases.ATTENTION[0], cases.OFFSETS[0]):
        for one, other in zip(case.inputs(torch.float16), case.inputs(torch.float16), strict=True):
            assert torch.equal(one, other)
        for exact, cast in zip(case.exact, case.inputs(torch.float16), strict=True):
            assert torch.equal(torch.from_numpy(exact).half(), cast)
