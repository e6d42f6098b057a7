"""The CUDA backend's residual branch of an MLP, on an emulated GPU and on a real one."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcnv4.backends import cuda as backend
from dcnv4.backends.cuda import choice, compile, plans
from support import emulated, launches
from support.tiers import one_in

HALVES = torch.float16, torch.bfloat16
EPS = 1e-6
CASES = [
    (70, 64, 128),  # a warp that lacks rows
    (600, 64, 64),  # rows that a block goes on to, and one chunk of hidden channels
    (300, 64, 192),  # an odd number of chunks
    (450, 128, 128),
    (1, 128, 64),
    (140, 256, 128),
]
emulator = pytest.mark.skipif(
    emulated.why_not() is not None, reason=f"the emulator {emulated.why_not()}"
)
Parts = tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def inputs(rows: int, channels: int, hidden: int, dtype: torch.dtype, device: str = "cpu") -> Parts:
    """x, and weight and bias of the norm, of fc1 and of fc2."""
    random = torch.Generator().manual_seed(rows)

    def draw(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=random) * std + mean).to(device, dtype)

    return (
        draw(rows, channels, mean=0.3),
        (draw(channels, std=0.2, mean=1.0), draw(channels, std=0.2)),
        (draw(hidden, channels, std=channels**-0.5), draw(hidden, std=0.3)),
        (draw(channels, hidden, std=hidden**-0.5), draw(channels, std=0.3)),
    )


def check(parts: Parts, bias: bool = True) -> Tensor:
    """The output, which is right to a rounding of the result and of what the products read."""
    x, norm, first, (weight, shift) = parts
    output = backend.mlp(x, EPS, norm, first, (weight, shift if bias else None))
    normed = F.layer_norm(x.double(), x.shape[-1:], *(t.double() for t in norm), EPS)
    hidden = F.gelu(F.linear(normed.to(x.dtype).double(), *(t.double() for t in first)))
    hidden = hidden.to(x.dtype).double()
    exact = x.double() + F.linear(hidden, weight.double(), shift.double() if bias else None)
    rounding = torch.finfo(x.dtype).eps / 2
    terms = hidden.abs() @ weight.double().abs().t()
    # A normalised or a hidden number near a tie may be rounded to its other side.
    allowed = rounding * (1.01 * exact.abs() + terms) + 2**-14
    error = (output.double() - exact).abs()
    assert output.dtype == x.dtype
    assert bool((error <= allowed).all()), float((error - allowed).max())
    return output


@emulator
@pytest.mark.parametrize("case", one_in(2, [*product(CASES, HALVES)]))
def test_branches(
    case: tuple[tuple[int, int, int], torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in float64, whichever thread of a block runs first."""
    parts = inputs(*case[0], case[1])
    monkeypatch.setattr(choice, "_MLP_ROWS", dict.fromkeys(choice._MLP, 0))
    monkeypatch.setattr(plans, "_gpu", lambda index: choice.GPU(9, 1, 227 << 10))
    found = []
    for backwards in (False, True):
        with emulated.emulated(backwards), launches.launching("mlp"):
            assert backend.fuses_mlp(parts[0], case[0][2])
            found.append([check(parts), check(parts, bias=False)])
    assert all(map(torch.equal, *found))


def test_what_is_not_fused() -> None:
    """Few rows, other channels and dtypes, other GPUs; nor rows apart or at odd addresses."""
    half, hopper = torch.float16, choice.GPU(9, 132, 227 << 10)
    for rows, channels, hidden, dtype, gpu, expected in (
        (1 << 10, 64, 256, half, hopper, True),
        ((1 << 10) - 1, 64, 256, half, hopper, False),
        (7168, 128, 512, half, hopper, True),
        (7167, 128, 512, half, hopper, False),
        (8704, 256, 1024, half, hopper, True),
        (8703, 256, 1024, half, hopper, False),
        (1 << 20, 512, 2048, half, hopper, False),
        (1 << 20, 96, 384, half, hopper, False),
        (1 << 20, 64, 0, half, hopper, False),
        (1 << 20, 64, 96, half, hopper, False),
        (1 << 20, 64, 256, torch.float32, hopper, False),
        (1 << 20, 64, 256, half, choice.GPU(8, 108, 163 << 10), False),
        (1 << 20, 64, 256, half, choice.GPU(10, 148, 227 << 10), False),
        (1 << 20, 256, 256, half, choice.GPU(9, 132, 100 << 10), False),
    ):
        assert choice.fuses_mlp(rows, channels, hidden, dtype, gpu) is expected, (rows, channels)
    with emulated.emulated():
        x = torch.zeros(1 << 10, 64, dtype=half)
        assert backend.fuses_mlp(x, 256)
        assert not backend.fuses_mlp(x[:0], 256)
        assert not backend.fuses_mlp(x.t().contiguous().t(), 256)
        odd = torch.zeros(65 << 12, dtype=half)[1:][: 64 << 12].view(-1, 64)
        assert not backend.fuses_mlp(odd, 256)


def test_gelu() -> None:
    """As the kernel's comment says, with its own numbers, in float32."""
    body = compile.source("mlp").partition("float gelu(float x)")[2].partition("return")[0]
    numbers = re.findall(r"([-+]?) ?(\d\.[\de-]+)f;", body)
    assert len(numbers) == 6
    t = torch.cat([torch.linspace(0, 20, 400_001), torch.logspace(1, 38, 1000)])
    power = torch.zeros_like(t)
    for sign, digits in numbers:
        power = power * t + float(sign + digits)
    tail = (t * torch.exp2(power)).double()
    exact = -F.gelu(-t.double())
    assert bool(((tail - exact).abs() <= (2**-14 * exact).clamp(min=2e-8)).all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_branches_on_a_gpu(dtype: torch.dtype) -> None:
    """Of the GPUs that the kernel runs on; on others nothing asks for it."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.0")
    for channels, hidden, rows in product((64, 128, 256), (64, 192, 1024), (1, 1000, 64005)):
        parts = inputs(rows, channels, hidden, dtype, "cuda")
        with launches.launching("mlp"):
            for bias in (True, False):
                assert torch.equal(check(parts, bias), check(parts, bias))
