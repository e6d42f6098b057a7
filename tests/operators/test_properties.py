"""Laws that hold for any call, tried on calls that hypothesis makes up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcnv4 import functional
from support import cases
from support.grid_sample import sampling_locations
from support.runner import Runner

pytest.importorskip("hypothesis", reason="the laws are tried by hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

law = settings(
    max_examples=15,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
windows = st.fixed_dictionaries(
    {
        "kernel_size": st.tuples(st.integers(1, 4), st.integers(1, 4)).filter(
            lambda k: k != (1, 1)
        ),
        "stride": pair,
        "padding": st.tuples(st.integers(3, 5), st.integers(3, 5)),
        "dilation": pair,
        "offset_scale": st.sampled_from((0.5, 1.0, 1.3)),
        "remove_center": st.booleans(),
    }
)
conv_cases = st.builds(
    cases.ConvCase,
    id=st.integers(0, 999).map("law_{}".format),
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    depth=st.sampled_from((1, 2, 8, 16)),
    sigma=st.sampled_from((0.3, 4.0)),
    softmax=st.booleans(),
    size=st.tuples(st.integers(4, 6), st.integers(4, 6)),
    window=windows,
    extra=st.integers(0, 3),
)
heads: dict[str, Any] = {
    "id": st.integers(0, 999).map("law_{}".format),
    "batch": st.integers(1, 2),
    "groups": st.integers(1, 3),
    "depth": st.sampled_from((1, 2, 8, 16)),
    "sigma": st.sampled_from((0.3, 4.0)),
    "softmax": st.booleans(),
    "queries": st.integers(1, 5),
    "shapes": st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3).map(
        tuple
    ),
    "per_level": st.integers(1, 5),
}
attn_cases = st.builds(cases.AttnCase, **heads)
offsets_cases = st.builds(
    cases.OffsetsCase,
    **heads,
    boxes=st.booleans(),
    box_normalizer=st.sampled_from(("points", "size")),
    shared=st.sets(st.integers(0, 2)).map(tuple),
)


@pytest.fixture
def runner(backend: Runner) -> Runner:
    """A backend quick enough for many calls, which runs both operators."""
    backend.require("deform_conv")
    backend.require("ms_deform_attn")
    if backend.interpreted:
        pytest.skip("Triton's interpreter takes too long for many calls")
    return backend


def inputs(case: cases.Case, runner: Runner, dtype: torch.dtype) -> list[Tensor]:
    """The differentiable arguments."""
    *arguments, _ = case.inputs(dtype, runner.device)
    return [argument.detach() for argument in arguments]


@law
@given(case=st.one_of(conv_cases, attn_cases))
def test_agrees_with_the_oracle(case: cases.Case, runner: Runner) -> None:
    case.check(runner.run(case, torch.float32), torch.float32)


@law
@given(case=st.one_of(conv_cases, attn_cases), dtype=st.sampled_from(cases.DTYPES))
def test_images_do_not_see_each_other(case: cases.Case, dtype: torch.dtype, runner: Runner) -> None:
    """f(cat[a, b]) = cat[f(a), f(b)], bit by bit."""
    one = inputs(case, runner, dtype)
    other = [tensor.roll(1, -1) for tensor in one]
    both = [torch.cat(tensors) for tensors in zip(one, other, strict=True)]
    apart = [case.call(*arguments, backend=runner.backend) for arguments in (one, other)]
    together = case.call(*both, backend=runner.backend)
    if (runner.backend, runner.device) == ("reference", "cuda"):
        # PyTorch's own kernels there sum in an order that depends on the size.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(together, torch.cat(apart), rtol=8 * eps, atol=8 * eps)
    else:
        assert torch.equal(together, torch.cat(apart))


@law
@given(case=st.one_of(conv_cases, attn_cases, offsets_cases))
def test_linear_in_value(case: cases.Case, runner: Runner) -> None:
    value, *rest = inputs(case, runner, torch.float64)
    other = value.flip(-1) + 1

    def apply(tensor: Tensor) -> Tensor:
        return case.call(tensor, *rest, backend=runner.backend)

    torch.testing.assert_close(
        apply(2.5 * value - other), 2.5 * apply(value) - apply(other), rtol=1e-12, atol=1e-12
    )


@law
@given(case=conv_cases)
def test_conv_linear_in_weights(case: cases.ConvCase, runner: Runner) -> None:
    """With the offsets kept; where the weights are normalised, a constant changes nothing."""
    value, fields = inputs(case, runner, torch.float64)
    points = case.points_per_group
    is_weight = torch.arange(fields.shape[-1], device=fields.device) % (3 * points) >= 2 * points
    backend = runner.backend
    output = case.call(value, fields, backend=backend)
    if case.softmax:
        same = case.call(value, torch.where(is_weight, fields + 3, fields), backend=backend)
        torch.testing.assert_close(same, output, rtol=1e-12, atol=1e-12)
        return
    other = torch.where(is_weight, fields.roll(1, 2) - 1, fields)
    mixed = torch.where(is_weight, 2.5 * fields - other, fields)
    expected = 2.5 * output - case.call(value, other, backend=backend)
    got = case.call(value, mixed, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@law
@given(case=attn_cases)
def test_attention_is_a_sum_over_levels(case: cases.AttnCase, runner: Runner) -> None:
    value, locations, weights = inputs(case, runner, torch.float64)
    if case.softmax:
        weights = weights.flatten(3).softmax(-1).view(weights.shape)
    start, total = 0, torch.zeros((), dtype=torch.float64, device=runner.device)
    for level, (h, w) in enumerate(case.shapes):
        total = total + functional.ms_deform_attn(
            value[:, start : start + h * w],
            ((h, w),),
            locations[:, :, :, level, None],
            weights[:, :, :, level, None],
            backend=runner.backend,
        )
        start += h * w
    got = case.call(*inputs(case, runner, torch.float64), backend=runner.backend)
    torch.testing.assert_close(got, total, rtol=1e-12, atol=1e-12)


@law
@given(shift=st.tuples(st.integers(-3, 3), st.integers(-3, 3)), seed=st.integers(0, 99))
def test_whole_pixels_shift_the_image(shift: tuple[int, int], seed: int, runner: Runner) -> None:
    """Offsets moved by whole pixels read the moved image, bit by bit (they are eighths)."""
    generator = torch.Generator().manual_seed(seed)
    dy, dx = shift
    image = torch.randn(1, 4, 5, 6, generator=generator)
    canvas = F.pad(image, (0, 0, 3, 3, 3, 3)).to(runner.device)
    fields = torch.randn(1, 10, 11, 2, 27, generator=generator).to(runner.device)
    fields[..., :18] = (fields[..., :18] * 16).round() / 8
    moved = fields.clone()
    moved[..., 0:18:2] -= dx
    moved[..., 1:18:2] -= dy
    settings = {"groups": 2, "backend": runner.backend}
    got = functional.deform_conv(canvas, moved.flatten(3), **settings)
    expected = functional.deform_conv(canvas.roll(shift, (1, 2)), fields.flatten(3), **settings)
    assert torch.equal(got, expected)


@law
@given(kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)), groups=st.sampled_from((1, 2, 3)))
def test_equal_weights_and_no_offsets_are_a_box_filter(
    kernel: tuple[int, int], groups: int, runner: Runner
) -> None:
    value = torch.randn(2, 6, 7, 6, generator=torch.Generator().manual_seed(0)).double()
    value = value.to(runner.device)
    padding = kernel[0] // 2, kernel[1] // 2
    points = kernel[0] * kernel[1]
    expected = F.avg_pool2d(
        value.permute(0, 3, 1, 2), kernel, 1, padding, count_include_pad=True
    ).permute(0, 2, 3, 1)
    fields = value.new_zeros(*expected.shape[:3], groups, 3 * points)
    fields[..., 2 * points :] = 1 / points
    got = functional.deform_conv(
        value,
        fields.flatten(3),
        kernel_size=kernel,
        padding=padding,
        groups=groups,
        backend=runner.backend,
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@law
@given(case=offsets_cases)
def test_offsets_are_locations(case: cases.OffsetsCase, runner: Runner) -> None:
    """The call is `ms_deform_attn` at the locations that Deformable DETR would compute, and so are
    its gradients."""
    value, *coordinates, weights = inputs(case, runner, torch.float64)
    leaves = [t.requires_grad_() for t in (value, *coordinates, weights)]
    got = case.call(*leaves, backend=runner.backend)
    locations = sampling_locations(*leaves[1:3], case.shapes, case.box_normalizer)
    expected = functional.ms_deform_attn(
        *(leaves[0], case.shapes, locations, leaves[3]),
        softmax=case.softmax,
        backend=runner.backend,
    )
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    seed = torch.linspace(-1, 1, got.numel(), device=got.device, dtype=got.dtype).view_as(got)
    grads = [torch.autograd.grad(output, leaves, seed) for output in (got, expected)]
    for name, one, other in zip(case.names, *grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=name)


@law
@given(case=st.one_of(conv_cases, attn_cases, offsets_cases))
def test_backends_agree(case: cases.Case, runner: Runner) -> None:
    """In float64, to the rounding of both."""
    got = runner.run(case, torch.float64)
    expected = case.run(torch.float64, backend="reference")
    for name, (_, budget) in case.expected(torch.float64).items():
        difference = (got[name].cpu() - expected[name]).abs()
        assert (difference <= 2 * torch.from_numpy(budget)).all(), name


@law
@given(case=conv_cases)
def test_agrees_with_torchvision(case: cases.ConvCase, runner: Runner) -> None:
    """deform_conv is torchvision's with a depthwise weight of ones, rows of points outermost, y
    before x, and the scale of the kernel's grid in the offsets."""
    torchvision = pytest.importorskip("torchvision", reason="needs torchvision")
    if case.window["remove_center"]:
        case = type(case)(**{**vars(case), "window": {**case.window, "remove_center": False}})
    value, fields = inputs(case, runner, torch.float64)
    (kh, kw), (dh, dw) = case.window["kernel_size"], case.window["dilation"]
    points, scale = kh * kw, case.window["offset_scale"]
    used = fields[..., : 3 * case.groups * points].unflatten(-1, (case.groups, 3 * points))
    weights = used[..., 2 * points :]
    weights = weights.softmax(-1) if case.softmax else weights
    column, row = torch.meshgrid(torch.arange(kw), torch.arange(kh), indexing="ij")
    center = torch.tensor([dw * (kw - 1) // 2, dh * (kh - 1) // 2])
    grid = torch.stack((column.flatten() * dw, row.flatten() * dh), -1) - center
    grid = grid.to(value)
    offsets = used[..., : 2 * points].unflatten(-1, (points, 2))
    offsets = scale * (grid + offsets) - grid

    def rows_outermost(tensor: Tensor) -> Tensor:
        """[B, G, kw * kh, n, Ho, Wo] to [B, G * kh * kw * n, Ho, Wo]."""
        return tensor.unflatten(2, (kw, kh)).transpose(2, 3).flatten(1, 4)

    channels = value.shape[-1]
    settings: dict[str, Any] = {k: case.window[k] for k in ("stride", "padding", "dilation")}
    expected = torchvision.ops.deform_conv2d(
        value.permute(0, 3, 1, 2),
        rows_outermost(offsets.flip(-1).permute(0, 3, 4, 5, 1, 2)),
        value.new_ones(channels, 1, kh, kw),
        mask=rows_outermost(weights[..., None].permute(0, 3, 4, 5, 1, 2)),
        **settings,
    )
    got = case.call(value, fields, backend=runner.backend)
    torch.testing.assert_close(got.permute(0, 3, 1, 2), expected, rtol=1e-11, atol=1e-11)
