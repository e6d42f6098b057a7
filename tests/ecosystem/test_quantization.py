"""INT8 by torchao's PT2E: projections are quantised, what samples stays in floating point."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dcnv4 import DCNv4, DCNv4Conv2d
from dcnv4.export import decompositions
from dcnv4.layers import DCNv3
from support.portable import Attention

pytest.importorskip("torchao", reason="needs torchao; pip install torchao")
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
SEEDED = torch.Generator().manual_seed(0)
MAP = (torch.randn(2, 6, 8, 8, generator=SEEDED),)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "DCNv4": (lambda: DCNv4(8, group=2), MAP),
    "DCNv4, depthwise": (lambda: DCNv4(8, group=2, dw_kernel_size=3), MAP),
    "DCNv4Conv2d": (
        lambda: DCNv4Conv2d(8, 8, 3, 2, 1, groups=2, dw_kernel_size=5),
        (torch.randn(2, 8, 6, 8, generator=SEEDED),),
    ),
    "DCNv3": (lambda: DCNv3(8, group=2), MAP),
    "FlashDeformAttn": (Attention, (*MAP, torch.rand(2, 3, 2, 2, generator=SEEDED))),
}


@pytest.fixture(autouse=True)
def poison() -> None:
    """Off: tracers know the functions that it would replace."""


@pytest.mark.parametrize("name", LAYERS)
def test_int8(name: str) -> None:
    make, inputs = LAYERS[name]
    layer = make().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(layer, inputs).module(), quantizer)
    prepared(*inputs)
    converted = convert_pt2e(prepared)
    products = [n for n in converted.graph.nodes if "linear" in str(n.target)]
    assert len(products) >= 3
    for node in (product.args[i] for product in products for i in (0, 1)):
        assert "dequantize" in str(node.target)
    (sampling,) = [n for n in converted.graph.nodes if str(n.target).startswith("dcnv4.")]
    assert not [n for n in sampling.all_input_nodes if "quantize" in str(n.target)]
    with torch.no_grad():
        expected, found = layer(*inputs), converted(*inputs)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    program = torch.export.export(converted, inputs).run_decompositions(decompositions())
    assert not [n for n in program.graph.nodes if str(n.target).startswith("dcnv4.")]
    # Summed in another order, a sample between two integers may become either: almost none does.
    plain = program.module()(*inputs)
    (weight,) = [w for n, w in layer.named_parameters() if n.endswith("output_proj.weight")]
    step = products[-1].args[0].args[1] * weight.abs().sum(1).max().item()
    torch.testing.assert_close(plain, found, rtol=1.3e-6, atol=step)
    assert torch.isclose(plain, found, rtol=1.3e-6, atol=1e-5).float().mean() > 0.95
