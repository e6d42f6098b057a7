"""The short way of an ordinary call: past PyTorch's dispatcher, to autograd and the backend.

The dispatcher serves tracing, profilers, tensor subclasses, modes and transforms. A call that none
of them is interested in does by hand what is left: autocast, autograd, the backend. Of a call on a
4 x 4 map that saves 9 µs of 17, and with its backward 13 of 61 (PyTorch 2.13, one core of a CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from functools import cache, lru_cache, wraps
from typing import Any, Protocol, TypeVar

import torch
from torch import _C, Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.nn import Module, Parameter

from .geometry import sum_dtype

T = TypeVar("T")
_compiler = getattr(torch, "compiler", None)
# True where PyTorch has no such function: what it traces cannot be told from what it runs, and what
# it compiles cannot be told from what it exports.
is_compiling = getattr(_compiler, "is_dynamo_compiling", lambda: True)
"""Whether TorchDynamo traces a call."""
_exports = getattr(_compiler, "is_exporting", lambda: True)
_is_subclass_like = _C._dispatch_isTensorSubclassLike
_is_profiling = torch.autograd._profiler_enabled  # type: ignore[attr-defined]
_HAS_AUTOCAST_BY_DEVICE = hasattr(torch, "get_autocast_dtype")
AUTOCAST_KEYS = {
    device: key
    for device in ("cpu", "cuda", "mps", "xpu")
    if (key := getattr(_C.DispatchKey, f"Autocast{device.upper()}", None)) is not None
}


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
        if not _is_autocast_anywhere() or not is_autocast(device := call[1].device.type):
            return run_plain(operator, inputs, call)
        if device in AUTOCAST_KEYS:
            operator, exact = operator.under_autocast(device, *call)
            return without_autocast(device, run_plain, operator, operator.inputs, exact)
    elif _is_transformed() or is_portable():
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
        output: Tensor = _apply(operator, operator.forward, *call)  # type: ignore[no-untyped-call]
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
    told = is_compiling() or _is_profiling()
    return operator.dispatch(*call) if told else operator.forward(*call)


def compute_backward(operator: Operator, grad: Tensor, *call: Any) -> tuple[Any, ...]:
    """The gradients of a call's inputs, as `compute`."""
    return (
        operator.dispatch_backward(grad, *call)
        if _is_profiling()
        else operator.backward(grad, *call)
    )


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
        if told or torch.is_grad_enabled() or _is_autocast_anywhere():
            results = operator.dispatch_backward(grad, *call)
        else:
            results = operator.backward(grad, *call)
        grads: list[Tensor | None] = [None] * (2 + len(call))
        for i, result in zip(inputs, results, strict=True):
            grads[2 + i] = result
        return tuple(grads)


# `Function.apply` without what it does for `torch.func`, whose transforms are no plain call.
_apply = super(torch.autograd.Function, Differentiable).apply


# Who is interested in a call.


def is_plain(call: Sequence[Any], inputs: Iterable[int]) -> bool:
    """Whether nothing but autograd, autocast and a backend is interested in a call."""
    return not has_interested(call, inputs) and not _is_profiling()


