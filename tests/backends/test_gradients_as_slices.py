"""Backwards of attention write the gradients of offsets and weights where they are told to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from dcnv4 import backends
from dcnv4.geometry import Reference
from support import cases, emulated, launches

CASES = (
    cases.OffsetsCase("slices", batch=2, queries=3, depth=8, softmax=True, shared=(1,)),
    cases.OffsetsCase("slices_of_boxes", queries=1, batch=2, boxes=True),
    cases.OffsetsCase("slices_of_none", queries=0),
)


@pytest.fixture(params=backends.NAMES)
def backend(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Each on CPU tensors."""
    name = request.param
    with ExitStack() as stack:
        if name == "cuda":
            if (reason := emulated.why_not()) is not None:
                pytest.skip(f"the emulator {reason}")
            stack.enter_context(emulated.emulated())
        call = backends.Call("ms_deform_attn", torch.device("cpu"), torch.float16)
        if (reason := backends.load(name).why_not(call)) is not None:
            pytest.skip(f"{name}: {reason}")
        yield backends.load(name)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_slices_of_one_buffer(
    case: cases.OffsetsCase, dtype: torch.dtype, deterministic: bool, backend: Any
) -> None:
    """The same bits as in tensors of their own, and nothing beside them."""
    *inputs, grad = (t.detach() for t in case.inputs(dtype))
    value, points, offsets, weights = inputs
    rows, count = offsets.shape[:2], weights.shape[2:].numel()
    buffer = torch.full((*rows, 3 * count + 5), -7.0, dtype=dtype)
    grad_offsets = buffer[..., 1 : 2 * count + 1].unflatten(-1, offsets.shape[2:])
    grad_weights = buffer[..., 2 * count + 1 : -4].unflatten(-1, weights.shape[2:])

    def run(out: backends.AttnGrads | None) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[Tensor, Tensor, Tensor] = backend.attn_backward(
            *(grad, value, case.shapes, offsets, weights, case.softmax, deterministic),
            *(Reference(points, case.box_normalizer), out),
        )
        return grads

    names = launches.expected(case, dtype, deterministic=deterministic) - {"attn_forward"}
    expected = run(None)
    for grad_value in (None, torch.empty(value.shape, dtype=dtype)):
        buffer.fill_(-7)
        with launches.recorded() as launched:
            found = run((grad_value, grad_offsets, grad_weights))
        assert set(launched.names) == (names if backend.__name__.endswith("cuda") else set())
        assert found[1].data_ptr() == grad_offsets.data_ptr()
        assert found[2].data_ptr() == grad_weights.data_ptr()
        assert grad_value is None or found[0] is grad_value
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        assert (buffer[..., [0, -4, -3, -2, -1]] == -7).all()
