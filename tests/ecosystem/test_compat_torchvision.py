"""torchvision's operator and layer: against a composition of grid_sample, and the real one."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dcnv4.compat import deform_conv2d, torchvision
from support import grid_sample, surfaces
from support.runner import deterministic


class Case(NamedTuple):
    """Pairs are (down, across); groups of the kernel, then of the offsets; channels in and out."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    channels: tuple[int, int] = (4, 6)


CASES = [
    Case((3, 3)),
    Case((3, 3), offset_groups=2),
    Case((3, 3), groups=2),
    Case((2, 3), (2, 1), (1, 0), (1, 2), 2, 4),
    Case((3, 5), (1, 2), (0, 2), (2, 1), 4, 2, (4, 8)),
    Case((1, 1), (2, 3), (0, 0), groups=1, offset_groups=4),
    Case((3, 3), (7, 5), (2, 2)),
    Case((3, 3), groups=4, offset_groups=2, channels=(4, 4)),
]
ONES = [
    Case((3, 3), groups=8, offset_groups=2, channels=(8, 8)),
    Case((3, 3), (2, 1), (1, 2), (1, 2), 4, 2, (4, 4)),
    Case((3, 5), (1, 2), (2, 2), (2, 1), 4, 1, (4, 4)),
]


def real() -> Any:
    try:
        import torchvision.ops
    except Exception as error:
        pytest.skip(f"needs torchvision for this build of torch; {type(error).__name__}: {error}")
    return torchvision.ops


