"""The CUDA backend: its kernels compile for every architecture, its launches, its cache, its
reasons; and, on a GPU, streams, threads, graphs, devices, sizes."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dcnv4 import backends, functional, geometry
from dcnv4.backends import cuda as backend
from dcnv4.backends.cuda import choice, compile, plans
from support import cases, fuzz_cuda, kernel_cases, launches, pairs
from support.kernel_cases import not_sorted, not_tiled, plain_tiles, sorted_cases, sorted_conv_cases
from support.launches import DIRECT, EVERY, SORTED
from support.runner import deterministic

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
CALL = backends.Call("deform_conv", torch.device("cuda"), torch.float32)
Variant = tuple[str, compile.Macros]


@pytest.fixture
def nvrtc() -> None:
    try:
        compile._nvrtc_version()
    except Exception as error:
        pytest.skip(f"needs NVRTC; got {type(error).__name__}: {error}")


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> dict[Variant, None]:
    """What plans made meanwhile would compile, in their order."""
    found: dict[Variant, None] = {}

    def record(name: str, macros: compile.Macros, index: int, shared: int) -> None:
        found[name, macros] = None

    properties = SimpleNamespace(multi_processor_count=132, major=9)
    properties.shared_memory_per_block_optin = 227 << 10
    monkeypatch.setattr(compile, "kernel", record)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return found


def _plan_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan the cases; a part of them, too, for a batch that needs 64-bit indices, for deterministic
    gradients, and with the kernels for large calls."""
    for i, (_, case) in enumerate(cases.CASES):
        for dtype in cases.DTYPES:
            _plan(case, dtype, case.batch)
            if i % 10 == 0:
                _plan(case, dtype, 2**31)
                _plan(case, dtype, case.batch, deterministic=dtype != torch.float64)
    large_calls = *sorted_cases(), *sorted_conv_cases(), *not_tiled(), *not_sorted()
    for i, large in enumerate(large_calls):
        slices = EVERY if isinstance(large, cases.AttnCase) else SORTED
        monkeypatch.setattr(choice, "PAYS_FROM", slices)
        for j, dtype in enumerate(cases.DTYPES[1:]):
            _plan(large, dtype, large.batch, deterministic=(i + j) % 4 == 0)
    for dtype in cases.DTYPES[1:]:
        layout = (2, 3, 5, 40), (600, 200, 40, 1), dtype, 0
        for weights in (None, (layout, 18, 27)):
            plans.fixed_point_scale_plan.__wrapped__(layout, weights, 1, 9, 0)
            plans.fixed_point_scale_plan.__wrapped__((*layout[:3], 2), weights, 1, 9, 0)
        for count in (1, 12):
            plans.zeros_plan.__wrapped__(96, 0)
            for order in (False, True):
                shape = 2, 3, 5, count
                for row in (count, count + 4):
                    layout = shape, (15 * row, 5 * row, row, 1), dtype, 0
                    plans.convert_sums_plan.__wrapped__(2, layout, order, 0, 0)
        if choice.sums_columns(256, dtype):
            layout = (2, 9, 8, 32), (9 * 256, 256, 32, 1), dtype, 0
            plans.convert_sums_plan.__wrapped__(1, layout, False, 256, 0)
        for channels in (8, 112, 512, 1536):
            for direction in ("forward", "backward"):
                for weights in {dtype, torch.float32}:
                    settings = channels, dtype, weights, 1e-6, 0
                    plans.layer_norm_plan.__wrapped__(direction, 100, *settings)
    for dtype in (torch.float16, torch.bfloat16):
        for channels, width, given in (
            *((32, 8, torch.float32), (32, 8, dtype), (64, 176, torch.float32), (64, 176, dtype)),
            *((96, 72, torch.float32), (256, 64, torch.float32), (256, 384, torch.float32)),
        ):
            plans.linear_plan.__wrapped__(1 << 20, channels, width, given, dtype, 0)
        for channels in (64, 128, 256):
            plans.mlp_plan.__wrapped__(1 << 20, channels, 4 * channels, dtype, 1e-6, 0)


