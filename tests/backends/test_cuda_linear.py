"""The CUDA backend's product of tall maps, on an emulated GPU and on a real one."""

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

from dcnv4 import DCNv4, DCNv4Conv2d, FlashDeformAttn
from dcnv4.backends import cuda as backend
from dcnv4.backends.cuda import choice, plans
from support import emulated, launches
from support.tiers import one_in

HALVES = torch.float16, torch.bfloat16
NEVER = 1 << 30
CASES = [
    (70, 64, 176),  # a warp that lacks rows, and results that are no whole 64
    (1000, 64, 40),  # rows that a block goes on to
    (128, 32, 8),  # half a block of channels
    (33, 96, 72),
    (450, 128, 72),
    (300, 256, 64),  # channels that are read while few results are made
    (1, 256, 384),
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
    # A rounding of the result, and of sums on the way, which tensor cores cut off.
    terms = kept.double().abs() @ weight.double().abs().t()
    allowed = torch.finfo(dtype).eps * exact.abs() / 2 + 2**-21 * (1 + terms)
    assert output.dtype == dtype
    assert bool((error <= allowed).all()), float((error - allowed).max())
    return output


@emulator
@pytest.mark.parametrize("case", one_in(3, [*product(CASES, (False, True), HALVES)]))
def test_rows_are_multiplied(case: tuple[tuple[int, int, int], bool, torch.dtype]) -> None:
    """As in float64, whichever thread of a block runs first."""
    size, single, dtype = case
    x, weight, bias = inputs(*size, torch.float32 if single else dtype, dtype)
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(choice, "_TALL", 0), patches.setattr(choice, "_NARROW", 256)
        patches.setattr(plans, "_gpu", lambda index: choice.GPU(9, 3, 227 << 10))  # three blocks
        for backwards in (False, True):
            with emulated.emulated(backwards), launches.launching("linear"):
                assert backend.multiplies(x, weight.shape[0], dtype)
                outputs = [check(x, weight, given) for given in (bias, None)]
                without = [backend.linear(x, weight, bias), backend.linear(x, weight, None)]
        assert all(map(torch.equal, outputs, without))


@emulator
def test_weights_that_lie_at_odd_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_TALL", 0)
    x, weight, bias = inputs(40, 64, 16, torch.float16, torch.float16)
    odd = torch.zeros(1 + weight.numel(), dtype=torch.float16)[1:].view_as(weight).copy_(weight)
    shifted = torch.zeros(17, dtype=torch.float16)[1:].copy_(bias)
    with emulated.emulated(), launches.launching("linear"):
        assert torch.equal(check(x, odd, shifted), check(x, weight, bias))


def test_what_rows_cannot_be() -> None:
    """Few, wide, of odd widths, of other dtypes, on other GPUs; nor apart or at odd addresses."""
    half, single, hopper = torch.float16, torch.float32, choice.GPU(9, 132, 227 << 10)
    for rows, channels, width, given, dtype, gpu, expected in (
        (1 << 13, 64, 176, half, half, hopper, True),
        ((1 << 13) - 1, 64, 176, half, half, hopper, False),
        (1 << 13, 32, 176, half, half, hopper, True),
        ((1 << 13) - 1, 32, 176, half, half, hopper, False),
        (1 << 17, 256, 384, single, half, hopper, True),
        ((1 << 17) - 1, 256, 384, single, half, hopper, False),
        (1 << 17, 256, 384, half, half, hopper, False),
        (1 << 20, 256, 512, single, half, hopper, False),  # a weight too large
        (1 << 20, 288, 8, single, half, hopper, False),
        (1 << 13, 48, 176, half, half, hopper, False),
        (1 << 13, 0, 176, half, half, hopper, False),
        (1 << 13, 64, 172, half, half, hopper, False),
        (1 << 13, 64, 176, single, single, hopper, False),
        (1 << 13, 64, 176, half, half, choice.GPU(8, 108, 163 << 10), False),
        (1 << 13, 64, 176, half, half, choice.GPU(10, 148, 227 << 10), False),
    ):
        found = choice.multiplies(rows, channels, width, given, dtype, gpu)
        assert found is expected, (rows, channels, width)
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
Made = tuple[nn.Module, list[Tensor], Callable[..., Tensor], int]


def dcnv4() -> Made:
    layer = DCNv4(64, group=4, backend="cuda")
    return layer, [torch.randn(2, 30, 64)], lambda layer, x: layer(x, (5, 6)), 1


def conv2d() -> Made:
    layer = DCNv4Conv2d(64, 32, padding=1, groups=2, bias=False, backend="cuda")
    x = torch.randn(2, 64, 5, 6).to(memory_format=torch.channels_last)
    return layer, [x], lambda layer, x: layer(x), 1


def attn() -> Made:
    layer = FlashDeformAttn(64, n_levels=2, n_heads=2, n_points=2, backend="cuda")
    points = torch.rand(2, 7, 1, 2)

    def call(layer: nn.Module, query: Tensor, rows: Tensor) -> Any:
        return layer(query, points, rows, ((5, 6), (2, 3)))

    return layer, [torch.randn(2, 7, 64), torch.randn(2, 36, 64)], call, 2


LAYERS: dict[str, Callable[[], Made]] = {
    "DCNv4": dcnv4,
    "DCNv4Conv2d": conv2d,
    "FlashDeformAttn": attn,
}
"""A layer, its inputs, how it is called, and how many products of it the kernel makes."""


class Layer:
    """A layer whose products are made by the kernel, unless rows are less than `tall`."""

    def __init__(self, name: str, tall: int, backwards: bool = False) -> None:
        torch.manual_seed(0)
        self.layer, self.inputs, self.call, self.products = LAYERS[name]()
        for parameter in self.layer.parameters():
            nn.init.normal_(parameter, std=0.2)
        self.tall, self.backwards = tall, backwards

    def run(self, use: Callable[[Tensor], Any], half: bool = False, times: int = 1) -> Any:
        """What `use` makes of the output; of inputs in bfloat16, where they are `half`. The layer
        runs so many `times`."""
        inputs = [x.bfloat16() if half else x for x in self.inputs]
        self.inputs = [x.requires_grad_() for x in inputs]
        with (
            mock.patch.object(choice, "_TALL", self.tall),
            emulated.emulated(self.backwards),
            launches.recorded() as ran,
        ):
            with torch.autocast("cpu", torch.bfloat16):
                y = self.call(self.layer, *self.inputs)
            made = use(y)
        assert ran.names.count("linear") == (0 if self.tall else times * self.products)
        return made

    def gradients(self, y: Tensor, create_graph: bool = False) -> list[Tensor]:
        wanted = [*self.inputs, *self.layer.parameters()]
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
        (layer := Layer(name, tall)).run(layer.gradients, half) for tall in (0, NEVER)
    )
    close(found, expected, 0.02)
    with torch.no_grad():
        assert torch.equal(Layer(name, 0, True).run(lambda y: y, half), found[0])


