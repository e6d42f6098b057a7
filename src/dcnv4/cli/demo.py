"""`dcnv4 demo`: learn to straighten pictures taken through a fisheye lens, and draw the result."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import DCNv4Conv2d, backends
from . import LETTERS

PACKAGES = {
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
}
SIDE = 64
"""Rows and columns of a picture."""
BEND = 0.3
"""How much the lens bends: the centre looks 1 + 2·BEND times as large as without it."""
BATCH, STEPS, RATE = 8, 100, 1e-2
"""Pictures a step, steps an epoch, the highest learning rate."""
# Okabe and Ito's colours, which the colour-blind can tell apart.
CURVES = ("-", "#0072B2"), ("--", "#D55E00")
Layer = Callable[[int, int], nn.Module]


class Contestant(NamedTuple):
    """A layer (channels in, channels out), and what channels the two of a network give."""

    layer: Layer
    channels: tuple[int, int]


class Photos(NamedTuple):
    """Photos [3, H, W] in 0 to 1 to learn from; pictures [N, 7, 64, 64] of another one as the lens
    shows it, as `through_lens` has them, and as it is [N, 3, 64, 64], to test on."""

    photos: list[Tensor]
    test_inputs: Tensor
    test_scenes: Tensor


class Result(NamedTuple):
    """A trained network, its test error after each epoch, and how long that took."""

    model: nn.Sequential
    errors: list[float]
    seconds: float

    @property
    def parameters(self) -> int:
        return _size(self.model)


def convolution(kernel_size: int, dilation: int, i: int, o: int) -> nn.Conv2d:
    return nn.Conv2d(i, o, kernel_size, padding=dilation * (kernel_size // 2), dilation=dilation)


def network(layer: Layer, channels: tuple[int, int]) -> nn.Sequential:
    """Two `layer`s at half the resolution, and a product to the colours of each pixel."""
    first, second = channels
    return nn.Sequential(
        nn.PixelUnshuffle(2),
        layer(4 * 7, first),
        nn.ReLU(),
        layer(first, second),
        nn.ReLU(),
        nn.Conv2d(second, 4 * 3, 1),
        nn.PixelShuffle(2),
    )


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def as_large(layer: Layer, parameters: int) -> Contestant:
    """With channels, as even as can be, that make a network of so many parameters, or 2 % off."""
    with torch.device("meta"):
        sizes = {
            (first, first + more): _size(network(layer, (first, first + more)))
            for first, more in product(range(2, 25), range(8))
        }
    near = [c for c, size in sizes.items() if abs(size / parameters - 1) <= 0.02]
    return Contestant(layer, min(near, key=lambda c: (c[1] - c[0], abs(sizes[c] - parameters))))


OURS = "DCNv4Conv2d"
DEFORMABLE = Contestant(
    partial(DCNv4Conv2d, kernel_size=3, padding=1, dw_kernel_size=3, offset_scale=2.0),
    (32, 32),
)
BEST = "nn.Conv2d 3x3, dilation 2"
"""The best of `convolutions` by the table of `--compare 5`, which the demo trains beside ours."""


def convolutions() -> dict[str, Contestant]:
    """Networks of ordinary convolutions of as many parameters as ours."""
    size = _size(network(*DEFORMABLE))
    return {
        f"nn.Conv2d {k}x{k}{f', dilation {d}' if d > 1 else ''}": as_large(
            partial(convolution, k, d), size
        )
        for k, d in product((3, 5, 7), (1, 2, 3))
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--epochs", type=_positive, default=12, metavar="N", help="of 100 steps; default: 12"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("dcnv4-demo"),
        metavar="FOLDER",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--compare",
        type=_positive,
        metavar="SEEDS",
        help="train with so many seeds beside every nn.Conv2d of kernel 3, 5, 7 and dilation 1, 2, "
        "3, and print a table; minutes",
    )


def run(args: argparse.Namespace) -> int:
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        needs = f"{', '.join(missing)}: pip install {' '.join(missing)}"
        print(f"dcnv4 demo needs {needs}", file=sys.stderr)
        return 2
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--output must be a folder to write to; got {args.output}: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # networks this small lose more than they gain by sharing cores
    photos = load()
    backend = backends.choose("deform_conv", torch.device("cpu"), torch.float32)
    print(
        "Learning to straighten pictures taken through a fisheye lens: parts of scikit-learn's two "
        f"photos,\ntested on {len(photos.test_inputs)} parts of matplotlib's. One CPU thread, "
        f"backend {backend}."
    )
    contestants = {OURS: DEFORMABLE, **convolutions()}
    if args.compare:
        print(compare(photos, contestants, args.epochs, range(args.compare)))
        return 0
    results = {
        name: train(name, contestants[name], photos, args.epochs, args.seed)
        for name in (OURS, BEST)
    }
    print(report(results, photos))
    path = args.output / "demo.png"
    save_picture(path, results, photos)
    print(f"What both make of it, and where the layer looks: {path}")
    return 0


def load(test: int = 64) -> Photos:
    """scikit-learn's two photos, and parts of the portrait of Grace Hopper that is matplotlib's."""
    from matplotlib.cbook import get_sample_data
    from matplotlib.image import imread
    from sklearn.datasets import load_sample_images

    portrait = imread(get_sample_data("grace_hopper.jpg", asfileobj=False))
    *photos, other = (
        _small(torch.tensor(image)) for image in (*load_sample_images().images, portrait)
    )
    scenes = parts([other], test, torch.Generator().manual_seed(0))
    return Photos(photos, through_lens(scenes), scenes)


def _small(image: Tensor) -> Tensor:
    """A photo [3, 160, W] of bytes [H, W, 3]."""
    height, width, _ = image.shape
    photo = image.permute(2, 0, 1)[None] / 255
    return F.interpolate(photo, size=(160, 160 * width // height), mode="area")[0]


def parts(photos: Sequence[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """Parts [count, 3, 64, 64] of photos, one after another."""
    taken = []
    for i in range(count):
        photo = photos[i % len(photos)]
        row, column = (
            int(torch.randint(n - SIDE + 1, (), generator=generator)) for n in photo.shape[1:]
        )
        taken.append(photo[:, row : row + SIDE, column : column + SIDE])
    return torch.stack(taken)


def varied(scenes: Tensor, generator: torch.Generator) -> Tensor:
    """The scenes [N, 3, 64, 64] mirrored or not, in other colours, up to the negative."""
    count = len(scenes)
    mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    colours = torch.stack([torch.randperm(3, generator=generator) for _ in range(count)])
    negative = torch.rand(count, 1, 1, 1, generator=generator)
    scenes = torch.where(mirrored, scenes.flip(-1), scenes)[torch.arange(count)[:, None], colours]
    return scenes.lerp(1 - scenes, negative)


def through_lens(scenes: Tensor) -> Tensor:
    """What a lens makes of scenes [N, 3, 64, 64], and where its pixels lie: [N, 7, 64, 64].

    Colours, then (x, y, x·r², y·r²), -1 to 1 over the picture, in which lenses are described. The
    pixel at p shows the scene at p·(1 + k·r²) / (1 + 2k), k = BEND: corners stay where they are.
    """
    place = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    y, x = torch.meshgrid(place, place, indexing="ij")
    square = x**2 + y**2
    shown = torch.stack((x, y), -1) * ((1 + BEND * square) / (1 + 2 * BEND))[..., None]
    seen = F.grid_sample(scenes, shown.expand(len(scenes), -1, -1, -1), align_corners=False)
    lens = torch.stack((x, y, x * square, y * square))
    return torch.cat((seen, lens.expand(len(scenes), -1, -1, -1)), 1)


def train(name: str, contestant: Contestant, photos: Photos, epochs: int, seed: int) -> Result:
    """Train a network and test it after each epoch.

    Every network sees the same pictures in the same order.
    """
    from tqdm import tqdm

    torch.manual_seed(seed)
    model = network(*contestant)
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=epochs * STEPS, pct_start=0.2, div_factor=10
    )
    errors = []
    start = time.perf_counter()
    with tqdm(total=epochs * STEPS, desc=f"{name:24}", unit="step") as progress:
        for _ in range(epochs):
            for _ in range(STEPS):
                scenes = varied(parts(photos.photos, BATCH, generator), generator)
                optimizer.zero_grad()
                F.l1_loss(model(through_lens(scenes)), scenes).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                progress.update()
            errors.append(error(predict(model, photos.test_inputs), photos.test_scenes))
            progress.set_postfix_str(f"test error {errors[-1]:.1f} of 255")
    return Result(model, errors, time.perf_counter() - start)


@torch.no_grad()
def predict(model: nn.Sequential, inputs: Tensor) -> Tensor:
    """The scenes [N, 3, 64, 64] that a model sees in inputs [N, 7, 64, 64]."""
    predicted: Tensor = model(inputs).clamp(0, 1)
    return predicted


def error(pictures: Tensor, scenes: Tensor) -> float:
    """The mean absolute difference of colours, of 255."""
    return 255 * F.l1_loss(pictures, scenes).item()


def report(results: dict[str, Result], photos: Photos) -> str:
    """What came out, as a table."""
    untouched = error(photos.test_inputs[:, :3], photos.test_scenes)
    lines = [f"{'':26}{'test error of 255':>18}{'parameters':>12}{'training':>11}"]
    for name, result in results.items():
        seconds = f"{result.seconds:.1f} s"
        lines.append(f"{name:26}{result.errors[-1]:>18.1f}{result.parameters:>12,}{seconds:>11}")
    return "\n".join((*lines, f"{'as the lens shows it':26}{untouched:>18.1f}"))


def compare(
    photos: Photos, contestants: dict[str, Contestant], epochs: int, seeds: Sequence[int]
) -> str:
    """Test errors by layer over all seeds, as a table in Markdown."""
    results = {
        name: [train(name, contestant, photos, epochs, seed) for seed in seeds]
        for name, contestant in contestants.items()
    }
    lines = [
        "| layer | channels | parameters | test error of 255, mean ± deviation | each seed |",
        "|---|---:|---:|---:|---|",
    ]
    for name, each in results.items():
        errors = [result.errors[-1] for result in each]
        spread = f" ± {stdev(errors):.1f}" if len(errors) > 1 else ""
        channels = ", ".join(map(str, contestants[name].channels))
        lines.append(
            f"| `{name}` | {channels} | {each[0].parameters:,} "
            f"| {fmean(errors):.1f}{spread} | {', '.join(f'{e:.1f}' for e in errors)} |"
        )
    return "\n".join(lines)


@torch.no_grad()
def look(model: nn.Sequential, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Where the model looks in the first picture for some of the pixels that it makes.

    From a pixel back through both layers, in each by the mean of its points and their |weights|.
    Returns the pixels and where it looks, both [N, 2] in (x, y).
    """
    halved = model[0](inputs[:1])
    chosen = torch.arange(3, SIDE // 2, 5)
    row, column = torch.meshgrid(chosen, chosen, indexing="ij")
    pixels = place = torch.stack((column, row), -1).flatten(0, 1).float()
    for layer, x in ((model[3], model[1:3](halved)), (model[1], halved)):
        positions, weights = layer.sampling_points(x)  # type: ignore[operator]
        share = weights.abs() / weights.abs().sum((3, 4), keepdim=True)
        mean = (positions * share[..., None]).sum((3, 4))
        nearest = place.round().long().clamp(0, SIDE // 2 - 1)
        place = place + mean[0, nearest[:, 1], nearest[:, 0]] - nearest
    return 2 * pixels + 0.5, 2 * place + 0.5  # a pixel of the layers is two of the picture


def save_picture(path: Path, results: dict[str, Result], photos: Photos) -> None:
    """Draw what the lens shows, where the layer looks, what each network makes of it and how it
    learned, in letters that can be read on a bright and on a dark page."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    chosen = photos.test_inputs[:2]
    ours = results[OURS].model
    columns = {
        "through the lens": chosen[:, :3],
        f"where {OURS} looks": chosen[:, :3],
        **{
            "\n".join((*name.split(", "), f"error {result.errors[-1]:.1f}")): predict(
                result.model, chosen
            )
            for name, result in results.items()
        },
        "without the lens": photos.test_scenes[:2],
    }
    with rc_context(LETTERS):
        figure = Figure(figsize=(13, 4), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(3.3, 1))  # type: ignore[misc]
        grid = left.subplots(2, len(columns))
        for (title, pictures), axes in zip(columns.items(), grid.T, strict=True):
            axes[0].set_title(title, fontsize=11)
            for picture, axis in zip(pictures, axes, strict=True):
                axis.imshow(picture.permute(1, 2, 0).numpy())
                axis.set(xticks=[], yticks=[])
        for axis, picture in zip(grid[:, 1], chosen, strict=True):
            pixels, places = look(ours, picture[None])
            axis.quiver(
                *pixels.T,
                *(places - pixels).T,
                angles="xy",
                scale_units="xy",
                scale=1,
                width=0.012,
                color="white",
                edgecolor="black",
                linewidth=0.8,
            )
            axis.set(xlim=(-0.5, SIDE - 0.5), ylim=(SIDE - 0.5, -0.5))
        _draw_curves(right.subplots(), results)
    figure.savefig(path, dpi=120, transparent=True)


def _draw_curves(axes, results: dict[str, Result]) -> None:  # type: ignore[no-untyped-def]
    for (name, result), (style, colour) in zip(results.items(), CURVES, strict=True):
        epochs = range(1, len(result.errors) + 1)
        axes.plot(epochs, result.errors, style, color=colour, linewidth=2.5, label=name)
    axes.set_title("test error, of 255", fontsize=11)
    axes.set_xlabel(f"epoch of {STEPS} steps", fontsize=11)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", fontsize=10, frameon=False)


def _positive(text: str) -> int:
    if not text.isdecimal() or (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1; got {text}")
    return number
