"""`dcnv4 demo`: learn to read turned, scaled and shifted digits, and draw where the layer looks."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import DCNv4Conv2d, backends, visualize

PACKAGES = {
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
}
CANVAS = 28
"""Rows and columns of the images that the digits, 8 x 8 pixels, are drawn on."""
BATCH = 32
# Okabe and Ito's colours, which the colour-blind can tell apart.
CURVES = ("-", "#0072B2"), ("--", "#D55E00")
LAYERS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "DCNv4Conv2d": (partial(DCNv4Conv2d, dw_kernel_size=3), 64),
    "nn.Conv2d": (nn.Conv2d, 44),
}
"""The layers compared, and the channels that give both networks about as many parameters."""


class Digits(NamedTuple):
    """Images [N, 1, 8, 8] in 0 to 1 to learn from, canvases [M, 1, 28, 28] of others to test on."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Result(NamedTuple):
    """A trained network, its test accuracy after each epoch, and how long that took."""

    model: nn.Sequential
    accuracies: list[float]
    seconds: float

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=_positive, default=16, metavar="N", help="default: 16")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("dcnv4-demo"),
        metavar="FOLDER",
        help="default: %(default)s",
    )


def run(args: argparse.Namespace) -> int:
    if missing := _missing_packages():
        print(
            f"dcnv4 demo needs {', '.join(missing)}: "
            'pip install "dcnv4[demo]", or pip install ".[demo]" in a checkout.',
            file=sys.stderr,
        )
        return 2
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--output must be a folder to write to; got {args.output}: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # networks this small lose more than they gain by sharing cores
    digits = load(args.seed)
    backend = backends.choose("deform_conv", torch.device("cpu"), torch.float32)
    print(
        f"Learning to read {len(digits.labels)} handwritten digits, drawn turned, scaled and "
        f"shifted, anew in every epoch;\ntested on {len(digits.test_labels)} other digits. "
        f"One CPU thread, backend {backend}."
    )
    results = {name: train(name, digits, args.epochs, args.seed) for name in LAYERS}
    print(report(results))
    path = args.output / "digits.png"
    save_picture(path, results, digits)
    print(f"Where the layer looks, and how both learned: {path}")
    return 0


def load(seed: int, test: int = 400) -> Digits:
    """scikit-learn's 1797 handwritten digits, `test` of them held out and drawn once."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=test, stratify=labels, random_state=seed)
    shown, held_out = (
        torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for x in parts[:2]
    )
    named, held_out_named = (torch.tensor(y, dtype=torch.int64) for y in parts[2:])
    canvases = draw(held_out, torch.Generator().manual_seed(seed))
    return Digits(shown, named, canvases, held_out_named)


def draw(images: Tensor, generator: torch.Generator) -> Tensor:
    """Canvases [N, 1, 28, 28] of digits [N, 1, 8, 8].

    Each is turned by up to 40 degrees, scaled to a side of 12 to 20 pixels and shifted as far as
    the canvas allows.
    """
    turn, size, *shift = torch.rand(4, len(images), generator=generator)
    angle = (2 * turn - 1) * math.radians(40)
    scale = (12 + 8 * size) / CANVAS
    moved = (2 * torch.stack(shift, -1) - 1) * (1 - scale)[:, None]
    cos, sin = angle.cos() / scale, angle.sin() / scale
    inverse = torch.stack((cos, sin, -sin, cos), -1).view(-1, 2, 2)
    affine = torch.cat((inverse, -inverse @ moved[..., None]), -1)
    grid = F.affine_grid(affine, [len(images), 1, CANVAS, CANVAS], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class Residual(nn.Module):
    """x + f(x)"""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers(x)
        return y


def network(layer: Callable[..., nn.Module], channels: int) -> nn.Sequential:
    """An ordinary convolution to 14 x 14 pixels, two `layer`s at 7 x 7, the maximum, a Linear."""

    def block(layer: Callable[..., nn.Module], i: int, o: int, stride: int) -> list[nn.Module]:
        return [layer(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU()]

    return nn.Sequential(
        *block(nn.Conv2d, 1, 16, 2),
        *block(layer, 16, channels, 2),
        Residual(*block(layer, channels, channels, 1)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    )


def train(name: str, digits: Digits, epochs: int, seed: int) -> Result:
    """Train the network of `LAYERS[name]` and test it after each epoch.

    Every network sees the same canvases in the same order.
    """
    from tqdm import tqdm

    torch.manual_seed(seed)
    model = network(*LAYERS[name])
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    steps = math.ceil(len(digits.labels) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 8e-3, total_steps=epochs * steps, pct_start=0.2, div_factor=10
    )
    accuracies = []
    start = time.perf_counter()
    with tqdm(total=epochs * steps, desc=f"{name:11}", unit="step") as progress:
        for _ in range(epochs):
            model.train()
            for batch in torch.randperm(len(digits.labels), generator=generator).split(BATCH):
                optimizer.zero_grad()
                logits = model(draw(digits.images[batch], generator))
                F.cross_entropy(logits, digits.labels[batch]).backward()
                optimizer.step()
                schedule.step()
                progress.update()
            right = predict(model, digits.test_images) == digits.test_labels
            accuracies.append(right.float().mean().item())
            progress.set_postfix_str(f"test accuracy {accuracies[-1]:.1%}")
    return Result(model, accuracies, time.perf_counter() - start)


@torch.no_grad()
def predict(model: nn.Sequential, images: Tensor) -> Tensor:
    """The digits [N] that the model reads on canvases [N, 1, 28, 28]."""
    predicted: Tensor = model.eval()(images).argmax(1)
    return predicted


def report(results: dict[str, Result]) -> str:
    """What came out, as a table."""
    lines = [f"{'':12}{'test accuracy':>14}{'parameters':>12}{'training':>11}"]
    for name, result in results.items():
        accuracy, seconds = f"{result.accuracies[-1]:.1%}", f"{result.seconds:.1f} s"
        lines.append(f"{name:12}{accuracy:>14}{result.parameters:>12,}{seconds:>11}")
    return "\n".join(lines)


@torch.no_grad()
def look(model: nn.Sequential, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where one output pixel of the model's last deformable layer looks on each canvas.

    That pixel is the nearest to the drawn digit's centre of mass. Returns the centres [N, 2] of
    these pixels, their points [N, G, K, 2], both (x, y) in canvas pixels, and weights [N, G, K].
    """
    last = next(i for i, module in enumerate(model) if isinstance(module, Residual))
    x = model.eval()[:last](images)
    layer = next(module for module in model[last].modules() if isinstance(module, DCNv4Conv2d))
    positions, weights = layer.sampling_points(x)
    # Each stride-2 layer keeps every other pixel, the first one on.
    pitch = 4
    ramp = torch.arange(CANVAS, dtype=torch.float32)
    mass = images[:, 0] / images[:, 0].sum((1, 2), keepdim=True)
    center = torch.stack(((mass.sum(1) * ramp).sum(1), (mass.sum(2) * ramp).sum(1)), -1)
    column, row = (center / pitch).round().long().clamp(0, x.shape[-1] - 1).unbind(-1)
    image = torch.arange(len(images))
    pixel = torch.stack((column, row), -1).float()
    return pitch * pixel, pitch * positions[image, row, column], weights[image, row, column]


