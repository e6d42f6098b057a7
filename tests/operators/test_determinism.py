"""Under `torch.use_deterministic_algorithms` runs give the same bits, or the call is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dcnv4 import DCNv4, FlashDeformAttn, backends, functional
from support.runner import Runner, deterministic

RUNS = 4
OPERATORS = ("deform_conv", "ms_deform_attn", "ms_deform_attn_from_offsets")
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


@pytest.fixture(autouse=True)
def in_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # PyTorch asks for this before it multiplies matrices on a GPU in this mode.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with deterministic():
        yield


def inputs(op: str, dtype: torch.dtype, runner: Runner) -> tuple[Tensor, ...]:
    """Differentiable arguments whose points crowd on few pixels: an order shows in the sums."""
    generator = torch.Generator().manual_seed(0)
    tensors: tuple[Tensor, ...]
    size = 3 if runner.interpreted else 40 if runner.device == "cuda" else 12

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if op == "deform_conv":
        tensors = normal(2, size, size, 32), 4 * normal(2, size, size, 56)
    elif op == "ms_deform_attn":
        place = 0.5 + 0.1 * normal(2, size**2, 2, 2, 4, 2)
        tensors = normal(2, 100, 2, 16), place, normal(2, size**2, 2, 2, 4)
    else:
        offsets = normal(2, size**2, 2, 2, 4, 2), normal(2, size**2, 2, 2, 4)
        tensors = normal(2, 100, 2, 16), 0.5 + 0.1 * normal(1, 1, 2, 2), *offsets
    return tuple(t.to(runner.device, dtype).requires_grad_() for t in tensors)


def call(op: str, backend: str | None, *arguments: Tensor) -> Tensor:
    if op == "deform_conv":
        return functional.deform_conv(*arguments, groups=2, backend=backend)
    value, *rest = arguments
    return getattr(functional, op)(value, [(8, 10), (4, 5)], *rest, softmax=True, backend=backend)


def results(op: str, backend: str | None, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    output = call(op, backend, *arguments)
    grad = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, arguments, grad.to(output.dtype))]


def assert_same_bits(run: Callable[[], list[Tensor]]) -> None:
    first = run()
    assert all(tensor.isfinite().all() for tensor in first)
    for _ in range(RUNS - 1):
        for one, other in zip(first, run(), strict=True):
            assert torch.equal(one, other)


def refusal(runner: Runner, op: str, dtype: torch.dtype) -> str | None:
    """Why the backend, which can run the call, cannot run it with deterministic gradients."""
    runner.require(op, dtype)
    return backends.why_not(
        runner.backend, backends.Call(op, torch.device(runner.device), dtype, deterministic=True)
    )


@pytest.mark.parametrize("op", OPERATORS)
@DTYPES
def test_same_bits_or_refused(op: str, dtype: torch.dtype, backend: Runner) -> None:
    reason = refusal(backend, op, dtype)
    arguments = inputs(op, dtype, backend)
    if reason is None:
        assert_same_bits(lambda: results(op, backend.backend, arguments))
        return
    assert "use_deterministic_algorithms" in reason
    with pytest.raises(RuntimeError, match="with deterministic gradients") as raised:
        call(op, backend.backend, *arguments)
    assert f"{backend.backend}: {reason}" in str(raised.value)


@pytest.mark.parametrize("op", OPERATORS)
def test_without_gradients_every_backend_runs(op: str, backend: Runner) -> None:
    backend.require(op)
    arguments = inputs(op, torch.float32, backend)
    with torch.no_grad():
        assert_same_bits(lambda: [call(op, backend.backend, *arguments)])
    frozen = [argument.detach() for argument in arguments]
    assert_same_bits(lambda: [call(op, backend.backend, *frozen)])


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_auto_takes_a_backend_that_can(op: str, device: str) -> None:
    arguments = inputs(op, torch.float32, Runner("reference", device))
    assert_same_bits(lambda: results(op, "auto", arguments))


def pretend_unordered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the reference had no deterministic backward."""
    reference = backends.load("reference")
    monkeypatch.setattr(
        reference, "why_not", lambda call: backends.UNORDERED if call.deterministic else None
    )
    monkeypatch.setattr(backends, "_choose", backends._choose.__wrapped__)


def test_a_refused_call(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_unordered(monkeypatch)
    value, offset_mask = inputs("deform_conv", torch.float32, Runner("reference", "cpu"))
    for arguments in ((value, offset_mask.detach()), (value.detach(), offset_mask)):
        with pytest.raises(RuntimeError, match=r"reference: needs torch\.use_det"):
            call("deform_conv", "reference", *arguments)
    with torch.no_grad():
        call("deform_conv", "reference", value, offset_mask)
    torch.use_deterministic_algorithms(False)
    call("deform_conv", "reference", value, offset_mask)


def test_a_warning_where_pytorch_is_to_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_unordered(monkeypatch)
    arguments = inputs("deform_conv", torch.float32, Runner("reference", "cpu"))
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.warns(UserWarning, match=r"of deform_conv needs torch\.use_det"):
        output = call("deform_conv", "reference", *arguments)
    with pytest.warns(UserWarning, match=r"of deform_conv needs torch\.use_det"):
        output.sum().backward()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        call("deform_conv", "reference", *arguments)


@pytest.mark.parametrize("op", OPERATORS)
def test_a_backward_that_was_recorded_before(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Determinism asked for between forward and backward is not silently missed."""
    pretend_unordered(monkeypatch)
    torch.use_deterministic_algorithms(False)
    arguments = inputs(op, torch.float32, Runner("reference", "cpu"))
    output = call(op, "reference", *arguments)
    torch.use_deterministic_algorithms(True)
    with pytest.raises(RuntimeError, match=r"needs torch\.use_deterministic_algorithms"):
        output.sum().backward()
    torch.use_deterministic_algorithms(False)
    call(op, "reference", *arguments).sum().backward()


@pytest.mark.parametrize("name", ["DCNv4", "FlashDeformAttn"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_layers(name: str, device: str) -> None:
    x = torch.randn(2, 400, 32, device=device)
    arguments: tuple[Any, ...] = (x,)
    layer: torch.nn.Module = DCNv4(32, group=2, dw_kernel_size=3, center_feature_scale=True)
    if name == "FlashDeformAttn":
        layer = FlashDeformAttn(32, n_levels=1, n_heads=2)
        arguments = x, torch.rand(2, 400, 1, 2, device=device), x, [(20, 20)]
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    layer.to(device)

    def run() -> list[Tensor]:
        output = layer(*arguments)
        return [output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))]

    assert_same_bits(run)


def test_a_compiled_call_records_the_choice() -> None:
    if not hasattr(torch, "compiler") or not hasattr(torch.compiler, "is_compiling"):
        pytest.skip(f"torch {torch.__version__} compiles no custom operators in one graph")
    torch._dynamo.reset()
    arguments = inputs("deform_conv", torch.float32, Runner("reference", "cpu"))
    compiled = torch.compile(
        lambda *a: call("deform_conv", None, *a), fullgraph=True, backend="aot_eager"
    )

    def run() -> list[Tensor]:
        output = compiled(*arguments)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), arguments)]

    assert_same_bits(run)
