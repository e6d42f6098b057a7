"""Which mutants are tried: a line in so many, of all lines that universalmutator can change."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from . import compiler
from .mutants import Mutant, context, digest, load
from .run import Bench, OutOfTimeError
from .selections import Stage, stages

_RULES = {
    ".py": ["universal.rules", "python.rules"],
    "": ["universal.rules", "cpp.rules", "c_like.rules"],
}
# Lines whose changes say nothing of the tests: what names come from, what a compiler is advised.
_IGNORED = [r"^\s*from .* import ", r"^\s*#pragma"]
# Variants of a kernel, before a mutant counts as one that changes nothing.
_TRIED = 6
_TRIED_FOR_GPU = 24  # nothing says which of them have the change
_EMULATED = "static Arguments"  # with which what the emulator adds to a kernel begins
Lines = list[Mutant]
"""The mutants of one line."""


class Check(Protocol):
    def __call__(self, mutant: Mutant, tree: Path) -> bool:
        """Whether a mutant compiles, and to something else."""


def generate(root: Path, files: Iterable[str]) -> Iterator[Lines]:
    """All that universalmutator makes of each line of these files.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        mutator: Any = importlib.import_module("universalmutator.mutator")
    except ImportError as error:
        raise SystemExit(
            f"drawing needs universalmutator (pip install --no-deps universalmutator): {error}"
        ) from error
    for file in files:
        source = (root / file).read_text(encoding="utf-8")
        rules = _RULES.get(Path(file).suffix, _RULES[""])
        with contextlib.redirect_stdout(io.StringIO()):
            made = mutator.mutants_regexp(
                source.splitlines(keepends=True),
                ruleFiles=rules,
                ignorePatterns=_IGNORED,
                ignoreStringOnly=True,
            )
        lines = source.split("\n")
        found: dict[int, Lines] = {}
        for number, mutated, *_ in made:
            place = number - 1
            mutant = Mutant(file, number, lines[place], mutated.rstrip("\n"), context(lines, place))
            found.setdefault(number, []).append(mutant)
        yield from found.values()


def draw(
    lines: Iterable[Lines],
    count: int,
    seed: int,
    check: Check,
    trees: Sequence[Path],
) -> list[Mutant]:
    """A mutant of each of `count` lines; every line is as likely as any other.

    A line's place in the draw depends on the seed and on the line, not on the others: what is drawn
    again after a change is mostly what was drawn before.

    Args:
        lines: the mutants of each line.
        count: how many are drawn, where there are as many lines that can be changed.
        seed: of the draw.
        check: which mutants count.
        trees: copies of the tree in which `check` may change files, one each at a time.
    """
    free: SimpleQueue[Path] = SimpleQueue()
    for tree in trees:
        free.put(tree)

    def first(mutants: Lines) -> Mutant | None:
        tree = free.get()
        try:
            ordered = sorted(mutants, key=lambda mutant: digest(seed, mutant.key))
            return next((mutant for mutant in ordered if check(mutant, tree)), None)
        finally:
            free.put(tree)

    ordered = sorted(lines, key=lambda mutants: digest(seed, *mutants[0].place))
    ahead = 4 * len(trees)
    drawn: dict[str, Mutant] = {}
    with ThreadPoolExecutor(len(trees)) as pool:
        for start in range(0, len(ordered), ahead):
            for mutant in pool.map(first, ordered[start : start + ahead]):
                if mutant is not None and len(drawn) < count:
                    drawn.setdefault(mutant.key, mutant)
            if len(drawn) >= count:
                break
    return list(drawn.values())


