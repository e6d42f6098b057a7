"""Random legal calls of the C++ kernels, built with the sanitizers, against the oracle.

    python tests/support/fuzz_cpu.py --calls 2000 [--seed 0]

The kernels are compiled with -fsanitize=address,undefined under a name of their own.
The sanitizer's runtime must be loaded before Python is, so the script starts itself again with it.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")
DEPTHS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 24, 31, 32, 33, 64, 65, 100)
MISSING = 77
"""Exit status where there is no compiler or no sanitizer runtime."""

Array = np.ndarray


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if "LD_PRELOAD" not in os.environ:
        return restart()
    fuzz(arguments.calls, arguments.seed)
    return 0


def restart() -> int:
    named = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not sys.platform.startswith("linux") or named is None:
        print("needs Linux and a C++ compiler")
        return MISSING
    # The sanitizer looks for C++'s exceptions as it starts, and Python itself is C.
    compiler = shlex.split(named)
    asked = [[*compiler, f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6")]
    paths = [subprocess.run(a, capture_output=True, text=True).stdout.strip() for a in asked]
    if not all(map(os.path.isabs, paths)):
        print("needs the runtime of the address sanitizer, libasan.so, and libstdc++.so.6")
        return MISSING
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run([sys.executable, *sys.argv], env=environment).returncode


def fuzz(calls: int, seed: int) -> None:
    from dcnv4.backends import cache_dir, cpu
    from dcnv4.backends.cpu import compile as compiling

    flags = [flag for flag in compiling.FLAGS if not flag.startswith("-O")]
    kernels: ctypes.CDLL = compiling.library(cache_dir(), (*flags, "-O1", *SANITIZE))
    cpu._kernels = lambda: kernels  # type: ignore[assignment]
    for i in range(calls):
        rng = random.Random(f"{seed}/{i}")
        name = rng.choice(("conv", "attn"))
        try:
            (conv if name == "conv" else attn)(rng)
        except Exception as error:
            raise AssertionError(f"call {i} of seed {seed}, {name}: {error}") from error
    print(f"{calls} calls agree with the oracle; the sanitizers found nothing")


def conv(rng: random.Random) -> None:
    from dcnv4 import functional

    random_pair = lambda low, high: (rng.randint(low, high), rng.randint(low, high))  # noqa: E731
    window: dict[str, Any] = {
        "kernel_size": rng.choice(((1, 1), (3, 3), (5, 5), random_pair(1, 4))),
        "stride": random_pair(1, 3),
        "padding": random_pair(0, 3),
        "dilation": random_pair(1, 2),
        "groups": rng.randint(1, 4),
        "offset_scale": rng.choice((1.0, 1.0, 0.5, 2.0, -1.0, 0.0)),
        "softmax": rng.random() < 0.4,
    }
    window["remove_center"] = rng.random() < 0.3 and window["kernel_size"] != (1, 1)
    settings = functional.window(**window)
    while True:
        height, width = random_pair(0, 9)
        rows, columns = settings.output_size(height, width)
        if min(rows, columns) >= 1 or 0 in (height, width):
            break
    rows, columns = max(rows, 0), max(columns, 0)
    batch, depth, groups = rng.randint(0, 2), rng.choice(DEPTHS), settings.groups
    while batch * rows * columns * groups * settings.points() > 1500 and batch > 1:
        batch -= 1
    numbers = np.random.default_rng(rng.getrandbits(64))
    value = numbers.normal(size=(batch, height, width, groups * depth))
    pixels = batch, rows, columns
    padding = rng.choice((0, 0, 1, 5))
    fields = numbers.normal(size=(*pixels, groups, 3 * settings.points()))
    offsets = 2 * settings.points()
    spread = rng.choice((1, 4, 40))
    shape = (*pixels, groups, offsets)
    # The points of most scales stay off the pixel centres, where the gradient jumps.
    fields[..., :offsets] = (
        numbers.integers(-spread, spread, shape) + numbers.integers(1, 8, shape) / 8
    )
    spoil(rng, fields[..., :offsets], (np.nan, np.inf, -np.inf, 1e9, -(2.0**31), -1e30))
    offset_mask = np.concatenate(
        (
            fields.reshape(*pixels, settings.offset_mask_channels()),
            np.full((*pixels, padding), np.nan),
        ),
        -1,
    )
    spoil(rng, value, (np.nan, np.inf))
    check(
        rng,
        "deform_conv",
        lambda *tensors: functional.deform_conv(*tensors, **window, backend="cpu"),
        (value, offset_mask),
        window,
    )


def attn(rng: random.Random) -> None:
    from dcnv4 import functional

    levels, points, groups = rng.randint(1, 4), rng.choice((1, 2, 4, 5)), rng.randint(1, 4)
    shapes = [(rng.randint(0, 6), rng.randint(0, 6)) for _ in range(levels)]
    batch, depth, queries = rng.randint(0, 2), rng.choice(DEPTHS), rng.choice((0, 1, 5, 20))
    numbers = np.random.default_rng(rng.getrandbits(64))
    value = numbers.normal(size=(batch, sum(h * w for h, w in shapes), groups, depth))
    size = (batch, queries, groups, levels, points)
    pixels = numbers.integers(-2, 8, (*size, 2)) + numbers.integers(1, 8, (*size, 2)) / 8
    widths = np.array([(max(w, 1), max(h, 1)) for h, w in shapes]).reshape(levels, 1, 2)
    settings: dict[str, Any] = {"spatial_shapes": shapes, "softmax": rng.random() < 0.5}
    name, references = "ms_deform_attn", []
    coordinates = (pixels + 0.5) / widths
    if rng.random() < 0.5:
        name, settings["box_normalizer"] = f"{name}_from_offsets", rng.choice(("points", "size"))
        own = [min(n, 1) if rng.random() < 0.3 else n for n in (batch, queries, levels)]
        place = numbers.integers(8, 64, (*own, rng.choice((2, 4)))) / 64
        references, scale = [place], np.ones(1)
        if place.shape[-1] == 4:
            parts = widths / points if settings["box_normalizer"] == "points" else 1
            scale = place[:, :, None, :, None, 2:] * parts / 2
        coordinates = (pixels + 0.5 - place[:, :, None, :, None, :2] * widths) / scale
    spoil(rng, coordinates, (np.nan, np.inf, -np.inf, 1e9, -1e30))
    spoil(rng, value, (np.nan, np.inf))
    weights = numbers.normal(size=size)
    check(
        rng,
        name,
        lambda v, *rest: getattr(functional, name)(
            v, shapes, *rest, **keywords(settings), backend="cpu"
        ),
        (value, *references, coordinates, weights),
        settings,
    )


def spoil(rng: random.Random, array: Array, numbers: tuple[float, ...]) -> None:
    """Put a few of these numbers anywhere, one time in four."""
    if array.size and rng.random() < 0.25:
        for _ in range(rng.randint(1, 4)):
            array[tuple(rng.randrange(size) for size in array.shape)] = rng.choice(numbers)


def laid_out(rng: random.Random, array: Array, dtype: Any) -> Any:
    """The array as a tensor of one of several layouts, whatever lies between its numbers."""
    import torch

    tensor = torch.from_numpy(array).to(dtype)
    layout = rng.choice(("plain", "plain", "sliced", "permuted", "cropped"))
    if layout == "sliced":
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"), dtype=dtype)
        wide[..., 2:-1] = tensor
        return wide[..., 2:-1]
    if layout == "cropped":
        wide = torch.full([size + 2 for size in tensor.shape], float("nan"), dtype=dtype)
        inside = wide[tuple(slice(1, -1) for _ in tensor.shape)]
        inside.copy_(tensor)
        return inside
    if layout == "permuted":
        return tensor.transpose(1, -1).contiguous().transpose(1, -1)
    return tensor


def check(
    rng: random.Random, name: str, call: Any, arrays: tuple[Array, ...], settings: dict[str, Any]
) -> None:
    """Compare output and gradients with those of the oracle for the same rounded numbers."""
    import torch

    from support import oracle

    dtype = rng.choice((torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16))
    wider = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    dtypes = [dtype, *(rng.choice((dtype, wider)) for _ in arrays[1:])]
    with np.errstate(over="ignore"):
        inputs = [laid_out(rng, a, d).requires_grad_() for a, d in zip(arrays, dtypes, strict=True)]
    torch.set_num_threads(rng.choice((1, 1, 2, 3, 5)))
    output = call(*inputs)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    grad = laid_out(rng, grad.numpy(), dtype)
    grads = torch.autograd.grad(output, inputs, grad)
    exact = [tensor.detach().double().numpy() for tensor in inputs]
    with np.errstate(all="ignore"):
        expected = [
            getattr(oracle, name)(*arguments(exact, settings), **keywords(settings)),
            *getattr(oracle, f"{name}_backward")(
                grad.double().numpy(), *arguments(exact, settings), **keywords(settings)
            ),
        ]
    for result, right in zip((output, *grads), expected, strict=True):
        compare(result.detach(), right)


def arguments(arrays: list[Array], settings: dict[str, Any]) -> list[Any]:
    """The oracle's arguments without names."""
    value, *rest = arrays
    return [value, *([settings["spatial_shapes"]] if "spatial_shapes" in settings else []), *rest]


def keywords(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: setting for name, setting in settings.items() if name != "spatial_shapes"}


def compare(result: Any, right: Array) -> None:
    """Equal up to the rounding of 100 sums and of the result; not finite at the same places."""
    import torch

    got = result.double().numpy()
    assert got.shape == right.shape, (got.shape, right.shape)
    finite = np.isfinite(right)
    assert np.array_equal(np.isfinite(got), finite), "other elements are not finite"
    if not finite.any():
        return
    sums = torch.finfo(torch.float64 if result.dtype == torch.float64 else torch.float32).eps
    scale = np.abs(right[finite]).max() + 1
    budget = 100 * sums * scale + torch.finfo(result.dtype).eps * np.abs(right)
    with np.errstate(invalid="ignore"):
        excess = np.where(finite, np.abs(got - right) - budget, 0)
    worst = np.unravel_index(excess.argmax(), excess.shape)
    assert excess[worst] <= 0, f"got {got[worst]}, expected {right[worst]} at {worst}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
