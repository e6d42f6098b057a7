"""Triton's kernels compiled for a GPU that is not there: what the interpreter runs, compilers must
take too. Prints the kernels' names and what they were compiled to."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from support import cases

TARGETS: dict[str, tuple[str, int | str, int]] = {
    **{f"sm_{number}": ("cuda", number, 32) for number in (75, 80, 89, 90, 100, 120)},
    "gfx90a": ("hip", "gfx90a", 64),
    "gfx942": ("hip", "gfx942", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}
"""Of an architecture: Triton's name of its maker, its own, threads of a warp."""


def main(target: str, dtype: str, *names: str) -> int:
    """Forward and backward of these cases, which compute nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from dcnv4.backends import triton

    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget(*TARGETS[target]),
        )
    )

    def compile_alone(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **given: Any) -> None:
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **given)
        print(kernel.fn.__name__, list(compiled.asm)[-1])

    run = JITFunction.run
    with (
        mock.patch.object(JITFunction, "run", compile_alone),
        mock.patch.object(triton, "why_not", return_value=None),
    ):
        for name in names:
            dict(cases.CASES)[name].run(getattr(torch, dtype), "cpu", "triton")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
