"""Time of deform_conv against how far its points lie from the grid, on a CUDA GPU.

    python benchmarks/spread.py [--output docs/images/spread.png]

The direct kernels, what a call takes by default (tiles where they pay, see docs/kernels.md) and,
where it is installed, deformops. Every result is checked against the reference before it is timed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING
from unittest import mock

import torch
from torch import Tensor

from dcnv4.backends.cuda import choice, plans
from dcnv4.cli import LETTERS
from dcnv4.cli.bench import measure, prepare
from dcnv4.cli.bench.cases import Conv, floor_bytes
from dcnv4.cli.bench.peers import CONTESTANTS, Expected

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPREADS = 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0
DIRECTIONS = "forward", "backward"
CASE = Conv(64, 56, 56, 4, 16, "fp16")
Curves = dict[str, tuple[list[float], list[float]]]


def times(name: str, case: Conv, inputs: tuple[Tensor, ...], expected: Expected) -> list[float]:
    """µs of a forward and of a backward."""
    (contestant,) = (c for c in CONTESTANTS if c.op == case.op and c.name == name)
    job = contestant.make(case, inputs)
    calls = []
    for direction in DIRECTIONS:
        call, error = prepare(job, direction, expected)
        expected.verify(error(call()))
        calls.append(call)
    return [measured.median for measured in measure.times(calls, inputs[0].device, 0.1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="spread.png")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    bandwidth = measure.copy_bandwidth(device)
    contestants = {"dcnv4, direct kernels": "dcnv4 cuda", "dcnv4": "dcnv4 cuda"}
    if any(c.name == "deformops triton" and c.why_not(device) is None for c in CONTESTANTS):
        contestants["deformops"] = "deformops triton"
    curves: Curves = {label: ([], []) for label in contestants}
    floors: list[float] = []
    for spread in SPREADS:
        case = replace(CASE, spread=spread)
        inputs = case.inputs(device)
        expected = Expected(case, inputs)
        floors = [
            1e6 * floor_bytes(inputs, expected.grad, direction) / bandwidth
            for direction in DIRECTIONS
        ]
        for label, name in contestants.items():
            large = {} if "direct" in label else choice.PAYS_FROM
            with mock.patch.object(choice, "PAYS_FROM", large):
                plans.conv_plan.cache_clear()
                for curve, time in zip(
                    curves[label], times(name, case, inputs, expected), strict=True
                ):
                    curve.append(time)
            plans.conv_plan.cache_clear()
        row = "  ".join(f"{label}: {c[0][-1]:.0f} / {c[1][-1]:.0f}" for label, c in curves.items())
        print(f"{case.name}: {row} µs", flush=True)
    draw(arguments.output, curves, floors)


def draw(file: str, curves: Curves, floors: list[float]) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(LETTERS):
        figure = Figure(figsize=(10, 4), layout="constrained")
        _draw(figure, curves, floors)
        figure.savefig(file, dpi=120, transparent=True)


def _draw(figure: Figure, curves: Curves, floors: list[float]) -> None:
    axes = figure.subplots(1, 2)
    for direction, (axis, floor) in enumerate(zip(axes, floors, strict=True)):
        for label, curve in curves.items():
            axis.plot(SPREADS, curve[direction], marker="o", markersize=4, label=label)
        axis.axhline(floor, color="gray", linestyle="--", label="floor")
        axis.set_xscale("log")
        axis.set_xticks(SPREADS, [f"{spread:g}" for spread in SPREADS])
        axis.minorticks_off()
        axis.set_ylim(0)
        axis.set_xlabel("deviation of offsets, pixels")
        axis.set_title(DIRECTIONS[direction])
    axes[0].set_ylabel("µs")
    axes[1].legend(frameon=False)
    where = torch.cuda.get_device_name()
    figure.suptitle(f"deform_conv, 64 x 56 x 56, 4 groups of 16 channels, float16, {where}")


if __name__ == "__main__":
    main()