def make(
    case: Case, *, optional: bool = True, dtype: torch.dtype = torch.float64, size: Any = (7, 9)
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Leaves, the last two of them being optional, and the settings."""
    kernel, stride, padding, dilation, groups, offset_groups, (channels, outputs) = case
    rows, columns = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    points = offset_groups * kernel[0] * kernel[1]
    shapes = {
        "input": (2, channels, *size),
        "offset": (2, 2 * points, rows, columns),
        "weight": (outputs, channels // groups, *kernel),
        "bias": (outputs,),
        "mask": (2, points, rows, columns),
    }
    if not optional:
        del shapes["bias"], shapes["mask"]
    leaves = {n: torch.randn(shape, dtype=dtype).requires_grad_() for n, shape in shapes.items()}
    return leaves, {"stride": stride, "padding": padding, "dilation": dilation}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("optional", [True, False])
def test_deform_conv2d(case: Case, optional: bool) -> None:
    leaves, settings = make(case, optional=optional)
    found = deform_conv2d(**leaves, **settings)
    grid_sample.check(found, grid_sample.deform_conv2d(**leaves, **settings), leaves)
    assert found.is_contiguous()


@pytest.mark.parametrize("case", ONES, ids=str)
@pytest.mark.parametrize("optional", [True, False])
def test_a_depthwise_weight_of_ones(
    case: Case, optional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, settings = make(case, optional=optional)
    settings["weight"] = torch.ones_like(leaves.pop("weight"))
    monkeypatch.delattr(torchvision, "_multiplied")
    found = deform_conv2d(**leaves, **settings)
    grid_sample.check(found, grid_sample.deform_conv2d(**leaves, **settings), leaves)
    assert found.is_contiguous()


def test_which_way_a_weight_of_ones_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known to be ones where it is read, and needs no gradient."""
    ways = []
    for name in ("_added", "_multiplied"):
        way = getattr(torchvision, name)
        monkeypatch.setattr(
            torchvision, name, lambda *a, way=way, name=name: ways.append(name) or way(*a)
        )
    leaves, settings = make(ONES[0])
    ones = torch.ones_like(leaves["weight"]).detach()
    unpadded, _ = make(ONES[0]._replace(padding=(1, 0)))
    for weight, changes, expected in (
        (ones, {}, "_added"),
        (2 * ones, {}, "_multiplied"),
        (ones.clone().requires_grad_(), {}, "_multiplied"),
        (ones, {**unpadded, "padding": (1, 0)}, "_multiplied"),
        (ones, {n: t.detach() for n, t in unpadded.items()} | {"padding": (1, 0)}, "_added"),
    ):
        arguments = {**leaves, **settings, **changes, "weight": weight}
        found = deform_conv2d(**arguments)
        assert ways.pop() == expected
        torch.testing.assert_close(found, grid_sample.deform_conv2d(**arguments))


@pytest.mark.parametrize("most", [1, 300, 2000])
def test_parts_of_the_output(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few samples are in memory at a time, the result is the same."""
    leaves, settings = make(CASES[3])
    calls = []
    part = torchvision._part
    monkeypatch.setattr(
        torchvision, "_part", lambda *a, **k: calls.append(k["top"]) or part(*a, **k)
    )
    monkeypatch.setattr(torchvision, "MOST_SAMPLES", most)
    found = deform_conv2d(**leaves, **settings)
    assert len(calls) == {1: 8, 300: 4, 2000: 1}[most]
    grid_sample.check(found, grid_sample.deform_conv2d(**leaves, **settings), leaves)


def test_samples_are_not_kept_for_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, settings = make(CASES[0], size=(20, 20))
    most = max(tensor.numel() for tensor in leaves.values())
    kept: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    )
    with hooks:
        deform_conv2d(**leaves, **settings)
    assert max(kept, default=0) <= most < 9 * leaves["input"].numel()


@pytest.mark.parametrize("most", [2**26, 30])
def test_gradients_of_gradients(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision, "MOST_SAMPLES", most)
    leaves, settings = make(Case((2, 1), padding=(0, 0), channels=(2, 2)), size=(3, 2))

    def function(*tensors: Tensor) -> Tensor:
        return deform_conv2d(**dict(zip(leaves, tensors, strict=True)), **settings)

    assert torch.autograd.gradcheck(function, list(leaves.values()))
    assert torch.autograd.gradgradcheck(function, list(leaves.values()))


def test_transforms() -> None:
    leaves, settings = make(CASES[1])
    tensors = list(leaves.values())

    def function(*tensors: Tensor) -> Tensor:
        return deform_conv2d(**dict(zip(leaves, tensors, strict=True)), **settings)

    grad = torch.randn_like(function(*tensors))
    plain = [tensor.detach() for tensor in tensors]
    dims = tuple(0 if name in ("input", "offset", "mask") else None for name in leaves)
    each = torch.func.vmap(
        lambda *t: function(*(x if d is None else x[None] for x, d in zip(t, dims, strict=True))),
        dims,
    )(*plain)
    torch.testing.assert_close(each[:, 0], function(*plain))
    by_all = torch.func.grad(lambda *t: (function(*t) * grad).sum(), tuple(range(5)))(*plain)
    expected = torch.autograd.grad(function(*tensors), tensors, grad)
    for name, *pair in zip(leaves, by_all, expected, strict=True):
        torch.testing.assert_close(*pair, msg=lambda m, n=name: f"{n}: {m}")


def test_batched_gradients() -> None:
    leaves, settings = make(CASES[1])
    output = deform_conv2d(**leaves, **settings)
    seeds = torch.randn(3, *output.shape, dtype=output.dtype)
    tensors = list(leaves.values())
    got = torch.autograd.grad(output, tensors, seeds, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(output, tensors, seed, retain_graph=True) for seed in seeds]
    for name, batched, grads in zip(leaves, got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(batched, torch.stack(grads), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(
    not hasattr(torch, "compiler"), reason=f"needs torch >= 2.1; got {torch.__version__}"
)
def test_compiles_in_one_graph() -> None:
    leaves, settings = make(CASES[1])
    torch._dynamo.reset()
    compiled = torch.compile(deform_conv2d, backend="aot_eager", fullgraph=True)
    expected = grid_sample.deform_conv2d(**leaves, **settings)
    grid_sample.check(compiled(**leaves, **settings), expected, leaves)


def test_half_precision() -> None:
    """Positions are never rounded to half precision; the result is, once."""
    leaves, settings = make(CASES[2], dtype=torch.bfloat16)
    output = deform_conv2d(**leaves, **settings)
    assert output.dtype == torch.bfloat16
    wide = {name: leaf.detach().double() for name, leaf in leaves.items()}
    expected = grid_sample.deform_conv2d(**wide, **settings)
    scale = float(expected.abs().max())
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2**-7 * scale)
    single = {name: leaf.detach().float() for name, leaf in leaves.items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = deform_conv2d(**single, **settings)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2**-7 * scale)
    mixed = {**leaves, "offset": single["offset"] + 0.001, "mask": single["mask"]}
    wide = {name: leaf.detach().double() for name, leaf in mixed.items()}
    found, expected = (
        deform_conv2d(**mixed, **settings),
        grid_sample.deform_conv2d(**wide, **settings),
    )
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2**-7 * scale)


def test_deterministic_algorithms() -> None:
    leaves, settings = make(CASES[1], dtype=torch.float32)
    runs = []
    with deterministic():
        for _ in range(2):
            output = deform_conv2d(**leaves, **settings)
            runs.append(torch.autograd.grad(output.square().sum(), list(leaves.values())))
    for name, *pair in zip(leaves, *runs, strict=True):
        torch.testing.assert_close(*pair, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_empty_batch() -> None:
    leaves, settings = make(CASES[0])
    empty = {n: leaf if n in ("weight", "bias") else leaf[:0] for n, leaf in leaves.items()}
    assert deform_conv2d(**empty, **settings).shape == (0, 6, 7, 9)


def test_refusals() -> None:
    leaves, settings = make(Case((3, 3), groups=2, offset_groups=2))

    def call(**changes: Any) -> Tensor:
        return deform_conv2d(**{**leaves, **settings, **changes})

    assert call().shape == (2, 6, 7, 9)
    for name in ("input", "offset", "weight", "bias", "mask"):
        for wrong in ([1.0], leaves[name].detach().numpy(), leaves[name].long()):
            with pytest.raises(TypeError, match=f"^{name} must be"):
                call(**{name: wrong})
        with pytest.raises(ValueError, match=f"^{name} must be"):
            call(**{name: leaves[name][0]})
    for name in ("stride", "padding", "dilation"):
        with pytest.raises(TypeError, match=f"^{name} must be an integer"):
            call(**{name: 1.0})
        with pytest.raises(ValueError, match=f"^{name} must be"):
            call(**{name: -1})
    with pytest.raises(ValueError, match=r"weight must be .* groups that divide Co and C = 4; got"):
        call(weight=leaves["weight"][:5])
    with pytest.raises(ValueError, match=r"weight must be .* divide Co and C = 4; got \[6, 3"):
        call(weight=torch.cat((leaves["weight"], leaves["weight"][:, :1]), 1))
    with pytest.raises(TypeError, match="weight must be of input's dtype"):
        call(weight=leaves["weight"].float())
    with pytest.raises(ValueError, match=r"weight must fit .* which leaves -1 x 1 pixels"):
        call(dilation=(5, 5))
    with pytest.raises(ValueError, match=r"offset must be .* = \[2, G\*18, 7, 9\].*got \[2, 35"):
        call(offset=leaves["offset"][:, 1:])
    with pytest.raises(ValueError, match=r"offset must be .* = \[2, G\*18, 7, 9\].*got \[1, 36"):
        call(offset=leaves["offset"][:1])
    with pytest.raises(ValueError, match=r"G that divides C = 4; got \[2, 54"):
        call(offset=torch.cat((leaves["offset"], leaves["offset"][:, :18]), 1))
    with pytest.raises(ValueError, match=r"mask must be .* = \[2, 18, 7, 9\]; got \[2, 9, 7, 9"):
        call(mask=leaves["mask"][:, :9])
    with pytest.raises(ValueError, match=r"bias must be \[Co\] = \[6\]; got \[5\]"):
        call(bias=leaves["bias"][:5])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_deform_conv2d_is_the_onnx_operator(case: Case) -> None:
    """ONNX has taken torchvision's layout."""
    for package in ("onnx", "onnxruntime"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}; pip install onnx onnxruntime")
    import onnx
    import onnxruntime
    from onnx import helper

    leaves, settings = make(case, dtype=torch.float32)
    arguments = {name: leaf.detach() for name, leaf in leaves.items()}
    order = ["input", "weight", "offset", "bias", "mask"]
    node = helper.make_node(
        "DeformConv",
        order,
        ["output"],
        strides=case.stride,
        pads=[*case.padding, *case.padding],
        dilations=case.dilation,
        group=case.groups,
        offset_group=case.offset_groups,
    )
    kind = onnx.TensorProto.FLOAT
    values = [helper.make_tensor_value_info(n, kind, arguments[n].shape) for n in order]
    result = [helper.make_tensor_value_info("output", kind, None)]
    graph = helper.make_graph([node], "one", values, result)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (expected,) = session.run(None, {n: arguments[n].numpy() for n in order})
    found = deform_conv2d(**arguments, **settings)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [*CASES, *ONES], ids=str)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("at", ["anywhere", "pixels", "the edge"])
def test_deform_conv2d_is_torchvisions(case: Case, optional: bool, at: str) -> None:
    """Also where a sample bends: at whole pixels, as a fresh layer has them, and at -1."""
    theirs = real()
    leaves, settings = make(case, optional=optional)
    with torch.no_grad():
        if at == "pixels":
            leaves["offset"].round_()
        if at == "the edge":
            leaves["offset"].zero_()
    if case in ONES:
        settings["weight"] = torch.ones_like(leaves.pop("weight"))
    found, expected = (f(**leaves, **settings) for f in (deform_conv2d, theirs.deform_conv2d))
    grid_sample.check(found, expected, leaves)


def test_the_layer_is_torchvisions() -> None:
    theirs = real()
    settings = {"stride": (2, 1), "padding": 1, "dilation": (1, 2), "groups": 2}
    layers = []
    for module in (torchvision, theirs):
        torch.manual_seed(1)
        layers.append(module.DeformConv2d(4, 6, (3, 2), **settings))
    states = [layer.state_dict() for layer in layers]
    assert list(states[0]) == list(states[1])
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=0)
    assert layers[0].load_state_dict(states[1], strict=True)
    x = torch.randn(2, 4, 7, 9)
    offset, mask = torch.randn(2, 12, 4, 9), torch.rand(2, 6, 4, 9)
    for given in ((offset,), (offset, mask)):
        torch.testing.assert_close(*(layer(x, *given) for layer in layers))


