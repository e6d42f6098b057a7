"""Multi-scale deformable attention as a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..arguments import (
    check_backend,
    check_divides,
    check_finite,
    check_flag,
    check_integer,
    check_sizes,
    check_tensor,
    factory,
)
from ..eager import as_leaf, beside, is_traced, traced_levels
from ..functional import ms_deform_attn
from ..geometry import sum_dtype
from ..initialization import Initializer, rays
from .base import Layer, width_read


class FlashDeformAttn(Layer):
    r"""Multi-scale deformable attention, with the meaning and parameters of Deformable DETR's.

    Every query looks at `n_points` points of each level, at offsets from its reference points;
    offsets and attention weights are predicted from the query, the softmax runs in the operator.

    Args:
        d_model: channels C of queries and values; `n_heads` must divide it.
        n_levels: L, feature levels.
        n_heads: G, attention heads.
        n_points: P, points a head samples in each level.
        ratio: channels of the values inside, in `d_model`s, as in ViT-Adapter's layer; `n_heads`
            must divide what they come to, rounded down.
        use_4D_normalizer: with reference boxes, offsets are in half boxes per pixel of the level
            instead of per `n_points`, as in variants of DINO's layer.
        backend: as in `functional.ms_deform_attn`.
        device, dtype: of the parameters, as in PyTorch's layers.

    Raises:
        TypeError, ValueError: an argument of the wrong type, range or shape, by its name.

    Note:
        Sampling locations are computed in float32 at least, also under autocast.

    Source: Zhu et al., Deformable DETR, ICLR 2021, arXiv:2010.04159; Xiong et al., CVPR 2024,
    arXiv:2401.06197. Checkpoints of Deformable DETR's MSDeformAttn load.
    """

    # What layers that were saved whole before had not.
    ratio: float = 1.0
    use_4D_normalizer: bool = False  # noqa: N815, the original's name
    im2col_step = 64
    """What the original layers hand to their kernel. Nothing reads it."""

    def __init__(
        self,
        d_model: int = 256,
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int = 4,
        ratio: float = 1.0,
        use_4D_normalizer: bool = False,  # noqa: N803, the original's name
        *,
        backend: str | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = check_integer("d_model", d_model, 1)
        self.n_levels = check_integer("n_levels", n_levels, 1)
        self.n_heads = check_integer("n_heads", n_heads, 1)
        self.n_points = check_integer("n_points", n_points, 1)
        check_divides("n_heads", n_heads, d_model, f"d_model = {d_model}")
        self.ratio = check_finite("ratio", ratio)
        inside = check_integer("int(ratio * d_model)", int(ratio * d_model), 1)
        check_divides("n_heads", n_heads, inside, f"int(ratio * d_model) = {inside}")
        self.use_4D_normalizer = check_flag("use_4D_normalizer", use_4D_normalizer)
        self.backend = check_backend(backend)
        samples = n_heads * n_levels * n_points
        made = factory(device, dtype)
        self.sampling_offsets = nn.Linear(d_model, 2 * samples, **made)
        self.attention_weights = nn.Linear(d_model, samples, **made)
        self.value_proj = nn.Linear(d_model, inside, **made)
        self.output_proj = nn.Linear(inside, d_model, **made)
        self._initialize()

    def _initializers(self) -> Iterator[tuple[nn.Module | None, Initializer, Initializer]]:
        zeros = nn.init.zeros_
        yield self.sampling_offsets, zeros, partial(rays, self.n_levels, self.n_points)
        yield self.attention_weights, zeros, zeros
        for projection in (self.value_proj, self.output_proj):
            yield projection, nn.init.xavier_uniform_, zeros

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
                boxes (x, y, w, h), whose offsets are in half boxes per `n_points`. B, Q and L may
                be 1: the same for all.
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
        _check_rows("input_flatten", input_flatten, self.value_proj)
        if input_padding_mask is not None:
            _check_mask(input_padding_mask, input_flatten)
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        output = ms_deform_attn(
            value.view(*value.shape[:2], logits.shape[2], -1),
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
        _check_rows("query", query, self.sampling_offsets)
        check_tensor("reference_points", reference_points, "[B, Q, L, 2 or 4]", (4,))
        whole, given = (*query.shape[:2], self.n_levels), reference_points.shape
        # `in` would not ask a tracer whether its sizes are these.
        fits = all(one == all_ or one == 1 for one, all_ in zip(given[:3], whole, strict=True))
        if not fits or (given[3] != 2 and given[3] != 4):
            raise ValueError(
                f"reference_points must be [B, Q, L, 2 or 4] = {[*whole, 2]} or {[*whole, 4]}, or "
                f"1 in place of B, Q or L; got {list(given)}"
            )
        check_sizes("input_spatial_shapes", shapes, self.n_levels)
        # As many heads as the projection has offsets for.
        points = (-1, self.n_levels, self.n_points)
        # Not `unflatten`, after which PyTorch's old exporter takes sizes for constants.
        rows = query.shape[:2]
        offsets = _wide(self.sampling_offsets(query)).view(*rows, *points, 2)
        boxes = _wide(reference_points)[:, :, None, :, None]
        if given[3] == 2 or self.use_4D_normalizer:
            offsets = offsets / self._sizes(shapes, offsets)
        else:
            offsets = offsets * (1 / self.n_points)
        if given[3] == 4:
            offsets = offsets * (boxes[..., 2:] * 0.5)
        return boxes[..., :2] + offsets, self.attention_weights(query).view(*rows, *points)

    def extra_repr(self) -> str:
        settings = {name: getattr(self, name) for name in ("n_levels", "n_heads", "n_points")}
        if self.ratio != 1:
            settings["ratio"] = self.ratio
        if self.use_4D_normalizer:
            settings["use_4D_normalizer"] = True
        return ", ".join((f"{self.d_model}", *(f"{k}={v}" for k, v in settings.items())))

    @staticmethod
    def _sizes(shapes: Tensor | Sequence[Sequence[int]], offsets: Tensor) -> Tensor:
        """The levels' (W, H), [L, 1, 2], beside `offsets`."""
        traced, place = is_traced(offsets), (offsets.device, offsets.dtype)
        if traced:
            shapes = traced_levels(shapes)
        if isinstance(shapes, Tensor):
            return beside(shapes[:, [1, 0]][:, None].to(*place), offsets)
        sizes = tuple((width, height) for height, width in shapes)
        return beside(_make_sizes(sizes, *place), offsets) if traced else _kept_sizes(sizes, *place)


def _check_rows(name: str, argument: Tensor, reader: nn.Module) -> None:
    check_tensor(name, argument, "[B, length, d_model]", (3,))
    if argument.shape[-1] != (width := width_read(reader, argument.shape[-1])):
        raise ValueError(
            f"{name} must be [B, length, d_model = {width}]; got {list(argument.shape)}"
        )


def _check_mask(mask: Any, rows: Tensor) -> None:
    rule = f"input_padding_mask must be [B, S] = {list(rows.shape[:2])}, of bool"
    if not isinstance(mask, Tensor):
        raise TypeError(f"{rule}; got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{rule}; got {mask.dtype}")
    if mask.shape != rows.shape[:2]:
        raise ValueError(f"{rule}; got {list(mask.shape)}")


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