@emulator
@one_node
@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_reach_the_input(name: str) -> None:
    def twice(layer: Layer, y: Tensor) -> list[Tensor]:
        _, *first = layer.gradients(y, create_graph=True)
        total = torch.stack([grad.float().square().sum() for grad in first]).sum()
        return list(torch.autograd.grad(total, layer.inputs))

    results = []
    for tall in (0, NEVER):
        layer = Layer(name, tall)
        results.append(layer.run(partial(twice, layer)))
    close(*results, 0.05)


@emulator
@one_node
@pytest.mark.parametrize("name", ["DCNv4", "FlashDeformAttn"])
@pytest.mark.parametrize("way", ["checkpoint", "hooks"])
def test_what_a_backward_needs_is_there(name: str, way: str) -> None:
    """Where it is computed once more, and where a copy of it is kept."""
    plain, again = Layer(name, 0), Layer(name, 0)
    expected = plain.run(plain.gradients)
    inner = again.call

    def call(layer: nn.Module, *inputs: Tensor) -> Any:
        if way == "checkpoint":
            return checkpoint(inner, layer, *inputs, use_reentrant=False)
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept):
            return inner(layer, *inputs)

    again.call = call
    found = again.run(again.gradients, times=2 if way == "checkpoint" else 1)
    assert all(map(torch.equal, found, expected))


@emulator
@one_node
def test_frozen_layers_pass_gradients() -> None:
    results = []
    for tall in (0, NEVER):
        layer = Layer("DCNv4", tall)
        layer.layer.requires_grad_(False)
        results.append(layer.run(lambda y, x=layer: torch.autograd.grad(y.sum(), x.inputs)))
    close(*results, 0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_rows_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the GPUs that the kernel runs on; on others nothing asks for it."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.setattr(choice, "_TALL", 0), monkeypatch.setattr(choice, "_NARROW", 256)
    for channels, width, given, rows in product(
        *((32, 64, 96, 128, 160, 192, 224, 256), (8, 64, 176, 344)),
        *((torch.float32, dtype), (1, 1000, 200 * 320 + 5)),
    ):
        arguments = inputs(rows, channels, width, given, dtype, "cuda")
        with launches.launching("linear"):
            for _ in range(3):
                check(*arguments)
