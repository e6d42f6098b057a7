"""Calls that reach one kernel or another of the CUDA backend."""

from __future__ import annotations

import torch

from dcnv4.backends.cuda import choice
from support import cases

EVERY = dict.fromkeys(choice.PAYS_FROM, 0)
SORTED = {name: 0 for name in EVERY if "sorted" in name}


def _conv(name: str, depth: int = 16, **settings: object) -> cases.ConvCase:
    shape = {"batch": 2, "groups": 2, "size": (9, 11), "sigma": 0.5, **settings}
    return cases.ConvCase(name, depth=depth, **shape)  # type: ignore[arg-type]


def tile_cases() -> list[cases.ConvCase]:
    stride = {"stride": 2, "padding": (0, 2), "dilation": (2, 1), "offset_scale": 0.5}
    return [
        _conv("plain"),
        _conv("depth_32", 32, groups=3, size=(7, 7)),
        _conv("depth_48", 48, groups=1),
        _conv("depth_64", 64, groups=1, size=(4, 9)),
        _conv("far", sigma=3.0, size=(19, 21), batch=1),
        _conv("few_far", sigma=0.9, size=(9, 13)),
        _conv("few_far_softmax", softmax=True, sigma=0.9, size=(9, 13), batch=1),
        _conv("farther", sigma=9.0, size=(9, 30), batch=1),
        _conv("outside", outside=(-40.0, 1e6)),
        _conv("softmax", softmax=True),
        _conv("far_softmax", softmax=True, sigma=3.0, size=(19, 21), batch=1),
        _conv("float_coordinates", coordinates=(torch.float32,)),
        _conv("sliced", layout="sliced", groups=4),
        _conv("expanded", layout="expanded", groups=4),
        _conv("padded", extra=5, groups=3),
        _conv("stride", window=stride, size=(20, 17)),
        _conv("no_center", window={"remove_center": True}),
        _conv("2x2", window={"kernel_size": 2, "padding": 0}),
        _conv("4x4", window={"kernel_size": 4, "padding": 1}, groups=1),
        _conv("one_row", size=(1, 40), batch=1),
        _conv("one_column", size=(40, 1), batch=1),
    ]


def sorted_conv_cases() -> list[cases.ConvCase]:
    """Besides those of `tile_cases`, all of which are sorted where tiles do not take them."""

    return [
        _conv("kernel_1", window={"kernel_size": 1, "padding": 0}),
        _conv("kernel_5", window={"kernel_size": 5, "padding": 2}, softmax=True),
        _conv("kernel_7", 32, groups=1, window={"kernel_size": 7, "padding": 3}, size=(5, 6)),
        _conv("kernel_1x11", window={"kernel_size": (1, 11), "padding": (0, 5)}, sigma=2.0),
        _conv("wide", groups=1, window={"dilation": 9, "padding": 9}, size=(30, 28), batch=1),
        _conv("float_coordinates", coordinates=(torch.float32,), groups=3, extra=5),
    ]


def sorted_cases() -> list[cases.AttnCase]:
    """Encoders: as many queries as pixels."""

    def case(name: str, *shapes: tuple[int, int], **settings: object) -> cases.AttnCase:
        shapes = shapes or ((9, 11), (5, 6))
        queries = sum(height * width for height, width in shapes)
        settings = {"batch": 2, "depth": 32, "softmax": True, "queries": queries, **settings}
        return cases.AttnCase(name, shapes=shapes, **settings)  # type: ignore[arg-type]

    half, single, double = torch.float16, torch.float32, torch.float64
    detr = (13, 17), (7, 9), (4, 5), (2, 3)
    return [
        case("plain"),
        case("weights", softmax=False),
        case("four_levels", *detr, batch=1, sigma=2.0),
        case("far", *detr, batch=1, groups=1, sigma=9.0),
        case("far_weights", sigma=40.0, softmax=False),
        case("five_levels", (3, 5), (2, 2), (1, 9), (4, 1), (1, 1), per_level=3),
        case("three_levels", (5, 5), (3, 3), (2, 2), per_level=1, groups=8),
        case("empty_level", (0, 5), (3, 4), (0, 0), (2, 7)),
        case("one_pixel", (1, 1), batch=3, groups=1, per_level=1),
        case("one_row", (1, 70), batch=1, coordinates=(single, half)),
        case("one_column", (70, 1), batch=1, coordinates=(single, half)),
        case("two_passes", *detr[1:], (1, 2), per_level=8, groups=1),
        case("depth_16", *detr, depth=16, batch=1, groups=1),
        case("depth_64", depth=64, groups=1),
        case("integer", (8, 16), (4, 4), integer=True, sigma=2.0),
        case("float_locations", coordinates=(single, half)),
        case("float_coordinates", coordinates=(single, single), softmax=False),
        case("double_locations", coordinates=(double, single)),
        case("sliced", layout="sliced", groups=4),
        case("permuted", layout="permuted"),
        case("expanded", layout="expanded", groups=1),
    ]
