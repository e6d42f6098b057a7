"""The layers: parameters, initial values, layouts, and what they compute, against plain PyTorch."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcnv4
from dcnv4 import DCNv4, DCNv4Conv2d, FlashDeformAttn, functional, ops
from dcnv4.layers import DCNv3


def shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}


def randomised(layer: nn.Module, seed: int = 0) -> nn.Module:
    """The layer in float64 with small random parameters."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


LINEAR = {"weight": (32, 32), "bias": (32,)}
POINTWISE = {
    f"{name}.{key}": shape
    for name in ("value_proj", "output_proj")
    for key, shape in LINEAR.items()
}
OFFSET_MASK = {"offset_mask.weight": (112, 32), "offset_mask.bias": (112,)}
LAYERS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "default": ({}, {**POINTWISE, **OFFSET_MASK}),
    "without_pointwise": ({"without_pointwise": True}, OFFSET_MASK),
    "no_bias": (
        {"output_bias": False},
        {**POINTWISE, **OFFSET_MASK, "output_proj.bias": ()},
    ),
    "depthwise": (
        {"dw_kernel_size": 3},
        {
            **POINTWISE,
            **OFFSET_MASK,
            "offset_mask_dw.weight": (32, 1, 3, 3),
            "offset_mask_dw.bias": (32,),
        },
    ),
    "center_feature_scale": (
        {"center_feature_scale": True},
        {
            **POINTWISE,
            **OFFSET_MASK,
            "center_feature_scale_proj_weight": (4, 32),
            "center_feature_scale_proj_bias": (4,),
        },
    ),
    "remove_center": (
        {"remove_center": True, "group": 2},
        {**POINTWISE, "offset_mask.weight": (48, 32), "offset_mask.bias": (48,)},
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_parameters_have_the_fields_names(case: str) -> None:
    """So that published checkpoints load with strict=True."""
    settings, expected = LAYERS[case]
    expected = {name: shape for name, shape in expected.items() if shape}
    layer = DCNv4(32, **settings)
    assert shapes(layer) == expected
    state = {name: torch.full(shape, 0.5) for name, shape in expected.items()}
    layer.load_state_dict(state, strict=True)
    assert all((parameter == 0.5).all() for parameter in layer.parameters())


def test_attention_parameters_have_the_fields_names() -> None:
    layer = FlashDeformAttn(32, n_levels=3, n_heads=2, n_points=4)
    assert shapes(layer) == {
        **POINTWISE,
        "sampling_offsets.weight": (48, 32),
        "sampling_offsets.bias": (48,),
        "attention_weights.weight": (24, 32),
        "attention_weights.bias": (24,),
    }


def test_public_names() -> None:
    assert dcnv4.dcnv4 is DCNv4
    assert DCNv4().channels == 64


@pytest.mark.parametrize("stride", [1, 2, (2, 3)])
def test_layouts_agree(stride: int | tuple[int, int]) -> None:
    """[B, H*W, C] and [B, H, W, C] come back as they went in; NCHW is DCNv4Conv2d's."""
    layer = randomised(DCNv4(8, stride=stride, group=2, center_feature_scale=True))
    x = random(2, 5, 6, 8)
    rows, columns = layer.output_shape((5, 6))
    full = layer(x)
    flat = layer(x.flatten(1, 2), (5, 6))
    assert full.shape == (2, rows, columns, 8)
    assert torch.equal(full.flatten(1, 2), flat)
    conv2d = randomised(DCNv4Conv2d(8, 8, 3, stride, 1, groups=2, center_feature_scale=True))
    conv2d.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(conv2d(x.permute(0, 3, 1, 2)), full.permute(0, 3, 1, 2))


def test_no_shape_means_a_square_map() -> None:
    layer, x = randomised(DCNv4(8, group=2)), random(2, 16, 8)
    assert torch.equal(layer(x), layer(x, (4, 4)))
    assert not torch.equal(layer(x), layer(x, (2, 8)))


def test_memory_formats() -> None:
    """channels_last passes through, with its value read in place; contiguous stays contiguous."""
    layer = randomised(DCNv4Conv2d(8, 16, padding=1, groups=2))
    seen: list[Tensor] = []
    value_proj = layer.value_proj
    value_proj.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    x = random(2, 8, 5, 6)
    output = layer(x)
    assert output.is_contiguous()
    last = x.contiguous(memory_format=torch.channels_last)
    from_last = layer(last)
    assert from_last.is_contiguous(memory_format=torch.channels_last)
    assert not from_last.is_contiguous()
    assert seen[-1].data_ptr() == last.data_ptr()
    torch.testing.assert_close(from_last, output)


def test_channels_last_makes_no_layout_copy() -> None:
    layer = DCNv4Conv2d(8, 16, padding=1, groups=2)
    x = random(2, 8, 5, 6, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    with torch.profiler.profile() as profile, torch.no_grad():
        layer(x)
    names = [event.key for event in profile.key_averages()]
    assert {"dcnv4::deform_conv_packed", "dcnv4::deform_conv"} & {*names}
    assert "aten::contiguous" not in names


def deformed(layer: DCNv4, x: Tensor, offset_mask: Tensor) -> Tensor:
    """The layer's own operator on its value."""
    return functional.deform_conv(layer.value_proj(x), offset_mask, **conv_settings(layer))


def conv_settings(layer: DCNv4) -> dict[str, Any]:
    return layer.window._asdict()


def test_order_of_operations() -> None:
    """offset_mask reads the depthwise convolution of the input, not of the value."""
    layer = randomised(DCNv4(8, group=2, dw_kernel_size=3))
    x = random(2, 4, 5, 8)
    depthwise = layer.offset_mask_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    expected = layer.output_proj(deformed(layer, x, layer.offset_mask(depthwise)))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("stride", "pad", "rows", "columns"),
    [(2, 1, [0, 2, 4], [0, 2, 4]), ((3, 2), 0, [1], [1, 3]), (1, 0, [1, 2, 3], [1, 2, 3, 4])],
)
def test_offsets_are_predicted_at_the_centres_of_the_windows(
    stride: Any, pad: int, rows: list[int], columns: list[int]
) -> None:
    layer = randomised(DCNv4(8, stride=stride, pad=pad, group=2, center_feature_scale=True))
    x = random(1, 5, 6, 8)
    at = torch.tensor(rows)[:, None], torch.tensor(columns)
    y = deformed(layer, x, layer.offset_mask(x[:, at[0], at[1]]))
    weight, bias = layer.center_feature_scale_proj_weight, layer.center_feature_scale_proj_bias
    scale = torch.sigmoid(y @ weight.T + bias).repeat_interleave(4, dim=-1)
    center = layer.value_proj(x)[:, at[0], at[1]]
    expected = layer.output_proj(y * (1 - scale) + center * scale)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("window", [{}, {"kernel_size": (3, 5), "pad": (1, 2)}, {"stride": 2}])
def test_average_is_a_box_filter(window: dict[str, Any]) -> None:
    layer = DCNv4(8, group=2, without_pointwise=True, **window).double()
    x = random(2, 7, 8, 8)
    kernel, stride, padding = layer.window.kernel_size, layer.window.stride, layer.window.padding
    expected = F.avg_pool2d(x.permute(0, 3, 1, 2), kernel, stride, padding)
    torch.testing.assert_close(layer(x).permute(0, 3, 1, 2), expected)
    inside = layer(torch.ones(1, 7, 8, 8, dtype=torch.float64))[:, 2:-2, 2:-2]
    torch.testing.assert_close(inside, torch.ones_like(inside))


@pytest.mark.parametrize("init", ["average", "zero"])
def test_softmax_starts_as_a_box_filter(init: str) -> None:
    x = random(2, 7, 8, 8)
    layer = DCNv4(8, group=2, without_pointwise=True, softmax=True, init=init).double()
    expected = F.avg_pool2d(x.permute(0, 3, 1, 2), 3, 1, 1)
    torch.testing.assert_close(layer(x).permute(0, 3, 1, 2), expected)
    assert "softmax=True" in repr(layer)


def test_softmax_normalises_the_weights_of_a_group() -> None:
    layer = randomised(DCNv4(8, group=2, softmax=True))
    x = random(2, 4, 5, 8)
    fields = layer.offset_mask(x)[..., :54].unflatten(-1, (2, 27))
    normalised = torch.cat((fields[..., :18], fields[..., 18:].softmax(-1)), -1).flatten(-2)
    settings = {**conv_settings(layer), "softmax": False}
    y = functional.deform_conv(layer.value_proj(x), normalised, **settings)
    torch.testing.assert_close(layer(x), layer.output_proj(y))
    conv2d = DCNv4Conv2d(8, 8, padding=1, groups=2, softmax=True).double()
    conv2d.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(conv2d(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), layer(x))


def test_conv2d_without_pointwise() -> None:
    layer = DCNv4Conv2d(8, 8, padding=1, groups=2, without_pointwise=True)
    assert set(layer.state_dict()) == {"offset_mask.weight", "offset_mask.bias"}
    x = random(2, 8, 4, 5, dtype=torch.float32)
    torch.testing.assert_close(layer(x), F.avg_pool2d(x, 3, 1, 1))
    with pytest.raises(ValueError, match=r"out_channels must be in_channels = 8 with .*; got 4"):
        DCNv4Conv2d(8, 4, without_pointwise=True)


@pytest.mark.parametrize("remove_center", [False, True])
def test_average_weights_add_up_to_one(remove_center: bool) -> None:
    """Padding channels of offset_mask stay 0."""
    layer = DCNv4(16, group=2, kernel_size=5, pad=2, remove_center=remove_center)
    points = 25 - remove_center
    bias = layer.offset_mask.bias.detach()
    fields = bias[: 6 * points].view(2, 3 * points)
    assert (fields[:, : 2 * points] == 0).all()
    torch.testing.assert_close(fields[:, 2 * points :].sum(1), torch.ones(2))
    assert (bias[6 * points :] == 0).all()
    assert (layer.offset_mask.weight == 0).all()


def test_zero_outputs_the_projections_bias() -> None:
    layer = DCNv4(8, group=2, init="zero")
    nn.init.normal_(layer.output_proj.bias)
    output = layer(random(2, 9, 8, dtype=torch.float32))
    assert torch.equal(output, layer.output_proj.bias.expand_as(output))


@pytest.mark.parametrize(
    "arguments",
    [
        (3, 10, 3),
        (3, 10, 3, 2),
        (3, 10, 3, 2, 1),
        (3, 10, (3, 5), 1, (0, 2)),
        (3, 10, 2, 2, 0, 2),
        (3, 10, 5, 1, "same"),
        (3, 10, (1, 5), 1, "same", 2),
        (3, 10, 3, 2, "valid"),
        (3, 10, 3, 1, 1, 1, 1, False, "zeros", "cpu", torch.float64),
    ],
    ids=str,
)
def test_conv2d_is_a_drop_in_for_conv2d(arguments: tuple[Any, ...]) -> None:
    """The same output for the same arguments, whatever the channels, batched or not."""
    ours, theirs = DCNv4Conv2d(*arguments), nn.Conv2d(*arguments)
    dtype = theirs.weight.dtype
    for shape in ((2, 3, 9, 11), (3, 9, 11)):
        x = random(*shape, dtype=dtype)
        assert ours(x).shape == theirs(x).shape
        assert ours(x).dtype == dtype
    single = random(3, 9, 11, dtype=dtype)
    torch.testing.assert_close(ours(single), ours(single[None])[0])
    assert (ours.output_proj.bias is None) == (theirs.bias is None)


def test_conv2d_has_the_defaults_of_conv2d() -> None:
    ours, theirs = (inspect.signature(c).parameters for c in (DCNv4Conv2d, nn.Conv2d))
    assert list(ours)[: len(theirs)] == list(theirs)
    # A kernel of 3 x 3 unless another is given, and `groups` means another thing.
    for name in theirs.keys() - {"kernel_size", "groups"}:
        assert ours[name].default == theirs[name].default, name


def test_conv2d_has_more() -> None:
    x = torch.randn(2, 3, 9, 11)
    assert DCNv4Conv2d(3, 10, stride=2, padding="same")(x).shape == (2, 10, 5, 6)
    assert DCNv4Conv2d(64, 48).window.groups == 3
    assert DCNv4Conv2d(3, 7).window.groups == 1


def test_empty_batches() -> None:
    assert DCNv4(8, group=2, center_feature_scale=True)(torch.ones(0, 9, 8)).shape == (0, 9, 8)
    assert DCNv4Conv2d(3, 8, stride=2, padding=1)(torch.ones(0, 3, 6, 5)).shape == (0, 8, 3, 3)
    layer = FlashDeformAttn(8, 1, 2)
    nothing = layer(torch.ones(2, 0, 8), torch.ones(2, 0, 1, 2), torch.ones(2, 4, 8), ((2, 2),))
    assert nothing.shape == (2, 0, 8)


SHAPES = ((4, 5), (2, 3))
LENGTH = sum(h * w for h, w in SHAPES)


def attention_by_grid_sample(
    layer: FlashDeformAttn, query: Tensor, reference: Tensor, flat: Tensor, mask: Tensor | None
) -> Tensor:
    """Deformable DETR's module, written with grid_sample."""
    batch, queries, _ = query.shape
    heads, points = layer.n_heads, layer.n_points
    reference = reference.expand(batch, queries, len(SHAPES), -1)
    value = layer.value_proj(flat)
    width = value.shape[-1]
    if mask is not None:
        value = value * (~mask)[..., None]
    offsets = layer.sampling_offsets(query).view(batch, queries, heads, len(SHAPES), points, 2)
    logits = layer.attention_weights(query).view(batch, queries, heads, -1)
    weights = logits.softmax(-1).view(batch, queries, heads, len(SHAPES), points)
    output, start = torch.zeros(batch, width, queries, dtype=query.dtype), 0
    for level, (h, w) in enumerate(SHAPES):
        place = reference[:, :, None, level, None]
        if reference.shape[-1] == 2:
            locations = place + offsets[:, :, :, level] / torch.tensor([w, h])
        else:
            unit = torch.tensor([w, h]) if layer.use_4D_normalizer else points
            locations = place[..., :2] + offsets[:, :, :, level] / unit * place[..., 2:] * 0.5
        image = value[:, start : start + h * w].view(batch, h, w, heads, -1)
        image = image.permute(0, 3, 4, 1, 2).flatten(0, 1)
        grid = 2 * locations.transpose(1, 2).flatten(0, 1) - 1
        sampled = F.grid_sample(image, grid, align_corners=False)
        weight = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
        output = output + (sampled * weight).sum(-1).view(batch, width, queries)
        start += h * w
    return layer.output_proj(output.transpose(1, 2))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_against_grid_sample(size: int, masked: bool) -> None:
    layer = randomised(FlashDeformAttn(8, 2, 2, 3))
    query, flat = random(2, 4, 8), random(2, LENGTH, 8, seed=1)
    reference = random(2, 4, 2, size, seed=2).sigmoid()
    mask = random(2, LENGTH, seed=3) > 0.5 if masked else None
    starts = torch.tensor([0, 20])
    got = layer(query, reference, flat, SHAPES, starts, mask)
    torch.testing.assert_close(got, attention_by_grid_sample(layer, query, reference, flat, mask))
    assert torch.equal(got, layer(query, reference, flat, torch.tensor(SHAPES), starts, mask))
    assert torch.equal(got, layer(query, reference, flat, [list(s) for s in SHAPES], None, mask))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "settings",
    [{"ratio": 0.5}, {"ratio": 1.75}, {"use_4D_normalizer": True}],
    ids=lambda settings: str(settings),
)
def test_variants_of_attention_against_grid_sample(settings: dict[str, Any], size: int) -> None:
    layer = randomised(FlashDeformAttn(8, 2, 2, 3, **settings))
    assert layer.value_proj.out_features == 8 * settings.get("ratio", 1)
    query, flat = random(2, 4, 8), random(2, LENGTH, 8, seed=1)
    reference = random(2, 4, 2, size, seed=2).sigmoid()
    got = layer(query, reference, flat, SHAPES)
    torch.testing.assert_close(got, attention_by_grid_sample(layer, query, reference, flat, None))
    for word in settings:
        assert word in repr(layer)


