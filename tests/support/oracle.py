"""Both operators and their gradients as naive float64 loops, written from the contract alone.

For one output vector [D], each operator lists its K points and weights. The rest is shared:
out = sum_k w_k * bilinear(image_k; x_k, y_k).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Pair = int | tuple[int, int]
Shapes = Sequence[Sequence[int]]


class Point(NamedTuple):
    """A place in image [H, W, D], (x, y) pixels from the pixel `origin`, which is (column, row);
    and d(x, y) by the coordinates it was made from."""

    image: Array
    x: float
    y: float
    scale: tuple[float, float]
    origin: tuple[int, int] = (0, 0)


def bilinear(
    image: Array, x: float, y: float, origin: tuple[int, int] = (0, 0)
) -> list[tuple[int, int, float, float, float]]:
    """The corners around the place of a `Point`: row, column, weight, and the weight's
    derivatives by x and y. Empty outside (-1, W) x (-1, H) and for NaN.

    At an integer coordinate the derivative is that of the cell that starts there.
    """
    height, width = image.shape[:2]
    left, top = origin
    # Python compares a float with an integer exactly.
    if not (-1 - left < x < width - left and -1 - top < y < height - top):
        return []
    fy, fx = y - math.floor(y), x - math.floor(x)
    row, column = top + math.floor(y), left + math.floor(x)
    corners = [
        (row, column, (1 - fy) * (1 - fx), fy - 1, fx - 1),
        (row, column + 1, (1 - fy) * fx, 1 - fy, -fx),
        (row + 1, column, fy * (1 - fx), -fy, 1 - fx),
        (row + 1, column + 1, fy * fx, fy, fx),
    ]
    return [at for at in corners if 0 <= at[0] < height and 0 <= at[1] < width]


def normalise(weights: Array, softmax: bool) -> Array:
    """The weights [K] as they are, or their softmax."""
    if not softmax:
        return weights
    exp: Array = np.exp(weights - weights.max(initial=-np.inf))
    return exp / np.sum(exp)


def weighted_sum(out: Array, points: list[Point], weights: Array, softmax: bool) -> None:
    """Add K points with weights [K] to out [D]."""
    for (image, x, y, _, origin), weight in zip(points, normalise(weights, softmax), strict=True):
        for row, column, corner, _, _ in bilinear(image, x, y, origin):
            out += weight * corner * image[row, column]


def weighted_sum_backward(
    grad: Array, points: list[Point], weights: Array, softmax: bool, grad_images: list[Array]
) -> tuple[Array, Array]:
    """From grad [D], return the gradients of the coordinates [K, 2] and of weights [K], and add
    those of the images to grad_images, K arrays [H, W, D]."""
    used = normalise(weights, softmax)
    grad_points, grad_weights = np.zeros((len(points), 2)), np.zeros(len(points))
    for k, (image, x, y, (scale_x, scale_y), origin) in enumerate(points):
        for row, column, corner, by_x, by_y in bilinear(image, x, y, origin):
            dot = grad @ image[row, column]
            grad_weights[k] += corner * dot
            grad_points[k, 0] += used[k] * scale_x * by_x * dot
            grad_points[k, 1] += used[k] * scale_y * by_y * dot
            grad_images[k][row, column] += used[k] * corner * grad
    if softmax:
        grad_weights = used * (grad_weights - used @ grad_weights)
    return grad_points, grad_weights


def float64(*arrays: Any) -> list[Array]:
    return [np.asarray(array, np.float64) for array in arrays]


def conv_windows(
    value: Array,
    offset_mask: Array,
    *,
    kernel_size: Pair = 3,
    stride: Pair = 1,
    padding: Pair = 1,
    dilation: Pair = 1,
    groups: int = 4,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Iterator[tuple[tuple[int, int, int], slice, slice, slice, list[Point]]]:
    """Yield, for every output pixel and group: (b, oy, ox), the group's channels of value, the
    channels of offset_mask with its 2K offsets and with its K weights, and its K points."""
    pairs = [(p, p) if isinstance(p, int) else p for p in (kernel_size, stride, padding, dilation)]
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = pairs
    batch, height, width, channels = value.shape
    out_height = max(0, (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1)
    out_width = max(0, (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1)
    assert offset_mask.shape[:3] == (batch, out_height, out_width), offset_mask.shape

    cy, cx = dh * (kh - 1) // 2, dw * (kw - 1) // 2
    grid = [(i, j) for i in range(kw) for j in range(kh)]
    if remove_center:
        grid.remove((kw // 2, kh // 2))
    depth, count = channels // groups, len(grid)
    for b, oy, ox, g in np.ndindex(batch, out_height, out_width, groups):
        owned = slice(g * depth, (g + 1) * depth)
        offsets = slice(3 * count * g, 3 * count * g + 2 * count)
        weights = slice(offsets.stop, offsets.stop + count)
        image, points = value[b, :, :, owned], []
        origin = ox * sw - pw + cx, oy * sh - ph + cy
        shifts = offset_mask[b, oy, ox, offsets].reshape(count, 2).tolist()
        for (i, j), (shift_x, shift_y) in zip(grid, shifts, strict=True):
            x = offset_scale * (i * dw - cx + shift_x)
            y = offset_scale * (j * dh - cy + shift_y)
            points.append(Point(image, x, y, (offset_scale, offset_scale), origin))
        yield (b, oy, ox), owned, offsets, weights, points


def deform_conv(value: Array, offset_mask: Array, *, softmax: bool = False, **window: Any) -> Array:
    """Return [B, Ho, Wo, C] from value [B, H, W, C] and offset_mask [B, Ho, Wo, M].

    The other keywords, here and in the gradient, are those of `conv_windows`.
    """
    value, offset_mask = float64(value, offset_mask)
    out = np.zeros((*offset_mask.shape[:3], value.shape[3]))
    for at, owned, _, weights, points in conv_windows(value, offset_mask, **window):
        weighted_sum(out[at][owned], points, offset_mask[at][weights], softmax)
    return out


def deform_conv_backward(
    grad_output: Array, value: Array, offset_mask: Array, *, softmax: bool = False, **window: Any
) -> tuple[Array, Array]:
    """Return the gradients of value and offset_mask from grad_output [B, Ho, Wo, C]."""
    grad_output, value, offset_mask = float64(grad_output, value, offset_mask)
    grad_value, grad_offset_mask = np.zeros(value.shape), np.zeros(offset_mask.shape)
    for at, owned, offsets, weights, points in conv_windows(value, offset_mask, **window):
        images = [grad_value[at[0], :, :, owned]] * len(points)
        grad_points, grad_offset_mask[at][weights] = weighted_sum_backward(
            grad_output[at][owned], points, offset_mask[at][weights], softmax, images
        )
        grad_offset_mask[at][offsets] = grad_points.reshape(-1)
    return grad_value, grad_offset_mask


def split_levels(value: Array, spatial_shapes: Shapes) -> list[Array]:
    """Views [B, H_l, W_l, G, D] of value [B, S, G, D], one a level."""
    levels, start = [], 0
    for h, w in spatial_shapes:
        level = value[:, start : start + int(h) * int(w)]
        levels.append(level.reshape(len(value), int(h), int(w), *value.shape[2:]))
        start += int(h) * int(w)
    assert start == value.shape[1], (spatial_shapes, value.shape)
    return levels


def attn_points(levels: list[Array], locations: Array, b: int, q: int, g: int) -> list[Point]:
    """The L*P points of one query and head; locations [B, Q, G, L, P, 2] in (x, y), 0 to 1."""
    points = []
    for level, row in zip(levels, locations[b, q, g].tolist(), strict=True):
        image = level[b, :, :, g]
        h, w = image.shape[:2]
        points += [Point(image, u * w - 0.5, v * h - 0.5, (w, h)) for u, v in row]
    return points


def offset_points(
    levels: list[Array],
    references: Array,
    offsets: Array,
    box_normalizer: str,
    b: int,
    q: int,
    g: int,
) -> list[Point]:
    """The L*P points of one query and head; offsets [B, Q, G, L, P, 2] from references
    [B or 1, Q or 1, L or 1, 2 or 4], as Deformable DETR makes locations of them."""
    own = np.broadcast_to(references, (*offsets.shape[:2], len(levels), references.shape[3]))
    points = []
    for level, place, shifts in zip(levels, own[b, q], offsets[b, q, g], strict=True):
        image = level[b, :, :, g]
        size = np.array(image.shape[1::-1], np.float64)
        per_unit = 1 / np.maximum(size, 1)
        if len(place) == 4:
            per_unit = per_unit if box_normalizer == "size" else np.full(2, 1 / len(shifts))
            per_unit = per_unit * place[2:] * 0.5
        ends = (place[:2] + shifts * per_unit) * size - 0.5
        scale = per_unit * np.maximum(size, 1)
        points += [Point(image, x, y, tuple(scale.tolist())) for x, y in ends.tolist()]
    return points


PointsOf = Callable[[list[Array], int, int, int], list[Point]]
"""The L*P points of a query and head in the levels of the value."""


def at_locations(locations: Array) -> PointsOf:
    return lambda levels, b, q, g: attn_points(levels, locations, b, q, g)


def at_offsets(references: Array, offsets: Array, box_normalizer: str) -> PointsOf:
    return lambda levels, *at: offset_points(levels, references, offsets, box_normalizer, *at)


def attention(
    value: Array, spatial_shapes: Shapes, weights: Array, softmax: bool, points_of: PointsOf
) -> Array:
    levels = split_levels(value, spatial_shapes)
    batch, queries, groups = heads = weights.shape[:3]
    out = np.zeros((*heads, value.shape[3]))
    for at in np.ndindex(heads):
        weighted_sum(out[at], points_of(levels, *at), weights[at].reshape(-1), softmax)
    return out.reshape(batch, queries, groups * value.shape[3])


def attention_backward(
    grad_output: Array,
    value: Array,
    spatial_shapes: Shapes,
    weights: Array,
    softmax: bool,
    points_of: PointsOf,
) -> tuple[Array, Array, Array]:
    """The gradients of value, of the points' coordinates [B, Q, G, L*P, 2] and of weights."""
    grad_value, grad_weights = np.zeros(value.shape), np.zeros(weights.shape)
    levels = split_levels(value, spatial_shapes)
    grad_levels = split_levels(grad_value, spatial_shapes)
    heads, count = weights.shape[:3], math.prod(weights.shape[3:])
    grad_points = np.zeros((*heads, count, 2))
    grad_heads = grad_output.reshape(*heads, value.shape[3])
    for at in np.ndindex(heads):
        b, _, g = at
        images = [level[b, :, :, g] for level in grad_levels for _ in range(count // len(levels))]
        grad_points[at], by_weights = weighted_sum_backward(
            grad_heads[at], points_of(levels, *at), weights[at].reshape(-1), softmax, images
        )
        grad_weights[at] = by_weights.reshape(weights.shape[3:])
    return grad_value, grad_points, grad_weights


def ms_deform_attn(
    value: Array, spatial_shapes: Shapes, locations: Array, weights: Array, *, softmax: bool = False
) -> Array:
    """Return [B, Q, G*D] from value [B, S, G, D], L pairs (H_l, W_l), locations
    [B, Q, G, L, P, 2] and weights [B, Q, G, L, P] or [B, Q, G, L*P]."""
    value, locations, weights = float64(value, locations, weights)
    points_of = at_locations(locations)
    return attention(value, spatial_shapes, weights, softmax, points_of)


def ms_deform_attn_backward(
    grad_output: Array,
    value: Array,
    spatial_shapes: Shapes,
    locations: Array,
    weights: Array,
    *,
    softmax: bool = False,
) -> tuple[Array, Array, Array]:
    """Return the gradients of value, locations and weights from grad_output [B, Q, G*D]."""
    grad_output, value, locations, weights = float64(grad_output, value, locations, weights)
    points_of = at_locations(locations)
    grad_value, grad_locations, grad_weights = attention_backward(
        grad_output, value, spatial_shapes, weights, softmax, points_of
    )
    return grad_value, grad_locations.reshape(locations.shape), grad_weights


def ms_deform_attn_from_offsets(
    value: Array,
    spatial_shapes: Shapes,
    references: Array,
    offsets: Array,
    weights: Array,
    *,
    box_normalizer: str = "points",
    softmax: bool = False,
) -> Array:
    """Return [B, Q, G*D]; the arguments are those of `offset_points` and `ms_deform_attn`."""
    value, references, offsets, weights = float64(value, references, offsets, weights)
    points_of = at_offsets(references, offsets, box_normalizer)
    return attention(value, spatial_shapes, weights, softmax, points_of)


def ms_deform_attn_from_offsets_backward(
    grad_output: Array,
    value: Array,
    spatial_shapes: Shapes,
    references: Array,
    offsets: Array,
    weights: Array,
    *,
    box_normalizer: str = "points",
    softmax: bool = False,
) -> tuple[Array, Array, Array, Array]:
    """Return the gradients of value, references, offsets and weights."""
    grad_output, value, offsets, weights = float64(grad_output, value, offsets, weights)
    references = float64(references)[0]
    points_of = at_offsets(references, offsets, box_normalizer)

    def pixels(levels: list[Array], b: int, q: int, g: int) -> list[Point]:
        return [point._replace(scale=(1.0, 1.0)) for point in points_of(levels, b, q, g)]

    grad_value, grad_points, grad_weights = attention_backward(
        grad_output, value, spatial_shapes, weights, softmax, pixels
    )
    grad_points = grad_points.reshape(offsets.shape)
    grad_offsets, grad_references = np.zeros(offsets.shape), np.zeros(references.shape)
    per_level = offsets.shape[4]
    for b, q, g, level, p in np.ndindex(offsets.shape[:5]):
        own = tuple(n % size for n, size in zip((b, q, level), references.shape, strict=False))
        size = np.array(spatial_shapes[level][::-1], np.float64)
        by_pixel, offset = grad_points[b, q, g, level, p], offsets[b, q, g, level, p]
        grad_references[own][:2] += size * by_pixel
        pixels_of_one = np.ones(2)
        if references.shape[3] == 4:
            half = 0.5 * (size / per_level if box_normalizer == "points" else 1)
            grad_references[own][2:] += half * offset * by_pixel
            pixels_of_one = half * references[own][2:]
        grad_offsets[b, q, g, level, p] = pixels_of_one * by_pixel
    return grad_value, grad_references, grad_offsets, grad_weights
