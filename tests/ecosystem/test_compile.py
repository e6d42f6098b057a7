"""Graphs: torch.compile in one piece, dynamic shapes, and PyTorch's own checks of an operator."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dcnv4 import DCNv4, DCNv4Conv2d, FlashDeformAttn
from dcnv4.layers import DCNv3
from support import cases

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
CASES = pytest.mark.parametrize(
    "case",
    [
        *(cases.CONV[2], cases.CONV[9], cases.ConvCase("packed", layout="packed", extra=2)),
        *(cases.ATTENTION[0], cases.AttnCase("tensor", tensor=True)),
        *(cases.OFFSETS[0], cases.OffsetsCase("tensor", tensor=True, boxes=True, shared=(1,))),
    ],
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

    layer = DCNv4Conv2d(8, 8, 3, 2, 1, groups=2, backend="reference")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad():
        for size in ((2, 8, 6, 7), (3, 8, 9, 5), (4, 8, 12, 11)):
            x = torch.randn(size)
            torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 1


def example(name: str, batch: int, height: int, width: int) -> tuple[Any, ...]:
    """Arguments of a layer for a batch of maps of this size."""
    tokens = torch.randn(batch, height * width, 8)
    if name == "DCNv3":
        return (tokens.view(batch, height, width, 8),)
    if name == "DCNv4":
        return tokens, (height, width)
    query = torch.randn(batch, 5, 8)
    if name == "boxes":
        return query, torch.rand(1, 5, 1, 4), tokens, [(height, width)]
    return query, torch.rand(batch, 5, 1, 2), tokens, [(height, width)]


COMPILED: dict[str, Callable[[], torch.nn.Module]] = {
    "DCNv3": lambda: DCNv3(8, group=2, center_feature_scale=True),
    "DCNv4": lambda: DCNv4(8, group=2, center_feature_scale=True),
    "FlashDeformAttn": lambda: FlashDeformAttn(8, n_levels=1, n_heads=2),
    "boxes": lambda: FlashDeformAttn(8, 1, 2, ratio=0.5, use_4D_normalizer=True),
}


@needs_compile
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_no_recompilation_for_another_batch_or_size(name: str, grad: bool) -> None:
    """PyTorch's default: the second size makes a dynamic graph, which serves all others."""
    torch._dynamo.reset()
    graphs: list[int] = []

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(1)
        return module.forward

    layer = COMPILED[name]()
    compiled = torch.compile(layer, fullgraph=True, backend=count)
    sizes = ((2, 6, 7), (3, 9, 5), (4, 6, 7), (5, 12, 11), (6, 4, 4))
    getattr(torch._dynamo.utils, "warn_once_cache", set()).clear()
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as of a cache that is looked into
        for size in sizes:
            inputs = example(name, *size)
            output = compiled(*inputs)
            torch.testing.assert_close(output, layer(*inputs))
            if grad:
                output.sum().backward()
    assert len(graphs) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["DCNv4", "FlashDeformAttn"])
def test_cuda_graphs(name: str) -> None:
    """mode="reduce-overhead", forward and backward, replayed with other numbers."""
    torch._dynamo.reset()
    layer = (DCNv4(8, group=2) if name == "DCNv4" else FlashDeformAttn(8, 1, 2)).cuda()
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        inputs = [a.cuda() if isinstance(a, Tensor) else a for a in example(name, 2, 6, 7)]
        results = []
        for call in (layer, compiled):
            layer.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            output = call(*inputs)
            output.square().sum().backward()
            results.append([output.clone(), *(p.grad.clone() for p in layer.parameters())])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


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
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck(case: cases.Case, grad: bool) -> None:
    """Schema, fakes, autograd registration and dynamic tracing, as PyTorch checks them."""
    recorded: list[tuple[Any, ...]] = []

    class Record(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if isinstance(func, torch._ops.OpOverload):
                recorded.append((func, args))
            return func(*args, **(kwargs or {}))

    inputs = [t.detach().requires_grad_(grad) for t in case.inputs(torch.float64)]
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


@CASES
def test_meta_tensors(case: cases.Case) -> None:
    """Shapes and dtypes of forward and backward, without memory."""
    inputs = case.inputs(torch.float32)
    expected = grads(case, lambda *a: case.call(*a, backend="reference"), *inputs)
    got = grads(case, case.call, *(tensor.to("meta") for tensor in inputs))
    for one, other in zip(got, expected, strict=True):
        assert one.is_meta
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_fakes_leave_nothing_behind() -> None:
    """What a layer keeps between calls is never a fake tensor."""
    fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")
    layer = FlashDeformAttn(8, n_levels=1, n_heads=2)
    inputs = example("FlashDeformAttn", 2, 13, 11)
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in inputs]
        assert isinstance(layer(*fakes), fake_tensor.FakeTensor)
    assert type(layer(*inputs)) is Tensor
