"""Submodules are called wherever somebody could tell, and their sizes are read where they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as every
from torch.nn.utils import parametrize, prune, weight_norm

from dcnv4 import DCNv4, DCNv4Conv2d, FlashDeformAttn
from dcnv4.layers import DCNv3
from dcnv4.layers.projections import read
from dcnv4.tracing import may_read_past

SHAPES = ((3, 4), (2, 2))


def some(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[Any, ...]]] = {
    "DCNv4": (
        partial(DCNv4, 8, group=2, dw_kernel_size=3, center_feature_scale=True),
        (some(1, 4, 5, 8),),
    ),
    "DCNv4Conv2d": (
        partial(DCNv4Conv2d, 6, 8, padding=1, groups=2, dw_kernel_size=3),
        (some(1, 6, 4, 5),),
    ),
    "DCNv3": (partial(DCNv3, 8, group=2), (some(1, 4, 5, 8),)),
    "DCNv3-BN": (partial(DCNv3, 8, group=2, norm_layer="BN"), (some(1, 4, 5, 8),)),
    "FlashDeformAttn": (
        partial(FlashDeformAttn, 8, n_levels=2, n_heads=2, n_points=3, ratio=0.5),
        (some(1, 3, 8), torch.rand(1, 3, 2, 2), some(1, 16, 8), SHAPES),
    ),
}


def made(name: str) -> nn.Module:
    """The layer, with parameters that let every submodule change the output."""
    torch.manual_seed(0)
    layer = LAYERS[name][0]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.eval()


def call(layer: nn.Module, name: str) -> Tensor:
    output: Tensor = layer(*LAYERS[name][1])
    return output


SUBMODULES = [
    (name, path)
    for name in LAYERS
    for path, module in made(name).named_modules()
    if path and not list(module.children())
]
LINEARS = [
    (name, path) for name, path in SUBMODULES if type(made(name).get_submodule(path)) is nn.Linear
]


# Ways to notice that a module is called: each calls `seen` then.


@contextmanager
def hooked(register: str, module: nn.Module, seen: Callable[..., None]) -> Iterator[None]:
    handle = getattr(module, register)(lambda *_: seen())
    yield
    handle.remove()


@contextmanager
def globally_hooked(register: str, module: nn.Module, seen: Callable[..., None]) -> Iterator[None]:
    handle = getattr(every, register)(lambda called, *_: seen() if called is module else None)
    yield
    handle.remove()


@contextmanager
def with_own_forward(module: nn.Module, seen: Callable[..., None]) -> Iterator[None]:
    forward = module.forward

    def counted(x: Tensor) -> Any:
        seen()
        return forward(x)

    module.forward = counted  # type: ignore[method-assign]
    yield
    del module.forward


OF_ANY = {
    **{
        f"register_{kind}": partial(hooked, f"register_{kind}")
        for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook")
    },
    "register_full_backward_pre_hook": partial(hooked, "register_full_backward_pre_hook"),
    **{
        f"register_module_{kind}": partial(globally_hooked, f"register_module_{kind}")
        for kind in (
            *("forward_hook", "forward_pre_hook"),
            *("full_backward_hook", "full_backward_pre_hook"),
        )
    },
    "forward": with_own_forward,
}


@pytest.mark.parametrize("way", OF_ANY)
@pytest.mark.parametrize(("name", "path"), SUBMODULES, ids=".".join)
def test_every_submodule_is_called(name: str, path: str, way: str) -> None:
    layer = made(name)
    expected = call(layer, name)
    calls: list[int] = []
    with OF_ANY[way](layer.get_submodule(path), lambda: calls.append(1)):
        output = call(layer, name)
        output.sum().backward()
    assert calls == [1]
    torch.testing.assert_close(output, expected)


class Counted(Tensor):
    """A tensor that counts the products with it."""

    calls: int = 0

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.linear:
            Counted.calls += 1
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("tensor", ["weight", "bias"])
@pytest.mark.parametrize(("name", "path"), LINEARS, ids=".".join)
def test_tensors_that_are_more_than_numbers(name: str, path: str, tensor: str) -> None:
    layer = made(name)
    expected = call(layer, name)
    module = layer.get_submodule(path)
    own = getattr(module, tensor)
    setattr(module, tensor, nn.Parameter(own.detach().as_subclass(Counted)))
    assert isinstance(getattr(module, tensor), Counted)
    Counted.calls = 0
    output = call(layer, name).as_subclass(Tensor)
    assert Counted.calls >= 1
    torch.testing.assert_close(output, expected)


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize(("name", "path"), LINEARS, ids=".".join)
def test_parametrisations(name: str, path: str) -> None:
    layer, other = made(name), made(name)
    with torch.no_grad():
        other.get_submodule(path).weight *= 2
    parametrize.register_parametrization(layer.get_submodule(path), "weight", Scaled())
    torch.testing.assert_close(call(layer, name), call(other, name))


class LowRank(nn.Module):
    """LoRA as people write it: around a Linear, of which it shows nothing."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.frozen = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.frozen(x) + self.up(self.down(x))


