"""Modules of this package that run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys


def run_module(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What came of `python -m support.NAME`, which imports what this process does."""
    path = os.pathsep.join(place for place in sys.path if place)
    return subprocess.run(
        [sys.executable, "-m", f"support.{name}", *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
