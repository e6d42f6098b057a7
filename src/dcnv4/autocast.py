"""Autocast around operators and products: whether it is on, and what it makes of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import _C, Tensor

from .geometry import sum_dtype
from .tracing import is_vmap

T = TypeVar("T")
_HAS_AUTOCAST_BY_DEVICE = hasattr(torch, "get_autocast_dtype")
AUTOCAST_KEYS = {
    device: key
    for device in ("cpu", "cuda", "mps", "xpu")
    if (key := getattr(_C.DispatchKey, f"Autocast{device.upper()}", None)) is not None
}


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


is_autocast_anywhere = getattr(_C, "_is_any_autocast_enabled", _is_some_autocast)
"""Whether it is on for some kind of device."""


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that autocast, where it is on, makes of a tensor before a projection reads it."""
    if tensor.dtype == torch.float64 or not is_autocast(tensor.device.type) or is_vmap():
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
