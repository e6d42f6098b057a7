"""Installations that lost files, archives, odd environments: a reason, and the next backend."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dcnv4
from dcnv4.backends.cuda import compile as nvrtc
from support.tiers import one_in

PACKAGE = Path(dcnv4.__file__).parent

# Prints what each backend says and what a layer computes, beside the same layer on the reference.
PROBE = """
import json, sys, warnings
import torch

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dcnv4
    from dcnv4 import backends

    gpu = backends.Call("deform_conv", torch.device("cuda"), torch.float32)
    cpu = gpu._replace(device=torch.device("cpu"))
    layer, x = dcnv4.DCNv4(8, group=2), torch.randn(1, 16, 8)
    reference = dcnv4.DCNv4(8, group=2, backend="reference")
    reference.load_state_dict(layer.state_dict())
    agrees = torch.allclose(layer(x), reference(x), atol=1e-6)
    reasons = {name: backends.why_not(name, gpu) for name in ("cuda", "triton")}
    reasons["cpu"] = backends.why_not("cpu", cpu)
    chosen = backends.choose(*cpu)
print(json.dumps({
    "file": dcnv4.__file__,
    "reasons": reasons,
    "chosen": chosen,
    "agrees": agrees,
    "warnings": [str(w.message) for w in caught if "cache folder" in str(w.message)],
    "libraries": sorted({line.split()[-1] for line in open("/proc/self/maps") if "/cpu-" in line})
    if sys.platform.startswith("linux") else [],
}))
"""


def probe(package: Path, folder: Path, **variables: str) -> dict[str, Any]:
    """What the probe prints that runs in `folder`, with the package in the folder `package`."""
    kept = {key: text for key, text in os.environ.items() if not key.startswith("DCNV4_")}
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=folder,
        env={**kept, **variables, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["file"].startswith(str(package))
    assert result["agrees"]
    assert all("\n" not in (reason or "") for reason in result["reasons"].values())
    return result


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the package, to be broken."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "site" / "dcnv4", ignore=ignored)
    return tmp_path / "site" / "dcnv4" / "backends"


LOST = {
    "sources": {
        "cpu/kernels.cpp": "needs all files of this package.*; got no kernels.cpp",
        "cuda/kernels/common/slices.cuh": "needs all files of this package.*; got no slices.cuh",
        "triton/kernels.py": "needs a sound installation; got ImportError: .*kernels|needs triton",
    },
    "other sources": {
        "include/sampling.h": "needs all files of this package.*; got no sampling.h",
        "cuda/kernels/direct/conv_forward.cu": "needs all files of this package.*conv_forward.cu",
    },
    "modules": {
        "cpu": "needs a sound installation; got ModuleNotFoundError",
        "cuda/__init__.py": "needs a sound installation; got AttributeError",
        "triton": "needs a sound installation; got ModuleNotFoundError",
    },
}


@pytest.mark.parametrize("case", LOST)
def test_lost_files(copied: Path, tmp_path: Path, case: str) -> None:
    for name in LOST[case]:
        lost = copied / name
        shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    result = probe(copied.parents[1], tmp_path, DCNV4_CACHE_DIR=str(tmp_path / "cache"))
    assert result["chosen"] == "reference"
    for name, pattern in LOST[case].items():
        backend = name.split("/")[0].replace("include", "cpu")
        assert re.match(pattern, result["reasons"][backend] or "None"), result["reasons"][backend]
    if case == "other sources":
        assert "sampling.h" in result["reasons"]["cuda"]


def test_an_archive(copied: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "site"), "zip", copied.parents[1])
    result = probe(Path(archive), tmp_path, DCNV4_CACHE_DIR=str(tmp_path / "cache"))
    assert result["chosen"] == "reference"
    for name in ("cpu", "cuda"):
        assert "outside of an archive" in result["reasons"][name]


def test_a_compiler_that_is_no_command(tmp_path: Path) -> None:
    result = probe(PACKAGE.parent, tmp_path, CXX="'c++", DCNV4_CACHE_DIR=str(tmp_path / "cache"))
    assert result["reasons"]["cpu"].startswith("needs a command in CXX; got 'c++: ")
    assert result["chosen"] == "reference"


ODD = {
    "no home": {"HOME": "/dev/null", "XDG_CACHE_HOME": ""},
    "a relative cache": {"DCNV4_CACHE_DIR": "cache"},
}


@pytest.mark.parametrize("case", one_in(2, ODD))
def test_odd_environments(tmp_path: Path, case: str) -> None:
    """The kernels are compiled into a temporary folder, never into the working directory."""
    folder = tmp_path / "working"
    folder.mkdir()
    result = probe(PACKAGE.parent, folder, **ODD[case])
    assert not list(folder.iterdir())
    if result["chosen"] == "reference":
        pytest.skip(f"the cpu backend {result['reasons']['cpu']}")
    assert result["chosen"] == "cpu"
    assert len(result["warnings"]) == 1
    assert "set DCNV4_CACHE_DIR to a folder that only you can write" in result["warnings"][0]
    assert all("/dcnv4-" in library for library in result["libraries"])


def test_this_installation_is_sound() -> None:
    """A mistake of ours in a backend must not pass for a broken installation."""
    from dcnv4 import backends

    for name in backends.NAMES:
        for device in ("cpu", "cuda"):
            call = backends.Call("deform_conv", torch.device(device), torch.float32)
            assert not (backends.why_not(name, call) or "").startswith("needs a sound installation")


def test_every_kernel_is_listed() -> None:
    assert sorted(nvrtc.KERNELS) == sorted(path.stem for path in nvrtc._FOLDER.glob("*/*.cu"))
    assert nvrtc._missing() == []
