"""The geometry both operators share: where points lie, and which pixels each one reads.

A point at (x, y), in pixels with integer pixel centres, is the weighted sum of the four pixels
around it. The operators differ only in where their points come from: `conv_points` or
`attn_points`. `include/sampling.h` and the Triton helper are the mirrors of `corners`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """What a deformable convolution does at every output pixel; pairs are (height, width)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    offset_scale: float
    remove_center: bool
    softmax: bool

    # Methods, because the tracer of torch 2.8 reads no property of a NamedTuple.

    def points(self) -> int:
        """K: how many points a group samples for one output pixel."""
        return self.kernel_size[0] * self.kernel_size[1] - int(self.remove_center)

    def offset_mask_channels(self) -> int:
        """3·G·K: how many channels of `offset_mask` are read."""
        return 3 * self.groups * self.points()

    def split(self, offset_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Views of `offset_mask` [..., M]: offsets [..., G, K, 2] and weights [..., G, K]."""
        points = self.points()
        read = offset_mask[..., : self.offset_mask_channels()]
        by_group = read.unflatten(-1, (self.groups, 3 * points))
        offsets = by_group[..., : 2 * points].unflatten(-1, (points, 2))
        return offsets, by_group[..., 2 * points :]

    def center(self) -> tuple[int, int]:
        """The distance from a window's first row and column to its centre, in pixels."""
        (kh, kw), (dh, dw) = self.kernel_size, self.dilation
        return dh * (kh - 1) // 2, dw * (kw - 1) // 2

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Output rows and columns of an input of `height` rows and `width` columns."""
        (kh, kw), (sh, sw) = self.kernel_size, self.stride
        (ph, pw), (dh, dw) = self.padding, self.dilation
        rows = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1
        columns = (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
        return rows, columns

    def cells(self) -> list[tuple[int, int]]:
        """(x, y) of the K undeformed points from the window's centre, in pixels.

        In the operators' order: columns outermost.
        """
        (kh, kw), (dh, dw), (ch, cw) = self.kernel_size, self.dilation, self.center()
        cells = [(i * dw - cw, j * dh - ch) for i in range(kw) for j in range(kh)]
        if self.remove_center:
            del cells[self.center_index()]
        return cells

    def cells_beside(self, offsets: Tensor) -> Tensor:
        """`cells` [K, 2] as a tensor, made of operations: a constant could be added to no graph
        that was traced before."""
        y, x = (
            torch.arange(size, dtype=offsets.dtype, device=offsets.device) * step - center
            for size, step, center in zip(
                self.kernel_size, self.dilation, self.center(), strict=True
            )
        )
        grid = torch.stack((x[:, None].expand(-1, y.shape[0]), y.expand(x.shape[0], -1)), -1)
        cells, center = grid.flatten(0, 1), self.center_index()
        return torch.cat((cells[:center], cells[center + 1 :])) if self.remove_center else cells

    def center_index(self) -> int:
        """Which point of the whole kernel is its centre, the one that `remove_center` drops."""
        kh, kw = self.kernel_size
        return kw // 2 * kh + kh // 2

    def origins(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """(x, y) of the undeformed centre of the windows of these output rows and columns."""
        (sh, sw), (ph, pw), (ch, cw) = self.stride, self.padding, self.center()
        return columns * sw - pw + cw, rows * sh - ph + ch


def unpacked(packed: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Views of `packed` [B, H, W, ...]: value, of so many channels, and offset_mask, the rest."""
    value, offset_mask = packed.split_with_sizes((channels, packed.shape[-1] - channels), -1)
    return value, offset_mask


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of numbers of this dtype are made in: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def conv_points(offset_mask: Tensor, window: Window) -> tuple[Tensor, Tensor, Tensor]:
    """Split `offset_mask` [..., M] of output pixels into x, y and weights, each [..., G, K].

    x and y are input pixels from the centre of the window, `Window.origins`.
    """
    offsets, weights = window.split(offset_mask)
    x, y = (window.offset_scale * (window.cells_beside(offsets) + offsets)).unbind(-1)
    return x, y, weights.softmax(-1) if window.softmax else weights


def conv_points_backward(
    grad_x: Tensor, grad_y: Tensor, grad_weights: Tensor, weights: Tensor, window: Window
) -> Tensor:
    """Gradient [N, 3GK] of what `conv_points` split, from those of its results."""
    if window.softmax:
        grad_weights = softmax_backward(grad_weights, weights)
    offsets = torch.stack((grad_x, grad_y), -1) * window.offset_scale
    return torch.cat((offsets.flatten(2), grad_weights), -1).flatten(1)


def levels(
    spatial_shapes: Tensor | Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Heights, widths and first rows in the value, each [L, 1], of levels of these (H, W)."""
    if isinstance(spatial_shapes, Tensor):
        shapes = spatial_shapes.to(device, torch.int64)
    else:
        # Filled in, because a size may be symbolic, and a constant could be added to no graph that
        # was traced before.
        sizes = [size for pair in spatial_shapes for size in pair]
        filled = [torch.full((), size, dtype=torch.int64, device=device) for size in sizes]
        shapes = torch.stack(filled).view(-1, 2)
    heights, widths = shapes[:, :1], shapes[:, 1:]
    areas = heights * widths
    return heights, widths, areas.cumsum(0) - areas


class Reference(NamedTuple):
    """What the points of an attention are offset from."""

    points: Tensor
    """[B or 1, Q or 1, L or 1, 2 or 4]: (x, y) or boxes (x, y, w, h), 0 to 1 over a level."""
    box_normalizer: str
    """An offset in a box is in half boxes per point of a level, "points", or per pixel, "size"."""

    # Methods, because the tracer of torch 2.8 reads no property of a NamedTuple.

    def has_boxes(self) -> bool:
        return self.points.shape[-1] == 4


def reference_steps(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """How far it is from image to image, query to query and level to level in reference points of
    this shape and these strides: 0 where they are the same for all."""
    leading = zip(shape[:3], strides[:3], strict=True)
    return [0 if size == 1 else stride for size, stride in leading]


def attn_unit(size: Any, points: int, numbers: int, box_normalizer: str = "") -> Any:
    """Pixels that an x or y of 1 is, in a level of this width or height; with boxes, by theirs.

    Args:
        size: a number, or a tensor of them.
        points: P.
        numbers: of a reference point; 0 for locations, which run from 0, the outer edge of the
            level's first pixel, to 1, the outer edge of its last.
    """
    if numbers == 0:
        return size
    if numbers == 2:
        return 1.0
    return size * 0.5 / points if box_normalizer == "points" else 0.5


def attn_map(
    heights: Tensor, widths: Tensor, points: int, reference: Reference | None = None
) -> tuple[Any, Any]:
    """What makes pixels (x, y) of coordinates [..., L, P, 2]: a factor, and then a summand.

    Args:
        heights, widths: of the levels, [L, 1].
        points: P.
        reference: None for locations; its points are [..., L or 1, 2 or 4] for offsets
            [..., G, L, P, 2].
    """
    sizes = torch.cat((widths, heights), 1)[:, None]
    if reference is None:
        return attn_unit(sizes, points, 0), -0.5
    place = reference.points[..., None, :, None, :]
    sizes = sizes.to(place.dtype)
    unit = attn_unit(sizes, points, place.shape[-1], reference.box_normalizer)
    scale = place[..., 2:] * unit if reference.has_boxes() else unit
    return scale, place[..., :2] * sizes - 0.5


def attn_points(
    coordinates: Tensor, heights: Tensor, widths: Tensor, reference: Reference | None = None
) -> tuple[Tensor, Tensor]:
    """Pixel x and y [..., L, P] of `coordinates` [..., L, P, 2], as `attn_map` has it."""
    scale, shift = attn_map(heights, widths, coordinates.shape[-2], reference)
    x, y = (coordinates * scale + shift).unbind(-1)
    return x, y


def attn_reference_backward(
    grad: Tensor, offsets: Tensor, reference: Reference, heights: Tensor, widths: Tensor
) -> Tensor:
    """Gradient of the reference's points, from those of x and y in pixels [B, Q, G, L, P, 2]."""
    sizes = torch.cat((widths, heights), 1).to(grad.dtype)
    grads = grad.sum((2, 4)) * sizes
    if reference.has_boxes():
        unit = attn_unit(sizes, offsets.shape[4], 4, reference.box_normalizer)
        grads = torch.cat((grads, (grad * offsets).sum((2, 4)) * unit), -1)
    return grads.sum_to_size(reference.points.shape)


def corners(
    x: Tensor,
    y: Tensor,
    heights: Tensor | int,
    widths: Tensor | int,
    origins: tuple[Tensor | int, Tensor | int] = (0, 0),
    first: Tensor | int = 0,
    step: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The four pixels around each point and where the point lies between them.

    A point is (x, y) pixels from the pixel of `origins`, which are integers (column, row). Returns
    `index` [..., 4] (first + step·(y·width + x); top left, top right, bottom left, bottom right)
    and the fractions of a pixel [...] from the left and from the top corners. The index of a corner
    outside the image is -1, and all four are when the point lies outside (-1, W) x (-1, H) or at
    NaN: such corners contribute nothing.
    """
    columns, fraction_x, legal_x = _around(x, origins[0], widths)
    rows, fraction_y, legal_y = _around(y, origins[1], heights)
    first_of_row = rows * _beside_pairs(widths * step) + _beside_pairs(first)
    # Illegal along either axis leaves the sum below 0: a fraction of the memory of four conditions.
    far = torch.iinfo(first_of_row.dtype).min // 2
    across = torch.where(legal_x, columns * step, far)
    down = torch.where(legal_y, first_of_row, far)
    index = (down[..., :, None] + across[..., None, :]).clamp(min=-1)
    return index.flatten(-2), fraction_x, fraction_y


def _around(x: Tensor, origin: Tensor | int, size: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis, the pixels at or before each point `origin` + x and after it [..., 2], the
    fraction of a pixel from the former, and whether each of them counts.

    Floor and fraction are those of x alone: no precision is lost where the origin is large. Pixels
    are integers as wide as `origin` and `size`, of 32 bits or more.
    """
    near = x.abs() < 2**30  # false for NaN; no image is larger
    x = torch.where(near, x, 0.0)
    floor = x.detach().floor()
    before, fraction = origin + floor.int(), x - floor
    pixels = torch.stack((before, before + 1), -1)
    # Not `|`, which the converter to Core ML does not know.
    inside = near & torch.logical_or(before >= 0, fraction > 0)
    return pixels, fraction, inside[..., None] & (pixels >= 0) & (pixels < _beside_pairs(size))


def _beside_pairs(number: Tensor | int) -> Tensor | int:
    """What points [...] have in common, as it stands beside [..., 2]."""
    return number[..., None] if isinstance(number, Tensor) and number.dim() else number


def coefficients(weights: Tensor, fraction_x: Tensor, fraction_y: Tensor) -> Tensor:
    """What each of a point's four corners counts [..., 4]: its bilinear share of the weight."""
    down = torch.stack((weights * (1 - fraction_y), weights * fraction_y), -1)
    across = torch.stack((1 - fraction_x, fraction_x), -1)
    return (down[..., :, None] * across[..., None, :]).flatten(-2)


def coefficients_backward(
    grad: Tensor, weights: Tensor, fraction_x: Tensor, fraction_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients [...] of x, y and the weights from those of the coefficients [..., 4].

    `grad` must be 0 at a corner outside the image.
    """
    top_left, top_right, bottom_left, bottom_right = grad.unbind(-1)
    top = torch.lerp(top_left, top_right, fraction_x)
    bottom = torch.lerp(bottom_left, bottom_right, fraction_x)
    slope_x = torch.lerp(top_right - top_left, bottom_right - bottom_left, fraction_y)
    return weights * slope_x, weights * (bottom - top), torch.lerp(top, bottom, fraction_y)


def softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the logits [..., K] from that of their softmax, `weights`."""
    return weights * (grad - (grad * weights).sum(-1, keepdim=True))
