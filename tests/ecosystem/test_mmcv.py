"""mmcv's layers against its own Python, which runs without its compiled operators (mmcv-lite)."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcnv4.compat import mmcv as here
from support import surfaces

SHAPES = [(5, 7), (3, 4)]
STARTS = [0, 35]
SIZES = {"embed_dims": 12, "num_heads": 3, "num_levels": 2, "num_points": 5}
LAYERS = ("DeformConv2d", "DeformConv2dPack", "ModulatedDeformConv2d", "ModulatedDeformConv2dPack")


class _Extension(types.ModuleType):
    """In place of mmcv's compiled operators: it has every name, and runs nothing."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*arguments: Any, **settings: Any) -> Any:
            raise AssertionError(f"mmcv's compiled {name} was called")

        return absent


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Any:
    """mmcv.ops."""
    try:
        import mmcv
    except Exception as error:
        pytest.skip(f"needs mmcv-lite; {type(error).__name__}: {error}")
    del mmcv
    if "mmcv.ops" not in sys.modules:
        monkeypatch.setitem(sys.modules, "mmcv._ext", _Extension("mmcv._ext"))
    import mmcv.ops

    return mmcv.ops


def alike(own: Any, original: Any, *arguments: Any, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """Both layers, built after the same seed; their parameters must have the same bits."""
    layers = []
    for layer in (own, original):
        torch.manual_seed(1)
        layers.append(layer(*arguments, **settings))
    states = [layer.state_dict() for layer in layers]
    assert list(states[0]) == list(states[1])
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=0)
    return layers[0].double(), layers[1].double()


def test_the_list_is_mmcvs(there: Any) -> None:
    for original, entry in surfaces.LIST.items():
        if original.startswith("mmcv.ops.") and "names" in entry:
            expected = surfaces.surface(surfaces.named(original), entry["built"])
            assert expected == {name: entry[name] for name in expected}, original


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_first": True},
        {"value_proj_ratio": 0.5},
        {"value_proj_ratio": 2.0, "batch_first": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("optional", [False, True])
def test_attention(there: Any, changes: dict[str, Any], boxes: bool, optional: bool) -> None:
    settings = {**SIZES, "dropout": 0.0, **changes}
    build = here.MultiScaleDeformableAttention, there.MultiScaleDeformableAttention
    if settings.get("value_proj_ratio", 1.0) == 1.0:
        own, original = alike(*build, **settings)
    else:
        own, original = (layer(**settings).double() for layer in build)
    for parameter in original.parameters():
        nn.init.normal_(parameter, std=0.3)
    own.load_state_dict(original.state_dict(), strict=True)
    queries, pixels = (6, 2, 12), (47, 2, 12)
    if own.batch_first:
        queries, pixels = ((shape[1], shape[0], 12) for shape in (queries, pixels))
    leaves = {"query": queries, "value": pixels}
    if optional:
        leaves |= {"identity": queries, "query_pos": queries}
    inputs = {n: torch.randn(s, dtype=torch.float64).requires_grad_() for n, s in leaves.items()}
    points = torch.rand(2, 6, 2, 4 if boxes else 2, dtype=torch.float64, requires_grad=True)
    others = {"spatial_shapes": torch.tensor(SHAPES), "level_start_index": torch.tensor(STARTS)}
    if optional:
        others["key_padding_mask"] = torch.rand(2, 47) < 0.3
    others["unknown"] = others["key"] = None
    wanted = [*inputs.values(), points]
    outputs = [layer(**inputs, reference_points=points, **others) for layer in (own, original)]
    torch.testing.assert_close(*outputs)
    grad = torch.randn_like(outputs[0])
    results = [
        torch.autograd.grad(output, [*wanted, *layer.parameters()], grad)
        for output, layer in zip(outputs, (own, original), strict=True)
    ]
    names = [*inputs, "reference_points", *dict(original.named_parameters())]
    for name, *pair in zip(names, *results, strict=True):
        torch.testing.assert_close(*pair, msg=lambda m, n=name: f"{n}: {m}")


def test_attention_of_the_query_itself_and_dropout(there: Any) -> None:
    build = here.MultiScaleDeformableAttention, there.MultiScaleDeformableAttention
    own, original = alike(*build, **SIZES, dropout=0.4)
    query = torch.randn(47, 2, 12, dtype=torch.float64)
    points = torch.rand(2, 47, 2, 2, dtype=torch.float64)
    outputs = []
    for layer in (own, original):
        torch.manual_seed(2)
        with pytest.warns(DeprecationWarning, match="residual"):
            output = layer(
                query,
                reference_points=points,
                spatial_shapes=torch.tensor(SHAPES),
                level_start_index=torch.tensor(STARTS),
                residual=2 * query,
            )
        outputs.append(output)
    torch.testing.assert_close(*outputs)
    assert bool((outputs[0] == 2 * query).any())
    states = []
    for layer in (own, original):
        torch.manual_seed(3)
        layer.init_weights()
        states.append(layer.double().state_dict())  # mmcv's makes some of them float32
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_convolutions_begin_alike_and_load(there: Any, name: str) -> None:
    settings = {"stride": (2, 1), "padding": 1, "groups": 2, "deform_groups": 4}
    own, original = alike(getattr(here, name), getattr(there, name), 8, 6, (3, 2), **settings)
    for parameter in original.parameters():
        nn.init.normal_(parameter)
    own.load_state_dict(original.state_dict(), strict=True)
    state = original.state_dict()
    assert own.state_dict()._metadata == state._metadata


@pytest.mark.parametrize("name", ["DeformConv2dPack", "ModulatedDeformConv2dPack"])
@pytest.mark.parametrize("version", [None, 1, 2])
def test_names_of_the_first_version(there: Any, name: str, version: int | None) -> None:
    layers = [getattr(module, name)(4, 6, 3) for module in (here, there)]
    names = [f"conv_offset.{kind}" for kind in ("weight", "bias")]
    results = []
    for layer in layers:
        state = {f"layer.{n}": torch.full_like(t, 2) for n, t in layer.state_dict().items()}
        for n in names:
            state[f"layer_{n.removeprefix('conv_')}"] = state.pop(f"layer.{n}")
        metadata = {} if version is None else {"version": version}
        layer._load_from_state_dict(state, "layer.", metadata, True, [], [], [])
        results.append(sorted(state))
    assert results[0] == results[1]
    assert {f"layer.{n}" for n in names}.issubset(results[0]) == (version != 2)


def test_conv_modules_and_configs(there: Any) -> None:
    """mmcv's ConvModule builds ours from a config as it builds its own."""
    from mmcv.cnn import ConvModule
    from mmengine.registry import MODELS

    for name, layer in (("DCN", here.DeformConv2dPack), ("DCNv2", here.ModulatedDeformConv2dPack)):
        MODELS.register_module(f"Ours{name}", module=layer, force=True)
        config = {"type": f"Ours{name}", "deform_groups": 2}
        module = ConvModule(4, 6, 3, padding=1, conv_cfg=config, norm_cfg={"type": "BN"})
        assert type(module.conv) is layer
        x = torch.randn(2, 4, 7, 9, requires_grad=True)
        output: Tensor = module(x)
        assert output.shape == (2, 6, 7, 9)
        output.sum().backward()
        assert all(p.grad is not None for p in module.parameters())
