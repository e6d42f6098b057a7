"""Plain PyTorch: any device, dtype and shape, no compiler; differentiable to any order.

Work goes part by part over the output pixels, so that the extra memory is a few megabytes on a CPU
whatever the image. For each part the geometry says which rows of the value its corners name and
what each counts; the forward sums those rows, the backward adds into one gradient of the value.
Where others than this file need the operations, for their gradients or to export them, the parts
are of the sums alone, and as many whatever the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import geometry
from ..geometry import Reference, Window
from . import AttnGrads, Call

# Corners that one part holds: a CPU's temporaries stay in its cache, an accelerator wants launches
# that fill it.
_CPU_CORNERS, _DEVICE_CORNERS = 1 << 19, 1 << 23

_is_compiling = getattr(getattr(torch, "compiler", None), "is_compiling", lambda: False)


def why_not(call: Call) -> str | None:
    """None: the reference runs every call."""
    return None


def conv_forward(
    value: Tensor,
    offset_mask: Tensor,
    window: Window,
    deterministic: bool = False,
    *,
    differentiable: bool = False,
) -> Tensor:
    """[B, Ho, Wo, C]. `differentiable`: of operations that autograd and exporters know."""
    problem = _conv_problem(value, offset_mask, window)
    output = _forward(problem, _table(value, value.shape[3] // window.groups), differentiable)
    return output.reshape(*offset_mask.shape[:3], value.shape[3]).to(value.dtype)


def conv_backward(
    grad: Tensor,
    value: Tensor,
    offset_mask: Tensor,
    window: Window,
    deterministic: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `value` and `offset_mask`."""
    table = _table(value, value.shape[3] // window.groups)
    grad_table = torch.zeros_like(table)
    grad_mask = offset_mask.new_empty(offset_mask.shape) if out is None else out[1]
    pixels, channels = grad_mask.flatten(0, 2), window.offset_mask_channels()
    used = pixels[:, :channels]
    pixels[:, channels:] = 0
    problem = _conv_problem(value, offset_mask, window)
    for part, grads, weights in _backward(problem, grad, table, grad_table):
        used[part] = geometry.conv_points_backward(*grads, weights, window).to(used.dtype)
    grad_value = _untable(grad_table, value)
    return grad_value if out is None else out[0].copy_(grad_value), grad_mask


def attn_forward(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    coordinates: Tensor,
    weights: Tensor,
    softmax: bool,
    deterministic: bool = False,
    reference: Reference | None = None,
    *,
    differentiable: bool = False,
) -> Tensor:
    """[B, Q, C]. `differentiable`: of operations that autograd and exporters know."""
    problem = _attn_problem(value, spatial_shapes, coordinates, weights, softmax, reference)
    output = _forward(problem, _table(value, value.shape[3]), differentiable)
    return output.reshape(*coordinates.shape[:2], value.shape[2] * value.shape[3]).to(value.dtype)


def attn_backward(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    coordinates: Tensor,
    weights: Tensor,
    softmax: bool,
    deterministic: bool = False,
    reference: Reference | None = None,
    out: AttnGrads | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `value`, `coordinates` and `weights`."""
    table = _table(value, value.shape[3])
    grad_table = torch.zeros_like(table)
    grad_value, grad_coordinates, grad_weights = out or (
        None,
        coordinates.new_empty(coordinates.shape),
        weights.new_empty(weights.shape),
    )
    heights, widths, _ = geometry.levels(spatial_shapes, value.device)
    problem = _attn_problem(value, spatial_shapes, coordinates, weights, softmax, reference)
    of_rows = _by_row(reference, *coordinates.shape[:2])
    for part, (grad_x, grad_y, grad_used), used in _backward(problem, grad, table, grad_table):
        if softmax:
            grad_used = geometry.softmax_backward(grad_used, used)
        shape = (-1, *weights.shape[2:])
        scale, _ = geometry.attn_map(heights, widths, coordinates.shape[4], of_rows(part))
        pixels = torch.stack((grad_x.view(shape), grad_y.view(shape)), -1)
        grad_coordinates.flatten(0, 1)[part] = (pixels * scale).to(coordinates.dtype)
        grad_weights.flatten(0, 1)[part] = grad_used.view(shape).to(weights.dtype)
    made = _untable(grad_table, value)
    return made if grad_value is None else grad_value.copy_(made), grad_coordinates, grad_weights


class _Points(NamedTuple):
    """The points of n output pixels, R to a group, as `geometry.corners` takes them."""

    x: Tensor  # [n, G, R]
    y: Tensor
    weights: Tensor
    heights: Tensor | int  # [R]
    widths: Tensor | int
    first: Tensor  # [n, G, 1 or R]
    origins: tuple[Tensor | int, Tensor | int]
    step: int

    def corners(self) -> _Corners:
        index, *fractions = geometry.corners(
            self.x, self.y, self.heights, self.widths, self.origins, self.first, self.step
        )
        return _Corners(index.flatten(2) + 1, self.weights, *fractions)

    def split(self, sizes: list[int]) -> list[_Points]:
        """Some of a group's points each."""

        def cut(of_points: Any) -> Any:
            if isinstance(of_points, Tensor) and of_points.shape[-1:] == (sum(sizes),):
                return of_points.split(sizes, -1)
            return [of_points] * len(sizes)

        parts = zip(*map(cut, self[:6]), strict=True)
        return [self._replace(**dict(zip(self._fields, part, strict=False))) for part in parts]


class _Corners(NamedTuple):
    """The table rows of the corners of points, and where the points lie between them."""

    rows: Tensor  # [n, G, 4R]
    weights: Tensor  # [n, G, R], as the fractions
    fraction_x: Tensor
    fraction_y: Tensor

    def coefficients(self) -> Tensor:
        """[n, G, 4R]"""
        return geometry.coefficients(self.weights, self.fraction_x, self.fraction_y).flatten(2)


class _Problem(NamedTuple):
    """Either operator: how many output pixels of how many points, and the points of some pixels."""

    pixels: int
    points_per_pixel: int
    points: Callable[[slice], _Points]

    def parts(self, corners: int) -> Iterator[slice]:
        step = max(1, corners // (4 * self.points_per_pixel))
        for start in range(0, max(self.pixels, 1), step):
            yield slice(start, min(start + step, self.pixels))


def _conv_problem(value: Tensor, offset_mask: Tensor, window: Window) -> _Problem:
    batch, height, width = value.shape[:3]
    rows, columns = offset_mask.shape[1:3]
    pixels = offset_mask.flatten(0, 2)
    sizes = (*window.stride, *window.padding, *window.center(), pixels.shape[0])
    integers = _integers(batch * height * width * window.groups, *sizes)

    def points(part: slice) -> _Points:
        pixel = torch.arange(part.start, part.stop, dtype=integers, device=value.device)
        image, row, column = pixel // (rows * columns), pixel // columns % rows, pixel % columns
        x, y, weights = geometry.conv_points(_exact(pixels[part]), window)
        origin_x, origin_y = (o[:, None, None] for o in window.origins(row, column))
        first = _first_rows(image, height * width, window.groups)[..., None]
        origins = origin_x, origin_y
        return _Points(x, y, weights, height, width, first, origins, window.groups)

    return _Problem(pixels.shape[0], window.groups * window.points(), points)


def _attn_problem(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    coordinates: Tensor,
    weights: Tensor,
    softmax: bool,
    reference: Reference | None,
) -> _Problem:
    batch, length, groups = value.shape[:3]
    queries = max(coordinates.shape[1], 1)
    flat_coordinates, flat_weights = coordinates.flatten(0, 1), weights.flatten(0, 1).flatten(2)
    integers = _integers(batch * length * groups, flat_coordinates.shape[0])
    of_rows = _by_row(reference, *coordinates.shape[:2])
    heights, widths, starts = geometry.levels(spatial_shapes, value.device)
    # Shapes on an accelerator are not checked on the host: a wrong one must not read elsewhere.
    fits = (heights <= length) & (widths <= length) & (starts + heights * widths <= length)
    of_levels = torch.where(fits, heights, 0), widths, starts
    points_of_level = coordinates.shape[4]
    of_points = [sizes.to(integers).expand(-1, points_of_level).flatten() for sizes in of_levels]

    def points(part: slice) -> _Points:
        pixel = torch.arange(part.start, part.stop, dtype=integers, device=value.device)
        own = _exact(flat_coordinates[part])
        x, y = geometry.attn_points(own, heights, widths, of_rows(part))
        counted = _exact(flat_weights[part])
        counted = counted.softmax(-1) if softmax else counted
        of_heights, of_widths, of_starts = of_points
        first = _first_rows(pixel // queries, length, groups)[..., None] + of_starts * groups
        sizes = of_heights, of_widths
        return _Points(x.flatten(2), y.flatten(2), counted, *sizes, first, (0, 0), groups)

    return _Problem(flat_coordinates.shape[0], flat_weights.shape[1:].numel(), points)


def _by_row(
    reference: Reference | None, batch: int, queries: int
) -> Callable[[slice], Reference | None]:
    """What gives a part of the B·Q queries its reference."""
    if reference is None:
        return lambda part: None
    points = _exact(reference.points).expand(batch, queries, -1, -1).flatten(0, 1)
    return lambda part: reference._replace(points=points[part])


def _integers(*sizes: int) -> torch.dtype:
    """Of rows and pixels: 32 bits, half the memory, unless sizes are known to need more."""
    if not _is_compiling() and any(isinstance(size, int) and size >= 2**28 for size in sizes):
        return torch.int64
    return torch.int32


def _exact(tensor: Tensor) -> Tensor:
    """In the dtype that sums are made in."""
    return tensor.to(geometry.sum_dtype(tensor.dtype))


def _table(value: Tensor, depth: int) -> Tensor:
    """The rows of `depth` channels that points read; first, a row of zeros for illegal corners."""
    return F.pad(_exact(value).reshape(-1, depth), (0, 0, 1, 0))


def _untable(grad_table: Tensor, value: Tensor) -> Tensor:
    return grad_table[1:].view(value.shape).to(value.dtype, copy=value.dtype != grad_table.dtype)


def _first_rows(image: Tensor, length: int, groups: int) -> Tensor:
    """Where images [n] of `length` pixels start in each group [n, G], zeros not counted."""
    group = torch.arange(groups, dtype=image.dtype, device=image.device)
    return (image * (length * groups))[:, None] + group


def _forward(problem: _Problem, table: Tensor, differentiable: bool) -> Tensor:
    """The sums [N, G, D] of all output pixels."""
    if not differentiable:
        limited = (problem.points(part).corners() for part in problem.parts(_limit(table)))
        return torch.cat([_sum_rows(table, some.rows, some.coefficients()) for some in limited])
    points = problem.points(slice(0, problem.pixels))
    # Numbers, where a trace would have them as tensors.
    groups, count = (int(size) for size in points.weights.shape[1:])
    # Parts of a number that no size of the image changes: a third of the points at most, and of
    # these so many groups that three rows are gathered for one of the output.
    by_group = min(groups, -(-4 * count // 9))
    by_point = min(count, max(3, -(-4 * count // (3 * by_group))))
    some_groups = _sizes(groups, by_group)
    sums = []
    some_points = _sizes(count, by_point)
    for size, some in zip(some_points, points.split(some_points), strict=True):
        corners = some.corners()
        parts = zip(
            corners.rows.split(some_groups, 1),
            corners.coefficients().split(some_groups, 1),
            some_groups,
            strict=True,
        )
        sums.append(torch.cat([_products(table, *part, 4 * size) for part in parts], 1))
    return reduce(torch.add, sums)


def _products(
    table: Tensor, rows: Tensor, coefficients: Tensor, groups: int, corners: int
) -> Tensor:
    """As `_sum_rows`, of operations that autograd and exporters know."""
    gathered = F.embedding(rows.reshape(-1, corners), table)
    products = torch.bmm(coefficients.reshape(-1, 1, corners), gathered)
    return products.view(-1, groups, table.shape[1])


def _sizes(count: int, parts: int) -> list[int]:
    """So many parts of `count`, as equal as they can be."""
    return [(count + i) // parts for i in range(parts)]


def _sum_rows(table: Tensor, rows: Tensor, coefficients: Tensor) -> Tensor:
    """The rows [n, G, 4R] of the table, each as often as its coefficient says: [n, G, D]."""
    if table.device.type != "cpu":
        return _products(table, rows, coefficients, *rows.shape[1:])
    count, groups, corners = rows.shape
    rows, coefficients = rows.view(-1, corners), coefficients.view(-1, corners)
    sums = F.embedding_bag(rows, table, per_sample_weights=coefficients, mode="sum")
    return sums.view(count, groups, table.shape[1])


def _backward(
    problem: _Problem, grad: Tensor, table: Tensor, grad_table: Tensor
) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor], Tensor]]:
    """Add to `grad_table`; yield each part, the gradients of x, y and weights, and the weights."""
    depth = table.shape[1]
    for part in problem.parts(_limit(table)):
        points = problem.points(part).corners()
        corners = points.rows.shape[-1]
        sums = _exact(grad.flatten(0, -2)[part]).reshape(-1, depth, 1)
        rows = table.index_select(0, points.rows.flatten()).view(-1, corners, depth)
        slopes = torch.bmm(rows, sums).view(*points.weights.shape, 4)
        spread = torch.bmm(points.coefficients().view(-1, corners, 1), sums.transpose(1, 2))
        grad_table.index_add_(0, points.rows.flatten(), spread.view(-1, depth))
        fractions = points.fraction_x, points.fraction_y
        yield (
            part,
            geometry.coefficients_backward(slopes, points.weights, *fractions),
            points.weights,
        )


def _limit(table: Tensor) -> int:
    return _CPU_CORNERS if table.device.type == "cpu" else _DEVICE_CORNERS
