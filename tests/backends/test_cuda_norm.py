"""The CUDA backend's layer normalisation, on an emulated GPU and on a real one."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcnv4.backends import cuda as backend
from support import emulated, launches

EPS = 1e-6
KERNELS = "layer_norm_forward", "layer_norm_backward"
CASES = [
    (64, 37, torch.float16, torch.float16),  # 8 lanes a row, and a row that is missing
    (112, 300, torch.float16, torch.float32),  # 14 vectors for 16 lanes, blocks that go on
    (16, 70, torch.bfloat16, torch.float32),
    (8, 1, torch.bfloat16, torch.bfloat16),  # a lane a row
    (512, 19, torch.float32, torch.float32),  # four vectors a lane
    (100, 11, torch.float32, torch.float32),
    (1280, 9, torch.float16, torch.float32),
    (1536, 3, torch.bfloat16, torch.float32),  # the widest
]
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def inputs(
    channels: int, rows: int, dtype: torch.dtype, weights: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    """x, weight, bias, the output's gradient, and what is added to that of x."""
    random = torch.Generator().manual_seed(channels)
    shapes = (rows, channels), (channels,), (channels,), (rows, channels), (rows, channels)
    x, weight, bias, grad, added = (torch.randn(shape, generator=random) for shape in shapes)
    dtypes = dtype, weights, weights, dtype, dtype
    made = zip((3 * x + 2, weight, bias, grad, added), dtypes, strict=True)
    return [tensor.to(device, dtype) for tensor, dtype in made]


def computed(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, added: Tensor) -> list[Tensor]:
    output = backend.norm_forward(x, weight, bias, EPS)
    return [output, *backend.norm_backward(grad, x, weight, EPS, added)]


def exact(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, added: Tensor) -> list[Tensor]:
    leaves = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    output = F.layer_norm(leaves[0], x.shape[-1:], *leaves[1:], EPS)
    grad_x, *others = torch.autograd.grad(output, leaves, grad.double())
    return [output.detach(), grad_x + added.double(), *others]


def check(found: list[Tensor], right: list[Tensor], dtype: torch.dtype) -> None:
    names = "output", "gradient of x", "gradient of weight", "gradient of bias"
    for name, got, wanted in zip(names, found, right, strict=True):
        sums = name.endswith(("weight", "bias"))
        assert got.dtype == (torch.float32 if sums else dtype), name
        error = float((got.double() - wanted).norm() / wanted.norm())
        assert error <= ROUNDING[torch.float32 if sums else dtype], f"{name}: {error:.1e}"


emulator = pytest.mark.skipif(
    emulated.why_not() is not None, reason=f"the emulator {emulated.why_not()}"
)


@emulator
@pytest.mark.parametrize("case", CASES)
def test_rows_are_normalized(case: tuple[int, int, torch.dtype, torch.dtype]) -> None:
    """As in float64, whichever thread of a block runs first, and in the same bits."""
    given, results = inputs(*case), []
    for backwards in (False, True):
        with emulated.emulated(backwards), launches.launching(*KERNELS):
            assert backend.normalizes(*given[:3])
            results.append(computed(*given))
    check(results[0], exact(*given), case[2])
    assert all(map(torch.equal, *results))


@emulator
def test_rows_that_lie_otherwise() -> None:
    """Between others' numbers, at odd addresses, in one that is repeated."""
    given = inputs(64, 12, torch.float16, torch.float16)
    x, weight, bias, grad, added = given
    apart = torch.zeros(12, 80, dtype=torch.float16)[:, 3:67].copy_(x)
    odd = torch.zeros(65, dtype=torch.float16)[1:].copy_(weight)
    shifted = torch.zeros(1 + grad.numel(), dtype=torch.float16)[1:].view_as(grad).copy_(grad)
    with emulated.emulated(), launches.launching(*KERNELS):
        found = computed(apart, odd, bias, shifted, added[:1].expand(12, -1))
    check(found, exact(x, weight, bias, grad, added[:1].expand(12, -1)), torch.float16)


@emulator
def test_a_constant_row_has_no_direction() -> None:
    """Its output is the bias, and nothing is infinite, not even where eps is 0 for missing rows."""
    x, weight, bias, grad, _ = inputs(64, 5, torch.float32, torch.float32)
    x[1] = 7.0
    with emulated.emulated():
        output = backend.norm_forward(x, weight, bias, EPS)
        rows = [0, 2, 3, 4]
        found = backend.norm_backward(grad[rows], x[rows], weight, 0.0)
    assert torch.equal(output[1], bias)
    assert all(bool(gradient.isfinite().all()) for gradient in found)


def takes(shape: tuple[int, ...], dtype: torch.dtype, *weights: Any, **made: Any) -> bool:
    """Whether rows of zeros are taken; `weights`: dtypes of weight and bias, those of x if none."""
    held = (torch.zeros(shape[-1:], dtype=kind, **made) for kind in weights or (dtype, dtype))
    return backend.normalizes(torch.zeros(shape, dtype=dtype), *held)


def test_what_rows_cannot_be() -> None:
    half, single = torch.float16, torch.float32
    for shape, dtype in (
        ((4, 12), half),  # no whole vectors
        ((4, 1544), half),  # too many registers
        ((4, 1540), single),
        ((4, 64), torch.float64),
        ((0, 64), single),
        ((4, 64), torch.int64),
    ):
        assert not takes(shape, dtype)
    for channels in (8, 64, 1536):
        assert takes((4, channels), half)
    assert takes((4, 4), single)
    assert takes((4, 64), half, single, single)
    for weights in ((single, half), (half, single), (torch.bfloat16, torch.bfloat16)):
        assert not takes((4, 64), half, *weights)
    assert not takes((4, 64), half, device="meta")
    x, weight = torch.zeros(4, 64), torch.zeros(64)
    assert not backend.normalizes(x, weight, torch.zeros(1))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("channels", "dtype"), product((64, 112, 320, 1536), (torch.float16, torch.float32))
)
def test_rows_on_a_gpu(channels: int, dtype: torch.dtype) -> None:
    for rows in (1, 1000, 64 * 56 * 56 * 64 // channels):
        given = inputs(channels, rows, dtype, torch.float32, "cuda")
        with launches.launching(*KERNELS):
            results = [computed(*given) for _ in range(2)]
        check(results[0], exact(*given), dtype)
        assert all(map(torch.equal, *results))
