"""The operators as PyTorch knows them: schemas, shapes, gradients, autocast.

A backend's name is an argument of every operator, so that a traced graph records the choice and
forward and backward cannot disagree. Nothing here checks a user's arguments: `functional` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial, update_wrapper
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from . import geometry
from .autocast import AUTOCAST_KEYS, as_autocast, dtype_of_autocast, without_autocast
from .backends import AttnGrads, choose, load, reference
from .eager import Differentiable, below_autograd, needs_grad, run
from .geometry import Reference, Window, sum_dtype, unpacked
from .tracing import beside, is_compiling, is_plain, may_read_past

T = TypeVar("T")
_Function = TypeVar("_Function", bound=Callable[..., Any])

_library = torch.library.Library("dcnv4", "DEF")


def must_be_deterministic(*inputs: Tensor) -> bool:
    """Whether a call's gradients are wanted and must have the same bits on every run."""
    if not torch.are_deterministic_algorithms_enabled():
        return False
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


def _is_deterministic_backward(op: str, value: Tensor, backend: str) -> bool:
    """Whether a backward must have the same bits on every run; a RuntimeError where that was asked
    for after the backend was chosen, and it has none that has."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    if deterministic:
        choose(op, value.device, value.dtype, True, backend)
    return deterministic


class Operator:
    """An operator and its backward, as PyTorch knows them.

    A call is a backend's name and the arguments that this backend takes, the value first. PyTorch
    takes them flat, the backend last.
    """

    name: str
    schema: str
    """The flat arguments."""
    inputs: tuple[int, ...]
    """Where in a call the tensors stand that it is differentiable in, the value first."""
    maps: tuple[int, ...] = (1,)
    """Where those of four dimensions stand. TorchInductor, which takes such a one for [B, C, H, W]
    where convolutions are near, moves C and copies it; so it gets them with a dimension more."""
    flatten: Callable[..., tuple[Any, ...]]
    """The flat arguments of a call."""
    unflatten: Callable[..., tuple[Any, ...]]
    output_shape: Callable[..., tuple[int, ...]]
    """Of a call."""
    forward: Callable[..., Tensor]
    """What the backend makes of a call."""
    backward: Callable[..., tuple[Tensor | None, ...]]
    """The gradients of a call's inputs, from that of the output before it; None where the call says
    that one is not wanted."""
    differentiable: Callable[..., Tensor]
    """The forward, made of PyTorch's own operations: the derivatives of the backward come from it,
    it runs under `torch.func` transforms and in forward mode, and is what portable exports hold."""

    def __init__(self) -> None:
        name, results = self.name, ", ".join(["Tensor"] * len(self.inputs))
        results = f"({results})" if self.inputs[1:] else results
        # Any strides do, so that Inductor need not keep those it traced.
        names = [n for n in ("pt2_compliant_tag", "flexible_layout") if hasattr(torch.Tag, n)]
        tags = {"tags": tuple(getattr(torch.Tag, n) for n in names)} if names else {}
        _library.define(f"{name}({self.schema}) -> Tensor", **tags)
        _library.define(f"{name}_backward(Tensor grad_output, {self.schema}) -> {results}", **tags)
        self.operator = getattr(torch.ops.dcnv4, name).default
        self.operator_backward = getattr(torch.ops.dcnv4, f"{name}_backward").default
        for key, forward, backward in (
            ("CompositeExplicitAutograd", self._compute, self._compute_backward),
            ("Meta", self._meta, self._meta_backward),
            ("Autograd", self._autograd, self._autograd_backward),
        ):
            _library.impl(name, forward, key)
            _library.impl(f"{name}_backward", backward, key)
        for device, autocast in AUTOCAST_KEYS.items():
            _library.impl(name, partial(self._autocast, device), autocast.name)
            run_backward = partial(without_autocast, device, self.operator_backward)
            _library.impl(f"{name}_backward", run_backward, autocast.name)

    def splits(self, *call: Any) -> list[tuple[int | None, ...]]:
        """How a call is made of calls on parts of it: the dimension along which each of its inputs
        and at the end its output are split, None for an input that all parts read whole."""
        return [(0,) * (len(self.inputs) + 1)]

    def under_autocast(self, device: str, *call: Any) -> tuple[Operator, list[Any]]:
        """The operator, and its call, that autocast makes of a call."""
        return self, as_autocast(call, device, self.inputs)

    def dispatch(self, *call: Any) -> Tensor:
        """The output, by way of PyTorch's dispatcher."""
        if not is_compiling() or not may_read_past(*[call[i] for i in self.inputs]):
            output: Tensor = self.operator(*self.flatten(*call))
            return output
        output = self.operator(*self.flatten(*self._with_maps(call, unsqueeze)))
        return output.squeeze(0) if output.dim() == 5 else output

    def dispatch_backward(self, grad: Tensor, *call: Any) -> tuple[Tensor, ...]:
        grads = self.operator_backward(grad, *self.flatten(*call))
        return (grads,) if isinstance(grads, Tensor) else tuple(grads)

    def _with_maps(self, call: Sequence[Any], change: Callable[[Tensor], Tensor]) -> list[Any]:
        return [change(part) if i in self.maps else part for i, part in enumerate(call)]

    def _on_maps(self, function: Callable[..., Tensor], call: Sequence[Any]) -> Tensor:
        """What a function of a call makes of one whose maps may have a dimension more."""
        if call[1].dim() == 4:
            return function(*call)
        y = function(*self._with_maps(call, squeeze))
        return y.unsqueeze(0) if y.dim() == 4 else y

    def _compute(self, *flat: Any) -> Tensor:
        return self._on_maps(self.forward, self.unflatten(*flat))

    def _compute_backward(self, grad: Tensor, *flat: Any) -> Any:
        given = self.unflatten(*flat)
        call: Sequence[Any] = given
        if call[1].dim() == 5:
            call = self._with_maps(call, squeeze)
            grad = grad.squeeze(0) if grad.dim() == 5 else grad
        inputs = (given[i] for i in self.inputs)
        pairs = zip(inputs, self.backward(grad, *call), strict=True)
        return _results(
            tuple(t.new_zeros(t.shape) if made is None else made.view(t.shape) for t, made in pairs)
        )

    def _meta(self, *flat: Any) -> Tensor:
        def empty(*call: Any) -> Tensor:
            value: Tensor = call[1]
            return value.new_empty(self.output_shape(*call))

        return self._on_maps(empty, self.unflatten(*flat))

    def _meta_backward(self, grad: Tensor, *flat: Any) -> Any:
        call = self.unflatten(*flat)
        tensors = (call[i] for i in self.inputs)
        return _results(tuple(t.new_empty(t.shape) for t in tensors))

    def _autograd(self, *flat: Any) -> Any:
        call = self.unflatten(*flat)
        if not needs_grad(call, self.inputs):
            if is_plain(call, self.inputs):  # as those of compiled graphs are
                return below_autograd(self._on_maps, self.forward, call)
            return below_autograd(self.operator, *flat)
        forward = partial(below_autograd, self.dispatch)
        return Differentiable.apply(self, forward, *call)  # type: ignore[no-untyped-call]

    def _autograd_backward(self, grad: Tensor, *flat: Any) -> Any:
        call = list(self.unflatten(*flat))
        tensors = [call[i] for i in self.inputs]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (grad, *tensors)):
            for i in self.inputs:
                if not call[i].requires_grad:
                    call[i] = call[i].detach().requires_grad_()
            wanted = [call[i] for i in self.inputs]
            output = self._on_maps(self.differentiable, call)
            return _results(torch.autograd.grad(output, wanted, grad, create_graph=True))
        if is_plain((grad, *tensors), range(1 + len(tensors))):
            return below_autograd(self._compute_backward, grad, *flat)
        return below_autograd(self.operator_backward, grad, *flat)

    def _autocast(self, device: str, *flat: Any) -> Any:
        operator, call = self.under_autocast(device, *self.unflatten(*flat))
        return without_autocast(device, operator.dispatch, *call)


