"""Layer normalisation in the dtype of the products around it.

PyTorch's CUDA kernels give every pixel a block of threads, which takes ten times as long as to read
and write the narrow maps of a first level; where the CUDA backend computes layers, its own do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ..autocast import autocast_dtype, is_autocast
from ..backends import choose, cuda
from ..eager import run_plain
from ..layers.base import known
from ..tracing import as_leaf, has_interested, is_compiling, may_read_past

__all__: list[str] = []  # a part of models


@known
class LayerNorm(nn.LayerNorm):
    """Normalised over C in the dtype of the products around it, with float32 statistics.

    Autocast alone would make, and keep for the backward pass, a float32 map of every one.
    """

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """[..., C] from [..., C], times `scale` [C] where there is one."""
        if isinstance(x, Proxy):
            return as_leaf(LayerNorm, self, x, scale)
        weight, bias = scaled(self.weight, self.bias, scale)
        x = x.to(autocast_dtype(x))
        shape, eps = self.normalized_shape, self.eps
        interested = has_interested((x, weight, bias), range(3))  # also where one is None
        if not interested and _has_kernels(x, weight, bias):
            return run_plain(_KERNELS, _KERNELS.inputs, (eps, x, weight, bias))
        rows = seen(x)
        if not is_autocast(device := x.device.type):
            y = F.layer_norm(rows, shape, weight, bias, eps)
        else:
            with torch.autocast(device, enabled=False):
                y = F.layer_norm(rows, shape, weight.to(x.dtype), bias.to(x.dtype), eps)
        return y if rows is x else y.view(x.shape)


def seen(x: Tensor) -> Tensor:
    """Maps [B, H, W, C] as TorchInductor shall see them, [B, H·W, C]: those of four dimensions get
    the strides that would be a convolution's wish for [B, C, H, W]."""
    return x.flatten(1, 2) if x.dim() == 4 and is_compiling() and may_read_past(x) else x


def scaled(weight: Tensor, bias: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm times `scale`: products of C numbers, not of the map."""
    return (weight, bias) if scale is None else (weight * scale, bias * scale)


def forward(x: Tensor, weight: Any, bias: Any, eps: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The normalised x [..., C], and what the backward needs beside x and the weight; below
    autograd, where nobody is interested but a compiler."""
    if not is_compiling() and _has_kernels(x, weight, bias):
        return cuda.norm_forward(x, weight, bias, eps), ()
    weight, bias = (t if t is None else t.to(x.dtype) for t in (weight, bias))
    y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    return y, (mean, rstd)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    kept: Sequence[Tensor],
    added: Tensor | None,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x, with what is `added`, and of weight and bias; `needed`: of x, and of the
    others."""
    if not kept:
        return cuda.norm_backward(grad, x, weight, eps, added)
    weight = weight.to(x.dtype)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        *(grad, x, x.shape[-1:], *kept),
        *(weight, weight),  # of the bias it asks alone whether there is one
        [needed[0], needed[1], needed[1]],
    )
    if added is not None and needed[0]:
        grad_x = grad_x.add_(added)
    return grad_x if needed[0] else None, grad_weight, grad_bias


def _has_kernels(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the CUDA backend normalises x."""
    return is_of_cuda(x.device, x.dtype) and cuda.normalizes(x, weight, bias)


def is_of_cuda(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the CUDA backend computes layers there."""
    try:
        return choose("deform_conv", device, dtype) == "cuda"
    except RuntimeError:  # of a backend that the environment asks for, which layers will report
        return False


class _Kernels:
    """As autograd records them. A call: eps, x [..., C], weight, bias."""

    inputs = 1, 2, 3

    def forward(self, eps: float, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return cuda.norm_forward(x, weight, bias, eps)

    def backward(
        self, grad: Tensor, eps: float, x: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_x, grad_weight, grad_bias = cuda.norm_backward(grad, x, weight, eps)
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)

    def dispatch_backward(self, grad: Tensor, *call: Any) -> tuple[Tensor, ...]:
        """By PyTorch's operations where somebody wants to see or to differentiate them."""
        create, (eps, *inputs) = torch.is_grad_enabled(), call
        if not create and not has_interested((*inputs, grad), range(4)):
            return self.backward(grad, *call)
        x, weight, bias = (t if t.requires_grad else t.detach().requires_grad_() for t in inputs)
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            y = F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)
            return torch.autograd.grad(y, (x, weight, bias), grad, create_graph=create)


_KERNELS = _Kernels()
