"""Mixed precision: autocast, mixed inputs, gradients that are scaled, infinite or not a number."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcnv4 import DCNv4, DCNv4Conv2d, FlashDeformAttn, functional
from support.emulated import emulated, why_not
from support.runner import Runner

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
OPERATORS = pytest.mark.parametrize(
    "op", ["deform_conv", "ms_deform_attn", "ms_deform_attn_from_offsets"]
)
LEVELS = [(3, 40), (2, 20)]


def autocast(device: str, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    if (device, dtype) == ("cpu", torch.float16) and not hasattr(torch, "get_autocast_dtype"):
        pytest.skip(f"torch {torch.__version__} has no float16 autocast on the CPU")
    return torch.autocast(device, dtype)


def inputs(op: str, device: str = "cpu", batch: int = 1) -> list[Tensor]:
    """In float32, leaves; points lie inside the image, at places that no half can hold."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    if op == "deform_conv":
        offsets = 1.7 * uniform(batch, 2, 40, 2, 6) - 0.85
        masks = uniform(batch, 2, 40, 2, 3) + 0.5
        tensors = [
            uniform(batch, 2, 40, 8) - 0.5,
            torch.cat((offsets, masks), -1).flatten(3),
        ]
    else:
        shape = batch, 5, 2, 2, 3
        value = uniform(batch, 160, 2, 4) - 0.5
        if op == "ms_deform_attn":
            places = [0.2 + 0.6 * uniform(*shape, 2)]
        else:
            near = (uniform(*shape, 2) - 0.5) * torch.tensor([3.0, 0.1])
            places = [0.2 + 0.6 * uniform(batch, 5, 2, 2), near]
        tensors = [value, *places, uniform(*shape) + 0.5]
    return [t.to(device).requires_grad_() for t in tensors]


def operator(op: str, backend: str | None = None) -> Callable[..., Tensor]:
    if op == "deform_conv":
        # One row of three points: few enough for Triton's interpreter.
        window: dict[str, Any] = {"kernel_size": (1, 3), "padding": (0, 1), "groups": 2}
        return lambda *a: functional.deform_conv(*a, **window, backend=backend)
    attention = getattr(functional, op)
    return lambda *a: attention(a[0], LEVELS, *a[1:], backend=backend)


def run(call: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor | None = None) -> Any:
    output = call(*leaves)
    seed = torch.ones_like(output) if grad is None else grad.to(output)
    return output.detach(), torch.autograd.grad(output, leaves, seed)


@OPERATORS
@HALVES
def test_autocast_casts_the_value_alone(op: str, half: torch.dtype, backend: Runner) -> None:
    """The same bits as of a value cast by hand; gradients in the leaves' own dtype."""
    backend.require(op, half)
    leaves = inputs(op, backend.device)
    call = operator(op, backend.backend)
    with autocast(backend.device, half):
        output, grads = run(call, leaves)
    assert output.dtype == half
    assert {grad.dtype for grad in grads} == {torch.float32}
    expected, expected_grads = run(lambda value, *rest: call(value.to(half), *rest), leaves)
    assert torch.equal(output, expected)
    for got, right in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, right, rtol=2**-7, atol=2**-7)  # a GPU adds in any order


@OPERATORS
@HALVES
def test_transforms_under_autocast(op: str, half: torch.dtype) -> None:
    """`torch.func` sees the same dtypes and sums as a plain call does."""
    leaves = inputs(op)
    plain = [t.detach() for t in leaves]

    def call(*tensors: Tensor) -> Tensor:
        with autocast("cpu", half):
            return operator(op, "reference")(*tensors)

    output, grads = run(call, leaves)
    assert torch.func.vmap(call)(*(t[None] for t in plain)).dtype == half
    moved, _ = torch.func.jvp(call, tuple(plain), tuple(torch.ones_like(t) for t in plain))
    torch.testing.assert_close(moved, output)
    every = tuple(range(len(leaves)))
    got = torch.func.grad(lambda *a: call(*a).sum(), argnums=every)(*plain)
    for one, other in zip(got, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-7)


