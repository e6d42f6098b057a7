"""Folders of compiled kernels, which are code: whose they are, who can write them, what is done."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dcnv4 import backends
from dcnv4.backends import folders
from dcnv4.backends.cpu import compile as cpp
from dcnv4.backends.cuda import compile as nvrtc

pytestmark = pytest.mark.skipif(
    not hasattr(os, "geteuid"), reason=f"needs owners and modes of files; got {sys.platform}"
)
STRANGER = getattr(os, "geteuid", int)() + 12345
as_root = pytest.mark.skipif(
    getattr(os, "geteuid", int)() != 0, reason="needs root, to make files that are another user's"
)


@pytest.fixture(autouse=True)
def forget_warnings() -> Iterator[None]:
    folders._warn_once.cache_clear()
    yield
    folders._warn_once.cache_clear()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir(0o700)
    return folder


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def refused(folder: Path | str, *arguments: Any) -> str:
    """The warning with which a folder is not used."""
    with pytest.warns(UserWarning, match="is not used, so every process compiles") as caught:
        assert folders.private(folder, *arguments) is None
    (warning,) = caught
    assert f"the cache folder {folder} " in str(warning.message)
    return str(warning.message)


# Whose folder it is, and its mode.


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777])
def test_folders_are_made_private(tmp_path: Path, mask: int) -> None:
    """Those around them too, since who writes there can put another in their place."""
    folder = tmp_path / "around" / "cache"
    before = os.umask(mask)
    try:
        assert folders.private(folder) == folder
    finally:
        os.umask(before)
    assert mode(folder) == mode(folder.parent) == 0o700


@pytest.mark.parametrize("wide", [0o777, 0o755, 0o770, 0o701])
def test_a_wide_folder_of_ours_is_tightened(cache: Path, wide: int) -> None:
    (cache / "cuda").mkdir()
    (cache / "cpu-0123.lock").touch()
    cache.chmod(wide)
    assert folders.private(cache) == cache
    assert mode(cache) == 0o700


@pytest.mark.parametrize(("wide", "used"), [(0o755, True), (0o775, False), (0o757, False)])
def test_a_folder_with_other_things_keeps_its_mode(cache: Path, wide: int, used: bool) -> None:
    """Such as a home: nobody asked for it to be shut."""
    (cache / "notes.txt").touch()
    cache.chmod(wide)
    if used:
        assert folders.private(cache) == cache
    else:
        assert "others can write it" in refused(cache)
    assert mode(cache) == wide


def test_a_folder_for_everybody_keeps_its_mode(cache: Path) -> None:
    """As /tmp, also where it is empty and ours, because we are root."""
    cache.chmod(0o1777)
    assert "others can write it" in refused(cache)
    assert mode(cache) == 0o1777


def test_a_folder_that_is_not_to_be_tightened(cache: Path) -> None:
    cache.chmod(0o775)
    assert "set TRITON_CACHE_DIR to a folder" in refused(cache, None, "TRITON_CACHE_DIR")
    assert mode(cache) == 0o775


def test_a_folder_of_another_user(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(cache, STRANGER, STRANGER)
    else:
        monkeypatch.setattr(folders, "_user", lambda: STRANGER)
    assert f"it belongs to user {cache.stat().st_uid}" in refused(cache)


def test_roots_folders_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/usr").stat().st_uid != 0 or mode(Path("/usr")) & 0o022:
        pytest.skip("needs a /usr that only root writes")
    monkeypatch.setattr(folders, "_user", lambda: STRANGER)
    assert folders.private("/usr") == Path("/usr")


@as_root
def test_a_link_of_another_user(cache: Path, tmp_path: Path) -> None:
    """It leads to a folder of ours now, and elsewhere when its owner likes."""
    link = tmp_path / "link"
    link.symlink_to(cache)
    assert folders.private(link) == link
    os.lchown(link, STRANGER, STRANGER)
    assert f"it belongs to user {STRANGER}" in refused(link)


@as_root
def test_a_wide_folder_in_which_somebody_was(cache: Path) -> None:
    (cache / "cuda").mkdir()
    planted = cache / "cuda" / "planted"
    planted.touch()
    os.chown(planted, STRANGER, STRANGER)
    cache.chmod(0o777)
    assert f"holds what belongs to user {STRANGER}" in refused(cache)
    assert mode(cache) == 0o777


def test_places_that_are_no_folder(tmp_path: Path) -> None:
    file, dangling = tmp_path / "file", tmp_path / "dangling"
    file.touch()
    dangling.symlink_to("nowhere")
    assert "it is no folder" in refused(file)
    assert "Not a directory" in refused(file / "cache")
    assert "No such file" in refused(dangling)
    assert not (tmp_path / "nowhere").exists()


def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("cache", "", "~/.cache/dcnv4"):
        assert "it is no absolute path" in refused(place)
    assert not list(tmp_path.iterdir())


def test_the_same_warning_is_given_once(tmp_path: Path) -> None:
    refused("relative")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert folders.private("relative") is None
    refused("another")


def test_a_system_without_owners(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no such modes: they say 0777 of everything."""
    monkeypatch.delattr(os, "geteuid")
    cache.chmod(0o777)
    assert folders.private(cache) == cache
    folders.write(cache / "entry", b"code")
    (cache / "entry").chmod(0o666)
    assert folders.read(cache / "entry") == b"code"


