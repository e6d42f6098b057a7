"""The executable geometry against the oracle's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dcnv4 import geometry
from dcnv4.functional import window
from support import cases, oracle

CONV = [case for case in cases.CONV if case.points and not case.outside]


def settings(case: cases.ConvCase) -> geometry.Window:
    return window(**case.settings, softmax=case.softmax)


@pytest.mark.parametrize("case", CONV, ids=lambda case: case.id)
def test_conv_points(case: cases.ConvCase) -> None:
    """Coordinates and used weights of every point, in the operators' order, and their origins."""
    value, offset_mask, _ = case.exact
    rows, columns = offset_mask.shape[1:3]
    pixel = torch.arange(case.batch * rows * columns)
    frozen = settings(case)
    x, y, weights = geometry.conv_points(torch.from_numpy(offset_mask).flatten(0, 2), frozen)
    flat = x.flatten(0, 1), y.flatten(0, 1), weights.flatten(0, 1)
    origins = torch.stack(frozen.origins(pixel // columns % rows, pixel % columns), -1).tolist()
    windows = list(oracle.conv_windows(value, offset_mask, **case.settings))
    assert len(windows) == len(flat[0])
    for n, (at, _, _, owned, points) in enumerate(windows):
        expected = [point.x for point in points], [point.y for point in points]
        np.testing.assert_allclose(flat[0][n].numpy(), expected[0], rtol=1e-14, atol=1e-13)
        np.testing.assert_allclose(flat[1][n].numpy(), expected[1], rtol=1e-14, atol=1e-13)
        assert {point.origin for point in points} == {tuple(origins[n // case.groups])}
        used = oracle.normalise(offset_mask[at][owned], case.softmax)
        np.testing.assert_allclose(flat[2][n].numpy(), used, rtol=1e-14)


@pytest.mark.parametrize("case", cases.CONV, ids=lambda case: case.id)
def test_output_size(case: cases.ConvCase) -> None:
    """The oracle asserts the size that it is given; so does this one."""
    assert [max(0, n) for n in settings(case).output_size(*case.size)] == list(case.output_size)


@pytest.mark.parametrize("case", [*cases.ATTENTION, *cases.OFFSETS], ids=cases.name)
def test_attn_points(case: cases.AttnCase) -> None:
    value, *place, coordinates, _, _ = case.exact
    heights, widths, starts = geometry.levels(case.shapes, torch.device("cpu"))
    reference, points_of = None, case._points_of(*place, coordinates)
    if isinstance(case, cases.OffsetsCase):
        reference = geometry.Reference(torch.from_numpy(place[0]), case.box_normalizer)
    x, y = geometry.attn_points(torch.from_numpy(coordinates), heights, widths, reference)
    levels = oracle.split_levels(value, case.shapes)
    assert starts.flatten().tolist() == [
        sum(h * w for h, w in case.shapes[:n]) for n in range(len(case.shapes))
    ]
    for at in np.ndindex(coordinates.shape[:3]):
        points = points_of(levels, *at)
        for got, expected in ((x, [p.x for p in points]), (y, [p.y for p in points])):
            np.testing.assert_allclose(got[at].flatten().numpy(), expected, rtol=1e-13, atol=1e-13)


COORDINATES = (-2.0, -1.25, -1.0, -0.75, 0.0, 0.5, 1.0, 1.5, 2.0, 2.25, 3.0, 3.5, 4.0, 1e30)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))


@pytest.mark.parametrize("origin", [(0, 0), (2, -1), (-3, 5)])
@pytest.mark.parametrize("size", [(3, 4), (4, 3), (1, 1), (1, 4), (0, 4), (3, 0)])
def test_corners_and_coefficients(size: tuple[int, int], origin: tuple[int, int]) -> None:
    """Inside, outside, on the border and on pixel centres, alone and with NaN and infinities."""
    height, width = size
    axis = torch.tensor((*COORDINATES, *NOT_FINITE), dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    weights = torch.full_like(x, 2.0)
    index, fraction_x, fraction_y = geometry.corners(x, y, height, width, origin)
    coefficients = geometry.coefficients(weights, fraction_x, fraction_y)
    image = np.zeros((*size, 1))
    for at in np.ndindex(tuple(x.shape)):
        found = {
            n: c
            for n, c in zip(index[at].tolist(), coefficients[at].tolist(), strict=True)
            if n >= 0
        }
        corners = oracle.bilinear(image, float(x[at]), float(y[at]), origin)
        expected = {row * width + column: 2 * share for row, column, share, _, _ in corners}
        assert found == pytest.approx(expected, rel=1e-15), (x[at], y[at])
    assert torch.isfinite(coefficients).all()


def test_coefficients_backward() -> None:
    """Against autograd, the gradient of a corner outside being 0."""
    generator = torch.Generator().manual_seed(0)
    x, y, weights = (
        6 * torch.rand(3, 200, generator=generator, dtype=torch.float64) - 1.5
    ).unbind()
    leaves = [t.requires_grad_() for t in (x.clone(), y.clone(), weights.clone())]
    index, fraction_x, fraction_y = geometry.corners(leaves[0], leaves[1], 3, 4)
    grad = torch.randn(200, 4, generator=generator, dtype=torch.float64) * (index >= 0)
    coefficients = geometry.coefficients(leaves[2], fraction_x, fraction_y)
    expected = torch.autograd.grad(coefficients, leaves, grad)
    fractions = fraction_x.detach(), fraction_y.detach()
    got = geometry.coefficients_backward(grad, weights, *fractions)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("softmax", [False, True])
def test_conv_points_backward(softmax: bool) -> None:
    """Against autograd."""
    frozen = window((3, 2), groups=2, offset_scale=0.7, softmax=softmax)
    generator = torch.Generator().manual_seed(0)
    offset_mask = torch.randn(5, 3 * 2 * 6, generator=generator, dtype=torch.float64)
    offset_mask.requires_grad_()
    results = geometry.conv_points(offset_mask, frozen)
    grads = [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in results]
    (expected,) = torch.autograd.grad(results, offset_mask, grads)
    got = geometry.conv_points_backward(*grads, results[2].detach(), frozen)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fractions_do_not_depend_on_the_origin(dtype: torch.dtype) -> None:
    """The point is in the same place of its cell, and the cell where the integers say."""
    generator = torch.Generator().manual_seed(0)
    x, y = 4 * torch.randn(2, 100, generator=generator, dtype=dtype)
    near = geometry.corners(x, y, 64, 64, (32, 32))
    column, row = torch.tensor([2**29 + 3]), torch.tensor([2**30 + 5])
    far = geometry.corners(x, y, 2**31 - 1, 2**31 - 1, (column, row))
    assert all(torch.equal(*pair) for pair in zip(near[1:], far[1:], strict=True))
    moved = (near[0] % 64 - 32 + column) + (near[0] // 64 - 32 + row) * (2**31 - 1)
    assert (near[0] >= 0).all()
    assert torch.equal(far[0], moved)


def test_points_just_outside_the_first_pixel() -> None:
    """x > -1 where the sum of the integer and the small number would round to -1 or to 0."""
    tiny = torch.tensor([-1e-10, 0.0, 1e-10])
    zero = torch.zeros(3)
    index, _, _ = geometry.corners(tiny, zero, 1, 8, (-1, 0))
    assert (index >= 0).tolist() == [[False] * 4, [False] * 4, [False, True, False, False]]
    index, fraction, _ = geometry.corners(tiny, zero, 1, 8, (0, 0))
    assert index[:, :2].tolist() == [[-1, 0], [0, 1], [0, 1]]
    assert fraction.tolist() == pytest.approx([1, 0, 1e-10])
    index, _, _ = geometry.corners(tiny, zero, 1, 8, (8, 0))
    assert index[:, :2].tolist() == [[7, -1], [-1, -1], [-1, -1]]
