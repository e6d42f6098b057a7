"""What is launched for a call: which kernels, compiled for what, in how many threads.

A plan is made once for every set of shapes, strides and settings, and remembered.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...geometry import Window
from . import compile

_NUMBERS = {
    torch.float64: "double",
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
MAX_THREADS = 256
_WARP = 32
_LINE = 128  # bytes of L1
_HALVES = (torch.float16, torch.bfloat16)
_TILE = 8, 4
"""Columns and rows of output pixels in a tile, see tile.cuh."""
_AT_ONCE = {16: 16, 32: 12}
"""Warps of the tiles' forward that a processor runs side by side, of so many channels each."""
_RESIDENT_THREADS = 512
"""Threads of kernels that sort which a processor must have registers for."""
_RESIDENT_OF_ENCODERS = 768
"""The same in an encoder of half-precision heads of 32 channels or more."""
_GATHERING_THREADS = 3 * MAX_THREADS
"""Threads of a processor which gather what tiles left: more would spoil their L1."""
PAYS_FROM = {
    "conv_tile_forward": 1 << 15,
    "conv_tile_backward": 1 << 13,
    "conv_sorted_backward": 1 << 13,
    "attn_forward": 1 << 13,
    "attn_sorted_backward": 1 << 13,
}
"""Kernels for large calls, and from how many slices on each is used; `attn_forward` then takes an
encoder's queries in tiles."""
_PLANS = 4096  # launches remembered, one for every set of shapes, strides and settings


