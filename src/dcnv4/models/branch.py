"""A residual branch of a block, as one node of autograd where nobody can tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..eager import autocast_dtype, may_read_past
from ..layers.base import are_unwatched, known
from ..layers.projections import Call, Formula, Sums, Weights, concatenated
from . import norm as layer_norm
from .norm import LayerNorm

__all__: list[str] = []  # a part of models

for _kind in (nn.Sequential, nn.Identity, DropPath):
    known(_kind)


def formula(x: Tensor, norm: nn.Module, layer: nn.Module, drop: nn.Module | None) -> Formula | None:
    """x + drop(layer(norm(x))) as one node of autograd; None where it has to be composed.

    Args:
        x: [B, H, W, C].
        norm: an `nn.Sequential` of a `LayerNorm` alone, or one that is called always.
        layer: a `Part`, or one that is composed always.
        drop: a `DropPath`, or an `nn.Identity`; None: of the layer alone, in whatever branch with
            that norm, for which x stands for what the layer reads.
    """
    make = getattr(layer, "_part", None)
    if make is None or not may_read_past(x) or x.dtype is not autocast_dtype(x):
        return None
    if type(norm) is not nn.Sequential or len(norm) != 1:
        return None
    (only,) = norm
    if not isinstance(only, LayerNorm) or only.bias is None:
        return None
    if drop is None:
        alone: Formula | None = make(x, x.dtype) if are_unwatched((norm, only, layer)) else None
        return alone
    if not are_unwatched((norm, layer, drop)):
        return None
    inner: Formula | None = make(x, x.dtype, (only,))
    return None if inner is None else _BranchFormula(inner, only, drop)


class _BranchFormula(Formula):
    """The norm's parameters are the first, then those of the layer's products."""

    def __init__(self, inner: Formula, norm: LayerNorm, drop: nn.Module) -> None:
        super().__init__(inner.parameters, inner.dtype, inner.wide)
        self.inner, self.norm, self.drop = inner, norm, drop
        self.kept: Tensor | None = None
        """What `drop` multiplies by, [B, 1, 1, 1]; None where it drops nothing."""
        self.of_norm = 0
        """How many tensors the norm's backward needs that its forward made."""

    def is_folding(self) -> bool:
        """With gradients, the norm's weight and bias are multiplied into the product that reads it,
        unless two do: their gradients are then sums over its weights, not over maps."""
        shapes = self.parameters.shapes
        return len(shapes) == 3 and shapes[1][1] and torch.is_grad_enabled()

    def compiled_weights(self, tensors: Sequence[Tensor]) -> Weights:
        if not self.is_folding():
            return super().compiled_weights(tensors)
        count, read = len(self.parameters.modules), len(self.parameters.rows[1])
        (scale, *weights), (shift, *biases) = tensors[:count], tensors[count:]
        weight, bias = concatenated(weights[:read], -2), concatenated(biases[:read], -1)
        bias = bias + (weight * shift.unsqueeze(-2)).sum(-1)
        second = biases[read].to(self.dtype) if biases[read:] else None
        of_norm: Any = None
        return [
            (of_norm, None),
            ((weight * scale.unsqueeze(-2)).to(self.dtype), bias.to(self.dtype)),
            (weights[-1].to(self.dtype), second),
        ]

    def _added(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self.kept is None else torch.addcmul(x, y, self.kept)

    def composed(self, inputs: Sequence[Tensor], call: Call) -> Tensor:
        (x,) = inputs
        return self._added(x, self.inner.composed((call(self.norm, x),), call))

    def forward(
        self, inputs: Sequence[Tensor], weights: Weights
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (x,), (weight, bias) = inputs, weights[0]
        normed, own = layer_norm.forward(x, weight, bias, self.norm.eps)
        self.of_norm = len(own)
        y, inner = self.inner.forward((normed,), weights[1:])
        self.kept = self._drawn(x)
        return self._added(x, y), (normed, *own, *inner)

    def backward(
        self,
        grad: Tensor,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        kept: list[Tensor],
        sums: Sums | None,
        needed: Sequence[bool],
    ) -> tuple[Sequence[Tensor | None], Weights]:
        normed, *own = kept[: 1 + self.of_norm]
        del kept[: 1 + self.of_norm]
        after = None if sums is None else sums.after(1)
        grad_y = grad if self.kept is None else grad * self.kept
        grad_normed: Any
        (grad_normed,), made = self.inner.backward(
            grad_y, (normed,), weights[1:], kept, after, (True,)
        )
        del normed, grad_y
        wanted = needed[0], sums is not None
        grad_x, grad_weight, grad_bias = layer_norm.backward(
            grad_normed, inputs[0], weights[0], self.norm.eps, own, grad, wanted
        )
        if sums is not None:
            made = [(grad_weight.to(sums.dtype), grad_bias.to(sums.dtype)), *made]
        return (grad_x,), made

    def _drawn(self, x: Tensor) -> Tensor | None:
        """As timm draws it."""
        drop = self.drop
        if not drop.training or (rate := getattr(drop, "drop_prob", 0.0)) == 0.0:
            return None
        kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - rate)
        return kept.div_(1 - rate) if rate < 1 and drop.scale_by_keep else kept
