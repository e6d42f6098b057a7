"""Who looks at a call beside autograd and a backend: tracers, compilers, transforms, profilers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any, NoReturn, TypeVar

import torch
from torch import _C, Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.nn import Module, Parameter

T = TypeVar("T")
_compiler = getattr(torch, "compiler", None)
# True where PyTorch has no such function: what it traces cannot be told from what it runs, and what
# it compiles cannot be told from what it exports.
is_compiling = getattr(_compiler, "is_dynamo_compiling", lambda: True)
"""Whether TorchDynamo traces a call."""
is_profiling = torch.autograd._profiler_enabled  # type: ignore[attr-defined]
"""Whether a profiler of PyTorch's is on."""
_exports = getattr(_compiler, "is_exporting", lambda: True)
_is_subclass_like = _C._dispatch_isTensorSubclassLike


def is_plain(call: Sequence[Any], inputs: Iterable[int]) -> bool:
    """Whether nothing but autograd, autocast and a backend is interested in a call."""
    return not has_interested(call, inputs) and not is_profiling()


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
    if _is_exporting() or is_transformed():
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


def is_transformed() -> bool:
    """Whether a `torch.func` transform or forward mode wants the operations of a call."""
    return _C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_exporting() -> bool:
    """Whether what is traced is a program that somebody will read."""
    return bool(_exports())


def is_vmap() -> bool:
    """Whether the innermost transform is a vmap, in which autocast does not reach projections."""
    innermost = _functorch.peek_interpreter_stack()
    return innermost is not None and innermost.key() == _functorch.TransformType.Vmap


# The answers are constants of a graph. The tracer of torch 2.4 cannot ask for most itself, and that
# of torch 2.11 believes that it always exports.
for _function in (is_traced_by_jit, is_portable, _is_exporting, is_transformed, is_vmap):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]


# What a trace can follow.


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


# Recording by `torch.fx` and `torch.jit`.


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


def refuse_scripting(layer: Module) -> NoReturn:
    """A layer's `__prepare_scriptable__`: `torch.jit.script` calls it before it compiles the layer
    or a model around it."""
    raise TypeError(
        f"torch.jit.script must be given no {type(layer).__name__}, whose Python it cannot "
        "compile; torch.jit.trace(model, inputs) records the model"
    )