def has_interested(call: Sequence[Any], inputs: Iterable[int]) -> bool:
    """Whether something is interested in a call that may change what it computes."""
    if is_compiling():
        return True
    for i in inputs:
        tensor = call[i]
        kind = type(tensor)
        if kind is not Tensor and kind is not Parameter:
            return True
        # It is no memory: on the meta device, of a transform, or left over by one.
        if _is_subclass_like(tensor):
            return True
        # Its memory is not its numbers, or is none.
        if tensor.is_neg() or tensor._is_zerotensor():
            return True
    return bool(
        _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._is_tracing()
        or _C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def may_read_past(*tensors: Tensor) -> bool:
    """Whether nobody could tell which calls on these make a layer's output: nobody is interested in
    them, or TorchDynamo alone is, and compiles a graph that nobody gets to see."""
    if not is_compiling():
        return not has_interested(tensors, range(len(tensors)))
    if _is_exporting() or _is_transformed():
        return False
    return all(type(tensor) in (Tensor, Parameter) for tensor in tensors)


def remembered(function: Callable[..., T]) -> Callable[..., T]:
    """A function that keeps what it returned; where TorchDynamo traces it, which would warn of what
    is kept, the function itself."""
    keeping = lru_cache(maxsize=256)(function)

    @wraps(function)
    def call(*arguments: Any) -> T:
        return function(*arguments) if is_compiling() else keeping(*arguments)

    return call


def is_traced(tensor: Tensor) -> bool:
    """Whether `tensor` may lack a value to read or to keep: it is fake, a graph is being traced, or
    a `torch.func` transform runs."""
    if _compiler is not None and _compiler.is_compiling():
        return True
    if type(tensor) is not Tensor or _C._get_tracing_state() is not None:
        return True
    return bool(_C._are_functorch_transforms_active())


def is_traced_by_jit() -> bool:
    """Whether a TorchScript trace is made, in which the sizes of a tensor are tensors."""
    return _C._is_tracing()


portable: ContextVar[bool] = ContextVar("portable", default=False)
"""Whether `export.portable` is on."""


def is_portable() -> bool:
    """Whether what is traced must hold PyTorch's own operations alone: `export.portable` is on, or
    PyTorch's own exporter to ONNX asks."""
    return portable.get() or torch.onnx.is_in_onnx_export()


def traced_levels(spatial_shapes: Tensor | Sequence[Sequence[Any]]) -> Any:
    """Level sizes as a trace can follow them: where some are tensors, as one tensor [L, 2], since
    numbers would be constants of the graph."""
    if isinstance(spatial_shapes, Tensor):
        return spatial_shapes
    sizes = [size for pair in spatial_shapes for size in pair]
    if not any(isinstance(size, Tensor) for size in sizes):
        return spatial_shapes
    return torch.stack([torch.as_tensor(size) for size in sizes]).view(-1, 2)


def unflattened(tensor: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """`tensor.unflatten(dim, sizes)`, `dim` >= 0, with sizes that a trace can follow: those of what
    `unflatten` returns are constants to PyTorch's old exporter to ONNX."""
    return tensor.view(*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :])


def beside(constant: Tensor, tensor: Tensor) -> Tensor:
    """A constant as operations take it beside a tensor: where that is spread over processes, which
    is a `DTensor`, whole in each of them."""
    mesh = None if type(tensor) is Tensor else getattr(tensor, "device_mesh", None)
    if mesh is None or type(constant) is type(tensor):
        return constant
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(constant, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _is_transformed() -> bool:
    """Whether a `torch.func` transform or forward mode wants the operations of a call."""
    return _C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_exporting() -> bool:
    """Whether what is traced is a program that somebody will read."""
    return bool(_exports())


def _is_vmap() -> bool:
    """Whether the innermost transform is a vmap, in which autocast does not reach projections."""
    innermost = _functorch.peek_interpreter_stack()
    return innermost is not None and innermost.key() == _functorch.TransformType.Vmap


# The answers are constants of a graph. The tracer of torch 2.4 cannot ask for most itself, and that
# of torch 2.11 believes that it always exports.
for _function in (is_traced_by_jit, is_portable, _is_exporting, _is_transformed, _is_vmap):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]


# Recording by `torch.fx`.


def as_leaf(owner: type[Module], layer: Module, *arguments: Any, **named: Any) -> Any:
    """What `torch.fx` records of a layer's forward: a call of the layer, as of PyTorch's own.

    Args:
        owner: the class whose forward was called.
        layer: a part of the model that is traced.
        arguments, named: of the forward; the first is a `torch.fx.Proxy`.

    Raises:
        TypeError: the layer is the model itself, or has a `forward` around the owner's.
    """
    tracer = arguments[0].tracer
    if layer is getattr(tracer, "root", layer):
        raise TypeError(
            f"torch.fx must be given a model that {owner.__name__} is a part of; got the layer"
        )
    if type(layer).forward is not owner.forward or "forward" in vars(layer):
        raise TypeError(
            f"torch.fx must be told that {type(layer).__name__} is a leaf, whose forward is not "
            f"that of {owner.__name__}; got a call of both"
        )
    path = tracer.path_of_module(layer)
    hooks = layer._forward_hooks, layer._forward_pre_hooks
    if not any((*hooks, layer._backward_hooks, layer._backward_pre_hooks)):
        return tracer.create_proxy("call_module", path, arguments, named)
    # The tracer has called the hooks already, and recorded what they do.
    layer = tracer.create_proxy("get_attr", path, (), {})
    return tracer.create_proxy("call_method", "forward", (layer, *arguments), named)


# Autocast.


@cache
def _knows_autocast(device: str) -> bool:
    try:
        torch.is_autocast_enabled(device)
    except RuntimeError:
        return False
    return True


def _has_autocast(device: str) -> bool:
    """Whether this PyTorch knows autocast on this kind of device."""
    return _knows_autocast(device)


# Constant, so that a tracer need not look inside, where it would warn of the cache.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_autocast(device: str) -> bool:
    if _HAS_AUTOCAST_BY_DEVICE:
        return _has_autocast(device) and torch.is_autocast_enabled(device)
    return torch.is_autocast_cpu_enabled() if device == "cpu" else torch.is_autocast_enabled()


def _is_some_autocast() -> bool:
    return torch.is_autocast_cpu_enabled() or torch.is_autocast_enabled()


_is_autocast_anywhere = getattr(_C, "_is_any_autocast_enabled", _is_some_autocast)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that autocast, where it is on, makes of a tensor before a projection reads it."""
    if tensor.dtype == torch.float64 or not is_autocast(tensor.device.type) or _is_vmap():
        return tensor.dtype
    return dtype_of_autocast(tensor.device.type)


def dtype_of_autocast(device: str) -> torch.dtype:
    if _HAS_AUTOCAST_BY_DEVICE:
        return torch.get_autocast_dtype(device)
    return torch.get_autocast_cpu_dtype() if device == "cpu" else torch.get_autocast_gpu_dtype()


def as_autocast(call: Sequence[Any], device: str, inputs: tuple[int, ...]) -> list[Any]:
    """The value in autocast's dtype unless it is float64; coordinates as precise as they came."""
    replaced = list(call)
    first, *rest = inputs
    if call[first].dtype != torch.float64:
        replaced[first] = call[first].to(dtype_of_autocast(device))
    exact = exact_coordinates(replaced[first], *(call[i] for i in rest))
    for i, coordinate in zip(rest, exact, strict=True):
        replaced[i] = coordinate
    return replaced


def exact_coordinates(value: Tensor, *coordinates: Tensor) -> tuple[Tensor, ...]:
    """The coordinates in a dtype that backends take beside `value`, never rounded down.

    That is the value's own dtype, or float32 beside a half-precision value.
    """
    wide = sum_dtype(value.dtype)
    return tuple(c if c.dtype in (value.dtype, wide) else c.to(wide) for c in coordinates)


def without_autocast(device: str, function: Callable[..., T], *arguments: Any) -> T:
    """What `function` makes of the arguments, autocast being off. It must be on."""
    key = AUTOCAST_KEYS[device]
    _C._dispatch_tls_set_dispatch_key_excluded(key, True)
    try:
        return function(*arguments)
    finally:
        _C._dispatch_tls_set_dispatch_key_excluded(key, False)


def below_autograd(function: Callable[..., T], *arguments: Any) -> T:
    """What `function` makes of the arguments, autograd not looking."""
    guard = _C._AutoDispatchBelowAutograd()
    try:
        return function(*arguments)
    finally:
        del guard  # which an exception's frames would keep, and autograd off with it


def below(device: str, function: Callable[..., T], *arguments: Any) -> T:
    """What `function` makes of the arguments, neither autograd nor autocast looking."""
    if _is_autocast_anywhere() and is_autocast(device):
        made: T = without_autocast(device, below_autograd, function, *arguments)
        return made
    return below_autograd(function, *arguments)
