"""The Linears around an operator as few products, and a layer as one node of autograd.

What PyTorch records of a layer call by call costs the host a dozen nodes, and the device casts and
sums between them. Where nobody but autograd, autocast and a backend is interested in a call, and
nobody could tell that the submodules were not called, a layer is a `Formula` instead: Linears of
the same input are one product, all parameters are cast at once, and gradients are made in the dtype
that they are wanted in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..eager import autocast_dtype, below, has_interested, is_autocast, needs_grad
from .base import are_bare

Call = Callable[[nn.Module, Tensor], Tensor]
"""What calls a submodule."""

Weights = list[tuple[Tensor, "Tensor | None"]]
"""Weight and bias of each product."""

_flatten = torch._C._nn.flatten_dense_tensors
_unflatten = torch._C._nn.unflatten_dense_tensors
# PyTorch 2.8 has products of halves that come out in float32, on CUDA.
_WIDENS = hasattr(torch.ops.aten.mm, "dtype_out") and torch.version.hip is None


class Parameters(NamedTuple):
    """What is read of the submodules behind some products: all weights, then all biases."""

    modules: list[nn.Module]
    tensors: list[Tensor]
    products: tuple[tuple[tuple[int, ...], bool], ...]
    """The shape of each product's weight, and whether it has a bias."""

    def dtype(self) -> torch.dtype | None:
        """That of all of them, or None."""
        first = self.tensors[0].dtype
        return first if all(tensor.dtype is first for tensor in self.tensors) else None

    def join(self, flat: Tensor) -> Weights:
        """Weights and biases of the products in all parameters, one after another."""
        return [
            (flat.as_strided(*weight), None if bias is None else flat.as_strided(*bias))
            for weight, bias in _places(self.products)
        ]

    def caller(self, tensors: Sequence[Tensor]) -> Call:
        """How to call a submodule as if `tensors` were these, cast to the dtype of its input."""
        biases = iter(tensors[len(self.modules) :])
        held = {
            module: (weight, None if module.bias is None else next(biases))
            for module, weight in zip(self.modules, tensors, strict=False)
        }

        def call(module: nn.Module, x: Tensor) -> Tensor:
            cast = [None if t is None else t.to(x.dtype) for t in held[module]]
            if isinstance(module, nn.Conv2d):
                return module._conv_forward(x, *cast)  # type: ignore[arg-type]
            return F.linear(x, *cast)

        return call


def read(*products: Sequence[nn.Module | None]) -> Parameters | None:
    """What to read of submodules, those of a product together; None where one has to be called."""
    modules = [module for product in products for module in product]
    if not are_bare(modules):
        return None
    held = [module.__dict__["_parameters"] for module in modules]
    tensors = [one["weight"] for one in held]
    tensors += [one["bias"] for one in held if one["bias"] is not None]
    shapes, start = [], 0
    for product in products:
        first, *others = held[start : start + len(product)]
        start += len(product)
        shape, biased = first["weight"].shape, first["bias"] is not None
        for other in others:
            if other["weight"].shape[1:] != shape[1:] or (other["bias"] is None) is biased:
                return None
            shape = (shape[0] + other["weight"].shape[0], *shape[1:])
        shapes.append((tuple(shape), biased))
    return Parameters(modules, tensors, tuple(shapes))


def computed_dtype(x: Tensor, parameters: Parameters) -> torch.dtype | None:
    """The dtype that products of x and these are made in; None where PyTorch shall refuse them."""
    own, dtype = parameters.dtype(), autocast_dtype(x)
    if own is dtype:
        return dtype
    cast = is_autocast(x.device.type) and own is not None
    return dtype if cast and torch.float64 not in (own, dtype) else None


_Place = tuple[tuple[int, ...], tuple[int, ...], int]
"""Shape, strides and first element of a tensor in a flat one."""


@lru_cache(maxsize=256)
def _places(
    products: tuple[tuple[tuple[int, ...], bool], ...],
) -> tuple[tuple[_Place, _Place | None], ...]:
    weights, biases, start = [], [], 0
    for shape, _ in products:
        like = torch.empty(shape, device="meta")
        weights.append((shape, like.stride(), start))
        start += like.numel()
    for (rows, *_), biased in products:
        biases.append(((rows,), (1,), start) if biased else None)
        start += rows if biased else 0
    return tuple(zip(weights, biases, strict=True))


