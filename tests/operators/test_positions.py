"""Positions of `deform_conv` are as exact in the last column of a long image as in the first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dcnv4 import functional
from support import cases
from support.runner import Runner

pytest.importorskip("hypothesis", reason="shifts are tried by hypothesis")
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

# Pixels beyond which no point of these tests is from its window.
REACH = 24
AXES = pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])


def along(tall: bool, short: int, long: int) -> tuple[int, int]:
    """A pair (height, width), the second number along the long axis."""
    return (long, short) if tall else (short, long)


def assert_exact(results: dict[str, Tensor], expected: dict[str, Any], points: int) -> None:
    """The relative error must be at most 1e-6, of the offsets' gradient and the weights' each."""
    for name, right in expected.items():
        got, right = np.asarray(results[name].detach().cpu(), np.float64), np.asarray(right)
        parts = {name: slice(None)}
        if name == "grad_offset_mask":
            parts = {"offsets": slice(0, 2 * points), "weights": slice(2 * points, 3 * points)}
        for part, channels in parts.items():
            error = np.linalg.norm((got - right)[..., channels])
            size = np.linalg.norm(right[..., channels])
            assert error <= 1e-6 * size, f"{part}: relative error {error / size:.3g}"


@AXES
@pytest.mark.parametrize("length", [40, 4096, 65536, 2**22])
def test_error_does_not_grow_with_the_length(length: int, tall: bool, backend: Runner) -> None:
    """About 20 windows, from the first pixel to the last."""
    window = {
        "kernel_size": along(tall, 1, 3),
        "padding": along(tall, 0, 1),
        "stride": along(tall, 1, (length - 1) // 19),
    }
    case = cases.ConvCase(
        f"long_{length}", size=along(tall, 1, length), window=window, groups=1, depth=2
    )
    assert 20 <= case.points // 3 <= 40
    results = backend.run(case, torch.float32)
    arrays = [tensor.detach().double().numpy() for tensor in case.inputs(torch.float32)]
    expected = dict(zip(results, case.loops(*arrays), strict=True))
    assert_exact(results, expected, case.points_per_group)


@AXES
def test_error_at_every_pixel_of_a_long_image(tall: bool, backend: Runner) -> None:
    """Windows that overlap; three parts of the image are computed in float64 as images."""
    backend.require("deform_conv")
    if backend.interpreted:
        pytest.skip("Triton's interpreter takes minutes for a long image")
    length, size, margin = 8192, 24, 16
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, *along(tall, 2, length), 2, generator=generator)
    offset_mask = torch.randn(1, *along(tall, 2, length), 27, generator=generator).clamp(-4, 4)
    starts = (margin, length // 2, length - margin - size)
    grad = torch.zeros_like(value)
    for start in starts:
        cut(grad, tall, start, size).normal_(generator=generator)
    inputs = value, offset_mask, grad
    results = run(*inputs, {"groups": 1, "backend": backend.backend}, backend.device)
    for start in starts:
        part = [cut(t, tall, start - margin, size + 2 * margin).double() for t in inputs]
        expected = run(*part, {"groups": 1, "backend": "reference"})
        assert_exact(
            {name: cut(result, tall, start, size) for name, result in results.items()},
            {name: cut(result, tall, margin, size) for name, result in expected.items()},
            points=9,
        )


@AXES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
def test_a_million_columns_further(dtype: torch.dtype, tall: bool, backend: Runner) -> None:
    backend.require("deform_conv", dtype)
    settings = {"kernel_size": 3, "stride": along(tall, 1, 2**17), "groups": 2}
    check_shift(backend, dtype, tall, length=2**20, columns=3, shift=3, depth=2, settings=settings)


PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@examples(
    max_examples=15,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    dtype=st.sampled_from((torch.float32, torch.float64)),
    tall=st.booleans(),
    shift=st.integers(1, 1000),
    depth=st.sampled_from((1, 2, 8, 16)),
    settings=st.fixed_dictionaries(
        {
            "kernel_size": PAIRS,
            "stride": PAIRS,
            "padding": st.tuples(st.integers(2, 4), st.integers(2, 4)),
            "dilation": PAIRS,
            "groups": st.integers(1, 3),
            "offset_scale": st.sampled_from((0.5, 1.0, 1.3)),
            "softmax": st.booleans(),
        }
    ),
)
def test_any_shift(
    dtype: torch.dtype,
    tall: bool,
    shift: int,
    depth: int,
    settings: dict[str, Any],
    backend: Runner,
) -> None:
    backend.require("deform_conv", dtype)
    if backend.interpreted:
        pytest.skip("Triton's interpreter takes too long for many calls")
    step = settings["stride"][0 if tall else 1]
    columns = 2 * REACH // step + 9
    length = 2 * REACH + step * (columns + shift + 1)
    check_shift(backend, dtype, tall, length, columns, shift, depth, settings)


def check_shift(
    backend: Runner,
    dtype: torch.dtype,
    tall: bool,
    length: int,
    columns: int,
    shift: int,
    depth: int,
    settings: dict[str, Any],
) -> None:
    """Input and `offset_mask` shifted by whole pixels: the same bits of the output and of the
    gradient of `offset_mask`, and the gradient of the value within the budget of its sums.

    `shift` and `columns`, which are compared, are those of the output.
    """
    window = functional.window(**settings)
    step, points = window.stride[0 if tall else 1], window.points()
    size = along(tall, 3, length)
    outputs = window.output_size(*size)
    generator = torch.Generator().manual_seed(shift)
    value, mask, grad = (
        torch.randn(1, *pixels, window.groups * channels, generator=generator, dtype=dtype)
        for pixels, channels in ((size, depth), (outputs, 3 * points), (outputs, depth))
    )
    by_group = mask.unflatten(-1, (window.groups, 3 * points))
    by_group[..., : 2 * points].clamp_(-3, 3)
    start = -(-REACH // step)
    assert (start + columns + shift) * step + REACH <= length

    axis, backends = 1 if tall else 2, {**settings, "backend": backend.backend}
    near = run(value, mask, grad, backends, backend.device)
    rolled = value.roll(shift * step, axis), mask.roll(shift, axis), grad.roll(shift, axis)
    far = run(*rolled, backends, backend.device)
    for name in ("output", "grad_offset_mask"):
        one = cut(near[name], tall, start, columns)
        other = cut(far[name], tall, start + shift, columns)
        assert torch.equal(one, other), f"{name}: {(one - other).abs().max():.3g}"

    # Pixels to which no other column of the output adds.
    inner, pixels = start * step + REACH, (columns - 1) * step - 2 * REACH
    if not window.softmax:
        by_group[..., 2 * points :].abs_()
    positive = value.double(), mask.double(), grad.abs().double()
    terms = run(*positive, {**settings, "backend": "reference"})["grad_value"]
    terms = cut(terms, tall, inner, pixels)
    assert terms.count_nonzero() > 0
    one = cut(near["grad_value"], tall, inner, pixels)
    other = cut(far["grad_value"], tall, inner + shift * step, pixels)
    most = min(outputs) * (2 * REACH // step + 1) * points
    assert ((one - other).abs() <= (most + 8) * torch.finfo(dtype).eps * terms).all()


def cut(tensor: Tensor, tall: bool, start: int, size: int) -> Tensor:
    """A part of images [B, H, W, C], along the long axis."""
    return tensor.narrow(1 if tall else 2, start, size)


def run(
    value: Tensor, offset_mask: Tensor, grad: Tensor, settings: dict[str, Any], device: str = "cpu"
) -> dict[str, Tensor]:
    """Output and gradients, by name."""
    inputs = [tensor.detach().to(device).requires_grad_() for tensor in (value, offset_mask)]
    output = functional.deform_conv(*inputs, **settings)
    grads = torch.autograd.grad(output, inputs, grad.to(device))
    results = {"output": output, "grad_value": grads[0], "grad_offset_mask": grads[1]}
    return {name: result.detach().cpu() for name, result in results.items()}
