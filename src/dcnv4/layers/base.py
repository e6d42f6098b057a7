"""What layers share: what they read of submodules, initialization, the window and its points."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, wraps
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _every

from ..arguments import (
    check_backend,
    check_divides,
    check_flag,
    check_integer,
    check_pair,
    check_shape,
    window,
)
from ..autocast import is_autocast
from ..geometry import Window, conv_points
from ..initialization import Initializer, initialize
from ..tracing import beside, is_traced, refuse_scripting

Init = TypeVar("Init", bound=Callable[..., None])


def other_words(**right: str) -> Callable[[Init], Init]:
    """Have a layer's `__init__` name the right word where it is given another layer's."""

    def decorate(init: Init) -> Init:
        @wraps(init)
        def checked(self: nn.Module, *arguments: Any, **settings: Any) -> None:
            for wrong in right.keys() & settings.keys():
                raise TypeError(
                    f"{wrong} must be given to {type(self).__name__} as {right[wrong]}; "
                    f"got {wrong} = {settings[wrong]!r}"
                )
            init(self, *arguments, **settings)

        checked.__signature__ = signature(init)  # type: ignore[attr-defined]
        return checked  # type: ignore[return-value]

    return decorate


# What a layer reads of its submodules instead of calling them.

_FORWARDS: dict[type[nn.Module], Any] = {}
Kind = TypeVar("Kind", bound=type[nn.Module])


def known(kind: Kind) -> Kind:
    """Have modules of this class read instead of called, where nobody could tell."""
    _FORWARDS[kind] = kind.forward
    return kind


known(nn.Linear)
known(nn.Conv2d)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(_every, f"_global{hooks}", {}) for hooks in _HOOKS]


def are_bare(modules: Iterable[nn.Module]) -> bool:
    """Whether these compute what their classes say of plain parameters, nobody watching."""
    for module in modules:
        # Neither a tensor that is computed anew for every call nor one that is more than numbers.
        parameters = module.__dict__["_parameters"]
        if type(parameters.get("weight")) is not nn.Parameter:
            return False
        bias = parameters.get("bias", parameters)
        if bias is not None and type(bias) is not nn.Parameter:
            return False
    return are_unwatched(modules)


def are_unwatched(modules: Iterable[nn.Module]) -> bool:
    """Whether these are of known classes, their own forwards and hooks being nobody's."""
    if any(_GLOBAL_HOOKS):
        return False
    for module in modules:
        kind = type(module)  # which a parametrisation and `fully_shard` change
        if kind not in _FORWARDS or kind.forward is not _FORWARDS[kind]:
            return False
        held = module.__dict__
        if "forward" in held or held.get("_compiled_call_impl") is not None:
            return False
        for hooks in _HOOKS:
            if held.get(hooks):
                return False
    return True


def width_read(module: nn.Module, found: int) -> int:
    """How many channels a submodule reads: as many as were found where it does not tell."""
    if type(module) is nn.Linear:
        return module.weight.shape[1]
    width: int = getattr(module, "in_features", getattr(module, "in_channels", found))
    return width


def check_dtype(name: str, x: Tensor, reader: nn.Module) -> None:
    """Refuse in words what the product of a Linear that reads x would refuse."""
    if type(reader) is not nn.Linear or reader.weight.dtype == x.dtype:
        return
    if is_traced(x) or not are_bare((reader,)):
        return
    if not is_autocast(x.device.type):
        otherwise = "or come under autocast"
    elif torch.float64 in (x.dtype, reader.weight.dtype):
        otherwise = "since autocast leaves float64 as it is"
    else:
        return
    raise TypeError(
        f"{name} must be {reader.weight.dtype}, as the layer's parameters are, {otherwise}; "
        f"got {x.dtype}"
    )


# Initialization.


