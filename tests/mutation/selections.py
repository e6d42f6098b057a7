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
_POSITIONS = "tests/backends/test_cuda_positions.py"
_OPERATORS = "tests/operators/test_operators.py"
_PLANS = (
    "tests/backends/test_cuda.py "
    "-k 'launch_shape or threads_move or block_size or strip or what_they_can or what_it_can'"
)
_LINEAR = "tests/backends/test_cuda_linear.py"
_MLP = "tests/backends/test_cuda_mlp.py"
_NORM = "tests/backends/test_cuda_norm.py"
_SLICES = "tests/backends/test_gradients_as_slices.py"
_MORE = "--exhaustive -m exhaustive"

# Of a pattern of files, stages: arguments of pytest, after settings of the environment. A stage
# runs when those before it saw nothing.
_TABLE: dict[str, tuple[str, ...]] = {
    "*/ptx.cuh": ("tests/backends/test_cuda.py -m gpu -k 'test_tiles or test_sorting'",),
    "*/tiles/*": (
        f"{_EMULATED} {_POSITIONS} "
        "-k 'tile or strips or zero or scale or finite or random or beyond'",
        f"{_MORE} {_EMULATED} -k 'tile or scale or finite or random'",
    ),
    "*/sorted/*": (
        f"{_EMULATED} {_POSITIONS} -k 'sort or encoders or random or beyond'",
        f"{_MORE} {_EMULATED} -k 'sort or encoders or random'",
    ),
    "*/sums/*": (
        f"{_SLICES} -k 'channels or buffer'",
        f"{_EMULATED} -k deterministic",
        f"{_EMULATED} {_POSITIONS}",
        f"{_MORE} {_EMULATED} -k 'deterministic or oracle'",
    ),
    "*/linear/*": (_LINEAR, f"{_EMULATED} -k beyond"),
    "*/mlp/*": (_MLP, f"{_EMULATED} -k beyond"),
    "*/norm/*": (_NORM, f"{_EMULATED} -k beyond"),
    "*/direct/*": (
        f"{_EMULATED} {_POSITIONS} "
        "-k 'oracle or position or direct or random or deterministic or beyond'",
        f"{_MORE} {_EMULATED} -k 'oracle or direct or random or deterministic'",
    ),
    "*/cuda/kernels/*": (f"{_EMULATED} {_POSITIONS}", f"{_MORE} {_EMULATED}"),
    "*/cuda/*.py": (
        *(_PLANS, _NORM, _LINEAR, _MLP, _SLICES),
        *(f"{_EMULATED} {_POSITIONS}", f"{_MORE} {_EMULATED}"),
    ),
    "*/include/*": (
        f"{_OPERATORS} -k cpu-cpu",
        f"{_EMULATED} {_POSITIONS}",
        f"{_MORE} {_EMULATED}",
    ),
    "*/cpu/*": (
        f"{_OPERATORS} -k cpu-cpu",
        "tests/backends/test_cpu.py tests/operators -k 'cpu-cpu or test_cpu'",
        f"{_MORE} tests/backends/test_cpu.py",
    ),
    "*/triton/*": (
        f"TRITON_INTERPRET=1 {_OPERATORS} -k 'triton-cpu and not float32'",
        "TRITON_INTERPRET=1 tests/backends/test_triton.py tests/operators "
        "-k 'interpreted or triton-cpu and not test_oracle'",
        "tests/backends/test_triton.py -k compiles_without",
        f"TRITON_INTERPRET=1 {_MORE} tests/backends/test_triton.py -k interpreted",
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

    def alone(self, test: str) -> Stage:
        """One test of this stage, which may no longer be there."""
        options = tuple(word for word in self.arguments if word == "--exhaustive")
        return self._replace(arguments=(*options, test), may_be_gone=True)

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
