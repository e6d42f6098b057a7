"""The CUDA kernels on an emulated GPU: their numbers, with threads in either order.

Every test says which kernels run in it, and fails where others do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dcnv4 import functional
from support import cases, fuzz_cuda, kernel_cases, launches, pairs
from support.emulated import emulated, why_not
from support.kernel_cases import not_sorted, not_tiled, plain_tiles, sorted_cases, sorted_conv_cases
from support.launches import DIRECT, EVERY, SORTED
from support.processes import run_module
from support.runner import deterministic
from support.tiers import one_in

NAMED = [name for name, _ in cases.CASES]
DTYPES = cases.DTYPES[1:]

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"the emulator {why_not()}")


def run(
    case: cases.Case,
    dtype: torch.dtype,
    slices: dict[str, int],
    backwards: bool = False,
    **patches: object,
) -> dict[str, Tensor]:
    """Output and gradients, from the kernels that `launches.expected` names."""
    names = launches.expected(case, dtype, slices, torch.are_deterministic_algorithms_enabled())
    with emulated(backwards, slices, **patches), launches.launching(*names):
        return case.run(dtype, "cpu", "cuda")


def check_in_either_order(
    case: cases.Case, dtype: torch.dtype, slices: dict[str, int], same: Sequence[str] = ()
) -> None:
    """Against the oracle, whichever thread of a block runs first; these results (default: all) have
    the same bits then."""
    results, reverse = (run(case, dtype, slices, backwards) for backwards in (False, True))
    case.check(results, dtype)
    case.check(reverse, dtype)
    for name in same or results:
        torch.testing.assert_close(
            results[name], reverse[name], rtol=0, atol=0, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("name", one_in(4, NAMED))
def test_oracle(name: str) -> None:
    """Each case in one dtype, and the threads of every other in the other order."""
    number = NAMED.index(name)
    dtype = cases.DTYPES[number // 2 % 4]
    case = dict(cases.CASES)[name]
    case.check(run(case, dtype, DIRECT, backwards=number % 2 == 1), dtype)


def test_nothing_is_read_beyond_a_tensor() -> None:
    """In a process of its own, which would end there."""
    done = run_module("guarded")
    assert done.returncode == 0, (done.returncode, done.stdout[-200:], done.stderr[-2000:])
    assert set(done.stdout.split()) >= launches.KERNELS - {launches.FIXED_POINT_SCALE}


@pytest.mark.parametrize("row", one_in(30, kernel_cases.tile_rows(), kernel_cases.row_id))
def test_tiles(row: pairs.Row) -> None:
    """All that tile kernels are compiled for, and every pair of it with what they are given."""
    case, dtype = kernel_cases.tile_case(row), row["dtype"]
    names = launches.expected(case, dtype, EVERY, row["deterministic"])
    with (
        deterministic(row["deterministic"]),
        emulated(row["backwards"], EVERY),
        launches.launching(*names) as launched,
    ):
        results = case.run(dtype, "cpu", "cuda")
    kernel_cases.check_left(row, launched.computed)
    case.check(results, dtype, kernel_cases.finite(row, case))


@pytest.mark.parametrize("dtype", one_in(3, DTYPES))
@pytest.mark.parametrize("case", one_in(9, [*sorted_conv_cases(), *not_tiled()], cases.name))
def test_sorted_convolutions(case: cases.ConvCase, dtype: torch.dtype) -> None:
    """Against the oracle; points' gradients in the same bits whichever thread runs first."""
    check_in_either_order(case, dtype, SORTED, ("grad_offset_mask",))


@pytest.mark.parametrize("case", one_in(4, not_tiled(), cases.name))
def test_what_tiles_refuse_is_sorted(case: cases.ConvCase) -> None:
    names = launches.expected(case, torch.float16, SORTED)
    with emulated(pays_from=EVERY), launches.launching(*names):
        case.run(torch.float16, "cpu", "cuda")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.bfloat16) for case in not_sorted()), (plain_tiles(), torch.float64)],
    ids=lambda of: cases.name(of) if isinstance(of, cases.Case) else str(of),
)
def test_what_sorting_refuses_is_direct(case: cases.ConvCase, dtype: torch.dtype) -> None:
    names = launches.expected(case, dtype, DIRECT)
    with emulated(pays_from=EVERY), launches.launching(*names):
        case.check(case.run(dtype, "cpu", "cuda"), dtype)


@pytest.mark.parametrize(
    "number", one_in(9, range(len(sorted_cases())), lambda i: sorted_cases()[i].id)
)
def test_sorted(number: int) -> None:
    """Against the oracle; points' gradients in the same bits whichever thread runs first."""
    case, dtype = sorted_cases()[number], DTYPES[number % 3]
    check_in_either_order(case, dtype, EVERY, [f"grad_{name}" for name in case.names[1:]])


