"""`dcnv4 bench`: check, then time, this library's backends and what else computes the same.

cases.py says what is run, peers.py who runs it, measure.py how it is timed, report.py how it is
shown.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ... import backends
from . import cases, measure, report
from .cases import Case, Layer
from .peers import CONTESTANTS, Contestant, Expected, Job, Unable, describe
from .report import Row

_EPILOG = """\
A result is checked before it is timed: output and gradients against the reference backend in
float64 (a layer or a model: against itself on the reference backend), by relative L2 error: 1e-4
for fp32, 1e-2 for fp16, 4e-2 for bf16. A wrong one prints WRONG and gets no time.

median, p20-p80  of single calls, in µs. On a GPU with a cold L2, by CUDA events; the GPU waits
                 until the call is issued, so that the host's time is no part. On a CPU by the wall
                 clock.
min              the fastest call, which a busy machine disturbs least.
forward          under no_grad.
backward         torch.autograd.grad alone, of all inputs, from a retained graph: autograd's own
                 work, fills, casts and allocations included.
x floor          over the time to copy the bytes of inputs and results once, at the copy bandwidth
                 of the same run.
vs peer          the fastest right peer's time over this one's: above 1 is faster than all peers.
memory           PyTorch's allocations at their highest during the call, beyond those before it.
host             the time to issue the call without waiting (GPU only).
eager, compiled, graph replay
                 what a call with next to no work costs the host, in each way to make it.
~                a yardstick: another function, never checked.

Other libraries get their inputs in the layout that they want; conversions are not timed. A
grid_sample is the whole operator, from and to the contract's layout. deformops compiles its CUDA
kernels where DEFORMOPS_COMPILE=always.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `dcnv4 bench`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    parser.add_argument(
        "--cases",
        metavar="PATTERNS",
        type=_names,
        default=[],
        help="globs or parts of case names, comma-separated; see --list",
    )
    parser.add_argument(
        "--backends",
        metavar="NAMES",
        type=_names,
        default=[],
        help=f"which of {', '.join(backends.NAMES)}, comma-separated; default: all",
    )
    parser.add_argument(
        "--peers",
        metavar="PATTERNS",
        type=_names,
        default=[],
        help="globs or parts of the names of peers and yardsticks; 'none' for none",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="shorter timing, and few cases unless --cases names them",
    )
    parser.add_argument(
        "--budget",
        metavar="SECONDS",
        type=_seconds,
        help="for timing one contestant in one direction; default 0.5 (0.1 with --quick)",
    )
    parser.add_argument(
        "--limit",
        metavar="SECONDS",
        type=_seconds,
        default=float("inf"),
        help="start no contestant after this much time; what was left out is said",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results, after every case")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in the --json FILE: only what --limit left out of it",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw time over floor, as .png, .svg, .pdf")
    parser.add_argument("--compare", metavar="FILE", help="say what changed since this JSON")
    parser.add_argument("--list", action="store_true", help="list cases and contestants, run none")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"must be a number > 0; got {text}")
    return seconds


