"""The operators as PyTorch knows them: schemas, shapes, gradients, autocast.

A backend's name is an argument of every operator, so that a traced graph records the choice and
forward and backward cannot disagree. Nothing here checks a user's arguments: `functional` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import Backend, choose, load, reference
from .geometry import Window

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


def _for_backward(op: str, value: Tensor, backend: str) -> Backend:
    """The backend, unless determinism was asked for after it was chosen, and it has none."""
    if torch.are_deterministic_algorithms_enabled():
        choose(op, value.device, value.dtype, True, backend)
    return load(backend)


def _conv(value: Tensor, offset_mask: Tensor, *settings: Any) -> Tensor:
    window, backend = unpack(settings)
    return load(backend).conv_forward(value, offset_mask, window)


def _conv_meta(value: Tensor, offset_mask: Tensor, *settings: Any) -> Tensor:
    return value.new_empty((*offset_mask.shape[:3], value.shape[3]))


def _conv_backward(
    grad: Tensor, value: Tensor, offset_mask: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    window, backend = unpack(settings)
    run = _for_backward("deform_conv", value, backend).conv_backward
    return run(grad, value, offset_mask, window)


def _conv_differentiable(value: Tensor, offset_mask: Tensor, *settings: Any) -> Tensor:
    window, _ = unpack(settings)
    return reference.conv_forward(value, offset_mask, window, differentiable=True)


def _attn(*arguments: Any) -> Tensor:
    unpacked, backend = unpack_attention(*arguments)
    return load(backend).attn_forward(*unpacked)


def _attn_meta(value: Tensor, *arguments: Any) -> Tensor:
    locations = arguments[2]
    return value.new_empty((*locations.shape[:2], value.shape[2] * value.shape[3]))


def _attn_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    unpacked, backend = unpack_attention(*arguments)
    run = _for_backward("ms_deform_attn", arguments[0], backend).attn_backward
    return run(grad, *unpacked)


def _attn_differentiable(*arguments: Any) -> Tensor:
    unpacked, _ = unpack_attention(*arguments)
    return reference.attn_forward(*unpacked, differentiable=True)


def _define(
    name: str,
    arguments: str,
    inputs: tuple[int, ...],
    forward: Callable[..., Tensor],
    meta: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor, ...]],
    differentiable: Callable[..., Tensor],
) -> Callable[..., Tensor]:
    """Register operator `name` and its backward; return what calls it.

    The operator is differentiable in the arguments at `inputs`. `backward` takes the output's
    gradient before the same arguments. `differentiable` is the forward made of PyTorch's own
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

    def meta_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        tensors = (arguments[i] for i in inputs)
        return tuple(t.new_empty(t.shape) for t in tensors)

    def below_autograd(*arguments: Any) -> Tensor:
        guard = torch._C._AutoDispatchBelowAutograd()
        try:
            output: Tensor = operator(*arguments)
        finally:
            del guard  # which an exception's frames would keep, and autograd off with it
        return output

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, run: Callable[..., Tensor], *arguments: Any) -> Tensor:
            ctx.save_for_backward(*[a if isinstance(a, Tensor) else None for a in arguments])
            ctx.arguments = [None if isinstance(a, Tensor) else a for a in arguments]
            return run(*arguments)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            saved = zip(ctx.saved_tensors, ctx.arguments, strict=True)
            arguments = [other if tensor is None else tensor for tensor, other in saved]
            plain = not torch.is_grad_enabled() and _is_plain(arguments, inputs)
            run = backward if plain else operator_backward
            grads: list[Tensor | None] = [None] * (1 + len(arguments))
            for i, result in zip(inputs, run(grad, *arguments), strict=True):
                grads[1 + i] = result
            return tuple(grads)

    def needs_grad(arguments: Sequence[Any]) -> bool:
        return torch.is_grad_enabled() and any(arguments[i].requires_grad for i in inputs)

    def autograd(*arguments: Any) -> Any:
        if needs_grad(arguments):
            return Differentiable.apply(below_autograd, *arguments)  # type: ignore[no-untyped-call]
        return below_autograd(*arguments)

    def autograd_backward(grad: Tensor, *arguments: Any) -> Any:
        tensors = [arguments[i] for i in inputs]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (grad, *tensors)):
            replaced = list(arguments)
            for i in inputs:
                if not arguments[i].requires_grad:
                    replaced[i] = arguments[i].detach().requires_grad_()
            wanted = [replaced[i] for i in inputs]
            output = differentiable(*replaced)
            return torch.autograd.grad(output, wanted, grad, create_graph=True)
        guard = torch._C._AutoDispatchBelowAutograd()
        try:
            grads = operator_backward(grad, *arguments)
        finally:
            del guard
        return grads

    _library.impl(name, forward, "CompositeExplicitAutograd")
    _library.impl(name, meta, "Meta")
    _library.impl(name, autograd, "Autograd")
    _library.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")
    _library.impl(f"{name}_backward", meta_backward, "Meta")
    _library.impl(f"{name}_backward", autograd_backward, "Autograd")
    for device in ("cpu", "cuda", "mps", "xpu"):
        _define_autocast(name, operator, partial(_as_autocast, inputs=inputs), device)
        _define_autocast(f"{name}_backward", operator_backward, lambda given, device: given, device)

    def call(*arguments: Any) -> Tensor:
        if _is_transformed():
            device = arguments[inputs[0]].device.type
            if not is_autocast(device):
                return differentiable(*arguments)
            with torch.autocast(device, enabled=False):
                return differentiable(*_as_autocast(arguments, device, inputs))
        if not _is_plain(arguments, inputs):
            output: Tensor = operator(*arguments)
        elif needs_grad(arguments):
            output = Differentiable.apply(forward, *arguments)  # type: ignore[no-untyped-call]
        else:
            output = forward(*arguments)
        return output

    return call


