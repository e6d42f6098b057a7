"""The classic functions, against formulations of their own in their own layouts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcnv4 import FlashDeformAttn, compat
from support import oracle

SHAPES = [(5, 7), (3, 4), (1, 2)]
STARTS = [0, 35, 47]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def check(
    found: Callable[[], Tensor], expected: Callable[[], Tensor], leaves: dict[str, Tensor]
) -> None:
    """Both functions of the leaves must agree, in their output and in every gradient."""
    outputs = [function() for function in (found, expected)]
    torch.testing.assert_close(*outputs)
    grad = torch.randn_like(outputs[1])
    grads = [torch.autograd.grad(output, list(leaves.values()), grad) for output in outputs]
    for name, *pair in zip(leaves, *grads, strict=True):
        torch.testing.assert_close(*pair, msg=lambda m, n=name: f"{n}: {m}")
        assert float(pair[1].abs().max()) > 0, name


def attention_inputs() -> dict[str, Tensor]:
    value = random(2, 49, 3, 4)
    # Some of the points lie outside, none on a pixel's centre or edge.
    locations = (torch.rand(2, 6, 3, 3, 5, 2, dtype=torch.float64) * 1.4 - 0.2).requires_grad_()
    return {"value": value, "locations": locations, "weights": random(2, 6, 3, 3, 5)}


def attention_by_grid_sample(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """[B, Q, G·D]: grid_sample on every level, head after head."""
    batch, _, heads, depth = value.shape
    heads_out = []
    for g in range(heads):
        head = torch.zeros(batch, depth, locations.shape[1], dtype=value.dtype)
        for level, ((h, w), start) in enumerate(zip(SHAPES, STARTS, strict=True)):
            image = value[:, start : start + h * w, g].transpose(1, 2).reshape(batch, depth, h, w)
            grid = 2 * locations[:, :, g, level] - 1
            sampled = F.grid_sample(image, grid, align_corners=False)
            head = head + (sampled * weights[:, None, :, g, level]).sum(-1)
        heads_out.append(head)
    return torch.cat(heads_out, 1).transpose(1, 2)


@pytest.mark.parametrize("function", ["MSDeformAttnFunction", "MultiScaleDeformableAttnFunction"])
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
    check(
        lambda: apply(value, shapes, starts, locations, weights, 64),
        lambda: attention_by_grid_sample(value, locations, weights),
        leaves,
    )


@pytest.mark.parametrize(
    "function", ["multi_scale_deformable_attn_pytorch", "ms_deform_attn_core_pytorch"]
)
def test_attention_fallbacks(function: str) -> None:
    leaves = attention_inputs()
    value, locations, weights = leaves.values()
    shapes = torch.tensor(SHAPES)
    check(
        lambda: getattr(compat, function)(value, shapes, locations, weights),
        lambda: attention_by_grid_sample(value, locations, weights),
        leaves,
    )


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
    wide = attention_by_grid_sample(value.double(), locations.double(), weights.double())
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
        return attention_by_grid_sample(
            value, where.reshape(locations.shape), weights.reshape(logits.shape)
        )

    check(
        lambda: compat.FlashDeformAttnFunction.apply(value, shapes, starts, packed, 64, 5),
        expected,
        {"value": value, "sampling_loc_attn": packed},
    )
    with pytest.raises(ValueError, match=r"3\*L\*K = 72\] with L = 3 and K = 8; got \[2, 6, 3, 45"):
        compat.FlashDeformAttnFunction.apply(value, shapes, starts, packed, 64)


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
    with pytest.raises(ValueError, match=r"mask must be \[B, Ho, Wo, 18\], 9 of each group; got"):
        compat.DCNv3Function.apply(image, offsets.flatten(3), weights[..., 0], *arguments, 256, 0)
    with pytest.raises(ValueError, match=r"remove_center must come with a square kernel.*3 x 5"):
        compat.DCNv3Function.apply(image, offsets, weights, 3, 5, *arguments[2:], 256, 1)


def torchvision_inputs(case: tuple[Any, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Leaves in torchvision's layout, and its settings."""
    kernel, stride, padding, dilation, groups, _, _ = case
    image, offsets, weights, _ = convolution_inputs((*case[:5], 1.0, 0))
    leaves = {
        "input": image.permute(0, 3, 1, 2),
        "offset": offsets.flatten(3).permute(0, 3, 1, 2),
        "bias": random(4 * groups),
        "mask": weights.flatten(3).permute(0, 3, 1, 2),
    }
    leaves = {n: leaf.detach().contiguous().requires_grad_() for n, leaf in leaves.items()}
    settings = {"stride": stride, "padding": padding, "dilation": dilation}
    settings["weight"] = torch.ones(4 * groups, 1, *kernel, dtype=torch.float64)
    return leaves, settings


