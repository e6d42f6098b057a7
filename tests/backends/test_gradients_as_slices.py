"""Backwards write gradients where they are told to: into slices, or over what they are of; and add
up those of the value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from dcnv4 import DCNv4, FlashDeformAttn, backends, functional
from dcnv4.backends import cuda
from dcnv4.geometry import Reference
from dcnv4.layers import projections
from support import cases, emulated, kernel_cases, launches
from support.launches import DIRECT, EVERY, SORTED
from support.runner import deterministic

CASES = (
    cases.OffsetsCase("slices", batch=2, queries=3, depth=8, softmax=True, shared=(1,)),
    cases.OffsetsCase("slices_of_boxes", queries=1, batch=2, boxes=True),
    cases.OffsetsCase("slices_of_none", queries=0),
)


@pytest.fixture(params=backends.NAMES)
def backend(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Each on CPU tensors."""
    name = request.param
    with ExitStack() as stack:
        if name == "cuda":
            if (reason := emulated.why_not()) is not None:
                pytest.skip(f"the emulator {reason}")
            stack.enter_context(emulated.emulated())
        call = backends.Call("ms_deform_attn", torch.device("cpu"), torch.float16)
        if (reason := backends.load(name).why_not(call)) is not None:
            pytest.skip(f"{name}: {reason}")
        yield backends.load(name)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_slices_of_one_buffer(
    case: cases.OffsetsCase, dtype: torch.dtype, deterministic: bool, backend: Any
) -> None:
    """The same bits as in tensors of their own, and nothing beside them."""
    *inputs, grad = (t.detach() for t in case.inputs(dtype))
    value, points, offsets, weights = inputs
    rows, count = offsets.shape[:2], weights.shape[2:].numel()
    buffer = torch.full((*rows, 3 * count + 5), -7.0, dtype=dtype)
    grad_offsets = buffer[..., 1 : 2 * count + 1].unflatten(-1, offsets.shape[2:])
    grad_weights = buffer[..., 2 * count + 1 : -4].unflatten(-1, weights.shape[2:])

    def run(out: backends.AttnGrads | None) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[Tensor, Tensor, Tensor] = backend.attn_backward(
            *(grad, value, case.shapes, offsets, weights, case.softmax, deterministic),
            *(Reference(points, case.box_normalizer), out),
        )
        return grads

    names = launches.expected(case, dtype, deterministic=deterministic) - {"attn_forward"}
    expected = run(None)
    for grad_value in (None, torch.empty(value.shape, dtype=dtype)):
        buffer.fill_(-7)
        with launches.recorded() as launched:
            found = run((grad_value, grad_offsets, grad_weights))
        assert set(launched.names) == (names if backend.__name__.endswith("cuda") else set())
        assert found[1].data_ptr() == grad_offsets.data_ptr()
        assert found[2].data_ptr() == grad_weights.data_ptr()
        assert grad_value is None or found[0] is grad_value
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        assert (buffer[..., [0, -4, -3, -2, -1]] == -7).all()


def _tiled() -> list[cases.ConvCase]:
    """Near points, far ones, and tiles that are given up."""
    rows = kernel_cases.every_tile_row()
    wanted = [row for row in rows if row["dtype"] is torch.float16 and not row["deterministic"]]
    of = {row["data"]: row for row in wanted}
    return [kernel_cases.tile_case(of[data]) for data in ("near", "few_far", "many_far")]


TECHNIQUES: dict[str, tuple[dict[str, int], list[cases.ConvCase]]] = {
    "direct": (DIRECT, [case for _, case in cases.CASES if isinstance(case, cases.ConvCase)][::9]),
    "sorted": (SORTED, kernel_cases.sorted_conv_cases()[::3]),
    "tiles": (EVERY, _tiled()),
}


