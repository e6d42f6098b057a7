"""Folders of compiled kernels: code that we load, so nobody else may be able to write it.

Ours have mode 0700 whatever the umask. A folder that is another user's (root's are fine), or that
others can write, is not used: one warning says so, and kernels are compiled without it.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO

_OURS = r"cpu-.*|cuda"
"""What the names of entries look like in the folder that `cache_dir` names."""
_PRIVATE = 0o700
_WIDE = 0o077
_WRITABLE = 0o022  # by the group or by everybody


def private(
    folder: str | Path, entries: str | None = _OURS, variable: str = "DCNV4_CACHE_DIR"
) -> Path | None:
    """The folder, made or tightened so that only this user writes it; None, with a warning, if not.

    Args:
        folder: an absolute path.
        entries: a regular expression. Of a folder that holds anything else the mode stays as it is,
            because it is not ours alone; None for a folder that is not to be tightened.
        variable: of the environment, which names another folder.
    """
    path = Path(folder)
    try:
        _claim(path, entries)
    except OSError as error:
        warn(folder, error, variable)
        return None
    return path


def warn(folder: str | Path, error: OSError, variable: str = "DCNV4_CACHE_DIR") -> None:
    """Say, once, why a folder is not used and what mends it."""
    _warn_once(
        f"the cache folder {folder} is not used, so every process compiles its kernels anew: "
        f"{error.strerror or error}; set {variable} to a folder that only you can write"
    )


@cache
def temporary() -> Path:
    """A folder of this process alone, which goes with it."""
    folder, process = tempfile.mkdtemp(prefix="dcnv4-"), os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # and not a forked child
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file, to be read.

    Raises:
        OSError: there is none, it is a link, another user's, or others can write it.
    """

    def plain(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))

    with open(path, "rb", opener=plain) as file:
        info = os.fstat(file.fileno())
        _check_owner(info)
        _check_mode(info)
        yield file


def read(path: Path) -> bytes:
    """What the file holds; nothing where it cannot be trusted or is not there."""
    with contextlib.suppress(OSError), opened(path) as file:
        return file.read()
    return b""


def write(path: Path, entry: bytes) -> None:
    """Keep an entry whole or not at all; a folder that takes none only costs time."""
    with contextlib.suppress(OSError):
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(entry)
            os.replace(unfinished, path)
        finally:
            Path(unfinished).unlink(missing_ok=True)


def _claim(folder: Path, entries: str | None) -> None:
    if not folder.is_absolute():
        raise OSError(errno.EINVAL, "it is no absolute path")
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        with contextlib.suppress(FileExistsError):
            missing.mkdir(_PRIVATE)
            missing.chmod(_PRIVATE)  # without what the umask took from its owner
    info = folder.stat()
    if not stat.S_ISDIR(info.st_mode):
        raise OSError(errno.ENOTDIR, "it is no folder")
    for owned in (folder.lstat(), info):  # a link, and where it leads
        _check_owner(owned)
    if entries is not None and _is_wide_and_ours(folder, info, entries):
        _tighten(folder, info)
        info = folder.stat()
    _check_mode(info)


def _check_owner(info: os.stat_result) -> None:
    if _user() not in (None, info.st_uid) and info.st_uid != 0:
        raise OSError(errno.EACCES, f"it belongs to user {info.st_uid}")


def _check_mode(info: os.stat_result) -> None:
    if _user() is not None and info.st_mode & _WRITABLE:
        raise OSError(errno.EACCES, "others can write it")


def _is_wide_and_ours(folder: Path, info: os.stat_result, entries: str) -> bool:
    meant_for_all = info.st_mode & stat.S_ISVTX  # as /tmp
    if info.st_uid != _user() or not info.st_mode & _WIDE or meant_for_all:
        return False
    return all(re.fullmatch(entries, name) for name in os.listdir(folder))


def _tighten(folder: Path, info: os.stat_result) -> None:
    """Shut others out, unless they have been there already."""
    folder.chmod(_PRIVATE)
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            owner = os.lstat(os.path.join(place, name)).st_uid
            if owner not in (0, info.st_uid):
                folder.chmod(stat.S_IMODE(info.st_mode))
                raise OSError(errno.EACCES, f"it holds what belongs to user {owner}; remove it")


def _user() -> int | None:
    """Who runs this process; None on Windows, whose access lists guard a user's folders."""
    return os.geteuid() if hasattr(os, "geteuid") else None


@cache
def _warn_once(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=4)
