"""Which kernels run a call, in how many threads, compiled for what, and why not others.

It knows where the numbers of tensors lie and what kernels and the GPU can do; no tensors.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch

from ...geometry import Window, sum_dtype

Macros = dict[str, "int | str"]

TYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
MAX_THREADS = 256
TILE_W, TILE_H = 8, 4
"""Columns and rows of output pixels in a tile, see tiles/tile.cuh."""
PAYS_FROM = {
    "conv_tile_forward": 1 << 15,
    "conv_tile_backward": 1 << 13,
    "conv_sorted_backward": 1 << 13,
    "attn_forward": 1 << 13,
    "attn_sorted_backward": 1 << 13,
}
"""Kernels for large calls, and from how many slices on each is used; `attn_forward` then takes an
encoder's queries in tiles."""
_WARP = 32
_NUMBERS_OF_A_LANE = 48
"""Of a row that is normalised, at most: a backward holds four times as many in registers."""
_NARROW, _WIDE = 64, 256
"""Channels, at most, that `linear` multiplies sooner than PyTorch: in halves, and in float32."""
_TALL = 2
"""Rows, at least, over the square of the channels."""
_WARPGROUP = 128
_SQUARE = 64
"""Rows of a warpgroup of `linear`, results of an instruction, channels of a block of the weight."""
_MLP = {64: (256, 2), 128: (384, 1), 256: (256, 1)}
"""Channels of an MLP that `mlp` makes as a whole: threads of a block, and blocks of an SM."""
_MLP_ROWS = {64: 1 << 10, 128: 7 << 10, 256: 17 << 9}
"""From how many rows on it does."""
_CONVERTED = 4
"""Numbers that a thread of `convert_sums` reads at once, at most."""
_LINE = 128  # bytes of L1
_HALVES = (torch.float16, torch.bfloat16)
_WARPS_OF_AN_SM = {16: 16, 32: 12}
"""Occupancy of the tiles' forward, for strips of so many channels; 12 where patches are wide."""
_PIXEL_STEPS = 256
"""Steps of a pixel, of which tiles count whole ones."""
_GATHERING_THREADS = 3 * MAX_THREADS
"""Threads of an SM which gather what tiles left over: more would spoil their L1."""


class GPU(NamedTuple):
    """What a choice depends on of a GPU."""

    major: int
    """Of its compute capability."""
    sms: int
    shared: int = 48 << 10
    """Bytes of shared memory that a block may have."""


