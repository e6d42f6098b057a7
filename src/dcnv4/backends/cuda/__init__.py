"""CUDA C++ kernels, compiled by NVRTC at the first call for this GPU and these shape constants.

What a kernel is compiled for: numbers of channels, groups, points and levels, the window, dtypes.
What it is told at launch: sizes of batch, image and queries, and strides. So a new image size never
compiles. Tensors are read where they lie if channels are innermost and pixels regularly spaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...geometry import Reference, Window, sum_dtype
from .. import UNORDERED, AttnGrads, Call
from . import choice, compile, plans

OVERWRITES = (torch.float16, torch.bfloat16)
"""Dtypes in which `conv_backward` may write gradients over what they are the gradients of, unless
it is deterministic: the value's is summed elsewhere, and a slice's offsets are read by nobody else.
"""


def why_not(call: Call) -> str | None:
    """None where this backend can run `call`; otherwise one sentence that says why not."""
    if call.device.type != "cuda":
        return f"needs tensors on a CUDA GPU; got {call.device.type}"
    if call.deterministic and call.dtype == torch.float64:
        return f"{UNORDERED} with float64"
    return compile.why_not(call.device.index)


def _pixels(tensor: Tensor) -> Tensor:
    """A [B, H, W, C] as kernels read it: channels innermost, pixels regularly spaced."""
    if tensor.is_contiguous():
        return tensor
    _, height, width, channels = tensor.shape
    _, row, pixel, channel = tensor.stride()
    regular = height == 1 or width == 1 or row == width * pixel
    return tensor if regular and (channel == 1 or channels == 1) else tensor.contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """A [B, N, ...] as kernels read it: what follows N is contiguous."""
    if tensor.is_contiguous():
        return tensor
    expected = 1
    for size, stride in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def conv_forward(
    value: Tensor, offset_mask: Tensor, window: Window, deterministic: bool = False
) -> Tensor:
    """[B, Ho, Wo, C]"""
    value, offset_mask = _pixels(value), _pixels(offset_mask)
    layouts = plans.layout(value), plans.layout(offset_mask), None
    plan = plans.conv_plan(*layouts, window, False, value.get_device())
    if plan is None:
        return value.new_zeros((*offset_mask.shape[:3], value.shape[3]))
    output = _empty(value, plan.output, deterministic)
    leftover = _leftover(plan, value, deterministic)
    plan.start(value=value, offset_mask=offset_mask, output=output, leftover=leftover)
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
    grad, value, offset_mask = _pixels(grad), _pixels(value), _pixels(offset_mask)
    grad_value, grad_mask = grads = out or (
        _empty(value, value.shape, deterministic),
        _empty(offset_mask, offset_mask.shape, deterministic),
    )
    layouts = plans.layout(value), plans.layout(offset_mask)
    written = plans.layout(grad), plans.layout(grad_value), plans.layout(grad_mask)
    plan = plans.conv_plan(*layouts, written, window, deterministic, value.get_device())
    if plan is None:
        grad_value.zero_(), grad_mask.zero_()
        return grads
    leftover = _leftover(plan, value, deterministic)
    run = partial(
        plan.start,
        value=value,
        offset_mask=offset_mask,
        grad=grad,
        grad_offset_mask=grad_mask,
        leftover=leftover,
    )
    if deterministic:
        points = window.points()
        held = None if window.softmax else (offset_mask, 2 * points, 3 * points)
        _sum_in_integers(grad_value, grad, held, window.groups, points, run)
    else:
        _sum(grad_value, run)
    return grads


def attn_forward(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    coordinates: Tensor,
    weights: Tensor,
    softmax: bool,
    deterministic: bool = False,
    reference: Reference | None = None,
) -> Tensor:
    """[B, Q, C]"""
    value, coordinates, weights = _rows(value), _rows(coordinates), _rows(weights)
    sizes, shapes = _sizes(spatial_shapes)
    layouts = plans.layout(value), plans.layout(coordinates), plans.layout(weights)
    points, place = _place(reference)
    plan = plans.attn_plan(*layouts, place, None, sizes, softmax, False, value.get_device())
    if plan is None:
        return value.new_zeros((*coordinates.shape[:2], value.shape[2] * value.shape[3]))
    output = _empty(value, plan.output, deterministic)
    plan.start(
        value=value,
        coordinates=coordinates,
        weights=weights,
        reference=points,
        output=output,
        shapes=shapes,
    )
    return output


def attn_backward(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    coordinates: Tensor,
    weights: Tensor,
    softmax: bool,
    deterministic: bool = False,
    reference: Reference | None = None,
    out: AttnGrads | None = None,
    *,
    channel_sums: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `value`, `coordinates` and `weights`.

    What the first has in each channel is added to `channel_sums` [C], in float32: `sums_channels`.
    """
    grad, value = _rows(grad), _rows(value)
    coordinates, weights = _rows(coordinates), _rows(weights)
    grad_value, grad_coordinates, grad_weights = out or (
        None,
        _empty(coordinates, coordinates.shape, deterministic),
        _empty(weights, weights.shape, deterministic),
    )
    sizes, shapes = _sizes(spatial_shapes)
    points, place = _place(reference)
    layouts = plans.layout(value), plans.layout(coordinates), plans.layout(weights)
    grads = plans.layout(grad), _row_stride(grad_coordinates), _row_stride(grad_weights)
    settings = sizes, softmax, deterministic, value.get_device()
    plan = plans.attn_plan(*layouts, place, grads, *settings)
    if plan is None:
        grad_value = value.new_empty(value.shape) if grad_value is None else grad_value
        return grad_value.zero_(), grad_coordinates.zero_(), grad_weights.zero_()
    if grad_value is None:
        grad_value = _empty(value, value.shape, deterministic)
    run = partial(
        plan.start,
        value=value,
        coordinates=coordinates,
        weights=weights,
        reference=points,
        grad=grad,
        grad_coordinates=grad_coordinates,
        grad_weights=grad_weights,
        shapes=shapes,
    )
    if deterministic:
        count = coordinates.shape[3] * coordinates.shape[4]
        held = None if softmax else (weights, 0, count)
        _sum_in_integers(grad_value, grad, held, value.shape[2], count, run)
    else:
        _sum(grad_value, run, channel_sums)
    return grad_value, grad_coordinates, grad_weights


