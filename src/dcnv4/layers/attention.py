"""Multi-scale deformable attention as a layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from .. import backends, ops
from ..arguments import (
    check_backend,
    check_divides,
    check_finite,
    check_flag,
    check_integer,
    check_levels,
    check_reference_points,
    check_sizes,
    check_tensor,
    factory,
)
from ..autocast import autocast_dtype
from ..eager import compute
from ..functional import ms_deform_attn_from_offsets
from ..geometry import Reference, attn_points, levels, sum_dtype
from ..initialization import Initializer, rays
from ..tracing import as_leaf, may_read_past, remembered
from .base import Layer, check_dtype, width_read
from .projections import (
    Call,
    Formula,
    Parameters,
    Sums,
    Weights,
    are_computed_in,
    called,
    multiplied,
    read,
)


class FlashDeformAttn(Layer):
    r"""Multi-scale deformable attention, with the meaning and parameters of Deformable DETR's.

    Every query looks at `n_points` points of each level, at offsets from its reference points. The
    offsets and the weights of the points are predicted from the query. The softmax is a part of the
    operator.

    Args:
        d_model: channels C of queries and values; `n_heads` must divide it.
        n_levels: L, feature levels.
        n_heads: G, attention heads.
        n_points: P, points a head samples in each level.
        ratio: the values have `d_model`·ratio channels, rounded down, as in ViT-Adapter's layer;
            `n_heads` must divide them.
        use_4D_normalizer: with reference boxes, an offset of 1 is w / (2·Wₗ) instead of
            w / (2·P), as in variants of DINO's layer.
        backend: as in `functional.ms_deform_attn`.
        device, dtype: of the parameters, as in PyTorch's layers.

    Raises:
        TypeError, ValueError: an argument of the wrong type, range or shape, by its name.

    Note:
        Sampling locations are computed in float32 at least, also under autocast.

    Source: Zhu et al., Deformable DETR, ICLR 2021, arXiv:2010.04159; Xiong et al., CVPR 2024,
    arXiv:2401.06197. Checkpoints of Deformable DETR's MSDeformAttn load.

    Example:
        >>> import torch
        >>> from dcnv4 import FlashDeformAttn
        >>> attention = FlashDeformAttn(d_model=256, n_levels=2, n_heads=8, n_points=4)
        >>> shapes = [(32, 48), (16, 24)]
        >>> pyramid = torch.randn(2, 32 * 48 + 16 * 24, 256)
        >>> queries, reference_points = torch.randn(2, 100, 256), torch.rand(2, 100, 2, 2)
        >>> attention(queries, reference_points, pyramid, shapes).shape
        torch.Size([2, 100, 256])
    """

    # What layers that were saved whole before had not.
    ratio: float = 1.0
    use_4D_normalizer: bool = False  # noqa: N815, the original's name
    im2col_step = 64
    """The original layers have it. Here nothing reads it."""

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
                boxes (x, y, w, h), of whose width an offset of 1 is 1 / (2·P). B, Q and L may be 1:
                the same for all.
            input_flatten: [B, S, C], the levels' pixels one level after another.
            input_spatial_shapes: (H, W) of each level, a sequence or an integer tensor [L, 2]; on
                an accelerator it stays there.
            input_level_start_index: not needed (levels follow one another); accepted because
                Deformable DETR's callers pass it.
            input_padding_mask: [B, S], True where a pixel is padding and counts as zeros.

        Returns:
            [B, Q, C].

        Raises:
            TypeError: an argument is not a floating-point tensor, or `input_spatial_shapes` are
                not pairs of integers.
            ValueError: an argument of the wrong shape or device, by its name.
            RuntimeError: the backend asked for cannot run here; the reasons are listed.
        """
        if isinstance(query, Proxy):
            return as_leaf(
                *(FlashDeformAttn, self, query, reference_points, input_flatten),
                *(input_spatial_shapes, input_level_start_index, input_padding_mask),
            )
        _check_rows("query", query, self.sampling_offsets)
        whole = *query.shape[:2], self.n_levels
        check_reference_points(reference_points, whole, query)
        _check_rows("input_flatten", input_flatten, self.value_proj)
        if input_flatten.shape[0] != query.shape[0]:
            raise ValueError(
                f"input_flatten must be [B, S, d_model] with B = {query.shape[0]}, as query has; "
                f"got {list(input_flatten.shape)}"
            )
        if input_padding_mask is not None:
            _check_mask(input_padding_mask, input_flatten)
        if may_read_past(query, reference_points, input_flatten):
            formula = self._formula(
                *(query, reference_points, input_flatten),
                *(input_spatial_shapes, input_padding_mask),
            )
            if formula is not None:
                inputs = map(formula.prepared, (0, 1), (query, input_flatten))
                given = query, input_flatten, reference_points
                return formula.run(given, (*inputs, reference_points))
        check_dtype("query", query, self.sampling_offsets)
        check_dtype("input_flatten", input_flatten, self.value_proj)
        check_sizes("input_spatial_shapes", input_spatial_shapes, self.n_levels)
        return self._attend(
            *(query, reference_points, input_flatten, input_spatial_shapes, input_padding_mask),
        )

    def _attend(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        shapes: Tensor | Sequence[Sequence[int]],
        mask: Tensor | None,
        call: Call = called,
    ) -> Tensor:
        """The output of arguments that were checked; `call` calls submodules."""
        offsets, logits = self._predict(query, call)
        value = call(self.value_proj, input_flatten)
        if mask is not None:
            value = value.masked_fill(mask[..., None], 0.0)
        heads = logits.shape[2]
        output = ms_deform_attn_from_offsets(
            *(value.view(*value.shape[:2], heads, value.shape[2] // heads), shapes),
            *(reference_points, offsets, logits),
            box_normalizer=self._box_normalizer(),
            softmax=True,
            backend=self.backend,
        )
        return call(self.output_proj, output)

    def _formula(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        shapes: Tensor | Sequence[Sequence[int]],
        mask: Tensor | None,
    ) -> _AttnFormula | None:
        """The layer as one node of autograd; None where it has to be composed."""
        held = self._modules  # a module's own way to its submodules is a slow one
        parameters = read(
            (held["sampling_offsets"], held["attention_weights"]),
            (held["value_proj"],),
            (held["output_proj"],),
        )
        if parameters is None or 0 in (query.numel(), input_flatten.numel()):
            return None
        device = query.device
        dtype, beside = (autocast_dtype(tensor) for tensor in (query, input_flatten))
        exact = reference_points.dtype in (dtype, sum_dtype(dtype))
        if beside is not dtype or not exact or input_flatten.device != device:
            return None
        if not are_computed_in(dtype, device.type, parameters):
            return None
        offsets, logits, inside = (weight.shape[0] for weight in parameters.tensors[:3])
        samples = self.n_levels * self.n_points
        heads = logits // samples
        if offsets != 2 * logits or logits != heads * samples or inside % heads:
            return None
        levels = _checked_levels(shapes, self.n_levels, input_flatten.shape[1], device)
        tensors = query, reference_points, input_flatten, *parameters.tensors
        deterministic = ops.must_be_deterministic(*tensors)
        backend = backends.choose("ms_deform_attn", device, dtype, deterministic, self.backend)
        wide = query.dtype, input_flatten.dtype, reference_points.dtype
        return _AttnFormula(self, parameters, dtype, wide, backend, heads, levels, mask)

    def sampling_points(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_spatial_shapes: Tensor | Sequence[Sequence[int]],
    ) -> tuple[Tensor, Tensor]:
        """Where the layer looks: the points that every query sums, and their weights.

        Args:
            query, reference_points, input_spatial_shapes: as `forward` takes them.

        Returns:
            locations [B, Q, G, L, P, 2] in (x, y) order, from 0 to 1 over each level, edge to edge,
            and weights [B, Q, G, L, P], which add up to 1 over L·P.
        """
        _check_rows("query", query, self.sampling_offsets)
        check_reference_points(reference_points, (*query.shape[:2], self.n_levels), query)
        check_sizes("input_spatial_shapes", input_spatial_shapes, self.n_levels)
        offsets, logits = map(_wide, self._predict(query))
        heights, widths, _ = levels(input_spatial_shapes, query.device)
        place = Reference(_wide(reference_points), self._box_normalizer())
        x_y = torch.stack(attn_points(offsets, heights, widths, place), -1)
        locations = (x_y + 0.5) / torch.cat((widths, heights), 1)[:, None]
        return locations, logits.flatten(3).softmax(-1).view_as(logits)

    def _predict(self, query: Tensor, call: Call = called) -> tuple[Tensor, Tensor]:
        """Offsets [B, Q, G, L, P, 2] and the logits [B, Q, G, L, P] of the weights."""
        offsets, logits = call(self.sampling_offsets, query), call(self.attention_weights, query)
        # As many heads as the projection has weights for. Not `unflatten`, after which PyTorch's
        # old exporter takes sizes for constants.
        heads = logits.shape[2] // (self.n_levels * self.n_points)
        shape = *query.shape[:2], heads, self.n_levels, self.n_points
        return offsets.view(*shape, 2), logits.view(shape)

    def _box_normalizer(self) -> str:
        return "size" if self.use_4D_normalizer else "points"

    def extra_repr(self) -> str:
        settings = {name: getattr(self, name) for name in ("n_levels", "n_heads", "n_points")}
        if self.ratio != 1:
            settings["ratio"] = self.ratio
        if self.use_4D_normalizer:
            settings["use_4D_normalizer"] = True
        return ", ".join((f"{self.d_model}", *(f"{k}={v}" for k, v in settings.items())))


class _AttnFormula(Formula):
    """A `FlashDeformAttn`: offsets and logits are one product of the query."""

    def __init__(
        self,
        layer: FlashDeformAttn,
        parameters: Parameters,
        dtype: torch.dtype,
        wide: tuple[torch.dtype, ...],
        backend: str,
        heads: int,
        levels: Tensor | list[tuple[int, int]],
        mask: Tensor | None,
    ) -> None:
        super().__init__(parameters, dtype, wide, backend)
        self.layer, self.levels = layer, levels
        self.points = heads, layer.n_levels, layer.n_points
        self.box_normalizer = layer._box_normalizer()
        self.mask = None if mask is None else mask[..., None]

    def composed(self, inputs: Sequence[Tensor], call: Call) -> Tensor:
        query, rows, reference = inputs
        mask = None if self.mask is None else self.mask[..., 0]
        return self.layer._attend(query, reference, rows, self.levels, mask, call)

    def forward(
        self, inputs: Sequence[Tensor], weights: Weights
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        query, rows, reference = inputs
        predicted = self.project(0, query, *weights[0])
        value = self.project(1, rows, *weights[1])
        if self.mask is not None:
            value.masked_fill_(self.mask, 0.0)
        value = value.view(*rows.shape[:2], self.points[0], -1)
        y = compute(
            ops.MS_DEFORM_ATTN_FROM_OFFSETS,
            *(self.backend, value, self.levels, reference, *self._split(predicted)),
            *(self.box_normalizer, True, reference.requires_grad and torch.is_grad_enabled()),
        )
        return F.linear(y, *weights[2]), (y, predicted, value)

    def backward(
        self,
        grad: Tensor,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        kept: list[Tensor],
        sums: Sums | None,
        needed: Sequence[bool],
    ) -> tuple[Sequence[Tensor | None], Weights]:
        (query, rows, reference), (y, predicted, value) = inputs, kept
        grad = grad.reshape(-1, grad.shape[2])
        grad_y = torch.mm(grad, weights[2]).view(y.shape)
        grad_predicted = predicted.new_empty(predicted.shape)
        bias = self._channel_sums(value, sums)
        told: dict[str, Any] = {} if bias is None else {"channel_sums": bias}
        grad_value, grad_reference, *_ = ops.DeformAttnFromOffsets.backward(
            *(grad_y, self.backend, value, self.levels, reference, *self._split(predicted)),
            *(self.box_normalizer, True, needed[2]),
            out=(None, *self._split(grad_predicted)),
            **told,
        )
        if self.mask is not None:
            grad_value = grad_value.view(*value.shape[:2], -1).masked_fill_(self.mask, 0.0)
        flat = [t.view(-1, t.shape[2]) for t in (grad_predicted, query, rows, y)]
        grad_predicted, query, rows_, y = flat
        grad_value = grad_value.view(rows_.shape[0], -1)
        grads: list[Tensor | None] = [None, None, grad_reference]
        if needed[0]:
            grads[0] = multiplied(grad_predicted, weights[0], self.wide[0]).view(inputs[0].shape)
        if needed[1]:
            grads[1] = multiplied(grad_value, weights[1], self.wide[1]).view(rows.shape)
        if sums is None:
            return grads, []
        return grads, [
            sums.of(0, grad_predicted, query),
            sums.of(1, grad_value, rows_, bias),
            sums.of(2, grad, y),
        ]

    def _channel_sums(self, value: Tensor, sums: Sums | None) -> Tensor | None:
        """Zeros to which the backend adds the gradient of the value's bias, where it does."""
        if self.backend != "cuda" or self.mask is not None or sums is None:
            return None
        cuda: Any = backends.load("cuda")
        if not (sums.has_bias(1) and cuda.sums_channels(value)):
            return None
        return value.new_zeros(value.shape[2] * value.shape[3], dtype=torch.float32)

    def _split(self, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets [B, Q, G, L, P, 2] and logits [B, Q, G, L, P] in a product [B, Q, 3·G·L·P]."""
        samples = math.prod(self.points)
        offsets, logits = predicted.split_with_sizes((2 * samples, samples), 2)
        shape = *predicted.shape[:2], *self.points
        return offsets.view(*shape, 2), logits.view(shape)


def _checked_levels(
    shapes: Tensor | Sequence[Sequence[int]], levels: int, length: int, device: torch.device
) -> Tensor | list[tuple[int, int]]:
    """`check_levels` of what a layer is given, by its name; of tuples, once."""
    if type(shapes) is tuple:
        try:
            return _kept_levels(shapes, levels, length, device)
        except TypeError:  # not to be kept, or wrong
            pass
    return _named_levels(shapes, levels, length, device)


def _named_levels(
    shapes: Tensor | Sequence[Sequence[int]], levels: int, length: int, device: torch.device
) -> Tensor | list[tuple[int, int]]:
    check_sizes("input_spatial_shapes", shapes, levels)
    return check_levels(shapes, levels, length, device)


_kept_levels = remembered(_named_levels)


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
