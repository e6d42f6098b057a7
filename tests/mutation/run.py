"""Mutants against the tests, each worker in a copy of the tree; what is known is not run again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any, NamedTuple

import pytest

from . import codes
from .mutants import Mutant, StaleError, load
from .selections import Stage

COPIED = ("src", "tests", "pyproject.toml")
_POLL = 0.05  # seconds


class Outcome(NamedTuple):
    """What came of one run of pytest."""

    passed: bool
    test: str
    """The one that failed, or ran when time was up; none: it did not come to a test."""
    timed_out: bool = False


class OutOfTimeError(Exception):
    """The budget is spent."""


@dataclass
class Bench:
    """Where mutants are run.

    Args:
        root: the tree, which stays as it is.
        folder: for copies of it and what is compiled; may be kept for the next run.
        patience: seconds that one test may take.
        deadline: of `time.monotonic`, when all must be over.
        choose: the stages of a mutant.
    """

    root: Path
    folder: Path
    patience: float
    deadline: float
    choose: Callable[[Mutant], Sequence[Stage]]
    failing: list[str] = field(default_factory=list)
    """Tests that fail where nothing is changed; none of them counts."""
    _checked: dict[Stage | str, Lock] = field(default_factory=dict)
    _sound: set[Stage | str] = field(default_factory=set)
    _lock: Lock = field(default_factory=Lock)
    _original: Path | None = None
    _libraries: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of files, one that has it, as `compiler` wrote it down without a mutant."""

    def tree(self, name: str) -> Path:
        """A fresh copy of the tree; beside it lies what runs in it leave behind."""
        copy = self.folder / name / "tree"
        shutil.rmtree(copy.parent, ignore_errors=True)
        for part in COPIED:
            source = self.root / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                copy.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, copy / part)
        return copy

    def environment(self, tree: Path, stage: Stage) -> dict[str, str]:
        compiler = shutil.which("g++") or shutil.which("c++") or "g++"
        wrapper = f"{sys.executable} -ISB {tree / 'tests/mutation/compiler.py'} {compiler}"
        hidden = {} if stage.needs_gpu else {"CUDA_VISIBLE_DEVICES": ""}
        return {
            **os.environ,
            **hidden,
            "PYTHONPATH": os.pathsep.join((str(tree / "src"), str(tree / "tests"))),
            "PYTHONDONTWRITEBYTECODE": "1",  # a mutant may be as long and as old as the original
            "CXX": wrapper,
            "DCNV4_CACHE_DIR": str(tree.parent / "cache"),
            "OMP_NUM_THREADS": "2",
            "MUTATION_TREE": str(tree),
            "MUTATION_CACHE": str(self.folder / "compiled"),
            "MUTATION_LOG": str(tree.parent / "compiled.jsonl"),
            "MUTATION_TEST": str(tree.parent / "test"),
            **dict(stage.environment),
        }

    def run_stage(self, tree: Path, stage: Stage) -> Outcome:
        """Run a stage in a tree up to the first failure.

        Raises:
            OutOfTimeError: the budget ended before it.
        """
        watch = tree.parent / "test"
        watch.write_text("")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "mutation.watch", "--hypothesis-seed=0", *stage.arguments]
        command += [f"--deselect={test}" for test in self.failing]
        with (tree.parent / "output").open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=tree,
                env=self.environment(tree, stage),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                while process.poll() is None:
                    time.sleep(_POLL)
                    if time.monotonic() > self.deadline:
                        raise OutOfTimeError
                    if time.time() - watch.stat().st_mtime > self.patience:
                        return Outcome(False, watch.read_text(encoding="utf-8"), timed_out=True)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        gone = stage.may_be_gone and process.returncode == pytest.ExitCode.USAGE_ERROR
        if stage.may_be_gone or self.failing:  # or one of the exhaustive tests now
            gone |= process.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
        return Outcome(process.returncode == 0 or gone, watch.read_text(encoding="utf-8"))

    def passes(self, stage: Stage, test: str, tree: Path) -> bool:
        """Whether a test passes where nothing is changed; one that does not is left out from then.

        Raises:
            RuntimeError: the stage does not even come to a test.
        """
        with self._lock:
            lock = self._checked.setdefault(test or stage, Lock())
        with lock:
            if test in self.failing:
                return False
            if (test or stage) not in self._sound:
                if not test:
                    chosen = ("--collect-only", *stage.arguments)
                    self.pass_all(tree, stage._replace(arguments=chosen))
                elif not self.run_stage(tree, stage.alone(test)).passed:
                    self.failing.append(test)
                    return False
                self._sound.add(test or stage)
            return True

    def pass_all(self, tree: Path, stage: Stage) -> None:
        """Run a stage where nothing is changed.

        Raises:
            RuntimeError: a test fails.
        """
        outcome = self.run_stage(tree, stage)
        if not outcome.passed:
            said = (tree.parent / "output").read_text(encoding="utf-8")[-3000:]
            raise RuntimeError(f"{outcome.test or stage} must pass as it is; got\n{said}")

    def try_mutant(self, mutant: Mutant, tree: Path) -> dict[str, object]:
        """The result of one mutant, in a tree that is then as before.

        Raises:
            OutOfTimeError: the budget ended before it.
        """
        began = time.monotonic()
        log = tree.parent / "compiled.jsonl"
        compiled: list[dict[str, Any]] = []
        found: list[bool] = []

        def entry(result: str, **found: object) -> dict[str, object]:
            seconds = round(time.monotonic() - began, 1)
            return {"key": mutant.key, "result": result, **found, "seconds": seconds}

        if not self._compiles(mutant, tree):
            return entry("uncompiled")
        for number, stage in enumerate(self.choose(mutant)):
            passed = not stage.runs_here
            while not passed:
                log.unlink(missing_ok=True)
                try:
                    with mutant.applied(tree):
                        passed, test, late = self.run_stage(tree, stage)
                        self._remember(mutant.file, load(log), tree)
                except StaleError:
                    return entry("stale")
                compiled += load(log)
                if not passed and self.passes(stage, test, tree):
                    broken = _is_broken(compiled)
                    broken |= not test and number == 0  # it cannot even be imported
                    result = "timeout" if late else "uncompiled" if broken else "killed"
                    return entry(result, stage=number, test=test)
            if _is_broken(compiled):  # and the tests of that backend were skipped
                return entry("uncompiled")
            found = self._differences(mutant, compiled, tree)
            if len(found) == codes.TRIED and not any(found):
                break
        return entry("survived" if any(found) else "unchanged")

    def _untouched(self) -> Path:
        """A tree that is never changed."""
        with self._lock:
            self._original = self._original or self.tree("original")
            return self._original

    def _remember(self, file: str, compiled: Iterable[Mapping[str, Any]], tree: Path) -> None:
        """Keep a library of each file, as it is where `file` is not changed."""
        original, changed = (
            (root / file).read_text(encoding="utf-8") for root in (self._untouched(), tree)
        )
        for library in compiled:
            if "error" in library:
                continue
            source = library["source"]
            files = library["files"]
            if source is not None and changed in source:
                files = [*files, file]
                library = {**library, "source": source.replace(changed, original)}
            for name in files:
                self._libraries.setdefault(name, library)

    def _compiles(self, mutant: Mutant, tree: Path) -> bool:
        """Whether a library compiles that has the file; True where none is known."""
        library = self._libraries.get(mutant.file)
        if library is None:
            return True
        trees = self._untouched(), tree
        try:
            with mutant.applied(tree):
                return codes.compiles(mutant.file, library, trees, tree.parent / "changed")
        except StaleError:
            return True  # and the run says so

    def _differences(
        self, mutant: Mutant, compiled: Iterable[Mapping[str, Any]], tree: Path
    ) -> list[bool]:
        """Of libraries, whether what a mutant compiles to is not what the original does, up to the
        first of which it is."""
        if mutant.file.endswith(".py"):
            return [True]
        if all(stage.needs_gpu for stage in self.choose(mutant)):
            return [True]  # nothing here compiles it as it is
        trees, found = (self._untouched(), tree), []
        with mutant.applied(tree):
            for differs in codes.differ(mutant.file, compiled, trees, self.folder / "compiled"):
                found.append(differs)
                if differs:
                    break
                if time.monotonic() > self.deadline:
                    raise OutOfTimeError
        return found


