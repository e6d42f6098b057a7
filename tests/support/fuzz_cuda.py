"""Random legal calls of the CUDA kernels against the oracle.

    PYTHONPATH=tests python -m support.fuzz_cuda --calls 5000 [--settings 60] [--seed 0]

What a kernel is compiled for comes from a few settings, so that most calls only launch; what it is
told at launch is drawn for every call.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from typing import Any

import torch

from support import cases, launches
from support.launches import DIRECT, EVERY, SORTED

DEPTHS = (1, 2, 3, 4, 5, 8, 12, 16, 17, 24, 32, 33, 64, 130)
LAYOUTS = ("plain", "plain", "plain", "sliced", "permuted", "expanded")
Slices = dict[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--settings", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    fuzz(arguments.calls, arguments.settings, arguments.seed)
    print(f"{arguments.calls} calls of {arguments.settings} settings are right")


def fuzz(calls: int, settings: int, seed: int) -> None:
    """Raises AssertionError, which names the case, where a result is outside its budget or other
    kernels ran than those that each third of the settings is made for."""
    rng = random.Random(seed)
    pool = [(slices, *drawn(rng, slices)) for slices in (DIRECT, SORTED, EVERY) * -(-settings // 3)]
    for i in range(calls):
        slices, case, dtype = rng.choice(pool)
        case = replace(sized(rng, case, slices), id=f"fuzz-{seed}-{i}")
        names = launches.expected(case, dtype, slices)
        with launches.paying_from(slices), launches.launching(*names):
            results = case.run(dtype, "cuda", "cuda")
        case.check(results, dtype)


def drawn(rng: random.Random, slices: Slices) -> tuple[cases.Case, torch.dtype]:
    """A setting that the direct kernels, those that sort or, under EVERY, tiles are used for."""
    case = attention(rng) if slices != EVERY and rng.random() < 0.5 else conv(rng)
    dtype = rng.choice(cases.DTYPES)
    if slices != DIRECT:
        dtype = rng.choice(cases.DTYPES[1:])
        case = replace(case, depth=rng.choice((16, 32, 64)))
    if slices == EVERY:
        assert isinstance(case, cases.ConvCase)
        dtype = rng.choice((torch.float16, torch.bfloat16))
        kernel = rng.choice(((3, 3), (3, 3), (3, 3), (2, 2), (1, 3), (3, 2)))
        dilation, scale = rng.choice(((1, 1.0), (1, 1.0), (1, 0.5), (1, 2.0), (2, 1.0), (2, -0.5)))
        fixed = {"kernel_size": kernel, "stride": (1, 1), "dilation": (dilation, dilation)}
        fixed["offset_scale"] = scale
        window = {**case.window, **fixed, "remove_center": rng.random() < 0.3}
        depth = rng.choice((16, 32, 48, 64))
        case = replace(case, depth=depth, window=window, coordinates=())
    return sized(rng, case, slices), dtype


def conv(rng: random.Random) -> cases.ConvCase:
    kernel = rng.choice(((3, 3), (3, 3), (1, 1), (2, 2), (5, 5), (3, 5), (4, 1), (7, 7)))
    pairs = {name: (rng.randint(1, 3), rng.randint(1, 3)) for name in ("stride", "dilation")}
    window = {
        "kernel_size": kernel,
        "padding": (rng.randint(0, 3), rng.randint(0, 3)),
        "offset_scale": rng.choice((1.0, 1.0, 0.5, 2.0, -1.0)),
        "remove_center": kernel != (1, 1) and rng.random() < 0.3,
        **pairs,
    }
    return cases.ConvCase(
        "",
        groups=rng.choice((1, 2, 3, 4, 7)),
        depth=rng.choice(DEPTHS),
        softmax=rng.random() < 0.4,
        coordinates=rng.choice(((), (), (torch.float32,))),
        window=window,
    )


def attention(rng: random.Random) -> cases.AttnCase:
    if rng.random() < 0.5:
        kind, numbers = cases.AttnCase, 2
        settings: dict[str, Any] = {}
    else:
        kind, numbers = cases.OffsetsCase, 3
        settings = {
            "boxes": rng.random() < 0.5,
            "box_normalizer": rng.choice(("points", "size")),
            "shared": tuple(axis for axis in range(3) if rng.random() < 0.3),
        }
    precise = rng.choice(((), (), (torch.float32,) * numbers))
    return kind(
        "",
        **settings,
        groups=rng.choice((1, 2, 3, 8)),
        depth=rng.choice(DEPTHS),
        softmax=rng.random() < 0.6,
        coordinates=precise,
        shapes=((1, 1),) * rng.randint(1, 4),
        per_level=rng.choice((1, 2, 3, 4, 8)),
        tensor=rng.random() < 0.3,
    )


def sized(rng: random.Random, case: cases.Case, slices: Slices) -> cases.Case:
    """The case at another size, on which its kernels do not depend."""
    batch = rng.choice((0, 1, 1, 2, 3))
    sigmas = (0.0, 0.25, 0.5, 1.0) if slices == EVERY else (0.0, 0.5, 2.0, 8.0)
    layout = rng.choice(LAYOUTS)
    if layout == "sliced" and slices != DIRECT:
        layout = "packed"
    case = replace(case, batch=batch, sigma=rng.choice(sigmas), layout=layout)
    if isinstance(case, cases.AttnCase):
        shapes = tuple((rng.randint(0, 6), rng.randint(0, 6)) for _ in case.shapes)
        queries = rng.randint(0, 9)
        if slices != DIRECT:
            queries = sum(height * width for height, width in shapes)
        flat = batch > 0 < queries and rng.random() < 0.3
        return replace(case, shapes=shapes, queries=queries, flat=flat)
    assert isinstance(case, cases.ConvCase)
    (kh, kw), (dh, dw) = case.window["kernel_size"], case.window["dilation"]
    ph, pw = case.window["padding"]
    least = max(1, dh * (kh - 1) + 1 - 2 * ph), max(1, dw * (kw - 1) + 1 - 2 * pw)
    size = tuple(low + rng.randint(0, 11 if slices == EVERY else 3) for low in least)
    extra = rng.choice((0, 0, 1, 5))
    if slices == EVERY:  # pixels of offset_mask on whole 8 bytes, beside a value on 16
        unit = 8 if case.layout == "packed" else 4
        extra = unit * extra + -3 * case.groups * case.points_per_group % unit
    return replace(case, size=size, extra=extra)


if __name__ == "__main__":
    main()
