"""C++ kernels for CPU tensors, compiled by the host's compiler at first use.

Both operators are one problem to the kernels, that of `records`: where the points of an output
pixel lie, and how every tensor lies in memory.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache, lru_cache, partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ...geometry import Reference, Window, attn_unit, reference_steps, sum_dtype
from .. import AttnGrads, Call, cache_dir
from .compile import CompileError, library
from .records import CALL, DTYPES, POINT, PROBLEM, TENSORS, VIEW

_T = TypeVar("_T")
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
    if call.dtype not in DTYPES:
        return f"needs float64, float32, bfloat16 or float16; got {call.dtype}"
    kernels = _kernels()
    return kernels if isinstance(kernels, str) else None


def conv_forward(
    value: Tensor, offset_mask: Tensor, window: Window, deterministic: bool = False
) -> Tensor:
    """[B, Ho, Wo, C]."""
    output = value.new_empty((*offset_mask.shape[:3], value.shape[3]))
    _conv("dcnv4_forward", window, value, offset_mask, output)
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
    if offset_mask.shape[3] > window.offset_mask_channels():
        grads[1][..., window.offset_mask_channels() :] = 0
    grad = _inner(grad.to(value.dtype), 1)
    _conv("dcnv4_backward", window, value, offset_mask, grad, *grads)
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
    """[B, Q, C]."""
    output = value.new_empty((*coordinates.shape[:3], value.shape[3]))
    settings = "dcnv4_forward", spatial_shapes, softmax, reference
    _attn(*settings, value, coordinates, weights, output)
    return output.flatten(2)


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
    grad_value, grad_coordinates, grad_weights = out or (
        None,
        torch.empty(coordinates.shape, dtype=coordinates.dtype),
        torch.empty(weights.shape, dtype=weights.dtype),
    )
    if grad_value is None:
        grad_value = torch.empty(value.shape, dtype=value.dtype)
    grads = grad_value, grad_coordinates, grad_weights
    grad = _inner(grad.to(value.dtype), 1).unflatten(2, value.shape[2:])
    settings = "dcnv4_backward", spatial_shapes, softmax, reference
    _attn(*settings, value, coordinates, weights, grad, *grads)
    return grads


_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""What the kernels must know of a tensor but where it lies: shape, strides, dtype."""


class _Plan(NamedTuple):
    """What all calls on tensors of the same layouts share."""

    problem: bytes
    points: bytes
    """Those of a slice."""


def _conv(
    function: str,
    window: Window,
    value: Tensor,
    offset_mask: Tensor,
    output: Tensor,
    *grads: Tensor,
) -> None:
    """Run a convolution; `output` is the forward's result or the backward's gradient of it."""
    value, offset_mask = _inner(value, 1), _inner(offset_mask, 1)
    if not value.is_contiguous() and value.stride(1) != value.shape[2] * value.stride(2):
        value = value.contiguous()
    plan = _conv_plan(window, *map(_layout, (value, offset_mask, output, *grads)))
    mask, before_weights = offset_mask.data_ptr(), 2 * window.points() * offset_mask.element_size()
    data = {
        "value": value.data_ptr(),
        "offsets": mask,
        "weights": mask + before_weights,
        "output": output.data_ptr(),
    }
    if grads:
        data["grad_value"], mask = grads[0].data_ptr(), grads[1].data_ptr()
        data["grad_offsets"], data["grad_weights"] = mask, mask + before_weights
    _run(function, plan, data)


@lru_cache(maxsize=256)
def _conv_plan(
    window: Window, value: _Layout, offset_mask: _Layout, output: _Layout, *grads: _Layout
) -> _Plan:
    batch, height, width, channels = value[0]
    _, rows, columns, _ = offset_mask[0]
    down, right = window.padding
    if max(height + down, width + right) > _LARGEST:
        raise ValueError(
            f"value and padding must have H + padding, W + padding < 2**31 = {2**31}; "
            f"got {list(value[0])} and {window.padding}"
        )
    depth, per_slice = channels // window.groups, 3 * window.points()
    views = {"value": _view(value, depth), "output": _view(output, depth)}
    views["offsets"] = views["weights"] = _view(offset_mask, per_slice)
    if grads:
        views["grad_value"] = _view(grads[0], depth)
        views["grad_offsets"] = views["grad_weights"] = _view(grads[1], per_slice)
    origin_x, origin_y = map(int, window.origins(0, 0))  # type: ignore[arg-type]
    problem = PROBLEM.pack(
        **views,
        images=batch,
        pixels=height * width,
        rows=rows,
        columns=columns,
        groups=window.groups,
        depth=depth,
        levels=1,
        points=window.points(),
        softmax=window.softmax,
        origin_x=origin_x,
        origin_y=origin_y,
        step_x=window.stride[1],
        step_y=window.stride[0],
    )
    scale = window.offset_scale
    level = {"height": height, "width": width, "scale_x": scale, "scale_y": scale}
    return _Plan(problem, b"".join(POINT.pack(x=x, y=y, **level) for x, y in window.cells()))


