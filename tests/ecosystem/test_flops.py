"""Counters of operations: PyTorch's own, fvcore and thop."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcnv4 import DCNv4, DCNv4Conv2d, FlashDeformAttn, flops, functional
from dcnv4.layers import DCNv3
from support.tiers import one_in

LEVELS = ((3, 4), (2, 2))


def counter_module() -> object:
    return pytest.importorskip(
        "torch.utils.flop_counter", reason=f"torch {torch.__version__} has no flop counter"
    )


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For deform_conv: value, offset_mask of 5 points; for attention: value, locations, weights."""
    return (
        torch.randn(2, 4, 6, 8, requires_grad=True),
        torch.randn(2, 2, 5, 30, requires_grad=True),
        torch.randn(2, 16, 2, 3, requires_grad=True),
        torch.rand(2, 7, 2, 2, 4, 2, requires_grad=True),
        torch.rand(2, 7, 2, 2, 4, requires_grad=True),
    )


def convolve(value: Tensor, offset_mask: Tensor) -> Tensor:
    return functional.deform_conv(
        value,
        offset_mask,
        kernel_size=(3, 2),
        stride=(2, 1),
        padding=(1, 0),
        groups=2,
        remove_center=True,
    )


# 4 corners of 5 points in 8 channels at 2·2·5 pixels; of 2·4 points in 6 channels of 2·7 queries
CONV_PRODUCTS = 4 * 5 * 8 * 20
ATTN_PRODUCTS = 4 * 8 * 6 * 14


def test_flop_counter() -> None:
    counter_module()
    from torch.utils.flop_counter import FlopCounterMode

    value, offset_mask, tokens, locations, weights = inputs()
    with FlopCounterMode(display=False) as counter:
        convolve(value, offset_mask)
    assert counter.get_total_flops() == 2 * CONV_PRODUCTS
    with FlopCounterMode(display=False) as counter:
        functional.ms_deform_attn(tokens, LEVELS, locations, weights)
    assert counter.get_total_flops() == 2 * ATTN_PRODUCTS
    references = torch.rand(2, 7, 1, 2)
    with FlopCounterMode(display=False) as counter:
        functional.ms_deform_attn_from_offsets(
            tokens, LEVELS, references, locations, weights
        ).sum().backward()
    assert counter.get_total_flops() == 6 * ATTN_PRODUCTS
    with FlopCounterMode(display=False) as counter:
        convolve(value, offset_mask).sum().backward()
        functional.ms_deform_attn(tokens, LEVELS, locations, weights).sum().backward()
    assert counter.get_total_flops() == 6 * (CONV_PRODUCTS + ATTN_PRODUCTS)
    counts = {str(operator): n for operator, n in counter.get_flop_counts()["Global"].items()}
    assert counts == {
        "dcnv4.deform_conv": 2 * CONV_PRODUCTS,
        "dcnv4.deform_conv_backward": 4 * CONV_PRODUCTS,
        "dcnv4.ms_deform_attn": 2 * ATTN_PRODUCTS,
        "dcnv4.ms_deform_attn_backward": 4 * ATTN_PRODUCTS,
    }


def test_importing_the_library_does_not_import_the_counter() -> None:
    counter_module()
    code = "import dcnv4, sys; assert 'torch.utils.flop_counter' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# The imports of the library and of the counter, which somebody may have looked for before.
ORDERS = {
    "library first": "import dcnv4, torch.utils.flop_counter",
    "counter first": "import torch.utils.flop_counter, dcnv4",
    "looked for": """
import importlib.util, dcnv4
importlib.util.find_spec("torch.utils.flop_counter")
import torch.utils.flop_counter
""",
    "again": """
import importlib, dcnv4, torch.utils.flop_counter
importlib.reload(torch.utils.flop_counter)
""",
}


@pytest.mark.parametrize("order", one_in(3, ORDERS))
def test_flop_counter_knows_the_formulas_in_any_order(order: str) -> None:
    counter_module()
    code = f"""
{ORDERS[order]}
layer, x = dcnv4.DCNv4(8, group=1, without_pointwise=True), torch.ones(1, 4, 8)
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    layer(x)
print(counter.get_flop_counts()["Global"][torch.ops.dcnv4.deform_conv])
"""
    code = f"import torch\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2 * 4 * 9 * 8 * 4