def sums_channels(value: Tensor) -> bool:
    """Whether `attn_backward` can add up what the gradient of a value has in each channel."""
    if torch.are_deterministic_algorithms_enabled():
        return False
    return choice.sums_columns(value.shape[2] * value.shape[3], value.dtype)


def multiplies(x: Tensor, width: int, dtype: torch.dtype) -> bool:
    """Whether `linear` takes rows x [..., C] and a weight [width, C] of this dtype, and does so
    sooner than PyTorch."""
    if x.numel() == 0 or x.dtype not in (dtype, torch.float32):
        return False
    if not x.is_contiguous() or x.data_ptr() & 15:
        return False
    return _linear_plan(x, width, dtype) is not None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, rounded: Tensor | None = None) -> Tensor:
    """`F.linear` of rows that `multiplies` takes, in the dtype of the weight; `rounded` becomes x
    in that dtype."""
    plan = _linear_plan(x, weight.shape[0], weight.dtype)
    assert plan is not None
    weight, bias = _vectors(weight), None if bias is None else _vectors(bias)
    output = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=weight.dtype)
    plan.start(x=x, weight=weight, bias=bias, rounded=rounded, output=output)
    return output


def _linear_plan(x: Tensor, width: int, dtype: torch.dtype) -> plans.Plan | None:
    channels = x.shape[-1]
    rows = x.numel() // channels
    return plans.linear_plan(rows, channels, width, x.dtype, dtype, x.get_device())


def fuses_mlp(x: Tensor, hidden: int) -> bool:
    """Whether `mlp` takes rows x [..., C] and so many channels between, and does so sooner than
    what it does would be done apart."""
    if x.numel() == 0 or not x.is_contiguous() or x.data_ptr() & 15:
        return False
    rows, channels = x.numel() // x.shape[-1], x.shape[-1]
    return plans.fuses_mlp(rows, channels, hidden, x.dtype, x.get_device())


def may_fuse_mlp(channels: int, hidden: int, dtype: torch.dtype, device: torch.device) -> bool:
    """The same of any rows that are contiguous, at an address that 16 divides."""
    return plans.fuses_mlp(1 << 30, channels, hidden, dtype, device.index or 0)


def mlp(
    x: Tensor, eps: float, norm: Sequence[Any], first: Sequence[Any], second: Sequence[Any]
) -> Tensor:
    """x + fc2(gelu(fc1(norm(x)))) of rows [..., C] that `fuses_mlp` takes, from weight and bias of
    each, in their dtype; fc2 may have no bias."""
    rows, hidden = x.numel() // x.shape[-1], first[0].shape[0]
    plan = plans.mlp_plan(rows, x.shape[-1], hidden, x.dtype, eps, x.get_device())
    names = (f"{layer}_{of}" for layer in ("norm", "fc1", "fc2") for of in ("weight", "bias"))
    tensors = (t if t is None else _vectors(t) for t in (*norm, *first, *second))
    output = torch.empty_like(x)
    plan.start(x=x, output=output, **dict(zip(names, tensors, strict=True)))
    return output


