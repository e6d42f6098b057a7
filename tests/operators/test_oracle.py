"""The oracle against an existing CUDA implementation of DCNv4 and against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import oracle

DATA = Path(__file__).parents[1] / "data"
Array = np.ndarray


def golden_case(operator: str, case: str) -> dict[str, Array]:
    """Inputs, outputs and gradients of an existing CUDA implementation of DCNv4, in float32."""
    with np.load(DATA / f"{operator}.npz") as data:
        names = [name for name in data.files if name.startswith(f"{case}.")]
        return {name.removeprefix(f"{case}."): data[name] for name in names}


def assert_close(got: Array, expected: Array, tolerance: float, name: str) -> None:
    assert got.shape == expected.shape, name
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error <= tolerance, f"{name}: relative L2 error must be <= {tolerance}; got {error}"


def finite_difference(loss: Callable[[], float], array: Array, step: float = 1e-5) -> Array:
    """Central differences of loss() by every element of the array that it reads."""
    grad = np.zeros(array.shape)
    for at in np.ndindex(array.shape):
        kept = array[at]
        array[at] = kept + step
        above = loss()
        array[at] = kept - step
        below = loss()
        array[at] = kept
        grad[at] = (above - below) / (2 * step)
    return grad


def off_grid(rng: np.random.Generator, shape: tuple[int, ...], reach: int) -> Array:
    """Shifts in [-reach, reach) at least 0.1 from every multiple of one half, so that a window
    with an offset_scale of 0.5, 1 or 2 puts no point near the kink at an integer coordinate."""
    halves = rng.integers(-2 * reach, 2 * reach, shape) / 2
    return halves + rng.uniform(0.1, 0.4, shape)


@pytest.mark.parametrize(
    "case",
    ["plain", "small_scale", "large_scale", "no_center", "softmax", "stride2", "dilation2", "wide"],
)
def test_deform_conv_golden(case: str) -> None:
    data = golden_case("deform_conv", case)
    kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, softmax = data[
        "config"
    ].tolist()
    config: dict[str, Any] = {
        "kernel_size": int(kernel_size),
        "stride": int(stride),
        "padding": int(padding),
        "dilation": int(dilation),
        "groups": int(groups),
        "offset_scale": offset_scale,
        "remove_center": bool(remove_center),
        "softmax": bool(softmax),
    }
    inputs = data["value"], data["offset_mask"]
    grad_value, grad_offset_mask = oracle.deform_conv_backward(
        data["grad_output"], *inputs, **config
    )
    assert_close(oracle.deform_conv(*inputs, **config), data["output"], 1e-6, "output")
    assert_close(grad_value, data["grad_value"], 1e-6, "grad_value")
    assert_close(grad_offset_mask, data["grad_offset_mask"], 1e-6, "grad_offset_mask")


@pytest.mark.parametrize("case", ["four_levels", "one_level", "two_levels"])
def test_ms_deform_attn_golden(case: str) -> None:
    data = golden_case("ms_deform_attn", case)
    inputs = data["value"], data["shapes"].tolist(), data["locations"], data["logits"]
    grad_value, grad_locations, _ = oracle.ms_deform_attn_backward(
        data["grad_output"], *inputs, softmax=True
    )
    assert_close(oracle.ms_deform_attn(*inputs, softmax=True), data["output"], 1e-6, "output")
    assert_close(grad_value, data["grad_value"], 1e-6, "grad_value")
    assert_close(grad_locations, data["grad_locations"], 1e-6, "grad_locations")


# (H, W), the (Ho, Wo) that follows, points a group, and the window
CONV_CASES: dict[str, tuple[tuple[int, int], tuple[int, int], int, dict[str, Any]]] = {
    "1x1": ((2, 3), (2, 3), 1, {"kernel_size": 1, "padding": 0}),
    "3x3": ((2, 3), (2, 3), 9, {}),
    "3x5": ((2, 4), (2, 2), 15, {"kernel_size": (3, 5)}),
    "2x3_padding": ((2, 1), (3, 3), 6, {"kernel_size": (2, 3), "padding": (1, 2)}),
    "stride": ((5, 6), (3, 2), 9, {"stride": (2, 3)}),
    "dilation": ((4, 3), (2, 2), 6, {"kernel_size": (3, 2), "dilation": (2, 3)}),
    "small_scale": ((3, 2), (3, 2), 9, {"offset_scale": 0.5}),
    "large_scale": ((2, 2), (2, 3), 6, {"kernel_size": (3, 2), "offset_scale": 2.0}),
    "no_center": ((2, 2), (2, 3), 5, {"kernel_size": (3, 2), "remove_center": True}),
}


@pytest.mark.parametrize("softmax", [False, True], ids=["weights", "softmax"])
@pytest.mark.parametrize("case", CONV_CASES)
def test_deform_conv_finite_difference(case: str, softmax: bool) -> None:
    size, out_size, count, window = CONV_CASES[case]
    batch, groups, depth, padding_channels = 2 if case == "1x1" else 1, 2, 2, 2
    rng = np.random.default_rng(0)
    value = rng.standard_normal((batch, *size, groups * depth))
    offset_mask = rng.standard_normal((batch, *out_size, 3 * groups * count + padding_channels))
    for g in range(groups):
        offsets = slice(3 * count * g, 3 * count * g + 2 * count)
        offset_mask[..., offsets] = off_grid(rng, offset_mask[..., offsets].shape, reach=2)
    grad_output = rng.standard_normal((batch, *out_size, groups * depth))
    config = {**window, "groups": groups, "softmax": softmax}

    def loss() -> float:
        return float((oracle.deform_conv(value, offset_mask, **config) * grad_output).sum())

    grads = oracle.deform_conv_backward(grad_output, value, offset_mask, **config)
    assert_close(grads[0], finite_difference(loss, value), 1e-8, "grad_value")
    assert_close(grads[1], finite_difference(loss, offset_mask), 1e-8, "grad_offset_mask")
    assert not grads[1][..., -padding_channels:].any()


@pytest.mark.parametrize("flat_weights", [False, True], ids=["L,P", "L*P"])
@pytest.mark.parametrize("softmax", [False, True], ids=["weights", "softmax"])
def test_ms_deform_attn_finite_difference(softmax: bool, flat_weights: bool) -> None:
    batch, queries, groups, depth, points = 2, 2, 2, 3, 2
    shapes = [(3, 2), (1, 4), (2, 2)]
    rng = np.random.default_rng(0)
    value = rng.standard_normal((batch, sum(h * w for h, w in shapes), groups, depth))
    heads = (batch, queries, groups, len(shapes))
    pixels = off_grid(rng, (*heads, points, 2), reach=2) + 1
    sizes = np.array([(w, h) for h, w in shapes]).reshape(-1, 1, 2)
    locations = (pixels + 0.5) / sizes
    weights = rng.standard_normal((*heads, points))
    if flat_weights:
        weights = weights.reshape(*heads[:3], -1)
    grad_output = rng.standard_normal((batch, queries, groups * depth))
    inputs = value, shapes, locations, weights

    def loss() -> float:
        return float((oracle.ms_deform_attn(*inputs, softmax=softmax) * grad_output).sum())

    grads = oracle.ms_deform_attn_backward(grad_output, *inputs, softmax=softmax)
    assert (np.abs(pixels - (sizes - 1) / 2) > (sizes + 1) / 2).any()
    assert_close(grads[0], finite_difference(loss, value), 1e-8, "grad_value")
    assert_close(grads[1], finite_difference(loss, locations), 1e-8, "grad_locations")
    assert_close(grads[2], finite_difference(loss, weights), 1e-8, "grad_weights")


@pytest.mark.parametrize("box_normalizer", ["", "points", "size"])
def test_offsets_finite_difference(box_normalizer: str) -> None:
    """From points, or from boxes."""
    shapes = [(3, 2), (1, 4), (2, 2)]
    rng = np.random.default_rng(0)
    value = rng.standard_normal((2, sum(h * w for h, w in shapes), 2, 3))
    sizes = np.array([(w, h) for h, w in shapes], np.float64)[:, None]
    references = rng.uniform(0.2, 0.9, (1, 2, 3, 4 if box_normalizer else 2))
    heads = (2, 2, 2, len(shapes), 2)
    ends = (off_grid(rng, (*heads, 2), reach=2) + 1.5) / sizes
    unit = 1 / sizes
    if box_normalizer:
        unit = (
            references[:, :, None, :, None, 2:]
            / 2
            * (1 / 2 if box_normalizer == "points" else unit)
        )
    offsets = (ends - references[:, :, None, :, None, :2]) / unit
    weights = rng.standard_normal(heads)
    grad_output = rng.standard_normal((2, 2, 6))
    inputs = value, shapes, references, offsets, weights

    def loss() -> float:
        output = oracle.ms_deform_attn_from_offsets(*inputs, box_normalizer=box_normalizer)
        return float((output * grad_output).sum())

    grads = oracle.ms_deform_attn_from_offsets_backward(
        grad_output, *inputs, box_normalizer=box_normalizer
    )
    for name, array, grad in zip(
        ("value", "references", "offsets", "weights"),
        (value, references, offsets, weights),
        grads,
        strict=True,
    ):
        assert_close(grad, finite_difference(loss, array), 1e-7, f"grad_{name}")


def test_points_run_columns_outermost() -> None:
    """With zero offsets and all weight on point k = i*kh + j, the output is value moved by that
    point of the rectangular, strided, dilated window."""
    kh, kw, (sh, sw), (ph, pw), (dh, dw) = 3, 2, (2, 1), (2, 1), (1, 3)
    value = np.random.default_rng(0).standard_normal((1, 5, 6, 2))
    padded = np.pad(value, ((0, 0), (ph, ph), (pw, pw), (0, 0)))
    kept = [(i, j) for i in range(kw) for j in range(kh) if (i, j) != (1, 1)]
    for k, (i, j) in enumerate(kept):
        expected = padded[:, j * dh :: sh, i * dw :: sw][:, :4, :5]
        offset_mask = np.zeros((1, 4, 5, 15))
        offset_mask[..., 10 + k] = 1
        got = oracle.deform_conv(
            value,
            offset_mask,
            kernel_size=(kh, kw),
            stride=(sh, sw),
            padding=(ph, pw),
            dilation=(dh, dw),
            groups=1,
            remove_center=True,
        )
        np.testing.assert_array_equal(got, expected)


def test_window_centre_is_the_floor_of_the_product() -> None:
    """With offset_scale 0 every point is at ox*s - p + d*(k - 1)//2: 3*(2 - 1)//2 = 1 in x, and
    1*(4 - 1)//2 = 1 in y."""
    value = np.arange(30.0).reshape(1, 5, 6, 1)
    got = oracle.deform_conv(
        value,
        np.full((1, 2, 3, 24), 1 / 8),
        kernel_size=(4, 2),
        padding=0,
        dilation=(1, 3),
        groups=1,
        offset_scale=0.0,
    )
    np.testing.assert_allclose(got, value[:, 1:3, 1:4], rtol=1e-15)


