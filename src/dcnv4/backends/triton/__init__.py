"""Kernels in Triton, which compiles them for the GPU at hand at the first call.

`TRITON_INTERPRET=1` runs them on CPU tensors instead, slowly, so that tests need no GPU.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...geometry import Window, sum_dtype
from .. import UNORDERED, Call, set_triton_cache_dir, triton_cache_dir
from ..folders import private, temporary, warn

_ENTRIES = r"[A-Z2-7]{52}"
"""What the names of entries of Triton's cache look like."""


def why_not(call: Call) -> str | None:
    """None where Triton can run `call`; otherwise one sentence that says why not."""
    try:
        from triton import __version__ as version
    except ImportError as error:
        return f"needs triton >= 3.0 (python -m pip install triton); got {error}"
    if int(version.split(".")[0]) < 3:
        return f"needs triton >= 3.0 (python -m pip install --upgrade triton); got {version}"
    kernels = _kernels()
    if call.device.type in ("cuda", "xpu") or kernels.is_interpreted():
        return UNORDERED if call.deterministic else None
    return f"needs a GPU, or TRITON_INTERPRET=1 when Python starts; got {call.device}"


class Launch(NamedTuple):
    """How rows (an output pixel of a group) are divided among programs; see `kernels`."""

    block: int
    """Rows a program."""
    block_g: int
    """Neighbouring groups whose rows a program holds; it divides G."""
    block_d: int
    """Channels of a row, up to the next power of two."""
    block_k: int
    """Points of a row, up to the next power of two."""
    chunk: int
    """Points whose code is unrolled; it divides their number."""
    warps: int

    def programs(self, pixels: int, groups: int) -> int:
        """How many programs cover the rows of these output pixels."""
        return -(-pixels * self.block_g // self.block) * (groups // self.block_g)


@lru_cache(maxsize=1024)
def preferred(
    groups: int, depth: int, levels: int | None, points: int, itemsize: int, backward: bool
) -> Launch:
    """The launch of G groups of D channels of `itemsize` bytes; neither batch nor image matter.

    `levels` is None for a convolution. Forward, a thread loads 16 bytes of a row's channels at a
    time, and the points of a small kernel are all unrolled. Backward, it adds 16 bytes, and fewer
    unrolled points compile sooner and run as fast; programs of one warp were the fastest for
    convolutions, of four for attention. Always, the groups of a program span at least 64 channels
    where there are as many, so that its rows share memory lines.
    """
    block_d, block_k = _power(depth), _power((levels or 1) * points)
    warps = 1 if backward and levels is None else 4
    per_thread = 4 if backward else 16 // itemsize
    # Tiles [block, block_d] of sums and [block, block_k] of coordinates' gradients or of logits
    # have to stay in registers.
    most = 32 * warps * (16 if backward else 64) // block_k
    block = max(1, min(32 * warps * per_thread // block_d, most, 128))
    divisors = [g for g in range(1, groups + 1) if groups % g == 0]
    block_g = next((g for g in divisors if g * depth >= 64), groups)
    chunk = max(n for n in range(1, (3 if backward else 9) + 1) if points % n == 0)
    return Launch(block, block_g, block_d, block_k, chunk, warps)


def conv_forward(
    value: Tensor, offset_mask: Tensor, window: Window, deterministic: bool = False
) -> Tensor:
    """[B, Ho, Wo, C]"""
    batch, height, width, channels = value.shape
    rows, columns = offset_mask.shape[1:3]
    output = value.new_empty((batch, rows, columns, channels))
    if output.numel() == 0:
        return output
    value, stride = _pixels(value, 3)
    fields, fields_stride = _pixels(offset_mask, 3)
    pixels = batch * rows * columns
    index = _index(batch * height * width * stride, pixels * fields_stride, pixels * channels)
    launch, constants = _conv_constants(window, channels, value.dtype, index, stride, fields_stride)
    with _on(value.device):
        _kernels().conv_forward[(launch.programs(pixels, window.groups),)](
            value,
            fields,
            output,
            *(height, width, rows, columns, pixels),
            *constants,
            num_warps=launch.warps,
        )
    return output


def conv_backward(
    grad: Tensor,
    value: Tensor,
    offset_mask: Tensor,
    window: Window,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of `value` and `offset_mask`."""
    batch, height, width, channels = shape = value.shape
    rows, columns, count = offset_mask.shape[1:]
    grad_value = torch.zeros(shape, dtype=sum_dtype(value.dtype), device=value.device)
    grad_fields = offset_mask.new_empty(offset_mask.shape)
    if grad.numel() > 0:
        grad, grad_stride = _pixels(grad, 3)
        value, stride = _pixels(value, 3)
        fields, fields_stride = _pixels(offset_mask, 3)
        pixels = batch * rows * columns
        index = _index(
            batch * height * width * max(stride, channels),
            pixels * max(fields_stride, count, grad_stride),
        )
        launch, constants = _conv_constants(
            window, channels, value.dtype, index, stride, fields_stride, count, grad_stride
        )
        with _on(value.device):
            _kernels().conv_backward[(launch.programs(pixels, window.groups),)](
                grad,
                value,
                fields,
                grad_value,
                grad_fields,
                *(height, width, rows, columns, pixels),
                *constants,
                num_warps=launch.warps,
            )
    return grad_value.to(value.dtype), grad_fields


def attn_forward(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    softmax: bool,
    deterministic: bool = False,
) -> Tensor:
    """[B, Q, C]"""
    batch, length, groups, depth = value.shape
    queries = locations.shape[1]
    output = value.new_empty((batch, queries, groups * depth))
    if output.numel() == 0:
        return output
    value, stride = _pixels(value, 2)
    levels, points = locations.shape[3:5]
    locations, locations_stride = _pixels(locations, 2)
    weights, weights_stride = _pixels(weights, 2)
    pixels = batch * queries
    index = _index(
        batch * length * stride,
        pixels * max(locations_stride, weights_stride, groups * depth),
    )
    launch, constants = _attn_constants(
        *(groups, depth, levels, points, softmax),
        *(value.dtype, index, stride, locations_stride, weights_stride),
    )
    with _on(value.device):
        _kernels().attn_forward[(launch.programs(pixels, groups),)](
            value,
            _sizes(spatial_shapes, value.device),
            locations,
            weights,
            output,
            *(length, queries, pixels),
            *constants,
            num_warps=launch.warps,
        )
    return output


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
    batch, length, groups, depth = shape = value.shape
    queries = locations.shape[1]
    grad_value = torch.zeros(shape, dtype=sum_dtype(value.dtype), device=value.device)
    grad_locations = locations.new_empty(locations.shape)
    grad_weights = weights.new_empty(weights.shape)
    if grad.numel() > 0:
        grad, grad_stride = _pixels(grad, 2)
        value, stride = _pixels(value, 2)
        locations, locations_stride = _pixels(locations, 2)
        weights, weights_stride = _pixels(weights, 2)
        pixels = batch * queries
        index = _index(
            batch * length * max(stride, groups * depth),
            pixels * max(locations_stride, weights_stride, grad_stride),
            grad_locations.numel(),
        )
        launch, constants = _attn_constants(
            *(groups, depth, *grad_locations.shape[3:5], softmax),
            *(value.dtype, index, stride, locations_stride, weights_stride, grad_stride),
        )
        with _on(value.device):
            _kernels().attn_backward[(launch.programs(pixels, groups),)](
                grad,
                value,
                _sizes(spatial_shapes, value.device),
                locations,
                weights,
                grad_value,
                grad_locations,
                grad_weights,
                *(length, queries, pixels),
                *constants,
                num_warps=launch.warps,
            )
    return grad_value.to(value.dtype), grad_locations, grad_weights


@lru_cache(maxsize=1024)
def _conv_constants(
    window: Window,
    channels: int,
    dtype: torch.dtype,
    index: str,
    *layout: int,
) -> tuple[Launch, tuple[Any, ...]]:
    """The launch and a kernel's constants; `layout` goes with a gradient where it has four."""
    depth = channels // window.groups
    launch = preferred(window.groups, depth, None, window.points(), _bytes(dtype), len(layout) > 2)
    (kernel, stride, padding, dilation), rest = window[:4], window[4:]
    constants = (*kernel, *stride, *padding, *dilation, *rest, depth, *layout)
    return launch, (*constants, *launch[:5], *_types(dtype, index))


@lru_cache(maxsize=1024)
def _attn_constants(
    groups: int,
    depth: int,
    levels: int,
    points: int,
    softmax: bool,
    dtype: torch.dtype,
    index: str,
    *strides: int,
) -> tuple[Launch, tuple[Any, ...]]:
    """The launch and a kernel's constants; `strides` are a gradient's where there are four."""
    launch = preferred(groups, depth, levels, points, _bytes(dtype), len(strides) > 3)
    constants = (groups, depth, levels, points, softmax, *strides)
    return launch, (*constants, *launch[:5], *_types(dtype, index))


def _types(dtype: torch.dtype, index: str) -> tuple[Any, Any]:
    """Triton's types of sums and of offsets in elements."""
    tl = _kernels().tl
    return tl.float64 if dtype == torch.float64 else tl.float32, getattr(tl, index)


def _bytes(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits // 8


def _index(*elements: int) -> str:
    """The type of offsets into tensors of so many elements, and a program's rows past the end."""
    return "int32" if max(elements) < 2**31 - 2**20 else "int64"


def _pixels(tensor: Tensor, leading: int) -> tuple[Tensor, int]:
    """A tensor whose leading dimensions can be walked as one, and its pixels' distance in elements.

    It is copied only where pixels are unevenly spaced or their channels not contiguous.
    """
    shape = tensor.shape
    channels = shape[leading:].numel()
    if tensor.is_contiguous():
        return tensor, channels
    flat = tensor.reshape(shape[:leading].numel(), channels)
    if flat.stride(1) != 1 and channels > 1:
        return flat.contiguous(), channels
    return flat, flat.stride(0) if flat.shape[0] > 1 else channels


def _sizes(spatial_shapes: Tensor | Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """The levels' sizes [L, 2] on the device."""
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.device == device:
            return spatial_shapes.contiguous()
        spatial_shapes = [(height, width) for height, width in spatial_shapes.tolist()]
    shapes = tuple(spatial_shapes)
    if device.type == "cpu":
        return torch.tensor(shapes)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _filled(shapes, device)
    return _cached(shapes, device, getattr(torch, device.type).current_stream(device))


def _filled(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """The shapes on the device: no copy to wait for, and a CUDA graph records them."""
    filled = torch.empty((len(shapes), 2), dtype=torch.int32, device=device)
    for row, shape in zip(filled, shapes, strict=True):
        for number, size in zip(row, shape, strict=True):
            number.fill_(size)
    return filled


@lru_cache(maxsize=256)
def _cached(shapes: tuple[tuple[int, int], ...], device: torch.device, stream: Any) -> Tensor:
    """`_filled`, kept for calls on the same stream, which runs after it."""
    return _filled(shapes, device)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensors' own."""
    if device.type == "cpu":
        return nullcontext()
    _guard_cache()
    accelerator = getattr(torch, device.type)
    if device.index == accelerator.current_device():
        return nullcontext()
    return accelerator.device(device)  # type: ignore[no-any-return]


def _kernels() -> Any:
    from . import kernels

    return kernels


@cache
def _guard_cache() -> None:
    """Let Triton, which loads whatever lies in its cache, have one that nobody else can write."""
    folder, named = triton_cache_dir()
    # A folder that somebody chose may be meant for several users: it is not tightened.
    kept = private(folder, None if named else _ENTRIES, "TRITON_CACHE_DIR")
    if kept is not None and not os.access(kept, os.W_OK):
        warn(kept, PermissionError(errno.EACCES, "it cannot be written"), "TRITON_CACHE_DIR")
        kept = None
    if kept is None:
        set_triton_cache_dir(str(temporary()))


def _power(number: int) -> int:
    """The least power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
