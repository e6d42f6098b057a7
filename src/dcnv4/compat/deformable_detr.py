"""Multi-scale deformable attention by the names that Deformable DETR has for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_sizes
from ..functional import ms_deform_attn
from ..layers import FlashDeformAttn
from ..tracing import is_traced

MSDeformAttn = FlashDeformAttn
"""Deformable DETR's layer, with the same arguments and parameters, is `FlashDeformAttn`."""

Shapes = Tensor | Sequence[Sequence[int]]
Starts = Tensor | Sequence[int] | None


class MSDeformAttnFunction:
    """Multi-scale deformable attention as Deformable DETR calls it.

    Example:
        >>> import torch
        >>> from dcnv4.compat import MSDeformAttnFunction
        >>> shapes, starts = torch.tensor([(8, 12), (4, 6)]), torch.tensor([0, 96])
        >>> value = torch.randn(2, 120, 8, 32)
        >>> locations, weights = torch.rand(2, 50, 8, 2, 4, 2), torch.rand(2, 50, 8, 2, 4)
        >>> MSDeformAttnFunction.apply(value, shapes, starts, locations, weights, 64).shape
        torch.Size([2, 50, 256])
    """

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Shapes,
        value_level_start_index: Starts,
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


def ms_deform_attn_core_pytorch(
    value: Tensor,
    value_spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention as Deformable DETR calls its fallback.

    Args:
        value to attention_weights: as in `MSDeformAttnFunction.apply`.

    Returns:
        [B, Q, G·D] in the dtype of `value`.

    Raises:
        TypeError, ValueError: as `functional.ms_deform_attn`.

    Source: as `MSDeformAttnFunction`.

    Example:
        >>> import torch
        >>> from dcnv4.compat import ms_deform_attn_core_pytorch
        >>> shapes, value = torch.tensor([(8, 12), (4, 6)]), torch.randn(2, 120, 8, 32)
        >>> locations, weights = torch.rand(2, 50, 8, 2, 4, 2), torch.rand(2, 50, 8, 2, 4)
        >>> ms_deform_attn_core_pytorch(value, shapes, locations, weights).shape
        torch.Size([2, 50, 256])
    """
    return ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)


def _check_starts(starts: Starts, shapes: Shapes) -> None:
    """Check that the levels start where they do when one follows another."""
    given = [] if starts is None else starts
    named = {"value_spatial_shapes": shapes, "value_level_start_index": given}
    for name, argument in named.items():
        if not isinstance(argument, (Tensor, list, tuple)) or getattr(argument, "ndim", 1) == 0:
            rule = f"{name} must be a tensor or a sequence of L levels"
            raise TypeError(f"{rule}; got {argument!r:.80}")
    if starts is None:
        return
    levels = len(shapes)
    rule = f"value_level_start_index must be the first rows of L = {levels} levels"
    if len(starts) != levels:
        raise ValueError(f"{rule}; got {len(starts)}")
    if _is_readable(starts) and _is_readable(shapes):
        pairs = _listed(check_sizes("value_spatial_shapes", shapes, levels))
        areas = [height * width for height, width in pairs]
        expected = [sum(areas[:level]) for level in range(levels)]
        if (found := _listed(starts)) != expected:
            raise ValueError(f"{rule} that follow one another = {expected}; got {found}")


def _listed(argument: Any) -> list[Any]:
    return argument.tolist() if isinstance(argument, Tensor) else list(argument)


def _is_readable(argument: Any) -> bool:
    """Whether the host has these numbers, without waiting for an accelerator or ending a trace."""
    if not isinstance(argument, Tensor):
        return torch._C._get_tracing_state() is None
    return argument.device.type == "cpu" and not is_traced(argument)