@pytest.mark.parametrize("use_4d_normalizer", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 4, 1, 2), (2, 4, 1, 4), (2, 1, 2, 2), (1, 1, 1, 4), (1, 4, 2, 2)], ids=str
)
def test_reference_points_broadcast(shape: tuple[int, ...], use_4d_normalizer: bool) -> None:
    layer = randomised(FlashDeformAttn(8, 2, 2, 3, use_4D_normalizer=use_4d_normalizer))
    query, flat = random(2, 4, 8), random(2, LENGTH, 8, seed=1)
    reference = random(*shape, seed=2).sigmoid().requires_grad_()
    output = layer(query, reference, flat, SHAPES)
    expected = attention_by_grid_sample(layer, query, reference, flat, None)
    torch.testing.assert_close(output, expected)
    got, right = (torch.autograd.grad(y.square().sum(), reference)[0] for y in (output, expected))
    torch.testing.assert_close(got, right)
    locations, weights = layer.sampling_points(query, reference, SHAPES)
    assert locations.shape == (2, 4, 2, 2, 3, 2)
    assert weights.shape == (2, 4, 2, 2, 3)


def test_attention_starts_with_the_fields_rays() -> None:
    """Head h looks along 2πh/n_heads, its points at 1, 2, … pixels in the larger coordinate."""
    layer = FlashDeformAttn(16, n_levels=2, n_heads=8, n_points=3)
    bias = layer.sampling_offsets.bias.detach().view(8, 2, 3, 2)
    for head in range(8):
        angle = 2 * math.pi * head / 8
        ray = torch.tensor([math.cos(angle), math.sin(angle)])
        ray = ray / ray.abs().max()
        for point in range(3):
            expected = (ray * (point + 1)).expand(2, 2)
            torch.testing.assert_close(bias[head, :, point], expected, rtol=1e-5, atol=1e-5)
    assert (layer.attention_weights.weight == 0).all()
    assert (layer.sampling_offsets.weight == 0).all()


