"""CUDA C++ kernels, compiled by NVRTC at the first call for this GPU and these shape constants.

What a kernel is compiled for: numbers of channels, groups, points and levels, the window, dtypes.
What it is told at launch: sizes of batch, image and queries, and strides. So a new image size never
compiles. Tensors are read where they lie if channels are innermost and pixels regularly spaced.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...geometry import Window, sum_dtype
from .. import UNORDERED, Call
from . import compile

_NUMBERS = {
    torch.float64: "double",
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
MAX_THREADS = 256
_WARP = 32
_HALVES = (torch.float16, torch.bfloat16)
_TILE = 8, 4
"""Columns and rows of output pixels in a tile, see tile.cuh."""
_STRIPS = 12  # warps of tile kernels that a processor runs at once, about
_SHARES = 2  # blocks of a direct kernel for what the strips at one place leave
_QUERIES = {16: (16, 8), 32: (8, 8), 64: (8, 4)}
"""By channels of a head, the columns and rows of the queries that a block of `attn_tile_backward`
owns: _SORTING_THREADS threads, one for each query and eight channels."""
_SORTING_THREADS = 256
_RESIDENT_THREADS = 512
"""Threads of that kernel which a processor must have registers for."""
TILED = {"conv_forward": 1 << 15, "conv_backward": 1 << 13, "attn_backward": 1 << 13}
"""Kernels that have one for tiles, and from how many slices on it is used."""
_PLANS = 4096  # launches remembered, one for every set of shapes, strides and settings


def why_not(call: Call) -> str | None:
    """None where this backend can run `call`; otherwise one sentence that says why not."""
    if call.device.type != "cuda":
        return f"needs tensors on a CUDA GPU; got {call.device.type}"
    if call.deterministic and call.dtype == torch.float64:
        return f"{UNORDERED} with float64"
    return compile.why_not(call.device.index)


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
    window: Window, depth: int, value: _Layout, fields: _Layout, alignment: int, major: int
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


def strip_height(columns: int, tiles: int, at_once: int) -> int:
    """How many tiles a warp goes down.

    Args:
        columns: columns of tiles, of all images and groups.
        tiles: of a column.
        at_once: warps that the GPU runs side by side.
    """

    def cost(height: int) -> float:
        """Time, in that of a tile: a strip begins with more rows of the value than it goes on."""
        rounds = -(-columns * -(-tiles // height) // at_once)
        return rounds * (height + 1.5)

    return min(range(1, min(tiles, 64) + 1), key=cost)


def _pays(name: str, slices: int, wide: bool) -> bool:
    """Whether a call is large enough for the kernel's tiles, and counts in 32 bits."""
    return slices >= TILED.get(name, math.inf) and not wide


def _lanes(wanted: int) -> int:
    """The power of two that holds them, of at most a warp."""
    return min(_WARP, 1 << (wanted - 1).bit_length())


class _Plan(NamedTuple):
    """A launch but for its tensors."""

    kernel: compile.Kernel
    blocks: int
    threads: int
    pack: Callable[..., bytes]
    """Makes the structure of the tensors' addresses, its first fields, and the tail."""
    tail: bytes
    """The other fields."""
    device: int
    output: tuple[tuple[int, ...], tuple[int, ...]]
    """Shape and strides of the forward's result."""
    strips: int = 0
    """Of tiles, see tile.cuh: numbers that this launch tells the next."""
    rest: _Plan | None = None
    """Launched next, with the same tensors."""

    def limits(self, beside: Tensor) -> Tensor | None:
        """Where the launch says what it leaves to the next."""
        return beside.new_empty(self.strips, dtype=torch.int32) if self.strips else None

    def __call__(self, *addresses: int) -> None:
        arguments = self.pack(*addresses, self.tail)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        if torch._C._cuda_getDevice() == self.device:
            self.kernel(self.blocks, self.threads, stream, arguments)
        else:
            with torch.cuda.device(self.device):
                self.kernel(self.blocks, self.threads, stream, arguments)
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


class _Layout(NamedTuple):
    """Where the numbers of a tensor lie, as far as a launch depends on it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    address: int
    """Of its first number, modulo 16 bytes."""

    @property
    def pixels(self) -> tuple[int, int]:
        """Strides from image to image, and from pixel to pixel, of a [B, H, W, C] or [B, N, C]."""
        if len(self.shape) == 3 or self.shape[2] == 1:
            return self.strides[0], self.strides[1]
        return self.strides[0], self.strides[2]

    def alignment(self, *strides: int) -> int:
        """Bytes, up to 16, that divide all addresses these strides lead to."""
        bits = self.address | 16
        for stride in strides:
            bits |= stride * _bytes(self.dtype)
        return bits & -bits


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """What makes a `_Layout`, which a call that has a plan can do without."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() & 15


