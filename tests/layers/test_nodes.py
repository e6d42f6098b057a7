"""Layers as one node of autograd: what they compute, when they are one, what works all the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from dcnv4 import DCNv4, DCNv4Conv2d, FlashDeformAttn
from dcnv4.layers import projections
from support import grid_sample, oracle
from support.autograd import nodes

pytestmark = pytest.mark.skipif(
    not hasattr(getattr(torch, "compiler", None), "is_dynamo_compiling"),
    reason=f"layers are composed before torch 2.3; got {torch.__version__}",
)

SHAPES = ((4, 5), (2, 3))
LENGTH = sum(height * width for height, width in SHAPES)
CONV: dict[str, dict[str, Any]] = {
    "default": {},
    "no_bias": {"output_bias": False},
    "depthwise": {"dw_kernel_size": 3},
    "depthwise_no_bias": {"dw_kernel_size": 5, "output_bias": False},
    "softmax": {"softmax": True, "remove_center": True},
    "scaled": {"offset_scale": 0.5, "kernel_size": (3, 5), "pad": (1, 2)},
    "dilated": {"pad": 2, "dilation": 2},
}
COMPOSED: dict[str, dict[str, Any]] = {
    "center_feature_scale": {"center_feature_scale": True},
    "without_pointwise": {"without_pointwise": True},
    "strided": {"stride": 2},
}
ATTENTION: dict[str, dict[str, Any]] = {
    "points": {},
    "boxes": {"size": 4},
    "boxes_by_size": {"size": 4, "use_4D_normalizer": True},
    "masked": {"masked": True},
    "narrow": {"ratio": 0.5},
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(layer: nn.Module) -> nn.Module:
    layer = layer.double()
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.3 * random(*parameter.shape, seed=seed))
    return layer


class Case:
    """A layer, its arguments in float64, and the same written down in plain PyTorch."""

    def __init__(self, name: str) -> None:
        self.name = name
        if name in ATTENTION:
            settings = dict(ATTENTION[name])
            size, masked = settings.pop("size", 2), settings.pop("masked", False)
            self.layer = randomised(FlashDeformAttn(8, 2, 2, 3, **settings))
            reference = random(2, 4, 2, size, seed=2).sigmoid()
            mask = random(2, LENGTH, seed=3) > 0.5 if masked else None
            self.arguments = [random(2, 4, 8), reference, random(2, LENGTH, 8, seed=1)]
            self.others = (SHAPES, None, mask)
        elif name == "conv2d":
            self.layer = randomised(DCNv4Conv2d(6, 8, padding=1, groups=2))
            self.arguments, self.others = [random(2, 6, 4, 5)], ()
        else:
            self.layer = randomised(DCNv4(8, group=2, **(CONV | COMPOSED)[name]))
            self.arguments, self.others = [random(2, 20, 8)], ((4, 5),)

    def __call__(self, layer: Callable[..., Tensor], arguments: list[Tensor]) -> Tensor:
        return layer(*arguments, *self.others)

    def plain(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Output and gradients by name, in float64."""
        leaves = [a.clone().requires_grad_() for a in self.arguments]
        parameters = {n: p.detach().double() for n, p in self.layer.named_parameters()}
        parameters = {n: p.requires_grad_() for n, p in parameters.items()}
        write = _attention if self.name in ATTENTION else _convolution
        output = write(self, parameters, *leaves)
        return output.detach(), self.gradients(output, leaves, parameters)

    def gradients(
        self, output: Tensor, leaves: list[Tensor], parameters: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        names = [*(f"argument {i}" for i in range(len(leaves))), *parameters]
        seed = random(*output.shape, seed=9).to(output.dtype)
        grads = torch.autograd.grad(output, [*leaves, *parameters.values()], seed)
        return dict(zip(names, grads, strict=True))


class _Oracle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, offset_mask: Tensor, settings: Any) -> Tensor:
        ctx.save_for_backward(value, offset_mask)
        ctx.settings = settings
        return torch.from_numpy(oracle.deform_conv(value.numpy(), offset_mask.numpy(), **settings))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        arrays = [tensor.numpy() for tensor in (grad, *ctx.saved_tensors)]
        grads = oracle.deform_conv_backward(*arrays, **ctx.settings)
        return *map(torch.from_numpy, grads), None


def _linear(parameters: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))