class Layout(NamedTuple):
    """Where the numbers of a tensor lie, as far as a launch depends on it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    address: int
    """Of its first number, modulo 16 bytes."""

    @property
    def pixels(self) -> tuple[int, int]:
        """Strides from image to image and from pixel to pixel, of a [B, H, W, C] or [B, N, …]."""
        if len(self.shape) != 4 or self.shape[2] == 1:
            return self.strides[0], self.strides[1]
        return self.strides[0], self.strides[2]

    def alignment(self, *strides: int) -> int:
        """Bytes, up to 16, that divide all addresses these strides lead to."""
        bits = self.address | 16
        for stride in strides:
            bits |= stride * itemsize(self.dtype)
        return bits & -bits

    def vector(self, numbers: int, *strides: int) -> int:
        """How many neighbours are read at once of so many that a pixel begins with, or whatever
        these strides lead to."""
        return math.gcd(numbers, self.alignment(*(strides or self.pixels)) // itemsize(self.dtype))


class ConvGradients(NamedTuple):
    """Where the gradients lie that a backward of `deform_conv` reads and writes."""

    output: Layout
    value: Layout
    offset_mask: Layout


class Kernel(NamedTuple):
    """A kernel, what it is compiled for, and its grid."""

    name: str
    macros: Macros
    blocks: int
    threads: int
    waits: bool = False
    """Whether it waits by itself for the launch before, and so may begin earlier."""
    shared: int = 0
    """Bytes of shared memory, beside what it has by itself."""


class Choice(NamedTuple):
    """What runs a call."""

    kernels: tuple[Kernel, ...]
    why_not: dict[str, str | None]
    """What kernels for large calls need that this one lacks; None of those that run."""
    strip_tiles: int = 0
    """Tiles of each strip."""
    strips: int = 0
    """Of a column of tiles."""
    leftover: int = 0
    """Bytes in which the first kernel says what it leaves to the second."""


class Slices(NamedTuple):
    """What kernels of both operators depend on: the slices, (pixel, group) or (query, head)."""

    total: int
    groups: int
    depth: int
    """D, channels of a slice."""
    points: int
    """Of a slice."""
    softmax: bool
    deterministic: bool
    dtype: torch.dtype
    """Of the value."""
    alignment: int
    """Bytes that divide the addresses of all slices, up to 16."""
    index64: bool
    """Whether pixels or slices need 64-bit numbers."""
    backward: bool
    sums_pixel: int
    """Numbers from pixel to pixel of what the value's gradient is summed in."""

    @property
    def direction(self) -> str:
        return "backward" if self.backward else "forward"

    @property
    def adds_to_zeros(self) -> bool:
        """Whether a kernel waits, before its first addition, for what writes zeros."""
        return self.backward and not self.deterministic

    def large(self, name: str) -> bool:
        """Whether there are enough for a kernel that pays in large calls."""
        return self.total >= PAYS_FROM.get(name, math.inf)

    def shape(self) -> Shape:
        """How threads share one, unless a kernel wants it otherwise."""
        # Integers are added one by one: neighbouring threads' then to neighbouring addresses.
        alignment = itemsize(self.dtype) if self.deterministic else self.alignment
        return launch_shape(self.depth, self.points, itemsize(self.dtype), alignment, self.backward)

    def macros(self) -> Macros:
        """What all kernels of the operators are compiled for."""
        shape = self.shape()
        return {
            **_types(self.dtype, self.index64, self.deterministic),
            "SUM": TYPES[sum_dtype(self.dtype)],
            "GROUPS": self.groups,
            "DEPTH": self.depth,
            "POINTS": self.points,
            "SOFTMAX": int(self.softmax),
            "SUMS_PIXEL": self.sums_pixel,
            "VECTOR": shape.vector,
            "LANES": shape.lanes,
        }

    def grid(self, gpu: GPU) -> tuple[int, int]:
        """Blocks and threads where each thread has one slice."""
        needed = self.total * self.shape().lanes
        threads = block_size(needed, gpu.sms)
        return -(-needed // threads), threads


class Shape(NamedTuple):
    """How threads share the channels of a slice."""

    vector: int
    """Neighbouring channels a thread holds."""
    lanes: int
    """Threads of a warp for a slice."""


@cache
def launch_shape(depth: int, points: int, itemsize: int, alignment: int, backward: bool) -> Shape:
    """The cheapest way to share a slice.

    Args:
        depth: D, channels of a slice.
        points: points of a slice.
        itemsize: bytes of a channel.
        alignment: bytes that divide the addresses of all slices, up to 16.
        backward: whether gradients are added to memory, four float32 at once.
    """
    vectors = [
        vector
        for vector in (1, 2, 4, 8)
        if depth % vector == 0 and vector * itemsize <= alignment and not (backward and vector > 4)
    ]
    candidates = [Shape(v, min(_WARP, _power_of_two(-(-depth // v)))) for v in vectors]

    def cost(shape: Shape) -> float:
        """Instructions of a slice's threads, about."""
        vector, lanes = shape
        passes = -(-depth // (vector * lanes))
        own = -(-points // lanes) * 60
        shared = points * (6 if lanes > 1 else 0)
        if backward:
            sums = points * 8 * (lanes.bit_length() - 1)
            return lanes * (own + shared + sums + passes * points * (28 + 16 * vector))
        return lanes * passes * (own + shared + points * (22 + 4 * vector))

    return min(candidates, key=cost)


def block_size(threads: int, sms: int) -> int:
    """The threads of a block: many, so that neighbours share an L1, and few enough for balance.

    The largest size with which the busiest SM is at most a tenth busier than it need be.
    """

    def busiest(size: int) -> int:
        blocks = -(-threads // size)
        return -(-blocks // sms) * size

    sizes = (MAX_THREADS, 128, 64)
    enough = 1.1 * min(map(busiest, sizes))
    return next(size for size in sizes if busiest(size) <= enough)


class Block(NamedTuple):
    """A block that takes slices which are neighbours in an image."""

    columns: int
    """Of output pixels, or queries."""
    rows: int
    shape: Shape
    groups: int = 1
    """Groups of each of them, or heads."""

    @property
    def threads(self) -> int:
        return self.columns * self.rows * self.groups * self.shape.lanes

    def blocks(self, rows: int, columns: int) -> int:
        """How many an image needs."""
        return -(-rows // self.rows) * -(-columns // self.columns)

    def macros(self) -> Macros:
        return {
            "BLOCK_COLUMNS": self.columns,
            "BLOCK_ROWS": self.rows,
            "BLOCK_GROUPS": self.groups,
            "VECTOR": self.shape.vector,
            "LANES": self.shape.lanes,
        }


_SORTING = {"RESIDENT_THREADS": 512, "MOST_ROUNDS": 5}
"""Occupancy of kernels that sort: for how many threads an SM must have registers, and how many
rounds of points a thread holds at once in those."""
_SORTING_ENCODERS = {"RESIDENT_THREADS": 768, "MOST_ROUNDS": 2}
"""In an encoder of half-precision heads of 32 channels or more."""


def why_not_sorted(name: str, slices: Slices, pixels: int, gpu: GPU) -> str | None:
    """None where kernel `name`, which sorts, takes a call of so many pixels an image; otherwise
    what it needs."""
    block = sorting_block(slices)
    return _unmet(
        (slices.backward, "gradients"),
        (slices.large(name), f"{PAYS_FROM.get(name)} slices"),
        (not slices.index64, "32-bit indices"),
        (slices.depth in (16, 32, 64), "16, 32 or 64 channels a group"),
        (slices.dtype != torch.float64, "sums in float32"),
        (slices.alignment >= 4 * itemsize(slices.dtype), "slices aligned for four channels"),
        (pixels * block.columns * block.rows < 1 << 32, "keys of 32 bits"),
        (gpu.major >= 8, "compute capability 8.0"),
    )


def sorting_block(slices: Slices) -> Block:
    """The block of a kernel that sorts corners."""
    # Integers are added one by one: neighbouring threads' then to neighbouring addresses.
    vector = 4 // itemsize(slices.dtype) if slices.deterministic else 4
    return Block(8, 4 if slices.depth == 64 else 8, Shape(vector, slices.depth // 8))


def query_block(slices: Slices) -> Block:
    """The block of a kernel that reads what neighbouring queries sample.

    It has as many heads as fill a line of L1: the channels of one head begin in a few banks only.
    """
    shape = slices.shape()
    heads = math.gcd(slices.groups, max(1, _LINE // (slices.depth * itemsize(slices.dtype))))
    queries = MAX_THREADS // (shape.lanes * heads)
    columns = min(8, _power_of_two(queries))
    return Block(columns, max(1, queries // columns), shape, heads)


class Strips(NamedTuple):
    """How the tile kernels share the tiles of a call, see tiles/tile.cuh."""

    channels: int
    """Of a strip, of one group."""
    warps: int
    """Strips that a block computes at once, whose channels are neighbours."""
    tiles: int
    """Of a strip."""
    blocks: int
    blocks_per_sm: int = 0
    """Occupancy of persistent blocks."""

    def macros(self) -> Macros:
        return {
            "STRIP_CHANNELS": self.channels,
            "WARPS": self.warps,
            "BLOCKS_PER_SM": self.blocks_per_sm,
        }


def forward_strips(
    columns: int, tiles: int, channels: int, depth: int, wide: bool, sms: int
) -> Strips:
    """Persistent blocks, as many as run at once, each of which goes on from strip to strip.

    Args:
        columns: columns of tiles, of all images.
        tiles: of a column.
        channels: C.
        depth: D, channels of a group.
        wide: whether the undeformed kernel is wider than 3 pixels.
    """
    strip_channels = 32 if depth % 32 == 0 else 16
    parts = channels // strip_channels
    most = 2 if wide else 64 // strip_channels
    warps = next(n for n in (most, 2, 1) if parts % n == 0)
    per_sm = _WARPS_OF_AN_SM[32 if wide else strip_channels] // warps
    shared = columns * parts // warps
    height = strip_height(shared, tiles, per_sm * sms)
    blocks = min(shared * -(-tiles // height), per_sm * sms)
    return Strips(strip_channels, warps, height, blocks, per_sm)


def backward_strips(columns: int, tiles: int, channels: int, depth: int) -> Strips:
    """A block for every strip: those of more tiles are slower, whatever the shape."""
    height = 2 if depth < 64 else 1
    return Strips(depth, 1, height, columns * (channels // depth) * -(-tiles // height))


def strip_height(columns: int, tiles: int, at_once: int) -> int:
    """How many tiles a strip of the forward has: so many that few blocks are idle at the end.

    Args:
        columns: of tiles, of all images, and of the channels that a block computes.
        tiles: of a column.
        at_once: blocks that the GPU runs side by side.
    """

    def cost(height: int) -> float:
        """Time, in that of a tile; a strip begins with more rows of the value than it goes on."""
        return -(-columns * -(-tiles // height) // at_once) * (height + 0.1)

    return min(range(1, min(tiles, 64) + 1), key=cost)


def why_not_tiles(
    name: str,
    slices: Slices,
    window: Window,
    offset_mask: Layout,
    grads: ConvGradients | None,
    gpu: GPU,
) -> str | None:
    """None where kernel `name`, of tiles, takes a call of `deform_conv`; otherwise what it needs,
    see tiles/tile.cuh."""
    columns = offset_mask.shape[2]
    written = offset_mask if grads is None else grads.offset_mask
    stride = max(offset_mask.pixels[1], written.pixels[1])
    return _unmet(
        (slices.large(name), f"{PAYS_FROM.get(name)} slices"),
        (not slices.index64, "32-bit indices"),
        (gpu.major >= 8, "compute capability 8.0"),
        (slices.dtype in _HALVES, "a value in half precision"),
        (offset_mask.dtype == slices.dtype, "offset_mask in the value's dtype"),
        (max(window.kernel_size) <= 3, "a kernel of at most 3 x 3"),
        (window.stride == (1, 1), "a stride of 1"),
        (
            _is_held(window.offset_scale),
            f"offset_scale a power of two from 1/{_PIXEL_STEPS} to {_PIXEL_STEPS}",
        ),
        (scaled_extent(window) <= 4, "a scaled kernel of at most 5 x 5 pixels"),
        (slices.depth in (16, 32, 48, 64), "16, 32, 48 or 64 channels a group"),
        (slices.alignment == 16, "slices aligned to 16 bytes"),
        (offset_mask.alignment(*offset_mask.pixels) >= 8, "offset_mask's pixels on 8 bytes"),
        (written.alignment(*written.pixels) >= 4, "pixels of offset_mask's gradient on 4 bytes"),
        (TILE_H * columns * stride < 1 << 31, "rows of a tile that lanes count in 32 bits"),
    )


def _is_held(scale: float) -> bool:
    """Whether float16 holds an offset as exactly when it is scaled."""
    size = abs(scale)
    return math.frexp(size)[0] == 0.5 and 1 / _PIXEL_STEPS <= size <= _PIXEL_STEPS


def scaled_extent(window: Window) -> float:
    """Pixels from the first to the last of undeformed points, along the longer axis."""
    spans = (d * (k - 1) for d, k in zip(window.dilation, window.kernel_size, strict=True))
    return abs(window.offset_scale) * max(spans)


def _unmet(*rules: tuple[bool, str]) -> str | None:
    return next((f"needs {rule}" for holds, rule in rules if not holds), None)


def conv(
    value: Layout,
    offset_mask: Layout,
    grads: ConvGradients | None,
    window: Window,
    deterministic: bool,
    gpu: GPU,
) -> Choice:
    """What runs `deform_conv`, or its backward where there are `grads`: a kernel or, if tiles take
    the call, two."""
    batch, height, width, channels = value.shape
    rows, columns = offset_mask.shape[1:3]
    slices = _conv_slices(value, offset_mask, grads, window, deterministic)
    tile_name, sorted_name = (f"conv_{kind}_{slices.direction}" for kind in ("tile", "sorted"))
    why_not = {
        tile_name: why_not_tiles(tile_name, slices, window, offset_mask, grads, gpu),
        sorted_name: why_not_sorted(sorted_name, slices, height * width, gpu),
    }
    tiled = why_not[tile_name] is None
    tiles = batch * -(-columns // TILE_W), -(-rows // TILE_H)
    if tiled and not slices.backward:
        wide = scaled_extent(window) > 2
        strips = forward_strips(*tiles, channels, slices.depth, wide, gpu.sms)
    else:  # without tiles only the channels of a strip count, which are then a whole group
        strips = backward_strips(*tiles, channels, slices.depth)
    macros = slices.macros() | _conv_macros(window, offset_mask.dtype, tiled) | strips.macros()
    # The kernel that computes the call or, after tiles, what they leave.
    if why_not[sorted_name] is None:
        block, name, resident = sorting_block(slices), sorted_name, _SORTING["RESIDENT_THREADS"]
        sorting = block.macros() | _SORTING | {"LEVELS": 1}
        blocks, threads = batch * window.groups * block.blocks(rows, columns), block.threads
    else:
        name, resident, sorting = f"conv_{slices.direction}", _GATHERING_THREADS, {}
        blocks, threads = (math.prod(tiles), MAX_THREADS) if tiled else slices.grid(gpu)
    last = Kernel(name, macros | sorting, blocks, threads, slices.adds_to_zeros)
    choice = Choice((last,), why_not, strips.tiles, -(-tiles[1] // strips.tiles))
    if not tiled:
        return choice
    first = Kernel(tile_name, macros, strips.blocks, _WARP * strips.warps, slices.adds_to_zeros)
    last = last._replace(blocks=min(blocks, gpu.sms * resident // threads), waits=True)
    leftover = math.prod(tiles) * (channels // strips.channels)
    return choice._replace(kernels=(first, last), leftover=leftover)


def _conv_slices(
    value: Layout,
    offset_mask: Layout,
    grads: ConvGradients | None,
    window: Window,
    deterministic: bool,
) -> Slices:
    """The slices of a call of `deform_conv`."""
    batch, height, width, channels = value.shape
    groups, points = window.groups, window.points()
    total = batch * math.prod(offset_mask.shape[1:3]) * groups
    vectors, sums_pixel = [value], channels
    if grads is not None:
        vectors.append(grads.output)
        if not deterministic and value.dtype == sum_dtype(value.dtype):  # sums are the result
            vectors.append(grads.value)
            sums_pixel = grads.value.pixels[1]
    return Slices(
        *(total, groups, channels // groups, points, window.softmax, deterministic, value.dtype),
        alignment=min(layout.alignment(*layout.pixels) for layout in vectors),
        index64=_index64(total, height * width, value.pixels[1] * itemsize(value.dtype)),
        backward=grads is not None,
        sums_pixel=sums_pixel,
    )


def _conv_macros(window: Window, dtype: torch.dtype, tiled: bool) -> Macros:
    """What kernels of `deform_conv` are compiled for; `dtype`: of `offset_mask`."""
    pairs = {
        "KERNEL": window.kernel_size,
        "STRIDE": window.stride,
        "PADDING": window.padding,
        "DILATION": window.dilation,
        "CENTER": window.center(),
        "TILE": (TILE_H, TILE_W),
    }
    macros: Macros = {
        "OFFSET_MASK": TYPES[dtype],
        "REMOVE_CENTER": int(window.remove_center),
        "GATHERING_THREADS": _GATHERING_THREADS,
        "AFTER_TILES": int(tiled),
    }
    for name, (height, width) in pairs.items():
        macros |= {f"{name}_H": height, f"{name}_W": width}
    if tiled:
        macros["SCALE_STEPS"] = round(window.offset_scale * _PIXEL_STEPS)
        macros["PIXEL_STEPS"] = _PIXEL_STEPS
    return macros


def attn(
    value: Layout,
    coordinates: Layout,
    weights: Layout,
    reference: tuple[Layout, str] | None,
    grad: Layout | None,
    sizes: tuple[int, ...] | None,
    softmax: bool,
    deterministic: bool,
    gpu: GPU,
) -> Choice:
    """What runs `ms_deform_attn`, or its backward where there is `grad`.

    `reference`: points or boxes, and what boxes are normalised by.
    """
    batch, length, groups, depth = value.shape
    _, queries, _, levels, points, _ = coordinates.shape
    total, (image, row) = batch * queries * groups, value.strides[:2]
    alignment = value.alignment(image, row)
    slices = Slices(
        *(total, groups, depth, levels * points, softmax, deterministic, value.dtype),
        alignment=alignment if grad is None else min(alignment, grad.alignment(*grad.pixels)),
        index64=_index64(total, length, row * itemsize(value.dtype)),
        backward=grad is not None,
        sums_pixel=groups * depth,
    )
    name, sorted_name = f"attn_{slices.direction}", f"attn_sorted_{slices.direction}"
    macros = slices.macros() | _attn_macros(coordinates, weights.dtype, reference)
    encoder, block = queries == length, None
    unmet = _unmet((encoder, "as many queries as pixels"))
    unmet = unmet or why_not_sorted(sorted_name, slices, length, gpu)
    if unmet is None:
        name, block = sorted_name, sorting_block(slices)
        full = depth >= 32 and value.dtype in _HALVES and not deterministic
        macros |= _SORTING_ENCODERS if full else _SORTING
    elif encoder and slices.large(name) and not slices.index64:
        block = query_block(slices)
    macros |= (block or Block(1, 1, slices.shape())).macros()
    macros["QUERY_TILES"] = int(block is not None)
    if block is None:
        blocks, threads = slices.grid(gpu)
    else:
        # Sizes that only the GPU knows make more tiles or fewer: blocks stride over them.
        known = sizes or (length // block.columns + 1, block.columns)
        tiles = max(1, sum(map(block.blocks, known[::2], known[1::2])))
        blocks, threads = batch * groups // block.groups * tiles, block.threads
    kernel = Kernel(name, macros, blocks, threads, slices.adds_to_zeros)
    return Choice((kernel,), {sorted_name: unmet})


def _attn_macros(
    coordinates: Layout, weights: torch.dtype, reference: tuple[Layout, str] | None
) -> Macros:
    """What kernels of `ms_deform_attn` are compiled for."""
    points, box_normalizer = reference or (coordinates, "")
    numbers = 0 if reference is None else points.shape[3]
    return {
        "COORDINATES": TYPES[coordinates.dtype],
        "WEIGHTS": TYPES[weights],
        "LEVELS": coordinates.shape[3],
        "LEVEL_POINTS": coordinates.shape[4],
        "COORDINATE_VECTOR": coordinates.vector(2),
        "REFERENCE": TYPES[points.dtype],
        "REFERENCE_NUMBERS": numbers,
        "REFERENCE_VECTOR": points.vector(numbers or 1, *points.strides[:3]),
        "BOX_BY_SIZE": int(numbers == 4 and box_normalizer == "size"),
    }


def zeros(size: int, gpu: GPU) -> Kernel:
    """What clears `size` bytes, whole words."""
    blocks = min(-(-size // (16 * MAX_THREADS)), 4 * gpu.sms)
    return Kernel("zeros", {}, blocks, MAX_THREADS)


def fixed_point_scale(
    grad: Layout, weights: tuple[Layout, int, int] | None, groups: int, gpu: GPU
) -> Kernel:
    """What chooses the multipliers of integer sums.

    Args:
        grad: of the output, [B, ..., C].
        weights: where points' weights lie, from which on in a group's numbers, and how many numbers
            a group has; None where weights are at most 1.
        groups: G.
    """
    images, channels = grad.shape[0], grad.shape[-1]
    held, first, of_group = weights or (grad, 0, 1)
    numbers = math.prod(grad.shape[1:-1]) * max(channels, groups * of_group)
    macros: Macros = {
        **_types(grad.dtype, numbers >= 1 << 31, True),
        "WEIGHTS": TYPES[held.dtype],
        "GROUPS": groups,
        "CHANNELS": channels,
        "SOFTMAX": int(weights is None),
        "FIRST_WEIGHT": first,
        "WEIGHTS_OF_GROUP": of_group,
        "VECTOR": grad.vector(channels),
        "WEIGHT_VECTOR": held.vector(groups * of_group),
    }
    blocks = max(1, min(numbers >> 14, 8 * gpu.sms // images))  # of an image
    tensors = 1 if weights is None else 2
    return Kernel("fixed_point_scale", macros, blocks * images * tensors, MAX_THREADS)


def sums_columns(columns: int, dtype: torch.dtype) -> bool:
    """Whether `convert_sums` adds up a contiguous result of this dtype by so many columns."""
    return dtype in _HALVES and columns > 0 and MAX_THREADS * _CONVERTED % columns == 0


def convert_sums(
    images: int, result: Layout, deterministic: bool, columns: int, gpu: GPU
) -> Kernel:
    """What makes the sums of `images`, that are alike, numbers of `result`; and adds them up by
    columns, where they are not 0."""
    numbers, channels = math.prod(result.shape), result.shape[-1]
    apart = result.pixels[1] != channels
    vector = math.gcd(_CONVERTED, result.vector(channels) if apart else numbers // images)
    macros = _types(result.dtype, numbers >= 1 << 31, deterministic)
    macros |= {"VECTOR": vector, "ROW": channels if apart else 0}
    macros["COLUMNS"] = columns
    blocks = images * -(-numbers // (images * vector * MAX_THREADS))
    if columns:  # as many as run at once, each of which adds to all
        blocks = min(blocks, 8 * gpu.sms)
    return Kernel("convert_sums", macros, blocks, MAX_THREADS, waits=True)


def multiplies(
    rows: int, channels: int, width: int, given: torch.dtype, dtype: torch.dtype, gpu: GPU
) -> bool:
    """Whether `linear` multiplies so many rows of dtype `given` by a weight [width, channels],
    computing in this one."""
    if dtype not in _HALVES or gpu.major != 9 or channels % 32 or width % 8:
        return False
    if not 0 < channels <= (_NARROW if given == dtype else _WIDE):
        return False
    pays = rows >= _TALL * max(channels, _NARROW) ** 2
    return pays and _weight_bytes(channels, width) <= gpu.shared


def _weight_bytes(channels: int, width: int) -> int:
    """Of a weight and a bias in shared memory, in whole blocks of halves."""
    return 2 * _SQUARE * (_SQUARE * -(-channels // _SQUARE) + 1) * -(-width // _SQUARE)


def linear(
    rows: int, channels: int, width: int, given: torch.dtype, dtype: torch.dtype, gpu: GPU
) -> Kernel:
    """What multiplies rows that it `multiplies`."""
    # As many as have registers for these channels; a block has an SM to itself.
    warpgroups = 4 if channels <= 64 else 3 if channels <= 128 else 2
    threads = warpgroups * _WARPGROUP
    macros: Macros = {
        "VALUE": TYPES[dtype],
        "INPUT": TYPES[given],
        "CHANNELS": channels,
        "WIDTH": width,
        "MAX_THREADS": threads,
    }
    blocks = min(-(-rows // (warpgroups * _SQUARE)), gpu.sms)
    return Kernel("linear", macros, blocks, threads, shared=_weight_bytes(channels, width))


def fuses_mlp(rows: int, channels: int, hidden: int, dtype: torch.dtype, gpu: GPU) -> bool:
    """Whether `mlp` takes so many rows, and does so sooner than norm, products and GELU apart."""
    if dtype not in _HALVES or gpu.major != 9 or channels not in _MLP or hidden % _SQUARE:
        return False
    if rows < _MLP_ROWS[channels] or hidden == 0:
        return False
    return _mlp_bytes(channels, hidden, _MLP[channels][0]) <= gpu.shared


def _mlp_bytes(channels: int, hidden: int, threads: int) -> int:
    """Of normalised rows, of two chunks of both weights and of biases in shared memory."""
    return 2 * _SQUARE * channels * (threads // _WARPGROUP + 4) + 4 * hidden


def mlp(rows: int, channels: int, hidden: int, dtype: torch.dtype, gpu: GPU) -> Kernel:
    """What makes the residual branch of an MLP that it `fuses_mlp`."""
    threads, on_an_sm = _MLP[channels]
    macros: Macros = {"VALUE": TYPES[dtype], "CHANNELS": channels, "HIDDEN": hidden}
    macros |= {"LANES": channels // 8, "MAX_THREADS": threads, "OCCUPANCY": on_an_sm}
    blocks = min(-(-rows // (threads // _WARPGROUP * _SQUARE)), gpu.sms * on_an_sm)
    return Kernel("mlp", macros, blocks, threads, shared=_mlp_bytes(channels, hidden, threads))


def normalizes(channels: int, dtype: torch.dtype) -> bool:
    """Whether `layer_norm` takes rows of so many channels: whole vectors that fit into a warp."""
    if dtype not in TYPES or dtype == torch.float64:
        return False
    return channels * itemsize(dtype) % 16 == 0 and channels <= _WARP * _NUMBERS_OF_A_LANE


def layer_norm(
    direction: str, rows: int, channels: int, dtype: torch.dtype, weights: torch.dtype, gpu: GPU
) -> Kernel:
    """What normalises rows, "forward" or "backward", with weights of another dtype or this one."""
    lanes = min(_WARP, _power_of_two(channels * itemsize(dtype) // 16))
    macros: Macros = {
        "VALUE": TYPES[dtype],
        "WEIGHTS": TYPES[weights],
        "CHANNELS": channels,
        "LANES": lanes,
    }
    # Every block of a backward has sums, which are read and added once more.
    most = gpu.sms * (8 if direction == "forward" else 4)
    blocks = min(-(-rows * lanes // MAX_THREADS), most)
    return Kernel(f"layer_norm_{direction}", macros, blocks, MAX_THREADS)


def _types(value: torch.dtype, index64: bool, deterministic: bool) -> Macros:
    return {
        "VALUE": TYPES[value],
        "INDEX": "unsigned long long" if index64 else "unsigned",
        "DETERMINISTIC": int(deterministic),
        "TOTAL": "long long" if deterministic else TYPES[sum_dtype(value)],
    }


def _index64(slices: int, pixels: int, pixel_bytes: int) -> bool:
    """Whether 32 bits do not hold numbers of slices and of a pixel's corners, or its bytes."""
    return slices >= 1 << 31 or pixels >= 1 << 29 or pixel_bytes >= 1 << 31


def itemsize(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits // 8


def _power_of_two(least: int) -> int:
    """The first that is not below `least`."""
    return 1 << (least - 1).bit_length()