def test_locations_are_never_rounded_to_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shift far smaller than bfloat16 resolves still moves the sample."""
    layer = FlashDeformAttn(8, 1, 1, 1)
    with torch.no_grad():
        layer.sampling_offsets.bias.zero_()
        layer.value_proj.weight.copy_(torch.eye(8))
        layer.output_proj.weight.copy_(torch.eye(8))
    ramp = (torch.arange(128.0) / 128)[None, :, None].expand(1, 128, 8)
    places = torch.tensor([0.7505, 0.7515]).view(1, 2, 1, 1)
    reference = torch.cat((places, torch.full_like(places, 0.5)), -1)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(torch.zeros(1, 2, 8), reference, ramp, ((1, 128),)).float()
    wanted = reference[0, :, 0, 0] - 0.5 / 128
    assert (output[0, :, 0] - wanted).abs().max() <= torch.finfo(torch.bfloat16).eps
    captured: list[torch.dtype] = []
    original = ops.DeformAttnFromOffsets.forward

    def spy(*call: Any) -> Tensor:
        captured.append(call[3].dtype)
        return original(*call)

    monkeypatch.setattr(ops.MS_DEFORM_ATTN_FROM_OFFSETS, "forward", spy)
    half = layer.bfloat16()
    half(torch.zeros(1, 2, 8).bfloat16(), reference, ramp.bfloat16(), ((1, 128),))
    assert captured == [torch.float32]


FORMER_NAMES = {
    b"dcnv4.layers.conv": b"dcnv4.modules",
    b"dcnv4.layers.attention": b"dcnv4.modules",
    b"dcnv4.layers.dcnv3": b"dcnv4.checkpoints",
}


@pytest.mark.parametrize(
    "make",
    [
        lambda: DCNv4(8, group=2),
        lambda: DCNv4Conv2d(8, 8, groups=2),
        lambda: FlashDeformAttn(8, 1, 2, 2),
        lambda: DCNv3(8, group=2),
        lambda: DCNv3(8, group=2, norm_layer="BN"),
    ],
    ids=["DCNv4", "DCNv4Conv2d", "FlashDeformAttn", "DCNv3", "DCNv3-BN"],
)
def test_modules_saved_whole_under_former_names(make: Callable[[], nn.Module]) -> None:
    """They say by name where their classes are; this protocol of pickle says it in plain words."""
    layer = make()
    saved = pickle.dumps(layer, protocol=0)
    former = saved
    for now, then in FORMER_NAMES.items():
        former = former.replace(now, then)
    assert former != saved
    assert b"dcnv4.layers" not in former
    loaded = pickle.loads(former)
    assert type(loaded) is type(layer)
    assert all(
        torch.equal(*pair) for pair in zip(loaded.parameters(), layer.parameters(), strict=True)
    )


LAYER_FACTORIES = {
    "DCNv4": lambda: DCNv4(8, group=2, stride=2, dw_kernel_size=3, center_feature_scale=True),
    "DCNv4Conv2d": lambda: DCNv4Conv2d(8, 12, padding=1, groups=3, backend="reference"),
    "FlashDeformAttn": lambda: FlashDeformAttn(8, 1, 2, 2),
}


def apply(layer: nn.Module) -> Tensor:
    if isinstance(layer, FlashDeformAttn):
        arguments: tuple[Any, ...] = (
            random(1, 4, 8),
            random(1, 4, 1, 2).sigmoid(),
            random(1, 12, 8),
            ((3, 4),),
        )
    else:
        arguments = (random(1, 3, 4, 8) if isinstance(layer, DCNv4) else random(1, 8, 3, 4),)
    output: Tensor = layer(*arguments)
    return output


@pytest.mark.parametrize("name", LAYER_FACTORIES)
def test_copies_and_pickles(name: str) -> None:
    layer = randomised(LAYER_FACTORIES[name]())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(apply(other), apply(layer))
        assert repr(other) == repr(layer)
    fresh = randomised(LAYER_FACTORIES[name](), seed=1)
    assert not torch.equal(apply(fresh), apply(layer))
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(apply(fresh), apply(layer))


def test_repr_says_what_was_changed() -> None:
    assert "64, kernel_size=(3, 3), groups=4" in repr(DCNv4())
    for word in ("stride=(2, 2)", "center_feature_scale=True"):
        assert word in repr(LAYER_FACTORIES["DCNv4"]())
        assert word not in repr(DCNv4())
    text = repr(LAYER_FACTORIES["DCNv4Conv2d"]())
    assert "8, 12, " in text
    assert "groups=3" in text
    assert "backend='reference'" in text
    assert "n_levels=1, n_heads=2, n_points=2" in repr(LAYER_FACTORIES["FlashDeformAttn"]())


@pytest.mark.parametrize("name", LAYER_FACTORIES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    layer = randomised(LAYER_FACTORIES[name]())
    apply(layer).square().sum().backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.bfloat16),
        ("cpu", torch.float16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
    ],
)
def test_ten_layers_train_under_autocast(device: str, dtype: torch.dtype) -> None:
    """The input's gradient is finite and does not vanish."""
    if device == "cpu" and dtype == torch.float16 and not hasattr(torch, "get_autocast_dtype"):
        pytest.skip(f"torch {torch.__version__} has no float16 autocast on the CPU")
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(DCNv4Conv2d(16, 16, padding=1, groups=2), nn.BatchNorm2d(16), nn.ReLU())
        for _ in range(10)
    ]
    network = nn.Sequential(*blocks).to(device)
    x = torch.randn(4, 16, 8, 8, device=device, requires_grad=True)
    with torch.autocast(device, dtype):
        output = network(x)
    assert output.dtype == dtype
    output.float().square().mean().backward()
    grads = [x.grad, *(p.grad for p in network.parameters())]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)
    assert x.grad is not None
    scale = x.grad.abs().mean() * x.numel()
    assert scale > 1e-2, scale
    offsets = [block[0].offset_mask.weight.grad for block in blocks]
    assert all(grad is not None and grad.abs().max() > 0 for grad in offsets)


