"""The short way of an ordinary call: past PyTorch's dispatcher, to autograd and the backend.

The dispatcher serves tracing, profilers, tensor subclasses, modes and transforms. A call that none
of them is interested in does by hand what is left: autocast, autograd, the backend. Of a call on a
4 x 4 map that saves 9 µs of 17, and with its backward 13 of 61 (PyTorch 2.13, one core of a CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import _C, Tensor

from .autocast import AUTOCAST_KEYS, is_autocast, is_autocast_anywhere, without_autocast
from .tracing import is_compiling, is_plain, is_portable, is_profiling, is_transformed

T = TypeVar("T")


class Recorded(Protocol):
    """What autograd needs of `ops.Operator`, which says what each is."""

    @property
    def inputs(self) -> tuple[int, ...]: ...

    def forward(self, *call: Any) -> Tensor: ...

    def backward(self, grad: Tensor, *call: Any) -> tuple[Tensor | None, ...]: ...

    def dispatch_backward(self, grad: Tensor, *call: Any) -> tuple[Tensor, ...]: ...


class Operator(Recorded, Protocol):
    """What else is known here of it."""

    def differentiable(self, *call: Any) -> Tensor: ...

    def under_autocast(self, device: str, *call: Any) -> tuple[Operator, list[Any]]: ...

    def dispatch(self, *call: Any) -> Tensor: ...


def run(operator: Operator, *call: Any) -> Tensor:
    """What the call returns, by the shortest way that everybody interested in it allows."""
    inputs = operator.inputs
    if is_plain(call, inputs):
        if not is_autocast_anywhere() or not is_autocast(device := call[1].device.type):
            return run_plain(operator, inputs, call)
        if device in AUTOCAST_KEYS:
            operator, exact = operator.under_autocast(device, *call)
            return without_autocast(device, run_plain, operator, operator.inputs, exact)
    elif is_transformed() or is_portable():
        device = call[1].device.type
        if not is_autocast(device):
            return operator.differentiable(*call)
        operator, exact = operator.under_autocast(device, *call)
        with torch.autocast(device, enabled=False):
            return operator.differentiable(*exact)
    return operator.dispatch(*call)


def run_plain(operator: Recorded, inputs: tuple[int, ...], call: Sequence[Any]) -> Tensor:
    """What a call returns that nobody but autograd is interested in."""
    if needs_grad(call, inputs):
        output: Tensor = _apply(operator, operator.forward, *call)
        return output
    return operator.forward(*call)


def needs_grad(call: Sequence[Any], inputs: Iterable[int]) -> bool:
    if torch.is_grad_enabled():
        for i in inputs:
            if call[i].requires_grad:
                return True
    return False


def compute(operator: Operator, *call: Any) -> Tensor:
    """What the backend makes of a call, below autograd; profilers and compilers are told of it."""
    told = is_compiling() or is_profiling()
    return operator.dispatch(*call) if told else operator.forward(*call)


def compute_backward(
    operator: Operator, grad: Tensor, *call: Any, **memory: Any
) -> tuple[Any, ...]:
    """The gradients of a call's inputs, as `compute`; `memory` is what `backward` alone is told of
    where they may lie."""
    if is_profiling():
        return operator.dispatch_backward(grad, *call)
    return operator.backward(grad, *call, **memory)


class Differentiable(torch.autograd.Function):
    """What autograd records of a call that `forward` computes."""

    @staticmethod
    def forward(ctx: Any, operator: Recorded, forward: Callable[..., Tensor], *call: Any) -> Tensor:
        ctx.operator, ctx.dispatched = operator, forward != operator.forward
        ctx.save_for_backward(*[a if isinstance(a, Tensor) else None for a in call])
        ctx.call = [None if isinstance(a, Tensor) else a for a in call]
        return forward(*call)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operator = ctx.operator
        inputs = operator.inputs
        saved = zip(ctx.saved_tensors, ctx.call, strict=True)
        call = [other if tensor is None else tensor for tensor, other in saved]
        told = ctx.dispatched or not is_plain((*call, grad), (*inputs, -1))
        if told or torch.is_grad_enabled() or is_autocast_anywhere():
            results = operator.dispatch_backward(grad, *call)
        else:
            results = operator.backward(grad, *call)
        grads: list[Tensor | None] = [None] * (2 + len(call))
        for i, result in zip(inputs, results, strict=True):
            grads[2 + i] = result
        return tuple(grads)


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Its `apply` without what that does for `torch.func`, whose transforms are no plain call."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


_apply = plain_apply(Differentiable)


def below_autograd(function: Callable[..., T], *arguments: Any) -> T:
    """What `function` makes of the arguments, autograd not looking."""
    guard = _C._AutoDispatchBelowAutograd()
    try:
        return function(*arguments)
    finally:
        del guard  # which an exception's frames would keep, and autograd off with it


def below(device: str, function: Callable[..., T], *arguments: Any) -> T:
    """What `function` makes of the arguments, neither autograd nor autocast looking."""
    if is_autocast_anywhere() and is_autocast(device):
        made: T = without_autocast(device, below_autograd, function, *arguments)
        return made
    return below_autograd(function, *arguments)
