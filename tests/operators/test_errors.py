"""Malformed calls: each a ValueError or a TypeError that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dcnv4
from dcnv4 import DCNv4, DCNv4Conv2d, FlashDeformAttn, backends
from dcnv4.checkpoints import DCNv3
from dcnv4.functional import (
    deform_conv,
    deform_conv_packed,
    ms_deform_attn,
    ms_deform_attn_from_offsets,
)

CPU = torch.device("cpu")
VALUE, FIELDS = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5, 56)
PACKED = torch.cat((VALUE, FIELDS), 3)
LEVELS = torch.zeros(2, 10, 2, 4)
LOCATIONS, WEIGHTS = torch.zeros(2, 3, 2, 2, 4, 2), torch.zeros(2, 3, 2, 2, 4)
SHAPES = ((2, 3), (4, 1))
POINTS = torch.zeros(2, 3, 2, 2)
ARRAY = np.zeros(3, np.float32)
MODEL = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3))
FLAGS = {
    DCNv4: (
        *("center_feature_scale", "remove_center", "output_bias", "without_pointwise", "softmax"),
    ),
    DCNv3: ("center_feature_scale", "remove_center", "use_dcn_v4_op"),
    FlashDeformAttn: ("use_4D_normalizer",),
    partial(DCNv4Conv2d, 8): (
        *("bias", "center_feature_scale", "remove_center", "without_pointwise", "softmax"),
    ),
}


def conv(value: Any = VALUE, offset_mask: Any = FIELDS, **settings: Any) -> Tensor:
    return deform_conv(value, offset_mask, **{"groups": 2, **settings})


def packed(tensor: Any = PACKED, channels: Any = 8, **settings: Any) -> Tensor:
    return deform_conv_packed(tensor, channels, **{"groups": 2, **settings})


def attn(
    value: Any = LEVELS,
    shapes: Any = SHAPES,
    locations: Any = LOCATIONS,
    weights: Any = WEIGHTS,
    **settings: Any,
) -> Tensor:
    return ms_deform_attn(value, shapes, locations, weights, **settings)


def refer(points: Any = POINTS, offsets: Any = LOCATIONS, **settings: Any) -> Tensor:
    return ms_deform_attn_from_offsets(LEVELS, SHAPES, points, offsets, WEIGHTS, **settings)


def attend(**changed: Any) -> Tensor:
    arguments = {
        "query": torch.zeros(2, 3, 8),
        "reference_points": torch.zeros(2, 3, 2, 2),
        "input_flatten": torch.zeros(2, 10, 8),
        "input_spatial_shapes": SHAPES,
        **changed,
    }
    return FlashDeformAttn(8, 2, 2, 4)(**arguments)


MALFORMED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    # deform_conv
    "value_list": (TypeError, "value", lambda: conv([[1.0]])),
    "value_none": (TypeError, "value", lambda: conv(None)),
    "value_integer": (TypeError, "value", lambda: conv(VALUE.long())),
    "value_complex": (TypeError, "value", lambda: conv(VALUE.cfloat())),
    "value_3d": (ValueError, "value", lambda: conv(VALUE[0])),
    "value_channels": (ValueError, "groups", lambda: conv(VALUE[..., :7])),
    "value_no_channels": (ValueError, "value", lambda: conv(VALUE[..., :0])),
    "offset_mask_number": (TypeError, "offset_mask", lambda: conv(VALUE, 1.0)),
    "offset_mask_bool": (TypeError, "offset_mask", lambda: conv(VALUE, FIELDS.bool())),
    "offset_mask_3d": (ValueError, "offset_mask", lambda: conv(VALUE, FIELDS.flatten(1, 2))),
    "offset_mask_batch": (ValueError, "offset_mask", lambda: conv(VALUE, FIELDS[:1])),
    "offset_mask_size": (ValueError, "offset_mask", lambda: conv(VALUE, FIELDS[:, :3])),
    "offset_mask_fields": (ValueError, "offset_mask", lambda: conv(VALUE, FIELDS[..., :53])),
    "offset_mask_meta": (ValueError, "offset_mask", lambda: conv(VALUE, FIELDS.to("meta"))),
    "kernel_zero": (ValueError, "kernel_size", lambda: conv(kernel_size=0)),
    "kernel_float": (TypeError, "kernel_size", lambda: conv(kernel_size=3.0)),
    "kernel_bool": (TypeError, "kernel_size", lambda: conv(kernel_size=True)),
    "kernel_triple": (ValueError, "kernel_size", lambda: conv(kernel_size=(3, 3, 3))),
    "kernel_word": (TypeError, "kernel_size", lambda: conv(kernel_size="33")),
    "kernel_too_large": (ValueError, "kernel_size", lambda: conv(kernel_size=9)),
    "stride_zero": (ValueError, "stride", lambda: conv(stride=(1, 0))),
    "stride_none": (TypeError, "stride", lambda: conv(stride=None)),
    "padding_negative": (ValueError, "padding", lambda: conv(padding=-1)),
    "padding_same": (TypeError, "padding", lambda: conv(padding="same")),
    "dilation_zero": (ValueError, "dilation", lambda: conv(dilation=0)),
    "groups_zero": (ValueError, "groups", lambda: conv(groups=0)),
    "groups_pair": (TypeError, "groups", lambda: conv(groups=(2, 2))),
    "scale_nan": (ValueError, "offset_scale", lambda: conv(offset_scale=float("nan"))),
    "scale_infinite": (ValueError, "offset_scale", lambda: conv(offset_scale=float("inf"))),
    "scale_word": (TypeError, "offset_scale", lambda: conv(offset_scale="1")),
    "remove_center_number": (TypeError, "remove_center", lambda: conv(remove_center=1)),
    "remove_only_point": (
        ValueError,
        "remove_center",
        lambda: conv(kernel_size=1, padding=0, remove_center=True),
    ),
    "softmax_none": (TypeError, "softmax", lambda: conv(softmax=None)),
    "backend_unknown": (ValueError, "backend", lambda: conv(backend="opencl")),
    "packed_none": (TypeError, "packed", lambda: packed(None)),
    "packed_integer": (TypeError, "packed", lambda: packed(PACKED.long())),
    "packed_3d": (ValueError, "packed", lambda: packed(PACKED[0])),
    "packed_width": (ValueError, "packed", lambda: packed(PACKED[..., :61])),
    "packed_channels": (ValueError, "groups", lambda: packed(channels=7)),
    "packed_no_channels": (ValueError, "channels", lambda: packed(channels=0)),
    "packed_channels_float": (TypeError, "channels", lambda: packed(channels=8.0)),
    "packed_stride": (ValueError, "stride", lambda: packed(stride=2)),
    "packed_padding": (ValueError, "padding", lambda: packed(padding=0)),
    "packed_even": (ValueError, "kernel_size", lambda: packed(kernel_size=2)),
    "im2col_step": (TypeError, "im2col_step", lambda: conv(im2col_step=64)),
    # ms_deform_attn
    "levels_list": (TypeError, "value", lambda: attn([])),
    "levels_3d": (ValueError, "value", lambda: attn(LEVELS.flatten(2))),
    "levels_integer": (TypeError, "value", lambda: attn(LEVELS.int())),
    "levels_no_depth": (ValueError, "value", lambda: attn(LEVELS[..., :0])),
    "shapes_number": (TypeError, "spatial_shapes", lambda: attn(shapes=10)),
    "shapes_none": (TypeError, "spatial_shapes", lambda: attn(shapes=None)),
    "shapes_flat": (TypeError, "spatial_shapes", lambda: attn(shapes=(2, 3, 4, 1))),
    "shapes_triples": (TypeError, "spatial_shapes", lambda: attn(shapes=((2, 3, 1),) * 2)),
    "shapes_fractions": (TypeError, "spatial_shapes", lambda: attn(shapes=((2.0, 3), (4, 1)))),
    "shapes_negative": (ValueError, "spatial_shapes", lambda: attn(shapes=((-2, -3), (4, 1)))),
    "shapes_sum": (ValueError, "spatial_shapes", lambda: attn(shapes=((2, 3), (4, 2)))),
    "shapes_count": (ValueError, "spatial_shapes", lambda: attn(shapes=((2, 5),))),
    "shapes_float_tensor": (
        TypeError,
        "spatial_shapes",
        lambda: attn(shapes=torch.tensor(SHAPES).float()),
    ),
    "shapes_tensor_3": (
        ValueError,
        "spatial_shapes",
        lambda: attn(shapes=torch.zeros(2, 3).long()),
    ),
    "shapes_tensor_sum": (
        ValueError,
        "spatial_shapes",
        lambda: attn(shapes=torch.tensor(SHAPES) + 1),
    ),
    "shapes_tensor_meta": (
        ValueError,
        "spatial_shapes",
        lambda: attn(shapes=torch.tensor(SHAPES).to("meta")),
    ),
    "locations_none": (TypeError, "sampling_locations", lambda: attn(locations=None)),
    "locations_5d": (ValueError, "sampling_locations", lambda: attn(locations=LOCATIONS[..., 0])),
    "locations_xyz": (
        ValueError,
        "sampling_locations",
        lambda: attn(locations=torch.zeros(2, 3, 2, 2, 4, 3)),
    ),
    "locations_batch": (ValueError, "sampling_locations", lambda: attn(locations=LOCATIONS[:1])),
    "locations_heads": (
        ValueError,
        "sampling_locations",
        lambda: attn(locations=LOCATIONS[:, :, :1]),
    ),
    "locations_no_points": (
        ValueError,
        "sampling_locations",
        lambda: attn(locations=LOCATIONS[..., :0, :], weights=WEIGHTS[..., :0]),
    ),
    "locations_integer": (
        TypeError,
        "sampling_locations",
        lambda: attn(locations=LOCATIONS.long()),
    ),
    "weights_none": (TypeError, "attention_weights", lambda: attn(weights=None)),
    "weights_3d": (ValueError, "attention_weights", lambda: attn(weights=WEIGHTS.flatten(2))),
    "weights_points": (ValueError, "attention_weights", lambda: attn(weights=WEIGHTS[..., :3])),
    "weights_meta": (ValueError, "attention_weights", lambda: attn(weights=WEIGHTS.to("meta"))),
    "attn_softmax": (TypeError, "softmax", lambda: attn(softmax=1)),
    "attn_backend": (ValueError, "backend", lambda: attn(backend="gpu")),
    # ms_deform_attn_from_offsets
    "points_none": (TypeError, "reference_points", lambda: refer(None)),
    "points_integer": (TypeError, "reference_points", lambda: refer(POINTS.long())),
    "points_3d": (ValueError, "reference_points", lambda: refer(POINTS[0])),
    "points_xyz": (ValueError, "reference_points", lambda: refer(torch.zeros(2, 3, 2, 3))),
    "points_batch": (ValueError, "reference_points", lambda: refer(torch.zeros(3, 3, 2, 2))),
    "points_queries": (ValueError, "reference_points", lambda: refer(POINTS[:, :2])),
    "points_levels": (ValueError, "reference_points", lambda: refer(torch.zeros(2, 3, 3, 4))),
    "points_meta": (ValueError, "reference_points", lambda: refer(POINTS.to("meta"))),
    "offsets_none": (TypeError, "offsets", lambda: refer(offsets=None)),
    "offsets_heads": (ValueError, "offsets", lambda: refer(offsets=LOCATIONS[:, :, :1])),
    "box_normalizer": (ValueError, "box_normalizer", lambda: refer(box_normalizer="pixels")),
    "box_normalizer_flag": (TypeError, "box_normalizer", lambda: refer(box_normalizer=True)),
    "offsets_softmax": (TypeError, "softmax", lambda: refer(softmax=1)),
    "offsets_backend": (ValueError, "backend", lambda: refer(backend="gpu")),
    # DCNv4
    "group": (ValueError, "group", lambda: DCNv4(64, group=5)),
    "channels": (ValueError, "channels", lambda: DCNv4(0)),
    "init": (ValueError, "init", lambda: DCNv4(8, init="ones")),
    "dw_kernel_size": (ValueError, "dw_kernel_size", lambda: DCNv4(8, dw_kernel_size=0)),
    "unknown_keyword": (TypeError, "norm_layer", lambda: DCNv4(8, norm_layer="LN")),
    "layer_kernel": (ValueError, "kernel_size", lambda: DCNv4(8, kernel_size=-1)),
    "layer_square": (ValueError, "shape", lambda: DCNv4(8)(torch.zeros(1, 12, 8))),
    "layer_shape": (ValueError, "shape", lambda: DCNv4(8)(torch.zeros(1, 12, 8), (3, 3))),
    "layer_shape_4d": (ValueError, "shape", lambda: DCNv4(8)(torch.zeros(1, 3, 4, 8), (4, 3))),
    "layer_channels": (ValueError, "x", lambda: DCNv4(8)(torch.zeros(1, 9, 7))),
    "layer_nchw": (ValueError, "permute", lambda: DCNv4(8)(torch.zeros(1, 8, 3, 4))),
    "layer_2d": (ValueError, "x", lambda: DCNv4(8)(torch.zeros(9, 8))),
    "layer_type": (TypeError, "x", lambda: DCNv4(8)([[1.0] * 8])),
    "layer_dtype": (TypeError, "x", lambda: DCNv4(8)(torch.zeros(1, 9, 8, dtype=torch.int64))),
    "layer_shape_number": (TypeError, "shape", lambda: DCNv4(8)(torch.zeros(1, 9, 8), 3)),
    "layer_backend": (ValueError, "backend", lambda: DCNv4(8, backend="metal")),
    "attention_backend": (ValueError, "backend", lambda: FlashDeformAttn(8, 1, 2, backend="gpu")),
    # DCNv4Conv2d
    "in_channels": (ValueError, "in_channels", lambda: DCNv4Conv2d(0, 8)),
    "out_channels": (ValueError, "out_channels", lambda: DCNv4Conv2d(8, 0)),
    "conv2d_groups": (ValueError, "group", lambda: DCNv4Conv2d(8, 9, groups=2)),
    "conv2d_padding": (ValueError, "padding", lambda: DCNv4Conv2d(8, 8, padding="full")),
    "conv2d_same_even": (ValueError, "padding", lambda: DCNv4Conv2d(8, 8, 2, padding="same")),
    "conv2d_padding_mode": (
        ValueError,
        "padding_mode",
        lambda: DCNv4Conv2d(8, 8, padding_mode="reflect"),
    ),
    "conv2d_2d": (ValueError, "x", lambda: DCNv4Conv2d(8, 8)(torch.zeros(8, 3))),
    "conv2d_channels": (ValueError, "x", lambda: DCNv4Conv2d(8, 8)(torch.zeros(1, 3, 3, 8))),
    "conv2d_array": (TypeError, "x", lambda: DCNv4Conv2d(3, 16)(ARRAY)),
    "conv2d_list": (TypeError, "x", lambda: DCNv4Conv2d(3, 16)([[[1.0]]])),
    "conv2d_in_text": (TypeError, "in_channels", lambda: DCNv4Conv2d("3", 16)),
    "conv2d_out_none": (TypeError, "out_channels", lambda: DCNv4Conv2d(3, None)),
    "conv2d_group": (TypeError, "as groups", lambda: DCNv4Conv2d(3, 16, group=1)),
    "conv2d_pad": (TypeError, "as padding", lambda: DCNv4Conv2d(3, 16, pad=1)),
    "conv2d_pad_list": (ValueError, "padding", lambda: DCNv4Conv2d(3, 16, padding=[1])),
    "conv2d_stride_array": (TypeError, "stride", lambda: DCNv4Conv2d(3, 16, stride=ARRAY)),
    "conv2d_dtype": (TypeError, "dtype", lambda: DCNv4Conv2d(3, 16, dtype="float16")),
    # Wrong types of what layers are given
    "channels_text": (TypeError, "channels", lambda: DCNv4("64")),
    "channels_none": (TypeError, "channels", lambda: DCNv4(None)),
    "channels_float": (TypeError, "channels", lambda: DCNv4(64.0)),
    "group_text": (TypeError, "group", lambda: DCNv4(64, group="4")),
    "groups": (TypeError, "as group;", lambda: DCNv4(64, groups=4)),
    "padding_word": (TypeError, "as pad;", lambda: DCNv4(64, padding=1)),
    "pad": (ValueError, "pad must", lambda: DCNv4(64, pad=-1)),
    "dw_pair": (TypeError, "dw_kernel_size", lambda: DCNv4(8, dw_kernel_size=(3, 3))),
    "init_none": (TypeError, "init", lambda: DCNv4(8, init=None)),
    **{
        f"{getattr(layer, '__name__', 'conv2d')}_{flag}": (
            TypeError,
            flag,
            partial(layer, 8, **{flag: "False"}),
        )
        for layer, flags in FLAGS.items()
        for flag in flags
    },
    "layer_array": (TypeError, "x", lambda: DCNv4(8)(ARRAY)),
    "layer_shape_float": (
        TypeError,
        "shape",
        lambda: DCNv4(16, group=1)(torch.zeros(1, 64, 16), (8.0, 8.0)),
    ),
    "layer_shape_text": (TypeError, "shape", lambda: DCNv4(8)(torch.zeros(1, 9, 8), "33")),
    "output_shape": (TypeError, "shape", lambda: DCNv4(8).output_shape(9)),
    "dcnv3_groups": (TypeError, "as group;", lambda: DCNv3(8, groups=4)),
    "dcnv3_channels": (TypeError, "channels", lambda: DCNv3("8")),
    "dcnv3_norm": (TypeError, "norm_layer", lambda: DCNv3(8, norm_layer=None)),
    "dcnv3_act": (TypeError, "act_layer", lambda: DCNv3(8, act_layer=torch.nn.GELU)),
    "dcnv3_dw": (TypeError, "dw_kernel_size", lambda: DCNv3(8, dw_kernel_size=(3, 3))),
    "dcnv3_array": (TypeError, "x", lambda: DCNv3(8)(ARRAY)),
    "dcnv3_channels_of_x": (ValueError, "x", lambda: DCNv3(8)(torch.zeros(1, 3, 3, 6))),
    "convert_model": (TypeError, "model", lambda: dcnv4.convert(None)),
    "convert_kind": (TypeError, "kind", lambda: dcnv4.convert(MODEL, kind=["any"])),
    "convert_names": (TypeError, "names", lambda: dcnv4.convert(MODEL, None)),
    "convert_kernel": (TypeError, "kernel_size", lambda: dcnv4.convert(MODEL, kernel_size="3")),
    # FlashDeformAttn
    "d_model_float": (TypeError, "d_model", lambda: FlashDeformAttn(256.0)),
    "n_levels_text": (TypeError, "n_levels", lambda: FlashDeformAttn(8, "1")),
    "n_points_flag": (TypeError, "n_points", lambda: FlashDeformAttn(8, 1, 2, True)),
    "ratio": (ValueError, "ratio", lambda: FlashDeformAttn(8, 1, 2, ratio=0.1)),
    "ratio_heads": (ValueError, "ratio", lambda: FlashDeformAttn(8, 1, 4, ratio=0.75)),
    "ratio_flag": (TypeError, "ratio", lambda: FlashDeformAttn(8, 1, 2, 4, True)),
    "query_array": (TypeError, "query", lambda: attend(query=ARRAY)),
    "reference_none": (TypeError, "reference_points", lambda: attend(reference_points=None)),
    "flatten_list": (TypeError, "input_flatten", lambda: attend(input_flatten=[])),
    "sizes_none": (
        TypeError,
        "input_spatial_shapes",
        lambda: attend(input_spatial_shapes=None),
    ),
    "sizes_count": (
        ValueError,
        "input_spatial_shapes",
        lambda: attend(input_spatial_shapes=((2, 3), (2, 2), (1, 1))),
    ),
    "sizes_floats": (
        TypeError,
        "input_spatial_shapes",
        lambda: attend(input_spatial_shapes=((2.0, 3), (2, 2))),
    ),
    "mask_list": (
        TypeError,
        "input_padding_mask",
        lambda: attend(input_padding_mask=[[False] * 10] * 2),
    ),
    "mask_floats": (
        TypeError,
        "input_padding_mask",
        lambda: attend(input_padding_mask=torch.zeros(2, 10)),
    ),
    "d_model": (ValueError, "d_model", lambda: FlashDeformAttn(0)),
    "n_levels": (ValueError, "n_levels", lambda: FlashDeformAttn(8, 0)),
    "n_heads": (ValueError, "n_heads", lambda: FlashDeformAttn(8, 1, 3)),
    "n_points": (ValueError, "n_points", lambda: FlashDeformAttn(8, 1, 2, 0)),
    "query": (ValueError, "query", lambda: attend(query=torch.zeros(2, 3, 7))),
    "input_flatten": (
        ValueError,
        "input_flatten",
        lambda: attend(input_flatten=torch.zeros(10, 8)),
    ),
    "flatten_batch": (
        ValueError,
        "input_flatten must be [B, S, d_model] with B = 2",
        lambda: attend(input_flatten=torch.zeros(1, 10, 8)),
    ),
    "reference_points": (
        ValueError,
        "reference_points",
        lambda: attend(reference_points=torch.zeros(2, 3, 2, 3)),
    ),
    "padding_mask": (
        ValueError,
        "input_padding_mask",
        lambda: attend(input_padding_mask=torch.zeros(2, 9, dtype=torch.bool)),
    ),
    "input_spatial_shapes": (
        ValueError,
        "spatial_shapes",
        lambda: attend(input_spatial_shapes=((2, 3), (4, 4))),
    ),
    # the choice of a backend
    "choose": (
        ValueError,
        "backend",
        lambda: backends.choose("deform_conv", CPU, VALUE.dtype, backend=""),
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str) -> None:
    error, argument, call = MALFORMED[case]
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert argument in message
    assert "\n" not in message


SMALL = torch.zeros(1, 64, 4, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: DCNv4Conv2d(64, 64, 7, padding=0)(SMALL),
        lambda: DCNv4(64, 7, pad=0)(SMALL.permute(0, 2, 3, 1)),
        lambda: DCNv3(64, 7, pad=0)(SMALL.permute(0, 2, 3, 1)),
        lambda: DCNv4Conv2d(64, 64, 5, 2, without_pointwise=True)(SMALL[0]),
    ],
    ids=["DCNv4Conv2d", "DCNv4", "DCNv3", "stride"],
)
def test_a_map_smaller_than_the_kernel(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match="kernel_size must fit the padded image = 4 x 4; got "):
        call()


@pytest.mark.parametrize("size", [(0, 3), (3, 0)])
def test_a_map_without_pixels(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="x must have pixels where windows are; got "):
        DCNv4Conv2d(8, 8, padding=2)(torch.zeros(1, 8, *size))
    assert DCNv4(8)(torch.zeros(1, *size, 8)).shape == (1, *size, 8)


@pytest.mark.parametrize("channels", [14, 16], ids=["channels do not divide", "size does not fit"])
def test_channels_first(channels: int) -> None:
    hint = rf"; value = \[1, 64, 14, {channels}\] seems to be \[B, C, H, W\]: permute"
    value = torch.zeros(1, 64, 14, channels)
    masks = torch.zeros(1, 14, channels, 108), torch.zeros(1, 108, 14, channels)
    for offset_mask in masks:
        with pytest.raises(ValueError, match=hint):
            deform_conv(value, offset_mask)
    with pytest.raises(ValueError, match=r"got \[1, 14, 14, 9\]$"):
        deform_conv(torch.zeros(1, 14, 14, 16), torch.zeros(1, 14, 14, 9))


HALVES: dict[str, Callable[[], Tensor]] = {
    "DCNv4Conv2d": lambda: DCNv4Conv2d(8, 8, padding=1)(torch.zeros(1, 8, 4, 4).half()),
    "without pointwise": lambda: DCNv4(8, without_pointwise=True)(torch.zeros(1, 16, 8).half()),
    "depthwise": lambda: DCNv4(8, dw_kernel_size=3)(torch.zeros(1, 16, 8).half()),
    "DCNv3": lambda: DCNv3(8)(torch.zeros(1, 4, 4, 8).half()),
    "query": lambda: attend(query=torch.zeros(2, 3, 8).half()),
    "input_flatten": lambda: attend(input_flatten=torch.zeros(2, 10, 8).half()),
}


@pytest.mark.parametrize("case", HALVES)
def test_halves_given_to_a_layer_of_floats(case: str) -> None:
    name = case if case in ("query", "input_flatten") else "x"
    message = f"{name} must be torch.float32, as the layer's parameters are, .*; got torch.float16"
    with pytest.raises(TypeError, match=message):
        HALVES[case]()


DOUBLES: dict[str, Callable[[], Tensor]] = {
    "x": lambda: DCNv4Conv2d(8, 8, padding=1)(torch.zeros(1, 8, 4, 4).double()),
    "query": lambda: attend(query=torch.zeros(2, 3, 8).double()),
    "input_flatten": lambda: attend(input_flatten=torch.zeros(2, 10, 8).double()),
}


@pytest.mark.parametrize("name", DOUBLES)
def test_autocast_casts_no_float64(name: str) -> None:
    message = rf"{name} must be torch.float32, .*, since autocast leaves .*; got torch.float64"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=message):
        DOUBLES[name]()


def test_halves_are_left_to_whoever_casts_them() -> None:
    """A hook that casts what its module reads."""
    layer = DCNv4(8, without_pointwise=True)
    layer.offset_mask.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    assert layer(torch.zeros(1, 16, 8).half()).dtype == torch.float16


def test_the_calls_that_are_changed_are_right() -> None:
    assert conv().shape == (2, 4, 5, 8)
    assert attn().shape == (2, 3, 8)
    assert refer().shape == (2, 3, 8)
    assert attend().shape == (2, 3, 8)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without the variables that the tests may have been started with."""
    for name in ("DCNV4_BACKEND", "DCNV4_USE_TRITON"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("name", "setting"),
    [("DCNV4_BACKEND", "rocm"), ("DCNV4_BACKEND", ""), ("DCNV4_USE_TRITON", "2")],
)
def test_environment(name: str, setting: str, environment: pytest.MonkeyPatch) -> None:
    environment.setenv(name, setting)
    with pytest.raises(ValueError, match=name) as caught:
        conv()
    known = backends.NAMES if name == "DCNV4_BACKEND" else ("0", "1")
    assert all(word in str(caught.value) for word in known)
    assert conv(backend="reference").shape == VALUE.shape


def test_environment_order(environment: pytest.MonkeyPatch) -> None:
    """backend= beats DCNV4_BACKEND beats DCNV4_USE_TRITON, which is for GPU tensors."""
    environment.setenv("DCNV4_USE_TRITON", "1")
    assert backends.requested("cuda") == "triton"
    assert backends.requested("cpu") == "auto"
    environment.setenv("DCNV4_BACKEND", "reference")
    assert backends.requested("cuda") == backends.requested("cpu") == "reference"
    assert backends.choose("deform_conv", CPU, VALUE.dtype) == "reference"
    with pytest.raises(RuntimeError, match="cuda"):
        backends.choose("deform_conv", CPU, VALUE.dtype, backend="cuda")


def test_a_named_backend_never_falls_back() -> None:
    """It raises with the reason of every backend."""
    with pytest.raises(RuntimeError) as caught:
        conv(backend="cuda")
    reasons = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in reasons] == list(backends.NAMES)
    call = backends.Call("deform_conv", CPU, VALUE.dtype)
    for line, name in zip(reasons, backends.NAMES, strict=True):
        assert line.endswith(backends.why_not(name, call) or "usable")