squeeze, unsqueeze = (partial(change, dim=0) for change in (torch.squeeze, torch.unsqueeze))


def _results(tensors: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """As PyTorch takes an operator's results: one of them by itself."""
    return tensors if tensors[1:] else tensors[0]


class DeformConv(Operator):
    """A call: backend, value, offset_mask, window."""

    name = "deform_conv"
    schema = (
        "Tensor value, Tensor offset_mask, int[2] kernel_size, int[2] stride, int[2] padding, "
        "int[2] dilation, int groups, float offset_scale, bool remove_center, bool softmax, "
        "str backend"
    )
    inputs = 1, 2
    maps = 1, 2

    @staticmethod
    def flatten(
        backend: str, value: Tensor, offset_mask: Tensor, window: Window
    ) -> tuple[Any, ...]:
        return value, offset_mask, *window, backend

    @staticmethod
    def unflatten(value: Tensor, offset_mask: Tensor, *settings: Any) -> tuple[Any, ...]:
        kernel_size, stride, padding, dilation, *rest, backend = settings
        pairs = tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation)
        return backend, value, offset_mask, Window(*pairs, *rest)

    @staticmethod
    def output_shape(
        backend: str, value: Tensor, offset_mask: Tensor, window: Window
    ) -> tuple[int, ...]:
        return *offset_mask.shape[:3], value.shape[3]

    @staticmethod
    def forward(backend: str, value: Tensor, offset_mask: Tensor, window: Window) -> Tensor:
        deterministic = torch.are_deterministic_algorithms_enabled()
        return load(backend).conv_forward(value, offset_mask, window, deterministic)

    @staticmethod
    def backward(
        grad: Tensor, backend: str, value: Tensor, offset_mask: Tensor, window: Window
    ) -> tuple[Tensor, Tensor]:
        deterministic = _is_deterministic_backward("deform_conv", value, backend)
        return load(backend).conv_backward(grad, value, offset_mask, window, deterministic)

    @staticmethod
    def differentiable(backend: str, value: Tensor, offset_mask: Tensor, window: Window) -> Tensor:
        return reference.conv_forward(value, offset_mask, window, differentiable=True)