def _convolution(case: Case, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    pixels = x.permute(0, 2, 3, 1) if case.name == "conv2d" else x.view(2, 4, 5, 8)
    seen = pixels
    if "offset_mask_dw.weight" in parameters:
        kernel, bias = (parameters[f"offset_mask_dw.{name}"] for name in ("weight", "bias"))
        seen = F.conv2d(pixels.permute(0, 3, 1, 2), kernel, bias, padding="same", groups=8)
        seen = seen.permute(0, 2, 3, 1)
    offset_mask = _linear(parameters, "offset_mask", seen)
    settings = case.layer.window._asdict()
    y = _Oracle.apply(_linear(parameters, "value_proj", pixels), offset_mask, settings)
    y = _linear(parameters, "output_proj", y)
    return y.permute(0, 3, 1, 2) if case.name == "conv2d" else y.flatten(1, 2)


def _attention(
    case: Case, parameters: dict[str, Tensor], query: Tensor, reference: Tensor, rows: Tensor
) -> Tensor:
    layer, mask = case.layer, case.others[2]
    value = _linear(parameters, "value_proj", rows)
    if mask is not None:
        value = value * ~mask[..., None]
    offsets = _linear(parameters, "sampling_offsets", query).view(2, 4, 2, 2, 3, 2)
    weights = _linear(parameters, "attention_weights", query).view(2, 4, 2, 6).softmax(-1)
    sizes = torch.tensor(SHAPES).flip(1)[:, None].double()
    place = reference[:, :, None, :, None]
    if reference.shape[-1] == 2:
        locations = place + offsets / sizes
    else:
        unit = sizes if layer.use_4D_normalizer else 3
        locations = place[..., :2] + offsets / unit * place[..., 2:] / 2
    value = value.unflatten(-1, (2, -1))
    y = grid_sample.ms_deform_attn(SHAPES, value, locations, weights.view(2, 4, 2, 2, 3))
    return _linear(parameters, "output_proj", y)


NODES = [*CONV, "conv2d", *ATTENTION]
DTYPES = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast_bfloat16": (torch.float32, torch.bfloat16),
    "autocast_float16": (torch.float32, torch.float16),
}


def run(
    case: Case, dtype: torch.dtype, autocast: torch.dtype | None
) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = [argument.to(dtype).requires_grad_() for argument in case.arguments]
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        output = case(case.layer, leaves)
    return output, case.gradients(output, leaves, dict(case.layer.named_parameters()))


def is_node(output: Tensor) -> bool:
    return output.grad_fn is not None and output.grad_fn.name() == "_NodeBackward"


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float((found[name].detach().double() - right).norm() / right.norm())
        for name, right in expected.items()
    }


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", NODES)
def test_against_plain_pytorch(name: str, precision: str) -> None:
    """In halves the node is as exact as the calls that it is made of."""
    dtype, autocast = DTYPES[precision]
    if autocast == torch.float16 and not hasattr(torch, "get_autocast_dtype"):
        pytest.skip(f"torch {torch.__version__} has no float16 autocast on the CPU")
    case = Case(name)
    case.layer.to(dtype)
    case.arguments = [argument.to(dtype).double() for argument in case.arguments]
    output, found = run(case, dtype, autocast)
    assert is_node(output)
    assert output.dtype == (autocast or dtype)
    assert {grad.dtype for grad in found.values()} == {dtype}
    right, expected = case.plain()
    made = errors({"output": output, **found}, {"output": right, **expected})
    case.layer.output_proj.register_forward_hook(lambda *_: None)
    output, found = run(case, dtype, autocast)
    assert not is_node(output)
    composed = errors({"output": output, **found}, {"output": right, **expected})
    budget = 8 * torch.finfo(autocast or dtype).eps
    for key, error in made.items():
        assert error <= 2 * composed[key] + budget, (key, error, composed[key])
        assert error <= (0.5 if torch.finfo(autocast or dtype).bits == 16 else 100 * budget), key


@pytest.mark.parametrize("name", ["default", "depthwise", "points"])
def test_one_node(name: str) -> None:
    case = Case(name)
    leaves = [argument.requires_grad_() for argument in case.arguments]
    assert nodes(case(case.layer, leaves)) == ["_NodeBackward"]
    handle = case.layer.output_proj.register_forward_hook(lambda *_: None)
    assert len(nodes(case(case.layer, leaves))) > 4
    handle.remove()
    # A cast input is connected for those who differentiate twice; the gradient goes past that.
    with torch.autocast("cpu", torch.bfloat16):
        inputs = [leaf.detach().float().requires_grad_() for leaf in leaves]
        recorded = nodes(case(case.layer.float(), inputs))
    assert recorded.count("_NodeBackward") == 1
    assert set(recorded) == {"_NodeBackward", "ToCopyBackward0"}