def save_picture(path: Path, results: dict[str, Result], digits: Digits) -> None:
    """Draw ten test canvases with the points of one output pixel each, and the test accuracies."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    name = next(iter(results))
    model = results[name].model
    chosen = torch.stack([(digits.test_labels == digit).nonzero()[0, 0] for digit in range(10)])
    images, labels = digits.test_images[chosen], digits.test_labels[chosen]
    predicted = predict(model, images)
    centers, positions, weights = look(model, images)

    figure = Figure(figsize=(14, 5.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.3, 1))  # type: ignore[misc]
    groups, points = weights.shape[1:]
    left.suptitle(
        f"Where {name} looks for one output pixel (+): {groups} groups of {points} points",
        fontsize=14,
    )
    for i, axes in enumerate(left.subplots(2, 5).flat):
        axes.imshow(images[i, 0].numpy(), cmap="gray", vmin=0, vmax=1.4)
        visualize.points(axes, positions[i], weights[i], center=centers[i])
        right_or_wrong = "" if predicted[i] == labels[i] else f", but it is a {labels[i]}"
        axes.set_title(f"read as {predicted[i]}{right_or_wrong}", fontsize=12)
        axes.set(xlim=(-0.5, CANVAS - 0.5), ylim=(CANVAS - 0.5, -0.5), xticks=[], yticks=[])
    left.legend(
        handles=[
            Line2D([], [], marker="o", linestyle="", markersize=9, color=colour, label=label)
            for colour, label in zip(
                visualize.SIGNS, ("positive weight", "negative weight"), strict=True
            )
        ],
        title="area of a point: its |weight|",
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=11,
    )
    axes = right.subplots()
    for (name, result), (style, colour) in zip(results.items(), CURVES, strict=True):
        percent = [100 * accuracy for accuracy in result.accuracies]
        label = f"{name}\n{percent[-1]:.1f} %, {result.parameters:,} parameters"
        epochs = range(1, len(percent) + 1)
        axes.plot(epochs, percent, style, color=colour, linewidth=2.5, label=label)
    axes.set_title(f"Test accuracy on {len(digits.test_labels)} other digits", fontsize=14)
    axes.set_xlabel("epoch", fontsize=12)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("%", fontsize=12)
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=11, labelspacing=0.8)
    figure.savefig(path, dpi=110)


def _missing_packages() -> list[str]:
    missing = []
    for module, package in PACKAGES.items():
        try:
            import_module(module)
        except ImportError:
            missing.append(package)
    return missing


def _positive(text: str) -> int:
    if not text.isdecimal() or (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1; got {text}")
    return number