def _overwritten(case: cases.ConvCase, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of a call in tensors of their own, and over what they are of."""
    value, offset_mask, grad = (t.detach().to(device) for t in case.inputs(torch.float16))
    window = functional.window(**case.settings, softmax=case.softmax)
    own = list(cuda.conv_backward(grad, value, offset_mask, window))
    value, offset_mask = value.contiguous().clone(), offset_mask.contiguous().clone()
    over = list(cuda.conv_backward(grad, value, offset_mask, window, out=(value, offset_mask)))
    assert over[0] is value
    assert over[1] is offset_mask
    return own, over


@pytest.mark.skipif(emulated.why_not() is not None, reason=f"the emulator {emulated.why_not()}")
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_gradients_over_what_they_are_of(technique: str, backwards: bool) -> None:
    """The same bits, whichever thread of a block runs first."""
    assert torch.float16 in cuda.OVERWRITES
    slices, chosen = TECHNIQUES[technique]
    for case in chosen:
        with emulated.emulated(backwards, slices), launches.recorded() as launched:
            own, over = _overwritten(case, "cpu")
        expected = launches.expected(case, torch.float16, slices)
        names = [
            {n for n in found if "conv" in n and "back" in n}
            for found in (launched.names, expected)
        ]
        assert names[0] == names[1], case.id
        for one, other in zip(own, over, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=case.id)


@pytest.mark.gpu
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_gradients_over_what_they_are_of_on_a_gpu(technique: str) -> None:
    slices, chosen = TECHNIQUES[technique]
    for case in chosen:
        with launches.paying_from(slices):
            own, over = _overwritten(case, "cuda")
        assert torch.equal(own[1].nan_to_num(), over[1].nan_to_num()), case.id
        # Rounded sums of additions in any order.
        close = {"rtol": 2**-9, "atol": 2**-10, "equal_nan": True}
        torch.testing.assert_close(own[0], over[0], **close, msg=case.id)


WAYS = "once", "twice", "hooks", "profiler", "float32", "deterministic"
one_node = pytest.mark.skipif(
    projections._is_saving_watched(),
    reason=f"needs torch >= 2.5, which tells who watches a layer; got {torch.__version__}",
)


@one_node
@pytest.mark.skipif(emulated.why_not() is not None, reason=f"the emulator {emulated.why_not()}")
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_overwrites_what_nobody_reads_again(way: str) -> None:
    torch.manual_seed(0)
    layer = DCNv4(32, group=2, backend="cuda")
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 30, 32, requires_grad=True)
    leaves = x, *layer.parameters()
    over: list[bool] = []
    inner = cuda.conv_backward

    def noted(grad: Tensor, value: Tensor, *rest: Any) -> Any:
        over.append(rest[-1][0].data_ptr() == value.data_ptr())
        return inner(grad, value, *rest)

    def gradients(way: str) -> list[Tensor]:
        saving: Any = nullcontext()
        if way == "hooks":
            saving = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        profiling: Any = nullcontext() if way != "profiler" else torch.profiler.profile()
        watched = mock.patch.object(cuda, "conv_backward", noted)
        with emulated.emulated(), watched, deterministic(way == "deterministic"):
            with torch.autocast("cpu", torch.bfloat16, enabled=way != "float32"), saving:
                y = layer(x, (5, 6))
            with profiling:
                grads = torch.autograd.grad(y.sum(), leaves, retain_graph=way == "twice")
            if way == "twice":
                again = torch.autograd.grad(y.sum(), leaves)
                assert all(map(torch.equal, grads, again))
        return list(grads)

    found = gradients(way)
    assert over == {"once": [True], "twice": [False, True]}.get(way, [False])
    expected = gradients("hooks")
    if way not in ("float32", "deterministic"):
        assert all(map(torch.equal, found, expected))


@pytest.mark.skipif(emulated.why_not() is not None, reason=f"the emulator {emulated.why_not()}")
@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 35, 2, 16), (3, 700, 8, 32), (1, 9, 32, 32)])
def test_sums_of_channels(shape: tuple[int, int, int, int]) -> None:
    """Of sums before they are rounded, added to what is there, whichever thread runs first."""
    for backwards in (False, True):
        with emulated.emulated(backwards), launches.recorded() as launched:
            found, expected = _channel_sums(shape, "cpu")
        torch.testing.assert_close(found, expected)
        columns = [macros.get("COLUMNS") for _, macros in launched.variants]
        assert columns[-1] == str(shape[2] * shape[3])


@pytest.mark.gpu
def test_sums_of_channels_on_a_gpu() -> None:
    for shape in ((1, 2, 1, 1), (8, 17_821, 8, 32), (2, 35, 2, 16), (1, 9, 32, 32)):
        found, expected = _channel_sums(shape, "cuda")
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-4)


def _channel_sums(shape: tuple[int, int, int, int], device: str) -> tuple[Tensor, Tensor]:
    """What `attn_backward` adds up, and what that is in float64: a channel's output gradients times
    their weights, where all points are inside."""
    random = torch.Generator().manual_seed(sum(shape))
    batch, length, groups, depth = shape
    value = torch.randn(shape, generator=random).half()
    locations = torch.rand(batch, 50, groups, 1, 4, 2, generator=random)
    sizes = (length, 1)
    locations[..., 0] = 0.5
    locations[..., 1] = (0.5 + locations[..., 1] * (length - 1)) / length  # between centres
    weights = torch.rand(batch, 50, groups, 1, 4, generator=random).half()
    grad = torch.randn(batch, 50, groups * depth, generator=random).half()
    arguments = [t.to(device) for t in (grad, value, locations, weights)]
    added = torch.ones(groups * depth, device=device)
    cuda.attn_backward(*arguments[:2], [sizes], *arguments[2:], False, channel_sums=added)
    slices = grad.double().view(batch, 50, groups, depth)
    total = (slices * weights.double().sum((3, 4))[..., None]).sum((0, 1)).flatten()
    return added, (1 + total).float().to(device)


def test_which_channels_are_summed() -> None:
    half = torch.float16
    assert cuda.sums_channels(torch.empty(1, 2, 8, 32, dtype=half))
    assert not cuda.sums_channels(torch.empty(1, 2, 8, 24, dtype=half))
    assert not cuda.sums_channels(torch.empty(1, 2, 64, 32, dtype=half))
    assert not cuda.sums_channels(torch.empty(1, 2, 8, 32))
    with deterministic():
        assert not cuda.sums_channels(torch.empty(1, 2, 8, 32, dtype=half))


@one_node
@pytest.mark.skipif(emulated.why_not() is not None, reason=f"the emulator {emulated.why_not()}")
@pytest.mark.parametrize("way", ["summed", "masked", "no_bias", "frozen"])
def test_a_layer_has_its_bias_summed(way: str) -> None:
    """Where the gradient of the value's bias is that of all that the kernel wrote."""
    torch.manual_seed(0)
    layer = FlashDeformAttn(32, n_levels=2, n_heads=2, n_points=2, backend="cuda")
    if way == "no_bias":
        layer.value_proj = nn.Linear(32, 32, bias=False)
    if way == "frozen":
        layer.requires_grad_(False)
    query, rows = torch.randn(2, 7, 32), torch.randn(2, 36, 32, requires_grad=True)
    points = torch.rand(2, 7, 1, 2)
    mask = torch.arange(36).expand(2, 36) > 30 if way == "masked" else None
    leaves = [rows, *(p for p in layer.parameters() if p.requires_grad)]

    def gradients() -> list[Tensor]:
        with emulated.emulated(), launches.recorded() as launched:
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(query, points, rows, ((5, 6), (2, 3)), None, mask)
            grads = torch.autograd.grad(y.sum(), leaves)
        columns.append([m["COLUMNS"] for n, m in launched.variants if n == "convert_sums"])
        return list(grads)

    columns: list[list[str]] = []
    found = gradients()
    with mock.patch.object(cuda, "sums_channels", return_value=False):
        expected = gradients()
    assert columns == [["32" if way == "summed" else "0"], ["0"]]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= 0.01 * other.norm()
