"""The backends: their names, which can run a call, and which one does.

Kernels are imported when a backend is first used, never before.
"""

from __future__ import annotations

import logging
import os
import warnings
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..geometry import Reference, Window

__all__ = ["NAMES", "Backend", "Call", "choose", "why_not"]

NAMES = ("cuda", "triton", "cpu", "reference")
"""Every backend, the one that `auto` prefers first."""


class Call(NamedTuple):
    """What a backend is asked to run: the operator, and of its tensors what matters to the choice.

    Example:
        >>> import torch
        >>> from dcnv4 import backends
        >>> backends.Call("deform_conv", torch.device("cpu"), torch.float32).deterministic
        False
    """

    op: str
    """`deform_conv` or `ms_deform_attn`."""
    device: torch.device
    """The device of the tensors."""
    dtype: torch.dtype
    """The dtype of the value."""
    deterministic: bool = False
    """Whether there will be gradients, which must have the same bits on every run."""


UNORDERED = (
    "needs torch.use_deterministic_algorithms(False) for gradients, which it adds up in any order; "
    "got True"
)
"""What a backend without a deterministic backward says to a call that must have one."""


INCOMPLETE = "needs all files of this package, outside of an archive (install dcnv4 again)"
"""What a backend says that does not find its kernels' sources."""


AttnGrads = tuple[Tensor | None, Tensor, Tensor]
"""Where a backward of attention writes the gradients of value, or None for a tensor of its own,
coordinates and weights: rows (b, q) evenly spaced and in themselves contiguous, the value's as a
whole."""