def run(args: argparse.Namespace) -> int:
    """Run `dcnv4 bench`.

    Returns:
        0; 1 where a backend of this library failed or was wrong; 2 for an impossible request.
    """
    try:
        device = _device(args.device)
        chosen = cases.choose(device, args.cases, args.quick)
        if not chosen:
            raise ValueError(f"--cases must match a case of --list; got {','.join(args.cases)}")
        contestants, missing = _contestants(device, args.backends, args.peers)
        _check_backends(args.backends, contestants, missing)
        _check_peers(device, args.peers)
        _check_files(args)
        old = report.load(args.compare) if args.compare else None
        kept = report.load(args.json) if args.resume else None
    except (ValueError, OSError, RuntimeError) as error:
        return _refuse(error)

    if args.list:
        print("\n".join(f"{case.name:<40}{case.note}".rstrip() for case in chosen))
        print("\ncontestants:", ", ".join(dict.fromkeys(c.name for c in contestants)))
        return 0
    bandwidth = measure.copy_bandwidth(device)
    environment = _environment(device, bandwidth, contestants, missing)
    rows: list[Row] = []
    if kept is not None:
        try:
            names = {case.name for case in chosen}
            environment, rows, again = report.resumed(kept, environment, names)
        except ValueError as error:
            return _refuse(error)
        chosen = [case for case in chosen if case.name in again]
    print(report.header(environment), flush=True)

    budget = args.budget or (0.1 if args.quick else 0.5)
    bench = _Bench(device, bandwidth, budget, time.monotonic() + args.limit)
    lost = None
    try:
        for group in bench.run(chosen, contestants):
            print(f"\n{report.table(group)}", flush=True)
            rows += group
            if args.json:
                report.save(args.json, environment, rows)
    except _DeviceLostError as error:
        lost = error
        print(f"\nThe GPU was lost, nothing more was run: {error}")
    if old:
        print(f"\n{args.compare} -> this run: {report.compare(old, (environment, rows))}")
    if args.plot:
        try:
            left_out = report.plot(args.plot, environment, rows)
        except (ValueError, OSError, RuntimeError) as error:
            return _refuse(error)
        if left_out:
            print(f"\n{args.plot} lacks the last {left_out} cases; choose others with --cases")
    return int(bool(lost) or any(row.kind == "backend" and _failed(row) for row in rows))


def _refuse(error: Exception) -> int:
    print(f"dcnv4 bench: {error}", file=sys.stderr)
    return 2


def _check_files(args: argparse.Namespace) -> None:
    for file in filter(None, (args.json, args.plot)):
        if not os.path.isdir(os.path.dirname(os.path.abspath(file))) or os.path.isdir(file):
            raise ValueError(f"--json and --plot must be files in a folder that exists; got {file}")
    if args.plot:
        report.check_plot(args.plot)
    if args.resume and not args.json:
        raise ValueError("--resume must come with --json, whose run goes on; got none")


def _failed(row: Row) -> bool:
    return (row.problem or "").startswith(("WRONG", "failed"))


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cuda or cpu; got {name}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device must be cpu where PyTorch sees no GPU; got cuda")
    return torch.device(name)


def _contestants(
    device: torch.device, names: Sequence[str], peers: Sequence[str]
) -> tuple[list[Contestant], dict[str, str]]:
    """Those asked for that can run anything here, and why the others cannot."""
    able, missing = [], {}
    for contestant in CONTESTANTS:
        if contestant.device not in (None, device.type):
            continue
        if contestant.kind == "backend":
            wanted = not names or contestant.name.removeprefix("dcnv4 ") in names
        else:
            wanted = cases.matches(contestant.name, peers)
        if not wanted:
            continue
        reason = contestant.why_not(device)
        if reason is None:
            able.append(contestant)
        else:
            missing[contestant.requires or contestant.name] = reason
    return able, missing


def _check_backends(
    names: Sequence[str], contestants: Sequence[Contestant], missing: dict[str, str]
) -> None:
    able = {contestant.name for contestant in contestants}
    for name in names:
        if name not in backends.NAMES:
            raise ValueError(f"--backends must be of {', '.join(backends.NAMES)}; got {name}")
        if (ours := f"dcnv4 {name}") not in able:
            raise ValueError(f"--backends must run here; got {name}, which {missing[ours]}")


def _check_peers(device: torch.device, patterns: Sequence[str]) -> None:
    names = dict.fromkeys(
        c.name for c in CONTESTANTS if c.kind != "backend" and c.device in (None, device.type)
    )
    for pattern in patterns:
        if pattern != "none" and not any(cases.matches(name, [pattern]) for name in names):
            raise ValueError(
                f"--peers must match one of {', '.join(names)}, or be none; got {pattern}"
            )


