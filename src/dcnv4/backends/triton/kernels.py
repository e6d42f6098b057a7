"""The Triton kernels, one forward and one backward for both operators: the only file that imports
Triton.

A row is one (output pixel, group): the points of a group give it D channels. A program handles
BLOCK rows as a tile [BLOCK, BLOCK_D] and walks over their points; each point gathers its four
corners for the whole tile. What a row needs once (coordinates, corner weights) is a vector [BLOCK].
The rows of a program are consecutive pixels of BLOCK_G neighbouring groups, so that they share
memory lines. The gradients of coordinates and weights belong to their row and are stored once; that
of the value is summed by atomic additions, which limit the backward. The forward is limited by
instruction issue and by the gathers' way through L1.

A convolution is one level, the image, whose points start at the cells of a kernel around the pixel
of their window; `offset_mask` holds their coordinates and weights. It is the call without `shapes`.
A location of attention starts at no cell, its origin is pixel 0, and the levels' sizes scale it; an
offset starts at a reference point of its query.

Nothing here is specific to one maker's GPUs, but it was run on NVIDIA's alone: untested on AMD and
Intel. Everything a compilation depends on (`tl.constexpr`) describes a layer, never a batch or an
image: a new image size compiles nothing. INDEX is int64 where offsets in elements need it; rows and
columns of pixels are int32. Tuples as arguments, which would shorten the lists, need Triton 3.3.
"""

# ruff: noqa: N803, N806  (capitals: what a compilation depends on)
from __future__ import annotations

import triton
import triton.language as tl


def is_interpreted() -> bool:
    """Whether Triton runs these kernels on the CPU: `TRITON_INTERPRET=1` when it was imported."""
    return not isinstance(forward, triton.JITFunction)


SIZES = [
    *("rows", "columns", "height", "width", "pixels"),
    *("reference_image", "reference_query", "reference_level"),
]
"""What no kernel is compiled for."""

OUTSIDE = tl.constexpr(float("inf"))
"""The coordinate of points of rows past the last: they read nothing and add nothing."""


@triton.jit
def _around(x, origin, size):
    """geometry._around, along one axis: the pixel at or before each point origin + x, the fraction
    of a pixel from it, and whether that pixel and the next count.

    In float32 the bounds of x are exact below 2²⁴. For a point that is farther from its origin, in
    an image that is as large, the comparisons of integers keep corners in the image.
    """
    inside = (x > (-1 - origin).to(x.dtype)) & (x < (size - origin).to(x.dtype))
    x = tl.where(inside, x, 0.0)
    floor = tl.math.floor(x)
    before = origin + floor.to(tl.int32)
    legal = inside & (before.to(tl.uint32) < size.to(tl.uint32))
    next_legal = inside & ((before + 1).to(tl.uint32) < size.to(tl.uint32))
    return before, x - floor, legal, next_legal


@triton.jit
def _corners(x, y, origin_x, origin_y, height, width, INDEX: tl.constexpr):
    """geometry.corners: the top left corner, the fractions, and which of the four are legal."""
    column, fraction_x, left, right = _around(x, origin_x, width)
    row, fraction_y, top, bottom = _around(y, origin_y, height)
    pixel = row.to(INDEX) * width + column
    return pixel, fraction_x, fraction_y, top & left, top & right, bottom & left, bottom & right


@triton.jit
def _coefficients(weight, fraction_x, fraction_y):
    """geometry.coefficients"""
    top, bottom = weight * (1 - fraction_y), weight * fraction_y
    left = 1 - fraction_x
    return top * left, top * fraction_x, bottom * left, bottom * fraction_x


@triton.jit
def _lerp(start, end, fraction):
    return start + fraction * (end - start)


@triton.jit
def _coefficients_backward(
    top_left, top_right, bottom_left, bottom_right, weight, fraction_x, fraction_y
):
    """geometry.coefficients_backward: the gradients of x, y and the weight."""
    top = _lerp(top_left, top_right, fraction_x)
    bottom = _lerp(bottom_left, bottom_right, fraction_x)
    slope_x = _lerp(top_right - top_left, bottom_right - bottom_left, fraction_y)
    return weight * slope_x, weight * (bottom - top), _lerp(top, bottom, fraction_y)