def _pixels(tensor: Tensor) -> Tensor:
    """A [B, H, W, C] as kernels read it: channels innermost, pixels regularly spaced."""
    if tensor.is_contiguous():
        return tensor
    _, height, width, channels = tensor.shape
    _, row, pixel, channel = tensor.stride()
    regular = height == 1 or width == 1 or row == width * pixel
    return tensor if regular and (channel == 1 or channels == 1) else tensor.contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """A [B, N, ...] as kernels read it: what follows N is contiguous."""
    if tensor.is_contiguous():
        return tensor
    expected = 1
    for size, stride in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def conv_forward(value: Tensor, offset_mask: Tensor, window: Window) -> Tensor:
    """[B, Ho, Wo, C]"""
    value, offset_mask = _pixels(value), _pixels(offset_mask)
    plan = _conv_plan(
        "conv_forward",
        _layout(value),
        _layout(offset_mask),
        None,
        window,
        False,
        value.get_device(),
    )
    if plan is None:
        return value.new_zeros((*offset_mask.shape[:3], value.shape[3]))
    output = value.new_empty_strided(*plan.output)
    limits = plan.limits(value)
    plan(
        value.data_ptr(),
        offset_mask.data_ptr(),
        output.data_ptr(),
        0 if limits is None else limits.data_ptr(),
    )
    return output


def conv_backward(
    grad: Tensor, value: Tensor, offset_mask: Tensor, window: Window
) -> tuple[Tensor, Tensor]:
    """Gradients of `value` and `offset_mask`."""
    grad, value, offset_mask = _pixels(grad), _pixels(value), _pixels(offset_mask)
    layouts = _layout(value), _layout(offset_mask), _layout(grad)
    deterministic = torch.are_deterministic_algorithms_enabled()
    plan = _conv_plan("conv_backward", *layouts, window, deterministic, value.get_device())
    if plan is None:
        return value.new_zeros(value.shape), offset_mask.new_zeros(offset_mask.shape)
    grad_mask = torch.empty_like(offset_mask, memory_format=torch.contiguous_format)
    limits = plan.limits(value)

    def run(total: Tensor, units: int) -> None:
        plan(
            value.data_ptr(),
            offset_mask.data_ptr(),
            grad.data_ptr(),
            total.data_ptr(),
            grad_mask.data_ptr(),
            units,
            0 if limits is None else limits.data_ptr(),
        )

    if not deterministic:
        return _summed(value, run), grad_mask
    first, last = 2 * window.points(), 3 * window.points()
    fields = offset_mask[..., : last * window.groups].unflatten(3, (window.groups, last))
    weights = None if window.softmax else fields[..., first:]
    terms = offset_mask.shape[1] * offset_mask.shape[2] * window.points()
    return _summed_in_any_order(value, grad, weights, terms, run), grad_mask


def attn_forward(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    locations: Tensor,
    weights: Tensor,
    softmax: bool,
) -> Tensor:
    """[B, Q, C]"""
    value, locations, weights = _rows(value), _rows(locations), _rows(weights)
    sizes, shapes = _sizes(spatial_shapes)
    layouts = _layout(value), _layout(locations), _layout(weights)
    plan = _attn_plan("attn_forward", *layouts, None, sizes, softmax, False, value.get_device())
    if plan is None:
        return value.new_zeros((*locations.shape[:2], value.shape[2] * value.shape[3]))
    output = value.new_empty_strided(*plan.output)
    plan(
        value.data_ptr(),
        locations.data_ptr(),
        weights.data_ptr(),
        output.data_ptr(),
        0 if shapes is None else shapes.data_ptr(),
    )
    return output


