"""`dcnv4 info`: what is here, which backends run on it, and why the others do not."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import groupby
from typing import Any

import torch

from .. import __version__, backends

OPERATORS = ("deform_conv", "ms_deform_attn")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PACKAGES = ("cuda-core", "triton")
"""Packages that backends are made with; each may be missing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else describe(facts))
    return 0


def collect() -> dict[str, Any]:
    """Everything that `dcnv4 info` tells, ready for JSON."""
    return {
        "dcnv4": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu_threads": torch.get_num_threads(),
        "devices": [_device(device, about) for device, about in _devices()],
        "environment": backends.environment(),
        "cache": backends.cache_dir(),
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts as lines to read."""
    packages = (f"{name} {version or 'missing'}" for name, version in facts["packages"].items())
    variables = (f"{name}={setting}" for name, setting in facts["environment"].items())
    lines = [
        f"dcnv4 {facts['dcnv4']}, Python {facts['python']}, torch {facts['torch']}",
        facts["platform"],
        f"packages: {', '.join(packages)}",
        f"environment: {', '.join(variables) or 'nothing set'}",
        f"cache: {facts['cache']}",
    ]
    for (about, report), alike in groupby(
        facts["devices"], lambda device: (device["about"], device["backends"])
    ):
        devices = list(alike)
        lines += ["", f"{', '.join(device['device'] for device in devices)}: {about}"]
        for name, reasons in report.items():
            lines += _cell(name, {key: reason or "usable" for key, reason in reasons.items()})
        lines += _cell("auto is", devices[0]["auto"])
        lines.append(f"  {'set here':10} {devices[0]['requested']}")
    return "\n".join(lines)


def _cell(name: str, answers: dict[str, str]) -> list[str]:
    """Lines of one backend: each answer once, with the calls that it is for unless all agree."""
    calls: dict[str, list[str]] = {}
    for call, answer in answers.items():
        calls.setdefault(answer, []).append(call)
    lines = []
    for answer, which in calls.items():
        prefix = "" if len(calls) == 1 else f"{_short(which)}: "
        lines.append(f"  {name:10} {prefix}{answer}")
        name = ""
    return lines


def _short(calls: list[str]) -> str:
    """`deform_conv float32`, `ms_deform_attn float32` in few words: `float32`."""
    dtypes = [[call.split()[1] for call in calls if call.split()[0] == op] for op in OPERATORS]
    if dtypes[0] == dtypes[1]:
        return ", ".join(dtypes[0])
    texts = (
        f"{op} {', '.join(names)}" for op, names in zip(OPERATORS, dtypes, strict=True) if names
    )
    return "; ".join(texts)


def _device(device: torch.device, about: str) -> dict[str, Any]:
    calls = {
        f"{op} {str(dtype).removeprefix('torch.')}": backends.Call(op, device, dtype)
        for op in OPERATORS
        for dtype in DTYPES
    }
    return {
        "device": str(device),
        "about": about,
        "backends": {
            name: {text: _answer(backends.why_not, name, call) for text, call in calls.items()}
            for name in backends.NAMES
        },
        "auto": {text: _answer(backends.choose, *call, "auto") for text, call in calls.items()},
        "requested": _answer(backends.requested, device.type),
    }


def _answer(question: Callable[..., str | None], *arguments: Any) -> str | None:
    """The answer, or in one line why there is none: a broken installation is what this is for."""
    try:
        return question(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(":")


def _devices() -> Iterator[tuple[torch.device, str]]:
    """Every device here, and what it is."""
    yield torch.device("cpu"), f"{platform.machine()}, {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        yield torch.device("cuda", i), _answer(_gpu, i) or ""
    if torch.backends.mps.is_available():
        yield torch.device("mps"), platform.processor()
    xpu = getattr(torch, "xpu", None)
    if xpu is not None and xpu.is_available():
        for i in range(xpu.device_count()):
            yield torch.device("xpu", i), _answer(xpu.get_device_name, i) or ""


def _gpu(index: int) -> str:
    name = torch.cuda.get_device_name(index)
    major, minor = torch.cuda.get_device_capability(index)
    return f"{name}, compute capability {major}.{minor}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
