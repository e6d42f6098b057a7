"""Compile `kernels.cpp` for this very CPU, once, and keep the library on disk.

The library's name holds a hash of the sources, the flags and everything that the compiler says it
predefines for this CPU, its own version included; and a hash of the library's bytes. So a folder
shared by different machines never serves a library that a CPU cannot run, and a damaged file is
noticed before it is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import host_compiler
from .records import HEADER

_SOURCE = Path(__file__).with_name("kernels.cpp")
_HEADERS = [*_SOURCE.parent.glob("*.h"), *_SOURCE.parents[1].glob("include/*.h")]

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi")
# Of the liberties with numbers only these two: nothing here reads errno or floating-point traps.
# Threaded jumps would split the loop over points into branches and keep it from becoming vectors.
_TUNING = ("-fno-math-errno", "-fno-trapping-math", "-fno-thread-jumps")
_NATIVE = (("-march=native",), ("-mcpu=native",), ())
_OPENMP = (("-fopenmp",), ("-pthread",))
_SECONDS = 120


class CompileError(Exception):
    """One sentence that says what is missing."""


def library(folder: str, flags: Sequence[str] = FLAGS) -> ctypes.CDLL:
    """The loaded kernels, from `folder` or compiled into it with `flags`.

    Raises:
        CompileError: there is no compiler, it fails, or `folder` cannot be written.
    """
    compiler = _compiler()
    native, predefined = _target(compiler)
    options = (*flags, *_TUNING, *native)
    key = hashlib.sha256(repr((compiler, options)).encode() + predefined + HEADER.encode())
    for source in (_SOURCE, *sorted(_HEADERS)):
        key.update(source.read_bytes())
    stem = f"cpu-{key.hexdigest()[:32]}"
    root = Path(folder)
    found = _load(root, stem)
    if found is not None:
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f"{stem}.lock"):
            found = _load(root, stem)
            if found is None:
                _compile(compiler, options, root, stem)
                found = _load(root, stem)
    except OSError as error:
        raise CompileError(
            f"needs a cache folder it can write, DCNV4_CACHE_DIR; got {folder}: {error.strerror}"
        ) from error
    if found is None:
        raise CompileError(f"needs a library that loads; got a damaged one in {folder}")
    return found


def _compiler() -> list[str]:
    """The command of the C++ compiler: that of `CXX`, or the first on the path."""
    named = shlex.split(host_compiler())
    candidates = [named] if named else [[name] for name in ("c++", "g++", "clang++")]
    for command in candidates:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    names = ", ".join(command[0] for command in candidates)
    raise CompileError(f"needs a C++ compiler (CXX, or c++ on the PATH); got none of {names}")


def _target(compiler: list[str]) -> tuple[Sequence[str], bytes]:
    """The flags for this CPU, and all macros that the compiler then predefines."""
    for native in _NATIVE:
        done = _run([*compiler, *native, "-dM", "-E", "-x", "c++", os.devnull])
        if done.returncode == 0:
            return native, done.stdout
    raise CompileError(f"needs a compiler like g++ or clang++; got {compiler[0]}: {_said(done)}")


def _compile(compiler: list[str], options: Sequence[str], root: Path, stem: str) -> None:
    with tempfile.TemporaryDirectory(prefix="cpu-", dir=root) as folder:
        built = Path(folder) / "kernels.so"
        Path(folder, "records.h").write_text(HEADER, encoding="utf-8")
        for openmp in _OPENMP:
            done = _run(
                [*compiler, *options, *openmp, f"-I{folder}", str(_SOURCE), "-o", str(built)]
            )
            if done.returncode == 0:
                break
        else:
            raise CompileError(
                f"needs a compiler for C++17 with vectors; got {compiler[0]}: {_said(done)}"
            )
        built.replace(root / f"{stem}-{_digest(built)}.so")


def _load(root: Path, stem: str) -> ctypes.CDLL | None:
    """The library of this name, where there is a sound one; damaged ones are removed."""
    for path in root.glob(f"{stem}-*.so"):
        with contextlib.suppress(OSError):
            if path.stem.endswith(_digest(path)):
                return ctypes.CDLL(str(path))
            path.unlink()
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"needs a working C++ compiler; got {command[0]}: {error}") from error


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    """The compiler's or the linker's first complaint."""
    lines = done.stderr.decode(errors="replace").splitlines()
    errors = [line for line in lines if "error" in line or "failed" in line] or lines
    return errors[0].strip() if errors else f"exit status {done.returncode}"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process compile while the others wait, but none of them forever.

    The lock falls with its process. Where files cannot be locked, all compile and the last wins.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break
        yield
