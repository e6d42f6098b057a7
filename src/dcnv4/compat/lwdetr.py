"""Multi-scale deformable attention as LW-DETR and RF-DETR call it: channels before pixels."""

from __future__ import annotations

from torch import Tensor

from ..functional import ms_deform_attn
from .deformable_detr import Shapes


def ms_deform_attn_core_pytorch(
    value: Tensor,
    value_spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention of a value whose pixels are its last dimension.

    Args:
        value: [B, G, D, S].
        value_spatial_shapes: L pairs (H, W), an integer tensor [L, 2] or a sequence.
        sampling_locations: [B, Q, G, L, P, 2] in (x, y) order, normalised to [0, 1].
        attention_weights: [B, Q, G, L·P] or [B, Q, G, L, P].

    Returns:
        [B, Q, G·D] in the dtype of `value`.

    Raises:
        TypeError, ValueError: as `functional.ms_deform_attn`.

    Source: Chen et al., LW-DETR, arXiv:2406.03459.

    Example:
        >>> import torch
        >>> from dcnv4.compat.lwdetr import ms_deform_attn_core_pytorch
        >>> value, sizes = torch.randn(2, 8, 32, 120), [(8, 12), (4, 6)]
        >>> locations, weights = torch.rand(2, 50, 8, 2, 4, 2), torch.rand(2, 50, 8, 8)
        >>> ms_deform_attn_core_pytorch(value, sizes, locations, weights).shape
        torch.Size([2, 50, 256])
    """
    value = value.permute(0, 3, 1, 2)
    return ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)
