"""The names of nusu-github's fork of DCNv4, in `compat` and in the package itself."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dcnv4
from dcnv4 import DCNv4, compat, functional
from support import grid_sample, oracle

WINDOW = {
    "kernel_h": 3,
    "kernel_w": 5,
    "stride_h": 2,
    "stride_w": 1,
    "pad_h": 1,
    "pad_w": 2,
    "dilation_h": 1,
    "dilation_w": 1,
}
SIZES = {"group": 2, "group_channels": 4, "offset_scale": 0.5, "im2col_step": 64}
SHAPES = [(5, 7), (3, 4)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs(remove_center: int) -> dict[str, Tensor]:
    fields = 2 * 3 * (15 - remove_center)
    shapes = {"input": (2, 7, 9, 8), "offset_mask": (2, 4, 9, fields + 2)}
    return {n: torch.randn(s, dtype=torch.float64).requires_grad_() for n, s in shapes.items()}


def attention_inputs() -> dict[str, Any]:
    return {
        "value": torch.randn(2, 47, 3, 4, dtype=torch.float64, requires_grad=True),
        "value_spatial_shapes": torch.tensor(SHAPES),
        "value_level_start_index": torch.tensor([0, 35]),
        "sampling_loc_attn": torch.rand(2, 6, 3, 30, dtype=torch.float64, requires_grad=True),
        "im2col_step": 64,
        "K": 5,
    }


def test_names() -> None:
    for name in ("dcnv4_forward", "dcnv4_forward_pytorch", "flash_deform_attn"):
        assert getattr(dcnv4, name) is getattr(compat, name)
        assert name in dcnv4.__all__
    for name in ("dcnv4_forward", "flash_deform_attn"):
        operator = getattr(compat, name)
        assert operator is getattr(torch.ops.dcnv4, name).default
        assert "Args:" in inspect.getdoc(operator)


@pytest.mark.parametrize("name", ["dcnv4_forward", "dcnv4_forward_pytorch"])
@pytest.mark.parametrize("remove_center", [0, 1])
@pytest.mark.parametrize("softmax", [False, True])
def test_forward(name: str, remove_center: int, softmax: bool) -> None:
    leaves = inputs(remove_center)
    settings = {**WINDOW, **SIZES, "remove_center": remove_center}
    function = getattr(compat, name)
    if softmax:
        settings["softmax"] = True
    output = function(**leaves, **settings)
    arrays = [leaf.detach().numpy() for leaf in leaves.values()]
    window: dict[str, Any] = {
        **{"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2), "groups": 2},
        **{"offset_scale": 0.5, "remove_center": bool(remove_center), "softmax": softmax},
    }
    expected = oracle.deform_conv(*arrays, **window)
    torch.testing.assert_close(output.detach(), torch.from_numpy(expected))
    grad = torch.randn_like(output)
    grads = torch.autograd.grad(output, list(leaves.values()), grad)
    wanted = oracle.deform_conv_backward(np.asarray(grad), *arrays, **window)
    for leaf, found, array in zip(leaves, grads, wanted, strict=True):
        torch.testing.assert_close(
            found, torch.from_numpy(array), msg=lambda m, n=leaf: f"{n}: {m}"
        )
    positional = function(*leaves.values(), *settings.values())
    torch.testing.assert_close(positional, output, rtol=0, atol=0)


def test_plain_pytorch_is_the_reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        compat.opengvlab,
        "deform_conv",
        lambda *a, **k: calls.append(k["backend"]) or functional.deform_conv(*a, **k),
    )
    arguments = {**inputs(0), **WINDOW, **SIZES, "remove_center": 0}
    compat.dcnv4_forward_pytorch(**arguments)
    compat.dcnv4_forward(**arguments)
    assert calls == ["reference", None]


@pytest.mark.parametrize("flat", [False, True])
def test_attention(flat: bool) -> None:
    arguments = attention_inputs()
    leaves = {name: arguments[name] for name in ("value", "sampling_loc_attn")}
    packed = leaves["sampling_loc_attn"]
    weights = packed[..., 20:].softmax(-1).unflatten(3, (2, 5))
    locations = packed[..., :20].unflatten(3, (2, 5, 2))
    if flat:
        arguments["sampling_loc_attn"] = packed.flatten(2)
    expected = grid_sample.ms_deform_attn(SHAPES, leaves["value"], locations, weights)
    grid_sample.check(compat.flash_deform_attn(**arguments), expected, leaves)
    torch.testing.assert_close(compat.flash_deform_attn(*arguments.values()), expected)


@pytest.mark.skipif(
    not hasattr(torch.library, "opcheck"), reason=f"needs torch >= 2.4; got {torch.__version__}"
)
def test_operators_pass_pytorchs_checks() -> None:
    arguments = {**inputs(0), **WINDOW, **SIZES, "remove_center": 0, "softmax": True}
    torch.library.opcheck(compat.dcnv4_forward, tuple(arguments.values()))
    torch.library.opcheck(compat.flash_deform_attn, tuple(attention_inputs().values()))


@pytest.mark.skipif(
    not hasattr(torch, "compiler"), reason=f"needs torch >= 2.1; got {torch.__version__}"
)
def test_operators_compile_in_one_graph() -> None:
    leaves = inputs(0)
    settings = {**WINDOW, **SIZES, "remove_center": 0}
    torch._dynamo.reset()

    def function(input: Tensor, offset_mask: Tensor) -> Tensor:
        return dcnv4.dcnv4_forward(input, offset_mask, **settings).relu()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    grid_sample.check(compiled(**leaves), function(**leaves), leaves)


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("kernel_size", [2, 3, 5])
@pytest.mark.parametrize("remove_center", [0, 1])
def test_offset_mask_channels(group: int, kernel_size: int, remove_center: int) -> None:
    layer = DCNv4(4 * group, kernel_size, group=group, remove_center=bool(remove_center))
    found = compat.compute_offset_mask_channels(group, kernel_size, remove_center)
    assert found == layer.offset_mask.out_features


def test_refusals() -> None:
    arguments = {**inputs(0), **WINDOW, **SIZES, "remove_center": 0}
    with pytest.raises(TypeError, match="kernel_h must be an integer >= 1; got"):
        compat.dcnv4_forward_pytorch(**{**arguments, "kernel_h": 3.0})
    for name in ("kernel_h", "pad_w"):
        for function in (compat.dcnv4_forward, compat.dcnv4_forward_pytorch):
            with pytest.raises(ValueError, match=f"{name} must be an integer >= .; got -1"):
                function(**{**arguments, name: -1})
    with pytest.raises(TypeError, match=r"offset_mask must be a tensor .*; got NoneType"):
        compat.dcnv4_forward(**{**arguments, "offset_mask": None})
    for name, wrong in (("offset_mask", np.zeros((2, 4, 9, 92))), ("kernel_h", "3")):
        with pytest.raises(RuntimeError, match=f"for argument '{name}'"):  # PyTorch's own
            compat.dcnv4_forward(**{**arguments, name: wrong})
    with pytest.raises(
        ValueError, match=r"sampling_loc_attn must be .* G = 3, 3\*L\*K = 24\].* 72\]"
    ):
        compat.flash_deform_attn(**{**attention_inputs(), "K": 4})
    packed = attention_inputs()["sampling_loc_attn"]
    with pytest.raises(ValueError, match=r"sampling_loc_attn must be \[B = 2, Q, .*; got \[1, "):
        compat.flash_deform_attn(**{**attention_inputs(), "sampling_loc_attn": packed[:1]})
    with pytest.raises(ValueError, match="K must be an integer >= 1; got 0"):
        compat.flash_deform_attn(**{**attention_inputs(), "K": 0})
    with pytest.raises(TypeError, match="group must be an integer"):
        compat.compute_offset_mask_channels("4", 3)
    with pytest.raises(ValueError, match="remove_center must be 0 or 1; got 2"):
        compat.compute_offset_mask_channels(4, 3, 2)