@pytest.mark.parametrize(("name", "path"), LINEARS, ids=".".join)
def test_wrappers(name: str, path: str) -> None:
    layer = made(name)
    expected = call(layer, name)
    wrapper = LowRank(layer.get_submodule(path))
    setattr(layer, path, wrapper)
    output = call(layer, name)
    assert not torch.allclose(output, expected)
    output.square().sum().backward()
    assert wrapper.down.weight.grad.abs().max() > 0
    assert wrapper.up.weight.grad.abs().max() > 0


REWRITES = {
    "weight_norm": weight_norm,
    "prune": lambda linear: prune.l1_unstructured(linear, "weight", amount=0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize(("name", "path"), LINEARS, ids=".".join)
def test_weights_that_are_computed_before_every_call(name: str, path: str, rewrite: str) -> None:
    """Two steps: a weight that was computed once would lose its graph in the first."""
    layer = made(name)
    REWRITES[rewrite](layer.get_submodule(path))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    outputs = []
    for _ in range(2):
        outputs.append(call(layer, name))
        optimizer.zero_grad()
        outputs[-1].square().mean().backward()
        assert all(p.grad is not None for p in layer.get_submodule(path).parameters())
        optimizer.step()
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("name", LAYERS)
def test_quantized_linears(name: str) -> None:
    layer = made(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, torch.qint8)
        output = call(quantized, name)
    for path in (path for one, path in LINEARS if one == name):
        assert type(quantized.get_submodule(path)) is torch.ao.nn.quantized.dynamic.Linear
    expected = call(layer, name)
    error = (output - expected).norm() / expected.norm()
    assert 0 < error < 0.1


def test_what_is_read_and_what_is_not() -> None:
    """Each condition by itself; without any, the weights of DCNv3's predictions are read."""
    layer, x = made("DCNv3"), torch.randn(1, 4, 5, 8)
    pair = layer.offset, layer.mask
    assert read(pair).tensors[:2] == [layer.offset.weight, layer.mask.weight]
    for way in OF_ANY.values():
        with way(layer.offset, lambda: None):
            assert read(pair) is None
        assert read(pair) is not None
    if hasattr(nn.Module, "compile"):
        layer.offset.compile()
        assert read(pair) is None
    assert read((nn.Linear(8, 8), nn.Linear(8, 8, bias=False))) is None
    assert read((nn.Linear(8, 8), nn.Bilinear(8, 8, 8))) is None
    assert not may_read_past(x, x.as_subclass(Counted))


def test_reading_and_calling_are_the_same() -> None:
    layer = made("DCNv3").double()
    x = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    results = []
    for called in (False, True):
        if called:
            layer.mask.register_forward_hook(lambda *_: None)
        output = layer(x)
        results.append([output, *torch.autograd.grad(output.square().sum(), layer.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


# Sizes.


def narrowed(
    linear: nn.Linear, *, inputs: Any = slice(None), outputs: Any = slice(None)
) -> nn.Linear:
    weight, bias = linear.weight.detach()[outputs, inputs], linear.bias.detach()[outputs]
    smaller = nn.Linear(weight.shape[1], weight.shape[0])
    smaller.weight.data, smaller.bias.data = weight.clone(), bias.clone()
    return smaller


def test_input_channels_may_be_pruned() -> None:
    kept = [0, 2, 3, 7]
    x = torch.randn(1, 4, 5, 8)
    x[..., [1, 4, 5, 6]] = 0
    layer = DCNv4(8, group=2)
    nn.init.normal_(layer.offset_mask.weight, std=0.1)
    expected = layer(x)
    for name in ("value_proj", "offset_mask"):
        setattr(layer, name, narrowed(getattr(layer, name), inputs=kept))
    torch.testing.assert_close(layer(x[..., kept]), expected)
    torch.testing.assert_close(layer(x[..., kept].flatten(1, 2), (4, 5)), expected.flatten(1, 2))
    with pytest.raises(ValueError, match=r"with C = 4; got \[1, 4, 5, 8\]"):
        layer(x)
    conv = DCNv4Conv2d(8, 8, padding=1, groups=2)
    for name in ("value_proj", "offset_mask"):
        setattr(conv, name, getattr(layer, name))
    conv.output_proj = layer.output_proj
    torch.testing.assert_close(conv(x[..., kept].permute(0, 3, 1, 2)), expected.permute(0, 3, 1, 2))
    third = DCNv3(8, group=2)
    third.input_proj = narrowed(third.input_proj, inputs=kept)
    third.dw_conv = DCNv3(4, group=2).dw_conv
    third.offset, third.mask = nn.Linear(4, 36), nn.Linear(4, 18)
    assert third(x[..., kept]).shape == x.shape


def test_value_channels_may_be_pruned() -> None:
    layer = DCNv4(8, group=2)
    layer.value_proj = narrowed(layer.value_proj, outputs=slice(0, 4))
    layer.output_proj = narrowed(layer.output_proj, inputs=slice(0, 4), outputs=slice(0, 6))
    assert layer(torch.randn(1, 4, 5, 8)).shape == (1, 4, 5, 6)
    layer.offset_mask = narrowed(layer.offset_mask, outputs=slice(0, 54))
    layer(torch.randn(1, 4, 5, 8)).sum().backward()


def test_heads_may_be_pruned() -> None:
    query, reference, rows, shapes = LAYERS["FlashDeformAttn"][1]
    layer = FlashDeformAttn(8, n_levels=2, n_heads=2, n_points=3)
    with torch.no_grad():
        layer.output_proj.weight[:, 4:] = 0
        expected = layer(query, reference, rows, shapes)
        layer.sampling_offsets = narrowed(layer.sampling_offsets, outputs=slice(0, 12))
        layer.attention_weights = narrowed(layer.attention_weights, outputs=slice(0, 6))
        layer.value_proj = narrowed(layer.value_proj, outputs=slice(0, 4))
        layer.output_proj = narrowed(layer.output_proj, inputs=slice(0, 4))
        torch.testing.assert_close(layer(query, reference, rows, shapes), expected)


def test_the_settings_that_a_layer_tells_are_those_that_it_uses() -> None:
    """Code that dilates the convolutions of a model changes them."""
    x = torch.randn(1, 8, 9, 9)
    conv = DCNv4Conv2d(8, 8, 3, 2, 1, groups=2)
    other = DCNv4Conv2d(8, 8, 3, 1, 2, 2, groups=2)
    other.load_state_dict(conv.state_dict())
    conv.stride, conv.padding, conv.dilation = (1, 1), (2, 2), (2, 2)
    assert torch.equal(conv(x), other(x))
    layer = DCNv4(8, group=2)
    layer.pad, layer.dilation, layer.offset_scale = 2, 2, 0.5
    assert layer.window == DCNv4(8, group=2, pad=2, dilation=2, offset_scale=0.5).window
    with pytest.raises(TypeError, match="stride must be an integer"):
        layer.stride = 1.5
