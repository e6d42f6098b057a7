"""The CUDA backend on CPU tensors: its launches and kernels, compiled for an emulated GPU.

What the emulator knows of CUDA is in emulator/cuda.h. It shows that a kernel computes the right
numbers, meets its warp where it must and reads only aligned vectors; nothing of its speed.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from dcnv4 import backends
from dcnv4.backends import cuda
from dcnv4.backends.cpu import compile as cpu_compile
from dcnv4.backends.cuda import choice, compile, plans

_FOLDER = Path(__file__).parent / "emulator"
_MAIN = """
static Arguments arguments;
static void start() { %s(arguments); }
extern "C" void launch(unsigned blocks, unsigned threads, const void* bytes, int backwards,
                       int early) {
    emulated::backwards = backwards;
    emulated::early = early;
    std::memcpy((void*)&arguments, bytes, sizeof arguments);
    emulated::run(start, blocks, threads);
}
"""


def why_not() -> str | None:
    """What the emulator lacks here."""
    try:
        cpu_compile._compiler()
    except cpu_compile.CompileError as error:
        return str(error)
    return None


@cache
def _folder() -> Path:
    return Path(mkdtemp(prefix="dcnv4-emulated-"))


@cache
def library(name: str, macros: compile.Macros) -> ctypes.CDLL:
    """The kernel `name`, compiled."""
    text = compile.source(name) + _MAIN % name
    key = sha256(repr((name, macros)).encode()).hexdigest()[:24]
    source, built = _folder() / f"{key}.cpp", _folder() / f"{key}.so"
    source.write_text(text, encoding="utf-8")
    folders = (_FOLDER, compile._FOLDER, compile._INCLUDE)
    command = [
        *cpu_compile._compiler(),
        *("-std=c++17", "-O0", "-w", "-shared", "-fPIC", "-fpermissive"),
        *("-include", str(_FOLDER / "cuda.h")),
        *(f"-I{folder}" for folder in folders),
        *(f"-D{key}={macro}" for key, macro in macros),
        *(str(source), "-o", str(built)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(built))


def kernel(name: str, macros: compile.Macros, backwards: bool) -> Any:
    """What starts kernel `name`."""
    launch = library(name, macros).launch

    def start(blocks: int, threads: int, stream: int, arguments: bytes, early: bool) -> None:
        launch(
            ctypes.c_uint(blocks),
            ctypes.c_uint(threads),
            arguments,
            int(backwards),
            int(early),
        )

    return start


@contextmanager
def emulated(
    backwards: bool = False, pays_from: dict[str, int] | None = None, **patches: Any
) -> Iterator[ModuleType]:
    """The CUDA backend as it is on a GPU of compute capability 9.0, for CPU tensors.

    Args:
        backwards: whether the last thread of a block runs first.
        pays_from: of `choice`, meanwhile.
        patches: what attributes of the backend are meanwhile.
    """
    # So few processors that blocks go on from one piece of work to the next.
    properties = SimpleNamespace(multi_processor_count=1, major=9, minor=0)
    caches = (
        plans.conv_plan,
        plans.attn_plan,
        plans.fixed_point_scale_plan,
        plans.zeros_plan,
        plans.convert_sums_plan,
        backends._choose,
    )
    for cached in caches:
        cached.cache_clear()
    with (
        mock.patch.multiple(cuda, why_not=lambda call: None, **patches),
        mock.patch.object(
            choice, "PAYS_FROM", choice.PAYS_FROM if pays_from is None else pays_from
        ),
        mock.patch.object(
            compile, "kernel", lambda name, macros, index: kernel(name, macros, backwards)
        ),
        mock.patch.object(compile, "overlaps", return_value=True),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", return_value=0, create=True),
        mock.patch.object(torch._C, "_cuda_getDevice", return_value=-1, create=True),
    ):
        try:
            yield cuda
        finally:
            for cached in caches:
                cached.cache_clear()
