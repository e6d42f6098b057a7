"""Hugging Face models: their deformable attention through this package's operators.

A model of transformers samples in one of three places: in a module without parameters, in a
function that is an attribute of the layer, or in a function of the file, which the layer's forward
calls. In the first and the last case this one layer becomes an instance of a subclass with another
forward, and no other layer changes. The same is done with the whole forward of a layer that
computes what Deformable DETR's does.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from types import FunctionType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_backend
from ..functional import ms_deform_attn, ms_deform_attn_from_offsets
from ..layers.base import are_unwatched, known
from ..tracing import unflattened

_MODULE = "MultiScaleDeformableAttention"
_ATTRIBUTE = "ms_deformable_attn_core"
_GLOBALS = (
    "multi_scale_deformable_attention",
    "multi_scale_deformable_attention_v2",
    "MultiScaleDeformableAttentionFunction",
)

Model = TypeVar("Model", bound=nn.Module)


def enable(model: Model, *, backend: str | None = None) -> Model:
    """Route the deformable attention of a Hugging Face model through this package's operators.

    A layer that computes what Deformable DETR's does runs on
    `functional.ms_deform_attn_from_offsets`. Any other layer samples by
    `functional.ms_deform_attn`.

    Args:
        model: a model of transformers, or any module that holds one; changed in place. Parameters,
            state dict and other models stay as they are; copies and pickles stay enabled.
        backend: as in `functional.ms_deform_attn`. Enabling again changes it.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the model has no deformable attention, or none that can be routed.

    Note:
        A layer whose method is "discrete" picks the nearest pixels and stays as it is; a
        `UserWarning` lists such layers where others are routed.

    Example:
        >>> import torch
        >>> from transformers import DeformableDetrConfig, DeformableDetrModel, ResNetConfig
        >>> from dcnv4.integrations.transformers import enable
        >>> sizes = dict(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic")
        >>> backbone = ResNetConfig(**sizes, out_features=["stage2", "stage3", "stage4"])
        >>> config = DeformableDetrConfig(backbone_config=backbone, use_timm_backbone=False)
        >>> model = enable(DeformableDetrModel(config).eval())
        >>> model(torch.randn(1, 3, 64, 96)).last_hidden_state.shape
        torch.Size([1, 300, 256])
    """
    check_backend(backend)
    found = {name: layer for name, layer in _modules(model) if _place(layer)}
    left = {name: reason for name, layer in found.items() if (reason := _why_not(layer))}
    reasons = "; ".join(f"{name or 'model'} {reason}" for name, reason in left.items())
    if len(left) == len(found):
        raise ValueError(
            "model must have deformable attention of transformers that can be routed; got "
            f"{type(model).__name__}, {f'where {reasons}' if left else 'which has none'}"
        )
    if left:
        warnings.warn(f"not routed: {reasons}", stacklevel=2)
    for name in found.keys() - left.keys():
        _restore(found[name])
        _route(found[name], backend)
    for _, layer in _modules(model):
        if (padding := _padding(layer)) is not None:
            layer.__class__ = _routed_class(_own_class(layer), backend, padding)
    return model


def disable(model: Model) -> Model:
    """Undo `enable`: every layer of the model samples as transformers wrote it.

    Args:
        model: any module, enabled or not; changed in place.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> import torch
        >>> from transformers import DeformableDetrConfig, DeformableDetrModel, ResNetConfig
        >>> from dcnv4.integrations.transformers import disable, enable
        >>> sizes = dict(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic")
        >>> backbone = ResNetConfig(**sizes, out_features=["stage2", "stage3", "stage4"])
        >>> config = DeformableDetrConfig(backbone_config=backbone, use_timm_backbone=False)
        >>> model = enable(DeformableDetrModel(config).eval())
        >>> model = disable(model)
        >>> model(torch.randn(1, 3, 64, 96)).last_hidden_state.shape
        torch.Size([1, 300, 256])
    """
    for _, layer in _modules(model):
        _restore(layer)
    return model


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    return list(model.named_modules())


def _place(layer: nn.Module) -> str | None:
    """Where the layer keeps its sampling: "module", "attribute", "globals"; None if nowhere."""
    own = _own_class(layer)
    # mmcv has a layer of the same name, which takes queries instead of locations.
    if (
        own.__name__ == _MODULE
        and "sampling_locations" in inspect.signature(own.forward).parameters
    ):
        return "module"
    if _ATTRIBUTE in vars(layer):
        return "attribute"
    return "globals" if _named_globals(own) else None


def _named_globals(own: Any) -> list[str]:
    """Which of transformers' sampling functions the forward of this class calls."""
    code = getattr(own.forward, "__code__", None)
    return [n for n in _GLOBALS if code and n in code.co_names and n in own.forward.__globals__]


def _why_not(layer: nn.Module) -> str | None:
    """Why this attention cannot be routed; None if it can."""
    method = getattr(layer, "method", getattr(layer, "decoder_method", "default"))
    if method != "default":
        return f"samples by the method {method!r}"
    if "forward" in vars(layer) and _place(layer) != "attribute":
        return "has a forward of its own, such as a hook's; enable the model before adding it"
    return None


def _route(layer: nn.Module, backend: str | None) -> None:
    if _place(layer) == "attribute":
        setattr(layer, _ATTRIBUTE, _Function(getattr(layer, _ATTRIBUTE), backend))
    else:
        layer.__class__ = _routed_class(_own_class(layer), backend, None)


def _restore(layer: nn.Module) -> None:
    if isinstance(layer, _Routed):
        layer.__class__ = _own_class(layer)
    function = vars(layer).get(_ATTRIBUTE)
    if isinstance(function, _Function):
        setattr(layer, _ATTRIBUTE, function.original)


class _Function:
    """In place of one of transformers' sampling functions, or of its autograd function."""

    def __init__(self, original: Callable[..., Tensor] | None, backend: str | None) -> None:
        self.original = original
        self.backend = backend

    def __call__(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor | Sequence[Sequence[int]],
        sampling_locations: Tensor,
        attention_weights: Tensor,
        num_points_list: Sequence[int] | None = None,
        method: str = "default",
    ) -> Tensor:
        if method != "default":
            raise ValueError(f"method must be 'default' in an enabled model; got {method!r}")
        if num_points_list is not None:
            sampling_locations = _by_level(sampling_locations, num_points_list, _OUTSIDE)
            attention_weights = _by_level(attention_weights, num_points_list, 0.0)
        return ms_deform_attn(
            value, value_spatial_shapes, sampling_locations, attention_weights, backend=self.backend
        )

    def apply(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        return self(value, value_spatial_shapes, sampling_locations, attention_weights)


_OUTSIDE = -1.0
"""A location outside every level: nothing is read there."""


def _by_level(points: Tensor, counts: Sequence[int], fill: float) -> Tensor:
    """[B, Q, G, L, P, ...] of what is [B, Q, G, sum of the levels' counts, ...].

    P is the largest count; the points that a level lacks are `fill`.
    """
    most = max(counts)
    if all(count == most for count in counts):
        return unflattened(points, 3, (len(counts), most))
    inner = (0, 0) * (points.dim() - 4)
    levels = points.split(list(counts), 3)
    return torch.stack([F.pad(p, (*inner, 0, most - p.shape[3]), value=fill) for p in levels], 3)


class _Routed(nn.Module):
    """What the class of an enabled layer inherits beside the layer's own class."""

    # Names that no layer has itself.
    _dcnv4_own_class: Any
    _dcnv4_backend: str | None
    _dcnv4_padding: bool | None
    """Whether `attention_mask` is True at padding, of a `_RoutedLayer`."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so that a pickle has to make it anew.
        state = super().__reduce_ex__(protocol)[2]
        made_of = self._dcnv4_own_class, self._dcnv4_backend, self._dcnv4_padding
        return _unpickle, made_of, state


class _RoutedModule(_Routed):
    """In place of the module `MultiScaleDeformableAttention`."""

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Sequence[Sequence[int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        return ms_deform_attn(
            value,
            value_spatial_shapes_list,
            sampling_locations,
            attention_weights,
            backend=self._dcnv4_backend,
        )


class _RoutedLayer(_Routed):
    """In place of a layer that computes what Deformable DETR's does."""

    sampling_offsets: nn.Module
    attention_weights: nn.Module
    value_proj: nn.Module
    output_proj: nn.Module
    n_heads: int
    n_levels: int
    n_points: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Any = None,
        *others: Any,
        **named: Any,
    ) -> tuple[Tensor, Tensor]:
        sampling = self._modules.get("attn")
        if others or (sampling is not None and not are_unwatched((sampling,))):
            sampled: tuple[Tensor, Tensor] = super().forward(
                *(hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask),
                *(position_embeddings, reference_points, *others),
                **named,
            )
            return sampled
        if position_embeddings is not None:
            hidden_states = hidden_states + position_embeddings
        value = self.value_proj(encoder_hidden_states)
        if attention_mask is not None:
            padding = attention_mask if self._dcnv4_padding else ~attention_mask
            value = value.masked_fill(padding[..., None], 0.0)
        shapes: Any = named.get("spatial_shapes_list")
        if shapes is None:
            shapes = named.get("spatial_shapes")
        points = *hidden_states.shape[:2], self.n_heads, self.n_levels, self.n_points
        logits = self.attention_weights(hidden_states).view(points)
        output = ms_deform_attn_from_offsets(
            value.view(*value.shape[:2], self.n_heads, value.shape[2] // self.n_heads),
            shapes,
            reference_points,
            self.sampling_offsets(hidden_states).view(*points, 2),
            logits,
            softmax=True,
            backend=self._dcnv4_backend,
        )
        # Models return the weights, and do not always tell the layer that they will.
        weights = logits.flatten(3).softmax(-1).view(points)
        return self.output_proj(output), weights


_PROJECTIONS = {"sampling_offsets": 24, "attention_weights": 12, "value_proj": 4, "output_proj": 4}
"""The submodules of a `_RoutedLayer`, and their widths with C = 4, G = 2, L = 2, P = 3."""


@torch.no_grad()
def _padding(layer: nn.Module) -> bool | None:
    """Whether `attention_mask` is True at padding, of a layer whose sampling is routed and that
    computes what `_RoutedLayer` does; None of any other."""
    sampling, own = layer._modules.get("attn", layer), _own_class(layer)
    has_all = layer._modules.keys() >= _PROJECTIONS.keys()
    if not has_all or not isinstance(sampling, _Routed) or "forward" in vars(layer):
        return None
    # Always the same numbers, and none of those that the user draws.
    generator = torch.Generator("cpu").manual_seed(0)
    numbers = partial(torch.randn, generator=generator, dtype=torch.float64, device="cpu")
    shapes = [(3, 5), (2, 4)]
    pixels, query, position = numbers(2, 23, 4), numbers(2, 7, 4), numbers(2, 7, 4)
    boxes, mask = numbers(2, 7, 2, 4), numbers(2, 23) > 0
    calls = [
        (query, None, pixels, mask, None, boxes),
        (query, mask, pixels, None, position, boxes),
        (query, mask, pixels, ~mask, position, boxes[..., :2]),
    ]
    sizes = {
        "spatial_shapes": torch.tensor(shapes, device="cpu"),
        "spatial_shapes_list": shapes,
        "level_start_index": torch.tensor([0, 15], device="cpu"),
    }
    taken = inspect.signature(own.forward).parameters
    named = {name: argument for name, argument in sizes.items() if name in taken}
    for padding in (False, True):
        with suppress(Exception):  # whatever a layer of another formula raises
            tiny = _tiny(layer, numbers)
            expected = [tiny.forward(*call, **named) for call in calls]
            tiny.__class__ = _routed_class(own, "reference", padding)
            if sampling is not layer:
                _route(tiny.attn, "reference")
            torch.testing.assert_close([tiny.forward(*call, **named) for call in calls], expected)
            return padding
    return None


def _tiny(layer: nn.Module, numbers: Callable[..., Tensor]) -> Any:
    """A small layer of this one's own class and settings, with random weights."""
    own = _own_class(layer)
    tiny = own.__new__(own)
    nn.Module.__init__(tiny)
    settings = {name: value for name, value in vars(layer).items() if name not in vars(tiny)}
    vars(tiny).update({**settings, "d_model": 4, "n_heads": 2, "n_levels": 2, "n_points": 3})
    for name, width in _PROJECTIONS.items():
        linear = nn.Linear(4, width, device="meta")
        linear.weight, linear.bias = (nn.Parameter(numbers(*p.shape)) for p in linear.parameters())
        setattr(tiny, name, linear)
    if "attn" in layer._modules:
        tiny.attn = _own_class(layer.get_submodule("attn"))()
    return tiny


def _own_class(layer: nn.Module) -> Any:
    return layer._dcnv4_own_class if isinstance(layer, _Routed) else type(layer)


@cache
def _routed_class(own: Any, backend: str | None, padding: bool | None) -> type[_Routed]:
    """The subclass of `own` whose sampling is routed, or whose whole forward is where `padding` is
    known."""
    names = _named_globals(own)
    contents: dict[str, Any] = {
        "_dcnv4_own_class": own,
        "_dcnv4_backend": backend,
        "_dcnv4_padding": padding,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
    }
    bases = (_Routed if names else _RoutedModule), own
    if padding is not None:
        bases = _RoutedLayer, _routed_class(own, backend, None) if names else own
    elif names:
        contents["forward"] = _with_globals(
            own.forward, dict.fromkeys(names, _Function(None, backend))
        )
    return known(type(own.__name__, bases, contents))


def _with_globals(function: Any, names: dict[str, Any]) -> FunctionType:
    """The function with these globals in place of its own."""
    scope = {**function.__globals__, **names}
    # TorchDynamo would look globals up in the module of this name, where the originals are.
    del scope["__name__"]
    other = FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    other.__kwdefaults__ = function.__kwdefaults__
    return other


def _unpickle(own: Any, backend: str | None, padding: bool | None = None) -> _Routed:
    routed = _routed_class(own, backend, padding)
    return routed.__new__(routed)
