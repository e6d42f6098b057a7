"""How things are measured: times, host times, memory, and the machine's copy bandwidth."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]

_FLUSH_BYTES = 256 << 20  # more than any GPU's L2
_LEAST, _MOST = 5, 300  # repeats of one measurement
_WARM = 0.025  # seconds for a GPU to reach its clocks
_HOLD = 4_000  # cycles of a GPU that are more than a µs
_TURN = 4  # of them at a time on a CPU


class Times(NamedTuple):
    """Of one call, in µs."""

    median: float
    p20: float
    p80: float
    least: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Times:
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered),
            ordered[round(0.2 * last)],
            ordered[round(0.8 * last)],
            ordered[0],
        )


def times(calls: Sequence[Call], device: torch.device, seconds: float) -> list[Times]:
    """Time each call for about `seconds`. See `METHOD` for how.

    A call must have run before, so that nothing is compiled or allocated first here.
    """
    if device.type == "cuda":
        return [Times.of(_cuda_samples(call, seconds)) for call in calls]
    return [Times.of(samples) for samples in _cpu_samples(calls, seconds)]


METHOD = {
    "cuda": "CUDA events around one call, issued before the GPU comes to it, cold L2 (256 MiB "
    "written before each); of a layer, around the replay of a CUDA graph",
    "cpu": "wall clock of one call, warm, contestants in turn",
}


def _repeats(estimate: float, seconds: float) -> int:
    return max(_LEAST, min(_MOST, int(seconds / max(estimate, 1e-9))))


def _cuda_samples(call: Call, seconds: float) -> list[float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    hold = int(_HOLD * host_time(call, flush.device, 5).p80)

    def sample(repeats: int) -> list[float]:
        pairs = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(repeats)
        ]
        for start, end in pairs:
            flush.zero_()
            torch.cuda._sleep(hold)  # until the host has issued the call
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in pairs]

    begin = time.perf_counter()
    sample(3)
    estimate = (time.perf_counter() - begin) / 3
    warm = min(int(_WARM / estimate), _MOST)
    return sample(warm + _repeats(estimate, seconds))[warm:]


def _cpu_samples(calls: Sequence[Call], seconds: float) -> list[list[float]]:
    """In turns of a few calls, so that a machine that slows down slows all.

    The first of a turn is not counted: it meets the caches and the threads of whoever was before.
    """
    repeats = [_repeats(_wall(call), seconds) for call in calls]
    turns = -(-max(repeats, default=0) // _TURN)
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(turns):
        for call, count, own in zip(calls, repeats, samples, strict=True):
            due = count * (turn + 1) // turns - len(own)
            if due >= min(_TURN, count) or turn == turns - 1:
                call()
                own += [1e6 * _wall(call) for _ in range(due)]
    return samples


def _wall(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def host_time(call: Call, device: torch.device, repeats: int = 50) -> Times:
    """Of issuing a call, not waiting for the device; on a CPU, of the whole call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    samples = [1e6 * _wall(call) for _ in range(repeats)]
    if device.type == "cuda":
        torch.cuda.synchronize()
    return Times.of(samples)


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes that PyTorch's allocator holds at most during a call, beyond those held before.

    None where it cannot be told.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated(device)) - int(before)
    with _silence(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    results = profile.kineto_results
    if results is None:
        return None
    held = peak = 0
    for event in results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextmanager
def _silence() -> Iterator[None]:
    """Without what C++ code, here the profiler, logs to the standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes: the best of twenty."""
    size = (1 << 30) if device.type == "cuda" else (1 << 27)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(20):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            best = min(best, 1e-3 * start.elapsed_time(end))
        else:
            best = min(best, _wall(lambda: target.copy_(source)))
    return 2 * size / best