@pytest.mark.parametrize("name", COMPOSED)
def test_what_is_composed(name: str) -> None:
    case = Case(name)
    assert not is_node(case(case.layer, [a.requires_grad_() for a in case.arguments]))


class Same(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight


def _hook(layer: nn.Module, name: str) -> None:
    layer.get_submodule(name).register_forward_hook(lambda *_: None)


def _parametrization(layer: nn.Module, name: str) -> None:
    parametrize.register_parametrization(layer.get_submodule(name), "weight", Same())


def _own_forward(layer: nn.Module, name: str) -> None:
    module = layer.get_submodule(name)
    module.forward = module.forward  # type: ignore[method-assign]


@pytest.mark.parametrize("watch", [_hook, _parametrization, _own_forward])
@pytest.mark.parametrize(
    ("name", "submodule"),
    [
        *[("default", name) for name in ("value_proj", "offset_mask", "output_proj")],
        *[("depthwise", "offset_mask_dw"), ("points", "sampling_offsets")],
        *[("points", name) for name in ("attention_weights", "value_proj", "output_proj")],
    ],
)
def test_a_submodule_that_somebody_watches_is_called(
    name: str, submodule: str, watch: Callable[[nn.Module, str], None]
) -> None:
    case = Case(name)
    expected = run(case, torch.float64, None)[0]
    assert is_node(expected)
    watch(case.layer, submodule)
    output = case(case.layer, [a.requires_grad_() for a in case.arguments])
    assert not is_node(output)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("name", [*CONV, *ATTENTION, "conv2d"])
def test_a_node_refuses_what_submodules_refuse(name: str) -> None:
    """Arguments of which one or two dimensions are longer or shorter: the same error, or output."""
    case = Case(name)
    whole = [*case.arguments, *case.others]
    changes = [
        (i, dim, step)
        for i, argument in enumerate(whole)
        if isinstance(argument, Tensor)
        for dim in range(argument.dim())
        for step in (-1, 1)
    ]

    def outcomes() -> list[Any]:
        found: list[Any] = []
        for chosen in [*combinations(changes, 1), *combinations(changes, 2)]:
            arguments = list(whole)
            for i, dim, step in chosen:
                given = arguments[i]
                rows = torch.arange(given.shape[dim] + step) % given.shape[dim]
                arguments[i] = given.index_select(dim, rows)
            try:
                found.append(case.layer(*arguments).detach())
            except (TypeError, ValueError) as error:
                found.append(str(error))
        return found

    by_node = outcomes()
    for module in case.layer.children():
        module.register_forward_hook(lambda *_: None)
    composed = outcomes()
    assert {type(outcome) for outcome in by_node} == {Tensor, str}
    for found, right in zip(by_node, composed, strict=True):
        if isinstance(right, Tensor):
            torch.testing.assert_close(found, right)
        else:
            assert found == right


def test_a_dropped_bias_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections.Sums, "_rows", lambda self, grad: grad.new_zeros(grad.shape[1]))
    with pytest.raises(AssertionError, match="bias"):
        test_against_plain_pytorch("default", "float64")


@pytest.mark.parametrize("name", ["default", "depthwise", "points", "boxes"])
def test_second_derivatives(name: str) -> None:
    case = Case(name)
    leaves = [argument.requires_grad_() for argument in case.arguments]

    def call(*inputs: Tensor) -> Tensor:
        return case(case.layer, list(inputs))

    assert is_node(call(*leaves))
    assert torch.autograd.gradgradcheck(call, leaves, atol=1e-4, nondet_tol=1e-9, fast_mode=True)


@pytest.mark.parametrize("name", ["default", "conv2d", "points"])
def test_second_derivatives_under_autocast(name: str) -> None:
    """They reach what was cast, and the parameters, as those of the calls do."""
    results = []
    for watched in (False, True):
        case = Case(name)
        case.layer.float()
        if watched:
            case.layer.output_proj.register_forward_hook(lambda *_: None)
        leaves = [argument.float().requires_grad_() for argument in case.arguments]
        with torch.autocast("cpu", torch.bfloat16):
            output = case(case.layer, leaves)
        assert is_node(output) is not watched
        every = [*leaves, *case.layer.parameters()]
        seed = random(*output.shape).to(output.dtype)
        first = torch.autograd.grad(output, every, seed, create_graph=True)
        total = sum(grad.square().sum() for grad in first)
        results.append(torch.autograd.grad(total, every, allow_unused=True))
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            assert (found - expected).norm() <= 0.2 * expected.norm()


