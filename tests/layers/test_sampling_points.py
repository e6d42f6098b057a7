"""`sampling_points`: the points and weights it tells are those that the layer sums."""

from __future__ import annotations

import pytest
import torch

from dcnv4 import DCNv4, DCNv4Conv2d, FlashDeformAttn
from dcnv4.geometry import coefficients, corners


def randomised(layer):
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.double()


def sum_at(value, positions, weights):
    """[B, Ho, Wo, C] of value [B, H, W, C], from the points alone."""
    height, width = value.shape[1:3]
    groups = weights.shape[3]
    index, fraction_x, fraction_y = corners(*positions.unbind(-1), height, width)
    counted = coefficients(weights, fraction_x, fraction_y) * (index >= 0)
    pixels = value.flatten(1, 2).unflatten(-1, (groups, -1))
    image = torch.arange(len(value)).view(-1, 1, 1, 1, 1, 1)
    group = torch.arange(groups).view(-1, 1, 1)
    rows = pixels[image, index.clamp(min=0), group]
    return (rows * counted[..., None]).sum((-3, -2)).flatten(-2)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "kernel_size": (3, 5), "pad": (1, 2)},
        {"dw_kernel_size": 3, "remove_center": True, "offset_scale": 0.5},
        {"softmax": True},
    ],
    ids=["plain", "stride 2, 3x5", "depthwise, no centre, scaled", "softmax"],
)
def test_layer_is_the_sum_over_its_points(settings):
    layer = randomised(DCNv4(12, group=3, without_pointwise=True, **settings))
    x = torch.randn(2, 6, 7, 12, dtype=torch.float64)
    positions, weights = layer.sampling_points(x)
    rows, columns = layer.output_shape((6, 7))
    assert positions.shape == (2, rows, columns, 3, layer.window.points(), 2)
    assert weights.shape == positions.shape[:-1]
    torch.testing.assert_close(sum_at(x, positions, weights), layer(x))


def test_layouts_agree():
    layer = randomised(DCNv4Conv2d(5, 8, stride=2, padding=1, groups=2))
    flat = DCNv4(8, stride=2, group=2).double()
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    positions, weights = layer.sampling_points(x)
    y = sum_at(layer.value_proj(x.permute(0, 2, 3, 1)), positions, weights)
    torch.testing.assert_close(layer.output_proj(y).permute(0, 3, 1, 2), layer(x))
    maps = torch.randn(2, 6, 7, 8, dtype=torch.float64)
    for told, expected in zip(
        flat.sampling_points(maps.flatten(1, 2), (6, 7)), flat.sampling_points(maps), strict=True
    ):
        assert torch.equal(told, expected)


def test_a_fresh_layer_looks_at_the_kernel_grid():
    positions, weights = DCNv4Conv2d(4, 4, padding=1, groups=1).sampling_points(
        torch.randn(1, 4, 5, 5)
    )
    grid = [[x, y] for x in (1.0, 2.0, 3.0) for y in (2.0, 3.0, 4.0)]
    assert positions[0, 3, 2, 0].tolist() == grid
    assert weights.unique().tolist() == [torch.tensor(1 / 9).item()]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_attention_is_the_sum_over_its_points(size, as_tensor):
    layer = randomised(FlashDeformAttn(8, n_levels=2, n_heads=2, n_points=3))
    shapes = ((4, 5), (2, 3))
    query, flat = (torch.randn(2, n, 8, dtype=torch.float64) for n in (6, 26))
    reference = torch.rand(2, 6, 2, size, dtype=torch.float64)
    locations, weights = layer.sampling_points(
        query, reference, torch.tensor(shapes) if as_tensor else shapes
    )
    assert locations.shape == (2, 6, 2, 2, 3, 2)
    torch.testing.assert_close(weights.flatten(3).sum(-1), torch.ones(2, 6, 2, dtype=torch.float64))
    value = layer.value_proj(flat).split([20, 6], 1)
    y = torch.zeros(2, 6, 8, dtype=torch.float64)
    for level, (height, width) in enumerate(shapes):
        pixels = locations[:, :, :, level] * torch.tensor((width, height)) - 0.5
        image = value[level].unflatten(1, (height, width))
        y += sum_at(image, pixels[:, None], weights[:, None, :, :, level])[:, 0]
    torch.testing.assert_close(layer.output_proj(y), layer(query, reference, flat, shapes))


def test_attention_checks_what_it_is_given():
    layer = FlashDeformAttn(8, n_levels=2, n_heads=2, n_points=3)
    with pytest.raises(ValueError, match=r"reference_points must be .* \[1, 5, 2, 2\]"):
        layer.sampling_points(torch.ones(1, 5, 8), torch.ones(1, 5, 3, 2), ((1, 1), (1, 1)))
