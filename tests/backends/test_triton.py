"""The Triton backend: its choice of launch, what a compilation depends on, when it can run; and,
in a process of their own, its kernels in Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dcnv4 import backends, functional, geometry
from dcnv4.backends import triton as backend
from support import cases, triton_compiled
from support.processes import run_module
from support.runner import Runner
from support.tiers import one_in

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MISSING = backend.why_not(backends.Call("deform_conv", CUDA, torch.float32))
needs_triton = pytest.mark.skipif(MISSING is not None, reason=f"triton: {MISSING}")
INTERPRETED = backend.why_not(backends.Call("deform_conv", CPU, torch.float32)) is None
only_interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the process of test_in_the_interpreter"
)
DTYPES = "float16", "float32", "bfloat16", "float64"
LAYERS = [
    (groups, depth, levels, points, itemsize, backward)
    for groups, depth in [(1, 1), (4, 16), (7, 16), (32, 16), (8, 64), (3, 17), (2, 1000)]
    for levels, points in [(None, 9), (None, 8), (None, 49), (None, 1), (1, 4), (4, 4), (3, 13)]
    for itemsize in (2, 4, 8)
    for backward in (False, True)
]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_in_the_interpreter(request: pytest.FixtureRequest) -> None:
    exhaustive = request.config.getoption("exhaustive")
    operators = Path(__file__).parents[1] / "operators"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    others = ("test_operators.py", "test_positions.py", "test_amp.py", "test_determinism.py")
    files = [*(str(operators / name) for name in others), __file__]
    dtypes = "not float32" if exhaustive else "float16"
    chosen = ["-k", f"interpreted or (triton-cpu and {dtypes})"]
    chosen += ["--exhaustive"] if exhaustive else []
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [*command, *files, *chosen], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) > len(cases.CASES), run.stdout[-500:]


def compilations() -> list[tuple[str, ...]]:
    """Of every architecture a dtype and a case of every operator, others every time; of one for
    attention where compilers take a minute for such a case."""
    conv, *attention = (
        [name for name, case in cases.CASES if name.startswith(operator) and case.work > 0]
        for operator in ("conv", "attn", "offsets")
    )
    found = []
    for i, target in enumerate(triton_compiled.TARGETS):
        slow = not target.startswith("sm_")
        operators = (conv, attention[i % 2]) if slow else (conv, *attention)
        chosen = (names[5 * i % len(names)] for names in operators)
        found.append((target, DTYPES[i % 4], *chosen))
    return found


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("chosen", one_in(20, compilations(), "-".join))
def test_compiles_without_a_gpu(chosen: tuple[str, ...], tmp_path: Path) -> None:
    """For GPUs of two makers, to what each of them runs."""
    run = run_module("triton_compiled", *chosen, TRITON_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0, run.stderr[-5000:]
    code = "cubin" if chosen[0].startswith("sm_") else "hsaco"
    assert run.stdout.splitlines() == [f"forward {code}", f"backward {code}"] * len(chosen[2:])


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_preferred_launch(layer: tuple[Any, ...]) -> None:
    groups, depth, levels, points, *_ = layer
    launch = backend.preferred(*layer)
    for size in (launch.block, launch.block_d, launch.block_k, launch.warps):
        assert size & (size - 1) == 0
    assert depth <= launch.block_d < 2 * depth
    assert (levels or 1) * points <= launch.block_k < 2 * (levels or 1) * points
    assert groups % launch.block_g == 0
    assert points % launch.chunk == 0
    for pixels in (1, 7, 1000):
        bundles = groups // launch.block_g
        blocks, rest = divmod(launch.programs(pixels, groups), bundles)
        assert rest == 0
        assert (blocks - 1) * launch.block < pixels * launch.block_g <= blocks * launch.block


def test_threads_load_and_add_sixteen_bytes_of_the_usual_layers() -> None:
    for itemsize, elements in ((2, 8), (4, 4)):
        forward = backend.preferred(4, 16, None, 9, itemsize, False)
        assert forward.block * 16 == 32 * forward.warps * elements
        for levels, points in ((None, 9), (4, 4)):
            backward = backend.preferred(4, 32, levels, points, itemsize, True)
            assert backward.block * 32 == 32 * backward.warps * 4


class _Recorder:
    """In place of the kernels: keeps the arguments of every launch."""

    def __init__(self) -> None:
        from dcnv4.backends.triton import kernels

        self.kernels, self.calls = kernels, []

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self.kernels, name)
        if name not in ("forward", "backward"):
            return kernel

        class Launcher:
            fn = staticmethod(kernel.fn)

            def __getitem__(_, grid: tuple[int, ...]) -> Any:  # noqa: N805
                return lambda *args, **options: self.calls.append((kernel, args, options))

        return Launcher()


def _conv_calls(batch: int, height: int, width: int) -> None:
    window = functional.window(3, groups=2)
    value, offset_mask = torch.ones(batch, height, width, 32), torch.ones(batch, height, width, 56)
    backend.conv_forward(value, offset_mask, window)
    backend.conv_backward(value, value, offset_mask, window)


def _attn_calls(batch: int, height: int, width: int) -> None:
    shapes, length = [(height, width), (1, width)], height * width + width
    value, locations = torch.ones(batch, length, 2, 16), torch.ones(batch, height, 2, 2, 4, 2)
    weights, grad = torch.ones(batch, height, 2, 2, 4), torch.ones(batch, height, 32)
    backend.attn_forward(value, shapes, locations, weights, True)
    backend.attn_backward(grad, value, shapes, locations, weights, True)


def _offsets_calls(batch: int, height: int, width: int) -> None:
    shapes, length = [(height, width), (1, width)], height * width + width
    value, offsets = torch.ones(batch, length, 2, 16), torch.ones(batch, height, 2, 2, 4, 2)
    weights, grad = torch.ones(batch, height, 2, 2, 4), torch.ones(batch, height, 32)
    reference = geometry.Reference(torch.ones(batch, 1, 1, 4), "size")
    backend.attn_forward(value, shapes, offsets, weights, True, False, reference)
    backend.attn_backward(grad, value, shapes, offsets, weights, True, False, reference)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("calls", [_conv_calls, _attn_calls, _offsets_calls])
def test_a_compilation_depends_on_no_batch_and_no_image(
    calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What differs between calls is a pointer, or a number that is not specialised on."""
    recorder = _Recorder()
    monkeypatch.setattr(backend, "_kernels", lambda: recorder)
    sizes = [(1, 1, 1), (2, 16, 5), (16, 7, 32)]
    for size in sizes:
        calls(*size)
    directions = len(recorder.calls) // len(sizes)
    assert directions == 2
    for direction in range(directions):
        launches = recorder.calls[direction::directions]
        kernel, first, options = launches[0]
        for _, others, other_options in launches[1:]:
            assert other_options == options
            for parameter, a, b in zip(kernel.params, first, others, strict=True):
                if parameter.is_constexpr or a is None:
                    assert a == b, parameter.name
                elif isinstance(a, torch.Tensor):
                    assert a.dtype == b.dtype, parameter.name
                else:
                    assert parameter.do_not_specialize, parameter.name


