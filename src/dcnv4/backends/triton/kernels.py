"""The Triton kernels of both operators: the only file that imports Triton.

A row is one (output pixel, group): the points of a group give it D channels. A program handles
BLOCK rows as a tile [BLOCK, BLOCK_D] and walks over their points; each point gathers its four
corners for the whole tile. What a row needs once (coordinates, corner weights) is a vector [BLOCK].
The rows of a program are consecutive pixels of BLOCK_G neighbouring groups, so that they share
memory lines. The gradients of coordinates and weights belong to their row and are stored once; that
of the value is summed by atomic additions, which limit the backward. The forward is limited by
instruction issue and by the gathers' way through L1.

Nothing here is specific to one maker's GPUs, but it was run on NVIDIA's alone: untested on AMD and
Intel. Everything a compilation depends on (`tl.constexpr`) describes a layer, never a batch or an
image: a new image size compiles nothing. INDEX is int64 where offsets in elements need it.
"""

# ruff: noqa: N803, N806  (capitals: what a compilation depends on)
from __future__ import annotations

import triton
import triton.language as tl


def is_interpreted() -> bool:
    """Whether Triton runs these kernels on the CPU: `TRITON_INTERPRET=1` when it was imported."""
    return not isinstance(conv_forward, triton.JITFunction)


OUTSIDE = tl.constexpr(float("inf"))
"""The coordinate of points of rows past the last: they read nothing and add nothing."""


