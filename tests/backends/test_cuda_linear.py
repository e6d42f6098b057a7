"""The CUDA backend's product of narrow rows, on an emulated GPU and on a real one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dcnv4 import DCNv4, DCNv4Conv2d
from dcnv4.backends import cuda as backend
from dcnv4.backends.cuda import choice
from support import emulated, launches
from support.tiers import one_in

HALVES = torch.float16, torch.bfloat16
NEVER = 1 << 30
CASES = [
    (70, 64, 176),  # a warp that lacks rows, and columns that are no whole 32
    (128, 32, 8),
    (33, 96, 72),
    (300, 128, 344),
    (1, 64, 64),
]
emulator = pytest.mark.skipif(
    emulated.why_not() is not None, reason=f"the emulator {emulated.why_not()}"
)


def inputs(
    rows: int,
    channels: int,
    width: int,
    given: torch.dtype,
    dtype: torch.dtype,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias."""
    random = torch.Generator().manual_seed(rows)
    shapes = (rows, channels), (width, channels), (width,)
    tensors = (torch.randn(shape, generator=random) for shape in shapes)
    made = zip(tensors, (given, dtype, dtype), strict=True)
    x, weight, bias = (tensor.to(device, kind) for tensor, kind in made)
    return x, weight, bias


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The output, which is right to its dtype's rounding; rows are rounded, and kept so."""
    dtype = weight.dtype
    rounded = x.new_full(x.shape, float("nan"), dtype=dtype)
    output = backend.linear(x, weight, bias, rounded if x.dtype != dtype else None)
    kept = rounded if x.dtype != dtype else x
    assert torch.equal(kept, x.to(dtype))
    exact = F.linear(kept.double(), weight.double(), None if bias is None else bias.double())
    error = (output.double() - exact).abs()
    # A rounding of the result, and of sums on the way.
    allowed = torch.finfo(dtype).eps * (exact.abs() / 2 + 2**-6)
    assert output.dtype == dtype
    assert bool((error <= allowed + 1e-6).all()), float(error.max())
    return output


@emulator
@pytest.mark.parametrize("case", one_in(3, [*product(CASES, (False, True), HALVES)]))
def test_rows_are_multiplied(case: tuple[tuple[int, int, int], bool, torch.dtype]) -> None:
    """As in float64, whichever thread of a block runs first."""
    size, single, dtype = case
    x, weight, bias = inputs(*size, torch.float32 if single else dtype, dtype)
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(choice, "_TALL", 1), patches.setattr(choice, "_NARROW", 128)
        for backwards in (False, True):
            with emulated.emulated(backwards), launches.launching("linear"):
                assert backend.multiplies(x, weight.shape[0], dtype)
                outputs = [check(x, weight, given) for given in (bias, None)]
                without = [backend.linear(x, weight, bias), backend.linear(x, weight, None)]
        assert all(map(torch.equal, outputs, without))


@emulator
def test_weights_that_lie_at_odd_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_TALL", 1)
    x, weight, bias = inputs(40, 64, 16, torch.float16, torch.float16)
    odd = torch.zeros(1 + weight.numel(), dtype=torch.float16)[1:].view_as(weight).copy_(weight)
    shifted = torch.zeros(17, dtype=torch.float16)[1:].copy_(bias)
    with emulated.emulated(), launches.launching("linear"):
        assert torch.equal(check(x, odd, shifted), check(x, weight, bias))


def test_what_rows_cannot_be() -> None:
    """Few, wide, of odd widths, of other dtypes, on an old GPU; nor apart or at odd addresses."""
    half, hopper = torch.float16, choice.GPU(9, 132)
    assert choice.multiplies(1 << 13, 64, 176, half, hopper)
    for rows, channels, width, dtype, gpu in (
        ((1 << 13) - 1, 64, 176, half, hopper),
        (1 << 13, 96, 176, half, hopper),
        (1 << 13, 48, 176, half, hopper),
        (1 << 13, 0, 176, half, hopper),
        (1 << 13, 64, 172, half, hopper),
        (1 << 13, 64, 176, torch.float32, hopper),
        (1 << 13, 64, 176, half, choice.GPU(7, 80)),
    ):
        assert not choice.multiplies(rows, channels, width, dtype, gpu)
    with emulated.emulated():
        x = torch.zeros(1 << 13, 64, dtype=half)
        assert backend.multiplies(x, 16, half)
        assert not backend.multiplies(x, 16, torch.bfloat16)
        assert not backend.multiplies(x[:0], 16, half)
        assert not backend.multiplies(x.t().contiguous().t(), 16, half)
        assert not backend.multiplies(x.view(-1)[1:][: 64 * 100].view(100, 64), 16, half)


