"""The wheel and the source archive: the same bytes every time, complete, and installable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "dcnv4"
TOP = {
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "NOTICE",
    "README.md",
    "SECURITY.md",
    "docs",
    "examples",
    "pyproject.toml",
    "src",
    "tests",
}
BUILT = shutil.ignore_patterns("__pycache__", "_build", "*.egg-info")
MEBIBYTE = 1 << 20


def run(*command: str | Path, **options: object) -> str:
    """What a command prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy(folder: Path) -> Path:
    """A copy of this project, with a file that is none of it."""
    folder.mkdir()
    for name in TOP:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=BUILT)
        else:
            shutil.copy2(source, folder / name)
    (folder / "notes.txt").write_text("not to be released")
    return folder


def build(folder: Path, **environment: str) -> dict[str, Path]:
    """The files that `python -m build` makes of the project in `folder`."""
    variables = {k: v for k, v in os.environ.items() if k != "SOURCE_DATE_EPOCH"}
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder)
    run(*command, env={**variables, **environment})
    return {path.name: path for path in (folder / "dist").iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    for package in ("build", "hatchling", "twine"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}; pip install -e '.[dev]'")
    return build(copy(tmp_path_factory.mktemp("release") / "first"))


@pytest.fixture
def wheel(built: dict[str, Path]) -> Path:
    (path,) = (path for name, path in built.items() if name.endswith("-py3-none-any.whl"))
    return path


@pytest.fixture
def archive(built: dict[str, Path]) -> Path:
    (path,) = (path for name, path in built.items() if name.endswith(".tar.gz"))
    return path


def files(root: Path) -> set[str]:
    return {
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and "_build" not in path.parts
    }


def test_another_build_has_the_same_bytes(built: dict[str, Path], tmp_path: Path) -> None:
    """In another folder, with other times, permissions, time zone and hashes."""
    folder = copy(tmp_path / "second")
    for path in folder.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
        os.utime(path, (1e9, 1e9))
    again = build(folder, TZ="Asia/Tokyo", PYTHONHASHSEED="7", LC_ALL="C")
    assert again.keys() == built.keys()
    assert len(built) == 2
    for name, path in built.items():
        assert again[name].read_bytes() == path.read_bytes(), name


def test_wheel_is_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        names = {name for name in content.namelist() if not name.split("/")[0].endswith("-info")}
    assert names == {f"dcnv4/{name}" for name in files(SOURCES)}
    assert "dcnv4/py.typed" in names
    assert {Path(name).suffix for name in names} >= {".cpp", ".cu", ".cuh", ".h"}
    assert wheel.stat().st_size <= MEBIBYTE


def test_source_archive_is_the_project_and_nothing_else(archive: Path) -> None:
    stem = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as content:
        names = {
            member.name.removeprefix(f"{stem}/")
            for member in content.getmembers()
            if member.isreg()
        }
    expected = {name for name in TOP if (ROOT / name).is_file()}
    for folder in (name for name in TOP if (ROOT / name).is_dir()):
        expected |= {f"{folder}/{name}" for name in files(ROOT / folder)}
    assert names - {".gitignore"} == expected | {"PKG-INFO"}
    assert archive.stat().st_size <= 2 * MEBIBYTE


def test_metadata_is_right(built: dict[str, Path]) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", *built.values())


def test_wheel_installs_and_runs_without_a_network(wheel: Path, tmp_path: Path) -> None:
    """In an environment without torch, which is lent to it afterwards."""
    run(sys.executable, "-m", "venv", tmp_path / "fresh")
    python = tmp_path / "fresh" / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = (python, "-I", "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--no-index", "--no-deps", wheel)
    code = f"""
import sys
sys.path.append({str(Path(torch.__file__).parents[1])!r})
import torch, dcnv4
print(dcnv4.__file__)
assert dcnv4.DCNv4(8, group=2, backend="reference")(torch.ones(1, 4, 8)).shape == (1, 4, 8)
"""
    where = run(python, "-I", "-c", code, cwd=tmp_path).strip()
    assert Path(where).is_relative_to(tmp_path / "fresh")
    assert python.with_name("dcnv4").exists() or python.with_name("dcnv4.exe").exists()
