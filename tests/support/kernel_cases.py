"""Calls that reach one kernel or another of the CUDA backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
import torch

from support import cases, pairs

HALVES = torch.float16, torch.bfloat16
_BAD = np.inf, -np.inf, np.nan


def _conv(name: str, depth: int = 16, **settings: Any) -> cases.ConvCase:
    """Pixels of its offset_mask lie on whole 16 bytes, as a layer's do, but for `extra`."""
    shape = {"batch": 2, "groups": 2, "size": (9, 11), "sigma": 0.5, **settings}
    case = cases.ConvCase(name, depth=depth, **shape)
    used = 3 * case.groups * case.points_per_group
    return replace(case, extra=case.extra + -used % 8)


# What a call of the tile kernels is compiled for. All combinations of these are tested,
VARIANTS: dict[str, tuple[Any, ...]] = {
    "dtype": HALVES,
    "softmax": (False, True),
    "deterministic": (False, True),
    "depth": (16, 32, 48, 64),
    "remove_center": (False, True),
}
# and of what else it is compiled for and told, every pair.
WINDOWS: dict[str, dict[str, Any]] = {
    "one_group": {"groups": 1},
    "two_groups": {"groups": 2},
    "three_groups": {"groups": 3, "extra": 12},
    "four_groups": {"groups": 4},
    "no_padding": {"window": {"padding": 0}},
    "wide_padding": {"window": {"padding": (3, 2)}},
    "2x2": {"window": {"kernel_size": 2}},
    "1x3": {"window": {"kernel_size": (1, 3), "padding": (0, 1)}, "groups": 3},
    "3x1": {"window": {"kernel_size": (3, 1), "padding": (1, 0)}},
    "half_scale": {"window": {"offset_scale": 0.5}},
    "double_scale": {"window": {"offset_scale": 2.0}},
    "mirrored": {"window": {"offset_scale": -1.0, "dilation": (1, 2), "padding": (1, 2)}},
    "quarter_scale": {"window": {"offset_scale": 0.25, "dilation": 3, "padding": 3}, "groups": 3},
}
SIZES = {
    "one_tile": (4, 8),
    "ragged": (9, 11),
    "row": (1, 37),
    "column": (37, 1),
    "tall": (19, 7),
    "wide": (5, 26),
    "pixel": (1, 1),
}
DATA: dict[str, dict[str, Any]] = {
    "zero_offsets": {"sigma": 0.0, "integer": True},
    "whole_pixels": {"integer": True, "outside": (-1, 0, 1, 1, -1, 0, 1), "every": 1},
    "near": {"sigma": 0.4},
    "few_far": {"sigma": 0.4, "outside": (5.25, -3.25, 40.25), "every": 101},
    "many_far": {"sigma": 3.0},
    "endless_offsets": {"sigma": 0.4, "outside": (*_BAD, 1e30), "every": 89},
    "endless_value": {"sigma": 0.4, "spoilt": ("value", _BAD)},
    "endless_weights": {"sigma": 0.4, "spoilt": ("weights", _BAD)},
    "endless_gradient": {"sigma": 0.4, "spoilt": ("grad", _BAD)},
    "large_weights": {"sigma": 0.4, "spoilt": ("weights", (2100.0,))},
    "small_weights": {"sigma": 0.4, "weight_scale": 1e-4},
}
LAYOUTS = "plain", "packed", "expanded"


@cache
def variants() -> list[pairs.Row]:
    """All of `VARIANTS`, each with a window that makes a pair of it with each setting."""
    every = [dict(zip(VARIANTS, row, strict=True)) for row in product(*VARIANTS.values())]
    return pairs.rows(every, {"window": tuple(WINDOWS)})


@cache
def tile_rows() -> list[pairs.Row]:
    """Calls of the tile kernels: all variants, with every pair of it all."""
    free = {"data": tuple(DATA), "size": tuple(SIZES), "layout": LAYOUTS}
    return pairs.rows(variants(), {**free, "backwards": (False, True)})


@cache
def every_tile_row() -> list[pairs.Row]:
    """All variants with all data, and every pair of it all with the rest."""
    given = [{**row, "data": data} for row in variants() for data in DATA]
    return pairs.rows(given, {"size": tuple(SIZES), "layout": LAYOUTS})


def tile_case(row: pairs.Row) -> cases.ConvCase:
    """What `tile_rows` describe, a call that the tile kernels take."""
    settings = {**WINDOWS[row["window"]], **DATA[row["data"]]}
    window = {**settings.pop("window", {}), "remove_center": row["remove_center"]}
    lost = 2 if row["window"] == "no_padding" else 0
    if row["layout"] == "packed":  # beside the value: the width of both must be on 16 bytes
        settings["extra"] = settings.get("extra", 0) // 8 * 8
    return _conv(
        row_id(row),
        row["depth"],
        batch=1 if row["size"] in ("ragged", "tall") else 3,
        size=tuple(size + lost for size in SIZES[row["size"]]),
        softmax=row["softmax"],
        window=window,
        layout=row["layout"],
        **settings,
    )


def row_id(row: pairs.Row) -> str:
    told = {**row, "dtype": str(row["dtype"]).removeprefix("torch.")}
    return "-".join(name if of is True else str(of) for name, of in told.items() if of is not False)