@needs_triton
@pytest.mark.gpu
def test_a_new_image_size_compiles_nothing() -> None:
    import triton

    knobs = getattr(triton, "knobs", None)
    if knobs is None or not hasattr(knobs.runtime, "jit_post_compile_hook"):
        pytest.skip("needs a Triton that reports its compilations (3.4 or newer)")
    compiled: list[str] = []
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda *args, **named: compiled.append(str(named))
    try:
        counts = []
        for batch, size in ((1, 5), (2, 16), (3, 1), (16, 33)):
            value = torch.randn(batch, size, size, 3 * 7, device="cuda", requires_grad=True)
            offset_mask = torch.randn(batch, size, size, 81, device="cuda", requires_grad=True)
            output = functional.deform_conv(value, offset_mask, groups=3, backend="triton")
            output.sum().backward()
            counts.append(len(compiled))
    finally:
        knobs.runtime.jit_post_compile_hook = before
    assert counts == [2, 2, 2, 2]


@needs_triton
@pytest.mark.gpu
def test_host_shapes_become_one_tensor_that_a_graph_may_record() -> None:
    sizes = torch.device("cuda", torch.cuda.current_device())
    first = backend._sizes([(4, 5), (2, 3)], sizes)
    assert first.tolist() == [[4, 5], [2, 3]]
    assert backend._sizes([(4, 5), (2, 3)], sizes) is first
    case = cases.ATTENTION[0]
    *inputs, _ = (t.detach() for t in case.inputs(torch.float32, "cuda"))
    expected = case.call(*inputs, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = case.call(*inputs, backend="triton")
    output.zero_()
    graph.replay()
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@needs_triton
def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = backends.Call("ms_deform_attn", CUDA, torch.float16)
    on_cpu = on_gpu._replace(device=CPU)
    assert backend.why_not(on_gpu) is None
    if not INTERPRETED:
        reason = "needs a GPU, or TRITON_INTERPRET=1 when Python starts; got cpu"
        assert backend.why_not(on_cpu) == reason
    monkeypatch.setattr(sys.modules["triton"], "__version__", "2.3.1")
    upgrade = "needs triton >= 3.0 (python -m pip install --upgrade triton); got 2.3.1"
    assert [backend.why_not(call) for call in (on_cpu, on_gpu)] == [upgrade] * 2


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_why_not_without_triton(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = backend.why_not(backends.Call("deform_conv", device, torch.float32))
    assert reason is not None
    assert reason.startswith("needs triton >= 3.0 (python -m pip install triton); got ")


@needs_triton
def test_the_environment_chooses_triton_for_gpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DCNV4_BACKEND", raising=False)
    monkeypatch.setenv("DCNV4_USE_TRITON", "1")
    assert backends.requested("cpu") == "auto"
    for op in ("deform_conv", "ms_deform_attn"):
        assert backends.choose(op, CUDA, torch.bfloat16) == "triton"
    monkeypatch.setenv("DCNV4_BACKEND", "reference")
    call = "deform_conv", CUDA, torch.bfloat16
    assert backends.choose(*call) == "reference"
    assert backends.choose(*call, backend="triton") == "triton"


def test_slices_are_not_copied() -> None:
    wide = torch.zeros(2, 3, 4, 40)
    part = wide[..., 8:24]
    flat, spacing = backend._pixels(part, 3)
    assert (flat.data_ptr(), tuple(flat.shape), spacing) == (part.data_ptr(), (24, 16), 40)
    whole, spacing = backend._pixels(wide, 3)
    assert (whole.data_ptr(), spacing) == (wide.data_ptr(), 40)
    permuted, spacing = backend._pixels(torch.zeros(2, 16, 3, 4).permute(0, 2, 3, 1), 3)
    assert (permuted.stride(), spacing) == ((16, 1), 16)
    uneven, spacing = backend._pixels(torch.zeros(2, 3, 5, 8)[:, :, :4], 3)
    assert (uneven.stride(), spacing) == ((8, 1), 8)
    assert backend._pixels(wide[:1, :1, :1, :5], 3)[1] == 5


@only_interpreted
def test_interpreted_levels_that_do_not_fit_count_nothing() -> None:
    """Shapes that only the device knows are not checked: no other memory may be read for them."""
    value = torch.randn(1, 12, 1, 4)
    locations, weights = torch.rand(1, 5, 1, 3, 2, 2), torch.rand(1, 5, 1, 3, 2)
    grad = torch.randn(1, 5, 4)
    expected = backend.attn_forward(
        value, [(2, 3)], locations[:, :, :, :1], weights[:, :, :, :1], False
    )
    huge = 2**40
    for wrong in ([(4, 5), (1, 1)], [(-1, -3), (2, 2)], [(huge, huge), (1, 1)], [(1, huge)] * 2):
        shapes = torch.tensor([(2, 3), *wrong])
        with _guarded():
            output = backend.attn_forward(value, shapes, locations, weights, False)
            grads = backend.attn_backward(grad, value, shapes, locations, weights, False)
        torch.testing.assert_close(output, expected)
        assert grads[0][:, 6:].count_nonzero() == 0
        assert grads[1][:, :, :, 1:].count_nonzero() == 0


@only_interpreted
@pytest.mark.parametrize("case", one_in(4, (case for _, case in cases.CASES), cases.name))
def test_interpreted_memory_accesses_stay_inside(case: cases.Case) -> None:
    runner = Runner("triton", "cpu")
    with _guarded() as accesses:
        results = runner.run(case, torch.float32)
    case.check(results, torch.float32)
    assert accesses or results["output"].numel() == 0


@only_interpreted
@pytest.mark.parametrize("size", [64, 2**20, 2**31 - 2**10])
def test_interpreted_corners_are_those_of_the_geometry(size: int) -> None:
    """Next to both borders, as far from the first pixel as an image goes; what is not finite and
    what is too far away is outside, and no corner outside counts."""
    from support import triton_probe

    small = torch.tensor([0.0, -0.0, 0.25, -0.25, 1e-10, -1e-10, -1.0, 1.0, 3.5, -3.5, 60.0, -60.0])
    big = torch.tensor([np.inf, -np.inf, np.nan, 1e30, -1e30, 2.0**31, -(2.0**31), 2.0**30])
    numbers = torch.cat((small, big, -big[-1:], 2.0**20 + small[:3]))
    origins = torch.tensor([-2, -1, 0, 1, 63, size - 2, size - 1, size, size + 1])
    origins = origins.repeat(len(numbers))
    numbers = numbers.repeat_interleave(9)
    x, origin = (F.pad(t, (0, 256 - len(t))) for t in (numbers, origins))
    before, counts = (torch.zeros(256, dtype=torch.int32) for _ in range(2))
    fraction = torch.zeros(256)
    triton_probe.around[(1,)](x, origin.int(), before, fraction, counts, size, COUNT=256)
    expected = geometry._around(x, origin, size)
    legal = expected[2][:, 0].int() + 2 * expected[2][:, 1].int()
    near = x.abs() < 2**24
    assert torch.equal(counts[near], legal[near])
    counted = counts > 0
    assert torch.equal(before[counted & near], expected[0][counted & near, 0].int())
    assert torch.equal(fraction[counted & near], expected[1][counted & near])
    assert counted.any()
    for offset in (0, 1):
        column = before[(counts >> offset & 1) == 1].long() + offset
        assert ((column >= 0) & (column < size)).all()


@only_interpreted
@pytest.mark.parametrize("case", [cases.CONV[2], cases.ATTENTION[0]], ids=lambda case: case.id)
def test_interpreted_wide_offsets(case: cases.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tensors of 2³¹ elements or more take."""
    assert backend._index(2**30) == "int32"
    assert backend._index(2**31) == "int64"
    monkeypatch.setattr(backend, "_index", lambda elements: "int64")
    case.check(case.run(torch.float32, "cpu", "triton"), torch.float32)


@contextmanager
def _guarded() -> Iterator[list[int]]:
    """Every address that a kernel reads or writes must lie in a tensor it was given."""
    from triton.runtime import interpreter

    ranges: list[tuple[int, int]] = []
    counts: list[int] = []
    kernels = backend._kernels()

    def check(pointers: Any, mask: Any) -> None:
        used = pointers.data[mask.data.astype(bool)]
        inside = [(used >= start) & (used < end) for start, end in ranges]
        assert np.any(inside, axis=0).all(), "a kernel reads or writes outside of its tensors"
        counts.append(used.size)

    class Guard:
        def __getattr__(self, name: str) -> Any:
            kernel = getattr(kernels, name)
            if name not in ("forward", "backward"):
                return kernel

            class Launcher:
                fn = staticmethod(kernel.fn)

                def __getitem__(self, grid: tuple[int, ...]) -> Any:
                    def launch(*args: Any, **options: Any) -> None:
                        tensors = [a for a in args if isinstance(a, torch.Tensor)]
                        starts = [t.untyped_storage().data_ptr() for t in tensors]
                        sizes = [t.untyped_storage().nbytes() for t in tensors]
                        ranges[:] = [(a, a + n) for a, n in zip(starts, sizes, strict=True)]
                        kernel[grid](*args, **options)

                    return launch

            return Launcher()

    builder = interpreter.InterpreterBuilder
    load, store, add = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
    )

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, values: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, values, mask, *rest)

    def checked_add(self: Any, op: Any, pointers: Any, values: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return add(self, op, pointers, values, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_kernels", lambda: Guard())
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        patch.setattr(builder, "create_atomic_rmw", checked_add)
        yield counts
