"""The CUDA backend on CPU tensors: its launches and kernels, compiled for an emulated GPU.

What the emulator knows of CUDA is in emulator/cuda.h. It shows that a kernel computes the right
numbers, meets its warp where it must and reads only aligned vectors; nothing of its speed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from dcnv4 import backends
from dcnv4.backends import cuda
from dcnv4.backends.cpu import compile as cpu_compile
from dcnv4.backends.cuda import choice, compile
from support import launches

_FOLDER = Path(__file__).parent / "emulator"
_MAIN = """
static Arguments arguments;
static void start() { %s(arguments); }
extern "C" void launch(unsigned blocks, unsigned threads, const void* bytes, int backwards,
                       int early, int shared) {
    emulated::backwards = backwards;
    emulated::early = early;
    emulated::dynamic = (char*)std::aligned_alloc(1024, shared + 1024);
    std::memset(emulated::dynamic, -1, shared + 1024);
    std::memcpy((void*)&arguments, bytes, sizeof arguments);
    emulated::run(start, blocks, threads);
    for (int i = 0; i < 1024; ++i)
        if (emulated::dynamic[shared + i] != -1) emulated::fail("shared memory is too small");
    std::free(emulated::dynamic);
}
"""
_FLAGS = (
    *("-std=c++17", "-O0", "-w", "-shared", "-fPIC", "-fpermissive"),
    *("-fsanitize=bounds", "-fsanitize-undefined-trap-on-error"),  # of arrays in registers
)
_DAY = 24 * 3600


def why_not() -> str | None:
    """What the emulator lacks here."""
    try:
        cpu_compile._compiler()
    except cpu_compile.CompileError as error:
        return str(error)
    return None


@cache
def _built() -> Path:
    """Where compiled kernels lie, for all processes: a folder for every state of the sources."""
    texts = [path.read_bytes() for path in sorted(_FOLDER.rglob("*.*h"))]
    key = repr((cpu_compile._compiler(), _FLAGS, compile._sources(), texts))
    folder = Path(backends.cache_dir(), "emulated", sha256(key.encode()).hexdigest()[:24])
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    for other in folder.parent.iterdir():
        if other.stat().st_mtime < time.time() - _DAY:
            shutil.rmtree(other, ignore_errors=True)
    return folder


@cache
def library(name: str, macros: compile.Macros) -> ctypes.CDLL:
    """The kernel `name`, compiled."""
    text = compile.source(name) + _MAIN % name
    built = _built() / f"{sha256(repr((text, macros)).encode()).hexdigest()[:24]}.so"
    if built.exists():
        return ctypes.CDLL(str(built))
    with TemporaryDirectory(dir=built.parent) as work:
        source, made = Path(work, f"{name}.cpp"), Path(work, f"{name}.so")
        source.write_text(text, encoding="utf-8")
        command = [
            *cpu_compile._compiler(),
            *_FLAGS,
            *("-include", str(_FOLDER / "cuda.h")),
            *(f"-I{folder}" for folder in (_FOLDER, compile._FOLDER, compile._INCLUDE)),
            *(f"-D{key}={macro}" for key, macro in macros),
            *(str(source), "-o", str(made)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        os.replace(made, built)
    return ctypes.CDLL(str(built))


def kernel(name: str, macros: compile.Macros, shared: int, backwards: bool) -> Any:
    """What starts kernel `name`."""
    launch = library(name, macros).launch

    def start(blocks: int, threads: int, stream: int, arguments: bytes, early: bool) -> None:
        launch(
            ctypes.c_uint(blocks),
            ctypes.c_uint(threads),
            arguments,
            int(backwards),
            int(early),
            ctypes.c_int(shared),
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
    properties.shared_memory_per_block_optin = 227 << 10
    backends._choose.cache_clear()
    with (
        launches.paying_from(choice.PAYS_FROM if pays_from is None else pays_from),
        mock.patch.multiple(cuda, why_not=lambda call: None, **patches),
        mock.patch.object(
            *(compile, "kernel"),
            lambda name, macros, index, shared: kernel(name, macros, shared, backwards),
        ),
        mock.patch.object(compile, "overlaps", return_value=True),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", return_value=0, create=True),
        mock.patch.object(torch._C, "_cuda_getDevice", return_value=-1, create=True),
    ):
        try:
            yield cuda
        finally:
            backends._choose.cache_clear()