def normalizes(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether `norm_forward` takes these."""
    if x.numel() == 0 or not choice.normalizes(x.shape[-1], x.dtype):
        return False
    if weight.dtype not in (x.dtype, torch.float32) or bias.dtype != weight.dtype:
        return False
    return all(t.shape == x.shape[-1:] and t.device == x.device for t in (weight, bias))


def norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`layer_norm` of the rows [..., C] of x."""
    x, weight, bias = _vectors(x), _vectors(weight), _vectors(bias)
    output = torch.empty_like(x)
    plan = _norm_plan("forward", x, weight, eps)
    plan.start(x=x, weight=weight, bias=bias, output=output)
    return output


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, to which `added` is added, and in float32 of weight and bias."""
    grad, x, weight = _vectors(grad), _vectors(x), _vectors(weight)
    added = None if added is None else _vectors(added)
    grad_x = torch.empty_like(x)
    plan = _norm_plan("backward", x, weight, eps)
    sums = x.new_empty(plan.output, dtype=torch.float32)
    plan.start(x=x, weight=weight, grad=grad, added=added, grad_x=grad_x, sums=sums)
    grad_weight, grad_bias = sums.sum(0).unbind()
    return grad_x, grad_weight, grad_bias


def _norm_plan(direction: str, x: Tensor, weight: Tensor, eps: float) -> plans.Plan:
    rows, channels = x.numel() // x.shape[-1], x.shape[-1]
    settings = x.dtype, weight.dtype, eps, x.get_device()
    return plans.layer_norm_plan(direction, rows, channels, *settings)


def _vectors(tensor: Tensor) -> Tensor:
    """A tensor as kernels read it in vectors of 16 bytes: contiguous, at such an address."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() & 15 else tensor


def _place(reference: Reference | None) -> tuple[Tensor | None, tuple[Any, str] | None]:
    """Reference points as kernels read them, the numbers of each side by side, and what a plan
    depends on of them."""
    if reference is None:
        return None, None
    points, box_normalizer = reference
    points = points if points.stride(3) == 1 else points.contiguous()
    return points, (plans.layout(points), box_normalizer)


def _row_stride(tensor: Tensor) -> int:
    """From row (b, q) to row of a [B, Q, ...] whose rows are evenly spaced."""
    return tensor.stride(0 if tensor.shape[1] == 1 else 1)


def _empty(
    like: Tensor, shape: tuple[int, ...], deterministic: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """A contiguous tensor, all of which a kernel will write.

    Under deterministic algorithms PyTorch fills what it has just allocated; this does not.
    """
    if not deterministic:
        return like.new_empty(shape, dtype=dtype)
    empty = like.new_empty(0, dtype=dtype)
    size = math.prod(shape) * empty.element_size()
    return empty.set_(torch.UntypedStorage(size, device=like.device)).view(shape)


def _leftover(plan: plans.Plan, beside: Tensor, deterministic: bool) -> Tensor | None:
    """Where the first launch says what it leaves to the second."""
    return _empty(beside, (plan.leftover,), deterministic, torch.uint8) if plan.leftover else None


def _sum(grad_value: Tensor, run: Callable[..., None], columns: Tensor | None = None) -> None:
    """Write `grad_value`, which `run` adds to zeros, and add it to `columns`."""
    dtype, device = sum_dtype(grad_value.dtype), grad_value.get_device()
    in_place = dtype == grad_value.dtype
    sums = grad_value if in_place else _empty(grad_value, grad_value.shape, False, dtype)
    if sums.is_contiguous():
        plans.zeros_plan(sums.numel() * sums.element_size(), device).start(sums=sums)
    else:
        sums.zero_()
    run(grad_value=sums, fixed_point_scale=None)
    if not in_place:
        count = 0 if columns is None else columns.numel()
        convert = plans.convert_sums_plan(1, plans.layout(grad_value), False, count, device)
        convert.start(sums=sums, fixed_point_scale=None, result=grad_value, columns=columns)


def _sum_in_integers(
    grad_value: Tensor,
    grad: Tensor,
    weights: tuple[Tensor, int, int] | None,
    groups: int,
    points: int,
    run: Callable[..., None],
) -> None:
    """Write `grad_value` in the same bits on every run: summed in integers, as multiples of a
    power of two. It is NaN in an image whose `grad` or `weights` are not finite.

    Args:
        grad_value: [B, ...]
        grad: of the output, [B, ..., C].
        weights: the tensor that holds points' weights, where they begin among the numbers of a
            group, and how many numbers a group has; None where weights are at most 1.
        groups: G.
        points: of a slice.
        run: adds to integers.
    """
    images, numbers, device = grad_value.shape[0], grad_value.numel(), grad_value.get_device()
    # The integers, then what fixed_point_scale.cu keeps and makes of each image.
    sums = _empty(grad_value, (numbers + 2 * images + 1,), True, torch.int64).zero_()
    largest, scale = sums[numbers:], sums[numbers + images + 1 :]
    held, layout = None, None
    if weights is not None:
        held, layout = weights[0], (plans.layout(weights[0]), *weights[1:])
    choose = plans.fixed_point_scale_plan(plans.layout(grad), layout, groups, points, device)
    choose.start(grad=grad, weights=held, largest=largest, fixed_point_scale=scale)
    run(grad_value=sums, fixed_point_scale=scale)
    convert = plans.convert_sums_plan(images, plans.layout(grad_value), True, 0, device)
    convert.start(sums=sums, fixed_point_scale=scale, result=grad_value, columns=None)


def _sizes(
    spatial_shapes: Tensor | Sequence[Sequence[int]],
) -> tuple[tuple[int, ...] | None, Tensor | None]:
    """The levels' sizes H₀, W₀, H₁, … where the host knows them, otherwise where they lie."""
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.device.type == "cuda":
            return None, spatial_shapes.to(torch.int64).contiguous()
        spatial_shapes = spatial_shapes.tolist()
    return tuple([size for pair in spatial_shapes for size in pair]), None