class Formula:
    """How a layer makes its output of tensors, by hand; `composed` says the same to autograd.

    Args:
        parameters: of its products, in the order in which `forward` gets their weights.
        dtype: that everything is computed in.
        wide: the dtypes that the gradients of its inputs are wanted in.
    """

    def __init__(
        self, parameters: Parameters, dtype: torch.dtype, wide: Sequence[torch.dtype]
    ) -> None:
        self.parameters, self.dtype, self.wide = parameters, dtype, wide

    def forward(
        self, inputs: Sequence[Tensor], weights: Weights
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and what the backward needs beside the inputs."""
        raise NotImplementedError

    def backward(
        self,
        grad: Tensor,
        inputs: Sequence[Tensor],
        kept: Sequence[Tensor],
        weights: Weights,
        needed: Sequence[bool],
        grad_weights: Weights | None,
    ) -> Sequence[Tensor | None]:
        """The gradients of the inputs that need one; those of the weights are written."""
        raise NotImplementedError

    def composed(self, inputs: Sequence[Tensor], call: Call) -> Tensor:
        """The output, by operations that autograd knows."""
        raise NotImplementedError

    def run(self, sources: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Tensor:
        """The output.

        Args:
            sources: what each input was made of, which the gradient is for; None for itself.
            inputs: of `dtype`, recorded by autograd as made of the sources.
        """
        tensors = (*inputs, *self.parameters.tensors)
        if needs_grad(tensors, range(len(tensors))):
            output: Tensor = _apply(self, *sources, *tensors)  # type: ignore[no-untyped-call]
            return output
        made: Tensor = below(inputs[0].device.type, self._forward, inputs)[0]
        return made

    def _forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        flat = self._joined(self.parameters.tensors)
        output, kept = self.forward(inputs, self.parameters.join(flat))
        return output, flat, kept

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        flat: Tensor = _flatten(list(tensors))
        return flat if flat.dtype is self.dtype else flat.to(self.dtype)

    def _backward(
        self,
        grad: Tensor,
        inputs: Sequence[Tensor],
        tensors: Sequence[Tensor],
        flat: Tensor | None,
        kept: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """Gradients of the inputs and of the parameters."""
        weights = self.parameters.join(self._joined(tensors) if flat is None else flat)
        sums, grad_weights = None, None
        if any(needed[len(inputs) :]):
            dtype = tensors[0].dtype if _WIDENS and grad.device.type == "cuda" else self.dtype
            sums = grad.new_empty(sum(tensor.numel() for tensor in tensors), dtype=dtype)
            grad_weights = self.parameters.join(sums)
        grads = self.backward(grad, inputs, kept, weights, needed, grad_weights)
        if sums is None:
            return grads, [None] * len(tensors)
        if sums.dtype is not tensors[0].dtype:
            sums = sums.to(tensors[0].dtype)
        found = _unflatten(sums, list(tensors))
        return grads, [g if n else None for g, n in zip(found, needed[len(inputs) :], strict=True)]

    def _differentiated(
        self, grad: Tensor, inputs: Sequence[Tensor], tensors: Sequence[Tensor], needed: Any
    ) -> list[Tensor | None]:
        """Gradients that can be differentiated, of the inputs and of the parameters."""
        every = [*inputs, *tensors]
        wanted = [tensor for tensor, needs in zip(every, needed, strict=True) if needs]
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            output = self.composed(inputs, self.parameters.caller(tensors))
            create = torch.is_grad_enabled()
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=create))
        return [next(found) if needs else None for needs in needed]


class _Node(torch.autograd.Function):
    """What autograd records of a formula."""

    @staticmethod
    def forward(ctx: Any, formula: Formula, *tensors: Tensor) -> Tensor:
        count = len(formula.wide)
        inputs = tensors[count : 2 * count]
        output, flat, kept = below(inputs[0].device.type, formula._forward, inputs)
        ctx.formula = formula
        # A copy in another dtype is kept, as autocast keeps it; others are made anew.
        cast = flat.dtype is not formula.parameters.tensors[0].dtype
        ctx.save_for_backward(*tensors[count:], flat if cast else None, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        formula: Formula = ctx.formula
        count, saved = len(formula.wide), ctx.saved_tensors
        behind = count + len(formula.parameters.tensors)
        inputs, tensors = saved[:count], saved[count:behind]
        needed = ctx.needs_input_grad[1 + count :]
        if torch.is_grad_enabled() or has_interested((grad,), (0,)):
            grads = formula._differentiated(grad, inputs, tensors, needed)
            return None, *[None] * count, *grads
        flat, *kept = saved[behind:]
        made, of_parameters = below(
            grad.device.type,
            formula._backward,
            *(grad, inputs, tensors, flat, kept, needed),
        )
        # To the source past what made the input of it, which would cast the gradient once more.
        through = ctx.needs_input_grad[1 : 1 + count]
        sources = [g if source else None for g, source in zip(made, through, strict=True)]
        own = [None if source else g for g, source in zip(made, through, strict=True)]
        return None, *sources, *own, *of_parameters


# `Function.apply` without what it does for `torch.func`, whose transforms are no plain call.
_apply = super(torch.autograd.Function, _Node).apply


# Products.


def backward_product(
    grad: Tensor, x: Tensor, grad_weight: Tensor, grad_bias: Tensor | None
) -> None:
    """Write the gradients of a product's weight and bias, from that of its rows `grad` [N, M]."""
    product(grad.t(), x, grad_weight.dtype, grad_weight)
    if grad_bias is not None:
        _sum_rows(grad, grad_bias)


def product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a·b in this dtype."""
    if a.dtype is dtype:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if _WIDENS and a.device.type == "cuda" and dtype is torch.float32:
        if out is None:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.mm(a, b, out_dtype=dtype, out=out)
    return torch.mm(a, b).to(dtype) if out is None else out.copy_(torch.mm(a, b))


def _sum_rows(grad: Tensor, out: Tensor) -> None:
    """Write the sums [M] over the rows of `grad` [N, M].

    PyTorch's sum of a tall, narrow matrix takes a GPU several times what a product with ones does.
    """
    exact = grad.dtype is not torch.float32 or torch.get_float32_matmul_precision() == "highest"
    if grad.device.type == "cpu" or not exact:
        torch.sum(grad, 0, out=out)
    else:
        product(grad.new_ones((1, grad.shape[0])), grad, out.dtype, out[None])