def _plan(case: cases.Case, dtype: torch.dtype, batch: int, deterministic: bool = False) -> None:
    """Plan the launches of a case, as forward and backward do, for `batch` images."""
    *arguments, grad = (tensor.detach() for tensor in case.inputs(dtype))
    value, coordinates = functional._promote(arguments[0], *arguments[1:])
    grad = grad.to(value.dtype)
    prepare = backend._pixels
    rest: tuple[Any, ...]
    if isinstance(case, cases.ConvCase):
        plan: Callable[..., Any] = plans.conv_plan.__wrapped__
        rest = (functional.window(**case.settings, softmax=case.softmax),)
    else:
        assert isinstance(case, cases.AttnCase)
        prepare, plan = backend._rows, plans.attn_plan.__wrapped__
        rest = (tuple(size for pair in case.shapes for size in pair), case.softmax)
        *place, offsets, weights = coordinates
        coordinates = offsets, weights.reshape(offsets.shape[:-1])
    first, *layouts = (plans.layout(prepare(tensor)) for tensor in (value, *coordinates))
    (_, *shape), *where = first
    first = ((batch, *shape), *where)
    gradient: Any = plans.layout(prepare(grad))
    if isinstance(case, cases.AttnCase):
        reference = None
        if isinstance(case, cases.OffsetsCase):
            reference = geometry.Reference(place[0], case.box_normalizer)
        layouts.append(backend._place(reference)[1])
        gradient = gradient, 1, 1
    plan(first, *layouts, None, *rest, False, 0)
    if isinstance(case, cases.ConvCase):
        written = (plans.layout(tensor.contiguous()) for tensor in (value, *coordinates))
        gradient = gradient, *written
    plan(first, *layouts, gradient, *rest, deterministic, 0)


def _compile(jobs: Sequence[tuple[str, compile.Macros, str]]) -> None:
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        codes = list(pool.map(compile.compile, *zip(*jobs, strict=True), chunksize=8))
    assert all(code.startswith(b"\x7fELF") for code in codes)


def _architectures(name: str) -> list[str]:
    """Those that kernel `name` runs on."""
    if name in compile._OF_ONE_ARCHITECTURE:
        return [compile.architecture(name, 9, 0)]
    return list(ARCHITECTURES["tile" in name or "sorted" in name :])


