"""First and second derivatives by finite differences, and gradients of some inputs only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dcnv4 import functional
from support import cases
from support.grid_sample import sampling_locations
from support.runner import Runner

SMALL: dict[str, cases.Case] = {
    "conv": cases.ConvCase(
        "gradcheck", size=(2, 2), groups=1, depth=2, extra=1, window={"kernel_size": (2, 3)}
    ),
    "conv_softmax": cases.ConvCase(
        "gradcheck_softmax",
        size=(2, 2),
        groups=2,
        depth=1,
        softmax=True,
        window={"kernel_size": 2, "stride": 2, "offset_scale": 0.5, "remove_center": True},
    ),
    "conv_packed": cases.ConvCase(
        "gradcheck_packed", size=(2, 2), groups=1, depth=2, extra=1, layout="packed"
    ),
    "attn": cases.AttnCase("gradcheck", shapes=((2, 3), (1, 2)), per_level=2, queries=2, depth=2),
    "attn_softmax_tensor": cases.AttnCase(
        "gradcheck_tensor",
        shapes=((2, 3), (0, 2), (1, 1)),
        per_level=1,
        queries=2,
        depth=1,
        softmax=True,
        tensor=True,
    ),
    "offsets": cases.OffsetsCase(
        "gradcheck", shapes=((2, 3), (1, 2)), per_level=2, queries=2, depth=2, shared=(1,)
    ),
    "boxes": cases.OffsetsCase(
        "gradcheck_boxes",
        shapes=((2, 3), (0, 2), (1, 1)),
        per_level=1,
        queries=2,
        depth=1,
        softmax=True,
        tensor=True,
        boxes=True,
    ),
    "boxes_by_size": cases.OffsetsCase(
        "gradcheck_size",
        shapes=((2, 3),),
        per_level=2,
        queries=2,
        depth=1,
        boxes=True,
        box_normalizer="size",
        shared=(0,),
    ),
}
CASES = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())


def function(case: cases.Case) -> Callable[..., Tensor]:
    return lambda *inputs: case.call(*inputs, backend="reference")


@CASES
def test_gradcheck(case: cases.Case) -> None:
    *inputs, _ = case.inputs(torch.float64)
    assert gradcheck(function(case), inputs)


@CASES
def test_gradgradcheck(case: cases.Case) -> None:
    *inputs, _ = case.inputs(torch.float64)
    assert gradgradcheck(function(case), inputs)


@CASES
def test_gradients_of_some_inputs(case: cases.Case) -> None:
    """First and second derivatives are the same whichever other inputs need one."""
    *inputs, grad = case.inputs(torch.float64)
    grad = grad.requires_grad_()
    output = case.call(*inputs, backend="reference")
    everything = torch.autograd.grad(output, inputs, grad, create_graph=True)
    for n, wanted in enumerate(inputs):
        alone = [t.detach() for t in inputs]
        alone[n] = wanted.detach().requires_grad_()
        output = case.call(*alone, backend="reference")
        (first,) = torch.autograd.grad(output, alone[n], grad, create_graph=True)
        torch.testing.assert_close(first, everything[n], rtol=1e-12, atol=1e-12)
        if not first.requires_grad:
            pytest.fail("the gradient must be differentiable")
        targets = grad, alone[n]
        seconds = torch.autograd.grad(first.square().sum(), targets, allow_unused=True)
        expected = torch.autograd.grad(
            everything[n].square().sum(), (grad, wanted), retain_graph=True, allow_unused=True
        )
        for second, right in zip(seconds, expected, strict=True):
            second, right = (torch.zeros(()) if t is None else t for t in (second, right))
            torch.testing.assert_close(
                second, right.expand_as(second), rtol=1e-12, atol=1e-12, check_dtype=False
            )


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives_by_dtype(case: cases.Case, dtype: torch.dtype) -> None:
    """A gradient penalty in a low precision is that in float64 to the precision's rounding."""

    def penalty(dtype: torch.dtype) -> list[Tensor]:
        *inputs, grad = case.inputs(dtype)
        # The numbers of float64 are the rounded ones.
        rounded = [t.detach().to(low).to(dtype).requires_grad_() for t in inputs]
        output = case.call(*rounded, backend="reference")
        grads = torch.autograd.grad(output, rounded, grad.to(low).to(dtype), create_graph=True)
        total = sum(g.double().square().sum() for g in grads)
        assert isinstance(total, Tensor)
        return list(torch.autograd.grad(total, rounded))

    low = dtype
    for got, expected in zip(penalty(dtype), penalty(torch.float64), strict=True):
        assert got.dtype == dtype
        error = (got.double() - expected).norm() / expected.norm().clamp_min(1e-3)
        assert error <= 16 * torch.finfo(dtype).eps


def test_no_gradient_where_none_is_wanted() -> None:
    value, offset_mask, _ = cases.CONV[2].inputs(torch.float32)
    with torch.no_grad():
        assert not functional.deform_conv(value, offset_mask, groups=2).requires_grad
    frozen = value.detach(), offset_mask.detach()
    assert not functional.deform_conv(*frozen, groups=2).requires_grad
    output = functional.deform_conv(value, frozen[1], groups=2)
    output.sum().backward()
    assert value.grad is not None
    assert frozen[1].grad is None


def test_gradient_of_a_level_tensor_is_none() -> None:
    case = SMALL["attn_softmax_tensor"]
    *inputs, grad = case.inputs(torch.float32)
    case.call(*inputs).backward(grad)
    results: dict[str, Any] = {name: t.grad for name, t in zip(case.names, inputs, strict=True)}
    assert all(torch.isfinite(grad).all() for grad in results.values())


@CASES
def test_backward_twice_through_a_kept_graph(case: cases.Case) -> None:
    *inputs, grad = case.inputs(torch.float32)
    output = case.call(*inputs)
    first = torch.autograd.grad(output, inputs, grad, retain_graph=True)
    second = torch.autograd.grad(output, inputs, grad)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, inputs, grad)


@pytest.mark.parametrize("box_normalizer", ["points", "size"])
def test_boxes_without_a_size(box_normalizer: str, backend: Runner) -> None:
    """Their points are one, and what moves them apart is the boxes' own gradient."""
    backend.require("ms_deform_attn")
    case = cases.OffsetsCase("flat", boxes=True, box_normalizer=box_normalizer, queries=2)
    *inputs, grad = case.inputs(torch.float32, backend.device)
    inputs[1].detach()[..., 2:] = 0

    def gradients(inputs: list[Tensor], backend: str) -> list[Tensor]:
        output = case.call(*inputs, backend=backend)
        return list(torch.autograd.grad(output, inputs, grad.to(output.dtype)))

    got = gradients(inputs, backend.backend)
    wide = [t.detach().cpu().double().requires_grad_() for t in inputs]
    output = by_locations(case, *wide)
    expected = torch.autograd.grad(output, wide, grad.cpu().double())
    assert expected[1][..., 2:].abs().min() > 0
    assert not expected[2].any()
    for name, one, other in zip(case.names, got, expected, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-5, atol=1e-5, msg=name)


def by_locations(case: cases.OffsetsCase, *inputs: Tensor) -> Tensor:
    """The call as one of `ms_deform_attn`."""
    value, references, offsets, weights = inputs
    locations = sampling_locations(references, offsets, case.shapes, case.box_normalizer)
    return functional.ms_deform_attn(
        value, case.shapes, locations, weights, softmax=case.softmax, backend="reference"
    )
