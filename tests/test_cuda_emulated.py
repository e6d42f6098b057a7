"""The CUDA kernels on an emulated GPU: their numbers, with threads in either order."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import cases
import fuzz_cuda
from dcnv4 import functional
from emulated import emulated, why_not

TILED = {"conv_forward": 0, "conv_backward": 0}
NAMED = [name for name, _ in cases.CASES]
HALVES = torch.float16, torch.bfloat16

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"the emulator {why_not()}")


@pytest.mark.parametrize("name", NAMED)
def test_oracle(name: str) -> None:
    """Each case in one dtype, and the threads of every other in the other order."""
    number = NAMED.index(name)
    dtype = cases.DTYPES[number // 2 % 4]
    case = dict(cases.CASES)[name]
    with emulated(backwards=number % 2 == 1):
        case.check(case.run(dtype, "cpu", "cuda"), dtype)


def tile_cases() -> list[cases.ConvCase]:
    def case(name: str, depth: int = 16, **settings: object) -> cases.ConvCase:
        shape = {"batch": 2, "groups": 2, "size": (9, 11), "sigma": 0.5, **settings}
        return cases.ConvCase(name, depth=depth, **shape)  # type: ignore[arg-type]

    stride = {"stride": 2, "padding": (0, 2), "dilation": (2, 1), "offset_scale": 0.5}
    return [
        case("plain"),
        case("depth_32", 32, groups=3, size=(7, 7)),
        case("depth_48", 48, groups=1),
        case("depth_64", 64, groups=1, size=(4, 9)),
        case("far", sigma=3.0, size=(19, 21), batch=1),
        case("few_far", sigma=0.9, size=(9, 13)),
        case("few_far_softmax", softmax=True, sigma=0.9, size=(9, 13), batch=1),
        case("farther", sigma=9.0, size=(9, 30), batch=1),
        case("outside", outside=(-40.0, 1e6)),
        case("softmax", softmax=True),
        case("far_softmax", softmax=True, sigma=3.0, size=(19, 21), batch=1),
        case("float_coordinates", coordinates=(torch.float32,)),
        case("sliced", layout="sliced", groups=4),
        case("expanded", layout="expanded", groups=4),
        case("padded", extra=5, groups=3),
        case("stride", window=stride, size=(20, 17)),
        case("no_center", window={"remove_center": True}),
        case("2x2", window={"kernel_size": 2, "padding": 0}),
        case("4x4", window={"kernel_size": 4, "padding": 1}, groups=1),
        case("one_row", size=(1, 40), batch=1),
        case("one_column", size=(40, 1), batch=1),
    ]


@pytest.mark.parametrize("number", range(len(tile_cases())), ids=lambda i: tile_cases()[i].id)
def test_tiles(number: int) -> None:
    """Against the oracle, and the same bits whichever thread runs first."""
    case, dtype = tile_cases()[number], HALVES[number % 3 == 1]
    with emulated(TILED=TILED):
        results = case.run(dtype, "cpu", "cuda")
    case.check(results, dtype)
    with emulated(TILED=TILED, backwards=True):
        backwards = case.run(dtype, "cpu", "cuda")
    for name in ("output", "grad_offset_mask"):
        assert torch.equal(results[name], backwards[name]), name
    case.check(backwards, dtype)


def _tiled_call(value: Tensor, offset_mask: Tensor) -> dict[str, Tensor]:
    inputs = value.detach().requires_grad_(), offset_mask.detach().requires_grad_()
    with emulated(TILED=TILED):
        output = functional.deform_conv(*inputs, groups=2, backend="cuda")
        grads = torch.autograd.grad(output, inputs, output.detach())
    return {"output": output.detach(), "value": grads[0], "offset_mask": grads[1]}


def _inputs(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (batch, height, width, 32), (batch, height, width, 56)
    value, offset_mask = (torch.randn(size, generator=generator).half() for size in sizes)
    return value, offset_mask


def test_a_tile_is_of_one_image() -> None:
    value, offset_mask = _inputs(3, 5, 9)
    together = _tiled_call(value, offset_mask)
    for image in range(3):
        part = slice(image, image + 1)
        for name, result in _tiled_call(value[part], offset_mask[part]).items():
            if name == "value":  # strips of other lengths sum in another order
                torch.testing.assert_close(result, together[name][part], rtol=2**-10, atol=2**-12)
            else:
                assert torch.equal(result, together[name][part]), name


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_stays_where_it_is_sampled(bad: float) -> None:
    """A tile multiplies all its pixels' columns with a whole window: 0 * inf must not be added."""
    value, offset_mask = _inputs(1, 8, 8)
    offset_mask[..., :54].view(1, 8, 8, 2, 27)[..., :18] = 0.25
    clean = _tiled_call(value, offset_mask)["output"]
    value[0, 3, 3, 0] = bad
    spoilt = _tiled_call(value, offset_mask)["output"]
    sampled = torch.zeros(1, 8, 8, 32, dtype=torch.bool)
    sampled[:, 1:5, 1:5, 0] = True
    assert torch.equal(spoilt.isfinite(), ~sampled)
    torch.testing.assert_close(spoilt[~sampled], clean[~sampled], rtol=2**-8, atol=2**-7)


@pytest.mark.parametrize("scale", [2.0**-12, 1.0, 60_000.0])
def test_gradients_of_any_scale(scale: float) -> None:
    """Those that a GradScaler makes large neither overflow within nor lose their small members."""
    case = replace(tile_cases()[0], batch=1)
    *inputs, grad = case.inputs(torch.float16)
    grad = grad / grad.abs().max() * scale
    with emulated(TILED=TILED):
        output = case.call(*inputs, backend="cuda")
        grads = torch.autograd.grad(output, inputs, grad)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(case.call(*exact, backend="reference"), exact, grad.double())
    for got, right in zip(grads, expected, strict=True):
        legal = right.abs() < 65_000
        error = (got.double() - right).abs()[legal]
        assert (error <= 2**-8 * right.abs()[legal] + 2**-9 * scale).all()


def test_random_calls() -> None:
    rng = random.Random(5)
    for i in range(16):
        kind = fuzz_cuda.attention if i % 3 == 0 else fuzz_cuda.conv
        case = replace(fuzz_cuda.sized(rng, kind(rng)), id=f"random-{i}")
        dtype = rng.choice(cases.DTYPES)
        with emulated(TILED=TILED, backwards=i % 2 == 0):
            case.check(case.run(dtype, "cpu", "cuda"), dtype)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMED[::9])
def test_deterministic(name: str, dtype: torch.dtype, deterministic: None) -> None:
    """The same bits whichever thread adds first, and right ones."""
    case = dict(cases.CASES)[name]
    assert torch.float64 not in case.dtypes(dtype)
    with emulated():
        results = case.run(dtype, "cpu", "cuda")
    case.check(results, dtype)
    with emulated(backwards=True):
        for result_name, result in case.run(dtype, "cpu", "cuda").items():
            assert torch.equal(result, results[result_name]), result_name


@pytest.mark.parametrize("sigma", [0.5, 0.9, 3.0])
def test_deterministic_tiles(sigma: float, deterministic: None) -> None:
    case = replace(tile_cases()[0], sigma=sigma)
    with emulated(TILED=TILED):
        results = case.run(torch.float16, "cpu", "cuda")
    case.check(results, torch.float16)
    with emulated(TILED=TILED, backwards=True):
        for name, result in case.run(torch.float16, "cpu", "cuda").items():
            assert torch.equal(result, results[name]), name
