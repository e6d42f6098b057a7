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
from torch.nn.utils.parametrize import register_parametrization

from dcnv4 import DCNv4, DCNv4Conv2d, FlashDeformAttn, ops
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
def test_a_call_of_a_graph_is_dispatched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the dispatcher to the backend, but by way of who is interested."""
    from torch.utils.flop_counter import FlopCounterMode

    torch._dynamo.reset()
    ways: list[str] = []

    def record(function: Callable[..., Any], *arguments: Any) -> Any:
        ways.append(function.__name__.split(".")[0])
        return below_autograd(function, *arguments)

    below_autograd = ops.below_autograd
    layer = torch.compile(DCNv4(16, group=1), backend="aot_eager")
    x = torch.randn(1, 9, 16)
    wanted = torch.autograd.grad(layer(x, (3, 3)).sum(), layer.parameters())
    monkeypatch.setattr(ops, "below_autograd", record)
    y = layer(x, (3, 3))
    assert ways == ["_on_maps"]
    found = torch.autograd.grad(y.sum(), layer.parameters())
    assert ways == ["_on_maps", "_compute_backward"]
    y = layer(x, (3, 3))
    ways.clear()
    with FlopCounterMode(display=False):  # sees every operation
        seen = torch.autograd.grad(y.sum(), layer.parameters())
    assert ways == ["deform_conv_packed_backward"]
    for grads_found in (found, seen):
        torch.testing.assert_close(grads_found, wanted)


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
    if name.startswith("DCNv3"):
        return (tokens.view(batch, height, width, 8),)
    if name.startswith("DCNv4"):
        return tokens, (height, width)
    query = torch.randn(batch, 5, 8)
    if name == "boxes":
        return query, torch.rand(1, 5, 1, 4), tokens, [(height, width)]
    return query, torch.rand(batch, 5, 1, 2), tokens, [(height, width)]


COMPILED: dict[str, Callable[[], torch.nn.Module]] = {
    "DCNv3": lambda: DCNv3(8, group=2),
    "DCNv3-blended": lambda: DCNv3(8, group=2, center_feature_scale=True),
    "DCNv4": lambda: DCNv4(8, group=2),
    "DCNv4-blended": lambda: DCNv4(8, group=2, center_feature_scale=True),
    "DCNv4-depthwise": lambda: DCNv4(8, group=2, dw_kernel_size=3),
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


needs_packing = pytest.mark.skipif(
    not hasattr(getattr(torch, "compiler", None), "is_exporting"),
    reason=f"compiling and exporting are one to torch {torch.__version__}",
)
PACKED: dict[str, tuple[str, int, int]] = {
    "DCNv3": ("mask", 3, 0),
    "DCNv4": ("value_proj", 2, 2),
    "FlashDeformAttn": ("attention_weights", 3, 3),
}
"""One of the submodules that share a product; how many there are; how many tensors are cast under
autocast: inputs, and all parameters at once. What DCNv3 casts is not counted."""


class Graphs(list[torch.fx.Graph]):
    """Forward and backward behind AOTAutograd, run as they are."""

    def backend(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(fw_compiler=self.record)(module, inputs)

    def record(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from functorch.compile import make_boxed_func

        self.append(module.graph)
        return make_boxed_func(module.forward)

    def count(self, *names: str) -> list[int]:
        operators = [getattr(torch.ops.aten, name).default for name in names]
        return [sum(node.target in operators for node in graph.nodes) for graph in self]

    def maps(self) -> list[str]:
        """What gets or makes a map of four dimensions, which TorchInductor takes for [B, C, H, W]
        where a convolution is near."""
        return [
            str(node.target)
            for graph in self
            for node in graph.nodes
            if "dcnv4" in str(node.target) and any(map(_is_map, (node, *node.all_input_nodes)))
        ]


def _is_map(node: torch.fx.Node) -> bool:
    tensor = node.meta.get("val")
    return isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.shape[0] == 2


def randomised(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    layer = COMPILED[name]()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def results(
    layer: torch.nn.Module, name: str, dtype: torch.dtype, autocast: bool, backend: Any = None
) -> dict[str, Tensor]:
    """Output and gradients by name, compiled where there is a backend."""
    torch._dynamo.reset()
    layer = layer.to(dtype)
    call = layer if backend is None else torch.compile(layer, fullgraph=True, backend=backend)
    torch.manual_seed(1)
    inputs = [a.to(dtype) if isinstance(a, Tensor) else a for a in example(name, 2, 6, 7)]
    leaves = [a.requires_grad_() for a in inputs if isinstance(a, Tensor)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = call(*inputs)
    named = {f"input {i}": leaf for i, leaf in enumerate(leaves)}
    named |= dict(layer.named_parameters())
    found = torch.autograd.grad(output.double().square().sum(), list(named.values()))
    return {"output": output.detach(), **dict(zip(named, found, strict=True))}


def errors(found: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    return {k: float((found[k].double() - t).norm() / t.norm()) for k, t in right.items()}


@needs_packing
@pytest.mark.parametrize("autocast", [False, True], ids=["float64", "autocast"])
@pytest.mark.parametrize("name", PACKED)
def test_a_compiled_layer_is_few_products(name: str, autocast: bool) -> None:
    _, products, casts = PACKED[name]
    graphs, layer = Graphs(), randomised(name)
    right = results(layer, name, torch.float64, False)
    dtype = torch.float32 if autocast else torch.float64
    made = errors(results(layer, name, dtype, autocast, graphs.backend), right)
    assert graphs.count("mm", "addmm", "bmm") == [products, 2 * products]
    if autocast and casts:
        assert graphs.count("_to_copy") == [casts, casts]
    budget = 8 * torch.finfo(torch.bfloat16 if autocast else dtype).eps
    eager = errors(results(layer, name, dtype, autocast), right)
    for key, error in made.items():
        assert error <= 2 * eager[key] + budget, (key, error, eager[key])


@needs_packing
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiler_gets_no_map_to_lay_out(name: str) -> None:
    graphs, layer = Graphs(), randomised(name)
    right = results(layer, name, torch.float64, False)
    made = errors(results(layer, name, torch.float64, False, graphs.backend), right)
    assert max(made.values()) < 1e-12
    calls = [str(n.target) for graph in graphs for n in graph.nodes]
    assert sum("dcnv4" in call for call in calls) == (4 if name == "DCNv4-depthwise" else 2)
    assert graphs.maps() == []
    assert not any("convolution" in call for call in calls if name == "DCNv4-depthwise")


@needs_packing
@pytest.mark.parametrize("name", PACKED)
def test_products_that_are_not_packed_are_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[COMPILED[name]().__module__]
    monkeypatch.setattr(module, "may_read_past", lambda *_: False)
    with pytest.raises(AssertionError, match=r"== \["):
        test_a_compiled_layer_is_few_products(name, False)


@needs_compile
@pytest.mark.parametrize("name", PACKED)
def test_a_watched_submodule_is_called(name: str) -> None:
    submodule, products, _ = PACKED[name]
    graphs, layer = Graphs(), randomised(name)
    right = results(layer, name, torch.float64, False)
    calls: list[int] = []
    layer.get_submodule(submodule).register_forward_hook(lambda *_: calls.append(1))
    made = errors(results(layer, name, torch.float64, False, graphs.backend), right)
    assert calls == [1]
    assert graphs.count("mm", "addmm", "bmm") == [products + 1, 2 * products + 2]
    assert max(made.values()) < 1e-12


class Doubled(torch.nn.Module):
    def __init__(self, module: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return 2 * (x if self.module is None else self.module(x))


@needs_compile
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("way", ["wrapped", "parametrised", "replaced"])
def test_what_changes_after_compiling_is_noticed(name: str, way: str) -> None:
    torch._dynamo.reset()
    submodule, layer = PACKED[name][0], randomised(name)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    inputs = example(name, 2, 6, 7)
    before = compiled(*inputs)
    module = layer.get_submodule(submodule)
    if way == "wrapped":
        setattr(layer, submodule, Doubled(module))
    elif way == "parametrised":
        register_parametrization(module, "weight", Doubled())
    else:
        module.weight = torch.nn.Parameter(2 * module.weight.detach())
    after = compiled(*inputs)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, layer(*inputs))


@needs_packing
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("name", PACKED)
def test_an_exported_layer_calls_its_submodules(name: str, strict: bool) -> None:
    program = torch.export.export(COMPILED[name](), example(name, 2, 6, 7), strict=strict)
    linears = [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert len(linears) == PACKED[name][1] + 1


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


def dispatched(case: cases.Case, *inputs: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """The operator that a case calls, and its flat arguments."""
    recorded: list[tuple[Any, ...]] = []

    class Record(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if isinstance(func, torch._ops.OpOverload):
                recorded.append((func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        case.call(*inputs, backend="reference")
    ((operator, arguments),) = recorded
    assert operator.namespace == "dcnv4"
    return operator, arguments


def with_a_dimension_more(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """As a compiler gets them."""
    return tuple(a.unsqueeze(0) if isinstance(a, Tensor) and a.dim() == 4 else a for a in arguments)


@needs_compile
@CASES
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck(case: cases.Case, grad: bool) -> None:
    """Schema, fakes, autograd registration and dynamic tracing, as PyTorch checks them."""
    inputs = [t.detach().requires_grad_(grad) for t in case.inputs(torch.float64)]
    operator, arguments = dispatched(case, *inputs[:-1])
    torch.library.opcheck(operator, arguments)
    torch.library.opcheck(operator, with_a_dimension_more(arguments))


@CASES
def test_maps_may_have_a_dimension_more(case: cases.Case) -> None:
    """With the same output and derivatives, the second ones too."""
    inputs = [t.detach().requires_grad_() for t in case.inputs(torch.float64)[:-1]]
    operator, arguments = dispatched(case, *inputs)
    results = []
    for given in (arguments, with_a_dimension_more(arguments)):
        y = operator(*given)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(
            sum(g.square().sum() for g in first), inputs, allow_unused=True
        )
        results.append([y.reshape(-1), *first, *second])
    for found, right in zip(*results, strict=True):
        assert (found is None) == (right is None)
        if right is not None:
            torch.testing.assert_close(found, right)


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