@triton.jit
def _add_corner(total, pointers, legal, channel, coefficient):
    """Add one corner of every row to `total` [BLOCK, BLOCK_D]."""
    mask = legal[:, None] & channel[None, :]
    return total + coefficient[:, None] * tl.load(pointers, mask=mask, other=0.0).to(total.dtype)


@triton.jit
def _sample(
    total,
    image,
    channel,
    x,
    y,
    origin_x,
    origin_y,
    weight,
    height,
    width,
    STRIDE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Add every row's weighted sample, (x, y) from its origin, to `total` [BLOCK, BLOCK_D].

    `image` [BLOCK, BLOCK_D] points at the channels of each row's first pixel; its pixels are STRIDE
    elements apart.
    """
    pixel, fraction_x, fraction_y, legal_tl, legal_tr, legal_bl, legal_br = _corners(
        x, y, origin_x, origin_y, height, width, INDEX
    )
    c_tl, c_tr, c_bl, c_br = _coefficients(weight, fraction_x, fraction_y)
    at = image + (pixel * STRIDE)[:, None]
    below = at + width.to(INDEX) * STRIDE
    total = _add_corner(total, at, legal_tl, channel, c_tl)
    total = _add_corner(total, at + STRIDE, legal_tr, channel, c_tr)
    total = _add_corner(total, below, legal_bl, channel, c_bl)
    return _add_corner(total, below + STRIDE, legal_br, channel, c_br)


@triton.jit
def _corner_backward(pointers, grad_pointers, legal, channel, coefficient, grad):
    """Add to the value's gradient at one corner; return the gradient of its coefficient."""
    mask = legal[:, None] & channel[None, :]
    slope = tl.sum(tl.load(pointers, mask=mask, other=0.0).to(grad.dtype) * grad, 1)
    tl.atomic_add(grad_pointers, coefficient[:, None] * grad, mask=mask, sem="relaxed")
    return slope


@triton.jit
def _sample_backward(
    grad,
    image,
    grad_image,
    channel,
    x,
    y,
    origin_x,
    origin_y,
    weight,
    height,
    width,
    STRIDE: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Add to the value's gradient; return the gradients [BLOCK] of x, y and the weight.

    `grad` [BLOCK, BLOCK_D] is that of the rows' sums; `grad_image` is to the value's gradient what
    `image` is to the value.
    """
    pixel, fraction_x, fraction_y, legal_tl, legal_tr, legal_bl, legal_br = _corners(
        x, y, origin_x, origin_y, height, width, INDEX
    )
    c_tl, c_tr, c_bl, c_br = _coefficients(weight, fraction_x, fraction_y)
    at, to = image + (pixel * STRIDE)[:, None], grad_image + (pixel * GRAD_STRIDE)[:, None]
    below, to_below = at + width.to(INDEX) * STRIDE, to + width.to(INDEX) * GRAD_STRIDE
    right, to_right = at + STRIDE, to + GRAD_STRIDE
    below_right, to_below_right = below + STRIDE, to_below + GRAD_STRIDE
    return _coefficients_backward(
        _corner_backward(at, to, legal_tl, channel, c_tl, grad),
        _corner_backward(right, to_right, legal_tr, channel, c_tr, grad),
        _corner_backward(below, to_below, legal_bl, channel, c_bl, grad),
        _corner_backward(below_right, to_below_right, legal_br, channel, c_br, grad),
        weight,
        fraction_x,
        fraction_y,
    )


@triton.jit
def _rows(
    pixels,
    GROUPS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The rows of this program: which exist, their pixels and groups; and which channels exist."""
    program = tl.program_id(0)
    bundles: tl.constexpr = GROUPS // BLOCK_G
    row = (program // bundles).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    pixel, group = row // BLOCK_G, program % bundles * BLOCK_G + row % BLOCK_G
    return pixel < pixels, pixel, group, tl.arange(0, BLOCK_D) < DEPTH


@triton.jit
def _tile(pixel, group, STRIDE: tl.constexpr, DEPTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets [BLOCK, BLOCK_D] of the rows' channels in a tensor [pixels, STRIDE]."""
    return (pixel * STRIDE + group * DEPTH)[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _logits(logits, exists, slot, COUNT: tl.constexpr, ACC: tl.constexpr):
    """The COUNT logits of every row [BLOCK, BLOCK_K]; `slot` counts the columns."""
    mask = exists[:, None] & (slot < COUNT)[None, :]
    return tl.load(logits[:, None] + slot[None, :], mask=mask, other=-float("inf")).to(ACC)


@triton.jit
def _softmax_norm(logits):
    """Maximum and 1 / Σ exp(· - maximum) of every row [BLOCK] of logits [BLOCK, BLOCK_K]."""
    peak = tl.max(logits, 1)
    return peak, 1 / tl.sum(tl.exp(logits - peak[:, None]), 1)


@triton.jit
def _softmax_backward(grad, logits, peak, norm):
    """geometry.softmax_backward [BLOCK, BLOCK_K]"""
    weights = tl.exp(logits - peak[:, None]) * norm[:, None]
    return weights * (grad - tl.sum(grad * weights, 1)[:, None])


@triton.jit
def _put(results, slot, k, column):
    """Column k of `results` [BLOCK, BLOCK_K] replaced: results are kept to be stored together."""
    return tl.where((slot == k)[None, :], column[:, None], results)


@triton.jit
def _weight(logits, exists, peak, norm, SOFTMAX: tl.constexpr):
    """The weights [BLOCK] of one point."""
    weight = tl.load(logits, mask=exists, other=0.0).to(norm.dtype)
    if SOFTMAX:
        weight = tl.exp(weight - peak) * norm
    return weight


@triton.jit
def _windows(
    pixel,
    rows,
    columns,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ORIGIN_H: tl.constexpr,
    ORIGIN_W: tl.constexpr,
):
    """Window.origins of output pixels, (x, y), and their images; ORIGIN is that of pixel 0."""
    line = pixel // columns
    origin_x = (pixel % columns * STRIDE_W + ORIGIN_W).to(tl.int32)
    origin_y = (line % rows * STRIDE_H + ORIGIN_H).to(tl.int32)
    return origin_x, origin_y, line // rows


@triton.jit
def _arguments(
    coordinates,
    weights,
    pixel,
    group,
    COORDINATES_STRIDE: tl.constexpr,
    WEIGHTS_STRIDE: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Where the coordinates and the weights of every row begin; without `weights`, both lie in
    `offset_mask`."""
    if weights is None:
        coordinates += pixel * COORDINATES_STRIDE + group * (3 * COUNT)
        weights = coordinates + 2 * COUNT
    else:
        coordinates += pixel * COORDINATES_STRIDE + group * (2 * COUNT)
        weights += pixel * WEIGHTS_STRIDE + group * COUNT
    return coordinates, weights


@triton.jit
def _level(shapes, level, start, height, width):
    """Height and width of a level that begins at pixel `start`, and where the next one begins.

    A level that does not fit in the value's height·width pixels counts as empty, as do all after
    it: shapes that only the device knows must not make a kernel read elsewhere. Without `shapes`,
    the level is the image.
    """
    end = start
    if shapes is not None:
        length = height * width
        height = tl.load(shapes + 2 * level).to(tl.int64)
        width = tl.load(shapes + 2 * level + 1).to(tl.int64)
        sane = (height >= 0) & (width >= 0) & (height <= length) & (width <= length)
        end = tl.where(sane, start + height * width, length + 1)
        fits = end <= length
        height = tl.where(fits, height, 0).to(tl.int32)
        width = tl.where(fits, width, 0).to(tl.int32)
        end = tl.where(fits, end, length + 1)
    return height, width, end


@triton.jit
def _map(
    reference,
    exists,
    height,
    width,
    POINTS: tl.constexpr,
    SCALE: tl.constexpr,
    REFERENCE_NUMBERS: tl.constexpr,
    BOX_BY_SIZE: tl.constexpr,
    ACC: tl.constexpr,
):
    """How many pixels an x and a y of 1 is, and what is added to it: `offset_scale` and nothing of
    a convolution; otherwise geometry.attn_map."""
    scale_x, scale_y = width.to(ACC), height.to(ACC)
    shift_x = tl.full([], -0.5, ACC)
    shift_y = shift_x
    if SCALE is not None:
        scale_x, shift_x = tl.full([], SCALE, ACC), tl.full([], 0, ACC)
        scale_y, shift_y = scale_x, shift_x
    elif REFERENCE_NUMBERS is not None:
        shift_x += scale_x * tl.load(reference, mask=exists, other=0.0).to(ACC)
        shift_y += scale_y * tl.load(reference + 1, mask=exists, other=0.0).to(ACC)
        if REFERENCE_NUMBERS == 2:
            scale_x = tl.full([], 1, ACC)
            scale_y = scale_x
        else:
            if BOX_BY_SIZE:
                scale_x = tl.full([], 0.5, ACC)
                scale_y = scale_x
            else:
                scale_x, scale_y = scale_x * (0.5 / POINTS), scale_y * (0.5 / POINTS)
            scale_x *= tl.load(reference + 2, mask=exists, other=1.0).to(ACC)
            scale_y *= tl.load(reference + 3, mask=exists, other=1.0).to(ACC)
    return scale_x, scale_y, shift_x, shift_y


@triton.jit
def _point(
    coordinates,
    exists,
    k,
    scale_x,
    scale_y,
    shift_x,
    shift_y,
    KERNEL_H: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CENTER_H: tl.constexpr,
    CENTER_W: tl.constexpr,
    REMOVED: tl.constexpr,
):
    """x and y of point k of every row, from its origin: geometry.conv_points or attn_points."""
    x = tl.load(coordinates + 2 * k, mask=exists, other=OUTSIDE).to(scale_x.dtype)
    y = tl.load(coordinates + 2 * k + 1, mask=exists, other=OUTSIDE).to(scale_y.dtype)
    if KERNEL_H is None:
        x, y = x * scale_x + shift_x, y * scale_y + shift_y
    else:
        cell = k
        if REMOVED is not None:
            cell = tl.where(k < REMOVED, k, k + 1)
        x = scale_x * (cell // KERNEL_H * DILATION_W - CENTER_W + x)
        y = scale_y * (cell % KERNEL_H * DILATION_H - CENTER_H + y)
    return x, y


@triton.jit(do_not_specialize=SIZES)
def forward(
    value,
    coordinates,
    weights,
    shapes,
    reference,
    output,
    rows,
    columns,
    height,
    width,
    pixels,
    reference_image,
    reference_query,
    reference_level,
    GROUPS: tl.constexpr,
    DEPTH: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    COORDINATES_STRIDE: tl.constexpr,
    OUTPUT_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    WEIGHTS_STRIDE: tl.constexpr = None,
    REFERENCE_NUMBERS: tl.constexpr = None,
    BOX_BY_SIZE: tl.constexpr = None,
    SCALE: tl.constexpr = None,
    STRIDE_H: tl.constexpr = None,
    STRIDE_W: tl.constexpr = None,
    ORIGIN_H: tl.constexpr = None,
    ORIGIN_W: tl.constexpr = None,
    KERNEL_H: tl.constexpr = None,
    DILATION_H: tl.constexpr = None,
    DILATION_W: tl.constexpr = None,
    CENTER_H: tl.constexpr = None,
    CENTER_W: tl.constexpr = None,
    REMOVED: tl.constexpr = None,
):
    """Either operator of `value` [B, height, width, C] for `pixels` = B·rows·columns outputs.

    Of attention, `rows` are the queries and `height` the pixels of all levels; columns and width
    are 1. `reference_image` and the like are strides of the reference points, 0 where they are the
    same for all.
    """
    COUNT: tl.constexpr = LEVELS * POINTS
    exists, pixel, group, channel = _rows(pixels, GROUPS, DEPTH, BLOCK, BLOCK_G, BLOCK_D, INDEX)
    if shapes is None:
        origin_x, origin_y, batch = _windows(
            pixel, rows, columns, STRIDE_H, STRIDE_W, ORIGIN_H, ORIGIN_W
        )
    else:
        origin_x = tl.zeros([BLOCK], tl.int32)
        origin_y, batch = origin_x, pixel // rows
    first = batch * height * width
    image = value + _tile(first, group, VALUE_STRIDE, DEPTH, BLOCK_D)
    coordinates, weights = _arguments(
        coordinates, weights, pixel, group, COORDINATES_STRIDE, WEIGHTS_STRIDE, COUNT
    )
    if reference is not None:
        reference += batch * reference_image + (pixel - batch * rows) * reference_query
    peak = tl.zeros([BLOCK], ACC)
    norm = peak
    if SOFTMAX:
        peak, norm = _softmax_norm(_logits(weights, exists, tl.arange(0, BLOCK_K), COUNT, ACC))
    total = tl.zeros([BLOCK, BLOCK_D], ACC)
    start = tl.full([], 0, tl.int64)
    for level in range(LEVELS):
        level_h, level_w, end = _level(shapes, level, start, height, width)
        scale_x, scale_y, shift_x, shift_y = _map(
            reference,
            exists,
            level_h,
            level_w,
            POINTS,
            SCALE,
            REFERENCE_NUMBERS,
            BOX_BY_SIZE,
            ACC,
        )
        plane = image + start.to(INDEX) * VALUE_STRIDE
        for first_point in range(0, POINTS, CHUNK):
            for at in tl.static_range(CHUNK):
                k = level * POINTS + first_point + at
                x, y = _point(
                    coordinates,
                    exists,
                    k,
                    scale_x,
                    scale_y,
                    shift_x,
                    shift_y,
                    KERNEL_H,
                    DILATION_H,
                    DILATION_W,
                    CENTER_H,
                    CENTER_W,
                    REMOVED,
                )
                weight = _weight(weights + k, exists, peak, norm, SOFTMAX)
                total = _sample(
                    total,
                    plane,
                    channel,
                    x,
                    y,
                    origin_x,
                    origin_y,
                    weight,
                    level_h,
                    level_w,
                    VALUE_STRIDE,
                    INDEX,
                )
        start = end
        if reference is not None:
            reference += reference_level
    to = output + _tile(pixel, group, OUTPUT_STRIDE, DEPTH, BLOCK_D)
    tl.store(to, total.to(output.dtype.element_ty), mask=exists[:, None] & channel[None, :])


@triton.jit(do_not_specialize=SIZES)
def backward(
    grad_output,
    value,
    coordinates,
    weights,
    shapes,
    reference,
    grad_value,
    grad_coordinates,
    grad_weights,
    rows,
    columns,
    height,
    width,
    pixels,
    reference_image,
    reference_query,
    reference_level,
    GROUPS: tl.constexpr,
    DEPTH: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    COORDINATES_STRIDE: tl.constexpr,
    GRAD_OUTPUT_STRIDE: tl.constexpr,
    GRAD_VALUE_STRIDE: tl.constexpr,
    GRAD_COORDINATES_STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    WEIGHTS_STRIDE: tl.constexpr = None,
    GRAD_WEIGHTS_STRIDE: tl.constexpr = None,
    REFERENCE_NUMBERS: tl.constexpr = None,
    BOX_BY_SIZE: tl.constexpr = None,
    SCALE: tl.constexpr = None,
    STRIDE_H: tl.constexpr = None,
    STRIDE_W: tl.constexpr = None,
    ORIGIN_H: tl.constexpr = None,
    ORIGIN_W: tl.constexpr = None,
    KERNEL_H: tl.constexpr = None,
    DILATION_H: tl.constexpr = None,
    DILATION_W: tl.constexpr = None,
    CENTER_H: tl.constexpr = None,
    CENTER_W: tl.constexpr = None,
    REMOVED: tl.constexpr = None,
):
    """Add to `grad_value`, in the dtype of the sums; write the gradients of the others.

    What `offset_mask` has beyond its points gets zeros.
    """
    COUNT: tl.constexpr = LEVELS * POINTS
    exists, pixel, group, channel = _rows(pixels, GROUPS, DEPTH, BLOCK, BLOCK_G, BLOCK_D, INDEX)
    if shapes is None:
        origin_x, origin_y, batch = _windows(
            pixel, rows, columns, STRIDE_H, STRIDE_W, ORIGIN_H, ORIGIN_W
        )
    else:
        origin_x = tl.zeros([BLOCK], tl.int32)
        origin_y, batch = origin_x, pixel // rows
    first = batch * height * width
    image = value + _tile(first, group, VALUE_STRIDE, DEPTH, BLOCK_D)
    grad_image = grad_value + _tile(first, group, GRAD_VALUE_STRIDE, DEPTH, BLOCK_D)
    coordinates, weights = _arguments(
        coordinates, weights, pixel, group, COORDINATES_STRIDE, WEIGHTS_STRIDE, COUNT
    )
    if reference is not None:
        reference += batch * reference_image + (pixel - batch * rows) * reference_query
    at_output = grad_output + _tile(pixel, group, GRAD_OUTPUT_STRIDE, DEPTH, BLOCK_D)
    grad = tl.load(at_output, mask=exists[:, None] & channel[None, :], other=0.0).to(ACC)
    slot = tl.arange(0, BLOCK_K)
    peak = tl.zeros([BLOCK], ACC)
    norm = peak
    if SOFTMAX:
        peak, norm = _softmax_norm(_logits(weights, exists, slot, COUNT, ACC))
    grads_x = tl.zeros([BLOCK, BLOCK_K], ACC)
    grads_y, grads_weight = grads_x, grads_x
    start = tl.full([], 0, tl.int64)
    for level in range(LEVELS):
        level_h, level_w, end = _level(shapes, level, start, height, width)
        scale_x, scale_y, shift_x, shift_y = _map(
            reference,
            exists,
            level_h,
            level_w,
            POINTS,
            SCALE,
            REFERENCE_NUMBERS,
            BOX_BY_SIZE,
            ACC,
        )
        plane = image + start.to(INDEX) * VALUE_STRIDE
        grad_plane = grad_image + start.to(INDEX) * GRAD_VALUE_STRIDE
        for first_point in range(0, POINTS, CHUNK):
            for at in tl.static_range(CHUNK):
                k = level * POINTS + first_point + at
                x, y = _point(
                    coordinates,
                    exists,
                    k,
                    scale_x,
                    scale_y,
                    shift_x,
                    shift_y,
                    KERNEL_H,
                    DILATION_H,
                    DILATION_W,
                    CENTER_H,
                    CENTER_W,
                    REMOVED,
                )
                weight = _weight(weights + k, exists, peak, norm, SOFTMAX)
                grad_x, grad_y, grad_weight = _sample_backward(
                    grad,
                    plane,
                    grad_plane,
                    channel,
                    x,
                    y,
                    origin_x,
                    origin_y,
                    weight,
                    level_h,
                    level_w,
                    VALUE_STRIDE,
                    GRAD_VALUE_STRIDE,
                    INDEX,
                )
                grads_x = _put(grads_x, slot, k, grad_x * scale_x)
                grads_y = _put(grads_y, slot, k, grad_y * scale_y)
                grads_weight = _put(grads_weight, slot, k, grad_weight)
        start = end
        if reference is not None:
            reference += reference_level
    if SOFTMAX:
        logits = _logits(weights, exists, slot, COUNT, ACC)
        grads_weight = _softmax_backward(grads_weight, logits, peak, norm)
    to_coordinates, to_weights = _arguments(
        grad_coordinates,
        grad_weights,
        pixel,
        group,
        GRAD_COORDINATES_STRIDE,
        GRAD_WEIGHTS_STRIDE,
        COUNT,
    )
    mask = exists[:, None] & (slot < COUNT)[None, :]
    to = to_coordinates[:, None] + 2 * slot[None, :]
    tl.store(to, grads_x.to(to.dtype.element_ty), mask=mask)
    tl.store(to + 1, grads_y.to(to.dtype.element_ty), mask=mask)
    to = to_weights[:, None] + slot[None, :]
    tl.store(to, grads_weight.to(to.dtype.element_ty), mask=mask)
    if grad_weights is None:
        padding = exists & (group == GROUPS - 1)
        for place in range(3 * GROUPS * COUNT, CHANNELS):
            to_padding = grad_coordinates + pixel * GRAD_COORDINATES_STRIDE + place
            tl.store(to_padding, 0.0, mask=padding)
