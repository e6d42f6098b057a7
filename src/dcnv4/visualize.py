"""Pictures of where deformable layers look: `conv`, `attention`, and `points` for your own axes.

Needs matplotlib. The colours are Okabe and Ito's, which the colour-blind can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .arguments import check_integer
from .layers import DCNv3, DCNv4, DCNv4Conv2d, FlashDeformAttn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

SIGNS = "#56B4E9", "#E69F00"
HEADS = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#333333"
MARKERS = "osD^v"
"""Heads past the eighth repeat the colours with the next marker."""
AREA = 180
"""Of the point with the largest weight, in square typographic points."""


@torch.no_grad()
def conv(
    layer: DCNv4 | DCNv4Conv2d | DCNv3,
    x: Tensor,
    pixel: Sequence[int] | None = None,
    *,
    shape: Sequence[int] | None = None,
    image: Any = None,
    extent: tuple[float, float, float, float] | None = None,
    around: float | None = None,
    groups: Sequence[int] | None = None,
    sample: int = 0,
    figure: FigureBase | None = None,
) -> FigureBase:
    """Draw the points of a convolution, a panel for each group.

    The area of a point is its |weight|, its colour the sign; a line leads to it from where it lies
    at offset 0. The cross is the centre of the window.

    Args:
        layer: a `DCNv4Conv2d`, `DCNv4` or `checkpoints.DCNv3`.
        x, shape: as the layer's `sampling_points` takes them.
        pixel: (row, column) of the output, whose points are drawn over the image. None: positions
            from the centre and weights, averaged over all output pixels of the batch, in ellipses
            of one standard deviation.
        image: what x was made from, of any size: [H, W], [H, W, 3], [1, H, W] or [3, H, W]. None:
            x where it has three channels, otherwise its mean over the channels.
        extent: (left, right, bottom, top) of the image in pixels of x, as in `Axes.imshow`. None
            stretches it over x.
        around: how many pixels of x to show around the centre. None: as many as the points need;
            `math.inf`: all.
        groups: which ones. None: all.
        sample: which one of the batch, where a pixel is chosen.
        figure: to draw in. None makes one.

    Returns:
        The figure, with an axes for each group.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, by its name.

    Example:
        >>> import torch
        >>> from dcnv4 import DCNv4Conv2d, visualize
        >>> layer, x = DCNv4Conv2d(3, 32, padding=1), torch.rand(1, 3, 24, 32)
        >>> figure = visualize.conv(layer, x, pixel=(10, 16))
        >>> figure.savefig("points.png")
    """
    _check(layer, (DCNv4Conv2d, DCNv4, DCNv3), around)
    told = layer.sampling_points(x, shape) if isinstance(layer, DCNv4) else layer.sampling_points(x)
    positions, weights = (tensor.double().cpu() for tensor in told)
    window = layer.window
    column, row = window.origins(*(torch.arange(n) for n in positions.shape[1:3]))
    centers = torch.stack(torch.broadcast_tensors(column, row[:, None]), -1).double()
    cells = window.offset_scale * torch.tensor(window.cells(), dtype=torch.float64)
    chosen = _chosen(groups, weights.shape[3])
    if pixel is None:
        positions = (positions - centers[:, :, None, None]).flatten(0, 2)
        center, spread = torch.zeros(2, dtype=torch.float64), positions.std(0, unbiased=False)
        what = f"mean of {len(positions)} output pixels"
        positions, weights = positions.mean(0), weights.flatten(0, 2).mean(0)
    else:
        at = _check_pixel(pixel, centers.shape[:2])
        _check_below("sample", sample, len(positions))
        center, spread = centers[at], torch.zeros_like(positions[0, 0, 0])
        what = f"output pixel in row {at[0]}, column {at[1]}"
        positions, weights = positions[sample][at], weights[sample][at]
        backdrop = _as_map(layer, x, shape)[sample].double().cpu()
        if image is None:
            image = backdrop if backdrop.shape[2] == 3 else backdrop.mean(-1)
    whole = pixel is not None and around == math.inf
    size = backdrop.shape[:2] if whole else (1, 1)
    figure = _figure(figure, len(chosen), size)
    figure.suptitle(f"{weights.shape[1]} points a group: {what}", fontsize=14)
    largest = weights[chosen].abs().max().item()
    for group, axes in zip(chosen, _panels(figure, len(chosen)), strict=True):
        axes.set_title(f"group {group}", fontsize=12)
        if pixel is not None:
            _show(axes, image, backdrop.shape[:2], extent)
        _lines(axes, center + cells, positions[group])
        colours = [SIGNS[weight < 0] for weight in weights[group].tolist()]
        _ellipses(axes, positions[group], spread[group], colours)
        points(axes, positions[group], weights[group], center=center, largest=largest)
        if not whole:
            ends = (positions[chosen] - center).abs() + spread[chosen]
            shown = torch.cat((cells.abs(), ends.flatten(0, 1)))
            _center(axes, center, around or 1.1 * shown.max().item() + 0.5, pixel is None)
    _legend(
        figure,
        [("o", SIGNS[0], "positive weight"), ("o", SIGNS[1], "negative weight")],
        f"area of a point: its |weight|, {largest:.2g} at most",
    )
    return figure


@torch.no_grad()
def attention(
    layer: FlashDeformAttn,
    query: Tensor,
    reference_points: Tensor,
    input_spatial_shapes: Tensor | Sequence[Sequence[int]],
    index: int | None = None,
    *,
    image: Any = None,
    around: float | None = None,
    sample: int = 0,
    figure: FigureBase | None = None,
) -> FigureBase:
    """Draw the points of multi-scale deformable attention, a panel for each level.

    The area of a point is its weight, its colour tells the head. The cross is the reference point.

    Args:
        layer: the attention layer.
        query, reference_points, input_spatial_shapes: as its `forward` takes them.
        index: the query whose points are drawn over the image. None: positions from the reference
            point and weights, averaged over all queries of the batch, in ellipses of one standard
            deviation.
        image: as in `conv`. None: the borders of the pixels.
        sample, figure: as in `conv`.
        around: how many pixels of a level to show around the reference point. None: all.

    Returns:
        The figure, with an axes for each level, in pixels of that level.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, by its name.

    Example:
        >>> import torch
        >>> from dcnv4 import FlashDeformAttn, visualize
        >>> layer, shapes = FlashDeformAttn(d_model=64, n_levels=2, n_heads=4), [(32, 48), (16, 24)]
        >>> queries, reference_points = torch.randn(1, 100, 64), torch.rand(1, 100, 2, 2)
        >>> figure = visualize.attention(layer, queries, reference_points, shapes, index=7)
        >>> figure.savefig("points.png")
    """
    _check(layer, (FlashDeformAttn,), around)
    told = layer.sampling_points(query, reference_points, input_spatial_shapes)
    locations, weights = (tensor.double().cpu() for tensor in told)
    shapes = torch.as_tensor(input_spatial_shapes).tolist()
    sizes = torch.tensor(shapes, dtype=torch.float64).flip(-1)
    positions = locations * sizes[:, None] - 0.5
    references = reference_points.double().cpu()[..., :2] * sizes - 0.5
    references = references.expand(*positions.shape[:2], -1, -1)
    if index is None:
        positions = (positions - references[:, :, None, :, None]).flatten(0, 1)
        spread = positions.std(0, unbiased=False)
        what = f"mean of {len(positions)} queries"
        positions, weights = positions.mean(0), weights.flatten(0, 1).mean(0)
        references = torch.zeros_like(sizes)
    else:
        _check_below("index", index, positions.shape[1])
        _check_below("sample", sample, len(positions))
        positions, weights = positions[sample, index], weights[sample, index]
        spread, references = torch.zeros_like(positions), references[sample, index]
        what = f"query {index}"
    heads, levels, count = weights.shape
    size = (1, 1) if index is None or around is not None else shapes[0]
    figure = _figure(figure, levels, size)
    figure.suptitle(f"{heads} heads of {count} points a level: {what}", fontsize=14)
    largest = weights.max().item()
    styles = [
        (MARKERS[h // len(HEADS) % len(MARKERS)], HEADS[h % len(HEADS)]) for h in range(heads)
    ]
    for level, axes in enumerate(_panels(figure, levels)):
        center, (height, width) = references[level], shapes[level]
        axes.set_title(f"level {level}: {height} x {width} pixels", fontsize=12)
        if index is not None:
            _show(axes, image, (height, width), None, size[1] / size[0])
        for head, (marker, colour) in enumerate(styles):
            at, counted = positions[head, level], weights[head, level]
            _ellipses(axes, at, spread[head, level], [colour] * count)
            points(
                axes, at, counted, center=center, largest=largest, colours=(colour,), marker=marker
            )
        if index is None or around is not None:
            shown = 1.1 * (positions.abs() + spread).max().item() + 0.1
            _center(axes, center, around or shown, index is None)
    _legend(
        figure,
        [(*style, f"head {head}") for head, style in enumerate(styles)],
        f"area of a point: its weight, {largest:.2g} at most",
    )
    return figure


def points(
    axes: Axes,
    positions: Tensor,
    weights: Tensor,
    *,
    center: Tensor | Sequence[float] | None = None,
    largest: float | None = None,
    colours: Sequence[str] = SIGNS,
    marker: str = "o",
) -> None:
    """Draw points, whose areas are their |weights|, on axes of your own.

    Args:
        axes: of matplotlib, in the units of `positions`.
        positions: [..., 2], (x, y).
        weights: [...].
        center: (x, y) of a cross. None: no cross.
        largest: the |weight| of the largest area. None: the largest of `weights`.
        colours: of weights from 0 on, and of those below.
        marker: as matplotlib names it.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from dcnv4 import visualize
        >>> figure = Figure()
        >>> visualize.points(figure.add_subplot(), torch.rand(9, 2), torch.randn(9))
        >>> figure.savefig("points.png")
    """
    from matplotlib.patheffects import Normal, withStroke

    positions, weights = positions.detach().cpu().reshape(-1, 2), weights.detach().cpu().flatten()
    if largest is None:
        largest = weights.abs().max().item()
    order = weights.abs().argsort(descending=True).tolist()  # small ones on top
    outline = [withStroke(linewidth=2, foreground="black"), Normal()]
    x, y = positions[order].T.tolist()
    axes.scatter(
        x,
        y,
        s=[AREA * abs(weights[i].item()) / (largest or 1) for i in order],
        c=[colours[int(weights[i] < 0) % len(colours)] for i in order],
        marker=marker,
        edgecolors="white",
        linewidths=0.8,
        path_effects=outline,
        zorder=3,
    )
    if center is not None:
        x, y = (float(c) for c in center)
        for colour, width in (("black", 4.5), ("white", 2)):
            axes.plot([x], [y], "+", color=colour, markersize=13, markeredgewidth=width, zorder=4)


def _figure(figure: FigureBase | None, panels: int, size: Sequence[int]) -> FigureBase:
    """The figure given, or a new one for panels of this (height, width)."""
    if figure is not None:
        return figure
    if find_spec("matplotlib") is None:
        raise ImportError("dcnv4.visualize needs matplotlib: pip install matplotlib")
    from matplotlib.figure import Figure

    rows, columns = _grid(panels)
    height = min(max(3.3 * size[0] / size[1], 1.5), 6)
    return Figure(figsize=(3.3 * columns + 0.4, (height + 0.4) * rows + 1.3), layout="constrained")


def _grid(panels: int) -> tuple[int, int]:
    """Rows and columns."""
    rows = math.ceil(panels / 4)
    return rows, math.ceil(panels / rows)


def _panels(figure: FigureBase, count: int) -> list[Axes]:
    rows, columns = _grid(count)
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for surplus in every[count:]:
        surplus.remove()
    return every[:count]


def _as_map(layer: nn.Module, x: Tensor, shape: Sequence[int] | None) -> Tensor:
    """[B, H, W, C] of what the layer takes."""
    if isinstance(layer, DCNv4Conv2d):
        return (x if x.dim() == 4 else x[None]).permute(0, 2, 3, 1)
    if x.dim() == 3:
        side = math.isqrt(x.shape[1])
        x = x.unflatten(1, tuple(shape or (side, side)))
    return x


def _check(layer: Any, kinds: tuple[type, ...], around: float | None) -> None:
    if not isinstance(layer, kinds):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"layer must be a {names}, which tells its points; got {layer!r:.80}")
    if around is not None and not around > 0:
        raise ValueError(f"around must be a number of pixels > 0; got {around}")


def _chosen(groups: Sequence[int] | None, count: int) -> list[int]:
    chosen = list(range(count) if groups is None else groups)
    if not chosen:
        raise ValueError(f"groups must name one at least; got {groups}")
    for group in chosen:
        _check_below("groups", group, count)
    return chosen


def _check_below(name: str, index: int, count: int) -> None:
    if check_integer(name, index, 0) >= count:
        raise ValueError(f"{name} must be below {count}; got {index}")


def _check_pixel(pixel: Any, size: Sequence[int]) -> tuple[int, int]:
    rule = f"pixel must be (row, column) inside the output of {size[0]} x {size[1]}"
    if not isinstance(pixel, (tuple, list)) or len(pixel) != 2:
        raise TypeError(f"{rule}; got {pixel!r}")
    row, column = (check_integer("pixel", index, 0) for index in pixel)
    if row >= size[0] or column >= size[1]:
        raise ValueError(f"{rule}; got {pixel}")
    return row, column


def _show(
    axes: Axes,
    image: Any,
    size: Sequence[int],
    extent: tuple[float, float, float, float] | None,
    ratio: float | None = None,
) -> None:
    """Lay the image over a map of this (H, W), and show all where a point counts.

    `ratio`: of the width shown to the height; None for the map's own.
    """
    height, width = size
    whole = (-0.5, width - 0.5, height - 0.5, -0.5)
    # A point beyond one pixel from the edge counts nothing, and one there is still to be seen.
    margin = 1 + 0.04 * max(size)
    across, down = width - 1 + 2 * margin, height - 1 + 2 * margin
    ratio = ratio or across / down
    across, down = max(across, down * ratio) / 2, max(down, across / ratio) / 2
    x, y = (width - 1) / 2, (height - 1) / 2
    axes.set(xlim=(x - across, x + across), ylim=(y + down, y - down), aspect="equal")
    if image is None:
        axes.set_facecolor("0.93")
        if max(size) <= 100:
            axes.set_xticks([c - 0.5 for c in range(width + 1)], minor=True)
            axes.set_yticks([c - 0.5 for c in range(height + 1)], minor=True)
            axes.grid(which="minor", color="white", linewidth=0.8)
            axes.tick_params(which="minor", length=0)
        return
    picture = torch.as_tensor(image).detach().cpu().double()
    if picture.dim() == 3 and picture.shape[-1] != 3:
        picture = picture[0] if picture.shape[0] == 1 else picture.permute(1, 2, 0)
    if picture.dim() not in (2, 3) or picture.shape[2:] not in ((), (3,)):
        raise ValueError(
            "image must be one picture, [H, W], [H, W, 3], [1, H, W] or [3, H, W]; "
            f"got {list(torch.as_tensor(image).shape)}"
        )
    least, most = picture.min(), picture.max()
    if least < 0 or most > 1:
        picture = (picture - least) / (most - least).clamp(min=1e-9)
    axes.autoscale(False)
    axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, extent=extent or whole)


def _center(axes: Axes, center: Tensor, reach: float, relative: bool) -> None:
    """Show what is within `reach` of the centre."""
    x, y = center.tolist()
    if relative:
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.set(xlabel="x from the centre, pixels", ylabel="y", aspect="equal")
    axes.set(xlim=(x - reach, x + reach), ylim=(y + reach, y - reach))


def _lines(axes: Axes, starts: Tensor, ends: Tensor) -> None:
    from matplotlib.collections import LineCollection

    segments = torch.stack((starts, ends), 1).tolist()
    for colour, width in (("black", 2), ("white", 1)):
        axes.add_collection(LineCollection(segments, colors=colour, linewidths=width, zorder=2))


def _ellipses(axes: Axes, positions: Tensor, spread: Tensor, colours: Sequence[str]) -> None:
    from matplotlib.patches import Ellipse

    for at, size, colour in zip(positions.tolist(), spread.tolist(), colours, strict=True):
        if any(size):
            width, height = (2 * s for s in size)
            axes.add_patch(Ellipse(at, width, height, color=colour, alpha=0.25, linewidth=0))


def _legend(figure: FigureBase, styles: Sequence[tuple[str, str, str]], title: str) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker=marker, linestyle="", markersize=9, color=colour, label=label)
        for marker, colour, label in styles
    ]
    figure.legend(
        handles=handles,
        title=title,
        loc="outside lower center",
        ncols=min(len(handles), 8),
        frameon=False,
        fontsize=11,
        title_fontsize=11,
    )
