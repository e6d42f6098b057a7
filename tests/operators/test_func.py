"""`torch.func` transforms and forward-mode derivatives of the operators and the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from dcnv4 import DCNv4, DCNv4Conv2d, FlashDeformAttn, ops
from support import cases
from support.runner import Runner

# Points lie at least 1/8 pixel from where the derivative jumps: the steps of finite differences
# stay within a cell.
CASES = (
    cases.ConvCase("func_plain", batch=2, size=(2, 3), depth=2),
    cases.ConvCase("func_softmax", size=(3, 3), softmax=True, depth=3, extra=2),
    cases.ConvCase("func_window", size=(4, 3), window={"kernel_size": (1, 3), "stride": 2}),
    cases.AttnCase("func_attn", batch=2, queries=2, shapes=((3, 2), (1, 2)), per_level=2, depth=2),
    cases.AttnCase("func_tensor", queries=2, shapes=((3, 2),), tensor=True, softmax=True, depth=2),
    cases.OffsetsCase("func_offsets", batch=2, queries=2, shapes=((3, 2),), per_level=2, depth=2),
    cases.OffsetsCase(
        "func_boxes",
        queries=2,
        shapes=((2, 2),),
        per_level=1,
        boxes=True,
        shared=(1,),
        softmax=True,
    ),
)
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
# Whole Jacobians and Hessians take a backward for every element.
SMALL_WINDOW = {"kernel_size": (1, 2), "padding": 0, "offset_scale": 0.5}
SMALL = (
    cases.ConvCase("func_small", batch=2, size=(2, 2), window=SMALL_WINDOW, depth=2),
    cases.ConvCase("func_small_softmax", size=(2, 3), window=SMALL_WINDOW, softmax=True, extra=2),
    *CASES[3:],
)
EVERY_SMALL_CASE = pytest.mark.parametrize("case", SMALL, ids=[case.id for case in SMALL])


def arguments(case: cases.Case) -> tuple[tuple[Tensor, ...], Tensor]:
    """The differentiable arguments in float64, detached, and the output's gradient."""
    *inputs, seed = case.inputs(torch.float64)
    return tuple(argument.detach() for argument in inputs), seed


