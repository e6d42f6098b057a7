"""Initialisation: every way to reset a layer, whole or part by part, gives what a fresh one has."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from dcnv4 import DCNv4, DCNv4Conv2d, FlashDeformAttn
from dcnv4.layers import DCNv3

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "DCNv4": lambda **at: DCNv4(16, group=2, dw_kernel_size=3, center_feature_scale=True, **at),
    "DCNv4-zero": lambda **at: DCNv4(16, group=2, output_bias=False, init="zero", **at),
    "without_pointwise": lambda **at: DCNv4(16, group=2, without_pointwise=True, **at),
    "DCNv4Conv2d": lambda **at: DCNv4Conv2d(6, 16, groups=2, **at),
    "DCNv3": lambda **at: DCNv3(16, group=2, center_feature_scale=True, **at),
    "DCNv3-BN": lambda **at: DCNv3(16, group=2, norm_layer="BN", **at),
    "FlashDeformAttn": lambda **at: FlashDeformAttn(16, 2, 2, 3, ratio=0.5, **at),
}
name_of_layer = pytest.mark.parametrize("name", LAYERS)


def spoil(layer: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(7)


def assert_fresh(layer: nn.Module, name: str) -> None:
    """The same constants, and random numbers of the same spread."""
    fresh = LAYERS[name]().state_dict()
    state = layer.state_dict()
    assert state.keys() == fresh.keys()
    for key, expected in fresh.items():
        found = state[key]
        if (expected == LAYERS[name]().state_dict()[key]).all():
            assert torch.equal(found, expected), key
        else:
            bound = expected.abs().max()
            assert not torch.equal(found, expected), key
            assert 0.5 * bound < found.abs().max() < 2 * bound, key


def modules(layer: nn.Module) -> list[nn.Module]:
    return [module for module in layer.modules() if hasattr(module, "reset_parameters")]


ORDERS: dict[str, Callable[[nn.Module], Iterable[Any]]] = {
    "layer": lambda layer: [layer.reset_parameters()],  # type: ignore[operator]
    "its private name": lambda layer: [layer._reset_parameters()],  # type: ignore[operator]
    "down": lambda layer: [module.reset_parameters() for module in modules(layer)],
    "up": lambda layer: [module.reset_parameters() for module in reversed(modules(layer))],
    "twice": lambda layer: [module.reset_parameters() for module in 2 * modules(layer)],
}


@pytest.mark.parametrize("order", ORDERS)
@name_of_layer
def test_resets(name: str, order: str) -> None:
    layer = LAYERS[name]()
    spoil(layer)
    ORDERS[order](layer)
    assert_fresh(layer, name)


@name_of_layer
def test_each_submodule_by_itself(name: str) -> None:
    """As it is where a part of a layer comes to another device, and the rest later."""
    layer = LAYERS[name]()
    spoil(layer)
    for module in modules(layer):
        if module is not layer:
            module.reset_parameters()  # type: ignore[operator]
            for parameter in module.parameters():
                assert not (parameter == 7).all()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@name_of_layer
def test_copies_reset_themselves(name: str, again: Callable[[nn.Module], nn.Module]) -> None:
    layer = LAYERS[name]()
    other = again(layer)
    spoil(layer)
    spoil(other)
    ORDERS["down"](other)
    assert_fresh(other, name)
    assert all((parameter == 7).all() for parameter in layer.parameters())
    for path, module in layer.named_children():
        if hasattr(module, "reset_parameters"):
            alone = again(module)
            ORDERS["down"](alone)
            assert (module.weight == 7).all()  # type: ignore[union-attr]
            assert not (alone.weight == 7).all(), path  # type: ignore[union-attr]


@name_of_layer
def test_from_the_meta_device(name: str) -> None:
    layer = LAYERS[name](device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu")
    spoil(layer)
    ORDERS["down"](layer)
    if name == "DCNv3-BN":
        layer.dw_conv[1][0].reset_running_stats()
    assert_fresh(layer, name)


@name_of_layer
def test_sharded(name: str) -> None:
    """Every process has its rows of what a whole layer has, without talking to the others."""
    distributed = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    fsdp = pytest.importorskip("torch.distributed.fsdp", reason="no fully_shard")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip(f"torch {torch.__version__} has no fully_shard")
    from torch.distributed.device_mesh import init_device_mesh

    store = distributed.FakeStore()
    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=store)
    try:
        mesh = init_device_mesh("cpu", (2,))
        layer = LAYERS[name](device="meta")
        for module in layer.modules():
            if type(module) is nn.Linear:
                fsdp.fully_shard(module, mesh=mesh)
        fsdp.fully_shard(layer, mesh=mesh)
        layer.to_empty(device="cpu")
        ORDERS["down"](layer)
        for path, expected in LAYERS[name]().named_parameters():
            found = layer.get_parameter(path).to_local()  # type: ignore[attr-defined]
            part = expected.chunk(2)[1]
            assert found.shape == part.shape
            if (expected == LAYERS[name]().get_parameter(path)).all():
                assert torch.equal(found, part), path
            else:
                assert found.abs().max() < 2 * part.abs().max(), path
    finally:
        torch.distributed.destroy_process_group()


@name_of_layer
def test_submodules_keep_their_types_and_no_cycle(name: str) -> None:
    layer = LAYERS[name]()
    kinds = {
        type(m) for m in layer.modules() if list(m.parameters(recurse=False)) and m is not layer
    }
    assert kinds <= {nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d}
    seen = [weakref.ref(p) for p in layer.parameters()]
    gc.disable()
    try:
        del layer
        assert not any(ref() is not None for ref in seen)
    finally:
        gc.enable()


def test_a_swapped_submodule_is_reset_with_the_layer() -> None:
    layer = DCNv4(16, group=2)
    layer.offset_mask = nn.Linear(16, 54)
    layer.reset_parameters()
    assert (layer.offset_mask.weight == 0).all()
    offsets, weights = layer.window.split(layer.offset_mask.bias)
    assert (offsets == 0).all()
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 9))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@name_of_layer
def test_device_and_dtype(name: str, dtype: torch.dtype) -> None:
    layer = LAYERS[name](device="cpu", dtype=dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    with pytest.raises(TypeError, match=r"dtype must be float64, .*; got torch\.int64"):
        LAYERS[name](dtype=torch.int64)
