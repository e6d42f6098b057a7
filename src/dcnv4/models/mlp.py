"""The MLP of a block, as one node of autograd where nobody can tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from .. import ops
from ..autocast import autocast_dtype
from ..backends import cuda
from ..layers.base import known
from ..layers.projections import (
    Call,
    Formula,
    Parameters,
    Sums,
    Weights,
    are_computed_in,
    called,
    multiplied,
    prepared,
    read,
)
from ..tracing import as_leaf, is_compiling, may_read_past
from . import norm

__all__: list[str] = []  # a part of models


@known
class Mlp(nn.Module):
    """fc2(gelu(fc1(x))).

    Args:
        channels: C, of input and output.
        hidden: channels between.
        bias: whether `fc2` has one.
        made: device and dtype of the parameters.
    """

    def __init__(self, channels: int, hidden: int, bias: bool, made: dict[str, Any]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden, **made)
        self.fc2 = nn.Linear(hidden, channels, bias=bias, **made)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] from [..., C]."""
        if isinstance(x, Proxy):
            return as_leaf(Mlp, self, x)
        if may_read_past(x):
            cast = prepared(x, autocast_dtype(x))
            formula = self._part(cast, x.dtype)
            if formula is not None:
                return formula.run((x,), (cast,))
        return self.composed(x)

    def _part(self, x: Tensor, wide: torch.dtype, *before: tuple[nn.Module, ...]) -> Formula | None:
        """As a `Part`."""
        parameters = read(*before, (self.fc1,), (self.fc2,))
        if parameters is None or not are_computed_in(x.dtype, x.device.type, parameters):
            return None
        return MlpFormula(self, parameters, x.dtype, wide)

    def composed(self, x: Tensor, call: Call = called) -> Tensor:
        """The same by submodules, which `call` calls."""
        return call(self.fc2, F.gelu(call(self.fc1, x)))


class MlpFormula(Formula):
    """An `Mlp` that keeps the hidden map before its activation, and no other for the backward.

    That is 4 of the 8 times its input that PyTorch would keep.
    """

    def __init__(
        self, mlp: Mlp, parameters: Parameters, dtype: torch.dtype, wide: torch.dtype
    ) -> None:
        super().__init__(parameters, dtype, (wide,))
        self.mlp = mlp

    def composed(self, inputs: Sequence[Tensor], call: Call) -> Tensor:
        return self.mlp.composed(inputs[0], call)

    def forward(
        self, inputs: Sequence[Tensor], weights: Weights
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        hidden = F.linear(inputs[0], *weights[0])
        return F.linear(F.gelu(hidden), *weights[1]), (hidden,)

    def residual(self, x: Tensor, eps: float, weights: Weights) -> Tensor | None:
        """x plus this of x's norm, from the norm's weights and its own, by one kernel; None where
        there is none for it."""
        hidden = weights[1][0].shape[0]
        if not is_compiling():
            return cuda.mlp(x, eps, *weights) if _is_fused(x, hidden) else None
        if not _may_be_fused(x.shape[-1], hidden, x.dtype, x.device):
            return None
        flat = [tensor for product in weights for tensor in product]
        return mlp_branch(x.flatten(0, -2), eps, *flat).view(x.shape)

    def backward(
        self,
        grad: Tensor,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        kept: list[Tensor],
        sums: Sums | None,
        needed: Sequence[bool],
    ) -> tuple[Sequence[Tensor | None], Weights]:
        x, grad = (t.reshape(-1, t.shape[-1]) for t in (inputs[0], grad))
        hidden = kept.pop()
        hidden = hidden.view(-1, hidden.shape[-1])
        last = [] if sums is None else [sums.of(1, grad, F.gelu(hidden))]
        grad_hidden = torch.ops.aten.gelu_backward(torch.mm(grad, weights[1]), hidden)
        del hidden
        first = [] if sums is None else [sums.of(0, grad_hidden, x)]
        if not needed[0]:
            return (None,), first + last
        grad_x = multiplied(grad_hidden, weights[0], self.wide[0])
        return (grad_x.view(inputs[0].shape),), first + last


def _is_fused(x: Tensor, hidden: int) -> bool:
    """Whether one kernel makes the branch of these rows."""
    return norm.is_of_cuda(x.device, x.dtype) and cuda.fuses_mlp(x, hidden)


def _may_be_fused(channels: int, hidden: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether it makes that of some rows."""
    return norm.is_of_cuda(device, dtype) and cuda.may_fuse_mlp(channels, hidden, dtype, device)


_may_be_fused._dynamo_marked_constant = True  # type: ignore[attr-defined]


@ops.opaque(
    "Tensor x, float eps, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, "
    "Tensor fc1_bias, Tensor fc2_weight, Tensor? fc2_bias"
)
def mlp_branch(x: Tensor, eps: float, *flat: Any) -> Tensor:
    """x [rows, C] plus the MLP of its norm."""
    (weight, bias), first, second = flat[:2], flat[2:4], flat[4:]
    if _is_fused(x, first[0].shape[0]):
        return cuda.mlp(x, eps, (weight, bias), first, second)
    normed, _ = norm.forward(x, weight, bias, eps)
    return x + F.linear(F.gelu(F.linear(normed, *first)), *second)
