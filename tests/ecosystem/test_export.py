"""Models as exported programs and packages, and compiled by Inductor."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dcnv4
from dcnv4 import backends
from support import cases

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
pytestmark = [
    pytest.mark.skipif(
        VERSION < (2, 7), reason=f"dynamic level sizes need torch >= 2.7; got {VERSION}"
    ),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="Inductor needs a C++ compiler; found neither g++ nor clang++",
)


@pytest.fixture(autouse=True)
def poison() -> None:
    """Off: tracers know the functions that it would replace."""


class Flat(nn.Module):
    """`DCNv4` on tokens of a map whose size is its other input's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = dcnv4.DCNv4(8, group=2, stride=2, dw_kernel_size=3, center_feature_scale=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1, 2), x.shape[1:3])


class Attention(nn.Module):
    """`FlashDeformAttn` over a map and a quarter of it, sizes as numbers or as a tensor."""

    def __init__(self, tensor: bool = False) -> None:
        super().__init__()
        self.layer = dcnv4.FlashDeformAttn(8, n_levels=2, n_heads=2, n_points=2)
        self.tensor = tensor

    def forward(self, x: Tensor, references: Tensor, sizes: Tensor) -> Tensor:
        small = x[:, : x.shape[1] // 2, : x.shape[2] // 2]
        value = torch.cat((x.flatten(1, 2), small.flatten(1, 2)), 1)
        numbers = [x.shape[1:3], small.shape[1:3]]
        return self.layer(value[:, :3], references, value, sizes if self.tensor else numbers)


def image(batch: int, height: int, width: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, height, width, 8),)


def queries(batch: int, height: int, width: int) -> tuple[Tensor, ...]:
    sizes = torch.tensor([[height, width], [height // 2, width // 2]])
    return *image(batch, height, width), torch.rand(batch, 3, 2, 2), sizes


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = dcnv4.DCNv4Conv2d(8, 6, padding=1, groups=3, remove_center=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 3, 1, 2))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., tuple[Tensor, ...]]]] = {
    "DCNv4": (Flat, image),
    "DCNv4Conv2d": (Conv, image),
    "FlashDeformAttn": (Attention, queries),
    "FlashDeformAttn_tensor": (lambda: Attention(tensor=True), queries),
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)
SIZES = ((2, 6, 8), (1, 6, 8), (3, 9, 5), (2, 4, 17))


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def export(name: str, model: nn.Module, **options: Any) -> torch.export.ExportedProgram:
    """With any batch, height and width."""
    dim = torch.export.Dim
    batch = dim("batch", min=1, max=1024)
    axes: tuple[Any, ...] = ({0: batch, 1: dim.DYNAMIC, 2: dim.DYNAMIC},)
    if MODELS[name][1] is queries:
        axes = (*axes, {0: batch}, None)
    inputs = MODELS[name][1](*SIZES[0])
    return torch.export.export(model, inputs, dynamic_shapes=axes, **options)


def assert_same(name: str, model: nn.Module, exported: Callable[..., Tensor]) -> None:
    for size in SIZES:
        inputs = MODELS[name][1](*size)
        with torch.no_grad():
            torch.testing.assert_close(exported(*inputs), model(*inputs))


@EVERY_MODEL
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_export(name: str, strict: bool) -> None:
    model = make(name)
    program = export(name, model, strict=strict)
    operators = [str(n.target) for n in program.graph.nodes if "dcnv4" in str(n.target)]
    assert operators in (
        ["dcnv4.deform_conv.default"],
        ["dcnv4.ms_deform_attn_from_offsets.default"],
    )
    assert_same(name, model, program.module())


