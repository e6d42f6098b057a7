"""Multi-scale deformable attention as Ultralytics' RT-DETR calls it."""

from __future__ import annotations

from torch import Tensor

from .deformable_detr import Shapes, ms_deform_attn_core_pytorch
from .rtdetr import attend


def multi_scale_deformable_attn_pytorch(
    value: Tensor,
    value_spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention, levels and points being one dimension or two.

    Args:
        value: [B, S, G, D].
        value_spatial_shapes: L pairs (H, W), an integer tensor [L, 2] or a sequence.
        sampling_locations: [B, Q, G, L·P, 2] or, as in older versions, [B, Q, G, L, P, 2]; in
            (x, y) order, normalised to [0, 1].
        attention_weights: [B, Q, G, L·P] or [B, Q, G, L, P].

    Returns:
        [B, Q, G·D] in the dtype of `value`.

    Raises:
        TypeError, ValueError: as `functional.ms_deform_attn`.

    Source: Zhao et al., DETRs Beat YOLOs on Real-time Object Detection, CVPR 2024,
    arXiv:2304.08069.

    Example:
        >>> import torch
        >>> from dcnv4.compat.ultralytics import multi_scale_deformable_attn_pytorch
        >>> value, sizes = torch.randn(2, 120, 8, 32), [[8, 12], [4, 6]]
        >>> locations, weights = torch.rand(2, 50, 8, 8, 2), torch.rand(2, 50, 8, 8)
        >>> multi_scale_deformable_attn_pytorch(value, sizes, locations, weights).shape
        torch.Size([2, 50, 256])
    """
    inputs = value, value_spatial_shapes, sampling_locations, attention_weights
    if attention_weights.dim() == 5:
        return ms_deform_attn_core_pytorch(*inputs)
    levels = len(value_spatial_shapes)
    return attend(*inputs, [attention_weights.shape[3] // levels] * levels)
