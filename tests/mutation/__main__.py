"""Draw mutants, run them, report: see docs/mutation.md."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .draw import draw, generate
from .mutants import (
    LIST,
    RESULTS,
    ROOT,
    SURVIVORS,
    Mutant,
    digest,
    load,
    load_mutants,
    load_results,
    save_mutants,
)
from .report import NOTICED, describe, report, write
from .run import Bench, append, run
from .selections import Stage, mutated_files, stages

_FRESH = 12  # mutants of changed lines in one run of CI
_SHARE = 0.5  # of the time of CI, that they may take


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mutation", description=__doc__)
    commands = parser.add_subparsers(required=True)
    parsers = {}
    for name, function in (("draw", _draw), ("run", _run), ("report", _report), ("ci", _ci)):
        parsers[name] = commands.add_parser(name, help=function.__doc__)
        parsers[name].set_defaults(function=function)
    for name in ("run", "ci"):
        add = parsers[name].add_argument
        add("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
        add("--folder", type=Path, help="for copies and what is compiled; default: a new one")
        add("--patience", type=float, default=60.0, help="seconds that one test may take")
        add("--budget", type=float, default=float("inf"), help="seconds in all")
    parsers["draw"].add_argument(
        "--count", type=int, default=720, help="lines; most of them compile"
    )
    parsers["draw"].add_argument("--seed", type=int, default=0)
    add = parsers["run"].add_argument
    add("--results", type=Path, default=RESULTS, help="the file that they are added to")
    add("--again", action="store_true", help="those that survived, too")
    add("--quick", action="store_true", help="without the exhaustive tests")
    add("--only", default="", help="what the file's name must contain")
    add("--most", type=int, help="how many at most")
    options = parser.parse_args()
    if getattr(options, "folder", options) is not None:
        return int(options.function(options))
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        options.folder = Path(folder)
        return int(options.function(options))


def _draw(options: argparse.Namespace) -> int:
    """draw the list anew; needs universalmutator"""
    lines = generate(ROOT, mutated_files(ROOT))
    save_mutants(draw(ROOT, lines, options.count, options.seed))
    return 0


def _run(options: argparse.Namespace) -> int:
    """run those of the list that have no result yet"""
    results = load_results(options.results)
    over = {key for key, got in results.items() if not options.again or got["result"] != "survived"}
    waiting = [
        mutant
        for mutant in load_mutants()
        if mutant.key not in over and options.only in mutant.file and _can_run(mutant)
    ]
    waiting = _shuffled(waiting, "")[: options.most]
    bench = _bench(options, options.budget, _quick if options.quick else _every)
    left = run(bench, waiting, append(options.results), options.jobs)
    print(f"{len(waiting) - left} run, {left} left; these fail as they are: {bench.failing}")
    return int(bool(bench.failing))


def _report(options: argparse.Namespace) -> int:
    """put the results into docs/mutation.md and name the survivors without a verdict"""
    text, missed = report(load_mutants(), load_results(), load(SURVIVORS))
    write(text)
    print(text)
    for mutant in missed:
        print(describe(mutant))
    return int(bool(missed))


def _ci(options: argparse.Namespace) -> int:
    """try changed lines, then those known to be noticed, while there is time"""
    survived: list[Mutant] = []
    verdicts = {record["key"] for record in load(SURVIVORS)}
    results = load_results()

    def stage_of(mutant: Mutant) -> Stage:
        every = stages(mutant.file)
        return every[min(results[mutant.key]["stage"], len(every) - 1)]

    def once_noticed(mutant: Mutant) -> Sequence[Stage]:
        """The test that noticed comes first."""
        every = stages(mutant.file)
        test = results[mutant.key]["test"]
        return (stage_of(mutant).alone(test), *every) if test else every

    def attempt(bench: Bench, mutants: Sequence[Mutant]) -> None:
        known = {mutant.key: mutant for mutant in mutants}

        def record(result: Mapping[str, Any]) -> None:
            print(result, flush=True)
            if result["result"] == "survived" and result["key"] not in verdicts:
                survived.append(known[result["key"]])

        left = run(bench, mutants, record, options.jobs)
        print(f"{len(mutants) - left} run, {left} left", flush=True)

    began = time.monotonic()
    bench = _bench(options, options.budget * _SHARE, _every)
    changed = _changed_lines()
    print(f"lines changed since the draw: {sum(map(len, changed.values()))}", flush=True)
    fresh = [
        mutants
        for mutants in generate(ROOT, sorted(changed))
        if mutants[0].line in changed[mutants[0].file] and _can_run(mutants[0])
    ]
    attempt(bench, draw(ROOT, fresh, _FRESH, 0))
    noticed = [
        mutant
        for mutant in load_mutants()
        if results.get(mutant.key, {}).get("result") in NOTICED and stage_of(mutant).runs_here
    ]
    bench = _bench(options, options.budget - (time.monotonic() - began), once_noticed)
    attempt(bench, _shuffled(noticed, _git("rev-parse", "HEAD")))
    for mutant in survived:
        print(f"no test notices\n{describe(mutant)}")
    return int(bool(survived))


def _bench(
    options: argparse.Namespace,
    seconds: float,
    choose: Callable[[Mutant], Sequence[Stage]],
) -> Bench:
    folder = options.folder.resolve()
    return Bench(ROOT, folder, options.patience, time.monotonic() + seconds, choose)


def _every(mutant: Mutant) -> Sequence[Stage]:
    return stages(mutant.file)


def _quick(mutant: Mutant) -> Sequence[Stage]:
    return [stage for stage in stages(mutant.file) if "--exhaustive" not in stage.arguments]


def _can_run(mutant: Mutant) -> bool:
    return any(stage.runs_here for stage in stages(mutant.file))


def _shuffled(mutants: Iterable[Mutant], seed: str) -> list[Mutant]:
    return sorted(mutants, key=lambda mutant: digest(seed, mutant.key))


def _changed_lines() -> dict[str, set[int]]:
    """Of mutated files, the lines that the last draw has not seen."""
    drawn = _git("log", "-1", "--format=%H", "--", str(LIST))
    if not drawn:
        return {}
    files = list(mutated_files(ROOT))
    changed: dict[str, set[int]] = {}
    for line in _git("diff", "-U0", "--no-color", drawn, "--", *files).splitlines():
        if line.startswith("+++ b/"):
            file = line.removeprefix("+++ b/")
        elif match := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            first, count = int(match[1]), int(match[2] or 1)
            changed.setdefault(file, set()).update(range(first, first + count))
    return changed


def _git(*arguments: str) -> str:
    """What git says, or nothing."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
