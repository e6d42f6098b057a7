"""The pictures: their points are those that the layers tell, where and as large as they say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from dcnv4 import DCNv4, DCNv4Conv2d, FlashDeformAttn, visualize
from dcnv4.checkpoints import DCNv3

pytest.importorskip("matplotlib", reason="the pictures need matplotlib; pip install matplotlib")

from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse


def randomised(layer: Any) -> Any:
    torch.manual_seed(0)
    for name in ("offset_mask", "offset", "mask", "sampling_offsets", "attention_weights"):
        if hasattr(layer, name):
            nn.init.normal_(getattr(layer, name).weight, std=0.3)
    return layer


LAYERS: dict[str, tuple[Any, torch.Tensor, dict[str, Any]]] = {
    "DCNv4Conv2d": (DCNv4Conv2d(8, 12, 3, 2, 1, groups=3), torch.randn(2, 8, 10, 14), {}),
    "DCNv4": (DCNv4(12, group=3, remove_center=True), torch.randn(2, 140, 12), {"shape": (10, 14)}),
    "DCNv4 square": (DCNv4(12, group=3), torch.randn(2, 100, 12), {}),
    "DCNv3": (DCNv3(12, group=3, offset_scale=1.5), torch.randn(2, 10, 14, 12), {}),
}


def drawn(axes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and areas of the points on some axes, those of all scatters."""
    scatters = [c for c in axes.collections if isinstance(c, PathCollection)]
    positions = [torch.tensor(c.get_offsets().tolist(), dtype=torch.float64) for c in scatters]
    return torch.cat(positions), torch.cat([torch.tensor(c.get_sizes()) for c in scatters])


