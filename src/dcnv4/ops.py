"""The operators as PyTorch knows them: schemas, shapes, gradients, autocast.

A backend's name is an argument of every operator, so that a traced graph records the choice and
forward and backward cannot disagree. Nothing here checks a user's arguments: `functional` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial, update_wrapper
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead as _unwrap_if_dead
from torch.autograd import forward_ad

from .backends import Backend, choose, load, reference
from .geometry import Window

_Function = TypeVar("_Function", bound=Callable[..., Any])

_library = torch.library.Library("dcnv4", "DEF")

_WINDOW = (
    "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "float offset_scale, bool remove_center, bool softmax, str backend"
)
# The levels' sizes are numbers where the host knows them, a tensor where only the device does.
_ATTENTION = (
    "Tensor value, Tensor? spatial_shapes, SymInt[] level_sizes, Tensor locations, Tensor weights, "
    "bool softmax, str backend"
)
_HALVES = (torch.float16, torch.bfloat16)
_HAS_COMPILER = hasattr(torch, "compiler")
_HAS_AUTOCAST_BY_DEVICE = hasattr(torch, "get_autocast_dtype")
_HAS_AUTOCAST_ANYWHERE = hasattr(torch._C, "_is_any_autocast_enabled")
_AUTOCAST_KEYS = {
    device: key
    for device in ("cpu", "cuda", "mps", "xpu")
    if (key := getattr(torch._C.DispatchKey, f"Autocast{device.upper()}", None)) is not None
}


def exact_coordinates(value: Tensor, *coordinates: Tensor) -> tuple[Tensor, ...]:
    """The coordinates in a dtype that backends take beside `value`, never rounded down.

    That is the value's own dtype, or float32 beside a half-precision value.
    """
    wide = torch.float32 if value.dtype in _HALVES else value.dtype
    return tuple(c if c.dtype in (value.dtype, wide) else c.to(wide) for c in coordinates)


def must_be_deterministic(*inputs: Tensor) -> bool:
    """Whether a call's gradients are wanted and must have the same bits on every run."""
    if not torch.are_deterministic_algorithms_enabled():
        return False
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


# A call is a backend's name and the arguments that this backend takes; operators take them flat.


def unpack(settings: Sequence[Any]) -> tuple[Window, str]:
    """The window and the backend's name: what follows the tensors of `deform_conv`."""
    kernel_size, stride, padding, dilation, *rest, backend = settings
    pairs = tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation)
    return Window(*pairs, *rest), backend


def unpack_attention(
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_sizes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    softmax: bool,
    backend: str,
) -> tuple[tuple[Tensor, Any, Tensor, Tensor, bool], str]:
    """The arguments of `ms_deform_attn` as backends take them, and the backend's name."""
    pairs = list(zip(level_sizes[::2], level_sizes[1::2], strict=True))
    shapes = pairs if spatial_shapes is None else spatial_shapes
    return (value, shapes, locations, weights, softmax), backend


def _unflatten_conv(value: Tensor, offset_mask: Tensor, *settings: Any) -> tuple[Any, ...]:
    window, backend = unpack(settings)
    return backend, value, offset_mask, window


def _flatten_conv(
    backend: str, value: Tensor, offset_mask: Tensor, window: Window
) -> tuple[Any, ...]:
    return value, offset_mask, *window, backend


def _unflatten_attn(*flat: Any) -> tuple[Any, ...]:
    arguments, backend = unpack_attention(*flat)
    return backend, *arguments


def _flatten_attn(backend: str, value: Tensor, spatial_shapes: Any, *rest: Any) -> tuple[Any, ...]:
    if isinstance(spatial_shapes, Tensor):
        return value, spatial_shapes, [], *rest, backend
    return value, None, [size for pair in spatial_shapes for size in pair], *rest, backend


