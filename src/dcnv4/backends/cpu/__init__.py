"""C++ kernels for CPU tensors, compiled by the host's compiler at first use.

Both operators are one problem to the kernels, which `_run` describes: where the points come
from, and where every tensor lies in memory.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...geometry import Window
from .. import Call, cache_dir
from .compile import CompileError, library

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
# The C structure `Problem`: seven views of six numbers, twelve more, five of floating point.
_PROBLEM = struct.Struct("42q 12q 5d")
# The C structure `Call`: where the seven views start, threads, whether this process is forked.
_CALL = struct.Struct("7q 2q")
_View = tuple[int, ...]
_NO_VIEW: _View = (0,) * 6
# Column and row numbers are 32-bit integers in the kernels.
_LARGEST = 2**31 - 1

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


# A forked child has lost the threads of its parent's OpenMP pool and would wait for them forever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def why_not(call: Call) -> str | None:
    """None where the kernels can run `call`; the first question compiles them."""
    if call.device.type != "cpu":
        return f"needs CPU tensors; got {call.device}"
    if call.dtype not in _DTYPES:
        return f"needs float64, float32, bfloat16 or float16; got {call.dtype}"
    kernels = _kernels()
    return kernels if isinstance(kernels, str) else None


def conv_forward(
    value: Tensor, offset_mask: Tensor, window: Window, deterministic: bool = False
) -> Tensor:
    """[B, Ho, Wo, C]."""
    output = value.new_empty((*offset_mask.shape[:3], value.shape[3]))
    _conv("dcnv4_forward", value, offset_mask, window, output)
    return output


def conv_backward(
    grad: Tensor,
    value: Tensor,
    offset_mask: Tensor,
    window: Window,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of `value` and `offset_mask`."""
    grad_value = torch.empty(value.shape, dtype=value.dtype)
    padded = offset_mask.shape[3] > window.offset_mask_channels()
    new = torch.zeros if padded else torch.empty
    grad_mask = new(offset_mask.shape, dtype=offset_mask.dtype)
    grad = _inner(grad.to(value.dtype), 1)
    _conv("dcnv4_backward", value, offset_mask, window, grad, grad_value, grad_mask)
    return grad_value, grad_mask


def attn_forward(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    softmax: bool,
    deterministic: bool = False,
) -> Tensor:
    """[B, Q, C]."""
    output = value.new_empty((*locations.shape[:3], value.shape[3]))
    _attn("dcnv4_forward", value, spatial_shapes, locations, weights, softmax, output)
    return output.flatten(2)