def _attn(
    function: str,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    softmax: bool,
    reference: Reference | None,
    value: Tensor,
    coordinates: Tensor,
    weights: Tensor,
    output: Tensor,
    *grads: Tensor,
) -> None:
    """Run an attention; `output` is the forward's result or the backward's gradient of it."""
    value, coordinates, weights = _inner(value, 1), _inner(coordinates, 3), _inner(weights, 2)
    pairs = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    tensors = value, coordinates, weights, output, *grads
    data = _by_name([tensor.data_ptr() for tensor in tensors])
    place, normalizer = None, ""
    if reference is not None:
        points = _inner(reference.points.to(sum_dtype(value.dtype)), 1)
        data["reference"] = points.data_ptr()
        place, normalizer = _layout(points), reference.box_normalizer
    plan = _attn_plan(tuple(map(tuple, pairs)), softmax, place, normalizer, *map(_layout, tensors))
    _run(function, plan, data)


@lru_cache(maxsize=256)
def _attn_plan(
    shapes: tuple[tuple[int, int], ...],
    softmax: bool,
    place: _Layout | None,
    normalizer: str,
    *tensors: _Layout,
) -> _Plan:
    """`place`: of the reference points; `normalizer`: of boxes."""
    batch, pixels, groups, depth = tensors[0][0]
    _, queries, _, _, points, _ = tensors[1][0]
    levels = _levels(shapes, pixels)
    views = _by_name([_heads_view(tensor) for tensor in tensors])
    numbers = 0
    if place is not None:
        shape, strides, dtype = place
        numbers, steps = shape[3], reference_steps(shape, strides)
        views["reference"] = _heads_view((shape, tuple(steps), dtype))
    problem = PROBLEM.pack(
        **views,
        images=batch,
        pixels=pixels,
        rows=1,
        columns=queries,
        groups=groups,
        depth=depth,
        levels=len(levels),
        points=points,
        softmax=softmax,
        shift=-0.5,
        reference_numbers=numbers,
    )
    unit = partial(attn_unit, points=points, numbers=numbers, box_normalizer=normalizer)
    each = [
        POINT.pack(
            scale_x=unit(width), scale_y=unit(height), height=height, width=width, start=start
        )
        for height, width, start in levels
    ]
    return _Plan(problem, b"".join(point * points for point in each))


def _run(function: str, plan: _Plan, data: dict[str, int]) -> None:
    """Call the kernels for tensors whose first elements lie at these addresses."""
    kernels = _kernels()
    if isinstance(kernels, str):
        raise RuntimeError(f"the cpu backend {kernels}")
    call = CALL.pack(**data, threads=torch.get_num_threads(), forked=_forked)
    if getattr(kernels, function)(plan.problem, plan.points, call):
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
    return tensor.shape, tensor.stride(), tensor.dtype


def _by_name(things: list[_T]) -> dict[str, _T]:
    """What belongs to each of a call's tensors, which are in the order of `records.TENSORS`."""
    return dict(zip(TENSORS, things, strict=False))


def _view(tensor: _Layout, group: int) -> bytes:
    """A tensor [B, rows, columns, channels] whose groups are so many channels apart."""
    _, (image, row, column, _), dtype = tensor
    return VIEW.pack(dtype=DTYPES.index(dtype), image=image, row=row, column=column, group=group)


def _heads_view(tensor: _Layout) -> bytes:
    """A tensor [B, S or Q, G, ...]: one row of pixels or queries."""
    _, (image, column, group, *_), dtype = tensor
    return VIEW.pack(dtype=DTYPES.index(dtype), image=image, column=column, group=group)


def _levels(shapes: Sequence[tuple[int, int]], pixels: int) -> list[tuple[int, int, int]]:
    """Height, width and first pixel of each level; of one that leaves the value zeros."""
    levels, start = [], 0
    for height, width in shapes:
        stop = start + height * width
        fits = start >= 0 and stop <= pixels and min(height, width) >= 0
        fits &= max(height, width) <= _LARGEST
        levels.append((height, width, start) if fits else (0, 0, 0))
        start = stop
    return levels