class Layer(nn.Module):
    """What all layers share: parameters that the layer initializes, whoever resets them."""

    __prepare_scriptable__ = refuse_scripting

    def _initializers(self) -> Iterator[tuple[nn.Module | None, Initializer, Initializer]]:
        """The submodules that PyTorch initializes otherwise: how weight and bias are."""
        raise NotImplementedError

    def _initialize(self) -> None:
        """Initialise every parameter, and have these submodules do it so when they are asked to.

        Sharding asks every module by itself once a model has come from the meta device. The
        submodules keep their type, which others look up, and copy and pickle by themselves.
        """
        for module, weight, bias in self._initializers():
            if module is not None:
                # Its parameters, not itself: a cycle would keep their memory until a collection.
                vars(module)["reset_parameters"] = partial(
                    initialize, weight, bias, module._parameters
                )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every parameter anew."""
        own = {module: (weight, bias) for module, weight, bias in self._initializers()}
        for module in self.modules():
            if module in own:
                initialize(*own[module], module._parameters)
            elif module is not self and callable(
                reset := getattr(module, "reset_parameters", None)
            ):
                reset()

    def _reset_parameters(self) -> None:
        """`reset_parameters`, by the name that the original layers have for it."""
        self.reset_parameters()


# The window.


class WindowedLayer(Layer):
    """What every layer around `deform_conv` shares: its window, its points, its centre blend."""

    def __init__(
        self,
        channels: int,
        settings: Window,
        *,
        center_feature_scale: bool,
        backend: str | None,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        self.window = settings
        self.backend = check_backend(backend)
        self.center_feature_scale = check_flag("center_feature_scale", center_feature_scale)
        if center_feature_scale:
            weight, bias = (settings.groups, channels), (settings.groups,)
            self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias = (
                nn.Parameter(torch.zeros(shape, **factory)) for shape in (weight, bias)
            )

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.center_feature_scale:
            nn.init.zeros_(self.center_feature_scale_proj_weight)
            nn.init.zeros_(self.center_feature_scale_proj_bias)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """(Ho, Wo) of the output for an input of `shape` (H, W)."""
        check_shape(shape)
        return self.window.output_size(*shape)

    def extra_repr(self) -> str:
        defaults = window(groups=self.window.groups)._asdict()
        changed = {k: v for k, v in self.window._asdict().items() if v != defaults[k]}
        settings = {"kernel_size": self.window.kernel_size, "groups": self.window.groups, **changed}
        if self.center_feature_scale:
            settings["center_feature_scale"] = True
        if self.backend is not None:
            settings["backend"] = self.backend
        return ", ".join(f"{key}={setting!r}" for key, setting in settings.items())

    def _blend(self, y: Tensor, value: Tensor, source: Tensor) -> Tensor:
        """y·(1 - s) + value·s at the windows' centres, s = sigmoid(linear(source)) per group."""
        weight, bias = self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
        scale = F.linear(source, weight, bias).sigmoid()[..., None]
        split = (self.window.groups, -1)
        center = self._at_centers(value).unflatten(-1, split)
        blended: Tensor = y.unflatten(-1, split) * (1 - scale) + center * scale
        return blended.flatten(-2)

    def _points(self, offset_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, Ho, Wo, G, K, 2] and weights [B, Ho, Wo, G, K] in `offset_mask`."""
        x, y, weights = conv_points(offset_mask, self.window)
        rows, columns = (torch.arange(n, device=x.device) for n in offset_mask.shape[1:3])
        origin_x, origin_y = self.window.origins(rows[:, None, None, None], columns[:, None, None])
        return torch.stack((origin_x + x, origin_y + y), -1), weights

    def _at_centers(self, x: Tensor) -> Tensor:
        """The pixels [B, Ho, Wo, C] at the centres of the windows, the nearest for one outside."""
        height, width = x.shape[1:3]
        rows, columns = self.window.output_size(height, width)
        if self.window.stride == (1, 1) and (rows, columns) == (height, width):
            return x
        if not is_traced(x) and 0 in (height, width):
            raise ValueError(f"x must have pixels where windows are; got {height} x {width}")
        column, row = self.window.origins(
            # None where the window does not fit, which the operator refuses.
            *(beside(torch.arange(max(n, 0), device=x.device), x) for n in (rows, columns))
        )
        return x[:, row.clamp(0, height - 1)[:, None], column.clamp(0, width - 1)]


def same_padding(kernel_size: int | tuple[int, int]) -> str | tuple[int, int]:
    """The `padding` of a convolution that keeps the size: numbers, which quantisers want, except
    where one side needs more than the other."""
    height, width = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
    return (height // 2, width // 2) if height % 2 and width % 2 else "same"


def original_window(channels: int, pad: int | Sequence[int], group: int, **settings: Any) -> Window:
    """The checked settings of a layer that has the original layers' words."""
    checked = window(
        padding=check_pair("pad", pad, 0), groups=check_integer("group", group, 1), **settings
    )
    check_divides(
        "group", group, check_integer("channels", channels, 1), f"the {channels} channels"
    )
    return checked


def setting(field: str) -> Any:
    """A field of the layer's window by another name: a plain number where it is a square."""

    def read(layer: WindowedLayer) -> Any:
        found = getattr(layer.window, field)
        if isinstance(found, tuple):
            return found[0] if found[0] == found[1] else found
        return int(found) if isinstance(found, bool) else found

    return property(read, changing(field))


def pair(field: str) -> Any:
    """A field (height, width) of the layer's window."""
    return property(lambda layer: getattr(layer.window, field), changing(field))


def changing(field: str) -> Callable[[WindowedLayer, Any], None]:
    """What sets a field, checked as an argument is."""

    def change(layer: WindowedLayer, to: Any) -> None:
        layer.window = window(**{**layer.window._asdict(), field: to})

    return change


class OriginalNames:
    """The settings and sizes of a layer by the names that the original layers have for them."""

    window: Window
    channels: int
    kernel_size = setting("kernel_size")
    stride = setting("stride")
    pad = setting("padding")
    dilation = setting("dilation")
    group = setting("groups")
    offset_scale = setting("offset_scale")
    remove_center = setting("remove_center")

    @property
    def group_channels(self) -> int:
        """D, channels of a group."""
        return self.channels // self.window.groups
