"""The classic functions, against formulations of their own in their own layouts."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcnv4 import FlashDeformAttn, compat
from support import grid_sample, oracle

SHAPES = [(5, 7), (3, 4), (1, 2)]
STARTS = [0, 35, 47]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def attention_inputs() -> dict[str, Tensor]:
    value = random(2, 49, 3, 4)
    # Some of the points lie outside, none on a pixel's centre or edge.
    locations = (torch.rand(2, 6, 3, 3, 5, 2, dtype=torch.float64) * 1.4 - 0.2).requires_grad_()
    return {"value": value, "locations": locations, "weights": random(2, 6, 3, 3, 5)}


@pytest.mark.parametrize(
    "function",
    [
        "MSDeformAttnFunction",
        "MultiScaleDeformableAttnFunction",
        "MultiScaleDeformableAttnFunction_fp16",
        "MultiScaleDeformableAttnFunction_fp32",
    ],
)
@pytest.mark.parametrize("form", ["tensor", "int32", "sequence"])
def test_attention_functions(function: str, form: str) -> None:
    leaves = attention_inputs()
    shapes: Any = SHAPES
    starts: Any = STARTS
    if form != "sequence":
        dtype = torch.int32 if form == "int32" else torch.int64
        shapes, starts = torch.tensor(SHAPES, dtype=dtype), torch.tensor(STARTS, dtype=dtype)
    value, locations, weights = leaves.values()
    apply = getattr(compat, function).apply
    grid_sample.check(
        apply(value, shapes, starts, locations, weights, 64),
        grid_sample.ms_deform_attn(SHAPES, value, locations, weights),
        leaves,
    )


@pytest.mark.parametrize(
    "function", ["multi_scale_deformable_attn_pytorch", "ms_deform_attn_core_pytorch"]
)
def test_attention_fallbacks(function: str) -> None:
    leaves = attention_inputs()
    value, locations, weights = leaves.values()
    shapes = torch.tensor(SHAPES)
    grid_sample.check(
        getattr(compat, function)(value, shapes, locations, weights),
        grid_sample.ms_deform_attn(SHAPES, value, locations, weights),
        leaves,
    )


COUNTS = [5, 2, 3]


def by_counts(points: Tensor) -> Tensor:
    """[B, Q, G, 10, ...], of each level so many points, of [B, Q, G, L, 5, ...]."""
    return torch.cat([points[:, :, :, level, :n] for level, n in enumerate(COUNTS)], 3)


@pytest.mark.parametrize("split", [False, True], ids=["RT-DETRv2", "D-FINE"])
@pytest.mark.parametrize("counts", [COUNTS, [5, 5, 5]], ids=["counts", "alike"])
def test_rtdetr(split: bool, counts: list[int]) -> None:
    leaves = attention_inputs()
    value, locations, weights = leaves.values()
    used = torch.arange(5) < torch.tensor(counts)[:, None]
    expected = grid_sample.ms_deform_attn(SHAPES, value, locations, weights * used)
    if counts == COUNTS:
        points = by_counts(locations), by_counts(weights)
    else:
        points = locations.flatten(3, 4), weights.flatten(3)
    given = value.permute(0, 2, 3, 1).split([h * w for h, w in SHAPES], -1) if split else value
    found = compat.deformable_attention_core_func_v2(given, SHAPES, *points, counts)
    grid_sample.check(found, expected, leaves)


def test_rtdetr_of_one_number_of_points() -> None:
    leaves = attention_inputs()
    expected = grid_sample.ms_deform_attn(SHAPES, *leaves.values())
    value, *points = leaves.values()
    found = compat.deformable_attention_core_func(value, SHAPES, *points)
    grid_sample.check(found, expected, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_rtdetr_discrete(dtype: torch.dtype) -> None:
    """The nearest pixels, those outside moved to the edge; no gradient by the locations."""
    value, locations, weights = (t.detach().to(dtype) for t in attention_inputs().values())
    leaves = {"value": value.requires_grad_(), "weights": weights.requires_grad_()}
    expected = torch.zeros(2, 6, 3, 4, dtype=torch.float64)
    images, heads = torch.arange(2)[:, None, None, None], torch.arange(3)[:, None]
    for level, ((h, w), start, count) in enumerate(zip(SHAPES, STARTS, COUNTS, strict=True)):
        x, y = locations[:, :, :, level, :count].unbind(-1)
        column, row = (x * w + 0.5).long().clamp(0, w - 1), (y * h + 0.5).long().clamp(0, h - 1)
        read = value.double()[images, start + row * w + column, heads]
        expected = expected + (read * weights.double()[:, :, :, level, :count, None]).sum(3)
    locations.requires_grad_()
    found = compat.deformable_attention_core_func_v2(
        value, SHAPES, by_counts(locations), by_counts(weights), COUNTS, method="discrete"
    )
    tolerances = {"rtol": 1e-2, "atol": 1e-2} if dtype is torch.float16 else {}
    torch.testing.assert_close(found, expected.flatten(2).to(dtype), **tolerances)
    grad = torch.randn(2, 6, 12, dtype=dtype)
    grads = torch.autograd.grad(found, [*leaves.values(), locations], grad, allow_unused=True)
    assert grads[2] is None
    right = torch.autograd.grad(expected.flatten(2), [*leaves.values()], grad.double())
    for got, wanted in zip(grads, right, strict=False):
        torch.testing.assert_close(got, wanted, **tolerances)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("origin", ["ultralytics", "lwdetr"])
def test_levels_and_points_in_one_dimension(origin: str, flat: bool) -> None:
    leaves = attention_inputs()
    expected = grid_sample.ms_deform_attn(SHAPES, *leaves.values())
    value, locations, weights = leaves.values()
    weights = weights.flatten(3) if flat else weights
    if origin == "lwdetr":
        channels_first = value.permute(0, 2, 3, 1)
        call, inputs = (
            compat.lwdetr.ms_deform_attn_core_pytorch,
            (channels_first, SHAPES, locations),
        )
    else:
        points = locations.flatten(3, 4) if flat else locations
        call, inputs = (
            compat.ultralytics.multi_scale_deformable_attn_pytorch,
            (value, SHAPES, points),
        )
    grid_sample.check(call(*inputs, weights), expected, leaves)


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The compiled extension of Deformable DETR, as its own code imports it."""
    monkeypatch.delitem(sys.modules, "MultiScaleDeformableAttention", raising=False)
    monkeypatch.setitem(sys.modules, "package", ModuleType("package"))
    monkeypatch.delitem(sys.modules, "package._C", raising=False)
    compat.extension.stand_in("MultiScaleDeformableAttention", "package._C")
    import MultiScaleDeformableAttention  # type: ignore[import-not-found]
    from package import _C  # type: ignore[import-not-found]

    assert MultiScaleDeformableAttention is _C
    return _C


