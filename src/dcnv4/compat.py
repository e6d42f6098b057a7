"""The field's classic functions by their own signatures, computed by this package's operators.

A repository written for one of them runs after changing its import. The classes have the `apply` of
the autograd functions that they are named after and nothing else of them; gradients of any order
come from the operators. `im2col_step` is accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import check_tensor
from .eager import is_traced
from .functional import deform_conv, ms_deform_attn
from .layers import FlashDeformAttn

MSDeformAttn = FlashDeformAttn
"""Deformable DETR's layer: the same arguments and parameters."""

Shapes = Tensor | Sequence[Sequence[int]]


class MSDeformAttnFunction:
    """Multi-scale deformable attention as Deformable DETR calls it."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Shapes,
        value_level_start_index: Tensor | Sequence[int] | None,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        """`functional.ms_deform_attn` of these arguments.

        Args:
            value: [B, S, G, D].
            value_spatial_shapes: L pairs (H, W), an integer tensor [L, 2] or a sequence.
            value_level_start_index: [L], each level's first row in `value`. Levels follow one
                another, so that `value_spatial_shapes` tells it: what the host can read of the two
                must agree. On an accelerator neither is read.
            sampling_locations: [B, Q, G, L, P, 2] in (x, y) order, normalised to [0, 1].
            attention_weights: [B, Q, G, L, P].
            im2col_step: ignored.

        Returns:
            [B, Q, G·D] in the dtype of `value`.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape or value.

        Source: Zhu et al., Deformable DETR, ICLR 2021, arXiv:2010.04159.
        """
        _check_starts(value_level_start_index, value_spatial_shapes)
        return ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)


class MultiScaleDeformableAttnFunction(MSDeformAttnFunction):
    """Multi-scale deformable attention as mmcv calls it: as Deformable DETR does."""


def multi_scale_deformable_attn_pytorch(
    value: Tensor,
    value_spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention as mmcv calls its fallback.

    Args:
        value: [B, S, G, D].
        value_spatial_shapes: L pairs (H, W), an integer tensor [L, 2] or a sequence.
        sampling_locations: [B, Q, G, L, P, 2] in (x, y) order, normalised to [0, 1].
        attention_weights: [B, Q, G, L, P].

    Returns:
        [B, Q, G·D] in the dtype of `value`.

    Raises:
        TypeError, ValueError: as `functional.ms_deform_attn`.

    Source: as `MSDeformAttnFunction`.
    """
    return ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)


ms_deform_attn_core_pytorch = multi_scale_deformable_attn_pytorch
"""The same by the name that Deformable DETR has for it."""


