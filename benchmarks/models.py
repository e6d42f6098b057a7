"""Images a second of whole models of timm's registry, in each way that they are run.

    python benchmarks/models.py                # on a GPU
    python benchmarks/models.py --batch 1      # on a CPU, without a GPU

Rows for docs/models.md, a model a column. On a GPU the training is under float16 autocast, a
classifier's loss and its gradients, and inference is in float16; of a CUDA graph, the time of its
replay. On a CPU, inference alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dcnv4.cli.bench import captured
from dcnv4.cli.bench.peers import created, describe

Call = Callable[[], object]


class Way:
    """A model, and the images that it is run on in one way."""

    def __init__(self, name: str, batch: int, device: str) -> None:
        torch._dynamo.reset()
        self.model = created(name).to(device, memory_format=torch.channels_last)
        images = torch.randn(batch, 3, 224, 224, device=device)
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.arange(batch, device=device)

    def loss(self) -> Tensor:
        with torch.autocast("cuda", torch.float16, cache_enabled=False):
            return F.cross_entropy(self.model(self.images), self.labels)

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Of training; without an optimizer the gradients alone."""
        torch.compiler.cudagraph_mark_step_begin()
        self.loss().backward()
        if optimizer is not None:
            optimizer.step()
        self.model.zero_grad()

    def infer(self) -> Tensor:
        with torch.inference_mode():
            scores: Tensor = self.model(self.images)
            return scores


def eager(way: Way) -> Call:
    return way.step


def checkpointed(way: Way) -> Call:
    way.model.set_grad_checkpointing()
    return way.step


def compiled(way: Way) -> Call:
    way.model.compile(dynamic=False)
    return way.step


def reduced(way: Way) -> Call:
    way.model.compile(dynamic=False, mode="reduce-overhead")
    return partial(way.step, torch.optim.AdamW(way.model.parameters(), 1e-5, fused=True))


def replayed(way: Way) -> Call:
    way.model.compile(dynamic=False)
    way.step()
    return captured(lambda: way.loss().backward())[0]


def inferred(way: Way, dtype: torch.dtype, compiles: bool = False, graph: bool = False) -> Call:
    way.model.to(dtype).eval().requires_grad_(False)
    way.images = way.images.to(dtype)
    if compiles:
        way.model.compile(dynamic=False)
    way.infer()
    return captured(way.infer)[0] if graph else way.infer


def ways(device: str) -> Iterator[tuple[str, Callable[[Way], Call]]]:
    if device == "cpu":
        for dtype in torch.float32, torch.bfloat16:
            words = str(dtype).removeprefix("torch.")
            yield f"inference, {words}", partial(inferred, dtype=dtype)
            yield f"inference, {words}, compiled", partial(inferred, dtype=dtype, compiles=True)
        return
    yield "training, eager", eager
    yield "training, eager, gradient checkpointing", checkpointed
    yield "training, compiled", compiled
    yield 'training, compiled by mode="reduce-overhead", AdamW', reduced
    yield "training, compiled, CUDA graph", replayed
    half = partial(inferred, dtype=torch.float16)
    yield "inference, eager", half
    yield "inference, CUDA graph", partial(half, graph=True)
    yield "inference, compiled, CUDA graph", partial(half, compiles=True, graph=True)


def seconds(call: Call, device: str) -> float:
    """Of one call: of the best of 5 runs of as many as take about half a second."""

    def run(repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / repeats

    repeats = max(3, int(0.5 / min(run(3), run(3))))
    return min(run(repeats) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="flash_internimage_t,convnext_tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="ways whose name has this")
    arguments = parser.parse_args()
    device, names = arguments.device, arguments.models.split(",")
    print("torch", torch.__version__, torch.cuda.get_device_name() if device == "cuda" else device)
    print(f"| {' | '.join(['images a second', *names])} |")
    for words, make in ways(device):
        if arguments.only not in words:
            continue
        cells = [words]
        for name in names:
            way = Way(name, arguments.batch, device)
            try:
                call = make(way)
                for _ in range(3):
                    call()
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                cell = f"{arguments.batch / seconds(call, device):.{0 if device == 'cuda' else 1}f}"
                if "training, eager" in words:
                    cell += f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
                del call
            except Exception as error:
                print(f"{name}, {words}: {describe(error)}", file=sys.stderr)
                cell = "-"
            cells.append(cell)
            del way
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