@pytest.mark.parametrize("name", ["default", "depthwise", "points"])
def test_only_what_is_needed(name: str) -> None:
    """Frozen parameters and inputs get no gradient; the others the same as ever."""
    case = Case(name)
    _, expected = run(case, torch.float64, None)
    frozen = Case(name)
    for parameter in frozen.layer.parameters():
        parameter.requires_grad_(False)
    leaves = [argument.requires_grad_() for argument in frozen.arguments]
    output = frozen(frozen.layer, leaves)
    assert is_node(output)
    grads = torch.autograd.grad(output, leaves, random(*output.shape, seed=9))
    for i, grad in enumerate(grads):
        torch.testing.assert_close(grad, expected[f"argument {i}"])
    still = Case(name)
    output = still(still.layer, still.arguments)
    assert is_node(output)
    named = dict(still.layer.named_parameters())
    grads = torch.autograd.grad(output, list(named.values()), random(*output.shape, seed=9))
    for key, grad in zip(named, grads, strict=True):
        torch.testing.assert_close(grad, expected[key])


@pytest.mark.parametrize("name", ["default", "points"])
def test_the_ways_of_autograd(name: str) -> None:
    """Twice through one graph, in many directions at once, and through a checkpoint."""
    case = Case(name)
    leaves = [argument.requires_grad_() for argument in case.arguments]
    output = case(case.layer, leaves)
    seeds = torch.stack([random(*output.shape, seed=seed) for seed in (1, 2)])
    one_by_one = [
        torch.autograd.grad(output, leaves, seed, retain_graph=True) for seed in seeds.unbind()
    ]
    at_once = torch.autograd.grad(output, leaves, seeds, retain_graph=True, is_grads_batched=True)
    for found, *expected in zip(at_once, *one_by_one, strict=True):
        torch.testing.assert_close(found, torch.stack(expected))
    again = checkpoint(lambda *a: case(case.layer, list(a)), *leaves, use_reentrant=False)
    for found, expected_ in zip(
        torch.autograd.grad(again, leaves, seeds[0]), one_by_one[0], strict=True
    ):
        torch.testing.assert_close(found, expected_)


def test_a_weight_that_changed_since_is_noticed() -> None:
    case = Case("default")
    output = case(case.layer, [case.arguments[0].requires_grad_()])
    with torch.no_grad():
        case.layer.value_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("name", ["default", "points"])
def test_profilers_are_told_of_the_operator(name: str) -> None:
    case = Case(name)
    with torch.profiler.profile() as profile:
        output = case(case.layer, [a.requires_grad_() for a in case.arguments])
    assert is_node(output)
    operator = "ms_deform_attn_from_offsets" if name == "points" else "deform_conv_packed"
    assert f"dcnv4::{operator}" in {event.key for event in profile.key_averages()}


def test_where_float32_is_rounded_before_it_is_multiplied() -> None:
    """There bias gradients are sums, no products; both ways to ask PyTorch for it are known."""
    code = """
import torch
from dcnv4.layers.projections import _is_rounding
assert not _is_rounding()
torch.set_float32_matmul_precision("high")
assert _is_rounding()
torch.set_float32_matmul_precision("highest")
assert not _is_rounding()
torch.backends.cuda.matmul.allow_tf32 = True
assert _is_rounding()
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert not _is_rounding()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert _is_rounding()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("rows", [1, 8, 52])
def test_ones_sum_rows(rows: int) -> None:
    """As GPUs sum biases; of an odd number of rows, in a product whose operands are aligned."""
    grad = torch.randn(rows, 6)
    ones = projections._ones(grad)
    assert ones.shape == (1 if rows == 8 else 8, rows)
    assert ones.stride() == ((8, 1) if rows == 8 else (1, 8))
    for each in ones @ grad:
        torch.testing.assert_close(each, grad.sum(0))


def test_memory_of_a_step() -> None:
    """What a gradient was made of makes room for the next one: beside its input and the output's
    gradient a step holds 10 times the output in halves at most, of which 6 are the forward's."""
    layer, x = DCNv4(64, group=4), torch.randn(2, 32 * 32, 64, requires_grad=True)
    grad = torch.randn(2, 32 * 32, 64).bfloat16()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x, (32, 32))
        y.backward(grad)
        x.grad = None
        layer.zero_grad()

    step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())])
    assert 6 < held.max() / (grad.numel() * grad.element_size()) < 10
