"""Which files are mutated, and which tests should notice: the likely and cheap first."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

PACKAGE = "src/dcnv4"
# What compiles, caches and asks the driver is no mathematics and has tests of another kind.
NOT_MUTATED = ("*/__init__.py", "*/cuda/compile.py")
_MUTATED = (
    "geometry.py",
    "backends/include/*.h",
    "backends/cpu/*.cpp",
    "backends/cpu/*.h",
    "backends/cuda/**/*.cu",
    "backends/cuda/**/*.cuh",
    "backends/cuda/*.py",
    "backends/triton/kernels.py",
)

_EMULATED = "tests/backends/test_cuda_emulated.py"
_OPERATORS = "tests/operators/test_operators.py"
_PLANS = (
    "tests/backends/test_cuda.py "
    "-k 'launch_shape or threads_move or block_size or strip or tiles_take'"
)
_PROPERTIES = "tests/operators/test_properties.py tests/operators/test_amp.py"

# Of a pattern of files, stages: arguments of pytest, after settings of the environment. A stage
# runs when those before it saw nothing.
_TABLE: dict[str, tuple[str, ...]] = {
    "*/ptx.cuh": ("tests/backends/test_cuda.py -m gpu -k 'kernels_for_large_calls'",),
    "*/*tile*.cu*": (
        f"{_EMULATED} -k tiles",
        f"{_EMULATED} -k '(tile or finite or scale) and not test_tiles'",
    ),
    "*/*sorted*.cu*": (
        f"{_EMULATED} -k 'test_sorted and not convolutions'",
        f"{_EMULATED} -k 'convolutions or encoders or test_deterministic_sorted'",
    ),
    "*/sums/*": (f"{_EMULATED} -k deterministic", f"{_EMULATED} -k 'oracle or sorted or tiles'"),
    "*/cuda/*.cu*": (
        f"{_EMULATED}::test_oracle",
        f"{_EMULATED} -k 'tiles or deterministic or random'",
        f"{_EMULATED} -k 'not oracle and not tiles and not deterministic and not random'",
    ),
    "*/cuda/*.py": (
        _PLANS,
        f"{_EMULATED} -k 'test_tiles or which or small or deterministic'",
        f"{_EMULATED} -k 'oracle or sorted or random'",
    ),
    "*/include/*.h": (
        f"{_OPERATORS} -k cpu-cpu",
        f"{_EMULATED}::test_oracle",
        f"{_EMULATED} -k 'tiles or sorted'",
    ),
    "*/cpu/*": (
        f"{_OPERATORS} -k cpu-cpu",
        f"tests/backends/test_cpu.py {_PROPERTIES} -k 'cpu or bits or levels'",
    ),
    "*/triton/*.py": (
        f"TRITON_INTERPRET=1 {_OPERATORS} -k 'triton-cpu and not float32'",
        "TRITON_INTERPRET=1 tests/backends/test_triton.py tests/operators/test_amp.py "
        "tests/operators/test_determinism.py -k 'interpreted or triton-cpu'",
        f"{_OPERATORS} -m gpu -k triton-cuda",
    ),
    "*/geometry.py": (
        "tests/operators/test_geometry.py",
        f"{_OPERATORS} -k 'reference-cpu or cpu-cpu'",
        "tests/operators tests/layers",
    ),
}


class Stage(NamedTuple):
    """One run of pytest."""

    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    may_be_gone: bool = False
    """Whether it says nothing when there is no such test."""

    @property
    def needs_gpu(self) -> bool:
        return "gpu" in self.arguments

    @property
    def runs_here(self) -> bool:
        return not self.needs_gpu or shutil.which("nvidia-smi") is not None

    @classmethod
    def parse(cls, text: str) -> Stage:
        words = shlex.split(text)
        count = next(i for i, word in enumerate(words) if "=" not in word)
        settings = (word.split("=", 1) for word in words[:count])
        return cls(tuple(words[count:]), tuple((name, value) for name, value in settings))


def stages(file: str) -> tuple[Stage, ...]:
    """Of the tests that should notice a mutant of `file`."""
    for pattern, texts in _TABLE.items():
        if fnmatch(file, pattern):
            return tuple(map(Stage.parse, texts))
    raise ValueError(f"a mutated file must match one of {', '.join(_TABLE)}; got {file}")


def mutated_files(root: Path) -> Iterator[str]:
    """What is mutated, relative to `root`."""
    for pattern in _MUTATED:
        for path in sorted((root / PACKAGE).glob(pattern)):
            name = path.relative_to(root).as_posix()
            if not any(fnmatch(name, other) for other in NOT_MUTATED):
                yield name
