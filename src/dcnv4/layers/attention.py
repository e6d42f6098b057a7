"""Multi-scale deformable attention as a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..arguments import check_backend, check_tensor
from ..eager import as_leaf, is_traced, traced_levels
from ..functional import ms_deform_attn
from ..geometry import sum_dtype
from .base import reset_projection


class FlashDeformAttn(nn.Module):
    r"""Multi-scale deformable attention, with the meaning and parameters of Deformable DETR's.

    Every query looks at `n_points` points of each level, at offsets from its reference points;
    offsets and attention weights are predicted from the query, the softmax runs in the operator.

    Args:
        d_model: channels C of queries and values; `n_heads` must divide it.
        n_levels: L, feature levels.
        n_heads: G, attention heads.
        n_points: P, points a head samples in each level.
        backend: as in `functional.ms_deform_attn`.

    Raises:
        ValueError: an argument of the wrong range or shape, by its name.

    Note:
        Sampling locations are computed in float32 at least, also under autocast.

    Source: Zhu et al., Deformable DETR, ICLR 2021, arXiv:2010.04159; Xiong et al., CVPR 2024,
    arXiv:2401.06197. Checkpoints of Deformable DETR's MSDeformAttn load.
    """

    def __init__(
        self,
        d_model: int = 256,
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int = 4,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "n_levels": n_levels, "n_heads": n_heads, "n_points": n_points}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be >= 1; got {size}")
        if d_model % n_heads:
            raise ValueError(f"n_heads must divide d_model = {d_model}; got {n_heads}")
        self.d_model = d_model
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points
        self.backend = check_backend(backend)
        samples = n_heads * n_levels * n_points
        self.sampling_offsets = nn.Linear(d_model, 2 * samples)
        self.attention_weights = nn.Linear(d_model, samples)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise anew: head h looks in a direction of its own, point p at p + 1 pixels."""
        angles = torch.arange(self.n_heads) * (2 * math.pi / self.n_heads)
        directions = torch.stack((angles.cos(), angles.sin()), -1)
        directions /= directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.n_points + 1)
        radial = directions[:, None, None] * distances[:, None]
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(radial.expand(-1, self.n_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            reset_projection(projection)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor | Sequence[Sequence[int]],
        input_level_start_index: Tensor | Sequence[int] | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [B, Q, C], in the dtype of the parameters; under autocast in any.
            reference_points: [B, Q, L, 2], (x, y) in [0, 1] over each level; or [B, Q, L, 4],
                boxes (x, y, w, h), whose offsets are in half boxes per `n_points`.
            input_flatten: [B, S, C], the levels' pixels one level after another.
            input_spatial_shapes: (H, W) of each level, a sequence or an integer tensor [L, 2]; on
                an accelerator it stays there.
            input_level_start_index: not needed (levels follow one another); accepted because
                Deformable DETR's callers pass it.
            input_padding_mask: [B, S], True where a pixel is padding and counts as zeros.

        Returns:
            [B, Q, C].

        Raises:
            TypeError: an argument is no tensor of floating point, or `input_spatial_shapes` no
                pairs of integers.
            ValueError: an argument of the wrong shape or device, by its name.
            RuntimeError: the backend asked for cannot run here; the reasons are listed.
        """
        if isinstance(query, Proxy):
            return as_leaf(
                *(FlashDeformAttn, self, query, reference_points, input_flatten),
                *(input_spatial_shapes, input_level_start_index, input_padding_mask),
            )
        locations, logits = self._locate(query, reference_points, input_spatial_shapes)
        self._check_rows("input_flatten", input_flatten)
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            if input_padding_mask.shape != input_flatten.shape[:2]:
                raise ValueError(
                    f"input_padding_mask must be [B, S] = {list(input_flatten.shape[:2])}; "
                    f"got {list(input_padding_mask.shape)}"
                )
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        output = ms_deform_attn(
            value.unflatten(-1, (self.n_heads, -1)),
            input_spatial_shapes,
            locations,
            logits,
            softmax=True,
            backend=self.backend,
        )
        projected: Tensor = self.output_proj(output)
        return projected

    def sampling_points(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_spatial_shapes: Tensor | Sequence[Sequence[int]],
    ) -> tuple[Tensor, Tensor]:
        """Where the layer looks: the points every query sums, and what each counts.

        Args:
            query, reference_points, input_spatial_shapes: as `forward` takes them.

        Returns:
            locations [B, Q, G, L, P, 2] in (x, y) order, from 0 to 1 over each level, edge to edge,
            and weights [B, Q, G, L, P], which add up to 1 over L·P.
        """
        locations, logits = self._locate(query, reference_points, input_spatial_shapes)
        return locations, _wide(logits).flatten(3).softmax(-1).view_as(logits)

    def _locate(
        self,
        query: Tensor,
        reference_points: Tensor,
        shapes: Tensor | Sequence[Sequence[int]],
    ) -> tuple[Tensor, Tensor]:
        """Locations [B, Q, G, L, P, 2] and the logits [B, Q, G, L, P] of their weights."""
        self._check_rows("query", query)
        check_tensor("reference_points", reference_points, "[B, Q, L, 2 or 4]", (4,))
        batch, queries = query.shape[:2]
        if reference_points.shape not in (
            expected := [(batch, queries, self.n_levels, size) for size in (2, 4)]
        ):
            raise ValueError(
                f"reference_points must be [B, Q, L, 2 or 4] = {list(expected[0])} or "
                f"{list(expected[1])}; got {list(reference_points.shape)}"
            )
        heads = (self.n_heads, self.n_levels, self.n_points)
        offsets = _wide(self.sampling_offsets(query)).unflatten(-1, (*heads, 2))
        size = reference_points.shape[3]
        centers = _wide(reference_points).reshape(batch, queries, 1, self.n_levels, 1, size)
        if size == 2:
            locations = centers + offsets / self._sizes(shapes, offsets)
        else:
            locations = centers[..., :2] + offsets * (centers[..., 2:] * (0.5 / self.n_points))
        return locations, self.attention_weights(query).unflatten(-1, heads)

    def _check_rows(self, name: str, argument: Tensor) -> None:
        check_tensor(name, argument, "[B, length, d_model]", (3,))
        if argument.shape[-1] != self.d_model:
            raise ValueError(
                f"{name} must be [B, length, d_model = {self.d_model}]; got {list(argument.shape)}"
            )

    def extra_repr(self) -> str:
        return (
            f"{self.d_model}, n_levels={self.n_levels}, n_heads={self.n_heads}, "
            f"n_points={self.n_points}"
        )

    @staticmethod
    def _sizes(shapes: Tensor | Sequence[Sequence[int]], offsets: Tensor) -> Tensor:
        """The levels' (W, H), [L, 1, 2], beside `offsets`."""
        shapes = traced_levels(shapes)
        if isinstance(shapes, Tensor):
            return shapes.flip(-1)[:, None].to(offsets.device, offsets.dtype)
        sizes = tuple((width, height) for height, width in shapes)
        make = _make_sizes if is_traced(offsets) else _kept_sizes
        return make(sizes, offsets.device, offsets.dtype)


def _wide(tensor: Tensor) -> Tensor:
    dtype = sum_dtype(tensor.dtype)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _make_sizes(
    sizes: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    return torch.tensor(sizes, dtype=dtype, device=device)[:, None]


@lru_cache(maxsize=256)
def _kept_sizes(
    sizes: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    # Kept, because copying numbers to an accelerator makes the host wait for it.
    with torch.inference_mode(False):
        return _make_sizes(sizes, device, dtype)