class DeformConvPacked(Operator):
    """A call: backend, packed, channels of the value, window."""

    name = "deform_conv_packed"
    schema = DeformConv.schema.replace(
        "Tensor value, Tensor offset_mask", "Tensor packed, int channels"
    )
    inputs = (1,)

    @staticmethod
    def flatten(backend: str, packed: Tensor, channels: int, window: Window) -> tuple[Any, ...]:
        return packed, channels, *window, backend

    @staticmethod
    def unflatten(packed: Tensor, channels: int, *settings: Any) -> tuple[Any, ...]:
        backend, _, _, window = DeformConv.unflatten(packed, packed, *settings)
        return backend, packed, channels, window

    @staticmethod
    def output_shape(
        backend: str, packed: Tensor, channels: int, window: Window
    ) -> tuple[int, ...]:
        return *packed.shape[:3], channels

    @staticmethod
    def forward(backend: str, packed: Tensor, channels: int, window: Window) -> Tensor:
        return DeformConv.forward(backend, *unpacked(packed, channels), window)

    @staticmethod
    def backward(
        grad: Tensor,
        backend: str,
        packed: Tensor,
        channels: int,
        window: Window,
        spent: bool = False,
    ) -> tuple[Tensor]:
        """`spent`: whether `packed` is not needed any more, and may become its gradient."""
        deterministic = _is_deterministic_backward("deform_conv", packed, backend)
        module = load(backend)
        overwrites = spent and packed.dtype in getattr(module, "OVERWRITES", ())
        if overwrites and not deterministic and packed.is_contiguous():
            gradient = packed
        else:
            gradient = packed.new_empty(packed.shape)
        inputs, out = unpacked(packed, channels), unpacked(gradient, channels)
        module.conv_backward(grad, *inputs, window, deterministic, out)
        return (gradient,)

    @staticmethod
    def differentiable(backend: str, packed: Tensor, channels: int, window: Window) -> Tensor:
        return DeformConv.differentiable(backend, *unpacked(packed, channels), window)

    def under_autocast(self, device: str, *call: Any) -> tuple[Operator, list[Any]]:
        backend, packed, channels, window = call
        if packed.dtype in (torch.float64, dtype_of_autocast(device)):
            return self, list(call)
        # The value is rounded, the coordinates beside it are not.
        return DEFORM_CONV.under_autocast(device, backend, *unpacked(packed, channels), window)