class Shape(NamedTuple):
    """How threads share the channels of a slice, one (output pixel, group)."""

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
    candidates = [Shape(vector, _lanes(-(-depth // vector))) for vector in vectors]

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


def block_size(threads: int, processors: int) -> int:
    """The threads of a block: many, so that neighbours share an L1, and few enough for balance.

    The largest size with which the busiest of `processors` is at most a tenth busier than it need
    be.
    """

    def busiest(size: int) -> int:
        blocks = -(-threads // size)
        return -(-blocks // processors) * size

    sizes = (MAX_THREADS, 128, 64)
    enough = 1.1 * min(map(busiest, sizes))
    return next(size for size in sizes if busiest(size) <= enough)


def fits_tiles(
    window: Window, depth: int, value: Layout, fields: Layout, alignment: int, major: int
) -> bool:
    """Whether the tile kernels take a call, see tile.cuh.

    Args:
        depth: D, channels of a group.
        alignment: bytes that divide the addresses of all pixels' channels, up to 16.
        major: of the GPU's compute capability.
    """
    area = _TILE[1] * fields.shape[2]  # of rows that lanes count in 32 bits
    return (
        major >= 8
        and value.dtype in _HALVES
        and fields.dtype == value.dtype
        and max(window.kernel_size) <= 3
        and window.stride == window.dilation == (1, 1)
        and window.offset_scale == 1
        and depth % 16 == 0
        and depth <= 64
        and alignment == 16
        and fields.alignment(*fields.pixels) >= 8
        and fields.shape[3] % 2 == 0
        and area * max(fields.shape[3], fields.pixels[1]) < 1 << 31
    )


class Strips(NamedTuple):
    """How the tile kernels share the tiles of a call, see tile.cuh."""

    wide: int
    """Channels of a strip, of one group."""
    warps: int
    """Strips that a block computes at once, whose channels are neighbours."""
    tiles: int
    """Of a strip."""
    blocks: int


def forward_strips(columns: int, tiles: int, channels: int, depth: int, processors: int) -> Strips:
    """As many blocks as run at once, each of which goes on from strip to strip.

    Args:
        columns: columns of tiles, of all images.
        tiles: of a column.
        channels: C.
        depth: D, channels of a group.
        processors: of the GPU.
    """
    wide = 32 if depth % 32 == 0 else 16
    parts = channels // wide
    warps = next(n for n in (64 // wide, 2, 1) if parts % n == 0)
    at_once = _AT_ONCE[wide] // warps * processors
    shared = columns * parts // warps
    height = strip_height(shared, tiles, at_once)
    return Strips(wide, warps, height, min(shared * -(-tiles // height), at_once))


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


def _pays(name: str, slices: int, wide: bool) -> bool:
    """Whether a call is large enough for the kernel, and counts in 32 bits."""
    return slices >= PAYS_FROM.get(name, math.inf) and not wide


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

    def macros(self) -> dict[str, int | str]:
        return {
            "BLOCK_COLUMNS": self.columns,
            "BLOCK_ROWS": self.rows,
            "BLOCK_GROUPS": self.groups,
            "VECTOR": self.shape.vector,
            "LANES": self.shape.lanes,
        }


def sorting_block(
    depth: int, dtype: torch.dtype, alignment: int, pixels: int, major: int, deterministic: bool
) -> Block | None:
    """The block of a kernel that sorts corners, or None if such a kernel does not take a call.

    Args:
        depth: D, channels of a slice.
        dtype: of the value.
        alignment: bytes that divide the addresses of all slices, up to 16.
        pixels: of an image, or of all levels.
        major: of the GPU's compute capability.
    """
    columns, rows = 8, 4 if depth == 64 else 8
    # Integers are added one by one: neighbouring threads' then to neighbouring addresses.
    shape = Shape(4 // _bytes(dtype) if deterministic else 4, depth // 8)
    takes = (
        depth in (16, 32, 64)
        and dtype != torch.float64
        and alignment >= 4 * _bytes(dtype)
        and pixels * columns * rows < 1 << 32
        and major >= 8
    )
    return Block(columns, rows, shape) if takes else None


def query_block(depth: int, groups: int, shape: Shape, itemsize: int) -> Block:
    """The block of a kernel that reads what neighbouring queries sample.

    It has as many heads as fill a line of L1: the channels of one head begin in a few banks only.
    """
    heads = math.gcd(groups, max(1, _LINE // (depth * itemsize)))
    queries = MAX_THREADS // (shape.lanes * heads)
    columns = min(8, _lanes(queries))
    return Block(columns, max(1, queries // columns), shape, heads)


def _lanes(wanted: int) -> int:
    """The power of two that holds them, of at most a warp."""
    return min(_WARP, 1 << (wanted - 1).bit_length())


class Plan(NamedTuple):
    """A launch but for its tensors."""

    kernel: compile.Kernel
    blocks: int
    threads: int
    pack: Callable[..., bytes]
    """Makes the structure of the tensors' addresses, its first fields, and the tail."""
    tail: bytes
    """The other fields."""
    device: int
    output: tuple[int, ...] = ()
    """Shape of the forward's result."""
    parts: int = 0
    """Of all tiles, see tile.cuh: of each this launch says whether it leaves it to the next."""
    rest: Plan | None = None
    """Launched next, with the same tensors."""
    early: bool = False
    """Whether it may begin before the launch before has ended, for which the kernel then waits."""

    def __call__(self, *addresses: int) -> None:
        arguments = self.pack(*addresses, self.tail)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        if torch._C._cuda_getDevice() == self.device:
            self.kernel(self.blocks, self.threads, stream, arguments, self.early)
        else:
            with torch.cuda.device(self.device):
                self.kernel(self.blocks, self.threads, stream, arguments, self.early)
        if self.rest is not None:
            self.rest(*addresses)


class _Problem(NamedTuple):
    """What a launch depends on in either operator."""

    groups: int
    depth: int
    points: int
    """Of a slice."""
    softmax: bool
    dtype: torch.dtype
    """Of the value."""
    wide: bool
    """Whether pixels or slices need 64-bit numbers."""
    slices: int
    deterministic: bool
    device: int
    output: tuple[int, ...]
    """Shape of the forward's result."""
    macros: dict[str, int | str]
    """The operator's own."""
    grid: tuple[int, int] | None = None
    """Blocks and threads, where they do not follow from slices."""


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
            bits |= stride * _bytes(self.dtype)
        return bits & -bits

    def vector(self, numbers: int) -> int:
        """How many neighbours are read at once of so many that a pixel begins with."""
        return math.gcd(numbers, self.alignment(*self.pixels) // _bytes(self.dtype))


def layout(tensor: Tensor) -> tuple[Any, ...]:
    """What makes a `Layout`, which a call that has a plan can do without."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() & 15


@lru_cache(_PLANS)
def conv_plan(
    name: str,
    value: Layout | tuple[Any, ...],
    fields: Layout | tuple[Any, ...],
    grad: Layout | tuple[Any, ...] | None,
    window: Window,
    deterministic: bool,
    device: int,
) -> Plan | None:
    value, fields = Layout(*value), Layout(*fields)
    batch, image_height, width, channels = value.shape
    rows, columns = fields.shape[1:3]
    depth, slices = channels // window.groups, batch * rows * columns * window.groups
    if slices == 0 or image_height * width == 0:
        return None
    value_strides, fields_strides = value.pixels, fields.pixels
    alignment = value.alignment(*value_strides)
    head = ""
    numbers: tuple[float, ...] = ()
    if grad is not None:
        grad = Layout(*grad)
        alignment = min(alignment, grad.alignment(*grad.pixels))
        head, numbers = "3q", (*grad.pixels, fields.shape[3])
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = window[:4]
    center_h, center_w = window.center()
    macros: dict[str, int | str] = {
        "FIELDS": _NUMBERS[fields.dtype],
        "KERNEL_H": kh,
        "KERNEL_W": kw,
        "STRIDE_H": sh,
        "STRIDE_W": sw,
        "PADDING_H": ph,
        "PADDING_W": pw,
        "DILATION_H": dh,
        "DILATION_W": dw,
        "CENTER_H": center_h,
        "CENTER_W": center_w,
        "REMOVE_CENTER": int(window.remove_center),
    }
    stride = value_strides[1] * _bytes(value.dtype)
    wide = max(slices >> 2, image_height * width, stride >> 2) >= 1 << 29
    major, processors = _device(device)
    by_tiles, by_sorting = (name.replace("conv", f"conv_{how}") for how in ("tile", "sorted"))
    tiled = _pays(by_tiles, slices, wide) and fits_tiles(
        window, depth, value, fields, alignment, major
    )
    tiles_across, tiles_down = -(-columns // _TILE[0]), -(-rows // _TILE[1])
    all_tiles = batch * tiles_across, tiles_down
    # Without tiles only `wide` counts, which is then a whole group.
    strips = (
        forward_strips(*all_tiles, channels, depth, processors)
        if tiled and grad is None
        else backward_strips(*all_tiles, channels, depth)
    )
    numbers += (value_strides[0], *fields_strides, stride, slices, batch, window.offset_scale)
    numbers += (image_height, width, rows, columns)
    numbers += (strips.tiles, -(-tiles_down // strips.tiles))
    macros |= {"WIDE": strips.wide, "WARPS": strips.warps, "AFTER_TILES": int(tiled)}
    addresses = 4 if grad is None else 7
    structure = f"{head}3q{'3Q' if wide else '3I'}{_sum(value.dtype)}6i"

    def launch(name: str, grid: tuple[int, int] | None) -> Plan:
        problem = _Problem(
            window.groups,
            depth,
            window.points(),
            window.softmax,
            value.dtype,
            wide,
            slices,
            deterministic,
            device,
            (batch, rows, columns, channels),
            macros,
            grid,
        )
        return _plan(name, problem, alignment, addresses, structure, numbers)

    early = _adds_early(grad, deterministic, device)
    first = launch(by_tiles, (strips.blocks, _WARP * strips.warps)) if tiled else None
    grid, resident, block = None, _GATHERING_THREADS, None
    if _pays(by_sorting, slices, wide):
        pixels = image_height * width
        block = sorting_block(depth, value.dtype, alignment, pixels, major, deterministic)
    if block is not None:
        macros |= {**block.macros(), "LEVELS": 1}
        name, resident = by_sorting, _RESIDENT_THREADS
        grid = batch * window.groups * block.blocks(rows, columns), block.threads
    elif tiled:
        grid = math.prod(all_tiles), MAX_THREADS
    if first is None or grid is None:
        return launch(name, grid)._replace(early=early)
    rest = launch(name, (min(grid[0], processors * resident // grid[1]), grid[1]))
    rest = rest._replace(early=compile.overlaps(device))
    parts = math.prod(all_tiles) * (channels // strips.wide)
    return first._replace(parts=parts, rest=rest, early=early)


@lru_cache(_PLANS)
def attn_plan(
    name: str,
    value: Layout | tuple[Any, ...],
    locations: Layout | tuple[Any, ...],
    weights: Layout | tuple[Any, ...],
    grad: Layout | tuple[Any, ...] | None,
    sizes: tuple[int, ...] | None,
    softmax: bool,
    deterministic: bool,
    device: int,
) -> Plan | None:
    value, locations, weights = Layout(*value), Layout(*locations), Layout(*weights)
    batch, length, groups, depth = value.shape
    queries, levels, points = locations.shape[1], locations.shape[3], locations.shape[4]
    slices = batch * queries * groups
    if slices == 0 or length == 0:
        return None
    alignment = value.alignment(*value.strides[:2])
    head = ""
    numbers: tuple[float, ...] = ()
    if grad is not None:
        grad = Layout(*grad)
        alignment = min(alignment, grad.alignment(*grad.pixels))
        head, numbers = "2q", grad.pixels
    pair = 2 * _bytes(locations.dtype)
    macros: dict[str, int | str] = {
        "LOCATIONS": _NUMBERS[locations.dtype],
        "WEIGHTS": _NUMBERS[weights.dtype],
        "LEVELS": levels,
        "LEVEL_POINTS": points,
        "LOCATION_VECTOR": 2 if locations.alignment(*locations.strides[:2]) >= pair else 1,
    }
    stride = value.strides[1] * _bytes(value.dtype)
    wide = max(slices >> 2, length, stride >> 2) >= 1 << 29
    numbers += (value.strides[0], *locations.strides[:2], *weights.strides[:2], length)
    numbers += (stride, slices, queries, *(sizes or (0,) * 2 * levels))
    block = None
    by_sorting = name.replace("attn", "attn_sorted")
    encoder = queries == length
    if encoder and grad is None and _pays(name, slices, wide):
        itemsize = _bytes(value.dtype)
        shape = launch_shape(depth, levels * points, itemsize, alignment, False)
        block = query_block(depth, groups, shape, itemsize)
    elif encoder and _pays(by_sorting, slices, wide):
        major = _device(device)[0]
        block = sorting_block(depth, value.dtype, alignment, length, major, deterministic)
        if block is not None:
            name = by_sorting
            if depth >= 32 and value.dtype in _HALVES and not deterministic:
                macros["RESIDENT_THREADS"] = _RESIDENT_OF_ENCODERS
    grid = None
    if block is not None:
        macros |= block.macros()
        # Sizes that only the GPU knows make more tiles or fewer: blocks stride over them.
        known = sizes or (length // block.columns + 1, block.columns)
        count = sum(map(block.blocks, known[::2], known[1::2]))
        grid = batch * groups // block.groups * max(1, count), block.threads
    plan = _plan(
        name,
        _Problem(
            groups,
            depth,
            levels * points,
            softmax,
            value.dtype,
            wide,
            slices,
            deterministic,
            device,
            (batch, queries, groups * depth),
            macros,
            grid=grid,
        ),
        alignment,
        5 if grad is None else 9,
        f"{head}6q{'3Q' if wide else '3I'}{2 * levels}i",
        numbers,
    )
    return plan._replace(early=_adds_early(grad, deterministic, device))


def _plan(
    name: str,
    problem: _Problem,
    alignment: int,
    addresses: int,
    fields: str,
    numbers: Sequence[float],
) -> Plan:
    """A launch of kernel `name`; `fields` says how `numbers` lie after the tensors' addresses."""
    depth, points, itemsize = problem.depth, problem.points, _bytes(problem.dtype)
    if problem.deterministic:
        alignment = itemsize  # a number a thread: neighbours then add to whole sectors
    vector, lanes = launch_shape(depth, points, itemsize, alignment, "backward" in name)
    macros: dict[str, int | str] = {
        "VALUE": _NUMBERS[problem.dtype],
        "INDEX": _index(problem.wide),
        "GROUPS": problem.groups,
        "DEPTH": depth,
        "POINTS": points,
        "SOFTMAX": int(problem.softmax),
        "DETERMINISTIC": int(problem.deterministic),
        "VECTOR": vector,
        "LANES": lanes,
        **problem.macros,
    }
    grid = problem.grid
    if grid is None:
        threads = block_size(problem.slices * lanes, _device(problem.device)[1])
        grid = -(-problem.slices * lanes // threads), threads
    plan = _launch(name, macros, grid, addresses, fields, numbers, problem.device)
    return plan._replace(output=problem.output)


@lru_cache(_PLANS)
def units_plan(
    grad: Layout | tuple[Any, ...],
    weights: tuple[Layout | tuple[Any, ...], int, int] | None,
    groups: int,
    points: int,
    device: int,
) -> Plan:
    """Of units.cu; `weights` are a tensor's and the other fields of `_Weights`."""
    grad = Layout(*grad)
    images, channels = grad.shape[0], grad.shape[-1]
    rows = math.prod(grad.shape[1:-1])
    held, first, of_group = grad, 0, 1
    if weights is not None:
        held, first, of_group = Layout(*weights[0]), *weights[1:]
    numbers = rows * max(channels, groups * of_group)
    wide = numbers >= 1 << 31
    macros: dict[str, int | str] = {
        "VALUE": _NUMBERS[grad.dtype],
        "WEIGHTS": _NUMBERS[held.dtype],
        "INDEX": _index(wide),
        "GROUPS": groups,
        "CHANNELS": channels,
        "SOFTMAX": int(weights is None),
        "FIRST_WEIGHT": first,
        "WEIGHTS_OF_GROUP": of_group,
        "VECTOR": grad.vector(channels),
        "WEIGHT_VECTOR": held.vector(groups * of_group),
    }
    blocks = max(1, min(numbers >> 14, 8 * _device(device)[1] // images))  # of an image
    grid = blocks * images * (1 if weights is None else 2), MAX_THREADS
    fields = (*grad.pixels, *held.pixels, rows, images, blocks, (rows * points).bit_length())
    layout_of = f"4q{'Q' if wide else 'I'}3i"
    return _launch("units", macros, grid, 4, layout_of, fields, device)


@lru_cache(_PLANS)
def zeros_plan(size: int, device: int) -> Plan:
    """Of zeros.cu; `size` bytes, whole words."""
    blocks = min(-(-size // (16 * MAX_THREADS)), 4 * _device(device)[1])
    return _launch("zeros", {}, (blocks, MAX_THREADS), 1, "q", (size,), device)


@lru_cache(_PLANS)
def totals_plan(
    images: int, count: int, dtype: torch.dtype, deterministic: bool, device: int
) -> Plan:
    """Of totals.cu; `count` numbers an image."""
    vector = math.gcd(4, count)
    blocks = -(-count // (vector * MAX_THREADS))
    macros: dict[str, int | str] = {
        "VALUE": _NUMBERS[dtype],
        "VECTOR": vector,
        "DETERMINISTIC": int(deterministic),
    }
    grid = images * blocks, MAX_THREADS
    plan = _launch("totals", macros, grid, 3, "qi", (count, blocks), device)
    return plan._replace(early=compile.overlaps(device))


def _launch(
    name: str,
    macros: dict[str, int | str],
    grid: tuple[int, int],
    addresses: int,
    fields: str,
    numbers: Sequence[float],
    device: int,
) -> Plan:
    """A launch of kernel `name`; `fields` says how `numbers` lie after the tensors' addresses."""
    tail = struct.pack(f"{fields}0q", *numbers)
    structure = struct.Struct(f"{addresses}P{len(tail)}s")
    macros = {
        "MAX_THREADS": MAX_THREADS,
        "RESIDENT_THREADS": _RESIDENT_THREADS,
        "GATHERING_THREADS": _GATHERING_THREADS,
        "ARGUMENT_BYTES": structure.size,
        **macros,
    }
    kernel = compile.kernel(name, tuple((key, str(macro)) for key, macro in macros.items()), device)
    return Plan(kernel, *grid, structure.pack, tail, device)


def _adds_early(grad: object | None, deterministic: bool, device: int) -> bool:
    """Whether a kernel begins while the zeros to which it adds are still written."""
    return grad is not None and not deterministic and compile.overlaps(device)


def _device(index: int) -> tuple[int, int]:
    """Major compute capability and processors of a GPU."""
    properties = torch.cuda.get_device_properties(index)
    return properties.major, properties.multi_processor_count


def _index(wide: bool) -> str:
    return "unsigned long long" if wide else "unsigned"


def _sum(dtype: torch.dtype) -> str:
    return "d" if dtype == torch.float64 else "f"


def _bytes(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits // 8
