"""The C++ backend: compiling and caching, what it says where it cannot, processes and threads."""

from __future__ import annotations

import json
import math
import os
import random
import struct
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcnv4 import backends, functional
from dcnv4.backends import cpu, reference
from dcnv4.backends.cpu import compile as cpu_compile
from dcnv4.backends.cpu import records
from dcnv4.geometry import Window

CALL = backends.Call("deform_conv", torch.device("cpu"), torch.float32)
SUPPORT = Path(__file__).parents[1] / "support"

# Prints what the cpu backend says, which backend `auto` takes, and whether the results agree.
PROBE = """
    import json, torch
    from dcnv4 import backends, functional
    call = backends.Call("deform_conv", torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    value, offset_mask = torch.randn(1, 6, 6, 8), torch.randn(1, 6, 6, 56)
    run = lambda name: functional.deform_conv(value, offset_mask, groups=2, backend=name)
    print(json.dumps({
        "reason": backends.why_not("cpu", call),
        "chosen": backends.choose(*call),
        "agrees": torch.allclose(run("auto"), run("reference"), atol=1e-5),
    }))
"""


@pytest.fixture(autouse=True)
def restore_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def usable() -> None:
    reason = backends.why_not("cpu", CALL)
    if reason is not None:
        pytest.skip(f"the cpu backend {reason}")


def start(script: str, **environment: str) -> subprocess.Popen[str]:
    kept = {key: text for key, text in os.environ.items() if not key.startswith("DCNV4_")}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**kept, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> str:
    output, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, errors
    return output


def probe(**environment: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(finish(start(PROBE, **environment)))
    return result


def assert_falls_back(result: dict[str, Any], reason: str) -> None:
    assert result["reason"].startswith("needs ")
    assert reason in result["reason"]
    assert "\n" not in result["reason"]
    assert result["chosen"] == "reference"
    assert result["agrees"]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/nowhere/c++"}, "C++ compiler"),
        ({"PATH": ""}, "C++ compiler"),
        ({"CXX": sys.executable}, "compiler"),
        ({"CXX": "false"}, "compiler"),
    ],
    ids=["missing", "no-path", "python", "failing"],
)
def test_without_a_compiler(tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    result = probe(DCNV4_CACHE_DIR=str(tmp_path), **environment)
    assert_falls_back(result, reason)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("", ["needs a C++ compiler (apt install g++, "]),
        ("import logging; logging.getLogger('dcnv4').setLevel(logging.ERROR)", []),
        ("import os; os.environ['DCNV4_BACKEND'] = 'reference'", []),
    ],
    ids=["at first", "not to be heard", "asked for"],
)
def test_slow_calls_are_announced_once(tmp_path: Path, setting: str, expected: list[str]) -> None:
    script = f"""
        {setting}
        import torch
        from dcnv4 import functional
        value, offset_mask = torch.randn(1, 6, 6, 8), torch.randn(1, 6, 6, 56)
        for dtype in (torch.float32, torch.float64):
            functional.deform_conv(value.to(dtype), offset_mask.to(dtype), groups=2)
    """
    process = start(script, DCNV4_CACHE_DIR=str(tmp_path), CXX="/nowhere/c++")
    said = process.communicate(timeout=300)[1]
    lines = [line for line in said.splitlines() if "dcnv4" in line]
    for line, words in zip(lines, expected, strict=True):
        assert line.startswith("dcnv4 runs 12 times slower forward and 30 times backward, ")
        assert words in line


@pytest.mark.usefixtures("usable")
def test_compiler_that_rejects_the_kernels(tmp_path: Path) -> None:
    compiler = tmp_path / "picky"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-dM*) exec c++ "$@";; esac\n'
        'echo "error: no vectors" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    result = probe(DCNV4_CACHE_DIR=str(cache), CXX=str(compiler))
    assert_falls_back(result, "error: no vectors")


def test_named_backend_raises_the_reason(tmp_path: Path) -> None:
    script = """
        import torch
        from dcnv4 import functional
        try:
            functional.deform_conv(
                torch.zeros(1, 3, 3, 4), torch.zeros(1, 3, 3, 27), groups=1, backend="cpu"
            )
        except RuntimeError as error:
            print(error)
    """
    output = finish(start(script, DCNV4_CACHE_DIR=str(tmp_path), CXX="/nowhere/c++"))
    assert "needs a C++ compiler" in output


def test_why_not() -> None:
    meta = CALL._replace(device=torch.device("meta"))
    assert "needs CPU tensors; got meta" in str(backends.why_not("cpu", meta))
    integers = CALL._replace(dtype=torch.int32)
    assert "got torch.int32" in str(backends.why_not("cpu", integers))


