"""Models exported to ONNX, run by ONNX Runtime on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcnv4
import dcnv4.onnx
from support import cases
from support.tiers import one_in

onnx = pytest.importorskip("onnx", reason="needs onnx; pip install onnx")
pytest.importorskip("onnxscript", reason="needs onnxscript; pip install onnxscript")
onnxruntime = pytest.importorskip(
    "onnxruntime", reason="needs onnxruntime; pip install onnxruntime"
)
if not hasattr(getattr(torch.onnx, "ops", None), "symbolic"):
    pytest.skip(f"needs torch >= 2.8; got {torch.__version__}", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:# The axis name:UserWarning"),
]


@pytest.fixture(autouse=True)
def poison() -> None:
    """Off: the exporter traces with the functions that it would replace."""


def load(path: Path, opset: int) -> tuple[onnx.ModelProto, onnxruntime.InferenceSession]:
    """The model, checked to be of this standard opset alone, and what runs it."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", opset)}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return model, session


def run(session: onnxruntime.InferenceSession, *inputs: Tensor) -> list[Tensor]:
    names = [entry.name for entry in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, feed)]


def count(model: onnx.ModelProto, operator: str) -> int:
    return sum(node.op_type == operator for node in model.graph.node)


class Calls(nn.Module):
    """Every case in one model: exporting takes seconds."""

    def __init__(self, calls: list[cases.Case]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, inputs: list[tuple[Tensor, ...]]) -> list[Tensor]:
        return [case.call(*tensors) for case, tensors in zip(self.calls, inputs, strict=True)]


def exported_calls(
    path: Path, calls: list[Any], dtype: torch.dtype, **options: Any
) -> onnx.ModelProto:
    """Export these cases, and hold what ONNX Runtime makes of them against the oracle."""
    opset = options.setdefault("opset_version", 20)
    inputs = [tuple(t.detach() for t in case.inputs(dtype)[:-1]) for case in calls]
    dcnv4.onnx.export(Calls(calls), (inputs,), path, **options)
    model, session = load(path, opset)
    outputs = run(session, *(tensor for tensors in inputs for tensor in tensors))
    for case, output in zip(calls, outputs, strict=True):
        expected, budget = case.expected(dtype)["output"]
        assert output.dtype == dtype, case.id
        assert output.shape == expected.shape, case.id
        error = abs(output.double().numpy() - expected)
        assert (error <= budget).all(), f"{case.id}: {(error / budget).max():.2f} budgets"
    return model


OTHER_DTYPES = pytest.mark.parametrize("dtype", one_in(2, [torch.float16, torch.float64]))


def choose(kind: tuple[Any, ...], names: str) -> list[Any]:
    chosen = [case for case in kind if case.id in names.split()]
    assert len(chosen) == len(names.split())
    return chosen


def test_deform_conv(tmp_path: Path) -> None:
    """Every case that has pixels, as ONNX knows no empty image, and not so many in a line that
    ONNX Runtime's own positions, columns plus offsets, lose what the budget grants."""
    small = [case for case in cases.CONV if max(case.size) < 100]
    calls = [case for case in small if all(array.size for array in case.exact)]
    path = tmp_path / "model.onnx"
    model = exported_calls(path, calls, torch.float32, deform_conv="DeformConv")
    assert count(model, "DeformConv") == len(calls)


SOFTMAX = "remove_center_even softmax_padded stride_pair"
ODD = "odd_scale not_finite double_coordinates"


