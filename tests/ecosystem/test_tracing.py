"""Models with these layers recorded by `torch.fx` and traced by `torch.jit`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dcnv4 import DCNv4, DCNv4Conv2d, FlashDeformAttn
from dcnv4.checkpoints import DCNv3
from dcnv4.compat import mmcv
from dcnv4.compat.torchvision import DeformConv2d
from dcnv4.functional import ms_deform_attn, ms_deform_attn_from_offsets


@pytest.fixture(autouse=True)
def poison() -> None:
    """Off: tracers know the functions that it would replace."""


class Levels(nn.Module):
    """Attention over a map and the same made smaller, with level sizes read from tensors."""

    def __init__(self, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, references: Tensor) -> Tensor:
        small = F.max_pool2d(x, 2)
        value = torch.cat((x.flatten(2), small.flatten(2)), 2).transpose(1, 2)
        sizes = [(level.shape[2], level.shape[3]) for level in (x, small)]
        if self.attention is None:
            return self.sample(value[:, :, None], sizes, references)
        return self.attention(
            query=value[:, : references.shape[1]],
            reference_points=references,
            input_flatten=value,
            input_spatial_shapes=sizes,
        )

    def sample(self, value: Tensor, sizes: Sequence[Any], references: Tensor) -> Tensor:
        locations = references[:, :, None, :, None]
        return ms_deform_attn(value, sizes, locations, locations[..., 0])


class FromOffsets(Levels):
    def sample(self, value: Tensor, sizes: Sequence[Any], references: Tensor) -> Tensor:
        offsets = references[:, :, None, :, None]
        arguments = value, sizes, references[:, :1], offsets, offsets[..., 0]
        return ms_deform_attn_from_offsets(*arguments)


class Mmcv(Levels):
    def forward(self, x: Tensor, references: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        assert self.attention is not None
        return self.attention(
            tokens[:, : references.shape[1]],
            value=tokens,
            reference_points=references[:, :, :1],
            spatial_shapes=torch.tensor([[8, 6]]),
        )


class Tokens(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2).transpose(1, 2), shape=(x.shape[2], x.shape[3]))


class Offsets(nn.Module):
    """A layer that is given its offsets, and its mask."""

    def __init__(self, layer: nn.Module, mask: int = 0) -> None:
        super().__init__()
        self.layer, self.mask = layer, mask
        self.predict = nn.Conv2d(8, 18 + mask, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        predicted = self.predict(x)
        if not self.mask:
            return self.layer(x, predicted)
        return self.layer(x, predicted[:, :18], predicted[:, 18:])


class ChannelsLast(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x.permute(0, 2, 3, 1))
        return y


MODELS = {
    "DCNv4": lambda: Tokens(DCNv4(8, group=2, stride=2, dw_kernel_size=3)),
    "DCNv4Conv2d": lambda: nn.Sequential(DCNv4Conv2d(8, 6, groups=3), nn.ReLU()),
    "DCNv3": lambda: ChannelsLast(DCNv3(8, group=2)),
    "FlashDeformAttn": lambda: Levels(FlashDeformAttn(8, n_levels=2, n_heads=2)),
    "ms_deform_attn": Levels,
    "ms_deform_attn_from_offsets": FromOffsets,
    "torchvision": lambda: Offsets(DeformConv2d(8, 4, 3, padding=1), 9),
    "mmcv": lambda: Offsets(mmcv.DeformConv2d(8, 4, 3, padding=1)),
    "mmcv_pack": lambda: nn.Sequential(mmcv.DeformConv2dPack(8, 4, 3, padding=1)),
    "mmcv_modulated": lambda: Offsets(mmcv.ModulatedDeformConv2d(8, 4, 3, padding=1), 9),
    "mmcv_modulated_pack": lambda: nn.Sequential(mmcv.ModulatedDeformConv2dPack(8, 4, 3)),
    "mmcv_attention": lambda: Mmcv(
        mmcv.MultiScaleDeformableAttention(8, 2, 1, 2, batch_first=True, dropout=0.0)
    ),
}
FUNCTIONS = "ms_deform_attn", "ms_deform_attn_from_offsets"


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs(name: str, batch: int = 2, height: int = 8, width: int = 6) -> tuple[Tensor, ...]:
    x = torch.randn(batch, 1 if name in FUNCTIONS else 8, height, width)
    return (x, torch.rand(batch, 5, 2, 2)) if isinstance(make(name), Levels) else (x,)


def trace(model: nn.Module, arguments: tuple[Tensor, ...]) -> torch.jit.ScriptModule:
    traced: torch.jit.ScriptModule = torch.jit.trace(model, arguments)
    return traced


JIT = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")


@JIT
@pytest.mark.parametrize("name", [n for n in MODELS if "mmcv" not in n and n != "torchvision"])
def test_a_traced_model_takes_every_size(name: str) -> None:
    model = make(name)
    traced = trace(model, inputs(name))
    operators = [n.kind() for n in traced.inlined_graph.nodes() if "dcnv4::" in n.kind()]
    known = "deform_conv", *FUNCTIONS
    assert operators in [[f"dcnv4::{operator}"] for operator in known]
    for size in ((2, 8, 6), (1, 4, 10), (3, 12, 4)):
        arguments = inputs(name, *size)
        torch.testing.assert_close(traced(*arguments), model(*arguments))


@JIT
@pytest.mark.parametrize("name", [n for n in MODELS if "mmcv" in n or n == "torchvision"])
def test_a_traced_model_of_other_libraries_layers(name: str) -> None:
    model = make(name)
    traced = trace(model, inputs(name))
    arguments = inputs(name)
    torch.testing.assert_close(traced(*arguments), model(*arguments))


@JIT
def test_a_trace_of_sizes_some_of_which_are_numbers() -> None:
    def call(x: Tensor, locations: Tensor) -> Tensor:
        sizes = [(x.shape[1], 6)]
        return ms_deform_attn(x.flatten(1, 2)[:, :, None], sizes, locations, locations[..., 0])

    def arguments(height: int) -> tuple[Tensor, Tensor]:
        return torch.randn(1, height, 6, 2), torch.rand(1, 3, 1, 1, 2, 2)

    traced = torch.jit.trace(call, arguments(8))
    for height in (8, 5):
        torch.testing.assert_close(traced(*(a := arguments(height))), call(*a))


def test_a_number_outside_of_a_trace_is_no_tensor() -> None:
    rule = r"^spatial_shapes must be an integer >= 0; got tensor\(8\)$"
    with pytest.raises(TypeError, match=rule):
        ms_deform_attn(
            torch.randn(1, 48, 1, 2),
            [(torch.tensor(8), 6)],  # type: ignore[list-item]
            torch.rand(1, 3, 1, 1, 2, 2),
            torch.rand(1, 3, 1, 1, 2),
        )


FX = pytest.mark.parametrize("name", [name for name in MODELS if name not in FUNCTIONS])


def calls(graph: fx.GraphModule) -> list[type[Any]]:
    """The classes of the layers that a graph calls."""
    modules = dict(graph.named_modules())
    return [type(modules[n.target]) for n in graph.graph.nodes if n.op == "call_module"]


@FX
def test_a_layer_is_a_leaf(name: str) -> None:
    """The graph calls it; a copy, too."""
    model, arguments = make(name), inputs(name)
    graph = fx.symbolic_trace(model)
    graph.graph.lint()
    package = [kind for kind in calls(graph) if kind.__module__.startswith("dcnv4")]
    assert len(package) == 1
    expected = model(*arguments)
    for twin in (graph, copy.deepcopy(graph)):
        torch.testing.assert_close(twin(*arguments), expected)


def test_a_recorded_model_trains() -> None:
    model = make("FlashDeformAttn")
    twin = copy.deepcopy(model)
    arguments = inputs("FlashDeformAttn")
    fx.symbolic_trace(model)(*arguments).square().sum().backward()
    twin(*arguments).square().sum().backward()
    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)


def test_hooks_of_a_recorded_layer_run_once() -> None:
    model = make("DCNv4Conv2d")
    model[0].register_forward_pre_hook(lambda _, arguments: (2 * arguments[0],))
    model[0].register_forward_hook(lambda _, __, output: output + 1)
    graph = fx.symbolic_trace(model)
    graph.graph.lint()
    arguments = inputs("DCNv4Conv2d")
    torch.testing.assert_close(graph(*arguments), model(*arguments))


def test_a_layer_within_another_forward_is_not_recorded() -> None:
    """A call of the layer would compute what is around its forward twice."""

    class Shifted(DCNv4Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    rule = r"must be told that Shifted is a leaf, whose forward is not that of DCNv4Conv2d"
    with pytest.raises(TypeError, match=rule):
        fx.symbolic_trace(nn.Sequential(Shifted(4, 4)))
    layer = DCNv4Conv2d(4, 4)
    layer.forward = lambda x, forward=layer.forward: forward(x) + 1
    with pytest.raises(TypeError, match="must be told that DCNv4Conv2d is a leaf"):
        fx.symbolic_trace(nn.Sequential(layer))

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, Shifted) or super().is_leaf_module(module, name)

    model = nn.Sequential(Shifted(4, 4))
    graph = fx.GraphModule(model, Tracer().trace(model))
    x = torch.randn(1, 4, 5, 6)
    torch.testing.assert_close(graph(x), model(x))


def test_a_layer_alone_is_not_recorded() -> None:
    rule = "^torch.fx must be given a model that DCNv4Conv2d is a part of; got the layer$"
    with pytest.raises(TypeError, match=rule):
        fx.symbolic_trace(DCNv4Conv2d(4, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@FX
def test_a_layer_is_not_scripted(name: str) -> None:
    """Nor a model around it; either says what to do instead."""
    model = make(name)
    layer = next(m for m in model.modules() if type(m).__module__.startswith("dcnv4."))
    rule = rf"given no {type(layer).__name__},.*jit\.trace\(model, inputs\)"
    for scripted in layer, model:
        with pytest.raises(TypeError, match=rule):
            torch.jit.script(scripted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantization_around_a_layer() -> None:
    """FX-mode quantization leaves the layer as it is."""
    quantize = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    if not {"x86", "fbgemm", "onednn"} & set(torch.backends.quantized.supported_engines):
        pytest.skip("needs a quantised engine of x86 processors; this PyTorch has none")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), DCNv4Conv2d(8, 8), nn.Conv2d(8, 8, 1)).eval()
    x = torch.randn(2, 3, 9, 9)
    prepared = quantize.prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(), (x,))
    prepared(x)
    converted = quantize.convert_fx(prepared)
    assert DCNv4Conv2d in calls(converted)
    expected = model(x)
    torch.testing.assert_close(
        converted(x), expected, rtol=0, atol=0.05 * float(expected.abs().max())
    )