def _is_broken(compiled: Iterable[Mapping[str, object]]) -> bool:
    return any("error" in library for library in compiled)


def run(
    bench: Bench,
    mutants: Iterable[Mutant],
    record: Callable[[dict[str, object]], None],
    jobs: int = 1,
) -> int:
    """Try mutants until all are tried or the time is over; how many were not.

    Args:
        bench: where.
        mutants: in the order in which they are tried.
        record: takes each result, one at a time.
        jobs: how many run at once.

    Raises:
        RuntimeError: the tests cannot be collected without a mutant.
    """
    waiting: SimpleQueue[Mutant] = SimpleQueue()
    for mutant in mutants:
        waiting.put(mutant)
    lock = Lock()
    left = [0]

    def work(name: str) -> None:
        tree = bench.tree(name)
        while True:
            try:
                mutant = waiting.get_nowait()
                result = bench.try_mutant(mutant, tree)
            except Empty:
                return
            except OutOfTimeError:
                left[0] += 1
                return
            except BaseException:
                bench.deadline = 0  # the others stop too
                raise
            with lock:
                record(result)

    with ThreadPoolExecutor(jobs) as pool:
        workers = [pool.submit(work, str(number)) for number in range(jobs)]
    for worker in workers:
        worker.result()
    return left[0] + waiting.qsize()


def append(path: Path) -> Callable[[dict[str, object]], None]:
    """What adds a result to a file of JSON lines, and says so."""

    def record(result: dict[str, object]) -> None:
        line = json.dumps(result)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    return record
