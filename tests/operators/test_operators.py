"""Both operators in every backend and dtype: outputs and gradients against the oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dcnv4 import backends, functional
from support import cases
from support.runner import Runner

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", [c for _, c in cases.CASES], ids=[i for i, _ in cases.CASES])
def test_oracle(case: cases.Case, dtype: torch.dtype, backend: Runner) -> None:
    results = backend.run(case, dtype)
    case.check(results, dtype)


def assert_golden(results: dict[str, torch.Tensor], data: dict[str, np.ndarray]) -> None:
    """The golden numbers come from float32 kernels: both sides round some 100 times."""
    for name, result in results.items():
        got, expected = result.detach().cpu().numpy(), data[name]
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert error <= 100 * 2**-24, f"{name}: relative L2 error {error}"


def golden_case(operator: str, case: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{operator}.npz") as data:
        names = [name for name in data.files if name.startswith(f"{case}.")]
        return {name.removeprefix(f"{case}."): data[name] for name in names}


def golden_cases(operator: str) -> list[str]:
    with np.load(DATA / f"{operator}.npz") as data:
        return sorted({name.split(".")[0] for name in data.files})


@pytest.mark.parametrize("case", golden_cases("deform_conv"))
def test_deform_conv_golden(case: str, backend: Runner) -> None:
    backend.require("deform_conv")
    if backend.interpreted:
        pytest.skip("Triton's interpreter takes minutes for the golden sizes")
    data = golden_case("deform_conv", case)
    kernel_size, stride, padding, dilation, groups = map(int, data["config"][:5])
    offset_scale, remove_center, softmax = data["config"][5:].tolist()
    value, offset_mask = (
        torch.from_numpy(data[name]).to(backend.device).requires_grad_()
        for name in ("value", "offset_mask")
    )
    output = functional.deform_conv(
        value,
        offset_mask,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_scale=offset_scale,
        remove_center=bool(remove_center),
        softmax=bool(softmax),
        backend=backend.backend,
    )
    output.backward(torch.from_numpy(data["grad_output"]).to(backend.device))
    results = {"output": output, "grad_value": value.grad, "grad_offset_mask": offset_mask.grad}
    assert_golden(results, data)


@pytest.mark.parametrize("case", golden_cases("ms_deform_attn"))
def test_ms_deform_attn_golden(case: str, backend: Runner) -> None:
    """Without the gradient of the logits, which is wrong in the golden data."""
    backend.require("ms_deform_attn")
    if backend.interpreted:
        pytest.skip("Triton's interpreter takes minutes for the golden sizes")
    data = golden_case("ms_deform_attn", case)
    value, locations = (
        torch.from_numpy(data[name]).to(backend.device).requires_grad_()
        for name in ("value", "locations")
    )
    logits = torch.from_numpy(data["logits"]).to(backend.device)
    output = functional.ms_deform_attn(
        value, data["shapes"].tolist(), locations, logits, softmax=True, backend=backend.backend
    )
    output.backward(torch.from_numpy(data["grad_output"]).to(backend.device))
    assert_golden(
        {"output": output, "grad_value": value.grad, "grad_locations": locations.grad}, data
    )


@pytest.mark.parametrize("case", [cases.CONV[2], cases.ATTENTION[0]], ids=lambda case: case.id)
def test_results_own_contiguous_memory(case: cases.Case, backend: Runner) -> None:
    results = backend.run(case, torch.float32)
    pointers = {result.untyped_storage().data_ptr() for result in results.values()}
    assert len(pointers) == len(results)
    assert all(result.is_contiguous() for result in results.values())


@pytest.mark.parametrize("depth", [1, 8, 16, 24])
@pytest.mark.parametrize(("dtype", "even"), [(torch.float16, 2048), (torch.bfloat16, 256)])
def test_ties_are_rounded_to_even(
    dtype: torch.dtype, even: int, depth: int, backend: Runner
) -> None:
    """Sums of two pixels in the middle of two numbers of the dtype."""
    backend.require("deform_conv", dtype)
    if backend.interpreted and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bfloat16 off")
    pixels = torch.tensor([even, 1, even, 3], dtype=dtype)[:, None].expand(4, depth)
    offset_mask = torch.tensor([0, 0, 0, 0, 1, 1], dtype=dtype).expand(1, 1, 2, 6)
    output = functional.deform_conv(
        pixels[None, None].contiguous().to(backend.device),
        offset_mask.contiguous().to(backend.device),
        kernel_size=(1, 2),
        stride=(1, 2),
        padding=0,
        groups=1,
        backend=backend.backend,
    )
    assert output.flatten(0, 2).T.tolist() == [[even, even + 4]] * depth


@pytest.mark.parametrize("case", [cases.CONV[2], cases.ATTENTION[0]], ids=lambda case: case.id)
def test_inference_mode_and_inputs_stay_as_they_are(case: cases.Case, backend: Runner) -> None:
    expected = backend.run(case, torch.float32)["output"]
    *inputs, _ = case.inputs(torch.float32, backend.device)
    kept = [argument.detach().clone() for argument in inputs]
    with torch.inference_mode():
        output = case.call(*inputs, backend=backend.backend)
    assert torch.equal(output, expected)
    assert not output.requires_grad
    assert all(torch.equal(*pair) for pair in zip(inputs, kept, strict=True))


@pytest.mark.parametrize("case", [cases.CONV[2], cases.ATTENTION[0]], ids=lambda case: case.id)
def test_auto_takes_the_first_backend_that_can(case: cases.Case) -> None:
    op = "deform_conv" if isinstance(case, cases.ConvCase) else "ms_deform_attn"
    call = backends.Call(op, torch.device("cpu"), torch.float32)
    first = next(name for name in backends.NAMES if backends.why_not(name, call) is None)
    assert backends.choose(*call, "auto") == first
    *inputs, _ = case.inputs(torch.float32)
    assert torch.equal(case.call(*inputs, backend="auto"), case.call(*inputs, backend=first))