def test_bilinear_border_and_integer_coordinates() -> None:
    image = np.random.default_rng(0).standard_normal((3, 4, 2))
    for x, y in [(-1, 1), (4, 1), (1, -1), (1, 3), (np.nan, 1), (1, np.nan), (np.inf, 1)]:
        assert oracle.bilinear(image, x, y) == []
    assert oracle.bilinear(image, -0.25, 2.5) == [(2, 0, 0.5 * 0.75, 0.5, -0.75)]

    def sample(x: float, y: float) -> list[Array]:
        """The sample and its derivatives by x and y."""
        corners = oracle.bilinear(image, x, y)
        return [sum(at[n] * image[at[:2]] for at in corners) for n in (2, 3, 4)]

    here = image[1, 1]
    np.testing.assert_array_equal(sample(1, 1), [here, image[1, 2] - here, image[2, 1] - here])
    np.testing.assert_array_equal(sample(3, 2), [image[2, 3], -image[2, 3], -image[2, 3]])


@pytest.mark.parametrize("outside", [np.nan, np.inf, -np.inf, 1e30])
def test_outside_points_contribute_nothing(outside: float) -> None:
    """The output is that of the other points, and the point's own gradients are 0."""
    rng = np.random.default_rng(0)
    value, grad_output = rng.standard_normal((2, 1, 3, 3, 2))
    offset_mask = rng.standard_normal((1, 3, 3, 27))
    offset_mask[..., 4] = outside
    silent = offset_mask.copy()
    silent[..., [4, 5, 18 + 2]] = 0
    output = oracle.deform_conv(value, offset_mask, groups=1)
    np.testing.assert_array_equal(output, oracle.deform_conv(value, silent, groups=1))

    grads = oracle.deform_conv_backward(grad_output, value, offset_mask, groups=1)
    expected = oracle.deform_conv_backward(grad_output, value, silent, groups=1)
    expected[1][..., 18 + 2] = 0
    np.testing.assert_array_equal(grads[0], expected[0])
    np.testing.assert_array_equal(grads[1], expected[1])


def test_empty_inputs() -> None:
    value, offset_mask = np.zeros((0, 3, 3, 4)), np.zeros((0, 3, 3, 112))
    assert oracle.deform_conv(value, offset_mask).shape == (0, 3, 3, 4)
    no_points = oracle.deform_conv(
        np.ones((1, 2, 2, 4)),
        np.zeros((1, 2, 2, 0)),
        kernel_size=1,
        padding=0,
        remove_center=True,
        softmax=True,
    )
    np.testing.assert_array_equal(no_points, np.zeros((1, 2, 2, 4)))
    no_queries = oracle.ms_deform_attn(
        np.ones((1, 4, 2, 3)), [(2, 2)], np.zeros((1, 0, 2, 1, 4, 2)), np.zeros((1, 0, 2, 1, 4))
    )
    assert no_queries.shape == (1, 0, 6)