@triton.jit
def _corners(x, y, height, width, INDEX: tl.constexpr):
    """geometry.corners: the top left corner, the fractions, and which of the four are legal."""
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)
    x, y = tl.where(inside, x, 0.0), tl.where(inside, y, 0.0)
    left, top = tl.math.floor(x), tl.math.floor(y)
    column, row = left.to(INDEX), top.to(INDEX)
    legal_left, legal_right = inside & (column >= 0), inside & (column < width - 1)
    legal_top, legal_bottom = row >= 0, row < height - 1
    return (
        row * width + column,
        x - left,
        y - top,
        legal_top & legal_left,
        legal_top & legal_right,
        legal_bottom & legal_left,
        legal_bottom & legal_right,
    )


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
    total, image, channel, x, y, weight, height, width, STRIDE: tl.constexpr, INDEX: tl.constexpr
):
    """Add every row's weighted sample at (x, y) to `total` [BLOCK, BLOCK_D].

    `image` [BLOCK, BLOCK_D] points at the channels of each row's first pixel; its pixels are STRIDE
    elements apart.
    """
    pixel, fraction_x, fraction_y, legal_tl, legal_tr, legal_bl, legal_br = _corners(
        x, y, height, width, INDEX
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
        x, y, height, width, INDEX
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
def _softmax_scale(logits):
    """Maximum and 1 / Σ exp(· - maximum) of every row [BLOCK] of logits [BLOCK, BLOCK_K]."""
    peak = tl.max(logits, 1)
    return peak, 1 / tl.sum(tl.exp(logits - peak[:, None]), 1)


@triton.jit
def _softmax_backward(grad, logits, peak, scale):
    """geometry.softmax_backward [BLOCK, BLOCK_K]"""
    weights = tl.exp(logits - peak[:, None]) * scale[:, None]
    return weights * (grad - tl.sum(grad * weights, 1)[:, None])


@triton.jit
def _put(results, slot, k, column):
    """Column k of `results` [BLOCK, BLOCK_K] replaced: results are kept to be stored together."""
    return tl.where((slot == k)[None, :], column[:, None], results)


@triton.jit
def _weight(logits, exists, peak, scale, SOFTMAX: tl.constexpr):
    """The weights [BLOCK] of one point."""
    weight = tl.load(logits, mask=exists, other=0.0).to(scale.dtype)
    if SOFTMAX:
        weight = tl.exp(weight - peak) * scale
    return weight


@triton.jit
def _conv_point(
    fields,
    exists,
    k,
    origin_x,
    origin_y,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    SCALE: tl.constexpr,
    REMOVE_CENTER: tl.constexpr,
):
    """geometry.conv_points: x and y of point k of rows whose windows' centres are the origins."""
    ACC: tl.constexpr = origin_x.dtype
    cell = k
    if REMOVE_CENTER:
        cell = tl.where(k < KERNEL_W // 2 * KERNEL_H + KERNEL_H // 2, k, k + 1)
    base_x = cell // KERNEL_H * DILATION_W - DILATION_W * (KERNEL_W - 1) // 2
    base_y = cell % KERNEL_H * DILATION_H - DILATION_H * (KERNEL_H - 1) // 2
    offset_x = tl.load(fields + 2 * k, mask=exists, other=OUTSIDE).to(ACC)
    offset_y = tl.load(fields + 2 * k + 1, mask=exists, other=OUTSIDE).to(ACC)
    scale = tl.full([1], SCALE, ACC)
    return origin_x + scale * (base_x + offset_x), origin_y + scale * (base_y + offset_y)


@triton.jit
def _conv_rows(
    pixel,
    height,
    width,
    rows,
    columns,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ACC: tl.constexpr,
):
    """Of output pixels: their images' first pixels, and Window.origins."""
    line = pixel // columns
    center_x: tl.constexpr = DILATION_W * (KERNEL_W - 1) // 2 - PADDING_W
    center_y: tl.constexpr = DILATION_H * (KERNEL_H - 1) // 2 - PADDING_H
    return (
        line // rows * height * width,
        (pixel % columns * STRIDE_W + center_x).to(ACC),
        (line % rows * STRIDE_H + center_y).to(ACC),
    )


@triton.jit(do_not_specialize=["height", "width", "rows", "columns", "pixels"])
def conv_forward(
    value,
    offset_mask,
    output,
    height,
    width,
    rows,
    columns,
    pixels,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    GROUPS: tl.constexpr,
    SCALE: tl.constexpr,
    REMOVE_CENTER: tl.constexpr,
    SOFTMAX: tl.constexpr,
    DEPTH: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    FIELDS_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """deform_conv of `value` [B, height, width, C] at `pixels` = B·rows·columns output pixels."""
    POINTS: tl.constexpr = KERNEL_H * KERNEL_W - REMOVE_CENTER
    exists, pixel, group, channel = _rows(pixels, GROUPS, DEPTH, BLOCK, BLOCK_G, BLOCK_D, INDEX)
    first, origin_x, origin_y = _conv_rows(
        pixel,
        height,
        width,
        rows,
        columns,
        KERNEL_H,
        KERNEL_W,
        STRIDE_H,
        STRIDE_W,
        PADDING_H,
        PADDING_W,
        DILATION_H,
        DILATION_W,
        ACC,
    )
    image = value + _tile(first, group, VALUE_STRIDE, DEPTH, BLOCK_D)
    fields = offset_mask + pixel * FIELDS_STRIDE + group * (3 * POINTS)
    weights = fields + 2 * POINTS
    peak, scale = origin_x, origin_x
    if SOFTMAX:
        peak, scale = _softmax_scale(_logits(weights, exists, tl.arange(0, BLOCK_K), POINTS, ACC))
    total = tl.zeros([BLOCK, BLOCK_D], ACC)
    for start in range(0, POINTS, CHUNK):
        for at in tl.static_range(CHUNK):
            k = start + at
            x, y = _conv_point(
                fields,
                exists,
                k,
                origin_x,
                origin_y,
                KERNEL_H,
                KERNEL_W,
                DILATION_H,
                DILATION_W,
                SCALE,
                REMOVE_CENTER,
            )
            weight = _weight(weights + k, exists, peak, scale, SOFTMAX)
            total = _sample(total, image, channel, x, y, weight, height, width, VALUE_STRIDE, INDEX)
    to = output + _tile(pixel, group, GROUPS * DEPTH, DEPTH, BLOCK_D)
    tl.store(to, total.to(output.dtype.element_ty), mask=exists[:, None] & channel[None, :])


@triton.jit(do_not_specialize=["height", "width", "rows", "columns", "pixels"])
def conv_backward(
    grad_output,
    value,
    offset_mask,
    grad_value,
    grad_offset_mask,
    height,
    width,
    rows,
    columns,
    pixels,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    GROUPS: tl.constexpr,
    SCALE: tl.constexpr,
    REMOVE_CENTER: tl.constexpr,
    SOFTMAX: tl.constexpr,
    DEPTH: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    FIELDS_STRIDE: tl.constexpr,
    FIELDS: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Add to `grad_value`, in the dtype of the sums, and write all FIELDS of `grad_offset_mask`."""
    POINTS: tl.constexpr = KERNEL_H * KERNEL_W - REMOVE_CENTER
    exists, pixel, group, channel = _rows(pixels, GROUPS, DEPTH, BLOCK, BLOCK_G, BLOCK_D, INDEX)
    first, origin_x, origin_y = _conv_rows(
        pixel,
        height,
        width,
        rows,
        columns,
        KERNEL_H,
        KERNEL_W,
        STRIDE_H,
        STRIDE_W,
        PADDING_H,
        PADDING_W,
        DILATION_H,
        DILATION_W,
        ACC,
    )
    image = value + _tile(first, group, VALUE_STRIDE, DEPTH, BLOCK_D)
    grad_image = grad_value + _tile(first, group, GROUPS * DEPTH, DEPTH, BLOCK_D)
    fields = offset_mask + pixel * FIELDS_STRIDE + group * (3 * POINTS)
    grad_fields = grad_offset_mask + pixel * FIELDS + group * (3 * POINTS)
    FIELD: tl.constexpr = grad_offset_mask.dtype.element_ty
    at_output = grad_output + _tile(pixel, group, GRAD_STRIDE, DEPTH, BLOCK_D)
    grad = tl.load(at_output, mask=exists[:, None] & channel[None, :], other=0.0).to(ACC)
    weights = fields + 2 * POINTS
    slot = tl.arange(0, BLOCK_K)
    peak, scale = origin_x, origin_x
    if SOFTMAX:
        peak, scale = _softmax_scale(_logits(weights, exists, slot, POINTS, ACC))
    grads_x = tl.zeros([BLOCK, BLOCK_K], ACC)
    grads_y, grads_weight = grads_x, grads_x
    for start in range(0, POINTS, CHUNK):
        for at in tl.static_range(CHUNK):
            k = start + at
            x, y = _conv_point(
                fields,
                exists,
                k,
                origin_x,
                origin_y,
                KERNEL_H,
                KERNEL_W,
                DILATION_H,
                DILATION_W,
                SCALE,
                REMOVE_CENTER,
            )
            weight = _weight(weights + k, exists, peak, scale, SOFTMAX)
            grad_x, grad_y, grad_weight = _sample_backward(
                grad,
                image,
                grad_image,
                channel,
                x,
                y,
                weight,
                height,
                width,
                VALUE_STRIDE,
                GROUPS * DEPTH,
                INDEX,
            )
            grads_x = _put(grads_x, slot, k, grad_x)
            grads_y = _put(grads_y, slot, k, grad_y)
            grads_weight = _put(grads_weight, slot, k, grad_weight)
    if SOFTMAX:
        logits = _logits(weights, exists, slot, POINTS, ACC)
        grads_weight = _softmax_backward(grads_weight, logits, peak, scale)
    to = grad_fields[:, None] + slot[None, :]
    mask = exists[:, None] & (slot < POINTS)[None, :]
    unit = tl.full([1, 1], SCALE, ACC)
    tl.store(to + slot[None, :], (grads_x * unit).to(FIELD), mask=mask)
    tl.store(to + slot[None, :] + 1, (grads_y * unit).to(FIELD), mask=mask)
    tl.store(to + 2 * POINTS, grads_weight.to(FIELD), mask=mask)
    if FIELDS > 3 * GROUPS * POINTS:
        padding = exists & (group == GROUPS - 1)
        for field in range(3 * GROUPS * POINTS, FIELDS):
            tl.store(grad_offset_mask + pixel * FIELDS + field, 0.0, mask=padding)


@triton.jit
def _level(shapes, level, start, length):
    """Height and width of a level that begins at pixel `start`, and where the next one begins.

    A level that does not fit in the value's `length` pixels counts as empty, as do all after it:
    shapes that only the device knows must not make a kernel read elsewhere.
    """
    height = tl.load(shapes + 2 * level).to(tl.int64)
    width = tl.load(shapes + 2 * level + 1).to(tl.int64)
    sane = (height >= 0) & (width >= 0) & (height <= length) & (width <= length)
    end = tl.where(sane, start + height * width, length + 1)
    fits = end <= length
    height, width = tl.where(fits, height, 0), tl.where(fits, width, 0)
    return height.to(tl.int32), width.to(tl.int32), tl.where(fits, end, length + 1)


@triton.jit
def _attn_point(locations, exists, point, height, width, ACC: tl.constexpr):
    """geometry.attn_points: x and y of one point of every row."""
    u = tl.load(locations + 2 * point, mask=exists, other=OUTSIDE).to(ACC)
    v = tl.load(locations + 2 * point + 1, mask=exists, other=OUTSIDE).to(ACC)
    return u * width - 0.5, v * height - 0.5


@triton.jit(do_not_specialize=["length", "queries", "pixels"])
def attn_forward(
    value,
    shapes,
    locations,
    weights,
    output,
    length,
    queries,
    pixels,
    GROUPS: tl.constexpr,
    DEPTH: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    LOCATIONS_STRIDE: tl.constexpr,
    WEIGHTS_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """ms_deform_attn of `value` [B, length, C] for `pixels` = B·queries queries."""
    COUNT: tl.constexpr = LEVELS * POINTS
    exists, pixel, group, channel = _rows(pixels, GROUPS, DEPTH, BLOCK, BLOCK_G, BLOCK_D, INDEX)
    image = value + _tile(pixel // queries * length, group, VALUE_STRIDE, DEPTH, BLOCK_D)
    locations += pixel * LOCATIONS_STRIDE + group * (2 * COUNT)
    weights += pixel * WEIGHTS_STRIDE + group * COUNT
    peak = tl.zeros([BLOCK], ACC)
    scale = peak
    if SOFTMAX:
        peak, scale = _softmax_scale(_logits(weights, exists, tl.arange(0, BLOCK_K), COUNT, ACC))
    total = tl.zeros([BLOCK, BLOCK_D], ACC)
    start = tl.full([], 0, tl.int64)
    for level in range(LEVELS):
        height, width, end = _level(shapes, level, start, length)
        plane = image + start.to(INDEX) * VALUE_STRIDE
        for first in range(0, POINTS, CHUNK):
            for at in tl.static_range(CHUNK):
                point = level * POINTS + first + at
                x, y = _attn_point(locations, exists, point, height, width, ACC)
                weight = _weight(weights + point, exists, peak, scale, SOFTMAX)
                total = _sample(
                    total, plane, channel, x, y, weight, height, width, VALUE_STRIDE, INDEX
                )
        start = end
    to = output + _tile(pixel, group, GROUPS * DEPTH, DEPTH, BLOCK_D)
    tl.store(to, total.to(output.dtype.element_ty), mask=exists[:, None] & channel[None, :])


@triton.jit(do_not_specialize=["length", "queries", "pixels"])
def attn_backward(
    grad_output,
    value,
    shapes,
    locations,
    weights,
    grad_value,
    grad_locations,
    grad_weights,
    length,
    queries,
    pixels,
    GROUPS: tl.constexpr,
    DEPTH: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    LOCATIONS_STRIDE: tl.constexpr,
    WEIGHTS_STRIDE: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Add to `grad_value`, in the dtype of the sums; write the gradients of the others."""
    COUNT: tl.constexpr = LEVELS * POINTS
    LOCATION: tl.constexpr = grad_locations.dtype.element_ty
    WEIGHT: tl.constexpr = grad_weights.dtype.element_ty
    exists, pixel, group, channel = _rows(pixels, GROUPS, DEPTH, BLOCK, BLOCK_G, BLOCK_D, INDEX)
    first_pixel = pixel // queries * length
    image = value + _tile(first_pixel, group, VALUE_STRIDE, DEPTH, BLOCK_D)
    grad_image = grad_value + _tile(first_pixel, group, GROUPS * DEPTH, DEPTH, BLOCK_D)
    row = pixel * GROUPS + group
    locations += pixel * LOCATIONS_STRIDE + group * (2 * COUNT)
    weights += pixel * WEIGHTS_STRIDE + group * COUNT
    grad_locations += row * (2 * COUNT)
    grad_weights += row * COUNT
    at_output = grad_output + _tile(pixel, group, GRAD_STRIDE, DEPTH, BLOCK_D)
    grad = tl.load(at_output, mask=exists[:, None] & channel[None, :], other=0.0).to(ACC)
    slot = tl.arange(0, BLOCK_K)
    peak = tl.zeros([BLOCK], ACC)
    scale = peak
    if SOFTMAX:
        peak, scale = _softmax_scale(_logits(weights, exists, slot, COUNT, ACC))
    grads_x = tl.zeros([BLOCK, BLOCK_K], ACC)
    grads_y, grads_weight = grads_x, grads_x
    start = tl.full([], 0, tl.int64)
    for level in range(LEVELS):
        height, width, end = _level(shapes, level, start, length)
        plane = image + start.to(INDEX) * VALUE_STRIDE
        grad_plane = grad_image + start.to(INDEX) * (GROUPS * DEPTH)
        for first in range(0, POINTS, CHUNK):
            for at in tl.static_range(CHUNK):
                point = level * POINTS + first + at
                x, y = _attn_point(locations, exists, point, height, width, ACC)
                weight = _weight(weights + point, exists, peak, scale, SOFTMAX)
                grad_x, grad_y, grad_weight = _sample_backward(
                    grad,
                    plane,
                    grad_plane,
                    channel,
                    x,
                    y,
                    weight,
                    height,
                    width,
                    VALUE_STRIDE,
                    GROUPS * DEPTH,
                    INDEX,
                )
                grads_x = _put(grads_x, slot, point, grad_x * width)
                grads_y = _put(grads_y, slot, point, grad_y * height)
                grads_weight = _put(grads_weight, slot, point, grad_weight)
        start = end
    if SOFTMAX:
        logits = _logits(weights, exists, slot, COUNT, ACC)
        grads_weight = _softmax_backward(grads_weight, logits, peak, scale)
    mask = exists[:, None] & (slot < COUNT)[None, :]
    to = grad_locations[:, None] + 2 * slot[None, :]
    tl.store(to, grads_x.to(LOCATION), mask=mask)
    tl.store(to + 1, grads_y.to(LOCATION), mask=mask)
    tl.store(grad_weights[:, None] + slot[None, :], grads_weight.to(WEIGHT), mask=mask)