class Compiles:
    """Whether a mutant compiles as the tests compile it, and to other code than the original.

    Args:
        bench: where.
        files: which may be changed.
        jobs: runs of tests at once.
    """

    def __init__(self, bench: Bench, files: Sequence[str], jobs: int = 1) -> None:
        self._bench = bench
        self._cache = bench.folder / "compiled"
        self._tree = bench.tree("original")
        self._records = self._record(files, jobs)
        self._machine_codes: dict[int, bytes] = {}

    def __call__(self, mutant: Mutant, tree: Path) -> bool:
        if time.monotonic() > self._bench.deadline:
            raise OutOfTimeError
        path = tree / mutant.file
        original = mutant.apply(tree)
        try:
            if path.suffix == ".py":
                return _python_differs(original.decode(), path, tree)
            return self._library_differs(mutant.file, tree)
        finally:
            path.write_bytes(original)

    def _record(self, files: Sequence[str], jobs: int) -> list[dict[str, Any]]:
        """What the first tests of these files compile."""
        for file in files:
            if file.endswith(".py") and not _imports(self._tree / file, self._tree):
                raise RuntimeError(f"{file} must be imported as it is; it is not")
        compiled = [file for file in files if not file.endswith(".py")]
        chosen = {stages(file)[0] for file in compiled}

        def record(stage: Stage) -> list[dict[str, Any]]:
            tree = self._bench.tree(f"record-{digest(stage)}")
            self._bench.pass_all(tree, stage)
            return load(tree.parent / "compiled.jsonl")

        with ThreadPoolExecutor(jobs) as pool:
            found = pool.map(record, sorted(stage for stage in chosen if not stage.needs_gpu))
            unique = {
                _name(entry): entry for entries in found for entry in entries if "files" in entry
            }
        return [unique[key] for key in sorted(unique)]

    def _library_differs(self, file: str, tree: Path) -> bool:
        try:
            if all(stage.needs_gpu for stage in stages(file)):
                return self._gpu_differs(tree)
            found = (
                self._cpu_differs(entry, file, tree)
                for entry in self._records
                if file in entry["files"] or self._text(file) in (entry["source"] or "")
            )
            return any(islice((differs for differs in found if differs is not None), _TRIED))
        except compiler.CompileError:
            return False

    def _cpu_differs(self, entry: dict[str, Any], file: str, tree: Path) -> bool | None:
        """Whether one library differs; None: it has no part of the change."""
        texts = [self._preprocess(entry, file, where) for where in (self._tree, tree)]
        if texts[0][1] == texts[1][1]:
            return None
        built = [compiler.build(*text, self._cache).read_bytes() for text in texts]
        return built[0] != built[1]

    def _gpu_differs(self, tree: Path) -> bool:
        """Whether a kernel that the emulator ran would differ on a GPU; needs NVRTC."""
        emulated = (entry for entry in self._records if entry["source"] is not None)
        return any(
            _machine_code(entry, tree) != self._original_machine_code(number, entry)
            for number, entry in enumerate(islice(emulated, _TRIED_FOR_GPU))
        )

    def _original_machine_code(self, number: int, entry: dict[str, Any]) -> bytes:
        if number not in self._machine_codes:
            self._machine_codes[number] = _machine_code(entry, self._tree)
        return self._machine_codes[number]

    def _text(self, file: str) -> str:
        return (self._tree / file).read_text(encoding="utf-8")

    def _preprocess(self, entry: dict[str, Any], file: str, tree: Path) -> tuple[list[str], str]:
        """The command of a recorded library, optimised, in a tree where `file` is changed; and what
        it then compiles."""
        command = [part.replace("{tree}", str(tree)) for part in entry["command"]]
        if entry["source"] is not None:  # written by a test, perhaps around the file's own text
            changed = (tree / file).read_text(encoding="utf-8")
            source = tree.parent / Path(command[-1]).name
            source.write_text(entry["source"].replace(self._text(file), changed), encoding="utf-8")
            command[-1] = str(source)
        command = ["-O2" if part == "-O0" else part for part in command]
        return command, compiler.preprocess(command, tree)[0]


def _name(entry: dict[str, Any]) -> str:
    """Of a recorded library, wherever its source was."""
    *flags, source = entry["command"]
    return digest(*flags, Path(source).name, entry["source"])


def _machine_code(entry: dict[str, Any], tree: Path) -> bytes:
    """What NVRTC makes of a kernel that was recorded on the emulator."""
    from cuda.core import Program, ProgramOptions

    parts = [part.replace("{tree}", str(tree)) for part in entry["command"]]
    options = ProgramOptions(
        arch="sm_90",
        std="c++17",
        include_path=[part[2:] for part in parts if part[:2] == "-I" and "/src/" in part],
        define_macro=[tuple(part[2:].split("=", 1)) for part in parts if part[:2] == "-D"],
    )
    source = entry["source"].partition(_EMULATED)[0]
    try:
        return bytes(Program(source, "c++", options).compile("cubin").code)
    except Exception as error:
        raise compiler.CompileError(str(error)) from error


def _python_differs(original: str, path: Path, tree: Path) -> bool:
    """Whether a changed module still says something, and something else, and can be imported."""
    try:
        if _meaning(path.read_text(encoding="utf-8")) == _meaning(original):
            return False
    except SyntaxError:
        return False
    return _imports(path, tree)


def _imports(path: Path, tree: Path) -> bool:
    name = ".".join(path.relative_to(tree / "src").with_suffix("").parts)
    environment = {"PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", f"import {name}"]
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


def _meaning(source: str) -> str:
    """The syntax tree without docstrings and `pass`, and without annotations that nothing reads."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if isinstance(body, list):
                setattr(node, name, [part for part in body if not _is_nothing(part)])
        for name in ("annotation", "returns"):
            annotation = getattr(node, name, None)
            if annotation is not None and "constexpr" not in ast.dump(annotation):
                setattr(node, name, None)
    return ast.dump(tree)


def _is_nothing(node: ast.stmt) -> bool:
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return text or isinstance(node, ast.Pass)