# Uses threads, then runs the same call in a forked child and in workers of a DataLoader.
FORK = """
    import os, torch
    from torch.utils.data import DataLoader, Dataset
    from dcnv4 import functional

    torch.set_num_threads(4)
    torch.manual_seed(0)
    value, offset_mask = torch.randn(2, 32, 32, 64), torch.randn(2, 32, 32, 108)

    def run():
        inputs = value.clone().requires_grad_(), offset_mask.clone().requires_grad_()
        output = functional.deform_conv(*inputs, backend="cpu")
        return [output.detach(), *torch.autograd.grad(output.sum(), inputs)]

    expected = run()

    def agrees():
        return all(torch.equal(a, b) for a, b in zip(run(), expected))

    class Calls(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return agrees()

    with torch.no_grad():
        child = os.fork()
        if child == 0:
            output = functional.deform_conv(value, offset_mask, backend="cpu")
            torch.set_num_threads(1)  # torch's own operations would wait for the lost threads
            os._exit(0 if torch.equal(output, expected[0]) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.cat(list(DataLoader(Calls(), num_workers=2))).all()
    assert agrees()
"""


@pytest.mark.usefixtures("usable")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_forked_children_and_workers() -> None:
    process = start(FORK, **{k: v for k, v in os.environ.items() if k == "DCNV4_CACHE_DIR"})
    try:
        finish(process, timeout=60)
    finally:
        process.kill()