class Compiled(torch.autograd.Function):
    """As repositories call the extension."""

    @staticmethod
    def forward(ctx: Any, extension: Any, value: Tensor, shapes: Tensor, *points: Tensor) -> Tensor:
        starts = torch.tensor(STARTS)
        ctx.extension = extension
        ctx.save_for_backward(value, shapes, starts, *points)
        return extension.ms_deform_attn_forward(value, shapes, starts, *points, 64)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        call = (*ctx.saved_tensors, grad, 64)
        grad_value, *others = ctx.extension.ms_deform_attn_backward(*call)
        return None, grad_value, None, *others


def test_the_extension(imported: Any) -> None:
    leaves = attention_inputs()
    value, *points = leaves.values()
    found = Compiled.apply(imported, value, torch.tensor(SHAPES), *points)
    grid_sample.check(found, grid_sample.ms_deform_attn(SHAPES, *leaves.values()), leaves)


def test_gradients_of_the_extension_have_the_dtypes_of_what_they_are_of(imported: Any) -> None:
    value, *points = (t.detach() for t in attention_inputs().values())
    call = value.half(), torch.tensor(SHAPES), torch.tensor(STARTS), points[0].float(), points[1]
    grads = imported.ms_deform_attn_backward(*call, torch.ones(2, 6, 12), 64)
    assert [g.dtype for g in grads] == [torch.float16, torch.float32, torch.float64]
    exact = value, *call[1:3], *points
    for got, right in zip(
        grads, imported.ms_deform_attn_backward(*exact, torch.ones(2, 6, 12), 64), strict=True
    ):
        torch.testing.assert_close(got.double(), right, rtol=1e-2, atol=1e-2)


def test_an_extension_that_was_imported_stays(imported: Any) -> None:
    with pytest.raises(RuntimeError, match="math must not have been imported before; got <module"):
        compat.extension.stand_in("absent", "math")
    assert "absent" not in sys.modules
    compat.extension.stand_in("package._C")  # once more
    call = (t.detach() for t in attention_inputs().values())
    value, *points = call
    starts = torch.tensor(STARTS)
    with pytest.raises(ValueError, match=r"grad_output must be \[2, 6, 12\]; got \[2, 6\]"):
        imported.ms_deform_attn_backward(
            *(value, torch.tensor(SHAPES), starts, *points, torch.ones(2, 6), 64)
        )