def by_size(positions: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    order = weights.abs().argsort(descending=True)
    return positions[order].double(), weights[order].abs().double()


@pytest.mark.parametrize("name", LAYERS)
def test_conv_draws_the_points_of_a_pixel(name: str, tmp_path: Any) -> None:
    layer, x, shape = LAYERS[name]
    randomised(layer)
    positions, weights = (t.detach() for t in layer.sampling_points(x, *shape.values()))
    arguments: dict[str, Any] = {"sample": 1, "image": torch.rand(3, 40, 56), **shape}
    figure = visualize.conv(layer, x, (2, 3), around=math.inf, **arguments)
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 3
    largest = weights[1, 2, 3].abs().max().item()
    for group, axes in enumerate(figure.axes):
        at, areas = drawn(axes)
        wanted, sizes = by_size(positions[1, 2, 3, group], weights[1, 2, 3, group])
        torch.testing.assert_close(at, wanted)
        torch.testing.assert_close(areas.double(), visualize.AREA * sizes / largest)
        height, width = (10, 10) if name == "DCNv4 square" else (10, 14)
        assert axes.images[0].get_extent() == [-0.5, width - 0.5, height - 0.5, -0.5]
        assert -2 < axes.get_xlim()[0] < -1 < width < axes.get_xlim()[1] < width + 1
        assert -2 < axes.get_ylim()[1] < -1 < height < axes.get_ylim()[0] < height + 1
        starts = next(c for c in axes.collections if isinstance(c, LineCollection)).get_segments()
        stride = layer.window.stride[0]
        grid = torch.stack([torch.from_numpy(segment[0]) for segment in starts])
        torch.testing.assert_close(grid.mean(0), torch.tensor([3.0, 2.0]).double() * stride)
    figure.savefig(tmp_path / "points.png")
    assert (tmp_path / "points.png").stat().st_size > 10_000
    column, row = 3 * stride, 2 * stride
    reach = (positions[1, 2, 3] - torch.tensor([column, row])).abs().max().item()
    for axes in visualize.conv(layer, x, (2, 3), **arguments).axes:
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert (left + right, bottom + top) == pytest.approx((2 * column, 2 * row))
        assert right - left == pytest.approx(bottom - top)
        assert reach < (right - left) / 2 < 1.5 * reach + 1


def test_colours_are_kept() -> None:
    x = torch.rand(2, 3, 8, 9)
    (axes,) = visualize.conv(DCNv4Conv2d(3, 16, padding=1), x, (2, 2), sample=1).axes
    picture = torch.tensor(axes.images[0].get_array())
    torch.testing.assert_close(picture, x[1].permute(1, 2, 0).double())


def test_an_image_without_a_batch() -> None:
    layer, x, _ = LAYERS["DCNv4Conv2d"]
    single, batched = (visualize.conv(layer, i, pixel=(1, 2)).axes[0] for i in (x[0], x[:1]))
    for one, other in zip(drawn(single), drawn(batched), strict=True):
        torch.testing.assert_close(one, other)


def test_conv_averages_over_the_map() -> None:
    layer, x, _ = LAYERS["DCNv4Conv2d"]
    randomised(layer)
    positions, weights = (t.detach().double() for t in layer.sampling_points(x))
    columns = 2 * torch.arange(7)[:, None, None].double()
    rows = 2 * torch.arange(5)[:, None, None, None].double()
    relative = torch.stack((positions[..., 0] - columns, positions[..., 1] - rows), -1)
    figure = visualize.conv(layer, x, groups=[2])
    (axes,) = figure.axes
    assert axes.get_title() == "group 2"
    at, _ = drawn(axes)
    mean = relative.mean((0, 1, 2))[2]
    torch.testing.assert_close(at, by_size(mean, weights.mean((0, 1, 2))[2])[0])
    ellipses = [patch for patch in axes.patches if isinstance(patch, Ellipse)]
    spread = torch.tensor([[e.width / 2, e.height / 2] for e in ellipses], dtype=torch.float64)
    expected = relative.flatten(0, 2).std(0, unbiased=False)[2]
    torch.testing.assert_close(spread, expected)
    assert axes.get_xlim()[1] >= (mean.abs() + expected).max()
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


def test_colours_tell_the_sign() -> None:
    axes = Figure().subplots()
    weights = torch.tensor([0.5, -1.0, 0.25])
    visualize.points(axes, torch.tensor([[0.0, 1], [2, 3], [4, 5]]), weights)
    (scatter,) = axes.collections
    assert scatter.get_sizes().tolist() == [visualize.AREA * share for share in (1, 0.5, 0.25)]
    assert scatter.get_offsets().tolist() == [[2, 3], [0, 1], [4, 5]]
    blue, orange = (scatter.get_facecolors()[i].tolist() for i in (1, 0))
    assert blue == scatter.get_facecolors()[2].tolist()
    assert blue[2] > 0.8 > 0.1 > orange[2]
    visualize.points(axes, torch.zeros(1, 2), torch.zeros(1))  # no weight at all


SHAPES = ((6, 8), (3, 4))


@pytest.mark.parametrize("shape", [(2, 5, 2, 2), (2, 5, 2, 4), (1, 1, 1, 2)])
def test_attention_draws_the_points_of_a_query(shape: tuple[int, ...]) -> None:
    layer = randomised(FlashDeformAttn(16, n_levels=2, n_heads=4, n_points=3))
    query, reference = torch.randn(2, 5, 16), torch.rand(shape)
    locations, weights = (t.detach() for t in layer.sampling_points(query, reference, SHAPES))
    figure = visualize.attention(layer, query, reference, torch.tensor(SHAPES), 4, sample=1)
    assert [axes.get_title() for axes in figure.axes] == [
        "level 0: 6 x 8 pixels",
        "level 1: 3 x 4 pixels",
    ]
    largest = weights[1, 4].max().item()
    for level, axes in enumerate(figure.axes):
        at, areas = drawn(axes)
        pixels = locations[1, 4, :, level] * torch.tensor(SHAPES[level][::-1]) - 0.5
        wanted = [by_size(*pair) for pair in zip(pixels, weights[1, 4, :, level], strict=True)]
        torch.testing.assert_close(at, torch.cat([pair[0] for pair in wanted]))
        sizes = torch.cat([pair[1] for pair in wanted])
        torch.testing.assert_close(areas.double(), visualize.AREA * sizes / largest)
        assert axes.get_xlim()[0] < -1 < SHAPES[level][1] < axes.get_xlim()[1]
        assert axes.get_ylim()[1] < -1 < SHAPES[level][0] < axes.get_ylim()[0]


def test_levels_have_panels_of_one_size() -> None:
    shapes = ((20, 31), (10, 16), (5, 8))
    layer = FlashDeformAttn(16, n_levels=3, n_heads=4)
    query, reference = torch.randn(1, 5, 16), torch.rand(1, 5, 3, 2)
    figure = visualize.attention(layer, query, reference, shapes, 2, image=torch.rand(20, 31))
    figure.canvas.draw()
    sizes = [axes.get_window_extent().size for axes in figure.axes]
    for size in sizes[1:]:
        assert size == pytest.approx(sizes[0], abs=1)


@pytest.mark.parametrize("shape", [(2, 5, 2, 2), (1, 1, 1, 2)])
def test_attention_averages_over_the_queries(shape: tuple[int, ...]) -> None:
    """A fresh layer's rays."""
    layer = FlashDeformAttn(16, n_levels=2, n_heads=4, n_points=3)
    figure = visualize.attention(layer, torch.randn(2, 5, 16), torch.rand(shape), SHAPES)
    rays = layer.sampling_offsets.bias.detach().view(4, 2, 3, 2)
    for level, axes in enumerate(figure.axes):
        at, areas = drawn(axes)
        found = sorted(tuple(round(c, 3) + 0.0 for c in p) for p in at.tolist())
        wanted = sorted(
            tuple(round(c, 3) + 0.0 for c in p) for p in rays[:, level].flatten(0, 1).tolist()
        )
        assert found == wanted
        torch.testing.assert_close(areas, torch.full_like(areas, visualize.AREA))


@pytest.mark.parametrize(
    "image",
    [
        None,
        torch.rand(20, 28),
        torch.rand(1, 20, 28),
        torch.randn(20, 28, 3),
        (255 * torch.rand(3, 20, 28)).byte().numpy(),
        torch.full((20, 28), 7.0),
    ],
    ids=["none", "grey", "1HW", "HW3, standardised", "uint8 array", "constant"],
)
def test_images_of_any_kind(image: Any) -> None:
    layer, x, _ = LAYERS["DCNv4Conv2d"]
    figure = visualize.conv(
        layer, x, (1, 1), image=image, extent=(0, 14, 10, 0), around=3, groups=[0]
    )
    (axes,) = figure.axes
    picture = axes.images[0].get_array()
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert axes.images[0].get_extent() == [0, 14, 10, 0]
    assert axes.get_xlim() == (-1, 5)


def test_it_draws_into_a_figure_of_yours() -> None:
    layer, x, _ = LAYERS["DCNv4Conv2d"]
    left, right = Figure(figsize=(12, 4), layout="constrained").subfigures(1, 2)
    assert visualize.conv(layer, x, figure=left) is left
    assert len(left.axes) == 3
    assert not right.axes


def test_many_panels_stand_in_rows() -> None:
    layer = DCNv4Conv2d(8, 12, padding=1, groups=6)
    figure = visualize.conv(layer, torch.randn(1, 8, 5, 5))
    assert len(figure.axes) == 6
    assert len({round(axes.get_subplotspec().rowspan.start) for axes in figure.axes}) == 2


MISTAKES: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "outside": (ValueError, r"inside the output of 5 x 7; got \(5, 0\)", {"pixel": (5, 0)}),
    "negative": (ValueError, "pixel must be an integer >= 0; got -1", {"pixel": (0, -1)}),
    "number": (TypeError, r"pixel must be \(row, column\) inside .*; got 5", {"pixel": 5}),
    "half": (TypeError, "pixel must be an integer >= 0; got 0.5", {"pixel": (0.5, 1)}),
    "layer": (TypeError, "tells its points; got Conv2d", {"layer": nn.Conv2d(8, 8, 3)}),
    "image": (
        ValueError,
        r"image must be one picture, .*; got \[2, 3, 20, 28\]",
        {"image": torch.rand(2, 3, 20, 28)},
    ),
    "sample": (ValueError, "sample must be below 2; got 2", {"sample": 2}),
    "group": (ValueError, "groups must be below 3; got 3", {"groups": [0, 3]}),
    "no group": (ValueError, r"groups must name one at least; got \[\]", {"groups": []}),
    "around": (ValueError, "around must be a number of pixels > 0; got 0", {"around": 0}),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str) -> None:
    error, message, changed = MISTAKES[case]
    layer, x, _ = LAYERS["DCNv4Conv2d"]
    with pytest.raises(error, match=message):
        visualize.conv(**{"layer": layer, "x": x, "pixel": (1, 1), **changed})


def test_mistakes_about_attention() -> None:
    layer = FlashDeformAttn(16, n_levels=2, n_heads=4, n_points=3)
    call = torch.randn(2, 5, 16), torch.rand(2, 5, 2, 2), SHAPES
    with pytest.raises(ValueError, match="index must be below 5; got 5"):
        visualize.attention(layer, *call, 5)
    with pytest.raises(ValueError, match="sample must be below 2; got 7"):
        visualize.attention(layer, *call, 1, sample=7)
    with pytest.raises(ValueError, match="around must be a number of pixels > 0; got -1"):
        visualize.attention(layer, *call, 1, around=-1)
    with pytest.raises(TypeError, match=r"layer must be a FlashDeformAttn, .*; got Linear"):
        visualize.attention(nn.Linear(3, 3), *call)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, _ = LAYERS["DCNv4Conv2d"]
    monkeypatch.setattr(visualize, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install matplotlib"):
        visualize.conv(layer, x)
