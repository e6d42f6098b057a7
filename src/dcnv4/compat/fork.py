"""The operators by the names that nusu-github's fork of DCNv4 exports.

Two of them are operators of PyTorch by these names, as there: `torch.ops.dcnv4.dcnv4_forward` and
`torch.ops.dcnv4.flash_deform_attn`. They are made of this package's own.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..arguments import check_integer
from ..ops import composite
from .opengvlab import FlashDeformAttnFunction, _deform_conv


@composite(
    "Tensor input, Tensor offset_mask, SymInt kernel_h, SymInt kernel_w, SymInt stride_h, "
    "SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, "
    "SymInt group, SymInt group_channels, float offset_scale, SymInt im2col_step, "
    "SymInt remove_center, bool softmax=False"
)
def dcnv4_forward(
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
    im2col_step: int,
    remove_center: int,
    softmax: bool = False,
) -> Tensor:
    """`functional.deform_conv` of these arguments.

    Args:
        input to remove_center: as in `DCNv4Function.apply`.
        softmax: normalise the K weights of a group first.

    Returns:
        [B, Ho, Wo, C] in the dtype of `input`.

    Raises:
        ValueError: an argument of the wrong shape or range.
        RuntimeError: PyTorch's own, by its name: an argument of the wrong type.

    Source: Xiong et al., CVPR 2024, arXiv:2401.06197.

    Example:
        >>> import torch
        >>> from dcnv4 import dcnv4_forward
        >>> value, offset_mask = torch.randn(2, 14, 14, 64), torch.randn(2, 14, 14, 112)
        >>> window, groups = (3, 3, 1, 1, 1, 1, 1, 1), (4, 16)
        >>> dcnv4_forward(value, offset_mask, *window, *groups, 1.0, 256, 0).shape
        torch.Size([2, 14, 14, 64])
    """
    window = (kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    return _deform_conv(
        input, offset_mask, window, group, group_channels, offset_scale, remove_center, softmax
    )


def dcnv4_forward_pytorch(
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
    im2col_step: int,
    remove_center: int,
    softmax: bool = False,
) -> Tensor:
    """`dcnv4_forward` in plain PyTorch: the `reference` backend, slow, to compare with.

    Args:
        input to softmax: as in `dcnv4_forward`.

    Returns:
        [B, Ho, Wo, C] in the dtype of `input`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.

    Source: as `dcnv4_forward`.

    Example:
        >>> import torch
        >>> from dcnv4 import dcnv4_forward_pytorch
        >>> value, offset_mask = torch.randn(2, 14, 14, 64), torch.randn(2, 14, 14, 112)
        >>> window, groups = (3, 3, 1, 1, 1, 1, 1, 1), (4, 16)
        >>> dcnv4_forward_pytorch(value, offset_mask, *window, *groups, 1.0, 256, 0).shape
        torch.Size([2, 14, 14, 64])
    """
    window = (kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    sizes = (group, group_channels, offset_scale, remove_center)
    return _deform_conv(input, offset_mask, window, *sizes, softmax, backend="reference")


@composite(
    "Tensor value, Tensor value_spatial_shapes, Tensor? value_level_start_index, "
    "Tensor sampling_loc_attn, SymInt im2col_step, SymInt K"
)
def flash_deform_attn(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor | None,
    sampling_loc_attn: Tensor,
    im2col_step: int,
    K: int,  # noqa: N803
) -> Tensor:
    """`functional.ms_deform_attn` with the softmax of the weights.

    Args:
        value to K: as in `FlashDeformAttnFunction.apply`; shapes and starts are tensors.

    Returns:
        [B, Q, G·D] in the dtype of `value`.

    Raises:
        ValueError: an argument of the wrong shape or value.
        RuntimeError: PyTorch's own, by its name: an argument of the wrong type.

    Source: as `dcnv4_forward`.

    Example:
        >>> import torch
        >>> from dcnv4 import flash_deform_attn
        >>> shapes, starts = torch.tensor([(8, 12), (4, 6)]), torch.tensor([0, 96])
        >>> value, packed = torch.randn(2, 120, 8, 32), torch.rand(2, 50, 8, 3 * 2 * 4)
        >>> flash_deform_attn(value, shapes, starts, packed, 64, 4).shape
        torch.Size([2, 50, 256])
    """
    return FlashDeformAttnFunction.apply(
        value, value_spatial_shapes, value_level_start_index, sampling_loc_attn, im2col_step, K
    )


def compute_offset_mask_channels(group: int, kernel_size: int, remove_center: int = 0) -> int:
    """The channels of an `offset_mask`, 3·group·K and then up to a multiple of 8.

    Args:
        group: groups of channels with offsets and weights of their own.
        kernel_size: of a square kernel; K is its square.
        remove_center: 0 or 1; 1 leaves K one less.

    Returns:
        The width of `DCNv4`'s `offset_mask` projection.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.

    Example:
        >>> from dcnv4.compat import compute_offset_mask_channels
        >>> compute_offset_mask_channels(group=4, kernel_size=3)
        112
    """
    check_integer("group", group, 1)
    check_integer("kernel_size", kernel_size, 1)
    if remove_center not in (0, 1):
        raise ValueError(f"remove_center must be 0 or 1; got {remove_center!r}")
    return math.ceil(3 * group * (kernel_size**2 - remove_center) / 8) * 8