@OPERATORS
@HALVES
def test_coordinates_are_never_rounded_down(op: str, half: torch.dtype, backend: Runner) -> None:
    """Near column 40 a half's next number is 1/32 pixel or more away."""
    backend.require(op, half)
    value, coordinates, *rest = (t.detach() for t in inputs(op, backend.device))
    # A value that is 0 and 1 in turn tells where between columns it was read.
    columns = [torch.arange(width).repeat(height) % 2 for height, width in LEVELS]
    if op == "deform_conv":
        value = (torch.arange(40.0, device=backend.device) % 2).expand(1, 2, 40).unsqueeze(-1)
        value = value.expand(1, 2, 40, 8)
        coordinates[..., [6, 7, 8, 15, 16, 17]] = torch.tensor([0.0, 1.0, 0.0] * 2).to(coordinates)
        coordinates[..., 1::9] = coordinates[..., 3::9] = coordinates[..., 5::9] = 0.0
    else:
        value = torch.cat(columns).float().view(1, 160, 1, 1).expand(1, 160, 2, 4)
        value = value.to(backend.device)
        rest[-1] = torch.zeros_like(rest[-1])
        rest[-1][:, :, :, 0, 0] = 1.0
    call = operator(op, backend.backend)
    with autocast(backend.device, half):
        output = call(value, coordinates, *rest)
    wide = operator(op, "reference")
    exact = wide(value.double(), coordinates.double(), *(t.double() for t in rest))
    # The result alone is rounded: to the nearest number of the half, but for float32's own error.
    # Triton's interpreter cuts a bfloat16 off instead; CUDA rounds what corners count, too.
    rounding = 1.0 if backend.interpreted and half == torch.bfloat16 else 0.5
    if backend.backend == "cuda":
        rounding = 1.5
    budget = rounding * torch.finfo(half).eps + 1e-4
    assert (output.double() - exact).abs().max() <= budget
    rounded = coordinates.to(half).double()
    if op == "deform_conv":  # x of the one point that counts: in the image, not from its column
        column = torch.arange(40, device=backend.device)[:, None]
        rounded[..., 2::9] = (coordinates[..., 2::9] + column).to(half).double() - column
    error = wide(value.double(), rounded, *(t.double() for t in rest)) - exact
    assert error.abs().max() > 2 * budget


@OPERATORS
@HALVES
def test_mixed_inputs(op: str, half: torch.dtype, backend: Runner) -> None:
    """Any mixture is computed in numbers that hold all of it, with and without autocast."""
    backend.require(op, half)
    exact = [t.detach() for t in inputs(op, backend.device)]
    call = operator(op, backend.backend)
    other = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float16}[half]
    for dtypes in (
        (half, *(torch.float32,) * 3),
        (half, half, torch.float32, half),
        (half, *(other,) * 3),
        (torch.float32, *(half,) * 3),
    ):
        leaves = [t.to(d).requires_grad_() for t, d in zip(exact, dtypes, strict=False)]
        output, grads = run(call, leaves)
        assert output.dtype == dtypes[0]
        assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
        wide, _ = run(operator(op, "reference"), [t.double() for t in leaves])
        eps = torch.finfo(dtypes[0]).eps
        budget = eps * wide.abs() + 1e-5
        if backend.backend == "cuda" and dtypes[0] == half:  # it interpolates in half precision
            value, *coordinates = (t.double() for t in leaves)
            budget += 2 * eps * run(operator(op, "reference"), [value.abs(), *coordinates])[0]
        assert ((output.double() - wide).abs() <= budget).all(), dtypes
        with autocast(backend.device, half):
            assert call(*leaves).dtype == half


@OPERATORS
@HALVES
def test_cuda_kernels_emulated(op: str, half: torch.dtype) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(f"the emulator {reason}")
    with emulated():
        test_coordinates_are_never_rounded_down(op, half, Runner("cuda", "cpu"))
        test_mixed_inputs(op, half, Runner("cuda", "cpu"))


@OPERATORS
@DEVICES
def test_float64_and_disabled_regions_stay_as_they_are(op: str, device: str) -> None:
    leaves = inputs(op, device)
    call = operator(op)
    with torch.autocast(device, torch.bfloat16):
        assert call(*(t.double() for t in leaves)).dtype == torch.float64
        with torch.autocast(device, enabled=False):
            assert call(*leaves).dtype == torch.float32
        assert call(*leaves).dtype == torch.bfloat16


@OPERATORS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_comes_out(
    op: str, dtype: torch.dtype, number: float, backend: Runner
) -> None:
    """In every gradient of its own image, so that a scaler skips the step; and in no other's."""
    backend.require(op, dtype)
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs(op, backend.device, batch=2)]
    call = operator(op, backend.backend)
    grad = torch.ones_like(call(*leaves))
    _, clean = run(call, leaves, grad)
    grad.view(2, -1)[0, 3] = number
    _, grads = run(call, leaves, grad)
    for got, before in zip(grads, clean, strict=True):
        assert before.isfinite().all()
        assert not got[0].isfinite().all()
        torch.testing.assert_close(got[1], before[1], rtol=2**-7, atol=2**-7)


