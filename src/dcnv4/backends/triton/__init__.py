"""Kernels in Triton, which compiles them for the GPU at hand at the first call.

`TRITON_INTERPRET=1` runs them on CPU tensors instead, slowly, so that tests need no GPU.
"""

from __future__ import annotations

import errno
import inspect
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...geometry import Reference, Window, reference_steps, sum_dtype
from .. import UNORDERED, AttnGrads, Call, set_triton_cache_dir, triton_cache_dir
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


class Heads(NamedTuple):
    """What an attention does for every query: to the kernels what a Window is."""

    groups: int
    levels: int
    points_per_level: int
    softmax: bool
    reference: tuple[int, str] | None = None
    """Of reference points: how many numbers each has, and what boxes are normalised by."""


def conv_forward(
    value: Tensor, offset_mask: Tensor, window: Window, deterministic: bool = False
) -> Tensor:
    """[B, Ho, Wo, C]"""
    output = value.new_empty((*offset_mask.shape[:3], value.shape[3]))
    _run_conv("forward", value, offset_mask, window, output=output)
    return output


def conv_backward(
    grad: Tensor,
    value: Tensor,
    offset_mask: Tensor,
    window: Window,
    deterministic: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `value` and `offset_mask`."""
    grads = out or (value.new_empty(value.shape), offset_mask.new_empty(offset_mask.shape))
    grad_value, grad_offset_mask = grads
    if (dtype := sum_dtype(value.dtype)) == value.dtype:
        sums = grad_value.zero_()
    else:
        sums = torch.zeros(value.shape, dtype=dtype, device=value.device)
    _run_conv(
        *("backward", value, offset_mask, window),
        grad_output=grad,
        grad_value=sums,
        grad_coordinates=grad_offset_mask,
        grad_weights=None,
    )
    if sums is not grad_value:
        grad_value.copy_(sums)
    return grads


def attn_forward(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    coordinates: Tensor,
    weights: Tensor,
    softmax: bool,
    deterministic: bool = False,
    reference: Reference | None = None,
) -> Tensor:
    """[B, Q, C]"""
    output = value.new_empty((*coordinates.shape[:2], value.shape[2] * value.shape[3]))
    arguments = value, spatial_shapes, coordinates, weights, softmax, reference
    _run_attn("forward", *arguments, output=output)
    return output


def attn_backward(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    coordinates: Tensor,
    weights: Tensor,
    softmax: bool,
    deterministic: bool = False,
    reference: Reference | None = None,
    out: AttnGrads | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `value`, `coordinates` and `weights`."""
    sums = torch.zeros(value.shape, dtype=sum_dtype(value.dtype), device=value.device)
    grad_value, grad_coordinates, grad_weights = out or (
        None,
        coordinates.new_empty(coordinates.shape),
        weights.new_empty(weights.shape),
    )
    _run_attn(
        *("backward", value, spatial_shapes, coordinates, weights, softmax, reference),
        grad_output=grad,
        grad_value=sums,
        grad_coordinates=grad_coordinates,
        grad_weights=grad_weights,
    )
    grad_value = sums.to(value.dtype) if grad_value is None else grad_value.copy_(sums)
    return grad_value, grad_coordinates, grad_weights


def _run_conv(
    kernel: str, value: Tensor, offset_mask: Tensor, window: Window, **others: Tensor | None
) -> None:
    tensors = {"value": value, "coordinates": offset_mask, "weights": None, **others}
    _run(kernel, window, value.shape[:3], offset_mask.shape[1:3], tensors)


def _run_attn(
    kernel: str,
    value: Tensor,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    coordinates: Tensor,
    weights: Tensor,
    softmax: bool,
    reference: Reference | None,
    **others: Tensor,
) -> None:
    groups, levels, points = coordinates.shape[2:5]
    heads, place = Heads(groups, levels, points, softmax), None
    if reference is not None:
        place = reference.points.contiguous()
        heads = heads._replace(reference=(place.shape[3], reference.box_normalizer))
    tensors = {"value": value, "coordinates": coordinates, "weights": weights, **others}
    sizes = (*value.shape[:2], 1), (coordinates.shape[1], 1)
    _run(kernel, heads, *sizes, tensors, spatial_shapes, place)


def _run(
    kernel: str,
    layer: Window | Heads,
    size: Sequence[int],
    output_size: Sequence[int],
    tensors: Mapping[str, Tensor | None],
    spatial_shapes: Tensor | Sequence[tuple[int, int]] | None = None,
    reference: Tensor | None = None,
) -> None:
    """Launch a kernel on the tensors that it names so.

    `size` is that of the value in pixels, (B, height, width); `output_size` is (rows, columns).
    """
    (batch, height, width), (rows, columns) = size, output_size
    pixels = batch * rows * columns
    value, coordinates = tensors["value"], tensors["coordinates"]
    if value is None or coordinates is None or pixels == 0:
        return
    leading = 3 if spatial_shapes is None else 2
    arguments: dict[str, Any] = {}
    strides: list[int] = []
    for name, tensor in tensors.items():
        arguments[name], stride = (None, 0) if tensor is None else _pixels(tensor, leading)
        strides.append(stride)
    steps, numbers = [0, 0, 0], 0
    if reference is not None:
        steps, numbers = reference_steps(reference.shape, reference.stride()), reference.numel()
    index = _index(max(max(strides) * max(pixels, batch * height * width), numbers))
    depth = value.shape[leading:].numel() // layer.groups
    launch, constants, order = _constants(
        *(kernel, layer, depth, value.dtype, index, tuple(tensors), tuple(strides)),
        coordinates.shape[-1],
    )
    arguments |= {
        "shapes": None if spatial_shapes is None else _sizes(spatial_shapes, value.device),
        "reference": reference,
        "reference_image": steps[0],
        "reference_query": steps[1],
        "reference_level": steps[2],
        "height": height,
        "width": width,
        "rows": rows,
        "columns": columns,
        "pixels": pixels,
    }
    with _on(value.device):
        getattr(_kernels(), kernel)[(launch.programs(pixels, layer.groups),)](
            *(arguments[name] for name in order), *constants, num_warps=launch.warps
        )


@lru_cache(maxsize=1024)
def _constants(
    kernel: str,
    layer: Window | Heads,
    depth: int,
    dtype: torch.dtype,
    index: str,
    names: tuple[str, ...],
    strides: tuple[int, ...],
    channels: int,
) -> tuple[Launch, tuple[Any, ...], tuple[str, ...]]:
    """The launch of a kernel on tensors of these strides, its constants, and the names of what
    comes before them: in the order of its parameters, because dozens of names cost microseconds.
    `channels` are those of `offset_mask`."""
    tl = _kernels().tl
    if isinstance(layer, Window):
        levels, points, constants = None, layer.points(), _window_constants(layer)
    else:
        levels, points, constants = (
            layer.levels,
            layer.points_per_level,
            _reference_constants(layer),
        )
    itemsize = torch.finfo(dtype).bits // 8
    launch = preferred(layer.groups, depth, levels, points, itemsize, kernel == "backward")
    constants |= {f"{name.upper()}_STRIDE": n for name, n in zip(names, strides, strict=True)}
    constants |= {
        "CHANNELS": channels,
        "GROUPS": layer.groups,
        "DEPTH": depth,
        "LEVELS": levels or 1,
        "POINTS": points,
        "SOFTMAX": layer.softmax,
        "BLOCK": launch.block,
        "BLOCK_G": launch.block_g,
        "BLOCK_D": launch.block_d,
        "BLOCK_K": launch.block_k,
        "CHUNK": launch.chunk,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "INDEX": getattr(tl, index),
    }
    parameters = inspect.signature(getattr(_kernels(), kernel).fn).parameters.values()
    # What a compilation depends on is in capitals, and comes last.
    ordered = (constants.get(p.name, p.default) for p in parameters if p.name.isupper())
    return launch, tuple(ordered), tuple(p.name for p in parameters if not p.name.isupper())


def _window_constants(window: Window) -> dict[str, Any]:
    """What only a convolution has."""
    (ph, pw), (ch, cw) = window.padding, window.center()
    return {
        "SCALE": window.offset_scale,
        "STRIDE_H": window.stride[0],
        "STRIDE_W": window.stride[1],
        "ORIGIN_H": ch - ph,
        "ORIGIN_W": cw - pw,
        "KERNEL_H": window.kernel_size[0],
        "DILATION_H": window.dilation[0],
        "DILATION_W": window.dilation[1],
        "CENTER_H": ch,
        "CENTER_W": cw,
        "REMOVED": window.center_index() if window.remove_center else None,
    }


def _reference_constants(heads: Heads) -> dict[str, Any]:
    """What only an attention with reference points has."""
    if heads.reference is None:
        return {}
    numbers, box_normalizer = heads.reference
    return {"REFERENCE_NUMBERS": numbers, "BOX_BY_SIZE": box_normalizer == "size"}


def _index(elements: int) -> str:
    """The type of offsets into tensors of so many elements, and a program's rows past the end."""
    return "int32" if elements < 2**31 - 2**20 else "int64"


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