one_node = pytest.mark.skipif(
    not hasattr(getattr(torch, "compiler", None), "is_dynamo_compiling"),
    reason=f"layers are composed before torch 2.3; got {torch.__version__}",
)
LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "DCNv4": lambda: (DCNv4(64, group=4, backend="cuda"), torch.randn(2, 30, 64)),
    "DCNv4Conv2d": lambda: (
        DCNv4Conv2d(64, 32, padding=1, groups=2, bias=False, backend="cuda"),
        torch.randn(2, 64, 5, 6).to(memory_format=torch.channels_last),
    ),
}


class Layer:
    """A layer whose products are made by the kernel from so many rows on."""

    def __init__(self, name: str, tall: int, backwards: bool = False) -> None:
        torch.manual_seed(0)
        self.layer, self.x = LAYERS[name]()
        for parameter in self.layer.parameters():
            nn.init.normal_(parameter, std=0.2)
        self.shape = [(5, 6)] if name == "DCNv4" else []
        self.tall, self.backwards = tall, backwards
        self.call: Callable[..., Tensor] = self.layer

    def run(self, use: Callable[[Tensor], Any], half: bool = False, times: int = 1) -> Any:
        """What `use` makes of the output; of an input in bfloat16, where it is `half`. The kernel
        runs so many `times`."""
        self.x = (self.x.bfloat16() if half else self.x).requires_grad_()
        with (
            mock.patch.object(choice, "_TALL", self.tall),
            emulated.emulated(self.backwards),
            launches.recorded() as ran,
        ):
            with torch.autocast("cpu", torch.bfloat16):
                y = self.call(self.x, *self.shape)
            made = use(y)
        assert ran.names.count("linear") == (times if self.tall == 1 else 0)
        return made

    def gradients(self, y: Tensor, create_graph: bool = False) -> list[Tensor]:
        wanted = [self.x, *self.layer.parameters()]
        seed = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
        return [y, *torch.autograd.grad(y, wanted, seed, create_graph=create_graph)]


def close(found: Sequence[Tensor], expected: Sequence[Tensor], allowed: float) -> None:
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert (got.double() - wanted.double()).norm() <= allowed * wanted.double().norm()


@emulator
@one_node
@pytest.mark.parametrize("case", one_in(3, [*product(LAYERS, (False, True))]))
def test_layers(case: tuple[str, bool]) -> None:
    """Outputs and gradients are those of PyTorch's product, in a training and without one."""
    name, half = case
    found, expected = (
        (layer := Layer(name, tall)).run(layer.gradients, half) for tall in (1, NEVER)
    )
    close(found, expected, 0.02)
    with torch.no_grad():
        assert torch.equal(Layer(name, 1, True).run(lambda y: y, half), found[0])


@emulator
@one_node
@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_reach_the_input(name: str) -> None:
    def twice(layer: Layer, y: Tensor) -> list[Tensor]:
        _, *first = layer.gradients(y, create_graph=True)
        total = torch.stack([grad.float().square().sum() for grad in first]).sum()
        return list(torch.autograd.grad(total, layer.x))

    results = []
    for tall in (1, NEVER):
        layer = Layer(name, tall)
        results.append(layer.run(partial(twice, layer)))
    close(*results, 0.05)


@emulator
@one_node
@pytest.mark.parametrize("way", ["checkpoint", "hooks"])
def test_what_a_backward_needs_is_there(way: str) -> None:
    """Where it is computed once more, and where a copy of it is kept."""
    plain, again = Layer("DCNv4", 1), Layer("DCNv4", 1)
    expected = plain.run(plain.gradients)
    layer = again.layer

    def call(x: Tensor, shape: tuple[int, int]) -> Tensor:
        if way == "checkpoint":
            return checkpoint(layer, x, shape, use_reentrant=False)
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept):
            return layer(x, shape)

    again.call = call
    found = again.run(again.gradients, times=2 if way == "checkpoint" else 1)
    assert all(map(torch.equal, found, expected))


@emulator
@one_node
def test_frozen_layers_pass_gradients() -> None:
    results = []
    for tall in (1, NEVER):
        layer = Layer("DCNv4", tall)
        layer.layer.requires_grad_(False)
        results.append(layer.run(lambda y, x=layer: torch.autograd.grad(y.sum(), x.x)))
    close(*results, 0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_rows_on_a_gpu(dtype: torch.dtype) -> None:
    for channels in (32, 64):
        for width in (8, 64, 176, 344):
            for given in (torch.float32, dtype):
                for rows in ((1 << 13) + 5, 200 * 320):
                    arguments = inputs(rows, channels, width, given, dtype, "cuda")
                    with launches.launching("linear"):
                        check(*arguments)