def test_a_saved_program_runs_in_another_process(tmp_path: Path) -> None:
    model = make("DCNv4Conv2d")
    torch.export.save(export("DCNv4Conv2d", model), tmp_path / "model.pt2")
    inputs = image(3, 7, 5)
    with torch.no_grad():
        torch.save((inputs, model(*inputs)), tmp_path / "case.pt")
    code = """
import sys, torch, dcnv4
program = torch.export.load(sys.argv[1] + "/model.pt2")
inputs, expected = torch.load(sys.argv[1] + "/case.pt")
torch.testing.assert_close(program.module()(*inputs), expected)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_program_exported_before_runs() -> None:
    """A `DCNv4` without its centre and a `FlashDeformAttn`, saved for any batch by PyTorch 2.13, on
    another batch, and what came out then."""
    if VERSION < (2, 13):
        pytest.skip(f"a program that torch 2.13 saved needs torch >= 2.13; got {VERSION}")
    reason = backends.why_not(
        "cpu", backends.Call("deform_conv", torch.device("cpu"), torch.float32)
    )
    if reason is not None:
        pytest.skip(f"the program names the cpu backend, which {reason}")
    data = Path(__file__).parents[1] / "data"
    program = torch.export.load(data / "exported_by_torch_2.13.pt2")
    names = [str(node.target) for node in program.graph.nodes if "dcnv4" in str(node.target)]
    assert names == ["dcnv4.deform_conv.default", "dcnv4.ms_deform_attn.default"]
    case = torch.load(data / "exported_by_torch_2.13_case.pt", weights_only=True)
    assert len(case["inputs"][0]) != len(program.example_inputs[0][0])
    torch.testing.assert_close(program.module()(*case["inputs"]), case["output"])


def test_an_exported_model_trains() -> None:
    model = make("DCNv4")
    program = export("DCNv4", model).module()
    inputs = image(2, 6, 8)
    program(*inputs).square().sum().backward()
    model(*inputs).square().sum().backward()
    expected = dict(model.named_parameters())
    for name, parameter in program.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)


@needs_compiler
@pytest.mark.exhaustive
def test_ahead_of_time_package(tmp_path: Path) -> None:
    """A compiled package, in a process of its own, at another size."""
    model = make("DCNv4Conv2d")
    path = str(tmp_path / "model.pt2")
    option = "compile_wrapper_opt_level"  # of torch >= 2.8: quicker to compile
    exists = hasattr(torch._inductor.config.aot_inductor, option)
    quick = {f"aot_inductor.{option}": "O0"} if exists else {}
    program = export("DCNv4Conv2d", model)
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=quick)
    inputs = image(3, 7, 5)
    with torch.no_grad():
        torch.save((inputs, model(*inputs)), tmp_path / "case.pt")
    code = """
import sys, torch, dcnv4
compiled = torch._inductor.aoti_load_package(sys.argv[1] + "/model.pt2")
inputs, expected = torch.load(sys.argv[1] + "/case.pt")
torch.testing.assert_close(compiled(*inputs), expected)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@needs_compiler
@pytest.mark.parametrize("case", [cases.CONV[2], cases.ATTENTION[0]], ids=["conv", "attn"])
def test_inductor(case: cases.Case) -> None:
    """Forward and backward, with kernels of Inductor's before and after the operator."""
    torch._dynamo.reset()

    def call(*inputs: Tensor) -> Tensor:
        return case.call(*(2 * argument for argument in inputs)).sigmoid()

    *inputs, grad = case.inputs(torch.float64)
    results = []
    for function in (call, torch.compile(call, fullgraph=True, dynamic=True)):
        output = function(*inputs)
        results.append((output, *torch.autograd.grad(output, inputs, grad)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_nodes_know_their_submodules() -> None:
    """What quantizers go by."""
    model = nn.Sequential(dcnv4.DCNv4(8, group=2))
    program = torch.export.export(model, (torch.randn(1, 4, 4, 8),))
    stacks = [n.meta["nn_module_stack"] for n in program.graph.nodes if "linear" in str(n.target)]
    paths = [list(stack.values())[-1][0] for stack in stacks]
    assert paths == ["0.value_proj", "0.offset_mask", "0.output_proj"]