def _is_transformed() -> bool:
    """Whether a `torch.func` transform or forward mode wants the operations of a call."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# The tracer of torch 2.4 cannot ask this itself. The answer is a constant of a graph.
_is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_plain(arguments: Sequence[Any], inputs: tuple[int, ...]) -> bool:
    """Whether nothing but a backend is interested in a call, which then skips the dispatcher.

    The dispatcher costs about 10 µs a call; it is there for tracing, autocast, profilers, tensor
    subclasses and modes.
    """
    if not _HAS_COMPILER or torch.compiler.is_compiling():
        return False
    for i in inputs:
        kind = type(arguments[i])
        if kind is not Tensor and kind is not torch.nn.Parameter:
            return False
    value = arguments[inputs[0]]
    return (
        not value.is_meta
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._get_tracing_state() is None
        and not torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        and not is_autocast(value.device.type)
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


def _define_autocast(
    name: str,
    operator: Callable[..., Any],
    prepare: Callable[[Sequence[Any], str], Sequence[Any]],
    device: str,
) -> None:
    """Under autocast run `operator` without it, on the arguments that `prepare` makes."""
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}", None)
    if key is None:
        return

    def autocast(*arguments: Any) -> Any:
        prepared = prepare(arguments, device)
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)
        try:
            return operator(*prepared)
        finally:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)

    _library.impl(name, autocast, key.name)


def _as_autocast(arguments: Sequence[Any], device: str, inputs: tuple[int, ...]) -> list[Any]:
    """The value in autocast's dtype unless it is float64; coordinates as precise as they came."""
    replaced = list(arguments)
    first, *rest = inputs
    if arguments[first].dtype != torch.float64:
        replaced[first] = arguments[first].to(autocast_dtype(device))
    exact = exact_coordinates(replaced[first], *(arguments[i] for i in rest))
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
    (0, 1),
    _conv,
    _conv_meta,
    _conv_backward,
    _conv_differentiable,
)
ms_deform_attn = _define(
    "ms_deform_attn",
    _ATTENTION,
    (0, 3, 4),
    _attn,
    _attn_meta,
    _attn_backward,
    _attn_differentiable,
)
