"""Deformable Convolution v4 and v3 by the names that OpenGVLab's DCNv4 and InternImage have."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_integer, check_tensor
from ..functional import deform_conv, ms_deform_attn
from ..tracing import unflattened
from .deformable_detr import Shapes, Starts, _check_starts


class FlashDeformAttnFunction:
    """Multi-scale deformable attention as the original DCNv4 package calls it.

    Example:
        >>> import torch
        >>> from dcnv4.compat import FlashDeformAttnFunction
        >>> shapes, starts = torch.tensor([(8, 12), (4, 6)]), torch.tensor([0, 96])
        >>> value, packed = torch.randn(2, 120, 8, 32), torch.rand(2, 50, 8, 3 * 2 * 4)
        >>> FlashDeformAttnFunction.apply(value, shapes, starts, packed, 64, 4).shape
        torch.Size([2, 50, 256])
    """

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Shapes,
        value_level_start_index: Starts,
        sampling_loc_attn: Tensor,
        im2col_step: int = 64,
        K: int = 8,  # noqa: N803
    ) -> Tensor:
        """`functional.ms_deform_attn` with the softmax of the weights.

        Args:
            value: [B, S, G, D].
            value_spatial_shapes: L pairs (H, W), an integer tensor [L, 2] or a sequence.
            value_level_start_index: as in `MSDeformAttnFunction`.
            sampling_loc_attn: [B, Q, G, 3·L·K] or [B, Q, G·3·L·K], of each head first L·K
                locations (x, y), normalised to [0, 1], then L·K logits.
            im2col_step: ignored.
            K: points a head samples in each level, any number.

        Returns:
            [B, Q, G·D] in the dtype of `value`; nothing is rounded to float16.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape or value.

        Source: Xiong et al., CVPR 2024, arXiv:2401.06197.
        """
        _check_starts(value_level_start_index, value_spatial_shapes)
        check_integer("K", K, 1)
        check_tensor("value", value, "[B, S, G, D]", (4,))
        layout = "[B, Q, G, 3*L*K] or [B, Q, G*3*L*K]"
        check_tensor("sampling_loc_attn", sampling_loc_attn, layout, (4, 3), value)
        levels, heads = len(value_spatial_shapes), value.shape[2]
        numbers = 3 * levels * K
        batch, _, *rest = sampling_loc_attn.shape
        if batch != value.shape[0] or rest not in ([heads, numbers], [heads * numbers]):
            raise ValueError(
                f"sampling_loc_attn must be [B = {value.shape[0]}, Q, G = {heads}, 3*L*K = "
                f"{numbers}] or [B, Q, {heads * numbers}] with L = {levels} and K = {K}; "
                f"got {list(sampling_loc_attn.shape)}"
            )
        if sampling_loc_attn.dim() == 3:
            sampling_loc_attn = unflattened(sampling_loc_attn, 2, (heads, numbers))
        locations, logits = sampling_loc_attn.split((2 * levels * K, levels * K), 3)
        locations = unflattened(locations, 3, (levels, K, 2))
        return ms_deform_attn(value, value_spatial_shapes, locations, logits, softmax=True)


class DCNv4Function:
    """Deformable Convolution v4 as the original DCNv4 package calls it.

    Example:
        >>> import torch
        >>> from dcnv4.compat import DCNv4Function
        >>> value, offset_mask = torch.randn(2, 14, 14, 64), torch.randn(2, 14, 14, 112)
        >>> window, groups = (3, 3, 1, 1, 1, 1, 1, 1), (4, 16)
        >>> DCNv4Function.apply(value, offset_mask, *window, *groups, 1.0, 256, 0).shape
        torch.Size([2, 14, 14, 64])
    """

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
        window = (kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
        return _deform_conv(
            input, offset_mask, window, group, group_channels, offset_scale, remove_center
        )


class DCNv3Function:
    """Deformable Convolution v3 as InternImage calls it.

    Example:
        >>> import torch
        >>> from dcnv4.compat import DCNv3Function
        >>> image = torch.randn(2, 14, 14, 64)
        >>> offset, mask = torch.randn(2, 14, 14, 72), torch.rand(2, 14, 14, 36)
        >>> window, groups = (3, 3, 1, 1, 1, 1, 1, 1), (4, 16)
        >>> DCNv3Function.apply(image, offset, mask, *window, *groups, 1.0, 256, 0).shape
        torch.Size([2, 14, 14, 64])
    """

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
        check_integer("kernel_h", kernel_h, 1)
        check_integer("kernel_w", kernel_w, 1)
        if remove_center and (kernel_h != kernel_w or kernel_h % 2 == 0):
            raise ValueError(
                f"remove_center must come with a square kernel of odd size; got {kernel_h} x "
                f"{kernel_w}"
            )
        check_integer("group", group, 1)
        points = kernel_h * kernel_w - bool(remove_center)
        for name, tensor, numbers in (("offset", offset, 2 * points), ("mask", mask, points)):
            check_tensor(name, tensor, "[B, Ho, Wo, channels]", (4,))
            if tensor.shape != (expected := (*offset.shape[:3], group * numbers)):
                raise ValueError(
                    f"{name} must be [B, Ho, Wo, {group}*{numbers}] = {list(expected)}; "
                    f"got {list(tensor.shape)}"
                )
        offsets = unflattened(offset, 3, (group, 2 * points))
        weights = unflattened(mask, 3, (group, points))
        offset_mask = torch.cat((offsets, weights), -1).flatten(3)
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

    Example:
        >>> import torch
        >>> from dcnv4.compat import dcnv3_core_pytorch
        >>> image = torch.randn(2, 14, 14, 64)
        >>> offset, mask = torch.randn(2, 14, 14, 72), torch.rand(2, 14, 14, 36)
        >>> window, groups = (3, 3, 1, 1, 1, 1, 1, 1), (4, 16)
        >>> dcnv3_core_pytorch(image, offset, mask, *window, *groups, 1.0).shape
        torch.Size([2, 14, 14, 64])
    """
    window = (kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    return DCNv3Function.apply(
        input, offset, mask, *window, group, group_channels, offset_scale, 0, remove_center
    )


def _deform_conv(
    input: Tensor,
    offset_mask: Tensor,
    window: tuple[int, ...],
    group: int,
    group_channels: int,
    offset_scale: float,
    remove_center: int,
    softmax: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`functional.deform_conv` of the arguments of `DCNv4Function.apply`, checked by their names.

    `window` is kernel_h to dilation_w.
    """
    numbers = (*window, group, group_channels)
    for name, number in zip(_NUMBERS, numbers, strict=True):
        check_integer(name, number, 0 if name.startswith("pad") else 1)
    if remove_center not in (0, 1):
        raise ValueError(f"remove_center must be 0 or 1; got {remove_center!r}")
    check_tensor("input", input, "[B, H, W, C]", (4,))
    if input.shape[3] != group * group_channels:
        raise ValueError(
            f"input must be [B, H, W, C = group*group_channels = {group * group_channels}]; "
            f"got {list(input.shape)}"
        )
    return deform_conv(
        input,
        offset_mask,
        kernel_size=window[:2],
        stride=window[2:4],
        padding=window[4:6],
        dilation=window[6:],
        groups=group,
        offset_scale=offset_scale,
        remove_center=bool(remove_center),
        softmax=softmax,
        backend=backend,
    )


_NUMBERS = (
    *("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w"),
    *("group", "group_channels"),
)