def _for_backward(op: str, value: Tensor, backend: str) -> tuple[Backend, bool]:
    """The backend, unless determinism was asked for after it was chosen, and it has none; and
    whether it is asked for."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    if deterministic:
        choose(op, value.device, value.dtype, True, backend)
    return load(backend), deterministic


def _conv(backend: str, value: Tensor, offset_mask: Tensor, window: Window) -> Tensor:
    return load(backend).conv_forward(
        value, offset_mask, window, torch.are_deterministic_algorithms_enabled()
    )


def _conv_meta(value: Tensor, offset_mask: Tensor, *settings: Any) -> Tensor:
    return value.new_empty((*offset_mask.shape[:3], value.shape[3]))


def _conv_backward(
    grad: Tensor, backend: str, value: Tensor, offset_mask: Tensor, window: Window
) -> tuple[Tensor, Tensor]:
    chosen, deterministic = _for_backward("deform_conv", value, backend)
    return chosen.conv_backward(grad, value, offset_mask, window, deterministic)


def _conv_differentiable(
    backend: str, value: Tensor, offset_mask: Tensor, window: Window
) -> Tensor:
    return reference.conv_forward(value, offset_mask, window, differentiable=True)


def _attn(
    backend: str, value: Tensor, shapes: Any, locations: Tensor, weights: Tensor, softmax: bool
) -> Tensor:
    return load(backend).attn_forward(
        value, shapes, locations, weights, softmax, torch.are_deterministic_algorithms_enabled()
    )


def _attn_meta(value: Tensor, *arguments: Any) -> Tensor:
    locations = arguments[2]
    return value.new_empty((*locations.shape[:2], value.shape[2] * value.shape[3]))


def _attn_backward(
    grad: Tensor,
    backend: str,
    value: Tensor,
    shapes: Any,
    locations: Tensor,
    weights: Tensor,
    softmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen, deterministic = _for_backward("ms_deform_attn", value, backend)
    return chosen.attn_backward(grad, value, shapes, locations, weights, softmax, deterministic)


def _attn_differentiable(backend: str, *arguments: Any) -> Tensor:
    return reference.attn_forward(*arguments, differentiable=True)


def _define(
    name: str,
    arguments: str,
    inputs: tuple[int, ...],
    flatten: Callable[..., tuple[Any, ...]],
    unflatten: Callable[..., tuple[Any, ...]],
    forward: Callable[..., Tensor],
    meta: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor, ...]],
    differentiable: Callable[..., Tensor],
) -> Callable[..., Tensor]:
    """Register operator `name` and its backward; return what runs a call.

    A call is differentiable in its arguments at `inputs`. `flatten` makes the operator's arguments
    of a call and `unflatten` a call of them. `forward` and `differentiable` take a call, `backward`
    the output's gradient before one. `differentiable` is the forward made of PyTorch's own
    operations: the derivatives of the backward come from it, and it runs under `torch.func`
    transforms and in forward mode.
    """
    results = ", ".join(["Tensor"] * len(inputs))
    # Any strides do, so that Inductor need not keep those it traced.
    names = [n for n in ("pt2_compliant_tag", "flexible_layout") if hasattr(torch.Tag, n)]
    tags = {"tags": tuple(getattr(torch.Tag, n) for n in names)} if names else {}
    _library.define(f"{name}({arguments}) -> Tensor", **tags)
    _library.define(f"{name}_backward(Tensor grad_output, {arguments}) -> ({results})", **tags)
    operator = getattr(torch.ops.dcnv4, name).default
    operator_backward = getattr(torch.ops.dcnv4, f"{name}_backward").default

    def compute(*flat: Any) -> Tensor:
        return forward(*unflatten(*flat))

    def compute_backward(grad: Tensor, *flat: Any) -> tuple[Tensor, ...]:
        return backward(grad, *unflatten(*flat))

    def meta_backward(grad: Tensor, *flat: Any) -> tuple[Tensor, ...]:
        call = unflatten(*flat)
        tensors = (call[i] for i in inputs)
        return tuple(t.new_empty(t.shape) for t in tensors)

    def below_autograd(*call: Any) -> Tensor:
        guard = torch._C._AutoDispatchBelowAutograd()
        try:
            output: Tensor = operator(*flatten(*call))
        finally:
            del guard  # which an exception's frames would keep, and autograd off with it
        return output

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, run: Callable[..., Tensor], *call: Any) -> Tensor:
            ctx.save_for_backward(*[a if isinstance(a, Tensor) else None for a in call])
            ctx.call = [None if isinstance(a, Tensor) else a for a in call]
            return run(*call)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            saved = zip(ctx.saved_tensors, ctx.call, strict=True)
            call = [other if tensor is None else tensor for tensor, other in saved]
            if torch.is_grad_enabled() or not _is_plain(call, inputs) or _is_autocast_anywhere():
                results = operator_backward(grad, *flatten(*call))
            else:
                results = backward(grad, *call)
            grads: list[Tensor | None] = [None] * (1 + len(call))
            for i, result in zip(inputs, results, strict=True):
                grads[1 + i] = result
            return tuple(grads)

    def needs_grad(call: Sequence[Any]) -> bool:
        if torch.is_grad_enabled():
            for i in inputs:
                if call[i].requires_grad:
                    return True
        return False

    def autograd(*flat: Any) -> Any:
        call = unflatten(*flat)
        if needs_grad(call):
            return Differentiable.apply(below_autograd, *call)  # type: ignore[no-untyped-call]
        return below_autograd(*call)

    # `Function.apply` without what it does for `torch.func`, whose transforms are no plain call.
    apply = super(torch.autograd.Function, Differentiable).apply

    def eager(*call: Any) -> Any:
        if needs_grad(call):
            return apply(forward, *call)  # type: ignore[no-untyped-call]
        return forward(*call)

    def autograd_backward(grad: Tensor, *flat: Any) -> Any:
        call = list(unflatten(*flat))
        tensors = [call[i] for i in inputs]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (grad, *tensors)):
            for i in inputs:
                if not call[i].requires_grad:
                    call[i] = call[i].detach().requires_grad_()
            wanted = [call[i] for i in inputs]
            output = differentiable(*call)
            return torch.autograd.grad(output, wanted, grad, create_graph=True)
        guard = torch._C._AutoDispatchBelowAutograd()
        try:
            grads = operator_backward(grad, *flat)
        finally:
            del guard
        return grads

    def autocast(*flat: Any, device: str) -> Any:
        call = _as_autocast(unflatten(*flat), device, inputs)
        return _without_autocast(device, operator, *flatten(*call))

    _library.impl(name, compute, "CompositeExplicitAutograd")
    _library.impl(name, meta, "Meta")
    _library.impl(name, autograd, "Autograd")
    _library.impl(f"{name}_backward", compute_backward, "CompositeExplicitAutograd")
    _library.impl(f"{name}_backward", meta_backward, "Meta")
    _library.impl(f"{name}_backward", autograd_backward, "Autograd")
    for device, key in _AUTOCAST_KEYS.items():
        _library.impl(name, partial(autocast, device=device), key.name)
        run_backward = partial(_without_autocast, device, operator_backward)
        _library.impl(f"{name}_backward", run_backward, key.name)

    def run(*call: Any) -> Any:
        if _is_plain(call, inputs):
            if not _is_autocast_anywhere() or not is_autocast(device := call[1].device.type):
                return eager(*call)
            if device in _AUTOCAST_KEYS:
                return _without_autocast(device, eager, *_as_autocast(call, device, inputs))
        elif _is_transformed():
            device = call[1].device.type
            if not is_autocast(device):
                return differentiable(*call)
            with torch.autocast(device, enabled=False):
                return differentiable(*_as_autocast(call, device, inputs))
        return operator(*flatten(*call))

    return run


def _is_transformed() -> bool:
    """Whether a `torch.func` transform or forward mode wants the operations of a call."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# The tracer of torch 2.4 cannot ask this itself. The answer is a constant of a graph.
