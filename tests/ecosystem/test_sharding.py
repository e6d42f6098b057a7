"""Operators and layers on tensors that are spread over two processes."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

from dcnv4 import DCNv4, DCNv4Conv2d, FlashDeformAttn, functional, ops
from dcnv4.layers import DCNv3
from support import cases

try:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import (
        DTensor,
        Replicate,
        Shard,
        distribute_module,
        distribute_tensor,
        init_device_mesh,
    )
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.experimental import register_sharding  # noqa: F401
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )
except ImportError as error:
    pytest.skip(f"torch {torch.__version__} shards no operators: {error}", allow_module_level=True)

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
PROCESSES = 2
Checks = dict[str, Callable[[Any], None]]
CHECKS: Checks = {}
"""What every process does, on a mesh of them all."""


def check(function: Callable[[Any], None]) -> Callable[[Any], None]:
    CHECKS[function.__name__] = function
    return function


def close(found: Any, expected: Any, name: str = "") -> None:
    whole = found.full_tensor() if isinstance(found, DTensor) else found
    torch.testing.assert_close(whole, expected, msg=lambda m: f"{name}: {m}")


def compare(
    case: cases.Case, mesh: Any, dims: Sequence[int | None], *, silent: bool = True
) -> tuple[Any, tuple[Any, ...]]:
    """Forward and backward with inputs, and last the output's gradient, split along `dims`: as of
    whole tensors and, if `silent`, without any communication. Returns the output and the gradients.
    """
    *inputs, grad = (t.detach() for t in case.inputs(torch.float64))
    places = [[Replicate() if dim is None else Shard(dim)] for dim in dims]
    *spread, spread_grad = (
        distribute_tensor(t, mesh, place) for t, place in zip((*inputs, grad), places, strict=True)
    )
    results = []
    with CommDebugMode() as messages:
        for leaves, seed in ((inputs, grad), (spread, spread_grad)):
            leaves = [leaf.requires_grad_() for leaf in leaves]
            output = case.call(*leaves)
            results.append((output, torch.autograd.grad(output, leaves, seed)))
    assert messages.get_total_counts() == 0 or not silent, messages.get_comm_counts()
    (expected, expected_grads), (found, grads) = results
    close(found, expected, "output")
    for name, one, other in zip(case.names, grads, expected_grads, strict=True):
        close(one, other, name)
    return found, grads


IMAGES = (
    cases.ConvCase("four", batch=4, softmax=True, extra=2),
    cases.ConvCase("stride", batch=4, size=(5, 6), window={"stride": 2, "kernel_size": 2}),
    cases.ConvCase("three", batch=3),
    cases.ConvCase("packed", batch=4, layout="packed"),
    cases.AttnCase("four", batch=4, softmax=True),
    cases.AttnCase("three", batch=3, queries=3),
    cases.OffsetsCase("four", batch=4, softmax=True, shared=(1, 2)),
    cases.OffsetsCase("three", batch=3, queries=3, boxes=True),
)


@check
def images_are_split(mesh: Any) -> None:
    """Also where one process has more of them than the other."""
    for case in IMAGES:
        found, grads = compare(case, mesh, (0,) * (len(case.names) + 1))
        assert [t.placements for t in (found, *grads)] == [(Shard(0),)] * (1 + len(grads))


@check
def heads_and_queries_are_split(mesh: Any) -> None:
    for case in (
        cases.AttnCase("heads", batch=2, groups=4),
        cases.AttnCase("odd_heads_of_one", groups=3, depth=1),
    ):
        found, grads = compare(case, mesh, (2, 2, 2, 2))
        assert [t.placements for t in (found, *grads)] == [(Shard(2),)] * 4
    # Reference points are for all heads, and in the second call for all images.
    case = cases.OffsetsCase("heads", batch=2, groups=4, boxes=True)
    found, grads = compare(case, mesh, (2, None, 2, 2, 2))
    assert [t.placements for t in (found, grads[0], *grads[2:])] == [(Shard(2),)] * 4
    assert grads[1].placements[0].is_partial()
    case = cases.OffsetsCase("images", batch=4, shared=(0,))
    found, grads = compare(case, mesh, (0, None, 0, 0, 0))
    assert [t.placements for t in (found, grads[0], *grads[2:])] == [(Shard(0),)] * 4
    assert grads[1].placements[0].is_partial()
    found, grads = compare(
        cases.AttnCase("queries", queries=5, softmax=True), mesh, (None, 1, 1, 1)
    )
    assert [t.placements for t in (found, *grads[1:])] == [(Shard(1),)] * 3
    assert grads[0].placements[0].is_partial()
    case = cases.OffsetsCase("queries", queries=5, softmax=True, boxes=True)
    found, grads = compare(case, mesh, (None, 1, 1, 1, 1))
    assert [t.placements for t in (found, *grads[1:])] == [(Shard(1),)] * 4
    assert grads[0].placements[0].is_partial()


@check
def what_cannot_be_split_is_made_whole(mesh: Any) -> None:
    """An odd number of heads has no halves, and a row of an image needs others."""
    compare(cases.AttnCase("odd_heads", groups=3, depth=2), mesh, (2, 2, 2, 2), silent=False)
    compare(cases.ConvCase("rows", batch=1, size=(4, 4)), mesh, (1, 1, 1), silent=False)
    compare(cases.ConvCase("mixed", batch=4, size=(4, 4)), mesh, (0, None, 3), silent=False)


@check
def settings_are_not_remembered(mesh: Any) -> None:
    """Calls whose tensors have the same shapes, one after another, tensors moved and not."""
    tensors = torch.randn(4, 5, 5, 4), torch.randn(4, 5, 5, 54)
    for places in ((0, 0), (0, None)):
        spread = [
            distribute_tensor(t, mesh, [Replicate() if dim is None else Shard(dim)])
            for t, dim in zip(tensors, places, strict=True)
        ]
        for settings in (
            {"groups": 2},
            {"groups": 2, "softmax": True},
            {"groups": 2, "offset_scale": 0.5},
            {"groups": 2, "dilation": 2, "padding": 2},
            {"groups": 1},
        ):
            call = partial(functional.deform_conv, **settings)
            close(call(*spread), call(*tensors), str(settings))
    tensors = torch.randn(4, 12, 2, 3), torch.rand(4, 3, 2, 2, 2, 2), torch.randn(4, 3, 2, 2, 2)
    for places in ((0, 0, 0), (0, None, 0)):
        spread = [
            distribute_tensor(t, mesh, [Replicate() if dim is None else Shard(dim)])
            for t, dim in zip(tensors, places, strict=True)
        ]
        for sizes in ([(2, 4), (2, 2)], [(4, 2), (1, 4)]):
            for softmax in (False, True):
                call = partial(functional.ms_deform_attn, softmax=softmax)
                found = call(spread[0], sizes, *spread[1:])
                close(found, call(tensors[0], sizes, *tensors[1:]), f"{sizes}, {softmax}")


@check
def level_sizes_may_be_a_tensor(mesh: Any) -> None:
    sizes = torch.tensor([[2, 4], [2, 2]])
    value, *others = (
        torch.randn(4, 12, 2, 3),
        torch.rand(4, 3, 2, 2, 2, 2),
        torch.randn(4, 3, 2, 2, 2),
    )
    expected = functional.ms_deform_attn(value, sizes, *others)
    value, *others = (distribute_tensor(t, mesh, [Shard(0)]) for t in (value, *others))
    whole = distribute_tensor(sizes, mesh, [Replicate()])
    with CommDebugMode() as messages:
        for given in (sizes, whole):
            found = functional.ms_deform_attn(value, given, *others)
            assert found.placements == (Shard(0),)
            # As where a plain tensor stays on an accelerator.
            found = ops.OPERATORS[1].dispatch("reference", value, given, *others, False)
            assert found.placements == (Shard(0),)
    assert messages.get_total_counts() == 0
    close(found, expected)


@check
def a_mesh_of_two_dimensions(mesh: Any) -> None:
    grid = init_device_mesh("cpu", (PROCESSES, 1))
    case = cases.AttnCase("grid", batch=4, groups=2)
    *inputs, _ = (t.detach() for t in case.inputs(torch.float64))
    spread = [distribute_tensor(t, grid, [Shard(0), Shard(2)]) for t in inputs]
    with CommDebugMode() as messages:
        found: Any = case.call(*spread)
    assert found.placements == (Shard(0), Shard(2))
    assert messages.get_total_counts() == 0
    close(found, case.call(*inputs))


Call = tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]


def layers() -> dict[str, Call]:
    """Every layer with what it is called with."""
    references = torch.rand(4, 3, 1, 2)
    found: dict[str, Call] = {
        "DCNv4": (DCNv4(8, group=2, center_feature_scale=True), (torch.randn(4, 16, 8),), {}),
        "DCNv4Conv2d": (DCNv4Conv2d(6, 8, groups=2, padding=1), (torch.randn(4, 6, 4, 5),), {}),
        "DCNv3": (DCNv3(8, group=2), (torch.randn(4, 5, 4, 8),), {}),
        "FlashDeformAttn": (
            FlashDeformAttn(8, 1, 2, 2),
            (torch.randn(4, 3, 8), references, torch.randn(4, 16, 8)),
            {"input_spatial_shapes": [(4, 4)]},
        ),
    }
    if VERSION >= (2, 13):  # before, PyTorch has no derivative of indices into a DTensor
        strided = DCNv4(8, group=2, stride=2, dw_kernel_size=3)
        found["DCNv4_stride"] = (strided, (torch.randn(4, 16, 8),), {})
    for layer, _, _ in found.values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
    return found


def gradients(layer: nn.Module, inputs: Any, others: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    output = layer(*inputs, **others)
    output.square().sum().backward()
    return output, {name: p.grad for name, p in layer.named_parameters()}


@check
def layers_on_split_images(mesh: Any) -> None:
    for name, (layer, inputs, others) in layers().items():
        expected, expected_grads = gradients(copy.deepcopy(layer), inputs, others)
        layer = distribute_module(layer, mesh)
        spread = [distribute_tensor(t, mesh, [Shard(0)]) for t in inputs]
        with CommDebugMode() as messages:
            found, grads = gradients(layer, spread, others)
        assert messages.get_total_counts() == 0, f"{name}: {messages.get_comm_counts()}"
        assert found.placements == (Shard(0),), name
        close(found, expected, name)
        for path, grad in grads.items():
            close(grad, expected_grads[path], f"{name}.{path}")


@check
def attention_with_its_heads_split(mesh: Any) -> None:
    """By PyTorch's plan for projections: one sum of the outputs is all that is sent."""
    layer, inputs, others = layers()["FlashDeformAttn"]
    expected, expected_grads = gradients(copy.deepcopy(layer), inputs, others)
    columns = partial(ColwiseParallel, use_local_output=False)
    names = "value_proj", "sampling_offsets", "attention_weights"
    plan = {**{name: columns() for name in names}, "output_proj": RowwiseParallel()}
    parallelize_module(layer, mesh, plan)
    spread = [distribute_tensor(t, mesh, [Replicate()]) for t in inputs]
    with CommDebugMode() as messages, torch.no_grad():
        layer(*spread, **others)
    assert messages.get_total_counts() == 1, messages.get_comm_counts()
    found, grads = gradients(layer, spread, others)
    close(found, expected)
    for path, grad in grads.items():
        close(grad, expected_grads[path], path)