def conv_results(dtype: torch.dtype, groups: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    value = torch.randn(1, 40, 40, 16 * groups).to(dtype).requires_grad_()
    offset_mask = (3 * torch.randn(1, 40, 40, 27 * groups)).to(dtype).requires_grad_()
    output = functional.deform_conv(value, offset_mask, groups=groups, backend="cpu")
    grad = torch.randn(output.shape).to(dtype)
    return [output.detach(), *torch.autograd.grad(output, (value, offset_mask), grad)]


def attn_results(dtype: torch.dtype, groups: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(30, 20), (15, 10)]
    value = torch.randn(1, 750, groups, 16).to(dtype).requires_grad_()
    locations = torch.rand(1, 750, groups, 2, 4, 2).to(dtype).requires_grad_()
    weights = torch.randn(1, 750, groups, 2, 4).to(dtype).requires_grad_()
    inputs = value, locations, weights
    output = functional.ms_deform_attn(value, shapes, *inputs[1:], softmax=True, backend="cpu")
    grad = torch.randn(output.shape).to(dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


@pytest.mark.usefixtures("usable")
@pytest.mark.parametrize("results", [conv_results, attn_results], ids=["conv", "attn"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bits_do_not_depend_on_threads(results: Any, groups: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    expected = results(dtype, groups)
    for threads in (2, 2, 3, 8):
        torch.set_num_threads(threads)
        for result, right in zip(results(dtype, groups), expected, strict=True):
            assert torch.equal(result, right)


def test_the_library_is_named_after_all_its_sources() -> None:
    folder = Path(cpu.__file__).parent
    native = [path for path in folder.iterdir() if path.suffix in (".cpp", ".h")]
    included = (folder.parent / "include").iterdir()
    assert {path.resolve() for path in cpu_compile._SOURCES} == {*native, *included}


def test_what_the_kernels_are_told_has_names() -> None:
    assert records.POINT.pack(x=1.5, width=7) == struct.pack("4d3q", 1.5, 0, 0, 0, 0, 7, 0)
    with pytest.raises(TypeError, match="Point has no columns"):
        records.POINT.pack(x=1.5, columns=7)


@pytest.mark.usefixtures("usable")
def test_sizes_and_padding_that_no_int_holds() -> None:
    window = Window((1, 1), (2**31, 2**31), (2**31, 0), (1, 1), 1, 1.0, False, False)
    value, offset_mask = torch.ones(1, 2, 2, 1), torch.zeros(1, 3, 1, 3)
    assert window.output_size(2, 2) == (3, 1)
    with pytest.raises(ValueError, match=r"H \+ padding.* = 2147483648; got \[1, 2, 2, 1\]"):
        cpu.conv_forward(value, offset_mask, window)


@pytest.mark.usefixtures("usable")
def test_levels_that_do_not_fit_count_nothing() -> None:
    """Only the backend is asked: `functional` rejects these sizes where it can read them."""
    value = torch.randn(1, 10, 2, 4)
    locations, weights = torch.rand(1, 5, 2, 3, 4, 2), torch.randn(1, 5, 2, 3, 4)
    shapes = torch.tensor([(2, 3), (3, 3), (10**6, 10**6)])
    expected = reference.attn_forward(value, shapes, locations, weights, False)
    output = cpu.attn_forward(value, shapes, locations, weights, False)
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(output)
    expected = reference.attn_backward(grad, value, shapes, locations, weights, False)
    got = cpu.attn_backward(grad, value, shapes, locations, weights, False)
    torch.testing.assert_close(got, expected)
    negative = torch.tensor([(-1, 5), (2, -3), (2, 2)])
    assert cpu.attn_forward(value, negative, locations, weights, False).isfinite().all()


@pytest.mark.usefixtures("usable")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux' peak memory")
def test_memory_does_not_grow_with_points() -> None:
    """From 9 to 169 points the peak grows by what the tensors do, give or take two megabytes."""
    script = """
        import resource, sys, torch
        from dcnv4.backends import cpu
        from dcnv4.geometry import Window
        k = int(sys.argv[1]) if len(sys.argv) > 1 else K
        window = Window((k, k), (1, 1), (k // 2,) * 2, (1, 1), 1, 1.0, False, False)
        value = torch.ones(1, 128, 128, 32)
        offset_mask = torch.full((1, 128, 128, 3 * k * k), 0.5)
        small = value[:, :8, :8], offset_mask[:, :8, :8]
        cpu.conv_backward(cpu.conv_forward(*small, window), *small, window)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        output = cpu.conv_forward(value, offset_mask, window)
        grads = cpu.conv_backward(output, value, offset_mask, window)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tensors = sum(t.numel() * t.element_size() for t in (output, *grads))
        print((after - before) * 1024 - tensors)
    """
    kept = {k: v for k, v in os.environ.items() if k == "DCNV4_CACHE_DIR"}
    extra = [int(finish(start(script.replace("K\n", f"{k}\n"), **kept))) for k in (3, 13)]
    assert max(extra) < 2 << 20, extra


@pytest.mark.usefixtures("usable")
def test_python_objects_do_not_accumulate() -> None:
    window = Window((3, 3), (1, 1), (1, 1), (1, 1), 2, 1.0, False, False)
    value, offset_mask = torch.ones(1, 5, 5, 8), torch.ones(1, 5, 5, 54)
    cpu.conv_forward(value, offset_mask, window)
    tracemalloc.start()
    for _ in range(200):
        cpu.conv_forward(value, offset_mask, window)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 20_000


# Reads lines "origin x size" and prints what `corners` says: legal corners, pixel and fraction of a
# point in a row, then of one in a column. What C++ does not define ends it.
CORNERS = r"""
    #include <cstdio>
    #include "sampling.h"

    int main() {
        double number;
        for (int origin, size; std::scanf("%d %lf %d", &origin, &number, &size) == 3;) {
            const NUMBER x = NUMBER(number);
            const auto across = dcnv4::corners(origin, 0, x, NUMBER(0), 1, size);
            const auto down = dcnv4::corners(0, origin, NUMBER(0), x, size, 1);
            std::printf("[[%d, %d, %.17g], [%d, %d, %.17g]]\n",
                        across.legal, across.column, double(across.fraction_x),
                        down.legal, down.row, double(down.fraction_y));
        }
    }
"""


def places() -> Iterator[tuple[int, float, int]]:
    """Pixels, numbers of float32 that are added to them, and sizes of an image."""
    rng = random.Random(0)
    for size in (0, 1, 5, 2**20, 2**31 - 1):
        lowest = size - (2**31 - 1)
        for origin in {
            lowest,
            lowest + 1,
            -3,
            -1,
            0,
            1,
            size,
            2**31 - 1,
            rng.randint(lowest, size),
        }:
            near = [b - origin + d for b in (0, size) for d in (-2, -1.5, -1, -0.5, 0, 0.25, 1)]
            far = [sign * x for sign in (-1, 1) for x in (2**31, 2**31 - 128, 1e30, math.inf)]
            other = [-1e-30, 1e-30, math.nan, rng.uniform(-3, 3), rng.uniform(-(2**31), 2**31)]
            for x in (*near, *far, *other):
                if origin >= lowest:
                    yield origin, float(np.float32(x)), size


@pytest.mark.usefixtures("usable")
@pytest.mark.parametrize("number", ["float", "double"])
def test_corners_around_any_pixel(tmp_path: Path, number: str) -> None:
    """Against integers of any size, where the sum of a pixel and a number would not be exact."""
    include = Path(backends.__file__).parent / "include"
    source, program = tmp_path / "corners.cpp", tmp_path / "corners"
    source.write_text(textwrap.dedent(CORNERS))
    flags = ["-std=c++17", "-O1", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    compiler = cpu_compile._compiler()
    subprocess.run(
        [*compiler, *flags, f"-I{include}", f"-DNUMBER={number}", source, "-o", program], check=True
    )
    asked = list(places())
    lines = "".join(f"{origin} {x!r} {size}\n" for origin, x, size in asked)
    done = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
    inside = 0
    for (origin, x, size), line in zip(asked, done.stdout.splitlines(), strict=True):
        position = origin + Fraction(x) if math.isfinite(x) else None
        across, down = json.loads(line)
        case = f"{x!r} from {origin} of {size}"
        if position is None or not -1 < position < size:
            assert across[:2] == down[:2] == [0, 0], case
            continue
        inside += 1
        first = math.floor(position)
        before, after = first >= 0, first < size - 1
        assert across[:2] == [before | after << 1, first], case
        assert down[:2] == [before | after << 2, first], case
        assert across[2] == down[2] == pytest.approx(float(position - first), abs=2**-25), case
    assert inside > 100


@pytest.mark.exhaustive
@pytest.mark.parametrize("calls", [60, 400])
def test_random_calls_under_the_sanitizers(calls: int) -> None:
    command = [sys.executable, str(SUPPORT / "fuzz_cpu.py"), "--calls", str(calls), "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