MISUSED: dict[str, Callable[..., Tensor]] = {
    "sampling_locations must be .* with P = 9": lambda v, x, w: (
        compat.deformable_attention_core_func_v2(v, SHAPES, x, w, [5, 1, 3])
    ),
    r"P = 10, the sum of num_points_list; got .* and \[2, 6, 3, 9\]": lambda v, x, w: (
        compat.deformable_attention_core_func_v2(v, SHAPES, x, w[..., :9], COUNTS)
    ),
    "num_points_list must have 3 levels; got 2": lambda v, x, w: (
        compat.deformable_attention_core_func_v2(v, SHAPES, x, w, [5, 5], "discrete")
    ),
    "method must be 'default' or 'discrete'; got 'nearest'": lambda v, x, w: (
        compat.deformable_attention_core_func_v2(v, SHAPES, x, w, COUNTS, "nearest")
    ),
    "sampling_locations must be .* with P = 9, ": lambda v, x, w: (
        compat.ultralytics.multi_scale_deformable_attn_pytorch(v, SHAPES, x, w)
    ),
}


@pytest.mark.parametrize("message", MISUSED)
def test_misused(message: str) -> None:
    value, locations, weights = attention_inputs().values()
    with pytest.raises(ValueError, match=message):
        MISUSED[message](value, by_counts(locations), by_counts(weights))


def test_gradients_of_gradients() -> None:
    value, locations, weights = attention_inputs().values()
    arguments = value[:1, :, :1, :1], locations[:1, :1, :1], weights[:1, :1, :1]

    def function(*leaves: Tensor) -> Tensor:
        value, locations, weights = leaves
        return compat.MSDeformAttnFunction.apply(value, SHAPES, STARTS, locations, weights, 64)

    leaves = [a.detach().requires_grad_() for a in arguments]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    output = function(*leaves)
    twice = [torch.autograd.grad(output.sum(), leaves, retain_graph=True) for _ in range(2)]
    torch.testing.assert_close(*twice, rtol=0, atol=0)


def test_half_precision_keeps_its_dtype() -> None:
    value, locations, weights = (t.detach().bfloat16() for t in attention_inputs().values())
    shapes, starts = torch.tensor(SHAPES), torch.tensor(STARTS)
    output = compat.MSDeformAttnFunction.apply(value, shapes, starts, locations, weights, 64)
    assert output.dtype == torch.bfloat16
    wide = grid_sample.ms_deform_attn(SHAPES, value.double(), locations.double(), weights.double())
    torch.testing.assert_close(output.double(), wide, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([0, 35, 46], r"must be the first rows of L = 3 levels that follow.*= \[0, 35, 47\]; got"),
        ([12, 47, 0], r"got \[12, 47, 0\]"),
        ([0, 35], "must be the first rows of L = 3 levels; got 2"),
    ],
)
def test_level_starts_must_agree(starts: list[int], message: str) -> None:
    value, locations, weights = attention_inputs().values()
    logits = torch.cat((locations.flatten(3), weights.flatten(3)), -1)
    for given in (starts, torch.tensor(starts)):
        with pytest.raises(ValueError, match=message):
            compat.MSDeformAttnFunction.apply(value, SHAPES, given, locations, weights, 64)
        with pytest.raises(ValueError, match=message):
            compat.FlashDeformAttnFunction.apply(value, torch.tensor(SHAPES), given, logits, 64, 5)


@pytest.mark.parametrize(
    ("shapes", "starts", "error", "message"),
    [
        (SHAPES, 3, TypeError, "_index must be a tensor or a sequence of L levels; got 3"),
        (SHAPES, torch.tensor(0), TypeError, "_index must be a tensor or a sequence of L levels"),
        (None, STARTS, TypeError, "_shapes must be a tensor or a sequence of L levels; got None"),
        (torch.tensor(3), None, TypeError, r"_shapes must be .* of L levels; got tensor\(3\)"),
        (torch.ones(3, 3, dtype=torch.int64), STARTS, ValueError, r"_shapes must be L = 3 pairs"),
        (torch.ones(3, dtype=torch.int64), STARTS, ValueError, r"_shapes must be L = 3 pairs"),
        ([5, 7, 3], STARTS, TypeError, r"_shapes must be L = 3 pairs \(H, W\); got \[5, 7, 3\]"),
        (SHAPES, ["a", "b", "c"], ValueError, r"_index must be the first rows .*; got \['a', 'b'"),
        (SHAPES, torch.zeros(3, 2), ValueError, r"_index must be the first rows .*; got \[\[0.0"),
    ],
)
def test_level_sizes_and_starts_of_other_kinds(
    shapes: Any, starts: Any, error: type[Exception], message: str
) -> None:
    value, locations, weights = attention_inputs().values()
    with pytest.raises(error, match=message):
        compat.MSDeformAttnFunction.apply(value, shapes, starts, locations, weights, 64)