class Network(nn.Module):
    """Projections with layers among them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.flat = DCNv4(8, group=2)
        self.image = DCNv4Conv2d(8, 8, groups=2, padding=1)
        self.attention = FlashDeformAttn(8, 1, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.up(self.flat(x)).relu())
        x = self.image(x.transpose(1, 2).unflatten(2, (4, 4))).flatten(2).transpose(1, 2)
        references = torch.full((*x.shape[:2], 1, 2), 0.4)
        y: Tensor = self.attention(x, references, x, [(4, 4)])
        return y


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    model = Network()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, torch.randn(2 * PROCESSES, 16, 8)


@check
def projections_around_layers_are_split(mesh: Any) -> None:
    model, x = network()
    expected, expected_grads = gradients(copy.deepcopy(model), (x,), {})
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    found, grads = gradients(model, (x,), {})
    close(found, expected)
    for path, grad in grads.items():
        close(grad, expected_grads[path], path)


def train_sharded(mesh: Any, parts: Callable[[nn.Module], bool]) -> None:
    model, x = network()
    twin = copy.deepcopy(model)
    for module in model.modules():
        if parts(module):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    mine = x.chunk(PROCESSES)[mesh.get_local_rank()]
    for network_, images in ((model, mine), (twin, x)):
        optimizer = torch.optim.SGD(network_.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            network_(images).square().mean().backward()
            optimizer.step()
    expected = dict(twin.named_parameters())
    for path, parameter in model.named_parameters():
        close(parameter, expected[path], path)
        assert not torch.equal(expected[path], network()[0].get_parameter(path)), path


@check
def fully_sharded_layers_train(mesh: Any) -> None:
    train_sharded(mesh, lambda module: isinstance(module, (DCNv4, DCNv4Conv2d, FlashDeformAttn)))


@check
def fully_sharded_projections_train(mesh: Any) -> None:
    train_sharded(mesh, lambda module: type(module) is nn.Linear)


def work(rank: int, folder: Path) -> None:
    """Run the checks in one process, up to one that fails; leave word of each."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    distributed.init_process_group(
        "gloo",
        init_method=(folder / "meeting").as_uri(),
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for name, function in CHECKS.items():
        report = folder / f"{name}-{rank}"
        report.write_text("passed", encoding="utf-8")
        torch.manual_seed(0)  # the same numbers in every process
        try:
            function(mesh)
            distributed.barrier()
        except Exception:
            report.write_text(traceback.format_exc(), encoding="utf-8")
            return  # whoever waits for this process is told that it is gone
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the processes' reports."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (folder,), nprocs=PROCESSES)
    return folder


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CHECKS)
def test_in_two_processes(name: str, reports: Path) -> None:
    for rank in range(PROCESSES):
        report = reports / f"{name}-{rank}"
        assert report.exists(), "not run: a check before it failed"
        if (said := report.read_text(encoding="utf-8")) != "passed":
            pytest.fail(said)
