"""The CUDA kernels on an emulated GPU: their numbers, with threads in either order."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from dcnv4 import functional
from dcnv4.backends.cuda import compile, plans
from support import cases, fuzz_cuda
from support.emulated import emulated, why_not
from support.kernel_cases import EVERY, SORTED, sorted_cases, sorted_conv_cases, tile_cases

NAMED = [name for name, _ in cases.CASES]
HALVES = torch.float16, torch.bfloat16

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"the emulator {why_not()}")


@pytest.mark.parametrize("name", NAMED)
def test_oracle(name: str) -> None:
    """Each case in one dtype, and the threads of every other in the other order."""
    number = NAMED.index(name)
    dtype = cases.DTYPES[number // 2 % 4]
    case = dict(cases.CASES)[name]
    with emulated(backwards=number % 2 == 1):
        case.check(case.run(dtype, "cpu", "cuda"), dtype)


def check_in_either_order(
    case: cases.Case, dtype: torch.dtype, same: Sequence[str] = (), **patches: object
) -> None:
    """Against the oracle, whichever thread of a block runs first; these results (default: all) have
    the same bits then."""
    with emulated(**patches):
        results = case.run(dtype, "cpu", "cuda")
    case.check(results, dtype)
    with emulated(backwards=True, **patches):
        backwards = case.run(dtype, "cpu", "cuda")
    for name in same or results:
        assert torch.equal(results[name], backwards[name]), name
    case.check(backwards, dtype)


@pytest.mark.parametrize("number", range(len(tile_cases())), ids=lambda i: tile_cases()[i].id)
def test_tiles(number: int) -> None:
    """Against the oracle, and the same bits whichever thread runs first."""
    case, dtype = tile_cases()[number], HALVES[number % 3 == 1]
    check_in_either_order(case, dtype, ("output", "grad_offset_mask"), pays_from=EVERY)


@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", [*tile_cases(), *sorted_conv_cases()], ids=lambda case: case.id)
def test_sorted_convolutions(case: cases.ConvCase, dtype: torch.dtype) -> None:
    """Against the oracle; points' gradients in the same bits whichever thread runs first."""
    check_in_either_order(case, dtype, ("grad_offset_mask",), pays_from=SORTED)


@pytest.mark.parametrize("number", range(len(sorted_cases())), ids=lambda i: sorted_cases()[i].id)
def test_sorted(number: int) -> None:
    """Against the oracle; points' gradients in the same bits whichever thread runs first."""
    case, dtype = sorted_cases()[number], cases.DTYPES[1:][number % 3]
    check_in_either_order(case, dtype, ("grad_locations", "grad_weights"), pays_from=EVERY)


@pytest.mark.parametrize("number", [0, 2, 7])
def test_sorted_with_sizes_that_the_host_does_not_know(number: int) -> None:
    case = sorted_cases()[number]
    with emulated(pays_from=EVERY, _sizes=lambda shapes: (None, torch.tensor(shapes))):
        case.check(case.run(torch.float16, "cpu", "cuda"), torch.float16)


@pytest.mark.parametrize(
    "shapes",
    [
        ((9, 11), (5, 7)),
        ((5, 6), (9, 11)),
        ((-1, -1), (9, 11)),
        ((2, 3), (4, -5), (1, 2)),
        ((0, 0),),
    ],
)
def test_sorted_whatever_the_sizes(shapes: tuple[tuple[int, int], ...]) -> None:
    """Every query is of one tile even if the levels are not what the value holds."""
    inputs = _attention(((9, 11), (5, 6)), levels=len(shapes))
    sizes = None, torch.tensor(shapes)
    results = [
        _attention_gradients(inputs, large, _sizes=lambda shapes: sizes) for large in (EVERY, {})
    ]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2**-9, atol=2**-9)


def _attention(shapes: tuple[tuple[int, int], ...], levels: int) -> list[Tensor]:
    """value, locations, weights and the output's gradient, in float16."""
    generator = torch.Generator().manual_seed(0)
    pixels = sum(height * width for height, width in shapes)
    sizes = (2, pixels, 2, 32), (2, pixels, 2, levels, 4, 2), (2, pixels, 2, levels, 4)
    value, locations, weights = (torch.randn(size, generator=generator).half() for size in sizes)
    grad = torch.randn(2, pixels, 64, generator=generator).half()
    return [value, locations * 0.1 + 0.5, weights, grad]


def _attention_gradients(
    inputs: list[Tensor], large: dict[str, int], softmax: bool = True, **patches: object
) -> tuple[Tensor, ...]:
    value, locations, weights, grad = inputs
    with emulated(pays_from=large, **patches) as backend:
        gradients = backend.attn_backward(
            grad, value, ((9, 11), (5, 6)), locations, weights, softmax
        )
    return tuple(gradients)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("bad", [math.inf, math.nan, 65_504.0])