@pytest.mark.parametrize(
    ("layer", "arguments", "products"),
    [
        (DCNv3(8, group=2), (torch.randn(2, 4, 6, 8),), 4 * 9 * 8 * 24 * 2),
        (
            FlashDeformAttn(8, n_levels=2, n_heads=2, n_points=3, ratio=0.5),
            (torch.randn(2, 5, 8), torch.rand(2, 5, 1, 2), torch.randn(2, 16, 8), LEVELS),
            4 * 6 * 4 * 5 * 2,
        ),
    ],
    ids=["DCNv3", "half the value's channels"],
)
def test_what_thop_is_told(layer: nn.Module, arguments: tuple[Any, ...], products: int) -> None:
    layer.total_ops = 0
    with flops.thop_hooks(layer):
        layer(*arguments)
    assert layer.total_ops == products


class Model(nn.Module):
    """Each layer; the convolution runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = DCNv4(8, group=2, remove_center=True)
        self.image = DCNv4Conv2d(8, 8, 3, 2, 1, groups=2)
        self.attention = FlashDeformAttn(8, n_levels=2, n_heads=2, n_points=3)

    def forward(self, x: Tensor, references: Tensor) -> Tensor:
        y = self.flat(x, shape=(4, 6)).transpose(1, 2).unflatten(2, (4, 6))
        y = self.image(self.image(y))
        return self.attention(y.flatten(2).transpose(1, 2), references, x[:, :16], LEVELS)


def model_products() -> tuple[int, int]:
    """Of the operators, and of every Linear, in `Model` for a batch of 2."""
    conv = 4 * 8 * 2 * (8 * 24 + 9 * 6 + 9 * 2)
    attention = 4 * 6 * 8 * 2 * 2
    flat = 24 * (2 * 8 * 8 + 8 * 48)
    image = 24 * 8 * 8 + 6 * (8 * 56 + 8 * 8) + 6 * 8 * 8 + 2 * (8 * 56 + 8 * 8)
    linear = 2 * (8 * 24 + 8 * 12 + 8 * 8) + 16 * 8 * 8
    return conv + attention, 2 * (flat + image + linear)


@pytest.fixture
def model() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return Model().eval(), (torch.randn(2, 24, 8), torch.rand(2, 2, 2, 2))


def test_flop_counter_of_a_model(model: tuple[nn.Module, tuple[Tensor, Tensor]]) -> None:
    counter_module()
    from torch.utils.flop_counter import FlopCounterMode

    network, arguments = model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*arguments)
    assert counter.get_total_flops() == 2 * sum(model_products())


def test_thop(model: tuple[nn.Module, tuple[Tensor, Tensor]]) -> None:
    thop = pytest.importorskip("thop", reason="needs thop; pip install thop")
    network, arguments = model
    with flops.thop_hooks(network):
        products, _ = thop.profile(network, arguments, verbose=False)
    assert products == sum(model_products())
    assert not any(layer._forward_hooks for layer in network.modules())


def test_thop_hooks(model: tuple[nn.Module, tuple[Tensor, Tensor]]) -> None:
    """What they add to the counts that thop keeps in each layer."""
    network, arguments = model
    for layer in network.modules():
        layer.total_ops = 0
    with flops.thop_hooks(network):
        network(*arguments)
    assert sum(layer.total_ops for layer in network.modules()) == model_products()[0]


def test_fvcore(model: tuple[nn.Module, tuple[Tensor, Tensor]]) -> None:
    fvcore = pytest.importorskip("fvcore.nn", reason="needs fvcore; pip install fvcore")
    network, arguments = model
    analysis = fvcore.FlopCountAnalysis(network, arguments).set_op_handle(**flops.FVCORE)
    analysis.unsupported_ops_warnings(False)
    counts = analysis.by_operator()
    conv, attention = counts["deform_conv"], counts["ms_deform_attn"]
    assert conv + attention == model_products()[0]
    assert counts["linear"] == model_products()[1]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_fvcore_handles() -> None:
    """On a traced graph, which is what fvcore calls them with."""
    value, offset_mask, tokens, locations, weights = (t.detach() for t in inputs())
    traced = torch.jit.trace(
        lambda *t: (
            convolve(*t[:2]),
            functional.ms_deform_attn(t[2], LEVELS, *t[3:]),
            functional.ms_deform_attn_from_offsets(t[2], LEVELS, t[3][:, :, 0, :, 0], *t[3:]),
        ),
        (value, offset_mask, tokens, locations, weights),
    )
    counts = {
        node.kind(): flops.FVCORE[node.kind()](list(node.inputs()), list(node.outputs()))
        for node in traced.graph.nodes()
        if node.kind() in flops.FVCORE
    }
    assert counts == {
        "dcnv4::deform_conv": CONV_PRODUCTS,
        "dcnv4::ms_deform_attn": ATTN_PRODUCTS,
        "dcnv4::ms_deform_attn_from_offsets": ATTN_PRODUCTS,
    }
