"""Swap the convolutions of a model that exists for deformable ones."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from .arguments import check_choice, check_pair
from .layers import DCNv4Conv2d

__all__ = ["convert"]

_log = logging.getLogger(__name__)

_KEPT = "stride", "padding", "dilation", "bias", "in_channels", "out_channels", "device", "dtype"
"""What a new layer has of its convolution."""

_KINDS: dict[str, Callable[[nn.Conv2d], bool]] = {
    "any": lambda conv: True,
    "depthwise": lambda conv: conv.groups == conv.in_channels == conv.out_channels > 1,
    "dense": lambda conv: conv.groups == 1,
}


def convert(
    model: nn.Module,
    names: str | Sequence[str] = "*",
    *,
    kind: str = "any",
    types: type[nn.Conv2d] | Sequence[type[nn.Conv2d]] = nn.Conv2d,
    where: Callable[[str, nn.Conv2d], bool] | None = None,
    kernel_size: int | Sequence[int] | None = None,
    init: str = "average",
    **options: Any,
) -> dict[str, DCNv4Conv2d]:
    """Replace convolutions inside `model`, in place, by `DCNv4Conv2d` of the same channels.

    Stride, dilation, output size, dtype, device and training mode stay as they are, and so does the
    bias, which `without_pointwise` drops. Two kinds are left alone: convolutions of 1 x 1, which
    look at nothing around a pixel; and a stem, the model's first convolution where it reads at most
    4 channels, too few to tell where to look, unless `names` holds its own name.

    What was replaced is logged by `logging.getLogger("dcnv4.conversion")` at level INFO.

    Args:
        model: contains the convolutions.
        names: which ones: their names in `model.named_modules()`, or those of modules around them,
            with the wildcards of `fnmatch`: "layer3", "stages.[23]", "*.conv2".
        kind: "depthwise", "dense" (of one group) or "any".
        types: module types to replace. Subclasses, which may do more, have to be named.
        where: called with each name and convolution that is left; True to replace it.
        kernel_size: of the new layers, an int or (height, width); the padding follows it. None
            keeps each convolution's.
        init: "average" or "zero", as in `DCNv4`, where the convolution's weights are dropped. Or
            "kernel", for depthwise ones: a group for each channel, whose points weigh what the
            convolution's kernel does, and identities as projections, so that the model computes
            what it did until it is trained on.
        options: more keywords of `DCNv4Conv2d`: groups, dw_kernel_size, without_pointwise, ….

    Returns:
        The new layers by name. A convolution that has several names becomes one layer.

    Raises:
        TypeError, ValueError: nothing was selected, or a selected convolution cannot be replaced;
            the model is then as it was.

    Warns:
        UserWarning: the weights of these convolutions were dropped, so that the model has to be
            trained.

    Example:
        >>> import torch
        >>> from dcnv4 import convert
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 32, 3, padding=1),
        ...     torch.nn.Conv2d(32, 32, 3, padding=1, groups=32),
        ... )
        >>> list(convert(model, "1", init="kernel"))
        ['1']
        >>> model(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 32, 16, 16])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    check_choice("kind", kind, tuple(_KINDS))
    patterns = as_patterns("names", names)
    allowed = types if isinstance(types, (tuple, list)) else (types,)
    if not all(isinstance(one, type) and issubclass(one, nn.Conv2d) for one in allowed):
        raise TypeError(f"types must be torch.nn.Conv2d or subclasses of it; got {types!r}")
    modules = dict(model.named_modules(remove_duplicate=False))
    _check_patterns(patterns, modules)
    _check_options(options)
    stem = _stem(modules, patterns)
    chosen = {
        name: module
        for name, module in modules.items()
        if name
        and type(module) in allowed
        and any(matches(name, pattern) for pattern in patterns)
        and tuple(module.kernel_size) != (1, 1)
        and module is not stem
        and _KINDS[kind](module)
        and (where is None or where(name, module))
    }
    if not chosen:
        raise ValueError(
            "convert must select a convolution inside the model, larger than 1 x 1"
            f"{'' if stem is None else ', beside the first, which has to be named'}; got none for "
            f"names = {', '.join(patterns)}, kind = {kind!r}, "
            f"types = {', '.join(t.__name__ for t in allowed)}"
            f"{'' if where is None else ' and where'}"
        )
    layers: dict[nn.Module, DCNv4Conv2d] = {}
    for name, conv in chosen.items():
        if conv not in layers:
            layers[conv] = _deformable(name, conv, kernel_size, init, options)
    for name, conv in chosen.items():
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, layers[conv])
        _log.info("%s: %s is now %s", name, conv, layers[conv].extra_repr())
    if init != "kernel":
        warnings.warn(
            f"the weights of {_listed(chosen)} were dropped, and the model has to be trained; "
            "init='kernel' keeps those of depthwise convolutions",
            stacklevel=2,
        )
    return {name: layers[conv] for name, conv in chosen.items()}