@pytest.mark.parametrize("where", range(4))
def test_sorted_is_not_finite_where_the_direct_kernel_is_not(
    where: int, bad: float, softmax: bool
) -> None:
    inputs = _attention(((9, 11), (5, 6)), levels=2)
    locations, weights = inputs[1:3]
    weights[:, 40:50] *= 0.0 if not softmax else 1.0  # 0 * inf is not to be added
    locations[:, :8] = torch.tensor([5.5 / 11, 4.5 / 9])  # nor where a corner's share is 0
    inputs[where].view(-1)[5::997] = bad
    results = [_attention_gradients(inputs, large, softmax) for large in (EVERY, {})]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2**-9, atol=2**-9, equal_nan=True)


@pytest.mark.parametrize("scale", [2.0**-12, 60_000.0])
def test_sorted_gradients_of_any_scale(scale: float) -> None:
    inputs = _attention(((9, 11), (5, 6)), levels=2)
    inputs[3] *= scale / inputs[3].abs().max()
    results = [_attention_gradients(inputs, large) for large in (EVERY, {})]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2**-9, atol=2**-12 * scale)


def test_which_calls_are_sorted() -> None:
    plain = sorted_cases()[0]
    calls = {
        plain: True,
        replace(plain, queries=40): False,
        replace(plain, depth=24): False,
        replace(plain, per_level=17): True,
        replace(plain, depth=128): False,
    }
    for case, expected in calls.items():
        for dtype in (torch.float16, torch.float64):
            names: list[str] = []
            with (
                emulated(pays_from=EVERY),
                mock.patch.object(
                    compile,
                    "kernel",
                    lambda name, *rest: names.append(name),  # noqa: B023
                ),
            ):
                value, locations, weights, grad = (
                    plans.layout(tensor.detach()) for tensor in case.inputs(dtype)
                )
                sizes = tuple(size for pair in case.shapes for size in pair)
                arguments = value, locations, weights, grad, sizes, True
                plans.attn_plan("attn_backward", *arguments, False, 0)
                plans.attn_plan("attn_backward", *arguments, True, 0)
            sorts = expected and dtype == torch.float16
            assert names == ["attn_sorted_backward" if sorts else "attn_backward"] * 2


def test_small_encoders_are_not_sorted() -> None:
    case = sorted_cases()[0]
    names: list[str] = []
    with (
        emulated(),
        mock.patch.object(compile, "kernel", lambda name, *rest: names.append(name)),
    ):
        layouts = [plans.layout(tensor.detach()) for tensor in case.inputs(torch.float16)]
        sizes = tuple(size for pair in case.shapes for size in pair)
        plans.attn_plan("attn_backward", *layouts, sizes, True, False, 0)
    assert names == ["attn_backward"]


def test_random_encoders() -> None:
    rng = random.Random(7)
    for i in range(12):
        case = fuzz_cuda.sized(rng, fuzz_cuda.attention(rng))
        assert isinstance(case, cases.AttnCase)
        queries = sum(height * width for height, width in case.shapes)
        depth, sigma = rng.choice((16, 32, 32, 64)), rng.choice((0.0, 0.5, 2.0, 9.0))
        case = replace(
            case, id=f"encoder-{i}", queries=queries, depth=depth, sigma=sigma, flat=False
        )
        dtype = rng.choice(cases.DTYPES)
        with emulated(pays_from=EVERY, backwards=i % 2 == 0):
            case.check(case.run(dtype, "cpu", "cuda"), dtype)


def _tiled_call(value: Tensor, offset_mask: Tensor) -> dict[str, Tensor]:
    inputs = value.detach().requires_grad_(), offset_mask.detach().requires_grad_()
    with emulated(pays_from=EVERY):
        output = functional.deform_conv(*inputs, groups=2, backend="cuda")
        grads = torch.autograd.grad(output, inputs, value.detach())
    return {"output": output.detach(), "value": grads[0], "offset_mask": grads[1]}