def test_an_encoders_forward_takes_queries_in_tiles() -> None:
    """The same kernel, compiled otherwise."""
    case = sorted_cases()[0]
    for slices, tiles in ((DIRECT, False), (EVERY, True)):
        with emulated(pays_from=slices), launches.recorded() as launched:
            case.run(torch.float16, "cpu", "cuda")
        (macros,) = (macros for name, macros in launched.variants if name == "attn_forward")
        assert macros["QUERY_TILES"] == str(int(tiles))


@pytest.mark.parametrize("number", one_in(3, [0, 2, 7]))
def test_sorted_with_sizes_that_the_host_does_not_know(number: int) -> None:
    case = sorted_cases()[number]
    sizes = {"_sizes": lambda shapes: (None, torch.tensor(shapes))}
    case.check(run(case, torch.float16, EVERY, **sizes), torch.float16)


@pytest.mark.parametrize(
    "shapes",
    one_in(
        5,
        [
            ((9, 11), (5, 7)),
            ((5, 6), (9, 11)),
            ((-1, -1), (9, 11)),
            ((2, 3), (4, -5), (1, 2)),
            ((0, 0),),
        ],
    ),
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
    names = f"attn_{'sorted_' if large else ''}backward", launches.ZEROS, launches.CONVERT_SUMS
    with emulated(pays_from=large, **patches) as backend, launches.launching(*names):
        gradients = backend.attn_backward(
            grad, value, ((9, 11), (5, 6)), locations, weights, softmax
        )
    return tuple(gradients)


@pytest.mark.parametrize("softmax", one_in(2, [True, False]))
@pytest.mark.parametrize("bad", one_in(3, [math.inf, math.nan, 65_504.0]))
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


@pytest.mark.parametrize("scale", one_in(2, [2.0**-12, 60_000.0]))
def test_sorted_gradients_of_any_scale(scale: float) -> None:
    inputs = _attention(((9, 11), (5, 6)), levels=2)
    inputs[3] *= scale / inputs[3].abs().max()
    results = [_attention_gradients(inputs, large) for large in (EVERY, {})]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2**-9, atol=2**-12 * scale)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("order", [False, True], ids=["any", "deterministic"])
def test_which_calls_are_sorted(dtype: torch.dtype, order: bool) -> None:
    plain = replace(sorted_cases()[0], batch=1)
    calls = {
        plain: True,
        replace(plain, queries=40): False,
        replace(plain, depth=24): False,
        replace(plain, per_level=17, groups=1): True,
        replace(plain, depth=128, groups=1): False,
    }
    if order and dtype == torch.float64:
        pytest.skip("float64 has no deterministic gradients")
    for case, expected in calls.items():
        names = launches.expected(case, dtype, EVERY if expected else DIRECT, order)
        with deterministic(order), emulated(pays_from=EVERY), launches.launching(*names):
            case.run(dtype, "cpu", "cuda")


def test_small_calls_are_direct() -> None:
    for case in (sorted_cases()[0], plain_tiles()):
        with emulated(), launches.launching(*launches.expected(case, torch.float16)):
            case.run(torch.float16, "cpu", "cuda")


@pytest.mark.exhaustive
def test_random_encoders() -> None:
    rng = random.Random(7)
    for i in range(12):
        case = fuzz_cuda.sized(rng, fuzz_cuda.attention(rng), SORTED)
        case = replace(case, id=f"encoder-{i}", depth=rng.choice((16, 32, 32, 64)))
        dtype = rng.choice(cases.DTYPES)
        case.check(run(case, dtype, EVERY, backwards=i % 2 == 0), dtype)


# Of a convolution in half precision, of which tiles leave something or nothing.
TILES = launches.expected(plain_tiles(), torch.float16, EVERY)


def _tiled_call(value: Tensor, offset_mask: Tensor) -> dict[str, Tensor]:
    inputs = value.detach().requires_grad_(), offset_mask.detach().requires_grad_()
    with emulated(pays_from=EVERY), launches.launching(*TILES):
        output = functional.deform_conv(*inputs, groups=2, backend="cuda")
        grads = torch.autograd.grad(output, inputs, value.detach())
    return {"output": output.detach(), "value": grads[0], "offset_mask": grads[1]}


