"""The first numbers of parameters. Modules that were saved whole know these functions by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .geometry import Window

Initializer = Callable[[Tensor], Any]
"""What gives a parameter its first numbers, in place."""


@torch.no_grad()
def initialize(
    weight: Initializer, bias: Initializer, parameters: dict[str, nn.Parameter | None]
) -> None:
    """Give a module's weight and bias, of those that it has, their first numbers."""
    for name, first in (("weight", weight), ("bias", bias)):
        if (parameter := parameters.get(name)) is not None:
            first(parameter)


def average(window: Window, bias: Tensor) -> None:
    """Of an `offset_mask`: no offsets, and weights 1/K."""
    numbers = torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
    window.split(numbers)[1].fill_(1 / window.points())
    _copy(numbers, bias)


def rays(levels: int, points: int, bias: Tensor) -> None:
    """Of attention's offsets: a direction for each head, and point p at p + 1 pixels along it."""
    heads = bias.shape[0] // (2 * levels * points)
    angles = torch.arange(heads) * (2 * math.pi / heads)
    directions = torch.stack((angles.cos(), angles.sin()), -1)
    directions /= directions.abs().amax(-1, keepdim=True)
    radial = directions[:, None, None] * torch.arange(1, points + 1)[:, None]
    _copy(radial.expand(-1, levels, -1, -1).flatten(), bias)


def _copy(numbers: Tensor, parameter: Tensor) -> None:
    """Of a DTensor, this process copies its part."""
    if (mesh := getattr(parameter, "device_mesh", None)) is not None:
        whole = numbers.to(parameter.device)
        numbers = type(parameter).from_local(whole, mesh, run_check=False)  # type: ignore[attr-defined]
    parameter.copy_(numbers)