def _inputs(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (batch, height, width, 32), (batch, height, width, 56)
    value, offset_mask = (torch.randn(size, generator=generator).half() for size in sizes)
    return value, offset_mask


@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_a_tile_is_of_one_image(sigma: float) -> None:
    """Images do not mix. Where tiles are left, what others of the batch hold decides which, and so
    which kernel rounds; otherwise the bits are the same."""
    value, offset_mask = _inputs(3, 5, 9)
    offset_mask[..., :54].view(3, 5, 9, 2, 27)[..., :18] *= sigma
    together = _tiled_call(value, offset_mask)
    for image in range(3):
        part = slice(image, image + 1)
        for name, result in _tiled_call(value[part], offset_mask[part]).items():
            if sigma < 1 and name != "value":  # whose additions come in any order
                assert torch.equal(result, together[name][part]), name
            else:
                torch.testing.assert_close(result, together[name][part], rtol=2**-8, atol=2**-7)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_stays_where_it_is_sampled(bad: float) -> None:
    """A tile multiplies all its pixels' columns with a whole window: 0 * inf must not be added."""
    value, offset_mask = _inputs(1, 8, 8)
    offset_mask[..., :54].view(1, 8, 8, 2, 27)[..., :18] = 0.25
    clean = _tiled_call(value, offset_mask)["output"]
    value[0, 3, 3, 0] = bad
    spoilt = _tiled_call(value, offset_mask)["output"]
    sampled = torch.zeros(1, 8, 8, 32, dtype=torch.bool)
    sampled[:, 1:5, 1:5, 0] = True
    assert torch.equal(spoilt.isfinite(), ~sampled)
    torch.testing.assert_close(spoilt[~sampled], clean[~sampled], rtol=2**-8, atol=2**-7)


@pytest.mark.parametrize("scale", [2.0**-12, 1.0, 60_000.0])
def test_gradients_of_any_scale(scale: float) -> None:
    """Those that a GradScaler makes large neither overflow within nor lose their small members."""
    case = replace(tile_cases()[0], batch=1)
    *inputs, grad = case.inputs(torch.float16)
    grad = grad / grad.abs().max() * scale
    with emulated(pays_from=EVERY):
        output = case.call(*inputs, backend="cuda")
        grads = torch.autograd.grad(output, inputs, grad)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(case.call(*exact, backend="reference"), exact, grad.double())
    for got, right in zip(grads, expected, strict=True):
        legal = right.abs() < 65_000
        error = (got.double() - right).abs()[legal]
        assert (error <= 2**-8 * right.abs()[legal] + 2**-9 * scale).all()


def test_random_calls() -> None:
    rng = random.Random(5)
    for i in range(16):
        kind = fuzz_cuda.attention if i % 3 == 0 else fuzz_cuda.conv
        case = replace(fuzz_cuda.sized(rng, kind(rng)), id=f"random-{i}")
        dtype = rng.choice(cases.DTYPES)
        with emulated(pays_from=EVERY, backwards=i % 2 == 0):
            case.check(case.run(dtype, "cpu", "cuda"), dtype)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMED[::9])
def test_deterministic(name: str, dtype: torch.dtype, deterministic: None) -> None:
    """The same bits whichever thread adds first, and right ones."""
    case = dict(cases.CASES)[name]
    assert torch.float64 not in case.dtypes(dtype)
    check_in_either_order(case, dtype)


@pytest.mark.parametrize("sigma", [0.5, 0.9, 3.0])
def test_deterministic_tiles(sigma: float, deterministic: None) -> None:
    case = replace(tile_cases()[0], sigma=sigma)
    check_in_either_order(case, torch.float16, pays_from=EVERY)


@pytest.mark.parametrize("number", range(4))
def test_deterministic_sorted(number: int, deterministic: None) -> None:
    case = (*sorted_cases()[1:3], tile_cases()[4], sorted_conv_cases()[2])[number]
    for dtype in cases.DTYPES[1:]:
        check_in_either_order(case, dtype, pays_from=SORTED)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-20, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("where", ["grad", "weights"])
def test_deterministic_gradients_of_any_scale(
    where: str, scale: float, deterministic: None
) -> None:
    """Images have units of their own; one whose numbers are not finite is NaN throughout."""
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 6, 7, 16), (2, 6, 7, 28), (2, 6, 7, 16)
    value, offset_mask, grad = (torch.randn(size, generator=generator) for size in sizes)
    changed = grad[0] if where == "grad" else offset_mask[0, ..., 18:27]
    changed[0 if scale < 1 else 2 :] *= scale

    def gradient(backend: str, dtype: torch.dtype) -> Tensor:
        inputs = value.to(dtype).requires_grad_(), offset_mask.to(dtype)
        output = functional.deform_conv(*inputs, groups=1, backend=backend)
        return torch.autograd.grad(output, inputs[0], grad.to(dtype))[0]

    with emulated():
        got = gradient("cuda", torch.float32)
    expected = gradient("reference", torch.float64)
    for image in range(2):
        if not math.isfinite(scale) and image == 0:
            assert got[0].isnan().all()
            continue
        error = (got[image] - expected[image]).abs().max()
        assert error <= 2**-20 * expected[image].abs().max()