def attn_backward(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    locations: Tensor,
    weights: Tensor,
    softmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `value`, `locations` and `weights`."""
    grad, value = _rows(grad), _rows(value)
    locations, weights = _rows(locations), _rows(weights)
    sizes, shapes = _sizes(spatial_shapes)
    layouts = _layout(value), _layout(locations), _layout(weights), _layout(grad)
    deterministic = torch.are_deterministic_algorithms_enabled()
    plan = _attn_plan("attn_backward", *layouts, sizes, softmax, deterministic, value.get_device())
    if plan is None:
        inputs = value, locations, weights
        grads = [tensor.new_zeros(tensor.shape) for tensor in inputs]
        return grads[0], grads[1], grads[2]
    grad_locations = torch.empty_like(locations, memory_format=torch.contiguous_format)
    grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)

    def run(total: Tensor, units: int) -> None:
        plan(
            value.data_ptr(),
            locations.data_ptr(),
            weights.data_ptr(),
            grad.data_ptr(),
            total.data_ptr(),
            grad_locations.data_ptr(),
            grad_weights.data_ptr(),
            units,
            0 if shapes is None else shapes.data_ptr(),
        )

    if not deterministic:
        return _summed(value, run), grad_locations, grad_weights
    terms = locations.shape[1] * locations.shape[3] * locations.shape[4]
    grad_value = _summed_in_any_order(value, grad, None if softmax else weights, terms, run)
    return grad_value, grad_locations, grad_weights


def _summed(value: Tensor, run: Callable[[Tensor, int], None]) -> Tensor:
    """The gradient of `value`, which `run` adds to zeros."""
    dtype = sum_dtype(value.dtype)
    total = torch.zeros_like(value, dtype=dtype, memory_format=torch.contiguous_format)
    run(total, 0)
    return total.type_as(value)


def _summed_in_any_order(
    value: Tensor,
    grad: Tensor,
    weights: Tensor | None,
    terms: int,
    run: Callable[[Tensor, int], None],
) -> Tensor:
    """The gradient of `value` in the same bits on every run: summed in integers, as multiples of a
    power of two. It is NaN in an image whose `grad` or `weights` are not finite.

    Args:
        value: [B, ...]
        grad: of the output, [B, ...].
        weights: [B, ...], or None where they are at most 1.
        terms: how many products of a gradient and a weight at most add to one number.
        run: adds to integers; the second argument is the address of each image's multiplier.
    """

    def exponent(tensor: Tensor) -> Tensor:
        """The least e with all numbers of an image below 2**e."""
        largest = tensor.abs().flatten(1).amax(1).double()
        return torch.where(largest.isfinite(), torch.frexp(largest).exponent, math.nan)

    weight = 0.0 if weights is None else exponent(weights)
    fits = 62 - terms.bit_length() - weight - exponent(grad)
    # Neither the multiplier nor its product with a weight may overflow in float32.
    scale = torch.minimum(fits, 126 - torch.clamp(torch.as_tensor(weight), min=0))
    units = torch.exp2(scale.clamp(min=-126))
    total = torch.zeros(value.shape, dtype=torch.int64, device=value.device)
    kept = units.float()
    run(total, kept.data_ptr())
    grad_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    shape = -1, *(1,) * (value.dim() - 1)
    return torch.mul(total, (1 / units).view(shape), out=grad_value)


def _sizes(
    spatial_shapes: Tensor | Sequence[Sequence[int]],
) -> tuple[tuple[int, ...] | None, Tensor | None]:
    """The levels' sizes H₀, W₀, H₁, … where the host knows them, otherwise where they lie."""
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.device.type == "cuda":
            return None, spatial_shapes.to(torch.int64).contiguous()
        spatial_shapes = spatial_shapes.tolist()
    return tuple([size for pair in spatial_shapes for size in pair]), None


@lru_cache(_PLANS)
def _conv_plan(
    name: str,
    value: _Layout | tuple[Any, ...],
    fields: _Layout | tuple[Any, ...],
    grad: _Layout | tuple[Any, ...] | None,
    window: Window,
    deterministic: bool,
    device: int,
) -> _Plan | None:
    value, fields = _Layout(*value), _Layout(*fields)
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
        grad = _Layout(*grad)
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
    tiled = _pays(name, slices, wide) and fits_tiles(window, depth, value, fields, alignment, major)
    part, warps = depth, 1  # channels of a strip, and strips of a block
    if tiled and grad is None:
        part = 32 if depth % 32 == 0 else 16
        warps = next(n for n in (64 // part, 2, 1) if channels // part % n == 0)
    across, tiles = -(-columns // _TILE[0]), -(-rows // _TILE[1])
    parts = batch * across * window.groups * (depth // part)
    height = strip_height(parts, tiles, _STRIPS * processors) if tiled else 1
    down = -(-tiles // height)
    numbers += (value_strides[0], *fields_strides, stride, slices, window.offset_scale)
    numbers += (image_height, width, rows, columns, height, across, down)
    macros["WIDE"], macros["WARPS"], macros["SHARES"] = part, warps, _SHARES
    addresses = 4 if grad is None else 7
    layout = f"{head}3q{'2Q' if wide else '2I'}{_sum(value.dtype)}7i"

    def launch(name: str, grid: tuple[int, int] | None = None) -> _Plan:
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
            {**macros, "AFTER_TILES": int(tiled)},
            grid,
        )
        return _plan(name, problem, alignment, addresses, layout, numbers)

    if not tiled:
        return launch(name)
    strips = parts * down
    first = launch(name.replace("conv", "conv_tile"), (strips // warps, _WARP * warps))
    rest = launch(name, (batch * across * down * _SHARES, MAX_THREADS))
    return first._replace(strips=strips, rest=rest)


@lru_cache(_PLANS)
def _attn_plan(
    name: str,
    value: _Layout | tuple[Any, ...],
    locations: _Layout | tuple[Any, ...],
    weights: _Layout | tuple[Any, ...],
    grad: _Layout | tuple[Any, ...] | None,
    sizes: tuple[int, ...] | None,
    softmax: bool,
    deterministic: bool,
    device: int,
) -> _Plan | None:
    value, locations, weights = _Layout(*value), _Layout(*locations), _Layout(*weights)
    batch, length, groups, depth = value.shape
    queries, levels, points = locations.shape[1], locations.shape[3], locations.shape[4]
    slices = batch * queries * groups
    if slices == 0 or length == 0:
        return None
    alignment = value.alignment(*value.strides[:2])
    head = ""
    numbers: tuple[float, ...] = ()
    if grad is not None:
        grad = _Layout(*grad)
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
    grid = None
    if (
        _pays(name, slices, wide)
        and queries == length
        and not deterministic
        and value.dtype != torch.float64
        and depth in _QUERIES
        and levels * points <= depth  # more would sort in many passes
        and length * math.prod(_QUERIES[depth]) < 1 << 32
        and alignment >= 4 * _bytes(value.dtype)
        and _device(device)[0] >= 8
    ):
        name = name.replace("attn", "attn_tile")
        columns, rows = _QUERIES[depth]
        macros |= {
            "TILE_WIDTH": columns,
            "TILE_HEIGHT": rows,
            "RESIDENT_THREADS": _RESIDENT_THREADS,
            "LANES": depth // 8,
            "VECTOR": 4,
        }
        # Sizes that only the GPU knows make more tiles or fewer: blocks stride over them.
        known = sizes or (length // columns + 1, columns)
        pairs = zip(known[::2], known[1::2], strict=True)
        tiles = sum(-(-height // rows) * -(-width // columns) for height, width in pairs)
        grid = batch * groups * max(1, tiles), _SORTING_THREADS
    return _plan(
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


def _plan(
    name: str,
    problem: _Problem,
    alignment: int,
    addresses: int,
    fields: str,
    numbers: Sequence[float],
) -> _Plan:
    """A launch of kernel `name`; `fields` says how `numbers` lie after the tensors' addresses."""
    depth, points, itemsize = problem.depth, problem.points, _bytes(problem.dtype)
    if problem.deterministic:
        alignment = itemsize  # a number a thread: neighbours then add to whole sectors
    vector, lanes = launch_shape(depth, points, itemsize, alignment, "backward" in name)
    tail = struct.pack(f"{fields}0q", *numbers)
    structure = struct.Struct(f"{addresses}P{len(tail)}s")
    macros = {
        "VALUE": _NUMBERS[problem.dtype],
        "INDEX": "unsigned long long" if problem.wide else "unsigned",
        "GROUPS": problem.groups,
        "DEPTH": depth,
        "POINTS": points,
        "SOFTMAX": int(problem.softmax),
        "DETERMINISTIC": int(problem.deterministic),
        "VECTOR": vector,
        "LANES": lanes,
        "MAX_THREADS": MAX_THREADS,
        "ARGUMENT_BYTES": structure.size,
        **problem.macros,
    }
    device = problem.device
    kernel = compile.kernel(name, tuple((key, str(macro)) for key, macro in macros.items()), device)
    if problem.grid:
        blocks, threads = problem.grid
    else:
        threads = block_size(problem.slices * lanes, _device(device)[1])
        blocks = -(-problem.slices * lanes // threads)
    strides = tuple(math.prod(problem.output[i + 1 :]) for i in range(len(problem.output)))
    output = problem.output, strides
    return _Plan(kernel, blocks, threads, structure.pack, tail, device, output)


def _device(index: int) -> tuple[int, int]:
    """Major compute capability and processors of a GPU."""
    properties = torch.cuda.get_device_properties(index)
    return properties.major, properties.multi_processor_count


def _sum(dtype: torch.dtype) -> str:
    return "d" if dtype == torch.float64 else "f"


def _bytes(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits // 8