def by_autograd(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Jacobians [output, input] of a function, a row for each element of its output."""
    leaves = [argument.clone().requires_grad_() for argument in inputs]
    output = function(*leaves)
    rows = [torch.autograd.grad(element, leaves, retain_graph=True) for element in output.flatten()]
    return [torch.stack([row[i].flatten() for row in rows]) for i in range(len(inputs))]


def tangents(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in inputs)


def by_differences(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], steps: tuple[Tensor, ...]
) -> Tensor:
    """The derivative of a function along `steps`, by central differences."""
    size = 1e-6
    ahead, behind = (
        function(*(t + sign * size * step for t, step in zip(inputs, steps, strict=True)))
        for sign in (1, -1)
    )
    return (ahead - behind) / (2 * size)


@EVERY_CASE
def test_grad(case: cases.Case) -> None:
    inputs, seed = arguments(case)
    every = tuple(range(len(inputs)))
    got = grad(lambda *inputs: (case.call(*inputs) * seed).sum(), argnums=every)(*inputs)
    case.check(
        {"output": case.call(*inputs), **case._named(got)},
        torch.float64,
    )


@EVERY_CASE
def test_vjp(case: cases.Case) -> None:
    inputs, seed = arguments(case)
    output, pull_back = vjp(case.call, *inputs)
    case.check({"output": output, **case._named(pull_back(seed))}, torch.float64)


@EVERY_SMALL_CASE
@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobian(case: cases.Case, transform: Callable[..., Any]) -> None:
    inputs, _ = arguments(case)
    got = transform(case.call, argnums=tuple(range(len(inputs))))(*inputs)
    for jacobian, expected in zip(got, by_autograd(case.call, inputs), strict=True):
        torch.testing.assert_close(jacobian.reshape(expected.shape), expected)


@EVERY_CASE
def test_jvp(case: cases.Case) -> None:
    inputs, _ = arguments(case)
    steps = tangents(inputs)
    output, derivative = jvp(case.call, inputs, steps)
    torch.testing.assert_close(output, case.call(*inputs))
    expected = by_differences(case.call, inputs, steps)
    torch.testing.assert_close(derivative, expected, rtol=1e-6, atol=1e-6)


@EVERY_CASE
def test_forward_mode(case: cases.Case) -> None:
    inputs, _ = arguments(case)
    steps = tangents(inputs)
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(t, step) for t, step in zip(inputs, steps, strict=True))
        output, derivative = forward_ad.unpack_dual(case.call(*duals))
    torch.testing.assert_close(output, case.call(*inputs))
    expected = by_differences(case.call, inputs, steps)
    torch.testing.assert_close(derivative, expected, rtol=1e-6, atol=1e-6)


@EVERY_SMALL_CASE
def test_hessian(case: cases.Case) -> None:
    """Of the coordinates, against a backward of the backward."""
    inputs, seed = arguments(case)
    value, coordinate, *rest = inputs

    def loss(coordinate: Tensor) -> Tensor:
        return (case.call(value, coordinate, *rest) * seed).square().sum()

    def gradient(coordinate: Tensor) -> Tensor:
        return torch.autograd.grad(loss(coordinate), coordinate, create_graph=True)[0]

    expected = by_autograd(gradient, (coordinate,))[0]
    got = hessian(loss)(coordinate).reshape(expected.shape)
    torch.testing.assert_close(got, expected)
    assert expected.abs().max() > 0


@EVERY_CASE
def test_vmap(case: cases.Case) -> None:
    inputs, _ = arguments(case)
    stacked = tuple(torch.stack((t, t.flip(0) / 2, 2 * t)) for t in inputs)
    expected = torch.stack([case.call(*one) for one in zip(*stacked, strict=True)])
    torch.testing.assert_close(vmap(case.call)(*stacked), expected)
    last = tuple(t.movedim(0, -1) for t in stacked)
    torch.testing.assert_close(vmap(case.call, in_dims=-1)(*last), expected)


@EVERY_CASE
def test_vmap_over_one_argument(case: cases.Case) -> None:
    (value, *rest), _ = arguments(case)
    stacked = torch.stack((value, 2 * value))
    dims = (0, *(None for _ in rest))
    expected = torch.stack([case.call(one, *rest) for one in stacked])
    torch.testing.assert_close(vmap(case.call, in_dims=dims)(stacked, *rest), expected)


@EVERY_CASE
def test_gradients_of_each_sample(case: cases.Case) -> None:
    """vmap of grad, as for differential privacy."""
    inputs, seed = arguments(case)
    stacked = tuple(torch.stack((t, t / 2)) for t in inputs)

    def loss(*inputs: Tensor) -> Tensor:
        return (case.call(*inputs) * seed).sum()

    got = vmap(grad(loss))(*stacked)
    expected = torch.stack([grad(loss)(*one) for one in zip(*stacked, strict=True)])
    torch.testing.assert_close(got, expected)


def layers() -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    """Layers in float64 with parameters that place points off the grid, and their arguments."""
    torch.manual_seed(0)
    made: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
        "DCNv4": (
            DCNv4(4, group=2, stride=2, dw_kernel_size=3, center_feature_scale=True),
            (torch.randn(2, 3, 4, 4),),
        ),
        "DCNv4Conv2d": (DCNv4Conv2d(3, 4, padding=1, groups=2), (torch.randn(2, 3, 3, 2),)),
        "FlashDeformAttn": (
            FlashDeformAttn(4, n_levels=2, n_heads=2, n_points=2),
            (torch.randn(2, 3, 4), torch.rand(2, 3, 2, 2), torch.randn(2, 8, 4), [(2, 3), (1, 2)]),
        ),
    }
    for layer, _ in made.values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
    return {
        name: (layer.double(), tuple(a.double() if isinstance(a, Tensor) else a for a in inputs))
        for name, (layer, inputs) in made.items()
    }


LAYERS = pytest.mark.parametrize("name", layers())


@LAYERS
def test_layer_grad(name: str) -> None:
    layer, inputs = layers()[name]
    parameters = {key: p.detach() for key, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, parameters, inputs).square().sum()

    got = grad(loss)(parameters)
    layer(*inputs).square().sum().backward()
    for key, parameter in layer.named_parameters():
        torch.testing.assert_close(got[key], parameter.grad, msg=key)


@LAYERS
def test_layer_jvp(name: str) -> None:
    layer, inputs = layers()[name]
    parameters = {key: p.detach() for key, p in layer.named_parameters()}
    steps = dict(zip(parameters, tangents(tuple(parameters.values())), strict=True))

    def call(*values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(parameters, values, strict=True)), inputs)

    _, derivative = jvp(call, tuple(parameters.values()), tuple(steps.values()))
    expected = by_differences(call, tuple(parameters.values()), tuple(steps.values()))
    torch.testing.assert_close(derivative, expected, rtol=1e-5, atol=1e-6)


@LAYERS
def test_layer_ensemble(name: str) -> None:
    """vmap over two sets of parameters."""
    layer, inputs = layers()[name]
    parameters = {key: p.detach() for key, p in layer.named_parameters()}
    both = {key: torch.stack((p, p / 2)) for key, p in parameters.items()}
    got = vmap(lambda one: functional_call(layer, one, inputs))(both)
    expected = torch.stack(
        [functional_call(layer, {k: p[i] for k, p in both.items()}, inputs) for i in range(2)]
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_layer_vmap(channels_last: bool) -> None:
    """Over batches of images, each in the memory format of its own call."""
    layer = layers()["DCNv4Conv2d"][0]
    batches = torch.randn(2, 2, 3, 3, 4, dtype=torch.float64)
    if channels_last:
        batches = batches.transpose(2, 4).contiguous().transpose(2, 4)
    got = vmap(layer)(batches)
    expected = torch.stack([layer(x) for x in batches])
    torch.testing.assert_close(got, expected)
    assert got[0].is_contiguous() or channels_last
    got = vmap(grad(lambda x: layer(x).square().sum()))(batches)
    expected = torch.stack([grad(lambda x: layer(x).square().sum())(x) for x in batches])
    torch.testing.assert_close(got, expected)


@pytest.mark.skipif(
    not hasattr(torch, "get_autocast_dtype"), reason="autocast of a device needs torch >= 2.4"
)
@LAYERS
@pytest.mark.parametrize("transform", ["plain", "grad"])
def test_layer_vmap_in_autocast(name: str, transform: str) -> None:
    layer, (x, *others) = layers()[name]
    layer, x = layer.float(), x.float()
    others = [a.float() if isinstance(a, Tensor) else a for a in others]

    def call(x: Tensor) -> Tensor:
        return layer(x, *others)

    function = call if transform == "plain" else grad(lambda x: call(x).float().square().sum())
    batches = torch.stack((x, x.flip(0) / 2))
    with torch.autocast("cpu", torch.bfloat16):
        got = vmap(function)(batches)
        expected = torch.stack([function(x) for x in batches])
    # PyTorch's own projections stay in float32 within vmap.
    largest = float(expected.abs().max())
    torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=2**-5 * largest)


# Gradients that come by `backward`, in batches or not as numbers in memory.


def recorded(case: cases.Case, backend: Runner) -> tuple[list[Tensor], Tensor, Tensor]:
    """The leaves, the output and a gradient of it, of a call of this backend."""
    backend.require("deform_conv" if isinstance(case, cases.ConvCase) else "ms_deform_attn")
    *leaves, seed = case.inputs(torch.float32, backend.device)
    return leaves, case.call(*leaves, backend=backend.backend), seed


@EVERY_CASE
@pytest.mark.parametrize("again", [False, True], ids=["once", "differentiable"])
def test_batched_gradients(case: cases.Case, backend: Runner, again: bool) -> None:
    leaves, output, seed = recorded(case, backend)
    seeds = torch.stack((seed, -seed, seed.flip(0) / 2))
    options: dict[str, Any] = {"retain_graph": True, "create_graph": again}
    got = torch.autograd.grad(output, leaves, seeds, is_grads_batched=True, **options)
    each = [torch.autograd.grad(output, leaves, seed, **options) for seed in seeds]
    for name, grads, expected in zip(case.names, got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(grads, torch.stack(expected), msg=name)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@EVERY_CASE
def test_vmap_over_gradients(case: cases.Case, backend: Runner) -> None:
    leaves, output, seed = recorded(case, backend)

    def pull_back(seed: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, leaves, seed, retain_graph=True)

    seeds = torch.stack((seed, seed.flip(0) / 2))
    each = [pull_back(seed) for seed in seeds]
    for name, grads, expected in zip(
        case.names, vmap(pull_back)(seeds), zip(*each, strict=True), strict=True
    ):
        torch.testing.assert_close(grads, torch.stack(expected), msg=name)


@EVERY_SMALL_CASE
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_jacobian(case: cases.Case, strategy: str) -> None:
    inputs, _ = arguments(case)
    got = torch.autograd.functional.jacobian(case.call, inputs, vectorize=True, strategy=strategy)
    for jacobian, expected in zip(got, by_autograd(case.call, inputs), strict=True):
        torch.testing.assert_close(jacobian.reshape(expected.shape), expected)


@EVERY_CASE
def test_gradients_without_memory(case: cases.Case, backend: Runner) -> None:
    """Zeros that PyTorch keeps no memory for, and the negative of what lies in memory."""
    leaves, output, seed = recorded(case, backend)
    for gradient in (
        torch._efficientzerotensor(seed.shape, device=seed.device),
        torch._neg_view(seed),
    ):
        got = torch.autograd.grad(output, leaves, gradient, retain_graph=True)
        kept = gradient.resolve_neg() if gradient.is_neg() else torch.zeros_like(seed)
        expected = torch.autograd.grad(output, leaves, kept, retain_graph=True)
        for name, one, other in zip(case.names, got, expected, strict=True):
            torch.testing.assert_close(one, other, msg=name)


@EVERY_CASE
def test_arguments_without_memory(case: cases.Case, backend: Runner) -> None:
    leaves, _, _ = recorded(case, backend)
    kept = [leaf.detach() for leaf in leaves]
    for i, tensor in enumerate(kept):
        zeros = torch._efficientzerotensor(tensor.shape, device=tensor.device)
        for argument, same in (
            (zeros, torch.zeros_like(tensor)),
            (torch._neg_view(tensor), -tensor),
        ):
            got = case.call(*kept[:i], argument, *kept[i + 1 :], backend=backend.backend)
            expected = case.call(*kept[:i], same, *kept[i + 1 :], backend=backend.backend)
            torch.testing.assert_close(got, expected, msg=case.names[i])


def test_a_transform_leaves_nothing_behind() -> None:
    """What the operator keeps of level sizes between calls is never a transform's own tensors."""
    layer, (query, reference, *others) = layers()["FlashDeformAttn"]
    reference = reference.detach().requires_grad_()
    ops._kept_levels.cache_clear()
    grad(lambda points: layer(query, points, *others).sum())(reference)
    assert ops._kept_levels.cache_info().currsize == 0
    layer(query, reference, *others).sum().backward()
    assert ops._kept_levels.cache_info().currsize == 1


@pytest.mark.parametrize("recorded", [False, True])
def test_a_tensor_that_outlives_its_transform(recorded: bool) -> None:
    """It counts as the tensor that it wrapped."""
    case = CASES[0]
    (value, *rest), seed = arguments(case)
    kept: list[Tensor] = []
    grad(lambda value: kept.append(value) or value.sum())(value)  # type: ignore[func-returns-value]
    coordinates = [tensor.requires_grad_(recorded) for tensor in rest]
    with torch.set_grad_enabled(recorded):
        output = case.call(kept[0], *coordinates)
        torch.testing.assert_close(output, case.call(value, *coordinates))
    if recorded:
        got, expected = (
            torch.autograd.grad((case.call(v, *coordinates) * seed).sum(), coordinates)
            for v in (kept[0], value)
        )
        torch.testing.assert_close(got, expected)