class _Attention(Operator):
    """A call: backend, value, shapes of the levels, and more.

    The shapes are numbers where the host knows them, a tensor where only the device does.
    """

    @staticmethod
    def flatten(
        backend: str, value: Tensor, shapes: Tensor | Sequence[tuple[int, int]], *rest: Any
    ) -> tuple[Any, ...]:
        if isinstance(shapes, Tensor):
            return value, beside(shapes, value), [], *rest, backend
        return value, None, [size for pair in shapes for size in pair], *rest, backend

    @staticmethod
    def unflatten(
        value: Tensor, spatial_shapes: Tensor | None, level_sizes: Sequence[int], *rest: Any
    ) -> tuple[Any, ...]:
        *others, backend = rest
        pairs = list(zip(level_sizes[::2], level_sizes[1::2], strict=True))
        return backend, value, pairs if spatial_shapes is None else spatial_shapes, *others


class DeformAttn(_Attention):
    """A call: backend, value, shapes of the levels, locations, weights, softmax."""

    name = "ms_deform_attn"
    schema = (
        "Tensor value, Tensor? spatial_shapes, SymInt[] level_sizes, Tensor locations, "
        "Tensor weights, bool softmax, str backend"
    )
    inputs = 1, 3, 4

    def splits(self, *call: Any) -> list[tuple[int | None, ...]]:
        queries, heads = (None, 1, 1, 1), (2, 2, 2, 2)
        return [*super().splits(*call), queries, heads]

    @staticmethod
    def output_shape(
        backend: str, value: Tensor, shapes: Any, locations: Tensor, *rest: Any
    ) -> tuple[int, ...]:
        return *locations.shape[:2], value.shape[2] * value.shape[3]

    @staticmethod
    def forward(
        backend: str, value: Tensor, shapes: Any, locations: Tensor, weights: Tensor, softmax: bool
    ) -> Tensor:
        return load(backend).attn_forward(
            value, shapes, locations, weights, softmax, torch.are_deterministic_algorithms_enabled()
        )

    @staticmethod
    def backward(
        grad: Tensor,
        backend: str,
        value: Tensor,
        shapes: Any,
        locations: Tensor,
        weights: Tensor,
        softmax: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        deterministic = _is_deterministic_backward("ms_deform_attn", value, backend)
        return load(backend).attn_backward(
            grad, value, shapes, locations, weights, softmax, deterministic
        )

    @staticmethod
    def differentiable(backend: str, *arguments: Any) -> Tensor:
        return reference.attn_forward(*arguments, differentiable=True)


class DeformAttnFromOffsets(_Attention):
    """A call: backend, value, shapes of the levels, reference points, offsets, weights,
    box_normalizer, softmax, and whether the gradient of the reference points is wanted."""

    name = "ms_deform_attn_from_offsets"
    schema = (
        "Tensor value, Tensor? spatial_shapes, SymInt[] level_sizes, Tensor reference_points, "
        "Tensor offsets, Tensor weights, str box_normalizer, bool softmax, "
        "bool reference_gradient, str backend"
    )
    inputs = 1, 3, 4, 5
    maps = 1, 3

    def splits(self, *call: Any) -> list[tuple[int | None, ...]]:
        images, queries, _ = (size != 1 for size in call[3].shape[:3])
        return [
            (0, 0 if images else None, 0, 0, 0),
            (None, 1 if queries else None, 1, 1, 1),
            (2, None, 2, 2, 2),
        ]

    @staticmethod
    def output_shape(
        backend: str, value: Tensor, shapes: Any, points: Tensor, *rest: Any
    ) -> tuple[int, ...]:
        return DeformAttn.output_shape(backend, value, shapes, *rest)

    @staticmethod
    def forward(backend: str, value: Tensor, shapes: Any, points: Tensor, *rest: Any) -> Tensor:
        offsets, weights, box_normalizer, softmax, _ = rest
        deterministic = torch.are_deterministic_algorithms_enabled()
        place = Reference(points, box_normalizer)
        return load(backend).attn_forward(
            value, shapes, offsets, weights, softmax, deterministic, place
        )

    @staticmethod
    def backward(
        grad: Tensor,
        backend: str,
        value: Tensor,
        shapes: Any,
        points: Tensor,
        *rest: Any,
        out: AttnGrads | None = None,
        **told: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """`told`: more that this backend's `attn_backward` takes."""
        offsets, weights, box_normalizer, softmax, reference_gradient = rest
        deterministic = _is_deterministic_backward("ms_deform_attn", value, backend)
        place = Reference(points, box_normalizer)

        def run(offsets: Tensor, place: Reference, out: AttnGrads | None) -> Any:
            others = weights, softmax, deterministic, place, out
            return load(backend).attn_backward(grad, value, shapes, offsets, *others, **told)

        if not reference_gradient:
            grad_value, grad_offsets, grad_weights = run(offsets, place, out)
            return grad_value, None, grad_offsets, grad_weights

        # From the gradients of offsets in pixels: those of the offsets may be rounded, and are none
        # in a box without size.
        exact = offsets.to(dtype := sum_dtype(value.dtype))
        wide = place._replace(points=points.to(dtype))
        heights, widths = _levels(shapes, value.device)
        scale = None
        if place.has_boxes():
            scale, _ = geometry.attn_map(heights, widths, offsets.shape[4], wide)
        pixels = exact if scale is None else exact * scale
        grads = (out[0], pixels.new_empty(pixels.shape), out[2]) if out else None
        centres = place._replace(points=points[..., :2])
        grad_value, by_pixels, grad_weights = run(pixels, centres, grads)
        grad_offsets = by_pixels if scale is None else by_pixels * scale
        grad_offsets = out[1].copy_(grad_offsets) if out else grad_offsets.to(offsets.dtype)
        grad_points = geometry.attn_reference_backward(by_pixels, exact, wide, heights, widths)
        return grad_value, grad_points.to(points.dtype), grad_offsets, grad_weights

    @staticmethod
    def differentiable(
        backend: str, value: Tensor, shapes: Any, points: Tensor, *rest: Any
    ) -> Tensor:
        offsets, weights, box_normalizer, softmax, _ = rest
        place = Reference(points, box_normalizer)
        inputs = value, shapes, offsets, weights, softmax
        return reference.attn_forward(*inputs, reference=place, differentiable=True)


class CenteredConv(Operator):
    """An ordinary convolution, as TorchInductor gets it: around one that it knows as such, it lays
    out maps [B, H, W, C] as if H were the channels, and copies them back.

    A call: backend, x [B, H, W, C_in], weight [C_out, C_in/groups, kh, kw] of odd sizes, dilation.
    The output has the size of the input.
    """

    name = "centered_conv"
    schema = "Tensor x, Tensor weight, int[2] dilation, str backend"
    inputs = 1, 2

    @staticmethod
    def flatten(
        backend: str, x: Tensor, weight: Tensor, dilation: tuple[int, ...]
    ) -> tuple[Any, ...]:
        return x, weight, dilation, backend

    @staticmethod
    def unflatten(x: Tensor, weight: Tensor, dilation: Any, backend: str) -> tuple[Any, ...]:
        return backend, x, weight, tuple(dilation)

    @staticmethod
    def output_shape(backend: str, x: Tensor, weight: Tensor, *rest: Any) -> tuple[int, ...]:
        return *x.shape[:3], weight.shape[0]

    @staticmethod
    def forward(backend: str, x: Tensor, weight: Tensor, dilation: tuple[int, ...]) -> Tensor:
        padding = centered_padding(weight.shape[2:], dilation)
        groups = x.shape[3] // weight.shape[1]
        image = x.permute(0, 3, 1, 2)
        y = torch.conv2d(image, weight, None, (1, 1), padding, dilation, groups)
        return y.permute(0, 2, 3, 1).contiguous()

    @staticmethod
    def backward(
        grad: Tensor, backend: str, x: Tensor, weight: Tensor, dilation: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        grad_x, grad_weight, _ = centered_conv_backward(
            grad, x, weight, dilation, (True, True, False)
        )
        return grad_x.contiguous(), grad_weight.contiguous()

    differentiable = forward


def centered_padding(kernel_size: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """What keeps the size, of a kernel of odd size."""
    return tuple([step * (size // 2) for step, size in zip(dilation, kernel_size, strict=True)])


def centered_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: Sequence[int], needed: Sequence[bool]
) -> list[Any]:
    """Gradients of x [B, H, W, C_in], of the weight and of a bias; None of what is not needed."""
    grad_x, *others = torch.ops.aten.convolution_backward(
        *(grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, [weight.shape[0]]),
        *((1, 1), centered_padding(weight.shape[2:], dilation), dilation),
        *(False, (0, 0), x.shape[3] // weight.shape[1], needed),
    )
    return [grad_x.permute(0, 2, 3, 1) if needed[0] else None, *others]


def _levels(shapes: Tensor | Sequence[tuple[int, int]], device: torch.device) -> list[Tensor]:
    """Heights and widths of levels."""
    if isinstance(shapes, Tensor):
        return list(geometry.levels(shapes, device)[:2])
    return _kept_levels(tuple(shapes), device)


@lru_cache(maxsize=256)
def _kept_levels(shapes: tuple[tuple[int, int], ...], device: torch.device) -> list[Tensor]:
    # Kept, because copying numbers to an accelerator makes the host wait for it.
    with torch.inference_mode(False):
        return list(geometry.levels(shapes, device)[:2])


OPERATORS: tuple[Operator, Operator, Operator, Operator] = (
    DeformConv(),
    DeformAttn(),
    DeformConvPacked(),
    DeformAttnFromOffsets(),
)
DEFORM_CONV, MS_DEFORM_ATTN, DEFORM_CONV_PACKED, MS_DEFORM_ATTN_FROM_OFFSETS = OPERATORS
CENTERED_CONV = CenteredConv()
deform_conv, ms_deform_attn, deform_conv_packed, ms_deform_attn_from_offsets = (
    partial(run, operator) for operator in OPERATORS
)


def composite(arguments: str) -> Callable[[_Function], _Function]:
    """Make a function an operator that is made of others, and is traced and differentiated as they
    are; `arguments` are its schema's."""

    def register(function: _Function) -> _Function:
        # The latter: of `torch.jit.trace`.
        return _registered(function, arguments, CompositeImplicitAutograd=function, Tracer=function)

    return register


def opaque(arguments: str) -> Callable[[_Function], _Function]:
    """Make a function, whose output is like its first argument, an operator that compilers do not
    look into, and that nobody differentiates."""

    def register(function: _Function) -> _Function:
        def empty(like: Tensor, *_: Any) -> Tensor:
            return torch.empty_like(like)

        return _registered(function, arguments, CompositeExplicitAutograd=function, Meta=empty)

    return register


def _registered(
    function: _Function, arguments: str, **implementations: Callable[..., Tensor]
) -> _Function:
    name = function.__name__
    _library.define(f"{name}({arguments}) -> Tensor")
    for key, implementation in implementations.items():
        _library.impl(name, implementation, key)
    operator = getattr(torch.ops.dcnv4, name).default
    # Its name, module and the rest stay PyTorch's.
    update_wrapper(operator, function, ("__doc__",), ())
    return cast(_Function, operator)