_is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_plain(call: Sequence[Any], inputs: tuple[int, ...]) -> bool:
    """Whether nothing but autograd, autocast and a backend is interested in a call.

    It then skips the dispatcher, which costs about 10 µs a call and is there for tracing,
    profilers, tensor subclasses, modes and transforms.
    """
    if not _HAS_COMPILER or torch.compiler.is_compiling():
        return False
    for i in inputs:
        tensor = call[i]
        kind = type(tensor)
        if kind is not Tensor and kind is not torch.nn.Parameter:
            return False
        if _unwrap_if_dead(tensor) is not tensor:  # it was left over by a transform
            return False
    return not (
        call[1].is_meta
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


@cache
def _has_autocast(device: str) -> bool:
    """Whether this PyTorch knows autocast on this kind of device."""
    try:
        torch.is_autocast_enabled(device)
    except RuntimeError:
        return False
    return True


# Constant, so that a tracer need not look inside.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_autocast(device: str) -> bool:
    if _HAS_AUTOCAST_BY_DEVICE:
        return _has_autocast(device) and torch.is_autocast_enabled(device)
    return torch.is_autocast_cpu_enabled() if device == "cpu" else torch.is_autocast_enabled()


def _is_autocast_anywhere() -> bool:
    if _HAS_AUTOCAST_ANYWHERE:
        return torch._C._is_any_autocast_enabled()
    return torch.is_autocast_cpu_enabled() or torch.is_autocast_enabled()


def _without_autocast(device: str, run: Callable[..., Any], *arguments: Any) -> Any:
    """What `run` makes of the arguments, autocast being off. It must be on."""
    key = _AUTOCAST_KEYS[device]
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)
    try:
        return run(*arguments)
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)


