"""Time of layers that are exported as PyTorch's own operations, beside this library's backends.

    python benchmarks/export.py                # one image, one thread of the CPU
    python benchmarks/export.py --device cuda  # a batch, which keeps the GPU busy

Prints the table of docs/export.md, row by row. Every result is checked against the reference
backend's before it is timed. What has no time says why on the standard error.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import dcnv4.onnx
from dcnv4.cli.bench import measure, processor
from dcnv4.cli.bench.cases import TOLERANCE, AttentionLayer, ConvLayer
from dcnv4.cli.bench.peers import describe, layer, relative_error
from dcnv4.cli.bench.report import figures
from dcnv4.export import portable

Case = ConvLayer | AttentionLayer
Call = Callable[[], Tensor]
LAYERS: dict[str, Case] = {
    "`DCNv4(64, group=4)`, 56 x 56": ConvLayer(1, 56, 56, 64),
    "`DCNv4(256, group=16)`, 14 x 14": ConvLayer(1, 14, 14, 256),
    "`FlashDeformAttn(128)`, 3 levels, 1344 queries": AttentionLayer(
        1, ((32, 32), (16, 16), (8, 8)), channels=128
    ),
}
SECONDS = 1.0  # of timing a column of a row
WARM = 3  # calls, in which TorchScript specialises its graph


class Model(nn.Module):
    """The layer of a case as a function of tensors alone, for a trace takes no numbers."""

    def __init__(self, case: Case, backend: str) -> None:
        super().__init__()
        self.layer = layer(case, backend)
        self.numbers = (case.levels,) if isinstance(case, AttentionLayer) else ()

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer(*inputs, *self.numbers)


def model_of(case: Case, backend: str, device: torch.device) -> nn.Module:
    return Model(case, backend).to(device, case.dtype).eval()


def inputs_of(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """In the case's dtype, but for reference points."""
    first, *rest = (x.to(case.dtype) for x in case.inputs(device))
    places = [case.reference_points(device)] if isinstance(case, AttentionLayer) else []
    return first, *places, *rest


def eager(backend: str, case: Case, inputs: tuple[Tensor, ...]) -> Call:
    return partial(model_of(case, backend, inputs[0].device), *inputs)


def torchscript(case: Case, inputs: tuple[Tensor, ...]) -> Call:
    model = model_of(case, "reference", inputs[0].device)
    with portable():
        return partial(torch.jit.trace(model, inputs, check_trace=False), *inputs)


def onnx_runtime(case: Case, inputs: tuple[Tensor, ...]) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        onnx_file(case, inputs), options, providers=["CPUExecutionProvider"]
    )
    names = (entry.name for entry in session.get_inputs())
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(case: Case, inputs: tuple[Tensor, ...]) -> Call:
    from openvino import Core

    core = Core()
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    run = core.compile_model(core.read_model(onnx_file(case, inputs)), "CPU", options)
    feed = [x.numpy() for x in inputs]
    return lambda: torch.from_numpy(run(feed)[0])


def onnx_file(case: Case, inputs: tuple[Tensor, ...]) -> bytes:
    model = model_of(case, "reference", inputs[0].device)
    return dcnv4.onnx.export(model, inputs).model_proto.SerializeToString()


def package(case: Case, inputs: tuple[Tensor, ...]) -> Call:
    model = model_of(case, "reference", inputs[0].device)
    with portable():
        program = torch.export.export(model, inputs)
    path = torch._inductor.aoti_compile_and_package(program)
    return partial(torch._inductor.aoti_load_package(path), *inputs)


COLUMNS: dict[str, dict[str, Callable[[Case, tuple[Tensor, ...]], Call]]] = {
    "cpu": {
        "`cpu` backend": partial(eager, "cpu"),
        "`reference` backend": partial(eager, "reference"),
        "TorchScript": torchscript,
        "ONNX Runtime": onnx_runtime,
        "OpenVINO": openvino,
        "Inductor package": package,
    },
    "cuda": {
        "`cuda` backend": partial(eager, "cuda"),
        "`triton` backend": partial(eager, "triton"),
        "`reference` backend": partial(eager, "reference"),
        "TorchScript": torchscript,
        "Inductor package": package,
    },
}


def times(case: Case, device: torch.device) -> list[float | None]:
    """Median µs of each column; None for what failed or is wrong."""
    inputs = inputs_of(case, device)
    expected = eager("reference", case, inputs)()
    calls: dict[str, Call] = {}
    for name, make in COLUMNS[device.type].items():
        try:
            call = make(case, inputs)
            for _ in range(WARM):
                output = call()
            wrong = relative_error((output,), (expected,))
            if not wrong <= TOLERANCE[case.precision]:
                raise ValueError(f"WRONG: relative error {wrong:.1e}")
            calls[name] = call
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {describe(error)}", file=sys.stderr)
    measured = measure.times(list(calls.values()), device, SECONDS)
    medians = dict(zip(calls, (taken.median for taken in measured), strict=True))
    return [medians.get(name) for name in COLUMNS[device.type]]


def caption(device: torch.device, images: int) -> str:
    gpu = device.type == "cuda"
    where = torch.cuda.get_device_name() if gpu else f"one thread of {processor()}"
    how = measure.METHOD[device.type].partition(";")[0]
    packages = ("torch", "triton") if gpu else ("torch", "onnxruntime", "openvino")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages if find_spec(name))
    return (
        f"Median µs, {how}; batch {images}, float32 where nothing else is said; "
        f"{where}, {versions}:\n"
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=COLUMNS, default="cpu")
    device = torch.device(parser.parse_args().device)
    images, precisions = {"cpu": (1, ["fp32"]), "cuda": (64, ["fp32", "fp16"])}[device.type]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(caption(device, images))
    print("| layer and map |", " | ".join(COLUMNS[device.type]), "|")
    print("|---" * (1 + len(COLUMNS[device.type])) + "|", flush=True)
    for precision in precisions:
        half = ", float16" * (precision == "fp16")
        for words, case in LAYERS.items():
            row = times(replace(case, batch=images, precision=precision), device)
            print(f"| {words}{half} |", " | ".join(map(figures, row)), "|", flush=True)


if __name__ == "__main__":
    main()