def test_conv2d_has_the_attributes_of_a_convolution() -> None:
    ours = DCNv4Conv2d(8, 16, (3, 5), stride=2, padding=(1, 4), dilation=2, groups=4)
    theirs = torch.nn.Conv2d(8, 16, (3, 5), stride=2, padding=(1, 4), dilation=2, groups=4)
    for name in (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
        *("transposed", "output_padding"),
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    "layer", [DCNv4(32, group=2), DCNv4Conv2d(32, 32, padding=1, groups=2)], ids=str
)
def test_autocast_casts_the_input_once(layer: torch.nn.Module) -> None:
    x = torch.randn(1, 32, 6, 6) if isinstance(layer, DCNv4Conv2d) else torch.randn(1, 36, 32)
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.profiler.profile(record_shapes=True) as profile,
    ):
        layer(x)
    casts = [e for e in profile.events() if e.name == "aten::_to_copy"]
    assert sum(math.prod(e.input_shapes[0]) == x.numel() for e in casts) == 1


@pytest.mark.parametrize("name", ["convert", "functional", "visualize", "DCNv4Conv2d"])
def test_the_class_says_what_the_package_has(name: str) -> None:
    """`from dcnv4 import dcnv4` hides the package behind the class of the same name."""
    with pytest.raises(AttributeError, match=f"import dcnv4`, .* to use dcnv4.{name}$"):
        getattr(dcnv4.dcnv4, name)
    assert not hasattr(DCNv4, name)
    layer = DCNv4(8)
    assert not hasattr(layer, name)
    layer.add_module(name, nn.Identity())
    assert getattr(pickle.loads(pickle.dumps(layer)), name) is not None
    assert type(getattr(copy.deepcopy(layer), name)) is nn.Identity
