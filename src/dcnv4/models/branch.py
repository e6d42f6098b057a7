"""A residual branch of a block, as one node of autograd where nobody can tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from ..eager import autocast_dtype, is_autocast, may_read_past
from ..layers.base import are_unwatched, known
from ..layers.projections import Call, Formula, Sums, Weights

__all__: list[str] = []  # a part of models

for _kind in (nn.Sequential, nn.Identity, DropPath):
    known(_kind)


@known
class LayerNorm(nn.LayerNorm):
    """Normalised over C in the dtype of the products around it, with float32 statistics.

    Autocast alone would make, and keep for the backward pass, a float32 map of every one.
    """

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """[..., C] from [..., C], times `scale` [C] where there is one."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if scale is not None:  # of C numbers, not of the map
            weight, bias = weight * scale, bias * scale
        if not is_autocast(device := x.device.type):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        dtype = autocast_dtype(x)
        with torch.autocast(device, enabled=False):
            return F.layer_norm(
                x.to(dtype), self.normalized_shape, weight.to(dtype), bias.to(dtype), self.eps
            )


def formula(x: Tensor, norm: nn.Module, layer: nn.Module, drop: nn.Module) -> Formula | None:
    """x + drop(layer(norm(x))) as one node of autograd; None where it has to be composed.

    Args:
        x: [B, H, W, C].
        norm: an `nn.Sequential` of a `LayerNorm` alone, or one that is called always.
        layer: a `Part`, or one that is composed always.
        drop: a `DropPath`, or an `nn.Identity`.
    """
    make = getattr(layer, "_part", None)
    if make is None or not may_read_past(x) or x.dtype is not autocast_dtype(x):
        return None
    if not are_unwatched((norm, layer, drop)) or type(norm) is not nn.Sequential or len(norm) != 1:
        return None
    layer_norm = norm[0]
    if not isinstance(layer_norm, LayerNorm) or layer_norm.bias is None:
        return None
    inner: Formula | None = make(x, x.dtype, (layer_norm,))
    return None if inner is None else _BranchFormula(inner, layer_norm, drop)


class _BranchFormula(Formula):
    """The norm's parameters are the first, then those of the layer's products."""

    def __init__(self, inner: Formula, norm: LayerNorm, drop: nn.Module) -> None:
        super().__init__(inner.parameters, inner.dtype, inner.wide)
        self.inner, self.norm, self.drop = inner, norm, drop
        self.kept: Tensor | None = None
        """What `drop` multiplies by, [B, 1, 1, 1]; None where it drops nothing."""

    def _compiled_weights(self) -> Weights:
        """With gradients, the norm's weight and bias are multiplied into the product that reads it,
        unless two do: their gradients are then sums over its weights, not over maps."""
        parameters, count = self.parameters, len(self.parameters.modules)
        biased = parameters.shapes[1][1]
        if len(parameters.rows) != 3 or not biased or not torch.is_grad_enabled():
            return super()._compiled_weights()
        weights, biases = parameters.tensors[:count], parameters.tensors[count:]
        (scale, *read, second), (shift, *biases) = weights, biases
        weight, bias = torch.cat(read), torch.cat(biases[: len(read)])
        first = weight * scale, bias + (weight * shift).sum(1)
        tensors = [tensor.to(self.dtype) for tensor in (*first, second, *biases[len(read) :])]
        of_norm: Any = None
        return [
            (of_norm, None),
            (tensors[0], tensors[1]),
            (tensors[2], tensors[3] if tensors[3:] else None),
        ]

    def _added(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self.kept is None else torch.addcmul(x, y, self.kept)

    def composed(self, inputs: Sequence[Tensor], call: Call) -> Tensor:
        (x,) = inputs
        return self._added(x, self.inner.composed((call(self.norm, x),), call))

    def forward(
        self, inputs: Sequence[Tensor], weights: Weights
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (x,), norm = inputs, self.norm
        weight, bias = weights[0]
        normed, mean, rstd = torch.native_layer_norm(
            x, norm.normalized_shape, weight, bias, norm.eps
        )
        y, inner = self.inner.forward((normed,), weights[1:])
        self.kept = self._drawn(x)
        return self._added(x, y), (normed, mean, rstd, *inner)

    def backward(
        self,
        grad: Tensor,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        kept: list[Tensor],
        sums: Sums | None,
        needed: Sequence[bool],
    ) -> tuple[Sequence[Tensor | None], Weights]:
        normed, mean, rstd = kept[:3]
        del kept[:3]
        after = None if sums is None else sums.after(1)
        grad_y = grad if self.kept is None else grad * self.kept
        (grad_normed,), made = self.inner.backward(
            grad_y, (normed,), weights[1:], kept, after, (True,)
        )
        del normed, grad_y
        weight = weights[0]
        grad_x, *own = torch.ops.aten.native_layer_norm_backward(
            *(grad_normed, inputs[0], self.norm.normalized_shape, mean, rstd),
            *(weight, weight),  # of the bias it asks alone whether there is one
            [needed[0], sums is not None, sums is not None],
        )
        if sums is not None:
            made = [(own[0].to(sums.dtype), own[1].to(sums.dtype)), *made]
        return (grad_x.add_(grad) if needed[0] else None,), made

    def _drawn(self, x: Tensor) -> Tensor | None:
        """As timm draws it."""
        drop = self.drop
        if not drop.training or (rate := getattr(drop, "drop_prob", 0.0)) == 0.0:
            return None
        kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - rate)
        return kept.div_(1 - rate) if rate < 1 and drop.scale_by_keep else kept
