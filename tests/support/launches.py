"""What runs: which backend computes a call; which kernels of CUDA's, on a GPU or on the emulator,
and what tiles leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dcnv4 import backends
from dcnv4.backends import cuda
from dcnv4.backends.cuda import choice, compile, plans
from support import cases

ZEROS, FIXED_POINT_SCALE, CONVERT_SUMS = "zeros", "fixed_point_scale", "convert_sums"
KERNELS = set(compile.KERNELS)
"""All entry names."""
_LEFTOVER = "_leftover"
"""The backend's function that makes the tensor in which tiles are noted that a launch leaves."""

DIRECT: dict[str, int] = {}
EVERY = dict.fromkeys(choice.PAYS_FROM, 0)
SORTED = {name: 0 for name in EVERY if "sorted" in name}
"""From how many slices on kernels for large calls are used: never, always, if they sort."""


def forget_plans() -> None:
    """What was planned under other settings."""
    for remembered in vars(plans).values():
        if hasattr(remembered, "cache_clear"):
            remembered.cache_clear()


@contextmanager
def paying_from(slices: dict[str, int]) -> Iterator[None]:
    """Kernels for large calls are meanwhile used from these numbers of slices on."""
    forget_plans()
    with mock.patch.object(choice, "PAYS_FROM", slices):
        try:
            yield
        finally:
            forget_plans()


class Launches:
    """What ran."""

    def __init__(self) -> None:
        self.variants: list[tuple[str, dict[str, str]]] = []
        """Every launch: the kernel's entry name and its macros."""
        self.leftovers: list[Tensor] = []

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.variants]

    @property
    def computed(self) -> list[float]:
        """Of every launch of a tile kernel, the share of tiles that it did not leave."""
        return [float(1 - tensor.float().mean()) for tensor in self.leftovers]


@contextmanager
def recorded() -> Iterator[Launches]:
    """Every launch is noted, whether or not its kernel was compiled before."""
    launches = Launches()
    load, leftover = compile.kernel, getattr(cuda, _LEFTOVER)

    def kernel(name: str, macros: compile.Macros, index: int, shared: int) -> Any:
        start = load(name, macros, index, shared)

        def noted(*arguments: Any) -> None:
            launches.variants.append((name, dict(macros)))
            start(*arguments)

        return noted

    def left(*arguments: Any) -> Tensor | None:
        tensor: Tensor | None = leftover(*arguments)
        if tensor is not None:
            launches.leftovers.append(tensor)
        return tensor

    forget_plans()
    with mock.patch.object(compile, "kernel", kernel), mock.patch.object(cuda, _LEFTOVER, left):
        try:
            yield launches
        finally:
            forget_plans()


@contextmanager
def launching(*names: str) -> Iterator[Launches]:
    """Fails unless each of these kernels runs, and no other."""
    with recorded() as launches:
        yield launches
    ran = set(launches.names)
    assert ran == set(names), f"kernels {sorted(ran)} ran; {sorted(names)} should have"


@contextmanager
def computing(backend: str, case: cases.Case) -> Iterator[None]:
    """Fails unless this backend computes a case's forward and backward, and no other one."""
    operator = "conv" if isinstance(case, cases.ConvCase) else "attn"
    ran: set[str] = set()

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            ran.add(f"{name}.{function.__name__}")
            return function(*arguments, **named)

        return call

    with ExitStack() as patches:
        for name in backends.NAMES:
            module = backends.load(name)
            for direction in ("conv_forward", "conv_backward", "attn_forward", "attn_backward"):
                function = noted(name, getattr(module, direction))
                patches.enter_context(mock.patch.object(module, direction, function))
        yield
    assert ran == {f"{backend}.{operator}_{direction}" for direction in ("forward", "backward")}


def expected(
    case: cases.Case,
    dtype: torch.dtype,
    slices: dict[str, int] = DIRECT,
    deterministic: bool = False,
) -> set[str]:
    """The kernels of a case's forward and backward, under `paying_from`, for a case that tiles take
    where they are used for convolutions, or that sorting takes.

    float64, which the value becomes beside coordinates of that, is not sorted, nor are groups of 48
    channels.
    """
    dtype = torch.float64 if torch.float64 in case.dtypes(dtype) else dtype
    conv = isinstance(case, cases.ConvCase)
    operator = "conv" if conv else "attn"
    if case.points * case.depth == 0 or 0 in case.exact[0].shape:
        return set()
    sorts = bool(slices) and dtype != torch.float64 and case.depth in (16, 32, 64)
    names = {f"{operator}_forward", f"{operator}_{'sorted_' if sorts else ''}backward"}
    if conv and "conv_tile_forward" in slices:
        names |= {"conv_tile_forward", "conv_tile_backward"}
    if deterministic:
        names.add(FIXED_POINT_SCALE)
    elif not (conv and case.is_one_tensor) or torch.finfo(dtype).bits == 16:
        names.add(ZEROS)  # PyTorch's own are in a part of one tensor
    if deterministic or torch.finfo(dtype).bits == 16:
        names.add(CONVERT_SUMS)
    return names