def attn_backward(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    softmax: bool,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `value`, `locations` and `weights`."""
    grads = (
        torch.empty(value.shape, dtype=value.dtype),
        torch.empty(locations.shape, dtype=locations.dtype),
        torch.empty(weights.shape, dtype=weights.dtype),
    )
    grad = _inner(grad.to(value.dtype), 1).unflatten(2, value.shape[2:])
    _attn("dcnv4_backward", value, spatial_shapes, locations, weights, softmax, grad, *grads)
    return grads


class _Layout(NamedTuple):
    """What the kernels must know of a tensor but where it lies."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class _Plan(NamedTuple):
    """What all calls on tensors of the same layouts share: the kernels' arguments."""

    problem: bytes
    levels: bytes
    base: bytes | None


def _conv(
    function: str,
    value: Tensor,
    offset_mask: Tensor,
    window: Window,
    output: Tensor,
    *grads: Tensor,
) -> None:
    """Run a convolution; `output` is the forward's result or the backward's gradient of it."""
    value, offset_mask = _inner(value, 1), _inner(offset_mask, 1)
    if not value.is_contiguous() and value.stride(1) != value.shape[2] * value.stride(2):
        value = value.contiguous()
    plan = _conv_plan(window, *map(_layout, (value, offset_mask, output, *grads)))
    fields, skipped = offset_mask.data_ptr(), 2 * window.points() * offset_mask.element_size()
    starts = [value.data_ptr(), fields, fields + skipped, output.data_ptr()]
    if grads:
        fields = grads[1].data_ptr()
        starts += [grads[0].data_ptr(), fields, fields + skipped]
    _run(function, plan, starts)


@lru_cache(maxsize=256)
def _conv_plan(
    window: Window, value: _Layout, offset_mask: _Layout, output: _Layout, *grads: _Layout
) -> _Plan:
    batch, height, width, channels = value.shape
    if max(height, width) > _LARGEST:
        raise ValueError(f"value must have H, W < 2**31 = {2**31}; got {list(value.shape)}")
    depth, fields = channels // window.groups, 3 * window.points()
    views = [_view(value, depth), *[_view(offset_mask, fields)] * 2, _view(output, depth)]
    if grads:
        views += [_view(grads[0], depth), *[_view(grads[1], fields)] * 2]
    origin = map(float, window.origins(0, 0))  # type: ignore[arg-type]
    down, right = window.stride
    sizes = (batch, *offset_mask.shape[1:3], window.groups, depth, height * width)
    return _plan(
        views,
        (*sizes, 1, window.points(), window.softmax, False),
        (*origin, right, down, window.offset_scale),
        [(height, width, 0)],
        _base(window),
    )


def _attn(
    function: str,
    value: Tensor,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    softmax: bool,
    output: Tensor,
    *grads: Tensor,
) -> None:
    """Run an attention; `output` is the forward's result or the backward's gradient of it."""
    value, locations, weights = _inner(value, 1), _inner(locations, 3), _inner(weights, 2)
    pairs = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    tensors = value, locations, weights, output, *grads
    plan = _attn_plan(tuple(map(tuple, pairs)), softmax, *map(_layout, tensors))
    _run(function, plan, [tensor.data_ptr() for tensor in tensors])


@lru_cache(maxsize=256)
def _attn_plan(
    shapes: tuple[tuple[int, int], ...],
    softmax: bool,
    value: _Layout,
    locations: _Layout,
    *others: _Layout,
) -> _Plan:
    batch, pixels, groups, depth = value.shape
    levels, clipped = _levels(shapes, pixels)
    sizes = (batch, 1, locations.shape[1], groups, depth, pixels)
    return _plan(
        [_heads_view(layout) for layout in (value, locations, *others)],
        (*sizes, len(levels), locations.shape[4], softmax, clipped),
        (-0.5, -0.5, 0.0, 0.0, 0.0),
        levels,
        None,
    )


def _plan(
    views: list[_View],
    integers: tuple[int, ...],
    numbers: tuple[float, ...],
    levels: list[tuple[int, int, int]],
    base: bytes | None,
) -> _Plan:
    views += [_NO_VIEW] * (7 - len(views))
    problem = _PROBLEM.pack(*(n for view in views for n in view), *integers, 0, 0, *numbers)
    packed = struct.pack(f"{3 * len(levels)}q", *(number for level in levels for number in level))
    return _Plan(problem, packed, base)


def _run(function: str, plan: _Plan, starts: list[int]) -> None:
    kernels = _kernels()
    if isinstance(kernels, str):
        raise RuntimeError(f"the cpu backend {kernels}")
    starts += [0] * (7 - len(starts))
    call = _CALL.pack(*starts, torch.get_num_threads(), _forked)
    if getattr(kernels, function)(plan.problem, plan.levels, plan.base, call):
        raise MemoryError("the cpu backend has no memory for its scratch")


@cache
def _kernels() -> ctypes.CDLL | str:
    """The compiled kernels, or why there are none."""
    try:
        return library(cache_dir())
    except CompileError as error:
        return str(error)


def _inner(tensor: Tensor, dimensions: int) -> Tensor:
    """The tensor, or a copy, in which the last dimensions lie in memory without gaps."""
    if tensor.is_contiguous():
        return tensor
    expected = 1
    for size, stride in zip(
        tensor.shape[: -dimensions - 1 : -1], tensor.stride()[::-1], strict=False
    ):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def _layout(tensor: Tensor) -> _Layout:
    return _Layout(tensor.shape, tensor.stride(), tensor.dtype)


def _view(tensor: _Layout, group: int) -> _View:
    """A tensor [B, rows, columns, channels] whose groups are so many channels apart."""
    return (0, _DTYPES[tensor.dtype], *tensor.strides[:3], group)


def _heads_view(tensor: _Layout) -> _View:
    """A tensor [B, S or Q, G, ...]: one row of pixels or queries."""
    image, column, group = tensor.strides[:3]
    return (0, _DTYPES[tensor.dtype], image, 0, column, group)


def _levels(
    shapes: Sequence[tuple[int, int]], pixels: int
) -> tuple[list[tuple[int, int, int]], bool]:
    """Height, width and first pixel of each level, and whether any leaves the value."""
    levels, start, clipped = [], 0, False
    for height, width in shapes:
        stop = start + height * width
        clipped |= min(height, width, start) < 0 or stop > pixels
        fits = 0 <= start <= pixels and min(height, width) >= 0 and max(height, width) <= _LARGEST
        levels.append((height, width, start) if fits else (0, 0, 0))
        start = stop
    return levels, clipped


@cache
def _base(window: Window) -> bytes:
    """(x, y) of each kernel point from the window's centre, as the kernels read them."""
    numbers = [number for cell in window.cells() for number in cell]
    return struct.pack(f"{len(numbers)}d", *numbers)
