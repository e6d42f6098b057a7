"""Graphs: torch.compile in one piece, dynamic shapes, and PyTorch's own checks of an operator."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
from dcnv4 import DCNv4Conv2d

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
CASES = pytest.mark.parametrize(
    "case",
    [cases.CONV[2], cases.CONV[9], cases.ATTENTION[0], cases.AttnCase("tensor", tensor=True)],
    ids=lambda case: f"{type(case).__name__}-{case.id}",
)
needs_compile = pytest.mark.skipif(
    VERSION < (2, 4),
    reason=f"graphs of custom operators need torch >= 2.4; got {torch.__version__}",
)


def grads(case: cases.Case, call: Any, *inputs: Tensor) -> list[Tensor]:
    *arguments, grad = inputs
    leaves = [argument.detach().requires_grad_() for argument in arguments]
    output = call(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


@needs_compile
@CASES
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(case: cases.Case, dynamic: bool) -> None:
    """Forward and backward in one graph each."""
    torch._dynamo.reset()

    def call(*inputs: Tensor) -> Tensor:
        return 2 * case.call(*inputs, backend="reference")

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    inputs = case.inputs(torch.float64)
    got, expected = grads(case, compiled, *inputs), grads(case, call, *inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@needs_compile
def test_one_dynamic_graph_serves_every_size() -> None:
    torch._dynamo.reset()
    graphs: list[int] = []

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(1)
        return module.forward

    layer = DCNv4Conv2d(8, 8, groups=2, stride=2, backend="reference")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad():
        for size in ((2, 8, 6, 7), (3, 8, 9, 5), (4, 8, 12, 11)):
            x = torch.randn(size)
            torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 1


@needs_compile
def test_the_first_call_may_be_a_compiled_one() -> None:
    """In a new process, where no kernel was loaded before."""
    code = """
import torch
from dcnv4 import DCNv4
layer = DCNv4(8, group=2)
compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
x = torch.randn(1, 9, 8, requires_grad=True)
output = compiled(x)
output.sum().backward()
torch.testing.assert_close(output, layer(x), rtol=1e-5, atol=1e-5)
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr


@needs_compile
@CASES
def test_opcheck(case: cases.Case) -> None:
    """Schema, fakes, autograd registration and dynamic tracing, as PyTorch checks them."""
    recorded: list[tuple[Any, ...]] = []

    class Record(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if isinstance(func, torch._ops.OpOverload):
                recorded.append((func, args))
            return func(*args, **(kwargs or {}))

    inputs = case.inputs(torch.float64)
    with Record():
        case.call(*inputs[:-1], backend="reference")
    ((operator, arguments),) = recorded
    assert operator.namespace == "dcnv4"
    torch.library.opcheck(operator, arguments)


@needs_compile
@CASES
def test_fakes_have_the_results_shapes_and_strides(case: cases.Case) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = case.inputs(torch.float32)
    expected = grads(case, lambda *a: case.call(*a, backend="reference"), *inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(tensor) for tensor in inputs]
        got = grads(case, lambda *a: case.call(*a, backend="reference"), *fakes)
    for one, other in zip(got, expected, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