def _environment(
    device: torch.device,
    bandwidth: float,
    contestants: Sequence[Contestant],
    missing: dict[str, str],
) -> dict[str, str]:
    from ... import __version__

    threads = torch.get_num_threads()
    where = f"{processor()}, {threads} thread{'s' * (threads > 1)}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    versions = f"dcnv4 {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    for name in dict.fromkeys(filter(None, (c.requires for c in contestants))):
        versions += f", {name} {getattr(import_module(name), '__version__', '')}".rstrip()
    absent = {"not here": "; ".join(f"{name}: {reason}" for name, reason in missing.items())}
    return {
        "device": where,
        "versions": versions,
        "command": shlex.join(("dcnv4", *sys.argv[1:])),
        "copy": f"{bandwidth / 1e9:,.1f} GB/s, bytes read and written",
        "timing": measure.METHOD[device.type],
        **(absent if missing else {}),
    }


def processor() -> str:
    """The CPU's name where Linux tells it, its architecture elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = (line.partition(":") for line in file)
            names = [text.strip() for key, _, text in lines if key.strip() == "model name"]
    except OSError:
        names = []
    return next(iter(names), f"{platform.machine()} CPU")


_LONG = 10_000
"""µs of a GPU call whose host time is not worth the wait."""


class _DeviceLostError(RuntimeError):
    """An error after which the GPU answers nothing more in this process."""


@dataclass
class _Bench:
    """Checks and times contestants on one device."""

    device: torch.device
    bandwidth: float
    budget: float
    deadline: float

    def run(self, chosen: Sequence[Case], contestants: Sequence[Contestant]) -> Iterator[list[Row]]:
        """The rows of one case and direction after another."""
        for case in chosen:
            able = [c for c in contestants if c.op == case.op]
            if able:
                yield from self._cost(case, able) if case in cases.TINY else self._case(case, able)

    def _case(self, case: Case, contestants: Sequence[Contestant]) -> Iterator[list[Row]]:
        directions = ["forward", "backward"]
        if isinstance(case, Layer):
            directions = ["forward", "forward+backward"]
        elif self.device.type == "cpu":
            directions.append("forward+backward")
        rows = {
            direction: [Row(case.name, case.note, direction, c.name, c.kind) for c in contestants]
            for direction in directions
        }
        entire = [row for group in rows.values() for row in group]
        with self._explained(*entire):
            self._check_time()
            inputs = case.inputs(self.device)
            expected = Expected(case, inputs)
        for direction, group in rows.items():
            if not group[0].problem:
                floor = cases.floor_bytes(inputs, expected.grad, direction) / self.bandwidth
                for row in group:
                    row.floor = 1e6 * floor
                entries = list(zip(group, contestants, strict=True))
                # In turn on a CPU; a GPU's memory may hold only one at a time.
                batches = [entries] if self.device.type == "cpu" else [[e] for e in entries]
                for batch in batches:
                    self._batch(batch, case, inputs, expected)
            yield group

    def _batch(
        self,
        entries: Sequence[tuple[Row, Contestant]],
        case: Case,
        inputs: tuple[Tensor, ...],
        expected: Expected,
    ) -> None:
        """Fill in the rows of contestants that are timed in turn."""
        ready: list[tuple[Row, Callable[[], Any]]] = []
        for row, contestant in entries:
            with self._explained(row):
                self._check_time()
                job = contestant.make(case, inputs)
                call, verify = prepare(job, row.direction, expected)
                result = call()
                if contestant.kind != "yardstick":
                    row.error = expected.verify(verify(result))
                row.memory = measure.peak_memory(call, self.device)
                ready.append((row, call))
        with self._explained(*(row for row, _ in ready)):
            calls = [call for _, call in ready]
            if isinstance(case, Layer) and self.device.type == "cuda":
                # The reference takes numbers from the host, which no graph can hold.
                held = ("reference" in contestant.name for _, contestant in entries)
                calls = [c if h else captured(c)[0] for c, h in zip(calls, held, strict=False)]
            timed = measure.times(calls, self.device, self.budget)
            for (row, call), measured in zip(ready, timed, strict=True):
                row.median, row.p20, row.p80, row.least = measured
                if self.device.type == "cuda" and row.median < _LONG:
                    row.host = measure.host_time(call, self.device, 20).median

    def _cost(self, case: Case, contestants: Sequence[Contestant]) -> Iterator[list[Row]]:
        """What a call costs the host, where there is next to nothing to do."""
        inputs = case.inputs(self.device)
        expected = Expected(case, inputs)
        modes = ["eager, no grad", "eager, grad", "eager, forward+backward", "compiled, no grad"]
        if self.device.type == "cuda":
            modes.append("graph replay")
        for mode in modes:
            able = list(contestants)
            if mode == "graph replay":
                # The reference takes numbers from the host, which no graph can hold.
                able = [c for c in able if "reference" not in c.name]
            elif mode == "compiled, no grad" and self.device.type == "cpu":
                able = [c for c in able if c.kind == "backend"]  # the rest is C++ for many seconds
            rows = [Row(case.name, case.note, mode, c.name, c.kind) for c in able]
            for row, contestant in zip(rows, able, strict=True):
                with self._explained(row):
                    self._check_time()
                    job = contestant.make(case, inputs)
                    if mode == "eager, forward+backward":
                        call, error_of = prepare(job, "forward+backward", expected)
                    else:
                        call, error_of = _issue(job, mode), partial(expected.output_error, job)
                    result = call()
                    if contestant.kind != "yardstick":
                        row.error = expected.verify(error_of(result))
                    measured = measure.host_time(call, self.device)
                    row.median, row.p20, row.p80, row.least = measured
            if rows:
                yield rows

    def _check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise Unable("not run: over --limit")

    @contextmanager
    def _explained(self, *rows: Row) -> Iterator[None]:
        """Put what goes wrong into the rows: no contestant ends a run."""
        problem = None
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except Unable as error:
            problem = str(error)
        except Exception as error:
            problem = f"failed: {type(error).__name__}: {describe(error)}"
        if problem is not None:
            for row in rows:
                row.problem, row.median = problem, None
            if self.device.type == "cuda":
                self._recover(problem)

    def _recover(self, problem: str) -> None:
        try:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            raise _DeviceLostError(problem) from None


def prepare(
    job: Job, direction: str, expected: Expected
) -> tuple[Callable[[], Any], Callable[[Any], float]]:
    """The call to time, and the relative error of what it returned."""
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return job.run()

        return forward, lambda output: expected.output_error(job, output)

    recorded = job.run()
    grad = job.own_gradient(recorded, expected.grad)

    def backward(retained: Tensor | None) -> tuple[Tensor, ...]:
        output = job.run() if retained is None else retained
        return torch.autograd.grad(output, job.leaves, grad, retain_graph=retained is not None)

    return (
        partial(backward, recorded if direction == "backward" else None),
        lambda grads: expected.gradients_error(job, grads),
    )


def _issue(job: Job, mode: str) -> Callable[[], Tensor]:
    """A call of the job's forward in one of the ways to call it."""
    if mode == "eager, grad":
        return job.run
    run = job.run
    if mode == "compiled, no grad":
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 4):
            raise Unable(f"cannot: needs torch >= 2.4; got {torch.__version__}")
        torch._dynamo.reset()
        compiled = torch.compile(job.call, fullgraph=True, dynamic=False)

        def run() -> Tensor:
            return compiled(*job.leaves)

    def call() -> Tensor:
        with torch.no_grad():
            return run()

    if mode != "graph replay":
        return call
    replay, output = captured(call)
    assert isinstance(output, Tensor)
    output.fill_(float("nan"))  # so that only a replay can make it right

    def replayed() -> Tensor:
        replay()
        return output

    return replayed


def captured(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """What replays the call's work on the GPU, and where it leaves the result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result
