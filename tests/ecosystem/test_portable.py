"""Exports that run in processes, programs and runtimes that do not know the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dcnv4
from dcnv4 import DCNv4
from dcnv4.export import decompositions, portable
from support.portable import FUNCTIONS, LAYERS, MODELS, Portable, assert_same, flat, get
from support.tiers import one_in

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
pytestmark = [
    pytest.mark.skipif(VERSION < (2, 8), reason=f"exporters need torch >= 2.8; got {VERSION}"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::UserWarning"),
]
EVERY_LAYER = pytest.mark.parametrize("name", one_in(2, LAYERS))
EVERY_MODEL = pytest.mark.parametrize("name", [*LAYERS, *MODELS])


@pytest.fixture(autouse=True)
def poison() -> None:
    """Off: tracers know the functions that it would replace."""


def exported(some: Portable, model: nn.Module, **options: Any) -> torch.export.ExportedProgram:
    inputs = some.inputs(*some.sizes[0])
    with portable():
        return torch.export.export(model, inputs, dynamic_shapes=some.dynamic_shapes(), **options)


def traced(name: str, model: nn.Module) -> torch.jit.ScriptModule:
    some = get(name)
    with portable():
        return torch.jit.trace(model, some.inputs(*some.sizes[0]), check_trace=False)


def assert_portable(program: torch.export.ExportedProgram) -> None:
    targets = {str(node.target) for node in program.graph.nodes}
    assert "aten.embedding.default" in targets
    assert not [target for target in targets if "dcnv4" in target or "grid_sampl" in target]


@EVERY_LAYER
def test_exported_programs(name: str) -> None:
    model = get(name).model()
    program = exported(get(name), model)
    assert_portable(program)
    assert_same(name, model, program.module())


@pytest.mark.exhaustive
def test_strictly_exported_programs() -> None:
    model = get("DCNv4Conv2d").model()
    program = exported(get("DCNv4Conv2d"), model, strict=True)
    assert_portable(program)
    assert_same("DCNv4Conv2d", model, program.module())


@EVERY_LAYER
def test_decompositions(name: str) -> None:
    """Of a program that was exported before."""
    some, model = get(name), get(name).model()
    program = torch.export.export(model, some.inputs(*some.sizes[0]))
    assert any("dcnv4" in str(node.target) for node in program.graph.nodes)
    program = program.run_decompositions(decompositions())
    assert_portable(program)
    inputs = some.inputs(*some.sizes[0])
    torch.testing.assert_close(program.module()(*inputs), model(*inputs))


def test_portable_ends() -> None:
    """What is exported after the context, and after an error in it, is as ever."""
    some = get("DCNv4")
    with pytest.raises(KeyError), portable():
        raise KeyError
    program = torch.export.export(some.model(), some.inputs(*some.sizes[0]))
    assert any("dcnv4" in str(node.target) for node in program.graph.nodes)


def test_a_portable_model_trains() -> None:
    some = get("DCNv4")
    model = some.model()
    inputs = some.inputs(*some.sizes[0])
    module = exported(some, model).module()
    module(*inputs).square().sum().backward()
    model(*inputs).square().sum().backward()
    expected = dict(model.named_parameters())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)


def test_half_precision_keeps_coordinates() -> None:
    """In float16 neighbours of 300.125 are 0.25 apart: such a column must not be rounded."""
    value = torch.zeros(1, 1, 400, 1).half()
    value[0, 0, 301] = 1
    offset_mask = torch.zeros(1, 1, 400, 3).half()
    offset_mask[..., 0], offset_mask[..., 2] = 0.125, 1

    def call(value: Tensor, offset_mask: Tensor) -> Tensor:
        settings: dict[str, Any] = {"kernel_size": 1, "padding": 0, "groups": 1}
        return dcnv4.functional.deform_conv(value, offset_mask, **settings)

    with portable():
        output = torch.jit.trace(call, (value, offset_mask))(value, offset_mask)
    assert output.dtype == torch.float16
    assert output[0, 0, 299:303, 0].tolist() == [0, 0.125, 0.875, 0]


# Processes and programs without the package.

LOAD = """
import sys, torch
sys.modules["dcnv4"] = None
kind, path, case = sys.argv[1:]
if kind == "jit":
    load = torch.jit.load