@OPERATORS
def test_scaled_gradients_do_not_overflow_between(op: str, backend: Runner) -> None:
    """Gradients near float16's largest number, whose products go far beyond it."""
    backend.require(op, torch.float16)
    value, coordinates, *rest = (t.detach() for t in inputs(op, backend.device))
    weights = rest[-1] if rest else coordinates.unflatten(-1, (2, 9))[..., 6:]
    weights.mul_(1e-5 if op == "deform_conv" else 1e-6)
    leaves = [t.half().requires_grad_() for t in (100 * value, coordinates, *rest)]
    output = operator(op, backend.backend)(*leaves)
    generator = torch.Generator().manual_seed(1)
    signs = torch.rand(output.shape, generator=generator).to(backend.device)
    grad = (6e4 * (2 * signs - 1)).half()
    _, grads = run(operator(op, backend.backend), leaves, grad)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    _, exact = run(operator(op, "reference"), wide, grad)
    largest = torch.finfo(torch.float16).max
    products = grad.double().abs().max() * wide[0].abs().max()
    assert products > 10 * largest
    for got, right in zip(grads, exact, strict=True):
        fits = right.abs() < largest
        assert got[fits].isfinite().all()
        error = (got.double() - right).abs()[fits]
        budget = 2**-10 * right.abs()[fits] + 2e-6 * right.abs().max()
        assert (error <= budget).all()
        assert not got[right.abs() > 1.01 * largest].isfinite().any()
    assert (exact[0].abs() < largest).all()


def network(device: str) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(
        DCNv4Conv2d(3, 16, padding=1), nn.ReLU(), DCNv4Conv2d(16, 8, padding=1), nn.Flatten(1)
    )
    return made.to(device)


def grad_scaler(device: str, scale: float) -> Any:
    if device == "cuda":
        return torch.cuda.amp.GradScaler(init_scale=scale, growth_interval=2)
    scaler = getattr(torch.amp, "GradScaler", None)
    if scaler is None:
        pytest.skip(f"GradScaler on a CPU needs torch >= 2.3; got {torch.__version__}")
    return scaler(device, init_scale=scale, growth_interval=2)


@DEVICES
@HALVES
@pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning")
def test_grad_scaler(device: str, half: torch.dtype) -> None:
    """Good steps are taken and the scale grows; an overflow is seen, skipped, and halves it."""
    scaler = grad_scaler(device, 2.0**10)
    model = network(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    x = torch.randn(2, 3, 6, 6, device=device)

    def step(factor: float = 1.0) -> tuple[bool, float]:
        """Whether parameters changed, and the loss."""
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with autocast(device, half):
            output = model(x)
        loss = (output.float() - 1).square().mean()
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        changed = any(
            not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)
        )
        return changed, loss.item()

    losses = [step() for _ in range(4)]
    assert all(changed for changed, _ in losses)
    assert losses[-1][1] < losses[0][1]
    assert scaler.get_scale() == 2.0**12
    for factor in (math.inf, math.nan):
        scale = scaler.get_scale()
        assert not step(factor)[0]
        assert scaler.get_scale() == scale / 2
    assert step()[0]


@DEVICES
@pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning")
@pytest.mark.parametrize("name", ["DCNv4", "FlashDeformAttn"])
def test_an_overflow_inside_a_layer_is_seen(name: str, device: str) -> None:
    """A hook makes the operator's own incoming gradient infinite: the step is skipped."""
    scaler = grad_scaler(device, 1.0)
    torch.manual_seed(0)
    x = torch.randn(1, 16, 16, device=device)
    arguments: tuple[Any, ...] = (x,)
    layer: Any = DCNv4(16, group=2)
    if name == "FlashDeformAttn":
        layer = FlashDeformAttn(16, n_levels=1, n_heads=2)
        arguments = x, torch.rand(1, 16, 1, 2, device=device), x, [(4, 4)]
    layer.to(device)
    before = layer.value_proj.weight.detach().clone()
    layer.output_proj.register_forward_pre_hook(
        lambda module, args: args[0].register_hook(lambda grad: grad * math.inf) and None
    )
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    with autocast(device, torch.bfloat16):
        output = layer(*arguments)
    scaler.scale(output.float().square().sum()).backward()
    assert not layer.value_proj.weight.grad.isfinite().all()
    scaler.step(optimizer)
    assert torch.equal(layer.value_proj.weight, before)