def _as_autocast(call: Sequence[Any], device: str, inputs: tuple[int, ...]) -> list[Any]:
    """The value in autocast's dtype unless it is float64; coordinates as precise as they came."""
    replaced = list(call)
    first, *rest = inputs
    if call[first].dtype != torch.float64:
        replaced[first] = call[first].to(autocast_dtype(device))
    exact = exact_coordinates(replaced[first], *(call[i] for i in rest))
    for i, coordinate in zip(rest, exact, strict=True):
        replaced[i] = coordinate
    return replaced


def autocast_dtype(device: str) -> torch.dtype:
    if _HAS_AUTOCAST_BY_DEVICE:
        return torch.get_autocast_dtype(device)
    return torch.get_autocast_cpu_dtype() if device == "cpu" else torch.get_autocast_gpu_dtype()


deform_conv = _define(
    "deform_conv",
    f"Tensor value, Tensor offset_mask, {_WINDOW}",
    (1, 2),
    _flatten_conv,
    _unflatten_conv,
    _conv,
    _conv_meta,
    _conv_backward,
    _conv_differentiable,
)
ms_deform_attn = _define(
    "ms_deform_attn",
    _ATTENTION,
    (1, 3, 4),
    _flatten_attn,
    _unflatten_attn,
    _attn,
    _attn_meta,
    _attn_backward,
    _attn_differentiable,
)


def composite(arguments: str) -> Callable[[_Function], _Function]:
    """Make a function an operator that is made of others, and is traced and differentiated as they
    are; `arguments` are its schema's."""

    def register(function: _Function) -> _Function:
        name = function.__name__
        _library.define(f"{name}({arguments}) -> Tensor")
        _library.impl(name, function, "CompositeImplicitAutograd")
        operator = getattr(torch.ops.dcnv4, name).default
        # Its name, module and the rest stay PyTorch's.
        update_wrapper(operator, function, ("__doc__",), ())
        return cast(_Function, operator)

    return register