@pytest.mark.gpu
def test_level_starts_on_a_gpu_are_not_read() -> None:
    value, locations, weights = (t.detach().cuda() for t in attention_inputs().values())
    shapes, starts = torch.tensor(SHAPES).cuda(), torch.tensor(STARTS).cuda()
    compat.MSDeformAttnFunction.apply(value, shapes, starts, locations, weights, 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        compat.MSDeformAttnFunction.apply(value, shapes, starts, locations, weights, 64)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(
    not hasattr(torch, "compiler"), reason=f"needs torch >= 2.1; got {torch.__version__}"
)
def test_attention_compiles_in_one_graph() -> None:
    arguments = [t.detach() for t in attention_inputs().values()]
    shapes, starts = torch.tensor(SHAPES), torch.tensor(STARTS)

    def function(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return compat.MSDeformAttnFunction.apply(value, shapes, starts, locations, weights, 64)

    torch._dynamo.reset()
    found = torch.compile(function, backend="eager", fullgraph=True)(*arguments)
    torch.testing.assert_close(found, function(*arguments))


def test_flash_deform_attn_function() -> None:
    value, locations, logits = attention_inputs().values()
    packed = torch.cat((locations.flatten(3), logits.flatten(3)), -1).detach().requires_grad_()
    shapes, starts = torch.tensor(SHAPES), torch.tensor(STARTS)

    def expected() -> Tensor:
        where, weights = packed[..., :30], packed[..., 30:].softmax(-1)
        return grid_sample.ms_deform_attn(
            SHAPES, value, where.reshape(locations.shape), weights.reshape(logits.shape)
        )

    grid_sample.check(
        compat.FlashDeformAttnFunction.apply(value, shapes, starts, packed, 64, 5),
        expected(),
        {"value": value, "sampling_loc_attn": packed},
    )
    with pytest.raises(
        ValueError, match=r"3\*L\*K = 72\] or .* 216\] with L = 3 and K = 8; got \[2, 6, 3, 45"
    ):
        compat.FlashDeformAttnFunction.apply(value, shapes, starts, packed, 64)


@pytest.mark.parametrize("name", ["fp16", "fp32"])
def test_attention_functions_under_autocast(name: str) -> None:
    """BEVFormer's two choose the dtype themselves; positions are never rounded."""
    value, locations, weights = (t.detach().float() for t in attention_inputs().values())
    dtype = torch.float16 if name == "fp16" else torch.float32
    apply = getattr(compat, f"MultiScaleDeformableAttnFunction_{name}").apply
    arguments = torch.tensor(SHAPES), torch.tensor(STARTS), locations, weights, 64
    with torch.autocast("cpu", torch.bfloat16):
        found = apply(value.bfloat16(), *arguments)
        assert (value @ value.mT).dtype == torch.bfloat16  # it is on as before
    assert found.dtype == dtype
    rounded = value.bfloat16().to(dtype)
    expected = compat.MSDeformAttnFunction.apply(rounded, *arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert apply(value.double(), *arguments).dtype == torch.float64
    with pytest.raises(TypeError, match="value must be a tensor"):
        apply(None, *arguments)


def test_ms_deform_attn_is_the_layer() -> None:
    assert compat.MSDeformAttn is FlashDeformAttn


# Kernel, stride, padding, dilation (pairs: down, across), groups, offset scale, centre removed.
CONVOLUTIONS = [
    ((3, 3), (1, 1), (1, 1), (1, 1), 2, 1.0, 0),
    ((3, 3), (2, 1), (1, 0), (1, 2), 2, 2.0, 1),
    ((3, 5), (1, 2), (0, 2), (2, 1), 1, 0.5, 0),
    ((5, 5), (2, 2), (2, 2), (1, 1), 3, 1.0, 1),
]


def convolution_inputs(case: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor, list[Any]]:
    """An image [B, H, W, C], offsets and weights [B, Ho, Wo, G, K(, 2)], the other arguments."""
    kernel, stride, padding, dilation, groups, scale, removed = case
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip((7, 9), kernel, stride, padding, dilation, strict=True)
    ]
    points = kernel[0] * kernel[1] - removed
    offsets = random(2, *size, groups, points, 2)
    arguments = [*kernel, *stride, *padding, *dilation, groups, 4, scale]
    return random(2, 7, 9, 4 * groups), offsets, random(2, *size, groups, points), arguments


def check_convolution(
    found: Callable[[Tensor, Tensor, Tensor], Tensor],
    image: Tensor,
    offsets: Tensor,
    weights: Tensor,
    case: tuple[Any, ...],
) -> None:
    """Output and gradients of `found` against the oracle's loops."""
    kernel, stride, padding, dilation, groups, scale, removed = case
    window = {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "offset_scale": scale,
        "remove_center": bool(removed),
    }
    fields = np.concatenate([t.detach().flatten(4).numpy() for t in (offsets, weights)], -1)
    packed = fields.reshape(*fields.shape[:3], -1)
    pixels = image.detach().numpy()
    output = found(image, offsets, weights)
    expected = oracle.deform_conv(pixels, packed, **window)
    torch.testing.assert_close(output.detach(), torch.from_numpy(expected))
    grad = torch.randn_like(output)
    grads = torch.autograd.grad(output, (image, offsets, weights), grad)
    by_image, by_packed = oracle.deform_conv_backward(grad.numpy(), pixels, packed, **window)
    points = weights.shape[4]
    by_fields = torch.from_numpy(by_packed).unflatten(3, (groups, -1))
    torch.testing.assert_close(grads[0], torch.from_numpy(by_image))
    torch.testing.assert_close(grads[1].flatten(4), by_fields[..., : 2 * points])
    torch.testing.assert_close(grads[2], by_fields[..., 2 * points :])


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_dcnv4_function(case: tuple[Any, ...], padded: bool) -> None:
    image, offsets, weights, arguments = convolution_inputs(case)

    def found(image: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        packed = torch.cat((offsets.flatten(4), weights), -1).flatten(3)
        if padded:
            packed = F.pad(packed, (0, -packed.shape[3] % 8))
        return compat.DCNv4Function.apply(image, packed, *arguments, 256, case[-1])

    check_convolution(found, image, offsets, weights, case)


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("function", ["DCNv3Function", "dcnv3_core_pytorch"])
def test_dcnv3(function: str, case: tuple[Any, ...]) -> None:
    image, offsets, weights, arguments = convolution_inputs(case)

    def found(image: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        tensors = image, offsets.flatten(3), weights.flatten(3)
        if function == "DCNv3Function":
            return compat.DCNv3Function.apply(*tensors, *arguments, 256, case[-1])
        return compat.dcnv3_core_pytorch(*tensors, *arguments, case[-1])

    check_convolution(found, image, offsets, weights, case)


def test_convolution_refusals() -> None:
    image, offsets, weights, arguments = convolution_inputs(CONVOLUTIONS[0])
    packed = torch.cat((offsets.flatten(4), weights), -1).flatten(3)
    wrong = [*arguments[:9], 5, 1.0]
    with pytest.raises(ValueError, match=r"C = group\*group_channels = 10\]; got \[2, 7, 9, 8\]"):
        compat.DCNv4Function.apply(image, packed, *wrong, 256, 0)
    for wrong_mask in (weights[..., 0], weights.flatten(3)[:1], weights.flatten(3)[:, :6]):
        with pytest.raises(
            ValueError, match=r"^mask must be \[B, Ho, Wo, 2\*9\] = \[2, 7, 9, 18\]"
        ):
            compat.DCNv3Function.apply(image, offsets.flatten(3), wrong_mask, *arguments, 256, 0)
    with pytest.raises(ValueError, match=r"remove_center must come with a square kernel.*3 x 5"):
        compat.DCNv3Function.apply(image, offsets, weights, 3, 5, *arguments[2:], 256, 1)
    with pytest.raises(ValueError, match="remove_center must be 0 or 1; got 2"):
        compat.DCNv4Function.apply(image, packed, *arguments, 256, 2)
    names = list(inspect.signature(compat.DCNv4Function.apply).parameters)[2:12]
    for at, name in enumerate(names):
        wrong = [*arguments[:at], "3", *arguments[at + 1 :]]
        with pytest.raises(TypeError, match=f"^{name} must be an integer"):
            compat.DCNv4Function.apply(image, packed, *wrong)
    for name in ("kernel_h", "kernel_w", "group"):
        at = names.index(name)
        wrong = [*arguments[:at], 0, *arguments[at + 1 :]]
        with pytest.raises(ValueError, match=f"^{name} must be an integer >= 1; got 0"):
            compat.DCNv3Function.apply(image, offsets.flatten(3), weights.flatten(3), *wrong)
