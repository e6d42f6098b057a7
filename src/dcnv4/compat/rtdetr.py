"""Multi-scale deformable attention by the names that RT-DETR has for it, and what is built on it:
RT-DETRv2, D-FINE, DEIM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_choice, check_tensor
from ..functional import ms_deform_attn
from ..geometry import levels, sum_dtype
from ..tracing import unflattened
from .deformable_detr import Shapes, ms_deform_attn_core_pytorch

deformable_attention_core_func = ms_deform_attn_core_pytorch
"""RT-DETR's name for it: the same arguments."""

__all__ = ["deformable_attention_core_func", "deformable_attention_core_func_v2"]

_OUTSIDE = -1.0
"""A location outside every level: nothing is read there."""


def deformable_attention_core_func_v2(
    value: Tensor | Sequence[Tensor],
    value_spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
    value_shape: str = "default",
) -> Tensor:
    """Multi-scale deformable attention with its own number of points in every level.

    Args:
        value: [B, S, G, D], or the levels as D-FINE splits them, each [B, G, D, H·W].
        value_spatial_shapes: L pairs (H, W), an integer tensor [L, 2] or a sequence.
        sampling_locations: [B, Q, G, P, 2] in (x, y) order, normalised to [0, 1]; the points of the
            first level come first.
        attention_weights: [B, Q, G, P].
        num_points_list: the numbers of points of the L levels, P together.
        method: "default", or "discrete": the nearest pixel of each level is read, and locations get
            no gradient.
        value_shape: ignored; DEIM says with it which of the two a value is.

    Returns:
        [B, Q, G·D] in the dtype of `value`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.

    Source: Lv et al., RT-DETRv2, arXiv:2407.17140; Peng et al., D-FINE, ICLR 2025,
    arXiv:2410.13842. On levels that are not square the columns of "discrete" end where the level
    does, not where its rows do.

    Example:
        >>> import torch
        >>> from dcnv4.compat.rtdetr import deformable_attention_core_func_v2
        >>> value, sizes = torch.randn(2, 120, 8, 32), [[8, 12], [4, 6]]
        >>> locations, weights = torch.rand(2, 50, 8, 7, 2), torch.rand(2, 50, 8, 7)
        >>> deformable_attention_core_func_v2(value, sizes, locations, weights, [4, 3]).shape
        torch.Size([2, 50, 256])
    """
    if not isinstance(value, Tensor):
        value = torch.cat([level.permute(0, 3, 1, 2) for level in value], 1)
    inputs = value, value_spatial_shapes, sampling_locations, attention_weights
    return attend(*inputs, num_points_list, method)


def attend(
    value: Tensor,
    shapes: Shapes,
    locations: Tensor,
    weights: Tensor,
    counts: Sequence[int],
    method: str = "default",
    backend: str | None = None,
) -> Tensor:
    """`deformable_attention_core_func_v2` of a tensor, by this backend."""
    check_tensor("sampling_locations", locations, "[B, Q, G, P, 2]", (5,))
    check_tensor("attention_weights", weights, "[B, Q, G, P]", (4,))
    if not locations.shape[3] == weights.shape[3] == sum(counts):
        raise ValueError(
            "sampling_locations must be [B, Q, G, P, 2] and attention_weights [B, Q, G, P] with "
            f"P = {sum(counts)}, the sum of num_points_list; got {list(locations.shape)} and "
            f"{list(weights.shape)}"
        )
    if check_choice("method", method, ("default", "discrete")) == "discrete":
        locations = _nearest(locations, shapes, counts)
    locations, weights = _by_level(locations, counts, _OUTSIDE), _by_level(weights, counts, 0.0)
    return ms_deform_attn(value, shapes, locations, weights, backend=backend)


def _nearest(locations: Tensor, shapes: Shapes, counts: Sequence[int]) -> Tensor:
    """The centres of the pixels that locations are nearest to."""
    heights, widths, _ = levels(shapes, locations.device)
    sizes = torch.cat((widths, heights), 1)
    if len(sizes) != len(counts):
        raise ValueError(f"num_points_list must have {len(sizes)} levels; got {len(counts)}")
    size = torch.cat([of_level.expand(n, 2) for of_level, n in zip(sizes, counts, strict=True)])
    pixels = (locations.detach() * size + 0.5).to(torch.int64).clamp(min=0)
    return (torch.minimum(pixels, size - 1).to(sum_dtype(locations.dtype)) + 0.5) / size


def _by_level(points: Tensor, counts: Sequence[int], fill: float) -> Tensor:
    """[B, Q, G, L, P, ...] of what is [B, Q, G, sum of the levels' counts, ...].

    P is the largest count; the points that a level lacks are `fill`.
    """
    most = max(counts)
    if all(count == most for count in counts):
        return unflattened(points, 3, (len(counts), most))
    inner = (0, 0) * (points.dim() - 4)
    parts = points.split(list(counts), 3)
    return torch.stack([F.pad(p, (*inner, 0, most - p.shape[3]), value=fill) for p in parts], 3)