def leaves(row: pairs.Row) -> tuple[bool | None, bool | None]:
    """Whether forward and backward leave tiles of a call to the next kernel: those with too many
    far points, with weights that float16 does not hold or cannot add, or with what is not finite in
    what they multiply. None: where a tile has few points, either is right."""
    if row["data"] == "whole_pixels" and row["window"] == "double_scale":
        return (None, None)  # a distance of 2 pixels is far
    if row["data"] == "many_far":
        few_pixels = row["size"] in ("pixel", "row", "column")
        few_points = "kernel_size" in WINDOWS[row["window"]].get("window", {})
        return (None, None) if few_pixels or few_points else (True, True)
    if row["data"] in ("large_weights", "small_weights"):
        return (not row["softmax"],) * 2
    return {
        "endless_value": (True, False),
        "endless_weights": (True, True),
        "endless_gradient": (False, True),
    }.get(row["data"], (False, False))


def check_left(row: pairs.Row, computed: Sequence[float]) -> None:
    """What a row's forward and backward computed must be what `leaves` says."""
    for share, left in zip(computed, leaves(row), strict=True):
        assert left is None or left == (share < 1), f"shares of tiles computed: {computed}"


def finite(row: pairs.Row, case: cases.ConvCase) -> np.ndarray | None:
    """Where the value's gradient is, if not where the oracle's is: sums in integers make it NaN
    throughout an image whose gradient or weights are not finite."""
    if not row["deterministic"] or row["data"] not in ("endless_weights", "endless_gradient"):
        return None
    finite = np.ones(case.exact[0].shape, bool)
    every_image = case.layout == "expanded" and row["data"] == "endless_gradient"
    finite[:: 1 if every_image else 2] = False
    return finite


def plain_tiles(**settings: Any) -> cases.ConvCase:
    """A call that the tile kernels take."""
    return _conv("plain", **settings)


def not_tiled() -> list[cases.ConvCase]:
    """Large calls that tiles refuse, each for one reason, and sorting takes."""
    return [
        _conv("coordinates_in_float32", coordinates=(torch.float32,)),
        _conv("odd_channels", groups=1, extra=1),
        _conv("channels_on_4_bytes", groups=2, extra=2),
        _conv("stride_2", window={"stride": 2}),
        _conv("dilation", window={"dilation": (1, 3)}),
        _conv("scale_of_1.5", window={"offset_scale": 1.5}),
        _conv("scale_of_4", window={"offset_scale": 4.0}),
        _conv("kernel_4", window={"kernel_size": (3, 4)}),
    ]


def not_sorted() -> list[cases.ConvCase]:
    """Large calls that neither tiles nor sorting take."""
    return [
        _conv("sliced", layout="sliced"),
        _conv("depth_24", 24),
        _conv("depth_80", 80, groups=1),
    ]


def sorted_conv_cases() -> list[cases.ConvCase]:
    """Convolutions that sorting takes."""
    stride = {"stride": 2, "padding": (0, 2), "dilation": (2, 1), "offset_scale": 0.5}
    return [
        _conv("plain"),
        _conv("depth_32", 32, groups=3, size=(7, 7), extra=3),
        _conv("depth_64", 64, groups=1, size=(4, 9)),
        _conv("far", sigma=3.0, size=(19, 21), batch=1),
        _conv("far_softmax", softmax=True, sigma=3.0, size=(19, 21), batch=1),
        _conv("farther", sigma=9.0, size=(9, 30), batch=1),
        _conv("outside", outside=(-40.0, 1e6)),
        _conv("still", sigma=0.0, integer=True),
        _conv("integer", sigma=1.0, integer=True),
        _conv("not_finite", spoilt=("grad", _BAD)),
        _conv("packed", layout="packed", groups=4),
        _conv("expanded", layout="expanded", groups=4),
        _conv("permuted", layout="permuted"),
        _conv("stride", window=stride, size=(20, 17)),
        _conv("no_center", window={"remove_center": True}),
        _conv("kernel_1", window={"kernel_size": 1, "padding": 0}),
        _conv("kernel_5", window={"kernel_size": 5, "padding": 2}, softmax=True),
        _conv("kernel_7", 32, groups=1, window={"kernel_size": 7, "padding": 3}, size=(5, 6)),
        _conv("kernel_4", window={"kernel_size": 4, "padding": 1}, groups=1),
        _conv("kernel_1x11", window={"kernel_size": (1, 11), "padding": (0, 5)}, sigma=2.0),
        _conv("wide", groups=1, window={"dilation": 9, "padding": 9}, size=(30, 28), batch=1),
        _conv("float_coordinates", coordinates=(torch.float32,), groups=3, extra=3),
        _conv("one_row", size=(1, 40), batch=1),
        _conv("one_column", size=(40, 1), batch=1),
    ]


def sorted_cases() -> list[cases.AttnCase]:
    """Encoders: as many queries as pixels."""

    def case(
        name: str,
        *shapes: tuple[int, int],
        kind: type[cases.AttnCase] = cases.AttnCase,
        **settings: object,
    ) -> cases.AttnCase:
        shapes = shapes or ((9, 11), (5, 6))
        queries = sum(height * width for height, width in shapes)
        settings = {"batch": 2, "depth": 32, "softmax": True, "queries": queries, **settings}
        return kind(name, shapes=shapes, **settings)  # type: ignore[arg-type]

    half, single = torch.float16, torch.float32
    offsets = partial(case, kind=cases.OffsetsCase)
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
        case("sliced", layout="sliced", groups=4),
        case("permuted", layout="permuted"),
        case("expanded", layout="expanded", groups=1),
        offsets("offsets", *detr, batch=1, shared=(0,), sigma=2.0),
        offsets("boxes", boxes=True, layout="packed"),
        offsets("boxes_by_size", boxes=True, box_normalizer="size", shared=(2,), softmax=False),
        offsets("one_for_all", shared=(0, 1, 2), coordinates=(single, half, half), depth=16),
    ]