@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        (torch.float16, SOFTMAX),
        pytest.param(torch.float64, SOFTMAX, marks=pytest.mark.exhaustive),
        pytest.param(torch.float16, ODD, marks=pytest.mark.exhaustive),
        pytest.param(torch.float32, ODD, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_deform_conv_by_gather(tmp_path: Path, dtype: torch.dtype, names: str) -> None:
    """Not with a scale in float64: PyTorch's exporter writes a factor in float32, whatever it is
    for."""
    calls = choose(cases.CONV, names)
    model = exported_calls(tmp_path / "model.onnx", calls, dtype, opset_version=18)
    assert count(model, "Gather") >= len(calls)
    assert not count(model, "DeformConv") + count(model, "GridSample")


@OTHER_DTYPES
def test_deform_conv_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    calls = choose(cases.CONV, "odd_scale float_coordinates half_coordinates double_coordinates")
    exported_calls(tmp_path / "model.onnx", calls, dtype, deform_conv="DeformConv")


@pytest.mark.exhaustive
def test_attention_by_gather(tmp_path: Path) -> None:
    calls = [
        *choose(cases.ATTENTION, "softmax_flat empty_level shapes_tensor"),
        *choose(cases.OFFSETS, "one_for_all boxes_of_queries boxes_by_size"),
    ]
    model = exported_calls(tmp_path / "model.onnx", calls, torch.float32)
    assert count(model, "Gather") >= len(calls)
    assert not count(model, "GridSample")
    for node in model.graph.node:
        onnx.defs.get_schema(node.op_type, 16, "")  # which raises where it came later


@pytest.mark.exhaustive
@OTHER_DTYPES
def test_attention_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    calls = [
        *choose(cases.ATTENTION, "float_coordinates double_locations"),
        *choose(cases.OFFSETS, "float_points double_points"),
    ]
    exported_calls(tmp_path / "model.onnx", calls, dtype)


def test_attention_by_grid_sample(tmp_path: Path) -> None:
    calls = [
        *choose(cases.ATTENTION, "three_levels softmax_flat four_levels far float_coordinates"),
        *choose(cases.OFFSETS, "one_for_all boxes boxes_by_size far"),
    ]
    model = exported_calls(tmp_path / "model.onnx", calls, torch.float32, attention="grid_sample")
    assert count(model, "GridSample") == sum(len(case.shapes) for case in calls)


class Network(nn.Module):
    """Every layer, with level sizes that follow the image's."""

    def __init__(self) -> None:
        super().__init__()
        self.image = dcnv4.DCNv4Conv2d(3, 16, 3, 2, 1, groups=2, dw_kernel_size=3)
        self.flat = dcnv4.DCNv4(16, group=2, offset_scale=0.5, center_feature_scale=True)
        self.attention = dcnv4.FlashDeformAttn(16, n_levels=2, n_heads=2, n_points=2)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, image: Tensor, references: Tensor) -> Tensor:
        y = self.image(image)
        height, width = y.shape[2:]
        y = self.flat(y.flatten(2).transpose(1, 2), (height, width))
        small = F.max_pool2d(y.transpose(1, 2).unflatten(2, (height, width)), 2)
        levels = torch.cat((y, small.flatten(2).transpose(1, 2)), 1)
        queries = y.mean(1, keepdim=True).expand(-1, references.shape[1], -1)
        sizes = [(height, width), tuple(small.shape[2:])]
        return self.attention(queries, references, levels, sizes)


def network_inputs(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, height, width), torch.rand(batch, 5, 2, 2)


@pytest.mark.parametrize("attention", one_in(2, ["gather", "grid_sample"]))
def test_dynamic_shapes(tmp_path: Path, attention: str) -> None:
    network = Network().eval()
    path = tmp_path / "model.onnx"
    dcnv4.onnx.export(
        network,
        network_inputs(2, 16, 20),
        path,
        dynamic_shapes=({0: "batch", 2: "height", 3: "width"}, {0: "batch"}),
        deform_conv="DeformConv",
        attention=attention,
        opset_version=19,
        input_names=["image", "references"],
        output_names=["found"],
    )
    model, session = load(path, 19)
    assert count(model, "DeformConv") == 2
    assert [entry.name for entry in session.get_inputs()] == ["image", "references"]
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert session.get_outputs()[0].shape == ["batch", 5, 16]
    for size in ((2, 16, 20), (1, 16, 20), (3, 12, 34), (5, 31, 9)):
        inputs = network_inputs(*size)
        with torch.no_grad():
            expected = network(*inputs)
        torch.testing.assert_close(run(session, *inputs)[0], expected)


@pytest.mark.parametrize(
    ("axes", "names"),
    [
        pytest.param(
            {"x": {0: "batch"}, "y": {0: "batch"}, "found": {0: "batch"}}, ["x", "y"], id="names"
        ),
        pytest.param(
            {"image": [0, -1], "references": [0]}, None, id="lists", marks=pytest.mark.exhaustive
        ),
    ],
)
def test_dynamic_axes(tmp_path: Path, axes: dict[str, Any], names: list[str] | None) -> None:
    """The old exporter's way to say which sizes change."""
    network = Network().eval()
    path = tmp_path / "model.onnx"
    example = network_inputs(2, 12, 12)
    options: dict[str, Any] = {"dynamic_axes": axes, "input_names": names}
    dcnv4.onnx.export(
        network,
        example[:1],
        path,
        kwargs={"references": example[1]},
        output_names=["found"],
        **options,
    )
    _, session = load(path, 18)
    shape = session.get_inputs()[0].shape
    if names is not None:
        assert [entry.name for entry in session.get_inputs()] == names
        assert shape == ["batch", 3, 12, 12]
    assert isinstance(shape[0], str)
    for size in ((1, 12, 12), (3, 12, 12 if names else 22)):
        inputs = network_inputs(*size)
        with torch.no_grad():
            expected = network(*inputs)
        torch.testing.assert_close(run(session, *inputs)[0], expected)


