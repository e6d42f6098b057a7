"""The checks of a user's arguments: each returns what is right, and says of what is not how it is.

A tensor's shape, where other arguments decide it, is checked where they meet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from . import backends
from .geometry import Window
from .tracing import is_traced, is_traced_by_jit, traced_levels

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def window(
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 4,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> Window:
    """The checked settings of a `deform_conv`, as its arguments of the same names."""
    settings = Window(
        check_pair("kernel_size", kernel_size, 1),
        check_pair("stride", stride, 1),
        check_pair("padding", padding, 0),
        check_pair("dilation", dilation, 1),
        check_integer("groups", groups, 1),
        check_finite("offset_scale", offset_scale),
        check_flag("remove_center", remove_center),
        check_flag("softmax", softmax),
    )
    if remove_center and settings.points() == 0:
        raise ValueError(
            "remove_center must leave a point; got kernel_size (1, 1), whose one it is"
        )
    return settings


def check_levels(
    spatial_shapes: Tensor | Sequence[Sequence[int]], levels: int, length: int, device: torch.device
) -> Tensor | list[tuple[int, int]]:
    """The level sizes as backends take them: a tensor left where it is, or pairs (H, W)."""
    if is_traced_by_jit():
        spatial_shapes = traced_levels(spatial_shapes)
    if isinstance(spatial_shapes, Tensor):
        check_sizes("spatial_shapes", spatial_shapes, levels)
        if spatial_shapes.device.type != "cpu" and spatial_shapes.device != device:
            raise ValueError(
                "spatial_shapes must be on the CPU"
                f"{'' if device.type == 'cpu' else f' or {device}'}; got {spatial_shapes.device}"
            )
        if spatial_shapes.device.type != "cpu" or is_traced(spatial_shapes):
            return spatial_shapes
        spatial_shapes = spatial_shapes.tolist()
    pairs: list[tuple[int, int]] = check_sizes("spatial_shapes", spatial_shapes, levels)
    total = 0
    for height, width in pairs:
        total += height * width
    if total != length:
        raise ValueError(
            f"spatial_shapes must add up to S = {length} pixels, as in value; got {pairs}, "
            f"which is {total}"
        )
    return pairs


def check_sizes(name: str, spatial_shapes: Tensor | Sequence[Sequence[int]], levels: int) -> Any:
    """What levels are large by themselves: a tensor [L, 2] of integers, or pairs of them."""
    rule = f"{name} must be L = {levels} pairs (H, W)"
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.dtype not in _INTEGERS:
            raise TypeError(f"{rule} of an integer dtype; got {spatial_shapes.dtype}")
        if spatial_shapes.shape != (levels, 2):
            raise ValueError(f"{rule}; got a tensor {list(spatial_shapes.shape)}")
        return spatial_shapes
    try:
        pairs = [(height, width) for height, width in spatial_shapes]
    except (TypeError, ValueError):
        raise TypeError(f"{rule}; got {spatial_shapes!r}") from None
    for height, width in pairs:
        check_integer(name, height, 0)
        check_integer(name, width, 0)
    if len(pairs) != levels:
        raise ValueError(f"{rule}; got {len(pairs)}")
    return pairs


def check_reference_points(
    reference_points: Any, whole: tuple[int, int, int], value: Tensor | None = None
) -> None:
    """Check that they are points or boxes for (B, Q, L); on the value's device, if it is given."""
    layout = "[B, Q, L, 2 or 4]"
    check_tensor("reference_points", reference_points, layout, (4,), value)
    given = reference_points.shape
    # `in` would not ask a tracer whether its sizes are these.
    fits = all(one == all_ or one == 1 for one, all_ in zip(given[:3], whole, strict=True))
    if not fits or (given[3] != 2 and given[3] != 4):
        raise ValueError(
            f"reference_points must be {layout} = {[*whole, 2]} or {[*whole, 4]}, or 1 in place of "
            f"B, Q or L; got {list(given)}"
        )


def check_shape(shape: Any) -> None:
    """Check that it is (H, W)."""
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise TypeError(f"shape must be (H, W); got {shape!r}")
    for size in shape:
        if not isinstance(size, Tensor):  # as a tracer has it
            check_integer("shape", size, 0)


def check_backend(backend: str | None) -> str | None:
    """A backend's name as an operator takes it, or None for the environment's choice."""
    return None if backend is None else backends.known("backend", backend)


def check_tensor(
    name: str, argument: Any, layout: str, dimensions: tuple[int, ...], value: Tensor | None = None
) -> None:
    """Check type, dtype, number of dimensions and, beside `value`, device of a tensor."""
    if not isinstance(argument, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}; got {type(argument).__name__}")
    if argument.dtype not in _DTYPES:
        raise TypeError(
            f"{name} must be float64, float32, bfloat16 or float16; got {argument.dtype}"
        )
    if argument.dim() not in dimensions:
        raise ValueError(f"{name} must be {layout}; got {list(argument.shape)}")
    if value is not None and argument.device != value.device:
        raise ValueError(f"{name} must be on value's device {value.device}; got {argument.device}")


def check_integer(name: str, argument: Any, least: int) -> int:
    if type(argument) is int and argument >= least:
        return argument
    if isinstance(argument, Tensor) and is_traced_by_jit():
        argument = argument.item()
    if not isinstance(argument, (int, torch.SymInt, Integral)) or isinstance(argument, bool):
        raise TypeError(f"{name} must be an integer >= {least}; got {argument!r}")
    if argument < least:
        raise ValueError(f"{name} must be an integer >= {least}; got {argument}")
    return argument  # type: ignore[return-value]


def check_pair(name: str, argument: Any, least: int) -> tuple[int, int]:
    if type(argument) is int and argument >= least:  # what follows costs microseconds
        return argument, argument
    if isinstance(argument, (tuple, list)):
        if len(argument) != 2:
            raise ValueError(f"{name} must be an int or (height, width); got {argument!r}")
        return check_integer(name, argument[0], least), check_integer(name, argument[1], least)
    return (check_integer(name, argument, least),) * 2


def check_finite(name: str, argument: Any) -> float:
    if type(argument) is float and -math.inf < argument < math.inf:
        return argument
    if not isinstance(argument, Real) or isinstance(argument, bool):
        raise TypeError(f"{name} must be a number; got {argument!r}")
    number = float(argument)
    if not -math.inf < number < math.inf:  # as a tracer can ask it of a symbol
        raise ValueError(f"{name} must be finite; got {argument}")
    return number


def check_flag(name: str, argument: Any) -> bool:
    if not isinstance(argument, bool):
        raise TypeError(f"{name} must be True or False; got {argument!r}")
    return argument


def check_choice(name: str, argument: Any, choices: Sequence[str]) -> str:
    listed = f"one of {', '.join(choices)}" if choices[2:] else " or ".join(map(repr, choices))
    rule = f"{name} must be {listed}; got {argument!r}"
    if not isinstance(argument, str):
        raise TypeError(rule)
    if argument not in choices:
        raise ValueError(rule)
    return argument


def check_divides(name: str, argument: int, whole: int, what: str) -> None:
    if whole % argument:
        raise ValueError(f"{name} must divide {what}; got {argument}")


def factory(device: Any, dtype: Any) -> dict[str, Any]:
    """Where a layer's parameters are made and in which dtype, as PyTorch's modules take it."""
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(f"dtype must be float64, float32, bfloat16 or float16; got {dtype!r}")
    return {"device": device, "dtype": dtype}