def deform_conv2d_by_grid_sample(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    mask: Tensor | None,
) -> Tensor:
    """A depthwise one of ones, point after point: rows outermost, (y, x)."""
    (kh, kw), (height, width) = weight.shape[2:], input.shape[2:]
    groups = offset.shape[1] // (2 * kh * kw)
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in offset.shape[2:]), indexing="ij")
    parts = []
    for g, part in enumerate(input.chunk(groups, 1)):
        total = torch.zeros((), dtype=input.dtype)
        for k, (i, j) in enumerate((i, j) for i in range(kh) for j in range(kw)):
            at = g * kh * kw + k
            y = rows * stride[0] - padding[0] + i * dilation[0] + offset[:, 2 * at]
            x = columns * stride[1] - padding[1] + j * dilation[1] + offset[:, 2 * at + 1]
            grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1)
            sampled = F.grid_sample(part, grid, align_corners=False)
            total = total + sampled * (1 if mask is None else mask[:, at, None])
        parts.append(total)
    output = torch.cat(parts, 1)
    return output if bias is None else output + bias[:, None, None]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("optional", [True, False])
def test_deform_conv2d(case: tuple[Any, ...], optional: bool) -> None:
    leaves, settings = torchvision_inputs(case)
    if not optional:
        del leaves["bias"], leaves["mask"]
    arguments = {"bias": None, "mask": None, **leaves, **settings}
    check(
        lambda: compat.deform_conv2d(**arguments),
        lambda: deform_conv2d_by_grid_sample(**arguments),
        leaves,
    )
    assert compat.deform_conv2d(**arguments).is_contiguous()


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_deform_conv2d_is_torchvisions(case: tuple[Any, ...]) -> None:
    try:
        from torchvision.ops import deform_conv2d
    except Exception as error:
        pytest.skip(f"needs torchvision for this build of torch; {type(error).__name__}: {error}")
    leaves, settings = torchvision_inputs(case)
    check(
        lambda: compat.deform_conv2d(**leaves, **settings),
        lambda: deform_conv2d(**leaves, **settings),
        leaves,
    )
    names = inspect.signature(deform_conv2d).parameters
    assert list(inspect.signature(compat.deform_conv2d).parameters) == list(names)


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_deform_conv2d_is_the_onnx_operator(case: tuple[Any, ...]) -> None:
    """ONNX has taken torchvision's layout."""
    for package in ("onnx", "onnxruntime"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}; pip install onnx onnxruntime")
    import onnx
    import onnxruntime
    from onnx import helper

    leaves, settings = torchvision_inputs(case)
    arguments = {n: a.detach().float() for n, a in leaves.items()}
    arguments["weight"] = settings["weight"].float()
    order = ["input", "weight", "offset", "bias", "mask"]
    pads = [*settings["padding"], *settings["padding"]]
    node = helper.make_node(
        "DeformConv",
        order,
        ["output"],
        strides=settings["stride"],
        pads=pads,
        dilations=settings["dilation"],
        group=arguments["input"].shape[1],
        offset_group=case[4],
    )
    kind = onnx.TensorProto.FLOAT
    values = [helper.make_tensor_value_info(n, kind, arguments[n].shape) for n in order]
    result = [helper.make_tensor_value_info("output", kind, None)]
    graph = helper.make_graph([node], "one", values, result)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (expected,) = session.run(None, {n: arguments[n].numpy() for n in order})
    settings["weight"] = arguments.pop("weight")
    found = compat.deform_conv2d(**arguments, **settings)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


def test_deform_conv2d_refusals() -> None:
    leaves, settings = torchvision_inputs(CONVOLUTIONS[0])
    weight = settings.pop("weight")

    def call(**changes: Any) -> Tensor:
        return compat.deform_conv2d(**{**leaves, **settings, "weight": weight, **changes})

    assert call().shape == (2, 8, 7, 9)
    with pytest.raises(ValueError, match=r"weight must be depthwise = \[8, 1, kh, kw\].*8, 8, 3"):
        call(weight=torch.ones(8, 8, 3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"weight must be ones, as the mask holds.*got others"):
        call(weight=2 * weight)
    with pytest.raises(ValueError, match="got one that requires a gradient"):
        call(weight=weight.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"offset must be .* = G\*18, Ho, Wo\]; got \[2, 35"):
        call(offset=leaves["offset"][:, 1:])
    with pytest.raises(ValueError, match=r"mask must be .* = \[2, 18, 7, 9\]; got \[2, 9, 7, 9"):
        call(mask=leaves["mask"][:, :9])
    with pytest.raises(TypeError, match="offset must be a tensor"):
        call(offset=None)