elif kind == "export":
    load = lambda path: torch.export.load(path).module()
else:
    load = torch._inductor.aoti_load_package
model = load(path)
for inputs, expected in torch.load(case):
    outputs = model(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
"""


def run_elsewhere(kind: str, path: Path, some: Portable, model: nn.Module) -> None:
    """Load it where the package cannot be imported, and run it on every size."""
    with torch.no_grad():
        batches = [some.inputs(*size) for size in some.sizes]
        torch.save([(inputs, flat(model(*inputs))) for inputs in batches], path.with_suffix(".pt"))
    arguments = [kind, str(path), str(path.with_suffix(".pt"))]
    subprocess.run([sys.executable, "-c", LOAD, *arguments], check=True)


@pytest.mark.parametrize("name", one_in(9, [*LAYERS, *MODELS, *FUNCTIONS]))
def test_traces_load_anywhere(name: str, tmp_path: Path) -> None:
    some = get(name)
    model = some.model()
    trace = traced(name, model)
    assert "dcnv4::" not in str(trace.inlined_graph)
    trace.save(path := tmp_path / "model.ts")
    run_elsewhere("jit", path, some, model)


@pytest.mark.exhaustive
@EVERY_MODEL
def test_programs_load_anywhere(name: str, tmp_path: Path) -> None:
    some = get(name)
    model = some.model()
    torch.export.save(exported(some, model), path := tmp_path / "model.pt2")
    run_elsewhere("export", path, some, model)


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="Inductor and libtorch need a C++ compiler; found no g++"
)


def package(some: Portable, model: nn.Module, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(
        exported(some, model),
        package_path=str(path),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
    )


PROGRAM = r"""
#include <fstream>
#include <iostream>
#include <iterator>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/script.h>

using Tensors = std::vector<at::Tensor>;

Tensors tensors(const c10::IValue& value) {
    if (value.isTensor()) return {value.toTensor()};
    if (value.isTensorList()) return value.toTensorVector();
    Tensors found;
    const auto add = [&](const auto& values) {
        for (const auto& one : values) found.push_back(one.toTensor());
    };
    value.isTuple() ? add(value.toTupleRef().elements()) : add(value.toListRef());
    return found;
}

bool same(const Tensors& found, const Tensors& expected) {
    bool same = found.size() == expected.size();
    for (size_t i = 0; same && i < found.size(); i++)
        same = torch::allclose(found[i], expected[i], 1e-4, 1e-4);
    return same;
}

int main(int, char** arguments) {
    torch::NoGradGuard no_grad;
    auto trace = torch::jit::load(arguments[1]);
    torch::inductor::AOTIModelPackageLoader package(arguments[2]);
    std::ifstream file(arguments[3], std::ios::binary);
    const auto cases = torch::jit::pickle_load({std::istreambuf_iterator<char>(file), {}});
    for (const auto& one : cases.toListRef()) {
        const auto& pair = one.toTupleRef().elements();
        const auto inputs = tensors(pair[0]), expected = tensors(pair[1]);
        if (!same(tensors(trace.forward({inputs.begin(), inputs.end()})), expected)) return 1;
        if (!same(package.run(inputs), expected)) return 2;
        std::cout << "both are right" << std::endl;
    }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`PROGRAM`, linked to the libtorch of the wheel."""
    folder = tmp_path_factory.mktemp("libtorch")
    (folder / "main.cpp").write_text(PROGRAM)
    root = Path(torch.__file__).parent
    include, lib = root / "include", root / "lib"
    flags = [f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-L{lib}", f"-Wl,-rpath,{lib}"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    libraries = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    if (lib / "libtorch_cuda.so").exists():
        libraries += ["-ltorch_cuda", "-lc10_cuda"]
    command = ["g++", "-std=c++20", "-O0", *flags, "main.cpp", "-o", "main", *libraries]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "main"


@needs_compiler
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["DCNv4", "FlashDeformAttn"])  # models take Inductor minutes
def test_packages_load_anywhere(name: str, program: Path, tmp_path: Path) -> None:
    """In a process of Python, and beside a trace in a program of libtorch."""
    some = get(name)
    model = some.model()
    package(some, model, path := tmp_path / "model.pt2")
    run_elsewhere("package", path, some, model)
    traced(name, model).save(trace := tmp_path / "model.ts")
    arguments = [program, trace, path, path.with_suffix(".pt")]
    found = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert found.stdout == "both are right\n" * len(some.sizes)


# ONNX by PyTorch's own exporters.


def needs(*modules: str) -> None:
    for module in modules:
        if find_spec(module) is None:
            pytest.skip(f"needs {module}; pip install {module}")


def write_onnx(name: str, model: nn.Module, path: Path) -> None:
    """By PyTorch's old exporter, which needs no context."""
    some = get(name)
    inputs = some.inputs(*some.sizes[0])
    names = ["image", "references"][: len(inputs)]
    torch.onnx.export(
        model,
        inputs,
        str(path),
        dynamo=False,
        opset_version=16,
        input_names=names,
        dynamic_axes=dict(zip(names, some.axes(), strict=True)),
    )


def assert_standard(path: Path, opset: int) -> None:
    import onnx

    model = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    operators = {node.op_type for node in model.graph.node}
    assert "Gather" in operators
    assert "GridSample" not in operators
    for operator in operators:
        onnx.defs.get_schema(operator, 16, "")  # which raises where it came later


def session(path: Path) -> Any:
    import onnxruntime

    found = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in found.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in found.run(None, feed)]

    return run


@pytest.mark.parametrize(
    "name", [*LAYERS, *MODELS, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in FUNCTIONS)]
)
def test_onnx_runtime(name: str, tmp_path: Path) -> None:
    needs("onnx", "onnxruntime")
    model = get(name).model()
    write_onnx(name, model, path := tmp_path / "model.onnx")
    assert_standard(path, 16)
    assert_same(name, model, session(path))