CACHES = {
    "named": ({"DCNV4_CACHE_DIR": "/named", "XDG_CACHE_HOME": "/caches"}, "/named"),
    "in the home": ({"DCNV4_CACHE_DIR": "~/named"}, "/home/me/named"),
    "an empty name": ({"DCNV4_CACHE_DIR": ""}, "/home/me/.cache/dcnv4"),
    "XDG": ({"XDG_CACHE_HOME": "/caches"}, "/caches/dcnv4"),
    "an empty XDG": ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/dcnv4"),
    "a relative XDG": ({"XDG_CACHE_HOME": "caches"}, "/home/me/.cache/dcnv4"),
}


@pytest.mark.parametrize("case", CACHES)
def test_where_the_cache_is(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, expected = CACHES[case]
    for name in ("DCNV4_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert backends.cache_dir() == expected


# Files.


def replaced(path: Path, with_what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put something that is not to be read in the place of an entry of the same bytes."""
    if with_what == "writable":
        path.chmod(0o620)
    elif with_what == "link":
        shutil.copy(path, path.with_name("behind"))
        path.unlink()
        path.symlink_to("behind")
    elif with_what == "folder":
        path.unlink()
        path.mkdir()
    elif with_what == "pipe":
        path.unlink()
        os.mkfifo(path, 0o600)
    elif os.geteuid() == 0:
        os.chown(path, STRANGER, STRANGER)
    else:
        monkeypatch.setattr(folders, "_user", lambda: STRANGER)


REPLACED = pytest.mark.parametrize("what", ["writable", "link", "folder", "pipe", "another's"])


@REPLACED
def test_a_file_that_is_not_ours_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path = cache / "entry"
    folders.write(path, b"code")
    assert folders.read(path) == b"code"
    assert mode(path) == 0o600
    replaced(path, what, monkeypatch)
    assert folders.read(path) == b""


# The cpu backend.


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Where libraries with nothing in them were built instead of the kernels, in no time."""
    try:
        compiler = cpp._compiler()
    except cpp.CompileError as error:
        pytest.skip(f"the cpu backend {error}")
    places: list[Path] = []
    plain = cpp._run

    def run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
        if "-o" not in command:
            return plain(command)
        built = Path(command[-1])
        places.append(built.parents[1])
        return plain([*compiler, "-shared", "-fPIC", "-x", "c++", os.devnull, "-o", str(built)])

    monkeypatch.setattr(cpp, "_run", run)
    temporary = tmp_path / "temporary"
    temporary.mkdir(0o700)
    monkeypatch.setattr(folders, "temporary", lambda: temporary)
    return places


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_a_library_is_written_by_us_alone(compiled: list[Path], cache: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        cpp.library(str(cache))
    finally:
        os.umask(before)
    cpp.library(str(cache))
    assert compiled == [cache]
    (entry,) = cache.glob("*.so")
    assert mode(entry) == 0o700


def test_compiling_is_announced(
    compiled: list[Path], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        cpp.library(str(cache))
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("dcnv4 compiles its CPU kernels with ")
    assert said.endswith(f"about 5 seconds, and keeps them in {cache}")


@REPLACED
def test_a_library_that_is_not_ours_alone_is_built_again(
    compiled: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "another's" and os.geteuid() != 0:
        pytest.skip("needs root, to make files that are another user's")
    cpp.library(str(cache))
    (entry,) = cache.glob("*.so")
    replaced(entry, what, monkeypatch)
    loaded: list[Path] = []
    monkeypatch.setattr(cpp, "_name", lambda path, _: loaded.append(path) or str(path))
    if what == "folder":  # which no file can replace
        with pytest.warns(UserWarning, match="is not used"):
            cpp.library(str(cache))
        assert compiled == [cache, cache, cache.with_name("temporary")]
        return
    cpp.library(str(cache))
    assert compiled == [cache, cache]
    assert loaded == [entry]
    assert mode(entry) == 0o700
    assert entry.is_file()
    assert not entry.is_symlink()


def test_a_refused_folder_costs_no_backend(compiled: list[Path], cache: Path) -> None:
    cache.chmod(0o1777)
    with pytest.warns(UserWarning, match="others can write it; set DCNV4_CACHE_DIR"):
        cpp.library(str(cache))
    cpp.library(str(cache))  # where a second warning would be an error
    assert compiled == [cache.with_name("temporary")]
    assert not list(cache.iterdir())


def test_threads_share_the_temporary_library(compiled: list[Path]) -> None:
    with pytest.warns(UserWarning, match="is not used"), ThreadPoolExecutor(4) as pool:
        list(pool.map(cpp.library, ["relative"] * 4))
    assert len(compiled) == 1


def test_a_folder_that_nothing_loads_from(
    compiled: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is mounted `noexec`."""
    plain = cpp._name

    def name(path: Path, descriptor: int) -> str:
        if path.parent == cache:
            raise OSError("failed to map segment from shared object")
        return plain(path, descriptor)

    monkeypatch.setattr(cpp, "_name", name)
    with pytest.warns(UserWarning, match="a library that was written there does not load"):
        cpp.library(str(cache))
    assert compiled == [cache, cache.with_name("temporary")]


def test_without_any_folder(compiled: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "temporary", lambda: Path("/dev/null"))
    with (
        pytest.warns(UserWarning, match="is not used"),
        pytest.raises(cpp.CompileError, match=r"^needs a folder it can write.*: Not a directory$"),
    ):
        cpp.library("/dev/null/cache")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux' /proc/self/fd")
def test_the_file_that_was_checked_is_the_one_that_is_loaded(
    compiled: list[Path], cache: Path
) -> None:
    """Also where another has taken its place meanwhile."""
    cpp.library(str(cache))
    (entry,) = cache.glob("*.so")
    source = cache / "other.cpp"
    source.write_text('extern "C" int other() { return 1; }\n')
    with folders.opened(entry) as file:
        command = [*cpp._compiler(), "-shared", "-fPIC", str(source), "-o", str(cache / "other.so")]
        subprocess.run(command, check=True)
        (cache / "other.so").replace(entry)
        loaded = ctypes.CDLL(cpp._name(entry, file.fileno()))
    assert not hasattr(loaded, "other")
    assert hasattr(ctypes.CDLL(str(entry)), "other")


def test_the_temporary_folder_goes_with_its_process() -> None:
    """And not with a child that was forked from it."""
    script = """
import os, sys
from dcnv4.backends import folders
folder = folders.temporary()
assert folder == folders.temporary()
assert folder.stat().st_mode & 0o777 == 0o700
if os.fork() == 0:
    sys.exit()
os.wait()
assert folder.exists()
print(folder)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.strip()).exists()


# The cuda and triton backends.


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], int]:
    """How often a kernel is compiled for two calls with this cache."""
    compilations: list[str] = []
    monkeypatch.setattr(nvrtc, "compile", lambda name, *_: compilations.append(name) or b"code")
    monkeypatch.setattr(nvrtc, "_nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "_driver_version", lambda: None)

    def count(cache: Path) -> int:
        monkeypatch.setenv("DCNV4_CACHE_DIR", str(cache))
        before = len(compilations)
        for _ in range(2):
            assert nvrtc.cached("conv_forward", (), "sm_90") == b"code"
        return len(compilations) - before

    return count


def test_cuda_keeps_kernels(cached: Callable[[Path], int], cache: Path) -> None:
    assert (cached(cache), cached(cache)) == (1, 0)
    assert mode(cache / "cuda") == 0o700
    (cache / "cuda").chmod(0o777)
    assert cached(cache) == 0
    assert mode(cache / "cuda") == 0o700


@REPLACED
def test_cuda_reads_what_is_ours_alone(
    cached: Callable[[Path], int], cache: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    assert cached(cache) == 1
    (entry,) = (cache / "cuda").iterdir()
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        replaced(entry, what, patch)
        assert cached(cache) >= 1


@pytest.mark.parametrize("part", ["", "cuda"])
def test_cuda_compiles_without_a_refused_folder(
    cached: Callable[[Path], int], cache: Path, part: str
) -> None:
    (cache / "cuda").mkdir()
    (cache / part).chmod(0o1777)
    with pytest.warns(UserWarning, match="others can write it") as caught:
        assert cached(cache) == 2
    assert len(caught) == 1
    assert not list((cache / "cuda").iterdir())


# Prints the folder that Triton uses then, and the warnings.
GUARDED = """
import warnings
from dcnv4.backends import triton as ours
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ours._guard_cache()
    ours._guard_cache()
from triton.runtime.cache import FileCacheManager
print(FileCacheManager("entry").cache_dir)
print(*(warning.message for warning in caught), sep="\\n")
"""


def guarded(**variables: str) -> list[str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, "-c", GUARDED],
        env={**kept, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("\n")


def test_triton_gets_a_folder_that_others_cannot_write(tmp_path: Path) -> None:
    pytest.importorskip("triton", "3.0", reason="needs triton >= 3.0")
    home, wide = tmp_path / "home", tmp_path / "wide"
    theirs = home / ".triton" / "cache"
    assert guarded(HOME=str(home)) == [str(theirs / "entry")]
    assert mode(theirs) == 0o700
    (theirs / "entry").rmdir()
    (theirs / ("A" * 52)).mkdir()
    theirs.chmod(0o775)
    assert guarded(HOME=str(home)) == [str(theirs / "entry")]
    assert mode(theirs) == 0o700
    wide.mkdir()
    wide.chmod(0o775)
    used, warning = guarded(HOME=str(home), TRITON_CACHE_DIR=str(wide))
    assert "dcnv4-" in used
    assert not Path(used).exists()
    assert str(wide) in warning
    assert "others can write it; set TRITON_CACHE_DIR" in warning
    assert mode(wide) == 0o775
    assert not list(wide.iterdir())


@pytest.mark.parametrize(
    "variables",
    [{"HOME": "/dev/null"}, {"TRITON_CACHE_DIR": "relative"}, {"TRITON_CACHE_DIR": ""}],
    ids=["no home", "relative", "empty"],
)
def test_triton_without_a_folder(variables: dict[str, str]) -> None:
    pytest.importorskip("triton", "3.0", reason="needs triton >= 3.0")
    used, warning = guarded(**variables)
    assert "dcnv4-" in used
    assert "is not used" in warning