def test_the_lists_are_torchvisions() -> None:
    real()
    for original, entry in surfaces.LIST.items():
        if original.startswith("torchvision."):
            expected = surfaces.surface(surfaces.named(original), entry["built"])
            assert expected == {name: entry[name] for name in expected}, original


def test_layer() -> None:
    layer = torchvision.DeformConv2d(4, 6, 3, padding=1, bias=False).double()
    assert list(layer.state_dict()) == ["weight"]
    leaves, settings = make(CASES[0], optional=False)
    leaves["weight"] = layer.weight
    found = layer(leaves["input"], leaves["offset"])
    grid_sample.check(found, grid_sample.deform_conv2d(**leaves, **settings), leaves)
    other = copy.deepcopy(layer)
    other.reset_parameters()
    assert not torch.equal(other.weight, layer.weight)
    for wrong, message in (
        ({"groups": 3}, "in_channels must be a multiple of groups = 3; got 4"),
        ({"groups": 4}, "out_channels must be a multiple of groups = 4; got 6"),
        ({"stride": 0}, "stride must be"),
    ):
        with pytest.raises(ValueError, match=message):
            torchvision.DeformConv2d(4, 6, 3, **wrong)
    with pytest.raises(TypeError, match="bias must be True or False; got 'False'"):
        torchvision.DeformConv2d(4, 6, 3, bias="False")
    with pytest.raises(TypeError, match="in_channels must be an integer"):
        torchvision.DeformConv2d("4", 6, 3)