@pytest.mark.parametrize(
    "part", [pytest.param(48, id="few"), pytest.param(1, id="all", marks=pytest.mark.exhaustive)]
)
def test_variants_compile(
    nvrtc: None, planned: dict[Variant, None], part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one architecture each, so that those of a kernel meet all."""
    _plan_all(monkeypatch)
    macros = [dict(macros) for _, macros in planned]
    assert {m["INDEX"] for m in macros if "INDEX" in m} == {"unsigned", "unsigned long long"}
    assert {m["DETERMINISTIC"] for m in macros if "DETERMINISTIC" in m} == {"0", "1"}
    by_kernel: dict[str, list[Variant]] = {}
    for variant in planned:
        by_kernel.setdefault(variant[0], []).append(variant)
    assert set(by_kernel) == launches.KERNELS - {"conv_tile_forward", "conv_tile_backward"}
    jobs = []
    for name, of_kernel in by_kernel.items():
        architectures = _architectures(name)
        for i, variant in enumerate(of_kernel[::part]):
            jobs.append((*variant, architectures[i % len(architectures)]))
    _compile(jobs)


def _tile_variants(planned: dict[Variant, None], row: pairs.Row) -> list[Variant]:
    """The kernels of a row's forward and backward, tiles and what computes the rest."""
    planned.clear()
    case = kernel_cases.tile_case({**row, "data": "near", "size": "ragged", "layout": "plain"})
    _plan(case, row["dtype"], case.batch, row["deterministic"])
    names = [name for name, _ in planned]
    assert names[:3:2] == ["conv_tile_forward", "conv_tile_backward"], names
    return list(planned)


@pytest.mark.parametrize(
    "part", [pytest.param(96, id="few"), pytest.param(1, id="all", marks=pytest.mark.exhaustive)]
)
def test_tile_variants_compile(
    nvrtc: None, planned: dict[Variant, None], part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one architecture each, so that every pair of it and of a setting meets, with the kernels
    that compute what tiles leave."""
    monkeypatch.setattr(choice, "PAYS_FROM", EVERY)
    rows = pairs.rows(kernel_cases.variants(), {"architecture": ARCHITECTURES[1:]})
    jobs = {
        (*variant, row["architecture"])
        for row in rows[::part]
        for variant in _tile_variants(planned, row)
    }
    _compile(sorted(jobs))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_launch_shape(itemsize: int, backward: bool) -> None:
    for depth in (*range(1, 67), 80, 96, 100, 128, 255, 256, 1000):
        for points in (1, 9, 16, 49):
            for alignment in (2, 4, 8, 16):
                if alignment < itemsize:
                    continue
                vector, lanes = choice.launch_shape(depth, points, itemsize, alignment, backward)
                assert depth % vector == 0
                assert vector * itemsize <= alignment
                assert lanes in (1, 2, 4, 8, 16, 32)
                assert lanes == 32 or vector * lanes >= depth
                assert lanes == 1 or vector * lanes < 2 * depth
                assert not backward or vector <= 4


def test_threads_move_sixteen_bytes_of_the_usual_layers() -> None:
    for itemsize, vector in ((2, 8), (4, 4)):
        for depth in (16, 32, 64):
            assert choice.launch_shape(depth, 9, itemsize, 16, False) == (vector, depth // vector)
            assert choice.launch_shape(depth, 9, itemsize, 16, True) == (4, depth // 4)


def test_block_size() -> None:
    for threads in (1, 63, 64, 1000, 77_000, 132 * 256, 132 * 256 + 1, 10**7, 2**33):
        size = choice.block_size(threads, 132)
        assert size in (64, 128, 256)
        load = {s: math.ceil(math.ceil(threads / s) / 132) * s for s in (64, 128, 256)}
        assert load[size] <= 1.1 * min(load.values())
    assert choice.block_size(10**7, 132) == 256
    assert choice.block_size(132 * 64, 132) == 64


def test_a_launch_that_may_begin_early(nvrtc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = compile._configuration(5, 64, 1024, 7)
    assert (configuration.gridDimX, configuration.blockDimX) == (5, 64)
    assert (configuration.sharedMemBytes, int(configuration.hStream)) == (1024, 7)
    (early,) = configuration.attrs
    assert early.value.programmaticStreamSerializationAllowed == 1
    for major, driver, expected in ((9, 12_030, True), (9, 12_020, False), (8, 13_000, False)):
        properties = SimpleNamespace(major=major)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, p=properties: p)
        monkeypatch.setattr(compile, "_driver_version", lambda d=driver: d)
        assert compile.overlaps.__wrapped__(0) is expected


def test_strip_height() -> None:
    for columns, tiles in ((1, 1), (7, 14), (160, 50), (1792, 14), (5, 1000), (10**6, 3)):
        assert 1 <= choice.strip_height(columns, tiles, 528) <= min(tiles, 64)
    assert (
        choice.strip_height(448, 14, 528) == 2
    )  # 3136 strips in six rounds, all but the last full
    assert choice.strip_height(3136, 14, 2112) == 7  # 6272 in three
    assert choice.strip_height(4, 8, 528) == 1  # few pixels: as many blocks as tiles


def test_tiles_take_what_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "PAYS_FROM", EVERY)

    def why_not(
        depth: int = 16,
        dtype: torch.dtype = torch.float16,
        extra: int = 0,
        size: tuple[int, int] = (8, 8),
        **settings: Any,
    ) -> str | None:
        window = functional.window(**{"groups": 4, "padding": 1, **settings})
        made = {"dtype": dtype, "device": "meta"}
        value = torch.empty(2, *size, 4 * depth, **made)
        offset_mask = torch.empty(2, *window.output_size(*size), 4 * 28 + extra, **made)
        layouts = (choice.Layout(*plans.layout(tensor)) for tensor in (value, offset_mask))
        chosen = choice.conv(*layouts, None, window, False, choice.GPU(9, 132))
        reason = chosen.why_not["conv_tile_forward"]
        assert (chosen.leftover == 0) is (reason is not None)
        names = ["conv_forward"] if reason else ["conv_tile_forward", "conv_forward"]
        assert [kernel.name for kernel in chosen.kernels] == names
        return reason

    for depth in (16, 32, 48, 64):
        assert why_not(depth) is None
    assert why_not(dtype=torch.bfloat16) is None
    assert why_not(remove_center=True, softmax=True, padding=0) is None
    for depth in (8, 24, 80):
        assert why_not(depth) == "needs 16, 32, 48 or 64 channels a group"
    assert why_not(dtype=torch.float32) == "needs a value in half precision"
    assert why_not(extra=1) == "needs offset_mask's pixels on 8 bytes"
    assert why_not(stride=2) == "needs a stride of 1"
    assert why_not(kernel_size=5) == "needs a kernel of at most 3 x 3"
    for scale in (0.25, 0.5, 2.0, -2.0):
        assert why_not(offset_scale=scale) is None
    assert why_not(dilation=2) is why_not(dilation=(4, 1), offset_scale=0.5) is None
    for scale in (0.75, 0.0, 2.0**-9):
        unit = "needs offset_scale a power of two from 1/256 to 256"
        assert why_not(offset_scale=scale) == unit
    wide = "needs a scaled kernel of at most 5 x 5 pixels"
    assert why_not(offset_scale=-4.0) == why_not(dilation=(1, 3)) == wide
    assert why_not(offset_scale=4.0, kernel_size=2) is None
    assert why_not(offset_scale=64.0, kernel_size=1) is None
    assert why_not(size=(3, 1 << 20)) is why_not(size=(1 << 20, 3)) is None
    assert why_not(size=(1, 5 << 20)) == "needs rows of a tile that lanes count in 32 bits"
    monkeypatch.undo()
    assert why_not() == "needs 32768 slices"


def test_sorting_takes_what_it_can() -> None:
    slices = choice.Slices(1 << 13, 4, 16, 9, False, False, torch.float16, 16, False, True, 64)

    def why_not(pixels: int = 64, major: int = 8, **changed: Any) -> str | None:
        changes = slices._replace(**changed)
        return choice.why_not_sorted("conv_sorted_backward", changes, pixels, choice.GPU(major, 1))

    assert why_not() is None
    assert why_not(total=(1 << 13) - 1) == "needs 8192 slices"
    assert why_not(index64=True) == "needs 32-bit indices"
    for depth in (8, 48, 128):
        assert why_not(depth=depth) == "needs 16, 32 or 64 channels a group"
    assert why_not(dtype=torch.float64) == "needs sums in float32"
    assert why_not(alignment=8) is why_not(dtype=torch.float32) is None
    aligned = "needs slices aligned for four channels"
    assert why_not(alignment=4) == why_not(dtype=torch.float32, alignment=8) == aligned
    block = choice.sorting_block(slices)
    most = (1 << 32) // (block.columns * block.rows)
    assert why_not(pixels=most - 1) is None
    assert why_not(pixels=most) == "needs keys of 32 bits"
    assert why_not(major=7) == "needs compute capability 8.0"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nvrtc: None) -> list[str]:
    """The kernels compiled, in a cache of its own; compiling them is pretended."""
    calls: list[str] = []

    def pretend(name: str, macros: compile.Macros, arch: str) -> bytes:
        calls.append(name)
        return f"code of {name} {macros} {arch}".encode()

    monkeypatch.setenv("DCNV4_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compile, "compile", pretend)
    return calls


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_cache_is_read_by_the_next_call(compiled: list[str], tmp_path: Path) -> None:
    code = compile.cached("a", (("N", "1"),), "sm_90")
    assert compile.cached("a", (("N", "1"),), "sm_90") == code
    assert compiled == ["a"]
    assert len(_entries(tmp_path)) == 1


def test_cache_depends_on_all_that_the_code_does(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = [
        compile.cached("a", (("N", "1"),), "sm_90"),
        compile.cached("b", (("N", "1"),), "sm_90"),
        compile.cached("a", (("N", "2"),), "sm_90"),
        compile.cached("a", (("N", "1"),), "sm_80"),
    ]
    assert len(set(codes)) == len(compiled) == 4
    for name, other in (("_sources", ""), ("_nvrtc_version", (1, 2)), ("_driver_version", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(compile, name, lambda other=other: other)
            compile.cached("a", (("N", "1"),), "sm_90")
    assert len(compiled) == 7


@pytest.mark.parametrize("damage", ["empty", "short", "flipped", "foreign"])
def test_cache_trusts_no_damaged_entry(compiled: list[str], tmp_path: Path, damage: str) -> None:
    code = compile.cached("a", (), "sm_90")
    (entry,) = _entries(tmp_path)
    written = entry.read_bytes()
    compile.cached("b", (), "sm_90")
    (other,) = (path for path in _entries(tmp_path) if path != entry)
    damaged = {
        "empty": b"",
        "short": written[:-1],
        "flipped": written[:-1] + bytes([written[-1] ^ 1]),
        "foreign": other.read_bytes(),
    }
    entry.write_bytes(damaged[damage])
    assert compile.cached("a", (), "sm_90") == code
    assert compiled == ["a", "b", "a"]
    assert entry.read_bytes() == written


def test_cache_that_takes_nothing_only_costs_time(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("DCNV4_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="is not used"):
        code = compile.cached("a", (), "sm_90")
    assert compile.cached("a", (), "sm_90") == code
    assert compiled == ["a", "a"]


def test_cache_entry_is_whole_or_absent(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "replace", full)
    assert compile.cached("a", (), "sm_90")
    assert _entries(tmp_path) == []


def test_cache_survives_racing_threads(compiled: list[str], tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        codes = set(pool.map(lambda i: compile.cached("a", (), "sm_90"), range(64)))
    assert len(codes) == 1
    assert len(_entries(tmp_path)) == 1


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch, nvrtc: None) -> Iterator[pytest.MonkeyPatch]:
    """As if a GPU of capability 9.0 with a new driver were there."""
    from cuda.bindings import driver

    compile.why_not.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (0, 99_000))
    yield monkeypatch
    compile.why_not.cache_clear()


def test_why_not_when_all_is_there(visible: pytest.MonkeyPatch) -> None:
    assert backend.why_not(CALL) is None


def test_why_not_deterministic_float64(visible: pytest.MonkeyPatch) -> None:
    call = CALL._replace(deterministic=True)
    assert backend.why_not(call) is None
    reason = str(backend.why_not(call._replace(dtype=torch.float64)))
    assert reason.endswith("got True with float64")


def test_why_not_a_cpu() -> None:
    call = CALL._replace(device=torch.device("cpu"))
    assert backend.why_not(call) == "needs tensors on a CUDA GPU; got cpu"


def test_why_not_rocm(visible: pytest.MonkeyPatch) -> None:
    visible.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA GPU; got ROCm 6.4" in str(backend.why_not(CALL))


def test_why_not_an_old_cuda_core(visible: pytest.MonkeyPatch) -> None:
    visible.setattr(compile, "version", lambda name: "0.3.2")
    reason = str(backend.why_not(CALL))
    assert reason.startswith("needs cuda-core >= 1 (pip install -U 'cuda-core[cu1")
    assert reason.endswith("got 0.3.2")


def test_why_not_without_nvrtc(visible: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError("no libnvrtc\nsecond line")

    visible.setattr(compile, "_nvrtc_version", missing)
    reason = str(backend.why_not(CALL))
    assert reason.startswith("needs NVRTC (pip install nvidia-cuda-nvrtc")
    assert reason.endswith("got RuntimeError: no libnvrtc")


def test_why_not_an_old_driver(visible: pytest.MonkeyPatch) -> None:
    from cuda.bindings import driver

    visible.setattr(compile, "_nvrtc_version", lambda: (13, 0))
    visible.setattr(driver, "cuDriverGetVersion", lambda: (0, 12_040))
    reason = str(backend.why_not(CALL))
    assert reason.startswith("needs an NVIDIA driver for CUDA 13 (update it, or pip install")
    assert "cuda-core[cu12]" in reason
    assert reason.endswith("got one for CUDA 12.4")


@pytest.mark.parametrize("capability", [(6, 1), (99, 0)])
def test_why_not_an_unknown_gpu(visible: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    visible.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    reason = str(backend.why_not(CALL))
    assert "compute capability 7.0 or newer" in reason
    assert reason.endswith("got {}.{}".format(*capability))


def _fresh(code: str) -> str:
    """What a new process prints."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_why_not_without_cuda_core() -> None:
    reason = _fresh(
        """
        import sys
        sys.modules["cuda"] = sys.modules["cuda.core"] = None
        import torch, dcnv4
        from dcnv4.backends import Call, why_not
        torch.version.hip = None
        print(why_not("cuda", Call("deform_conv", torch.device("cuda"), torch.float32)))
        """
    )
    assert reason.startswith("needs cuda-core (pip install -U 'cuda-core[cu1")
    assert "\n" not in reason


def test_import_loads_no_compiler() -> None:
    loaded = (
        "import sys, dcnv4.backends.cuda as c; print([m for m in sys.modules if m[:9] == {!r}])"
    )
    assert _fresh(loaded.format("cuda.core")) == "[]"


def _call(
    batch: int = 2, size: int = 8, device: str = "cuda", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.float16}
    image = batch, size, size
    return torch.randn(*image, 64, **options), torch.randn(*image, 112, **options)


def _run(value: torch.Tensor, offset_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output and the gradients, the value's rounded sums of additions in any order."""
    inputs = value.detach().requires_grad_(), offset_mask.detach().requires_grad_()
    output = functional.deform_conv(*inputs, backend="cuda")
    return output.detach(), *torch.autograd.grad(output, inputs, torch.ones_like(output))


def _assert_same(results: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    output, grad_value, grad_mask = results
    assert torch.equal(output, expected[0])
    assert torch.equal(grad_mask, expected[2])
    torch.testing.assert_close(grad_value, expected[1], rtol=2**-9, atol=2**-10)


@pytest.mark.gpu
def test_random_calls() -> None:
    fuzz_cuda.fuzz(calls=200, settings=12, seed=1)


def _check(
    case: cases.Case, dtype: torch.dtype, slices: dict[str, int], order: bool, finite: Any = None
) -> list[float]:
    """Against the oracle, from the kernels that `launches.expected` names, in the same bits again
    where they are deterministic; the share of tiles that each launch of such a kernel computed."""
    names = launches.expected(case, dtype, slices, order)
    with (
        deterministic(order),
        launches.paying_from(slices),
        launches.launching(*names) as launched,
    ):
        results = case.run(dtype, "cuda", "cuda")
        again = case.run(dtype, "cuda", "cuda") if order else results
    case.check(results, dtype, finite)
    for name, result in results.items():
        torch.testing.assert_close(result, again[name], rtol=0, atol=0, equal_nan=True)
    return launched.computed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "case", [*sorted_cases(), *sorted_conv_cases(), *not_tiled()], ids=lambda case: case.id
)
def test_sorting(case: cases.Case, deterministic: bool, dtype: torch.dtype) -> None:
    finite = None
    if deterministic and case.id == "not_finite":
        finite = np.ones(case.exact[0].shape, bool)
        finite[::2] = False
    _check(case, dtype, SORTED, deterministic, finite)


@pytest.mark.gpu
@pytest.mark.parametrize("case", not_tiled(), ids=lambda case: case.id)
def test_what_tiles_refuse_is_sorted(case: cases.Case) -> None:
    names = launches.expected(case, torch.float16, SORTED)
    with launches.paying_from(EVERY), launches.launching(*names):
        case.run(torch.float16, "cuda", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("row", kernel_cases.every_tile_row(), ids=kernel_cases.row_id)
def test_tiles(row: pairs.Row) -> None:
    """All that tile kernels are compiled for, with all data."""
    case = kernel_cases.tile_case(row)
    finite = kernel_cases.finite(row, case)
    computed = _check(case, row["dtype"], EVERY, row["deterministic"], finite)
    kernel_cases.check_left(row, computed[:2])


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [*range(1, 10), 33, 257])
@pytest.mark.parametrize("slices", [DIRECT, SORTED, EVERY], ids=["direct", "sorted", "tiles"])
def test_batch_independence(batch: int, slices: dict[str, int]) -> None:
    """The same bits alone and among others, from one and the same kernel."""
    value, offset_mask = _call(batch, size=7)
    inputs = value, offset_mask / 4  # near enough for tiles
    names = launches.expected(plain_tiles(), torch.float16, slices)
    with launches.paying_from(slices), launches.launching(*names):
        results = _run(*inputs)
        for image in sorted({0, batch // 2, batch - 1}):
            alone = _run(*(tensor[image : image + 1] for tensor in inputs))
            _assert_same(tuple(result[image : image + 1] for result in results), alone)


@pytest.mark.gpu
def test_side_stream() -> None:
    """Inputs that a side stream is still making are read in that stream's order."""
    expected = _run(*_call(16, 56, seed=3))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    names = launches.expected(plain_tiles(), torch.float16, EVERY)
    with torch.cuda.stream(stream), launches.launching(*names):
        torch.cuda._sleep(50_000_000)
        results = _run(*_call(16, 56, seed=3))
    torch.cuda.current_stream().wait_stream(stream)
    _assert_same(results, expected)


@pytest.mark.gpu
def test_fresh_threads() -> None:
    inputs = _call()
    expected = _run(*inputs)
    torch.cuda.synchronize()
    results: list[tuple[torch.Tensor, ...]] = []
    threads = [
        threading.Thread(target=lambda: results.extend(_run(*inputs) for _ in range(50)))
        for _ in range(8)
    ]
    with launches.launching(*launches.expected(plain_tiles(), torch.float16)):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 400
    for result in results:
        _assert_same(result, expected)


@pytest.mark.gpu
def test_cuda_graph() -> None:
    inputs = _call()
    _run(*inputs)
    graph = torch.cuda.CUDAGraph()
    names = launches.expected(plain_tiles(), torch.float16)
    with launches.launching(*names), torch.cuda.graph(graph):
        captured = _run(*inputs)
    for seed in (1, 2):
        fresh = _call(seed=seed)
        for old, new in zip(inputs, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        _assert_same(captured, _run(*fresh))


@pytest.mark.gpu
def test_second_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs; got {torch.cuda.device_count()}")
    inputs = _call()
    expected = _run(*inputs)
    for current in (0, 1):
        with torch.cuda.device(current):
            results = _run(*(tensor.to("cuda:1") for tensor in inputs))
            assert {result.device.index for result in results} == {1}
            assert torch.cuda.current_device() == current
            _assert_same(tuple(result.to("cuda:0") for result in results), expected)


@pytest.mark.gpu
def test_shapes_on_the_gpu_cost_no_synchronisation() -> None:
    value = torch.randn(2, 26, 2, 16, device="cuda", requires_grad=True)
    shapes = torch.tensor([(4, 5), (2, 3)], device="cuda")
    locations = torch.rand(2, 5, 2, 2, 4, 2, device="cuda")
    weights = torch.randn(2, 5, 2, 2, 4, device="cuda")
    arguments = value, shapes, locations, weights
    functional.ms_deform_attn(*arguments, backend="cuda").sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        functional.ms_deform_attn(*arguments, backend="cuda").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _require_memory(gigabytes: int) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of GPU memory; {free:.0f} are free")


@pytest.mark.gpu
def test_more_than_2_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last image of a value of 2.2e9 elements, and its gradients, as alone."""
    _require_memory(40)
    monkeypatch.undo()  # filling 10 GiB with NaN proves nothing more
    value = torch.randn(33, 1024, 1024, 64, device="cuda", dtype=torch.float16)
    offset_mask = torch.randn(33, 1024, 1024, 28, device="cuda", dtype=torch.float16)
    offset_mask /= 4  # near enough for tiles
    assert value.numel() > 2**31

    def run(value: torch.Tensor, offset_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        window = functional.window(groups=1)
        output = backend.conv_forward(value, offset_mask, window)
        return output, *backend.conv_backward(value, value, offset_mask, window)

    with launches.launching(*launches.expected(plain_tiles(), torch.float16, EVERY)):
        results = tuple(result[32:].clone() for result in run(value, offset_mask))
    with launches.launching(*launches.expected(plain_tiles(), torch.float16, EVERY)):
        output, grad_value, grad_mask = run(value[32:], offset_mask[32:])
    assert torch.equal(results[0], output)
    assert torch.equal(results[2], grad_mask)
    torch.testing.assert_close(results[1], grad_value, rtol=2**-8, atol=2**-4)


@pytest.mark.gpu
def test_more_than_2_31_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """One channel a group and one undeformed point: the output is value * weight."""
    _require_memory(80)
    monkeypatch.undo()
    side, groups = 5793, 64
    value = torch.randn(1, side, side, groups, device="cuda", dtype=torch.float16)
    assert value.numel() > 2**31
    offset_mask = torch.zeros(1, side, side, 3 * groups, device="cuda", dtype=torch.float16)
    weights = offset_mask.unflatten(3, (groups, 3))[..., 2]
    weights.normal_()
    window = functional.window(1, padding=0, groups=groups)
    with launches.launching("conv_forward") as launched:
        output = backend.conv_forward(value, offset_mask, window)
    assert launched.variants[0][1]["INDEX"] == "unsigned long long"
    for rows in torch.arange(side, device="cuda").split(500):
        expected = value[:, rows].float() * weights[:, rows].float()
        assert torch.equal(output[:, rows], expected.half())


@pytest.mark.gpu
def test_host_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Issuing a call must not wait for the GPU; how long it takes is printed."""
    monkeypatch.undo()
    value, offset_mask = _call(1)
    inputs = value.requires_grad_(), offset_mask.requires_grad_()
    grad = torch.ones_like(value)

    def forward() -> torch.Tensor:
        return functional.deform_conv(*inputs, backend="cuda")

    def both() -> None:
        torch.autograd.grad(forward(), inputs, grad)

    def no_grad() -> None:
        with torch.no_grad():
            forward()

    for name, call in (
        ("no grad", no_grad),
        ("forward and backward", both),
        ("torch.add", lambda: torch.add(grad, grad)),
    ):
        times = []
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(50):
                call()
            times.append((time.perf_counter() - start) / 50 * 1e6)
        with capsys.disabled():
            print(f"\nhost time, {name}: {min(times):.1f} µs", end="")
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    event = torch.cuda.Event()
    event.record()
    both()
    assert not event.query()
