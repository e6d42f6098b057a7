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
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import INCOMPLETE, folders, host_compiler
from .records import HEADER

_SOURCES = [
    Path(__file__).parent / name
    for name in ("kernels.cpp", "points.h", "vectors.h", "../include/sampling.h")
]
"""What is compiled, and what that includes."""

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi")
# Of the liberties with numbers only these two: nothing here reads errno or floating-point traps.
# Threaded jumps would split the loop over points into branches and keep it from becoming vectors.
_TUNING = ("-fno-math-errno", "-fno-trapping-math", "-fno-thread-jumps")
_NATIVE = (("-march=native",), ("-mcpu=native",), ())
_OPENMP = (("-fopenmp",), ("-pthread",))
_SECONDS = 120

_log = logging.getLogger("dcnv4")


class CompileError(Exception):
    """One sentence that says what is missing."""


def library(folder: str, flags: Sequence[str] = FLAGS) -> ctypes.CDLL:
    """The loaded kernels, from `folder` or compiled into it with `flags`.

    Where `folder` cannot be used, a folder of this process alone takes its place, with a warning.

    Raises:
        CompileError: the sources or a compiler are missing, it fails, or no folder can be used.
    """
    compiler = _compiler()
    native, predefined = _target(compiler)
    options = (*flags, *_TUNING, *native)
    key = hashlib.sha256(repr((compiler, options)).encode() + predefined + HEADER.encode())
    for source in _SOURCES:
        try:
            key.update(source.read_bytes())
        except OSError as error:
            raise CompileError(f"{INCOMPLETE}; got no {source.name}") from error
    stem = f"cpu-{key.hexdigest()[:32]}"
    root = folders.private(folder)
    if root is not None:
        try:
            return _library(compiler, options, root, stem)
        except OSError as error:
            folders.warn(root, error)
    try:
        return _library(compiler, options, folders.temporary(), stem)
    except OSError as error:
        raise CompileError(
            "needs a folder it can write and load libraries from (DCNV4_CACHE_DIR); got neither "
            f"{folder} nor a temporary one: {error.strerror or error}"
        ) from error


def _library(compiler: list[str], options: Sequence[str], root: Path, stem: str) -> ctypes.CDLL:
    """The library `stem` in `root`, compiled if it is not there."""
    found = _load(root, stem)
    if found is None:
        with _lock(root / f"{stem}.lock"):
            found = _load(root, stem)
            if found is None:
                _compile(compiler, options, root, stem)
                found = _load(root, stem)
    if found is None:
        raise OSError("a library that was written there does not load")
    return found


def _compiler() -> list[str]:
    """The command of the C++ compiler: that of `CXX`, or the first on the path."""
    try:
        named = shlex.split(host_compiler())
    except ValueError as error:
        raise CompileError(f"needs a command in CXX; got {host_compiler()}: {error}") from error
    candidates = [named] if named else [[name] for name in ("c++", "g++", "clang++")]
    for command in candidates:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    names = ", ".join(command[0] for command in candidates)
    raise CompileError(
        "needs a C++ compiler (apt install g++, xcode-select --install, conda install "
        f"cxx-compiler, or CXX = one's path); got none of {names}"
    )


def _target(compiler: list[str]) -> tuple[Sequence[str], bytes]:
    """The flags for this CPU, and all macros that the compiler then predefines."""
    for native in _NATIVE:
        done = _run([*compiler, *native, "-dM", "-E", "-x", "c++", os.devnull])
        if done.returncode == 0:
            return native, done.stdout
    raise CompileError(f"needs a compiler like g++ or clang++; got {compiler[0]}: {_said(done)}")


def _compile(compiler: list[str], options: Sequence[str], root: Path, stem: str) -> None:
    # A first call would seem to hang. Python prints warnings where no logging is set up.
    _log.warning(
        "dcnv4 compiles its CPU kernels with %s, about 5 seconds, and keeps them in %s",
        compiler[0],
        root,
    )
    with tempfile.TemporaryDirectory(prefix="cpu-", dir=root) as folder:
        built = Path(folder) / "kernels.so"
        Path(folder, "records.h").write_text(HEADER, encoding="utf-8")
        for openmp in _OPENMP:
            done = _run(
                [*compiler, *options, *openmp, f"-I{folder}", str(_SOURCES[0]), "-o", str(built)]
            )
            if done.returncode == 0:
                break
        else:
            raise CompileError(
                f"needs a compiler for C++17 with vectors; got {compiler[0]}: {_said(done)}"
            )
        built.chmod(0o700)  # without what the umask left to others
        built.replace(root / f"{stem}-{_digest(built.read_bytes())}.so")


def _load(root: Path, stem: str) -> ctypes.CDLL | None:
    """The library of this name, where there is a sound one; others are removed."""
    for path in root.glob(f"{stem}-*.so"):
        with contextlib.suppress(OSError):
            with contextlib.suppress(OSError), folders.opened(path) as file:
                if path.stem.endswith(_digest(file.read())):
                    return ctypes.CDLL(_name(path, file.fileno()))
            path.unlink()
    return None


def _name(path: Path, descriptor: int) -> str:
    """What the linker opens: the very file that was checked, whatever its folder has become.

    The copied descriptor stays open, because the linker knows a library by its name.
    """
    if not os.path.exists(f"/proc/self/fd/{descriptor}"):
        return str(path)
    return f"/proc/self/fd/{os.dup(descriptor)}"


def _digest(library: bytes) -> str:
    return hashlib.sha256(library).hexdigest()[:32]


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
    with path.open("a") as file:
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
