"""Positions in the CUDA kernels: an integer and a small number, on an emulated GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dcnv4.backends import reference
from dcnv4.geometry import Window
from support.emulated import emulated, why_not
from support.launches import DIRECT, EVERY, SORTED, launching
from support.tiers import one_in

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"the emulator {why_not()}")


def _window(stride: tuple[int, int] = (1, 1), scale: float = 1.0) -> Window:
    return Window((3, 3), stride, (1, 1), (1, 1), 1, scale, False, False)


DIRECT_KERNELS = "conv_forward", "conv_backward", "zeros"
SORTED_KERNELS = "conv_forward", "conv_sorted_backward", "zeros"
TILE_KERNELS = *SORTED_KERNELS, "conv_tile_forward", "conv_tile_backward", "convert_sums"


def _run(
    inputs: tuple[Tensor, ...], window: Window, slices: dict[str, int], names: tuple[str, ...]
) -> dict[str, Tensor]:
    """From the kernels of these names."""
    value, offset_mask, grad = inputs
    with emulated(pays_from=slices) as backend, launching(*names):
        output = backend.conv_forward(value, offset_mask, window)
        grad_value, grad_mask = backend.conv_backward(grad, value, offset_mask, window)
    return {"output": output, "grad_value": grad_value, "grad_offset_mask": grad_mask}


@pytest.mark.parametrize("size", one_in(3, [1 << 16, 1 << 12, 1 << 20]))
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("slices", "names"),
    [(DIRECT, DIRECT_KERNELS), (SORTED, SORTED_KERNELS)],
    ids=["direct", "sorted"],
)
def test_far_from_the_first_pixel(
    size: int, axis: int, slices: dict[str, int], names: tuple[str, ...]
) -> None:
    """As precise as near it: long signals, of which few windows are computed."""
    stride = size // 8
    window = _window((stride, 1) if axis == 0 else (1, stride))
    generator = torch.Generator().manual_seed(0)
    shape, outer = ((size, 1), (8, 1)) if axis == 0 else ((1, size), (1, 8))
    sizes = (1, *shape, 16), (1, *outer, 27), (1, *outer, 16)
    inputs = tuple(torch.randn(size, generator=generator) for size in sizes)
    assert window.output_size(*shape) == outer
    results = _run(inputs, window, slices, names)
    value, offset_mask, grad = (tensor.double() for tensor in inputs)
    expected = (
        reference.conv_forward(value, offset_mask, window),
        *reference.conv_backward(grad, value, offset_mask, window),
    )
    for (name, result), right in zip(results.items(), expected, strict=True):
        assert (result - right).norm() <= 1e-6 * right.norm(), name


@pytest.mark.parametrize(
    ("dtype", "slices", "names"),
    [
        (torch.float64, DIRECT, DIRECT_KERNELS),
        (torch.float32, DIRECT, DIRECT_KERNELS),
        (torch.float32, SORTED, SORTED_KERNELS),
    ],
    ids=["float64-direct", "float32-direct", "float32-sorted"],
)
def test_a_shift_by_whole_pixels(
    dtype: torch.dtype, slices: dict[str, int], names: tuple[str, ...]
) -> None:
    """The same bits, of an output and of its gradients, away from the borders."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 9, 9, 16), (1, 9, 9, 27), (1, 9, 9, 16)
    inputs = [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]
    inputs[1][..., :18].clamp_(-1.5, 1.5)
    window, down, right = _window(), 1, 333
    shifted = [tensor.new_zeros(1, 9 + down, 9 + right, tensor.shape[3]) for tensor in inputs]
    for small, large in zip(inputs, shifted, strict=True):
        large[:, down:, right:] = small
    first = _run(tuple(inputs), window, slices, names)
    second = _run(tuple(shifted), window, slices, names)
    for name in ("output", "grad_offset_mask"):
        inner = first[name][:, 3:6, 3:6]
        assert torch.equal(inner, second[name][:, 3 + down : 6 + down, 3 + right : 6 + right]), name
        assert inner.count_nonzero() == inner.numel(), name


@pytest.mark.parametrize(
    ("dtype", "slices", "names", "scale"),
    [
        (torch.float64, DIRECT, DIRECT_KERNELS, 1.0),
        (torch.float32, DIRECT, DIRECT_KERNELS, 1.0),
        (torch.float32, SORTED, SORTED_KERNELS, 1.0),
        (torch.float16, EVERY, TILE_KERNELS, 1.0),
        (torch.float16, EVERY, TILE_KERNELS, 0.5),
        (torch.float16, EVERY, TILE_KERNELS, 2.0),
        (torch.float16, EVERY, TILE_KERNELS, -1.0),
    ],
    ids=[
        *("float64-direct", "float32-direct", "float32-sorted"),
        *("float16-tiles", "float16-tiles-0.5", "float16-tiles-2", "float16-tiles-mirrored"),
    ],
)
def test_at_and_beyond_the_borders(
    dtype: torch.dtype, slices: dict[str, int], names: tuple[str, ...], scale: float
) -> None:
    """One pixel outside, where a point is outside though a corner of it is not; and what no integer
    holds."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 4, 8, 16), (1, 4, 8, 28), (1, 4, 8, 16)
    value, offset_mask, grad = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    points = offset_mask[..., :18].view(1, 4, 8, 9, 2)
    points.zero_()
    far = [math.inf, -math.inf, math.nan, 3e4, -3e4]
    if dtype != torch.float16:
        far += [2.0**31, -(2.0**31), 1e30, -1e30]
    for i, number in enumerate(far):
        points[0, i % 4, i % 8, i % 9, i % 2] = number
    window = _window(scale=scale)
    # Undeformed points of half a kernel lie between pixels; these lie on the one just outside.
    if scale == 0.5:
        points[0, 1:3, 0, :3, 0] = -1
    results = _run((value, offset_mask, grad), window, slices, names)
    exact = value.double(), offset_mask.double(), grad.double()
    expected = (
        reference.conv_forward(*exact[:2], window),
        *reference.conv_backward(exact[2], *exact[:2], window),
    )
    tolerance = {torch.float16: 2**-8, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for (name, result), right in zip(results.items(), expected, strict=True):
        torch.testing.assert_close(
            result.double(),
            right,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )
