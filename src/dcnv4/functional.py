"""The contract: what the operators compute, which arguments are legal, which backend runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, ops
from .arguments import (
    check_choice,
    check_divides,
    check_flag,
    check_integer,
    check_levels,
    check_reference_points,
    check_tensor,
    window,
)
from .autocast import exact_coordinates
from .geometry import Window

__all__ = ["deform_conv", "deform_conv_packed", "ms_deform_attn", "ms_deform_attn_from_offsets"]


def deform_conv(
    value: Tensor,
    offset_mask: Tensor,
    *,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 4,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Deformable Convolution v4: every output pixel is a weighted sum of K points of its group.

        out[b, oy, ox, g] = sum_k w_k · bilinear(value[b, :, :, g]; x_k, y_k)
        x_k = ox·s - p + c + λ·(i·d - c + δx_k),   c = d·(kw - 1) // 2

    and yₖ likewise, with stride s, padding p, dilation d, λ = `offset_scale`, and i the column, j
    the row of point k in the kernel: k = i·kh + j, columns outermost. A point outside (-1, W) x
    (-1, H) contributes 0; inside that, so do the corners outside the image. Pixel centres are
    integers.

    Args:
        value: [B, H, W, C]; float64, float32, bfloat16 or float16. C = groups·D.
        offset_mask: [B, Ho, Wo, M], M >= 3·groups·K. Group g owns channels [3Kg, 3Kg + 3K): first
            2K offsets δ (x₀, y₀, x₁, y₁, …) in input pixels, then K weights.
            Channels past 3·groups·K are ignored. May be float32 beside a half-precision value,
            and is never rounded down.
        kernel_size: points down and across, an int or (height, width); K = kh·kw.
        stride: input pixels between neighbouring outputs, an int or (height, width).
        padding: pixels of zeros on each side of the image, an int or (height, width).
        dilation: pixels between neighbouring kernel points, an int or (height, width).
        groups: G, the groups of channels with offsets and weights of their own.
        offset_scale: λ, multiplies the kernel's grid and the offsets.
        remove_center: leave out the point (kw // 2, kh // 2), so that K = kh·kw - 1.
        softmax: normalise the K weights of a group first. Otherwise they have any size and sign.
        backend: "cuda", "triton", "cpu" or "reference", which then never falls back; "auto" takes
            the first of these that can run the call; None follows `DCNV4_BACKEND` and
            `DCNV4_USE_TRITON`.

    Returns:
        [B, Ho, Wo, C] in the dtype of `value` (under autocast, the autocast dtype);
        Ho = (H + 2·padding - dilation·(kh - 1) - 1) // stride + 1, Wo likewise.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range.
        RuntimeError: the backend asked for cannot run here; the reasons are listed.

    Note:
        Sums are computed in float32 (float64 for float64). Other images of the batch change a
        result by rounding at most.
        Differentiable in `value` and `offset_mask`, to any order.

    Source: Xiong et al., Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for
    Vision Applications, CVPR 2024, arXiv:2401.06197.

    Example:
        >>> import torch
        >>> from dcnv4.functional import deform_conv
        >>> value = torch.randn(2, 32, 48, 64)
        >>> offsets, weights = torch.zeros(2, 32, 48, 4, 18), torch.full((2, 32, 48, 4, 9), 1 / 9)
        >>> offset_mask = torch.cat((offsets, weights), -1).flatten(3)
        >>> deform_conv(value, offset_mask, kernel_size=3, padding=1, groups=4).shape
        torch.Size([2, 32, 48, 64])
    """
    settings = window(
        kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, softmax
    )
    return windowed_conv(value, offset_mask, settings, backend)


def windowed_conv(
    value: Tensor, offset_mask: Tensor, window: Window, backend: str | None = None
) -> Tensor:
    """`deform_conv` with settings that were checked before."""
    check_tensor("value", value, "[B, H, W, C]", (4,))
    check_tensor("offset_mask", offset_mask, "[B, Ho, Wo, M]", (4,), value)
    check_sizes_of_conv(value.shape, offset_mask.shape, window)
    deterministic = ops.must_be_deterministic(value, offset_mask)
    chosen = backends.choose("deform_conv", value.device, value.dtype, deterministic, backend)
    dtype = value.dtype
    if offset_mask.dtype != dtype:
        value, (offset_mask,) = _promote(value, offset_mask)
    output: Tensor = ops.deform_conv(chosen, value, offset_mask, window)
    return output if value.dtype == dtype else output.to(dtype)


def check_sizes_of_conv(
    value: tuple[int, ...], offset_mask: tuple[int, ...], window: Window
) -> None:
    """Check that shapes [B, H, W, C] and [B, Ho, Wo, M] are those of a `deform_conv`."""
    batch, height, width, channels = value
    if channels % window.groups or channels == 0:
        raise ValueError(
            f"value must have channels that groups = {window.groups} divides; got [.., {channels}]"
            f"{_channels_first(value, offset_mask, window)}"
        )
    rows, columns = window.output_size(height, width)
    # Not `min` of both: a graph would be compiled for tall maps and another for wide ones.
    if (rows < 1 or columns < 1) and height >= 1 and width >= 1:
        raise ValueError(
            f"kernel_size must fit the padded image = {height + 2 * window.padding[0]} x "
            f"{width + 2 * window.padding[1]}; got {window.kernel_size} with dilation "
            f"{window.dilation}"
        )
    shape = batch, max(rows, 0), max(columns, 0)
    channels_read = window.offset_mask_channels()
    if offset_mask[:3] != shape or offset_mask[3] < channels_read:
        raise ValueError(
            "offset_mask must be [B, Ho, Wo, >= 3*G*K] = "
            f"[{', '.join(map(str, shape))}, >= {channels_read}]; got {list(offset_mask)}"
            f"{_channels_first(value, offset_mask, window)}"
        )


def deform_conv_packed(
    packed: Tensor,
    channels: int,
    *,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 4,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""`deform_conv` of a value and an offset_mask that lie side by side in one tensor.

    A layer makes both by one matrix product. The result has the same bits as

        deform_conv(packed[..., :channels], packed[..., channels:])

    and the gradient is written as one tensor, too.

    Args:
        packed: [B, H, W, >= channels + 3·groups·K]: value, then offset_mask; channels behind
            these are ignored. float64, float32, bfloat16 or float16.
        channels: C, of the value.
        kernel_size to backend: as in `deform_conv`. The output must be as large as the input,
            Ho x Wo = H x W.

    Returns:
        [B, H, W, C] in the dtype of `packed`; under autocast as `deform_conv`, which does not
        round the offset_mask.

    Raises:
        TypeError, ValueError, RuntimeError: as in `deform_conv`.

    Note:
        The CUDA backend's fastest kernels in half precision need multiples of 8: the value's
        channels, and those of `packed`. In a layer they are.
        Differentiable in `packed`, to any order.

    Example:
        >>> import torch
        >>> from dcnv4.functional import deform_conv_packed
        >>> packed = torch.randn(2, 32, 48, 64 + 3 * 4 * 9)
        >>> deform_conv_packed(packed, 64, kernel_size=3, padding=1, groups=4).shape
        torch.Size([2, 32, 48, 64])

    Source: as `deform_conv`.
    """
    settings = window(
        kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, softmax
    )
    return windowed_conv_packed(packed, channels, settings, backend)


def windowed_conv_packed(
    packed: Tensor, channels: int, window: Window, backend: str | None = None
) -> Tensor:
    """`deform_conv_packed` with settings that were checked before."""
    check_tensor("packed", packed, "[B, H, W, >= C + 3*G*K]", (4,))
    check_integer("channels", channels, 1)
    check_divides("groups", window.groups, channels, f"the {channels} channels")
    _, height, width, found = packed.shape
    if found < (least := channels + window.offset_mask_channels()):
        raise ValueError(
            f"packed must be [B, H, W, >= C + 3*G*K] = [B, H, W, >= {least}]; "
            f"got {list(packed.shape)}"
        )
    rows, columns = window.output_size(height, width)
    if rows != height or columns != width:
        raise ValueError(
            f"kernel_size, stride, padding and dilation must keep the size = {height} x {width}; "
            f"got {rows} x {columns}"
        )
    deterministic = ops.must_be_deterministic(packed)
    chosen = backends.choose("deform_conv", packed.device, packed.dtype, deterministic, backend)
    output: Tensor = ops.deform_conv_packed(chosen, packed, channels, window)
    return output


def _channels_first(value: Sequence[int], offset_mask: Sequence[int], window: Window) -> str:
    """What to say of a value that fits the offset_mask only as [B, C, H, W]."""
    last, first = (window.output_size(value[i], value[i + 1]) for i in (1, 2))
    given = tuple(offset_mask[1:3])
    if last == given or first not in (given, tuple(offset_mask[2:])):
        return ""
    return f"; value = {list(value)} seems to be [B, C, H, W]: permute(0, 2, 3, 1) it"


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    softmax: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Multi-scale deformable attention: every query is a weighted sum of points of all levels.

        out[b, q, g] = sum_{l, p} w_lp · bilinear(value_l[b, :, g]; x_lp, y_lp)
        x_lp = u_lp·W_l - ½,   y_lp = v_lp·H_l - ½

    with valueₗ the pixels of level l. A location (u, v) runs from 0, the outer edge of a level's
    first pixel, to 1, the outer edge of its last. What lies outside contributes 0, as in
    `deform_conv`.

    Args:
        value: [B, S, G, D], S = Σ Hₗ·Wₗ: the levels' pixels one level after another, rows
            outermost; float64, float32, bfloat16 or float16. G heads of D channels.
        spatial_shapes: the L levels' (Hₗ, Wₗ): a sequence of pairs, or an integer tensor [L, 2].
            A tensor on an accelerator stays there: its sum is not checked, and levels that do not
            fit in S contribute 0.
        sampling_locations: [B, Q, G, L, P, 2] in (x, y) order, normalised to [0, 1]. May be float32
            beside a half-precision value, and is never rounded down.
        attention_weights: [B, Q, G, L, P] or [B, Q, G, L·P], of any size and sign. They may be
            float32, too.
        softmax: the weights are logits; normalise them over L·P first.
        backend: as in `deform_conv`.

    Returns:
        [B, Q, G·D] in the dtype of `value` (under autocast, the autocast dtype).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range.
        RuntimeError: the backend asked for cannot run here; the reasons are listed.

    Note:
        Sums are computed in float32 (float64 for float64). Other images of the batch change a
        result by rounding at most.
        Differentiable in `value`, `sampling_locations` and `attention_weights`, to any order.

    Source: Zhu et al., Deformable DETR, ICLR 2021, arXiv:2010.04159; softmax inside the operator as
    in FlashDeformAttn of Xiong et al., CVPR 2024, arXiv:2401.06197.

    Example:
        >>> import torch
        >>> from dcnv4.functional import ms_deform_attn
        >>> shapes = [(32, 48), (16, 24)]
        >>> value = torch.randn(2, 32 * 48 + 16 * 24, 8, 32)
        >>> locations, logits = torch.rand(2, 100, 8, 2, 4, 2), torch.randn(2, 100, 8, 2, 4)
        >>> ms_deform_attn(value, shapes, locations, logits, softmax=True).shape
        torch.Size([2, 100, 256])
    """
    call = attention_call(
        value, spatial_shapes, sampling_locations, attention_weights, softmax, backend
    )
    output: Tensor = ops.ms_deform_attn(*call)
    return output if call[1].dtype == value.dtype else output.to(value.dtype)


def attention_call(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    softmax: bool = False,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """The call of `ops.MS_DEFORM_ATTN` that these arguments of `ms_deform_attn` mean, checked."""
    shapes, weights = _check_attention(
        *("sampling_locations", value, spatial_shapes, sampling_locations, attention_weights),
        softmax,
    )
    deterministic = ops.must_be_deterministic(value, sampling_locations, weights)
    chosen = backends.choose("ms_deform_attn", value.device, value.dtype, deterministic, backend)
    locations = sampling_locations
    if not locations.dtype == weights.dtype == value.dtype:
        value, (locations, weights) = _promote(value, locations, weights)
    return chosen, value, shapes, locations, weights, softmax


def ms_deform_attn_from_offsets(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    reference_points: Tensor,
    offsets: Tensor,
    attention_weights: Tensor,
    *,
    box_normalizer: str = "points",
    softmax: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""`ms_deform_attn` at offsets from reference points, without sampling locations in memory.

        x_lp = r_x·W_l - ½ + s_x·δx_lp,   y_lp = r_y·H_l - ½ + s_y·δy_lp

    An offset δ is in pixels of its level, s = 1. With reference boxes it is in parts of half a box:
    s_x = r_w·Wₗ / 2P with `box_normalizer="points"`, r_w / 2 with "size", and s_y likewise.

    Args:
        value, spatial_shapes: as in `ms_deform_attn`.
        reference_points: [B, Q, L, 2], (x, y) from 0 to 1 over each level, or [B, Q, L, 4], boxes
            (x, y, w, h). B, Q and L may be 1: the same for all. May be float32 beside a
            half-precision value, and is never rounded down.
        offsets: [B, Q, G, L, P, 2] in (x, y) order. May be float32, too.
        attention_weights: [B, Q, G, L, P] or [B, Q, G, L·P], of any size and sign. Like `offsets`
            they may be a part of a wider tensor, such as a projection's result, without a copy.
        box_normalizer: "points" or "size", for boxes alone.
        softmax, backend: as in `ms_deform_attn`.

    Returns:
        [B, Q, G·D] in the dtype of `value` (under autocast, the autocast dtype).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range.
        RuntimeError: the backend asked for cannot run here; the reasons are listed.

    Note:
        Positions and sums are computed in float32 (float64 for float64). Other images of the batch
        change a result by rounding at most. Differentiable in `value`, `reference_points`,
        `offsets` and `attention_weights`, to any order.

    Example:
        >>> import torch
        >>> from dcnv4.functional import ms_deform_attn_from_offsets
        >>> shapes, points = [(32, 48), (16, 24)], torch.rand(2, 100, 2, 2)
        >>> value = torch.randn(2, 32 * 48 + 16 * 24, 8, 32)
        >>> offsets, logits = torch.randn(2, 100, 8, 2, 4, 2), torch.randn(2, 100, 8, 2, 4)
        >>> ms_deform_attn_from_offsets(value, shapes, points, offsets, logits, softmax=True).shape
        torch.Size([2, 100, 256])

    Source: Zhu et al., Deformable DETR, ICLR 2021, arXiv:2010.04159.
    """
    shapes, weights = _check_attention(
        *("offsets", value, spatial_shapes, offsets, attention_weights), softmax
    )
    check_choice("box_normalizer", box_normalizer, ("points", "size"))
    whole = offsets.shape[0], offsets.shape[1], offsets.shape[3]
    check_reference_points(reference_points, whole, value)
    inputs = value, reference_points, offsets, weights
    deterministic = ops.must_be_deterministic(*inputs)
    chosen = backends.choose("ms_deform_attn", value.device, value.dtype, deterministic, backend)
    dtype, wants_gradient = value.dtype, reference_points.requires_grad and torch.is_grad_enabled()
    if any(tensor.dtype != dtype for tensor in inputs):
        value, (reference_points, offsets, weights) = _promote(*inputs)
    output: Tensor = ops.ms_deform_attn_from_offsets(
        *(chosen, value, shapes, reference_points, offsets, weights),
        *(box_normalizer, softmax, wants_gradient),
    )
    return output if value.dtype == dtype else output.to(dtype)


def _check_attention(
    name: str,
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    coordinates: Tensor,
    attention_weights: Tensor,
    softmax: bool,
) -> tuple[Tensor | list[tuple[int, int]], Tensor]:
    """The sizes of the levels and the weights [B, Q, G, L, P], as backends take them.

    `name`: of the coordinates.
    """
    check_flag("softmax", softmax)
    check_tensor("value", value, "[B, S, G, D]", (4,))
    check_tensor(name, coordinates, "[B, Q, G, L, P, 2]", (6,), value)
    batch, length, groups, depth = value.shape
    _, queries, _, levels, points, _ = coordinates.shape
    if coordinates.shape != (batch, queries, groups, levels, points, 2):
        raise ValueError(
            f"{name} must be [B, Q, G, L, P, 2] = [{batch}, Q, {groups}, L, P, 2]; "
            f"got {list(coordinates.shape)}"
        )
    if levels * points * depth * groups == 0:
        raise ValueError(
            f"value and {name} must have G, D, L and P >= 1; "
            f"got {list(value.shape)} and {list(coordinates.shape)}"
        )
    shape = (batch, queries, groups, levels, points)
    layout = "[B, Q, G, L, P] or [B, Q, G, L*P]"
    check_tensor("attention_weights", attention_weights, layout, (5, 4), value)
    # Not `in`: a compiler that traces the call looks there for these very numbers.
    given = attention_weights.shape
    if given != shape and given != (*shape[:3], levels * points):
        raise ValueError(
            f"attention_weights must be [B, Q, G, L, P] = {list(shape)} or [B, Q, G, L*P]; "
            f"got {list(given)}"
        )
    weights = attention_weights if len(given) == 5 else attention_weights.reshape(shape)
    return check_levels(spatial_shapes, levels, length, value.device), weights


def _promote(value: Tensor, *coordinates: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Dtypes that every backend takes, nothing rounded down: the value may become float64."""
    if any(c.dtype == torch.float64 for c in coordinates):
        value = value.double()
    return value, exact_coordinates(value, *coordinates)
