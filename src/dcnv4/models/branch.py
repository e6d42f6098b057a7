"""A residual branch of a block, as one node of autograd where nobody can tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from ..autocast import autocast_dtype
from ..geometry import sum_dtype
from ..layers.base import are_unwatched, known
from ..layers.projections import (
    Call,
    Formula,
    Kept,
    Parameters,
    Sums,
    Weights,
    are_computed_in,
    read,
)
from ..tracing import may_read_past
from . import norm as layer_norm
from .mlp import MlpFormula
from .norm import LayerNorm

__all__: list[str] = []  # a part of models

for _kind in (nn.Sequential, nn.Identity, DropPath):
    known(_kind)


def formula(
    x: Tensor,
    norm: nn.Module,
    layer: nn.Module,
    drop: nn.Module,
    gamma: Tensor | None = None,
    post_norm: bool = False,
) -> Branch | None:
    """x + drop(layer(norm(x))·gamma) or, with `post_norm`, x + drop(norm(layer(x))·gamma), as one
    node of autograd; None where it has to be composed.

    Args:
        x: [B, H, W, C].
        norm: an `nn.Sequential` of a `LayerNorm` alone, or one that is called always.
        layer: a `Part`, or one that is composed always.
        drop: a `DropPath`, or an `nn.Identity`.
        gamma: [C]; None for 1.
        post_norm: whether the norm is behind the layer.
    """
    make = getattr(layer, "_part", None)
    if make is None or not may_read_past(x) or x.dtype is not autocast_dtype(x):
        return None
    if not are_unwatched((layer, drop)) or (only := norm_in(norm)) is None:
        return None
    if gamma is not None and type(gamma) is not nn.Parameter:
        return None
    own = (only,)
    inner: Formula | None
    if not post_norm:
        inner = make(x, x.dtype, own)
        return None if inner is None else _PreNormFormula(inner, only, drop, gamma)
    parameters = read(own)
    if parameters is None or not are_computed_in(x.dtype, x.device.type, parameters):
        return None
    inner = make(x, x.dtype)
    return None if inner is None else _PostNormFormula(inner, only, drop, gamma)


def norm_in(norm: nn.Module) -> LayerNorm | None:
    """The `LayerNorm` that an `nn.Sequential` is made of, whose own call nobody would miss."""
    if type(norm) is not nn.Sequential or len(norm) != 1 or not are_unwatched((norm,)):
        return None
    (only,) = norm
    return only if isinstance(only, LayerNorm) and only.bias is not None else None


class Branch(Formula):
    """A branch around the formula of its layer. Its inputs are x, then the `scales`: what maps are
    multiplied by that is no weight of a product, each in its own dtype."""

    def __init__(
        self,
        inner: Formula,
        norm: LayerNorm,
        drop: nn.Module,
        scales: tuple[Tensor, ...],
    ) -> None:
        wide = (*inner.wide, *[scale.dtype for scale in scales])
        super().__init__(inner.parameters, inner.dtype, wide)
        self.inner, self.norm, self.drop, self.scales = inner, norm, drop, scales
        self.kept: Tensor | None = None
        """What `drop` multiplies by, [B, 1, 1, 1]; None where it drops nothing."""
        self.of_norm = 0
        """How many tensors the norm's backward needs that its forward made."""

    def call(self, x: Tensor) -> Tensor:
        inputs = (layer_norm.seen(x), *self.scales)
        y = self.run(inputs, inputs)
        return y if inputs[0] is x else y.view(x.shape)

    def _of_layer(self, x: Tensor, weights: Weights) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What the layer's formula makes of x, of x's shape."""
        y, kept = self.inner.forward((x,), weights)
        return y if y.dim() == x.dim() else y.view(x.shape), kept

    @property
    def rate(self) -> float:
        """Of the images that are dropped."""
        return getattr(self.drop, "drop_prob", 0.0) if self.drop.training else 0.0

    def _drawn(self, x: Tensor) -> Tensor | None:
        """As timm draws it."""
        drop, rate = self.drop, self.rate
        if rate == 0.0:
            return None
        kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - rate)
        return kept.div_(1 - rate) if rate < 1 and drop.scale_by_keep else kept


def _added(x: Tensor, y: Tensor, factor: Tensor | None) -> Tensor:
    return x + y if factor is None else torch.addcmul(x, y, factor)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


class _PreNormFormula(Branch):
    """x + drop(layer(norm(x))·gamma).

    The norm's parameters are the first, then those of the layer's products.
    """

    def __init__(
        self, inner: Formula, norm: LayerNorm, drop: nn.Module, gamma: Tensor | None
    ) -> None:
        super().__init__(inner, norm, drop, () if gamma is None else (gamma,))

    def compiled_weights(self, many: Sequence[Parameters]) -> list[Weights]:
        """With gradients, the norm's weight and bias are multiplied into the product that reads it,
        unless two do: their gradients are then sums over its weights, not over maps."""
        shapes = self.parameters.shapes
        if not (len(shapes) == 3 and shapes[1][1] and torch.is_grad_enabled()):
            return super().compiled_weights(many)
        stacks = [torch.stack(alike) for alike in zip(*[one.tensors for one in many], strict=True)]
        count, read = len(self.parameters.modules), len(self.parameters.rows[1])
        (scale, *weights), (shift, *biases) = stacks[:count], stacks[count:]
        weight, bias = _concatenated(weights[:read], -2), _concatenated(biases[:read], -1)
        bias = bias + (weight * shift.unsqueeze(-2)).sum(-1)
        first = (weight * scale.unsqueeze(-2)).to(self.dtype), bias.to(self.dtype)
        last = weights[-1].to(self.dtype)
        after: Any = biases[read].to(self.dtype) if biases[read:] else [None] * len(many)
        of_norm: Any = None
        return [
            [(of_norm, None), (left, behind), (second, shifted)]
            for left, behind, second, shifted in zip(*first, last, after, strict=True)
        ]

    def composed(self, inputs: Sequence[Tensor], call: Call) -> Tensor:
        x, *gamma = inputs
        return _added(x, self.inner.composed((call(self.norm, x),), call), self._factor(x, gamma))

    def _factor(self, x: Tensor, gamma: Sequence[Tensor]) -> Tensor | None:
        """What the layer's output is multiplied by."""
        return _times(gamma[0].to(x.dtype), self.kept) if gamma else self.kept

    def forward(
        self, inputs: Sequence[Tensor], weights: Weights
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (x, *gamma), (weight, bias) = inputs, weights[0]
        normed, own = layer_norm.forward(x, weight, bias, self.norm.eps)
        self.of_norm = len(own)
        y, inner = self._of_layer(normed, weights[1:])
        self.kept = self._drawn(x)
        read = (y,) if gamma else ()
        return _added(x, y, self._factor(x, gamma)), (*read, normed, *own, *inner)

    def infer(self, inputs: Sequence[Tensor], weights: Weights) -> Tensor:
        x, *gamma = inputs
        if not gamma and self.rate == 0.0 and isinstance(self.inner, MlpFormula):
            whole = self.inner.residual(x, self.norm.eps, weights)
            if whole is not None:
                return whole
        return super().infer(inputs, weights)

    def backward(
        self,
        grad: Tensor,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        kept: Kept,
        sums: Sums | None,
        needed: Sequence[bool],
    ) -> tuple[Sequence[Tensor | None], Weights]:
        x, *gamma = inputs
        factor, of_gamma = self._factor(x, gamma), []
        if gamma:
            y = _times(kept.pop(0), self.kept)
            of_gamma = [(grad * y).sum((0, 1, 2), dtype=sum_dtype(y.dtype)).to(gamma[0].dtype)]
            del y
        if sums is None and not needed[0]:
            return (None, *of_gamma), []
        normed, *own = kept[: 1 + self.of_norm]
        del kept[: 1 + self.of_norm]
        after = None if sums is None else sums.after(1)
        grad_y = _times(grad, factor)
        grad_normed: Any
        (grad_normed,), made = self.inner.backward(
            grad_y, (normed,), weights[1:], kept, after, (True,)
        )
        del normed, grad_y
        wanted = needed[0], sums is not None
        grad_x, grad_weight, grad_bias = layer_norm.backward(
            grad_normed, x, weights[0], self.norm.eps, own, grad, wanted
        )
        if sums is not None:
            made = [(grad_weight.to(sums.dtype), grad_bias.to(sums.dtype)), *made]
        return (grad_x, *of_gamma), made


class _PostNormFormula(Branch):
    """x + drop(norm(layer(x))·gamma).

    The norm's weight and bias are scales, too: gamma, with which they are multiplied, could be too
    small for a half.
    """

    def __init__(
        self, inner: Formula, norm: LayerNorm, drop: nn.Module, gamma: Tensor | None
    ) -> None:
        scales = (norm.weight, norm.bias)
        super().__init__(inner, norm, drop, scales if gamma is None else (*scales, gamma))

    def composed(self, inputs: Sequence[Tensor], call: Call) -> Tensor:
        x, *scales = inputs
        y = self.inner.composed((x,), call)
        weight, bias = (t.to(y.dtype) for t in layer_norm.scaled(*scales))
        y = F.layer_norm(y, y.shape[-1:], weight, bias, self.norm.eps)
        return _added(x, y, self.kept)

    def forward(
        self, inputs: Sequence[Tensor], weights: Weights
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, *scales = inputs
        y, inner = self._of_layer(x, weights)
        weight, bias = layer_norm.scaled(*scales)
        normed, own = layer_norm.forward(y, weight, bias, self.norm.eps)
        self.of_norm = len(own)
        self.kept = self._drawn(x)
        return _added(x, normed, self.kept), (y, weight, *own, *inner)

    def backward(
        self,
        grad: Tensor,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        kept: Kept,
        sums: Sums | None,
        needed: Sequence[bool],
    ) -> tuple[Sequence[Tensor | None], Weights]:
        x, *scales = inputs
        y, weight, *own = kept[: 2 + self.of_norm]
        del kept[: 2 + self.of_norm]
        through, wanted = sums is not None or needed[0], any(needed[1 : len(inputs)])
        grad_y: Any
        grad_y, *of_norm = layer_norm.backward(
            _times(grad, self.kept),
            *(y, weight, self.norm.eps, own, None, (through, wanted)),
        )
        del y, own
        of_scales = _scales_gradients(of_norm, scales) if wanted else [None] * len(scales)
        if not through:
            return (None, *of_scales), []
        (grad_x,), made = self.inner.backward(grad_y, (x,), weights, kept, sums, (needed[0],))
        return (None if grad_x is None else grad_x + grad, *of_scales), made


def _scales_gradients(found: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of weight, bias and gamma, from those of the first two times gamma."""
    grads = list(found)
    if scales[2:]:
        weight, bias, gamma = scales
        of_gamma = torch.addcmul(grads[0] * weight, grads[1], bias)
        grads = [grads[0] * gamma, grads[1] * gamma, of_gamma]
    return [grad.to(scale.dtype) for grad, scale in zip(grads, scales, strict=True)]


def _concatenated(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat`, but of one tensor itself."""
    return torch.cat(list(tensors), dim) if tensors[1:] else tensors[0]