def _inputs(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (batch, height, width, 32), (batch, height, width, 56)
    value, offset_mask = (torch.randn(size, generator=generator).half() for size in sizes)
    return value, offset_mask


@pytest.mark.parametrize("sigma", one_in(2, [0.25, 1.0]))
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


def test_weights_of_zero_are_held() -> None:
    """All tiles of a fresh layer are computed as tiles."""
    value, offset_mask = _inputs(1, 8, 8)
    with launches.recorded() as launched:
        results = _tiled_call(value, torch.zeros_like(offset_mask))
    assert launched.computed == [1, 1]
    assert not results["output"].any()


def test_blocks_go_on_after_strips_that_they_give_up() -> None:
    """From tile to tile of a strip, and to the strips behind one whose points are far."""
    value, offset_mask = _inputs(4, 12, 56)
    offset_mask[..., :54].view(4, 12, 56, 2, 27)[..., :18] *= 0.25
    offset_mask[0, ..., :18] += 9
    with launches.recorded() as launched:
        results = _tiled_call(value, offset_mask)
    assert all(0.2 < share < 0.9 for share in launched.computed), launched.computed
    inputs = value.double().requires_grad_(), offset_mask.double().requires_grad_()
    output = functional.deform_conv(*inputs, groups=2, backend="reference")
    grads = torch.autograd.grad(output, inputs, value.double())
    for found, wanted in zip(results.values(), (output, *grads), strict=True):
        assert (found - wanted).norm() < 2e-3 * wanted.norm()
        torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("bad", one_in(2, [math.inf, math.nan]))
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


@pytest.mark.parametrize("scale", one_in(3, [2.0**-12, 1.0, 60_000.0]))
def test_gradients_of_any_scale(scale: float) -> None:
    """Those that a GradScaler makes large neither overflow within nor lose their small members."""
    case = plain_tiles(batch=1)
    *inputs, grad = case.inputs(torch.float16)
    grad = grad / grad.abs().max() * scale
    with emulated(pays_from=EVERY), launches.launching(*TILES):
        output = case.call(*inputs, backend="cuda")
        grads = torch.autograd.grad(output, inputs, grad)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(case.call(*exact, backend="reference"), exact, grad.double())
    for got, right in zip(grads, expected, strict=True):
        legal = right.abs() < 65_000
        error = (got.double() - right).abs()[legal]
        assert (error <= 2**-8 * right.abs()[legal] + 2**-9 * scale).all()


@pytest.mark.exhaustive
@pytest.mark.parametrize("technique", [DIRECT, SORTED, EVERY], ids=["direct", "sorted", "tiles"])
def test_random_calls(technique: dict[str, int]) -> None:
    rng = random.Random(5)
    for i in range(8):
        case, dtype = fuzz_cuda.drawn(rng, technique)
        case = replace(case, id=f"random-{i}")
        case.check(run(case, dtype, technique, backwards=i % 2 == 0), dtype)


@pytest.mark.parametrize("dtype", one_in(2, [torch.float32, torch.float16]))
@pytest.mark.parametrize("name", one_in(5, [name for name in NAMED if "double" not in name][::9]))
def test_deterministic(name: str, dtype: torch.dtype) -> None:
    """The same bits whichever thread adds first, and right ones."""
    case = dict(cases.CASES)[name]
    assert torch.float64 not in case.dtypes(dtype)
    with deterministic():
        check_in_either_order(case, dtype, DIRECT)


@pytest.mark.parametrize("sigma", one_in(3, [0.5, 0.9, 3.0]))
def test_deterministic_tiles(sigma: float) -> None:
    with deterministic():
        check_in_either_order(plain_tiles(sigma=sigma), torch.float16, EVERY)


@pytest.mark.parametrize("number", one_in(4, range(4)))
def test_deterministic_sorted(number: int) -> None:
    case = (*sorted_cases()[1:3], *sorted_conv_cases()[3:6:2])[number]
    for dtype in DTYPES:
        with deterministic():
            check_in_either_order(case, dtype, SORTED)


@pytest.mark.parametrize("scale", one_in(5, [0.0, 1e-30, 1e-20, 1e30, math.inf, math.nan]))
@pytest.mark.parametrize("where", ["grad", "weights"])
def test_deterministic_gradients_of_any_scale(where: str, scale: float) -> None:
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

    names = "conv_forward", "conv_backward", launches.FIXED_POINT_SCALE, launches.CONVERT_SUMS
    with deterministic(), emulated(), launches.launching(*names):
        got = gradient("cuda", torch.float32)
    expected = gradient("reference", torch.float64)
    for image in range(2):
        if not math.isfinite(scale) and image == 0:
            assert got[0].isnan().all()
            continue
        error = (got[image] - expected[image]).abs().max()
        assert error <= 2**-20 * expected[image].abs().max()