def as_patterns(name: str, given: Any) -> Sequence[str]:
    """The patterns that an argument of this name gives: a string or a sequence of them."""
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, (tuple, list)) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"{name} must be a string or a sequence of them; got {given!r}")
    return patterns


def _check_patterns(patterns: Sequence[str], modules: Iterable[str]) -> None:
    for pattern in patterns:
        if not any(matches(name, pattern) for name in modules):
            depth = pattern.count(".")
            beside = [name for name in modules if name and name.count(".") == depth]
            raise ValueError(
                "names must match modules of the model: "
                f"{_listed(beside) or 'none so deep'}; got {pattern}"
            )


def _check_options(options: dict[str, Any]) -> None:
    for option in _KEPT:
        if option in options:
            raise TypeError(
                f"{option} must be left to each convolution, whose own is kept; "
                f"got {option} = {options[option]!r}"
            )


def _stem(modules: dict[str, nn.Module], patterns: Sequence[str]) -> nn.Conv2d | None:
    """The first convolution where it reads an image's channels and no pattern is its own name."""
    name, conv = next(((n, m) for n, m in modules.items() if isinstance(m, nn.Conv2d)), ("", None))
    if conv is None or conv.in_channels > 4 or conv.groups > 1 or conv.kernel_size == (1, 1):
        return None
    named = any(fnmatchcase(name, pattern) and pattern != "*" for pattern in patterns)
    return None if named else conv


def _listed(names: Iterable[str]) -> str:
    first, more = list(names)[:12], list(names)[12:]
    return ", ".join(first) + (f" and {len(more)} more" if more else "")


def matches(name: str, pattern: str) -> bool:
    """Whether a module or tensor of this name, or one around it, fits a pattern of `fnmatch`."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _deformable(
    name: str,
    conv: nn.Conv2d,
    kernel_size: int | Sequence[int] | None,
    init: str,
    options: dict[str, Any],
) -> DCNv4Conv2d:
    """The layer that takes the place of `conv`."""
    if conv.padding_mode != "zeros":
        raise ValueError(f"padding_mode of {name} must be 'zeros'; got {conv.padding_mode!r}")
    if conv._forward_hooks or conv._forward_pre_hooks:
        raise ValueError(f"{name} must have no forward hooks, which would be lost; got some")
    size = conv.kernel_size if kernel_size is None else check_pair("kernel_size", kernel_size, 1)
    carried = init == "kernel"
    if carried:
        options = {"groups": conv.groups, **options}
    layer = DCNv4Conv2d(
        conv.in_channels,
        conv.out_channels,
        size,
        conv.stride,
        [_padding(name, conv, axis, size[axis]) for axis in (0, 1)],
        conv.dilation,
        bias=conv.bias is not None,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
        init="zero" if carried else init,
        **options,
    )
    with torch.no_grad():
        if carried:
            _carry_kernel(name, conv, layer)
        if conv.bias is not None and layer.output_proj is not None:
            layer.output_proj.bias.copy_(conv.bias)
    return layer.train(conv.training)


def _padding(name: str, conv: nn.Conv2d, axis: int, kernel: int) -> int:
    """What keeps the output's size and the windows' centres with a kernel of this size."""
    span = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
    if isinstance(conv.padding, str):
        both = span if conv.padding == "same" else 0
    else:
        both = 2 * conv.padding[axis]
    both += conv.dilation[axis] * (kernel - 1) - span
    if both % 2 or both < 0:
        raise ValueError(
            f"kernel_size of {name} must leave the same padding >= 0 on both sides; got {kernel}, "
            f"which needs {both} pixels in all"
        )
    return both // 2


def _carry_kernel(name: str, conv: nn.Conv2d, layer: DCNv4Conv2d) -> None:
    """Give the points the convolution's weights, whatever the input."""
    window = layer.window
    if not _KINDS["depthwise"](conv) or window.kernel_size != conv.kernel_size:
        raise ValueError(
            "init = 'kernel' must meet depthwise convolutions that keep their kernel_size; got "
            f"{name} = {conv}"
        )
    plain = not window.softmax and not window.remove_center and window.offset_scale == 1
    if not plain or layer.center_feature_scale or window.groups != conv.groups:
        raise ValueError(
            f"init = 'kernel' must go with groups = {conv.groups} for {name}, and without softmax, "
            f"remove_center, offset_scale and center_feature_scale; got {layer.extra_repr()}"
        )
    if layer.output_proj is None and conv.bias is not None:
        raise ValueError(
            f"init = 'kernel' must keep the bias of {name}; got without_pointwise, which has none"
        )
    # Points run columns outermost.
    _, weights = window.split(layer.offset_mask.bias)
    weights.copy_(conv.weight[:, 0].transpose(1, 2).flatten(1))
    for projection in (layer.value_proj, layer.output_proj):
        if projection is not None:
            nn.init.eye_(projection.weight)