def test_dynamic_axes_of_nested_inputs(tmp_path: Path) -> None:
    """Which have the names in `input_names`, one after the other."""
    case = choose(cases.CONV, "odd_scale")[0]
    # A size of 1 would be taken for a constant.
    inputs = [tuple(t.detach().repeat(2, 1, 1, 1) for t in case.inputs(torch.float32)[:-1])]
    path = tmp_path / "model.onnx"
    options: dict[str, Any] = {"input_names": ["value", "offset_mask"]}
    with pytest.raises(
        ValueError, match=r"must name inputs.*2 tensors of nested inputs = ; got inputs"
    ):
        dcnv4.onnx.export(Calls([case]), (inputs,), dynamic_axes={"inputs": [0]})
    with pytest.raises(ValueError, match=r"must name inputs.*value, offset_mask; got image"):
        dcnv4.onnx.export(Calls([case]), (inputs,), dynamic_axes={"image": [0]}, **options)
    with pytest.raises(ValueError, match=r"of value must be in \[-4, 4\); got \[4\]"):
        dcnv4.onnx.export(Calls([case]), (inputs,), dynamic_axes={"value": [4]}, **options)
    with pytest.raises(ValueError, match="dynamic_axes must be None beside dynamic_shapes"):
        dcnv4.onnx.export(Calls([case]), (inputs,), dynamic_axes={}, dynamic_shapes=())
    axes = {"value": {0: "batch"}, "offset_mask": {0: "batch"}}
    dcnv4.onnx.export(Calls([case]), (inputs,), path, dynamic_axes=axes, **options)
    session = load(path, 18)[1]
    assert [entry.shape[0] for entry in session.get_inputs()] == ["batch", "batch"]


def test_lowered_program(tmp_path: Path) -> None:
    """`lower`, for those who call the exporter themselves."""
    network = Network().eval()
    inputs = network_inputs(1, 12, 12)
    lowered = dcnv4.onnx.lower(torch.export.export(network, inputs), deform_conv="DeformConv")
    targets = {str(node.target) for node in lowered.graph.nodes}
    assert not [target for target in targets if target.startswith("dcnv4")]
    path = tmp_path / "model.onnx"
    torch.onnx.export(lowered, f=path, dynamo=True, opset_version=20, verbose=False)
    with torch.no_grad():
        expected = network(*inputs)
    torch.testing.assert_close(run(load(path, 20)[1], *inputs)[0], expected)


@pytest.mark.parametrize("deform_conv", one_in(2, ["gather", "DeformConv"]))
def test_half_precision_keeps_coordinates(tmp_path: Path, deform_conv: str) -> None:
    """In float16 neighbours of 300.125 are 0.25 apart: such a column must not be rounded."""
    value = torch.zeros(1, 1, 400, 1).half()
    value[0, 0, 301] = 1
    offset_mask = torch.zeros(1, 1, 400, 3).half()
    offset_mask[..., 0], offset_mask[..., 2] = 0.125, 1

    class Shift(nn.Module):
        def forward(self, value: Tensor, offset_mask: Tensor) -> Tensor:
            return dcnv4.functional.deform_conv(
                value, offset_mask, kernel_size=1, padding=0, groups=1
            )

    path = tmp_path / "model.onnx"
    program = dcnv4.onnx.export(
        Shift(), (value, offset_mask), path, deform_conv=deform_conv, external_data=False
    )
    assert program.model_proto.opset_import[0].version == (18 if deform_conv == "gather" else 19)
    (output,) = run(onnxruntime.InferenceSession(path), value, offset_mask)
    assert output[0, 0, 299:303, 0].tolist() == [0, 0.125, 0.875, 0]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = Network(), network_inputs(1, 8, 8)
    with pytest.raises(ValueError, match=r"opset_version must be >= 18.*got 17.*dynamo=False\) wr"):
        dcnv4.onnx.export(network, inputs, opset_version=17)
    with pytest.raises(ValueError, match=r'opset_version must be >= 19.*got 18; deform_conv="gath'):
        dcnv4.onnx.export(network, inputs, opset_version=18, deform_conv="DeformConv")
    with pytest.raises(ValueError, match=r"deform_conv must be 'gather' or 'DeformConv'; got 'x'"):
        dcnv4.onnx.export(network, inputs, deform_conv="x")
    with pytest.raises(ValueError, match=r"attention must be 'gather' or 'grid_sample'; got 'x'"):
        dcnv4.onnx.export(network, inputs, attention="x")
    with pytest.raises(
        TypeError, match=r"dynamo must not be given.*got False; torch.onnx.export\("
    ):
        dcnv4.onnx.export(network, inputs, dynamo=False)
    with pytest.raises(TypeError, match=r"^program must be what torch\.export.*; got Network$"):
        dcnv4.onnx.lower(network)  # type: ignore[arg-type]
    tensor = cases.AttnCase("onnx_tensor", tensor=True)

    class Call(nn.Module):
        def forward(self, sizes: Tensor, *inputs: Tensor) -> Tensor:
            value, locations, weights = inputs
            return dcnv4.functional.ms_deform_attn(value, sizes, locations, weights)

    arguments = (torch.tensor(tensor.shapes), *tensor.inputs(torch.float32)[:-1])
    with pytest.raises(ValueError, match="spatial_shapes must be numbers with attention = 'grid_"):
        dcnv4.onnx.export(Call(), arguments, attention="grid_sample")
    for name in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        dcnv4.onnx.export(network, inputs)


def test_a_model_without_onnx(tmp_path: Path) -> None:
    """Without a path nothing is written; the program is returned."""
    program = dcnv4.onnx.export(
        dcnv4.DCNv4(8, group=2).eval(), (torch.randn(1, 5, 5, 8),), deform_conv="DeformConv"
    )
    assert count(program.model_proto, "DeformConv") == 1
    assert not list(tmp_path.iterdir())
