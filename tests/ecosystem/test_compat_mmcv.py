"""mmcv's functions and layers, against a composition of grid_sample; mmcv itself is elsewhere."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcnv4 import FlashDeformAttn, checkpoints
from dcnv4.compat import mmcv
from support import grid_sample

WINDOW: dict[str, Any] = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
SETTINGS: dict[str, Any] = {**WINDOW, "groups": 2, "deform_groups": 4}
SHAPES = [(5, 7), (3, 4)]
LAYERS = ["DeformConv2d", "DeformConv2dPack", "ModulatedDeformConv2d", "ModulatedDeformConv2dPack"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def inputs() -> dict[str, Tensor]:
    """Leaves of a 3 x 2 kernel from 8 to 6 channels in SETTINGS."""
    return {
        "input": random(2, 8, 7, 9),
        "offset": random(2, 48, 4, 11),
        "weight": random(6, 4, 3, 2),
        "bias": random(6),
        "mask": random(2, 24, 4, 11),
    }


def test_deform_conv2d() -> None:
    leaves = inputs()
    del leaves["bias"], leaves["mask"]
    found = mmcv.deform_conv2d(*leaves.values(), (2, 1), (1, 2), (1, 2), 2, 4, False, 32)
    grid_sample.check(found, grid_sample.deform_conv2d(**leaves, **WINDOW), leaves)


@pytest.mark.parametrize("biased", [True, False])
def test_modulated_deform_conv2d(biased: bool) -> None:
    leaves = inputs()
    if not biased:
        del leaves["bias"]
    order = [leaves.get(name) for name in ("input", "offset", "mask", "weight", "bias")]
    found = mmcv.modulated_deform_conv2d(*order, (2, 1), (1, 2), (1, 2), 2, 4)
    grid_sample.check(found, grid_sample.deform_conv2d(**leaves, **WINDOW), leaves)


def test_the_offsets_dtype_is_taken() -> None:
    """As mmcv has it for half-precision offsets beside a float32 weight."""
    leaves = {name: leaf.detach().float() for name, leaf in inputs().items()}
    leaves["offset"] = leaves["offset"].bfloat16()
    order = [leaves[name] for name in ("input", "offset", "mask", "weight", "bias")]
    found = mmcv.modulated_deform_conv2d(*order, (2, 1), (1, 2), (1, 2), 2, 4)
    assert found.dtype == torch.bfloat16
    wide = {name: leaf.bfloat16().double() for name, leaf in leaves.items()}
    expected = grid_sample.deform_conv2d(**wide, **WINDOW)
    atol = 2**-7 * float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


def test_function_refusals() -> None:
    leaves = inputs()
    order = {name: leaves[name] for name in ("input", "offset", "mask", "weight", "bias")}

    def call(**changes: Any) -> Tensor:
        return mmcv.modulated_deform_conv2d(**{**order, **SETTINGS, **changes})

    assert call().shape == (2, 6, 4, 11)
    for name in order:
        with pytest.raises(TypeError, match=f"^{name} must be a tensor"):
            call(**{name: [1.0]})
    with pytest.raises(TypeError, match="mask must be a tensor"):
        call(mask=None)
    with pytest.raises(ValueError, match=r"weight must be .* C = 8 and groups = 4; got \[6, 4"):
        call(groups=4)
    with pytest.raises(ValueError, match=r"deform_groups\*kh\*kw = 24, Ho, Wo\]; got \[2, 48"):
        call(deform_groups=2)
    for name in ("groups", "deform_groups"):
        with pytest.raises(TypeError, match=f"^{name} must be an integer >= 1; got '2'"):
            call(**{name: "2"})
    with pytest.raises(ValueError, match="bias must be False, as mmcv's deform_conv2d has none"):
        mmcv.deform_conv2d(order["input"], order["offset"], order["weight"], bias=True)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    """What a layer computes, with every parameter set, and the gradients of all of them."""
    layer = getattr(mmcv, name)(8, 6, (3, 2), **SETTINGS).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    leaves = inputs()
    x, offset, mask = (leaves[n] for n in ("input", "offset", "mask"))
    given: dict[str, Tensor] = {"x": x}
    if name.endswith("Pack"):
        predicted = layer.conv_offset(x)
        offset = predicted[:, :48]
        mask = predicted[:, 48:].sigmoid()
    else:
        given["offset"] = offset
    if not name.startswith("Modulated"):
        mask = None
    elif not name.endswith("Pack"):
        given["mask"] = mask
    expected = grid_sample.deform_conv2d(x, offset, layer.weight, layer.bias, mask=mask, **WINDOW)
    grid_sample.check(layer(**given), expected, {**given, **dict(layer.named_parameters())})


@pytest.mark.parametrize("name", LAYERS)
def test_layers_copy_pickle_and_begin_anew(name: str) -> None:
    layer = getattr(mmcv, name)(4, 6, 3, padding=1)
    if name.endswith("Pack"):
        assert not any(bool(p.any()) for p in layer.conv_offset.parameters())
    before = {n: p.clone() for n, p in layer.state_dict().items()}
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        for n, p in other.state_dict().items():
            torch.testing.assert_close(p, before[n], rtol=0, atol=0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    states = []
    for other in (layer, getattr(mmcv, name)(4, 6, 3, padding=1)):
        torch.manual_seed(0)
        other.reset_parameters()
        states.append(other.state_dict())
    for n in before:
        torch.testing.assert_close(states[0][n], states[1][n], rtol=0, atol=0)
    bound = float(before["weight"].abs().max())
    assert 0.8 * bound < float(states[0]["weight"].abs().max()) < 1.25 * bound


@pytest.mark.parametrize("name", [name for name in LAYERS if name.endswith("Pack")])
def test_weights_of_mmcvs_first_version(name: str) -> None:
    """There `conv_offset` lay beside the layer."""
    model = nn.ModuleDict({"conv2": getattr(mmcv, name)(4, 6, 3)})
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    state = {n.replace(".conv_offset", "_offset"): p for n, p in model.state_dict().items()}
    assert "conv2_offset.weight" in state
    again = nn.ModuleDict({"conv2": getattr(mmcv, name)(4, 6, 3)})
    checkpoints.load(again, state)
    for n, p in again.state_dict().items():
        torch.testing.assert_close(p, model.state_dict()[n], rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_refusals(name: str) -> None:
    layer = getattr(mmcv, name)
    with pytest.warns(DeprecationWarning, match="deformable_groups is now deform_groups"):
        assert layer(4, 6, 3, deformable_groups=2).deform_groups == 2
    for wrong, message in (
        ({"groups": 3}, "in_channels must be a multiple of groups = 3; got 4"),
        ({"groups": 4}, "out_channels must be a multiple of groups = 4; got 6"),
        ({"deform_groups": 3}, "deform_groups must divide in_channels = 4; got 3"),
        ({"padding": -1}, "padding must be an integer >= 0; got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(4, 6, 3, **wrong)
    with pytest.raises(TypeError, match="bias must be True or False; got 'False'"):
        layer(4, 6, 3, bias="False")
    with pytest.raises(TypeError, match="out_channels must be an integer >= 1; got '6'"):
        layer(4, "6", 3)
    if name.startswith("Modulated"):
        assert layer(4, 6, 3, bias="auto").bias is not None
        assert layer(4, 6, 3, bias=False).bias is None
    else:
        with pytest.raises(ValueError, match="bias must be False, as mmcv's DeformConv2d has none"):
            layer(4, 6, 3, bias=True)


def test_a_single_image_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"input must be \[B, C, H, W\]; got \[4, 7, 9\]"):
        mmcv.ModulatedDeformConv2dPack(4, 6, 3, padding=1)(torch.randn(4, 7, 9))


def attention(**changes: Any) -> mmcv.MultiScaleDeformableAttention:
    sizes = {"embed_dims": 12, "num_heads": 3, "num_levels": 2, "num_points": 5, "dropout": 0.0}
    layer = mmcv.MultiScaleDeformableAttention(**{**sizes, **changes}).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_attention(batch_first: bool, ratio: float) -> None:
    """Against the same sums written out: positions, softmax, grid_sample, residual."""
    layer = attention(batch_first=batch_first, value_proj_ratio=ratio)
    assert layer.value_proj.out_features == layer.output_proj.in_features == 12 * ratio
    leaves = {
        "query": random(2, 6, 12),
        "value": random(2, 47, 12),
        "identity": random(2, 6, 12),
        "query_pos": random(2, 6, 12),
        "reference_points": torch.rand(2, 6, 2, 2, dtype=torch.float64, requires_grad=True),
    }
    mask = torch.rand(2, 47) < 0.3
    given = dict(leaves)
    if not batch_first:
        for name in ("query", "value", "identity", "query_pos"):
            given[name] = leaves[name].transpose(0, 1)
    shapes = torch.tensor(SHAPES)
    found = layer(
        key=None,
        key_padding_mask=mask,
        spatial_shapes=shapes,
        level_start_index=torch.tensor([0, 35]),
        reg_branches=None,
        **given,
    )
    query = leaves["query"] + leaves["query_pos"]
    offsets = layer.sampling_offsets(query).view(2, 6, 3, 2, 5, 2)
    locations = leaves["reference_points"][:, :, None, :, None] + offsets / shapes.flip(-1)[:, None]
    weights = layer.attention_weights(query).view(2, 6, 3, 10).softmax(-1).view(2, 6, 3, 2, 5)
    value = layer.value_proj(leaves["value"]).masked_fill(mask[..., None], 0)
    heads = value.view(2, 47, 3, -1)
    sums = grid_sample.ms_deform_attn(SHAPES, heads, locations, weights)
    expected = layer.output_proj(sums) + leaves["identity"]
    expected = expected if batch_first else expected.transpose(0, 1)
    parameters = dict(layer.named_parameters())
    grid_sample.check(found, expected, {**leaves, **parameters})


def test_attention_of_the_query_itself_drops_out() -> None:
    layer = attention(dropout=0.5)
    query, points = random(47, 2, 12), torch.rand(2, 47, 2, 2, dtype=torch.float64)
    found = layer(query, reference_points=points, spatial_shapes=SHAPES)
    kept = layer.eval()(query, reference_points=points, spatial_shapes=SHAPES) - query
    dropped = found == query
    assert 0.4 < float(dropped.double().mean()) < 0.6
    torch.testing.assert_close((found - query)[~dropped], 2 * kept[~dropped])
    with pytest.warns(DeprecationWarning, match="residual is now identity"):
        other = layer(query, reference_points=points, spatial_shapes=SHAPES, residual=0 * query)
    torch.testing.assert_close(other, kept)


def test_attention_begins_as_deformable_detrs() -> None:
    torch.manual_seed(1)
    expected = FlashDeformAttn(12, 2, 3, 5).state_dict()
    torch.manual_seed(1)
    layer = mmcv.MultiScaleDeformableAttention(12, 3, 2, 5)
    assert layer.init_cfg is layer.norm_cfg is None
    assert layer.dropout.p == 0.1
    assert not layer.batch_first
    for name, found in layer.state_dict().items():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer.init_weights()
    for name, found in layer.state_dict().items():
        if "sampling" in name or "bias" in name:
            torch.testing.assert_close(found, expected[name], rtol=0, atol=0)
    assert type(pickle.loads(pickle.dumps(copy.deepcopy(layer)))) is type(layer)


def test_attention_refusals() -> None:
    build = mmcv.MultiScaleDeformableAttention
    for wrong, message in (
        ({"num_heads": 7}, "num_heads must divide embed_dims = 256; got 7"),
        ({"num_points": 0}, "num_points must be an integer >= 1; got 0"),
        ({"value_proj_ratio": 0.1}, "value_proj_ratio must .* num_heads = 8 .* leaves 25"),
        ({"dropout": 1.5}, "dropout must be from 0 to 1; got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**wrong)
    for name, wrong in (("embed_dims", 256.0), ("dropout", "0"), ("batch_first", 1)):
        with pytest.raises(TypeError, match=f"^{name} must be"):
            build(**{name: wrong})
    layer = attention()
    query, points = random(6, 2, 12), torch.rand(2, 6, 2, 2, dtype=torch.float64)
    needed = {"reference_points": points, "spatial_shapes": SHAPES}
    for name in needed:
        with pytest.raises(TypeError, match=f"{name} must be given; got None"):
            layer(query, **{**needed, name: None})
    for name in ("query", "value", "identity", "query_pos"):
        with pytest.raises(TypeError, match=f"{name} must be a tensor"):
            layer(**{"query": query, **needed, name: [1.0]})