class FlashDeformAttnFunction:
    """Multi-scale deformable attention as the original DCNv4 package calls it."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Shapes,
        value_level_start_index: Tensor | Sequence[int] | None,
        sampling_loc_attn: Tensor,
        im2col_step: int = 64,
        K: int = 8,  # noqa: N803
    ) -> Tensor:
        """`functional.ms_deform_attn` with the softmax of the weights.

        Args:
            value: [B, S, G, D].
            value_spatial_shapes: L pairs (H, W), an integer tensor [L, 2] or a sequence.
            value_level_start_index: as in `MSDeformAttnFunction`.
            sampling_loc_attn: [B, Q, G, 3·L·K], of each head first L·K locations (x, y),
                normalised to [0, 1], then L·K logits.
            im2col_step: ignored.
            K: points a head samples in each level, any number.

        Returns:
            [B, Q, G·D] in the dtype of `value`; nothing is rounded to float16.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape or value.

        Source: Xiong et al., CVPR 2024, arXiv:2401.06197.
        """
        _check_starts(value_level_start_index, value_spatial_shapes)
        check_tensor("sampling_loc_attn", sampling_loc_attn, "[B, Q, G, 3*L*K]", (4,))
        levels = len(value_spatial_shapes)
        if sampling_loc_attn.shape[3] != 3 * levels * K:
            raise ValueError(
                f"sampling_loc_attn must be [B, Q, G, 3*L*K = {3 * levels * K}] with L = {levels} "
                f"and K = {K}; got {list(sampling_loc_attn.shape)}"
            )
        locations, logits = sampling_loc_attn.split((2 * levels * K, levels * K), 3)
        return ms_deform_attn(
            value,
            value_spatial_shapes,
            locations.unflatten(3, (levels, K, 2)),
            logits,
            softmax=True,
        )


class DCNv4Function:
    """Deformable Convolution v4 as the original DCNv4 package calls it."""

    @staticmethod
    def apply(
        input: Tensor,
        offset_mask: Tensor,
        kernel_h: int,
        kernel_w: int,
        stride_h: int,
        stride_w: int,
        pad_h: int,
        pad_w: int,
        dilation_h: int,
        dilation_w: int,
        group: int,
        group_channels: int,
        offset_scale: float,
        im2col_step: int = 256,
        remove_center: int = False,
    ) -> Tensor:
        """`functional.deform_conv` of these arguments.

        Args:
            input: [B, H, W, C], C = group·group_channels.
            offset_mask: [B, Ho, Wo, M], M >= 3·group·K: of each group 2K offsets (x₀, y₀, x₁, …)
                in pixels, then K weights.
            kernel_h, kernel_w: points down and across; K = kernel_h·kernel_w.
            stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w: in input pixels.
            group: groups of channels with offsets and weights of their own.
            group_channels: channels of a group, any number.
            offset_scale: scales the kernel grid and the offsets alike.
            im2col_step: ignored.
            remove_center: 0 or 1; 1 drops the window's centre, so that K is one less.

        Returns:
            [B, Ho, Wo, C] in the dtype of `input`.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape or range.

        Source: Xiong et al., CVPR 2024, arXiv:2401.06197.
        """
        _check_channels(input, group, group_channels)
        return deform_conv(
            input,
            offset_mask,
            kernel_size=(kernel_h, kernel_w),
            stride=(stride_h, stride_w),
            padding=(pad_h, pad_w),
            dilation=(dilation_h, dilation_w),
            groups=group,
            offset_scale=offset_scale,
            remove_center=bool(remove_center),
        )


class DCNv3Function:
    """Deformable Convolution v3 as InternImage calls it."""

    @staticmethod
    def apply(
        input: Tensor,
        offset: Tensor,
        mask: Tensor,
        kernel_h: int,
        kernel_w: int,
        stride_h: int,
        stride_w: int,
        pad_h: int,
        pad_w: int,
        dilation_h: int,
        dilation_w: int,
        group: int,
        group_channels: int,
        offset_scale: float,
        im2col_step: int = 256,
        remove_center: int = False,
    ) -> Tensor:
        """`functional.deform_conv` with offsets and weights in tensors of their own.

        Args:
            input: [B, H, W, C], C = group·group_channels.
            offset: [B, Ho, Wo, 2·group·K], (x, y) of each point in pixels.
            mask: [B, Ho, Wo, group·K], the points' weights as they count: InternImage takes their
                softmax before the call.
            kernel_h to im2col_step: as in `DCNv4Function`.
            remove_center: 0 or 1; 1 drops the centre of a square kernel of odd size.

        Returns:
            [B, Ho, Wo, C] in the dtype of `input`.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape or range.

        Source: Wang et al., InternImage, CVPR 2023, arXiv:2211.05778.
        """
        if remove_center and (kernel_h != kernel_w or kernel_h % 2 == 0):
            raise ValueError(
                f"remove_center must come with a square kernel of odd size; got {kernel_h} x "
                f"{kernel_w}"
            )
        points = kernel_h * kernel_w - bool(remove_center)
        for name, tensor, fields in (("offset", offset, 2 * points), ("mask", mask, points)):
            check_tensor(name, tensor, "[B, Ho, Wo, fields]", (4,))
            if tensor.shape[3] != group * fields:
                raise ValueError(
                    f"{name} must be [B, Ho, Wo, {group * fields}], {fields} of each group; "
                    f"got {list(tensor.shape)}"
                )
        by_group = [tensor.unflatten(3, (group, -1)) for tensor in (offset, mask)]
        offset_mask = torch.cat(by_group, -1).flatten(3)
        window = (kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
        return DCNv4Function.apply(
            input, offset_mask, *window, group, group_channels, offset_scale, 0, remove_center
        )


def dcnv3_core_pytorch(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    group_channels: int,
    offset_scale: float,
    remove_center: int = False,
) -> Tensor:
    """Deformable Convolution v3 as InternImage calls its fallback.

    Args:
        input to remove_center: as in `DCNv3Function.apply`. Where `pad_h` and `pad_w` differ, they
            mean what they mean there; InternImage's fallback takes one for the other.

    Returns:
        [B, Ho, Wo, C] in the dtype of `input`.

    Raises:
        TypeError, ValueError: as `DCNv3Function.apply`.

    Source: as `DCNv3Function`.
    """
    window = (kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    return DCNv3Function.apply(
        input, offset, mask, *window, group, group_channels, offset_scale, 0, remove_center
    )


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = (1, 1),
    padding: int | Sequence[int] = (0, 0),
    dilation: int | Sequence[int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """torchvision's `deform_conv2d` where its weight is a depthwise one of ones.

    That is a deformable convolution whose weights are the mask's, which this package computes
    without unfolding the input. Any other weight is refused.

    Args:
        input: [B, C, H, W].
        offset: [B, 2·G·kh·kw, Ho, Wo], (y, x) of each point in pixels, rows of the kernel
            outermost. G groups of channels have offsets of their own.
        weight: [C, 1, kh, kw], all ones, and no gradient is wanted of it. It is read: on an
            accelerator that makes the host wait.
        bias: [C], added to the result.
        stride, padding, dilation: an int or (height, width), in pixels.
        mask: [B, G·kh·kw, Ho, Wo], the points' weights; None: ones.

    Returns:
        [B, C, Ho, Wo] in the dtype of `input`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value; a weight that is not
            ones.

    Source: Zhu et al., Deformable ConvNets v2, CVPR 2019, arXiv:1811.11168.
    """
    check_tensor("input", input, "[B, C, H, W]", (4,))
    check_tensor("weight", weight, "[C, 1, kh, kw]", (4,), input)
    channels, (kh, kw) = input.shape[1], weight.shape[2:]
    if weight.shape[:2] != (channels, 1):
        raise ValueError(
            f"weight must be depthwise = [{channels}, 1, kh, kw], as this package mixes no "
            f"channels; got {list(weight.shape)}"
        )
    if weight.requires_grad or not bool((weight == 1).all()):
        got = "one that requires a gradient" if weight.requires_grad else "others"
        raise ValueError(f"weight must be ones, as the mask holds the points' weights; got {got}")
    points = kh * kw
    check_tensor("offset", offset, "[B, 2*G*kh*kw, Ho, Wo]", (4,), input)
    batch, fields, rows, columns = offset.shape
    groups = fields // (2 * points)
    if fields == 0 or fields % (2 * points):
        raise ValueError(
            f"offset must be [B, 2*G*kh*kw = G*{2 * points}, Ho, Wo]; got {list(offset.shape)}"
        )
    if mask is None:
        mask = offset.new_ones((batch, groups * points, rows, columns))
    check_tensor("mask", mask, "[B, G*kh*kw, Ho, Wo]", (4,), input)
    if mask.shape != (expected := (batch, groups * points, rows, columns)):
        raise ValueError(
            f"mask must be [B, G*kh*kw, Ho, Wo] = {list(expected)}; got {list(mask.shape)}"
        )
    # Rows outermost and (y, x) there; columns outermost and (x, y) here.
    offsets = offset.unflatten(1, (groups, kh, kw, 2)).permute(0, 5, 6, 1, 3, 2, 4).flip(-1)
    weights = mask.unflatten(1, (groups, kh, kw)).permute(0, 4, 5, 1, 3, 2)
    output = deform_conv(
        input.permute(0, 2, 3, 1),
        torch.cat((offsets.flatten(4), weights.flatten(4)), -1).flatten(3),
        kernel_size=(kh, kw),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    if bias is not None:
        output = output + bias
    return output.permute(0, 3, 1, 2).contiguous()


def _check_channels(input: Tensor, group: int, group_channels: int) -> None:
    check_tensor("input", input, "[B, H, W, C]", (4,))
    if input.shape[3] != group * group_channels:
        raise ValueError(
            f"input must be [B, H, W, C = group*group_channels = {group * group_channels}]; "
            f"got {list(input.shape)}"
        )


def _check_starts(starts: Tensor | Sequence[int] | None, shapes: Shapes) -> None:
    """Check that the levels start where they do when one follows another."""
    if starts is None:
        return
    levels = len(shapes)
    rule = f"value_level_start_index must be the first rows of L = {levels} levels"
    if len(starts) != levels:
        raise ValueError(f"{rule}; got {len(starts)}")
    if not (_is_readable(starts) and _is_readable(shapes)):
        return
    found = [int(start) for start in starts]
    expected = [0]
    for height, width in shapes:
        expected.append(expected[-1] + int(height) * int(width))
    if found != expected[:-1]:
        raise ValueError(f"{rule} that follow one another = {expected[:-1]}; got {found}")


def _is_readable(argument: Tensor | Sequence[int] | Shapes) -> bool:
    """Whether the host has these numbers, without waiting for an accelerator."""
    if not isinstance(argument, Tensor):
        return True
    return argument.device.type == "cpu" and not is_traced(argument)