def test_an_opset_too_old_says_which_is_not(tmp_path: Path) -> None:
    """In a sentence of PyTorch's."""
    layer = DCNv4(8, group=2).eval()
    with pytest.raises(Exception, match=r"opset version 12 is not supported.*in version 13"):
        torch.onnx.export(
            layer,
            (torch.randn(1, 6, 8, 8),),
            str(tmp_path / "model.onnx"),
            dynamo=False,
            opset_version=12,
        )


@EVERY_MODEL
def test_openvino(name: str, tmp_path: Path) -> None:
    needs("onnx", "openvino")
    import openvino

    model = get(name).model()
    write_onnx(name, model, path := tmp_path / "model.onnx")
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", options)

    def run(*inputs: Tensor) -> list[Tensor]:
        return [torch.from_numpy(found) for found in compiled(list(inputs)).values()]

    assert_same(name, model, run)


@pytest.mark.parametrize("name", LAYERS)
def test_coreml_conversion(name: str) -> None:
    """As far as Linux goes: a converted model runs on macOS alone."""
    needs("coremltools")
    import coremltools

    some = get(name)
    inputs = [coremltools.TensorType(shape=x.shape) for x in some.inputs(*some.sizes[0])]
    trace = traced(name, some.model())
    converted = coremltools.convert(trace, inputs=inputs, convert_to="mlprogram")
    assert converted.get_spec().WhichOneof("Type") == "mlProgram"


MEMORY = """
import sys, numpy, onnxruntime
def resident(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
value = numpy.random.randn(1, 320, 320, 64).astype("float32")
before = resident("VmRSS")
session.run(None, {session.get_inputs()[0].name: value})
print((resident("VmHWM") - before) / value.nbytes)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux tells the peak")
def test_memory(tmp_path: Path) -> None:
    """Of a layer in ONNX Runtime, in values: twelve at most."""
    needs("onnx", "onnxscript", "onnxruntime")
    import dcnv4.onnx

    sizes = ({0: "batch", 1: "height", 2: "width"},)
    layer, path = DCNv4(64, group=4).eval(), tmp_path / "model.onnx"
    dcnv4.onnx.export(layer, (torch.randn(2, 8, 8, 64),), path, dynamic_shapes=sizes)
    assert_standard(path, 18)
    command = [sys.executable, "-c", MEMORY, str(path)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert float(found.stdout) <= 12
