"""Time of deform_conv against how far its points lie from the grid, on a CUDA GPU.

    python benchmarks/spread.py

Rows for the table of docs/benchmarks.md that has the direct kernels and what a call takes by
default (tiles where they pay, see docs/kernels.md). Every result is checked against the reference
before it is timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from dcnv4.backends.cuda import choice, plans
from dcnv4.cli.bench import measure, prepare
from dcnv4.cli.bench.cases import Conv, floor_bytes
from dcnv4.cli.bench.peers import CONTESTANTS, Expected

SPREADS = 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0
DIRECTIONS = "forward", "backward"
CASE = Conv(64, 56, 56, 4, 16, "fp16")


def times(
    case: Conv, inputs: tuple[Tensor, ...], expected: Expected, pays: Mapping[str, int]
) -> list[float]:
    """µs of a forward and of a backward, other kernels than the direct ones where `pays` says."""
    (contestant,) = (c for c in CONTESTANTS if c.op == case.op and c.name == "dcnv4 cuda")
    job = contestant.make(case, inputs)
    calls = []
    with mock.patch.object(choice, "PAYS_FROM", pays):
        plans.conv_plan.cache_clear()
        for direction in DIRECTIONS:
            call, error = prepare(job, direction, expected)
            expected.verify(error(call()))
            calls.append(call)
        result = [measured.median for measured in measure.times(calls, inputs[0].device, 0.1)]
    plans.conv_plan.cache_clear()
    return result


def main() -> None:
    device = torch.device("cuda")
    bandwidth = measure.copy_bandwidth(device)
    print(torch.cuda.get_device_name())
    for spread in SPREADS:
        case = replace(CASE, spread=spread)
        inputs = case.inputs(device)
        expected = Expected(case, inputs)
        direct = times(case, inputs, expected, {})
        default = times(case, inputs, expected, choice.PAYS_FROM)
        cells = [case.words]
        for direction, slow, fast in zip(DIRECTIONS, direct, default, strict=True):
            floor = 1e6 * floor_bytes(inputs, expected.grad, direction) / bandwidth
            cells += [f"{slow:.0f}", f"{fast:.0f}", f"{fast / floor:.1f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
