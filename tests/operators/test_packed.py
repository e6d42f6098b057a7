"""value and offset_mask in one tensor: the same bits as apart, and one gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dcnv4 import functional
from support import cases
from support.runner import Runner, deterministic

CHANNELS, GROUPS = 16, 2
WINDOWS: dict[str, dict[str, Any]] = {
    "3x3": {},
    "softmax": {"softmax": True, "remove_center": True},
    "half_scale": {"offset_scale": 0.5, "padding": 2, "dilation": 2},
    "1x3": {"kernel_size": (1, 3), "padding": (0, 1)},
}


def packed(extra: int = 3, **window: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    settings = functional.window(groups=GROUPS, **window)
    width = CHANNELS + settings.offset_mask_channels() + extra
    return torch.randn(2, 3, 2, width, generator=generator, dtype=torch.float64)


def together(tensor: Tensor, **settings: Any) -> Tensor:
    return functional.deform_conv_packed(tensor, CHANNELS, groups=GROUPS, **settings)


def apart(tensor: Tensor, **settings: Any) -> Tensor:
    value, offset_mask = tensor[..., :CHANNELS], tensor[..., CHANNELS:]
    return functional.deform_conv(value, offset_mask, groups=GROUPS, **settings)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("name", WINDOWS)
def test_the_bits_are_those_of_two_tensors(name: str, dtype: torch.dtype, backend: Runner) -> None:
    """On a GPU but for the order of the value gradient's additions."""
    backend.require("deform_conv", dtype)
    window = WINDOWS[name]
    inputs = [packed(**window).to(backend.device, dtype).requires_grad_() for _ in range(2)]
    outputs = [
        call(tensor, **window, backend=backend.backend)
        for call, tensor in zip((together, apart), inputs, strict=True)
    ]
    assert torch.equal(*outputs)
    grad = torch.randn_like(outputs[0])
    one, two = (torch.autograd.grad(*pair, grad)[0] for pair in zip(outputs, inputs, strict=True))
    assert one.is_contiguous()
    assert one[..., :-3].count_nonzero() > one[..., :-3].numel() // 2
    assert one[..., -3:].count_nonzero() == 0
    assert torch.equal(one[..., CHANNELS:], two[..., CHANNELS:])
    if backend.device == "cpu":
        assert torch.equal(one, two)
    else:
        tolerance = torch.finfo(dtype).eps
        torch.testing.assert_close(one, two, rtol=2 * tolerance, atol=32 * tolerance)


def test_deterministic_gradients(backend: Runner) -> None:
    """The same bits on every backend that has such gradients."""
    if backend.backend == "triton":
        pytest.skip("triton has no deterministic gradients")
    backend.require("deform_conv", torch.float32)
    with deterministic():
        inputs = [packed().to(backend.device, torch.float32).requires_grad_() for _ in range(2)]
        for call, tensor in zip((together, apart), inputs, strict=True):
            call(tensor, backend=backend.backend).square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)


@pytest.mark.skipif(
    not hasattr(torch.library, "opcheck"), reason=f"needs torch >= 2.4; got {torch.__version__}"
)
def test_opcheck() -> None:
    tensor = packed().requires_grad_()
    window = [3, 3], [1, 1], [1, 1], [1, 1], GROUPS, 0.5, False, True
    call = tensor, CHANNELS, *window, "reference"
    torch.library.opcheck(torch.ops.dcnv4.deform_conv_packed.default, call)
    grad = torch.randn(2, 3, 2, CHANNELS, dtype=torch.float64)
    call = grad, tensor.detach(), *call[1:]
    torch.library.opcheck(torch.ops.dcnv4.deform_conv_packed_backward.default, call)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_autocast_rounds_no_coordinate(dtype: torch.dtype) -> None:
    tensor = packed().to(dtype)
    settings = [3, 3], [1, 1], [1, 1], [1, 1], GROUPS, 1.0, False, False, "reference"
    with torch.autocast("cpu", torch.bfloat16):
        expected = apart(tensor, backend="reference")
        for output in (
            together(tensor, backend="reference"),
            torch.ops.dcnv4.deform_conv_packed(tensor, CHANNELS, *settings),
        ):
            assert output.dtype == (dtype if dtype == torch.float64 else torch.bfloat16)
            assert torch.equal(output, expected)
        mapped = torch.func.vmap(together)(tensor[None])[0]
        torch.testing.assert_close(mapped, expected)


def test_vmap_and_forward_mode() -> None:
    tensor = torch.stack([packed(), -packed()])
    mapped = torch.func.vmap(together)(tensor)
    torch.testing.assert_close(mapped, torch.stack([together(one) for one in tensor]))
    tangent = torch.ones_like(tensor[0])
    found, expected = (torch.func.jvp(call, (tensor[0],), (tangent,)) for call in (together, apart))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_exported_program_has_the_operator() -> None:
    class Model(torch.nn.Module):
        def forward(self, tensor: Tensor) -> Tensor:
            return together(tensor, backend="reference")

    if not hasattr(getattr(getattr(torch, "export", None), "Dim", None), "DYNAMIC"):
        pytest.skip(f"needs torch >= 2.6; got {torch.__version__}")
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Model(), (packed(),), dynamic_shapes=(axes,))
    names = [str(node.target) for node in program.graph.nodes if "dcnv4" in str(node.target)]
    assert names == ["dcnv4.deform_conv_packed.default"]
    tensor = torch.randn(3, 7, 5, packed().shape[3], dtype=torch.float64)
    torch.testing.assert_close(program.module()(tensor), apart(tensor))