class Backend(Protocol):
    """What the module of every backend offers: `why_not`, and two passes of either operator.

    Tensors may have any strides. Coordinates (`offset_mask`, `coordinates`, `weights`, those of
    `reference`) have the value's dtype, or float32 beside a half-precision value. `spatial_shapes`
    is pairs (H, W) where the host knows them, and otherwise an integer tensor [L, 2] on the value's
    device or the CPU. Attention's `coordinates` are locations or, where there is `reference`,
    offsets from it. `deterministic`: the call runs under deterministic algorithms, and `why_not`
    allows it. Results are contiguous, or `out`: tensors that the gradients are written into,
    columns of a contiguous one. A gradient has the dtype and the shape of its input.
    """

    def why_not(self, call: Call) -> str | None: ...

    def conv_forward(
        self,
        value: Tensor,
        offset_mask: Tensor,
        window: Window,
        deterministic: bool = False,
    ) -> Tensor: ...

    def conv_backward(
        self,
        grad: Tensor,
        value: Tensor,
        offset_mask: Tensor,
        window: Window,
        deterministic: bool = False,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def attn_forward(
        self,
        value: Tensor,
        spatial_shapes: Tensor | Sequence[tuple[int, int]],
        coordinates: Tensor,
        weights: Tensor,
        softmax: bool,
        deterministic: bool = False,
        reference: Reference | None = None,
    ) -> Tensor: ...

    def attn_backward(
        self,
        grad: Tensor,
        value: Tensor,
        spatial_shapes: Tensor | Sequence[tuple[int, int]],
        coordinates: Tensor,
        weights: Tensor,
        softmax: bool,
        deterministic: bool = False,
        reference: Reference | None = None,
        out: AttnGrads | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@cache
def load(name: str) -> Backend:
    """The module of one backend. Its imports of kernels and compilers happen at first use."""
    return cast(Backend, import_module(f"{__name__}.{name}"))


def why_not(name: str, call: Call) -> str | None:
    """None where backend `name` can run `call`; otherwise one sentence that says why not.

    Example:
        >>> import torch
        >>> from dcnv4 import backends
        >>> call = backends.Call("deform_conv", torch.device("cpu"), torch.float32)
        >>> backends.why_not("cuda", call)
        'needs tensors on a CUDA GPU; got cpu'
    """
    try:
        return load(name).why_not(call)
    except Exception as error:  # of an installation that is broken in a way nobody thought of
        lines = str(error).splitlines() or [""]
        return f"needs a sound installation; got {type(error).__name__}: {lines[0]}"


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    deterministic: bool = False,
    backend: str | None = None,
) -> str:
    """The name of the backend that runs a call.

    Args:
        op, device, dtype: as in `Call`.
        deterministic: as in `Call`. With PyTorch's `warn_only=True`, a backend without a
            deterministic backward runs, with a warning.
        backend: a name out of `NAMES`, "auto", or None: the one of the environment variables.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the named backend cannot run the call. A named backend never falls back.

    Example:
        >>> import torch
        >>> from dcnv4 import backends
        >>> cpu = torch.device("cpu")
        >>> backends.choose("deform_conv", cpu, torch.float32, backend="reference")
        'reference'
    """
    name = requested(device.type) if backend is None else known("backend", backend)
    if not deterministic or not torch.is_deterministic_algorithms_warn_only_enabled():
        return _choose(op, device, dtype, deterministic, name)
    chosen = _choose(op, device, dtype, False, name)
    reason = why_not(chosen, Call(op, device, dtype, True))
    if reason is not None:
        warnings.warn(f"backend {chosen} of {op} {reason}", stacklevel=2)
    return chosen


# The choice is a constant of a traced graph: it depends on nothing that the graph computes.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


# `os.environ` takes a microsecond to say that these are not set, its dictionary a tenth of that.
_REQUESTS = [
    getattr(os.environ, "encodekey", str)(name) for name in ("DCNV4_BACKEND", "DCNV4_USE_TRITON")
]


def requested(device_type: str) -> str:
    """What the environment asks for on this kind of device: a backend's name or "auto"."""
    variables = getattr(os.environ, "_data", _REQUESTS)
    if _REQUESTS[0] not in variables and _REQUESTS[1] not in variables:
        return "auto"
    name = known("DCNV4_BACKEND", os.environ.get("DCNV4_BACKEND", "auto"))
    if name != "auto":
        return name
    triton = os.environ.get("DCNV4_USE_TRITON", "0")
    if triton not in ("0", "1"):
        raise ValueError(f"DCNV4_USE_TRITON must be 0 or 1; got {triton!r}")
    return "triton" if triton == "1" and device_type != "cpu" else "auto"


def cache_dir() -> str:
    """The folder that compiled kernels are kept in: `DCNV4_CACHE_DIR` or the user's cache.

    It is no absolute path where the variable names none, or where there is no home.
    """
    caches = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", ""))
    default = os.path.join(caches if os.path.isabs(caches) else "~/.cache", "dcnv4")
    return os.path.expanduser(os.environ.get("DCNV4_CACHE_DIR") or default)


def triton_cache_dir() -> tuple[str, bool]:
    """The folder that Triton keeps kernels in, and whether `TRITON_CACHE_DIR` names it."""
    home = os.environ.get("TRITON_HOME", os.path.expanduser("~"))
    default = os.path.join(home, ".triton", "cache")
    return os.environ.get("TRITON_CACHE_DIR", default), "TRITON_CACHE_DIR" in os.environ


def set_triton_cache_dir(folder: str) -> None:
    """Let Triton keep kernels in another folder, in this process and those that it starts."""
    os.environ["TRITON_CACHE_DIR"] = folder


def host_compiler() -> str:
    """The command that `CXX` names; empty where it names none."""
    return os.environ.get("CXX", "")


def environment() -> dict[str, str]:
    """The environment variables that are set and change what runs, with their values."""
    names = ("DCNV4_BACKEND", "DCNV4_USE_TRITON", "DCNV4_CACHE_DIR", "CXX", "TRITON_INTERPRET")
    return {name: os.environ[name] for name in names if name in os.environ}


def known(what: str, name: str) -> str:
    """`name`, which `what` was given as, if it is a backend or "auto"; otherwise a ValueError."""
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{what} must be one of {', '.join(('auto', *NAMES))}; got {name!r}")
    return name


@cache
def _say_slow(reason: str) -> None:
    """Say, once, what the backend for CPU tensors lacks."""
    # As measured on maps of 56 x 56 pixels and 64 channels.
    logging.getLogger("dcnv4").warning(
        "dcnv4 runs 12 times slower forward and 30 times backward, without its CPU kernels: the "
        "cpu backend %s",
        reason,
    )


@cache
def _choose(
    op: str, device: torch.device, dtype: torch.dtype, deterministic: bool, name: str
) -> str:
    call = Call(op, device, dtype, deterministic)
    # Triton's interpreter takes CPU tensors when it is asked to, but it is no backend to prefer.
    fit = [n for n in NAMES if n != "triton" or call.device.type != "cpu"]
    for candidate in fit if name == "auto" else (name,):
        if why_not(candidate, call) is None:
            if candidate == "reference" and name == "auto" and device.type == "cpu":
                _say_slow(str(why_not("cpu", call)))
            return candidate
    reasons = "".join(f"\n  {key}: {why_not(key, call) or 'usable'}" for key in NAMES)
    raise RuntimeError(
        f"backend {name} cannot run {call.op} on {call.device} in {call.dtype}"
        f"{' with deterministic gradients' if call.deterministic else ''}:{reasons}"
    )
