"""What is run: shapes, dtypes and inputs. A new case is a new line in `CUDA` or `CPU`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import functional
from ...arguments import window
from ...geometry import Window

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 4e-2}
"""The largest relative L2 error of a result that counts as right."""


class Case:
    """What every case is; its `inputs` are what gradients are taken of."""

    op: ClassVar[str]
    precision: str
    note: str
    """Where the shape comes from."""
    quick: bool
    """Whether `--quick` keeps it."""

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def words(self) -> str:
        """The name for people who read a table."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """The same random tensors in every run, in the contract's layout."""
        raise NotImplementedError

    def random(self, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(zlib.crc32(self.name.encode()))


@dataclass(frozen=True)
class Conv(Case):
    """`deform_conv` at stride 1 with "same" padding; offsets are normal with deviation `spread`."""

    batch: int
    height: int
    width: int
    groups: int
    depth: int
    precision: str = "fp32"
    spread: float = 0.5
    kernel: int = 3
    note: str = ""
    quick: bool = False
    op: ClassVar[str] = "deform_conv"

    @property
    def name(self) -> str:
        shape = "x".join(map(str, (self.batch, self.height, self.width, self.groups, self.depth)))
        kernel = f"-k{self.kernel}" if self.kernel != 3 else ""
        spread = f"-spread{self.spread:g}" if self.spread != 0.5 else ""
        return f"conv-{shape}-{self.precision}{kernel}{spread}"

    @property
    def words(self) -> str:
        kernel = f", {self.kernel} x {self.kernel} points" if self.kernel != 3 else ""
        spread = f", spread {self.spread:g}" if self.spread != 0.5 else ""
        image = f"{self.batch} x {self.height} x {self.width}"
        return f"{image}, {self.groups} x {self.depth}, {_dtype(self.precision)}{kernel}{spread}"

    @property
    def window(self) -> Window:
        return window(self.kernel, padding=self.kernel // 2, groups=self.groups)

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """value [B, H, W, C] and offset_mask [B, H, W, 3·G·K rounded up to a multiple of 8]."""
        options: dict[str, Any] = {"device": device, "generator": self.random(device)}
        image = self.batch, self.height, self.width
        value = torch.randn(*image, self.groups * self.depth, **options)
        channels = self.window.offset_mask_channels()
        offset_mask = torch.randn(*image, channels, **options)
        offsets, _ = self.window.split(offset_mask)
        offsets.copy_(between_pixels(self.spread * offsets))
        offset_mask = torch.nn.functional.pad(offset_mask, (0, -channels % 8))
        return value.to(self.dtype), offset_mask.to(self.dtype)

    def operator(self, backend: str) -> Callable[..., Tensor]:
        """This library's function of the inputs."""
        return partial(
            functional.deform_conv,
            kernel_size=self.kernel,
            padding=self.kernel // 2,
            groups=self.groups,
            backend=backend,
        )


@dataclass(frozen=True)
class Attention(Case):
    """`ms_deform_attn` with its softmax: an encoder's (a query a pixel) or a decoder's queries.

    Points are normal around each query's place with deviation `spread` pixels in every level.
    `locations` is the dtype of the sampling locations, where it isn't the value's.
    """

    batch: int
    levels: tuple[tuple[int, int], ...]
    queries: int | None = None
    precision: str = "fp32"
    locations: str | None = None
    heads: int = 8
    depth: int = 32
    points: int = 4
    spread: float = 2.0
    note: str = ""
    quick: bool = False
    op: ClassVar[str] = "ms_deform_attn"

    @property
    def name(self) -> str:
        exact = f"-{self.locations}-locations" if self.locations else ""
        return f"{_what(self)}-{self.precision}{exact}"

    @property
    def words(self) -> str:
        height, width = self.levels[0]
        what = f"Encoder, {self.batch} x {height} x {width}"
        if self.queries is not None:
            what = f"Decoder, {self.batch} x {self.queries} queries"
        exact = f", {_dtype(self.locations)} locations" if self.locations else ""
        return f"{what}, {_dtype(self.precision)}{exact}"

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """value [B, S, G, D], locations [B, Q, G, L, P, 2] and logits [B, Q, G, L, P]."""
        options: dict[str, Any] = {"device": device, "generator": self.random(device)}
        pixels = sum(height * width for height, width in self.levels)
        places = _places(self, options)
        shape = (self.batch, places.shape[1], self.heads, len(self.levels), self.points)
        value = torch.randn(self.batch, pixels, self.heads, self.depth, **options)
        sizes = torch.tensor(self.levels, device=device).flip(1)[:, None]
        x_y = places[:, :, None, None, None] * sizes - 0.5
        x_y = between_pixels(x_y + self.spread * torch.randn(*shape, 2, **options))
        locations = (x_y + 0.5) / sizes
        logits = torch.randn(shape, **options)
        exact = DTYPES[self.locations] if self.locations else self.dtype
        return value.to(self.dtype), locations.to(exact), logits.to(self.dtype)

    def operator(self, backend: str) -> Callable[..., Tensor]:
        """This library's function of the inputs."""

        def call(value: Tensor, locations: Tensor, logits: Tensor) -> Tensor:
            return functional.ms_deform_attn(
                value, self.levels, locations, logits, softmax=True, backend=backend
            )

        return call


class Layer(Case):
    """A whole layer with float32 parameters, under autocast where the dtype is a half."""

    operator: ClassVar[str]
    """The one inside."""

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(device.type, self.dtype)


@dataclass(frozen=True)
class ConvLayer(Layer):
    """`DCNv4`; its input is float32 under autocast, as a normalisation leaves it."""

    batch: int
    height: int
    width: int
    channels: int
    precision: str = "fp32"
    note: str = ""
    quick: bool = False
    op: ClassVar[str] = "layer"
    operator: ClassVar[str] = "deform_conv"

    @property
    def name(self) -> str:
        shape = f"{self.batch}x{self.height}x{self.width}x{self.channels}"
        return f"layer-{shape}-{self.precision}"

    @property
    def words(self) -> str:
        image = f"{self.batch} x {self.height} x {self.width} x {self.channels}"
        return f"Layer, {image}, {_dtype(self.precision)}"

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """x [B, H, W, C]"""
        image = (self.batch, self.height, self.width, self.channels)
        return (torch.randn(image, device=device, generator=self.random(device)),)


@dataclass(frozen=True)
class AttentionLayer(Layer):
    """`FlashDeformAttn`, with an encoder's queries, a pixel each, or a decoder's."""

    batch: int
    levels: tuple[tuple[int, int], ...]
    queries: int | None = None
    precision: str = "fp32"
    channels: int = 256
    heads: int = 8
    points: int = 4
    note: str = ""
    quick: bool = False
    op: ClassVar[str] = "attention layer"
    operator: ClassVar[str] = "ms_deform_attn"

    @property
    def name(self) -> str:
        return f"layer-{_what(self)}-{self.precision}"

    @property
    def words(self) -> str:
        height, width = self.levels[0]
        what = f"an encoder, {self.batch} x {height} x {width}"
        if self.queries is not None:
            what = f"a decoder, {self.batch} x {self.queries} queries"
        return f"Layer of {what}, {_dtype(self.precision)}"

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """query [B, Q, C] and the levels' pixels [B, S, C]."""
        options: dict[str, Any] = {"device": device, "generator": self.random(device)}
        pixels = sum(height * width for height, width in self.levels)
        queries = pixels if self.queries is None else self.queries
        return tuple(
            torch.randn(self.batch, n, self.channels, **options) for n in (queries, pixels)
        )

    def reference_points(self, device: torch.device) -> Tensor:
        """[B, Q, 1, 2]"""
        return _places(self, {"device": device, "generator": self.random(device)})[:, :, None]


@dataclass(frozen=True)
class Model(Layer):
    """A whole model of `dcnv4.models` that is not in training."""

    model: str
    batch: int
    size: int = 224
    precision: str = "fp32"
    note: str = ""
    quick: bool = False
    op: ClassVar[str] = "model"
    operator: ClassVar[str] = "deform_conv"
    checked: ClassVar[int] = 1
    """The first images, which those behind them do not change."""

    @property
    def name(self) -> str:
        return f"model-{self.model}-{self.batch}x{self.size}-{self.precision}"

    @property
    def words(self) -> str:
        image = f"{self.batch} x {self.size} x {self.size}"
        return f"{self.model}, {image}, {_dtype(self.precision)}"

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """Images [B, 3, H, W], channels_last."""
        shape = (self.batch, 3, self.size, self.size)
        images = torch.randn(shape, device=device, generator=self.random(device))
        return (images.to(self.dtype, memory_format=torch.channels_last),)


def _what(case: Attention | AttentionLayer) -> str:
    """An encoder or a decoder, as names have it."""
    if case.queries is not None:
        return f"decoder-{case.batch}x{case.queries}"
    height, width = case.levels[0]
    return f"encoder-{case.batch}x{height}x{width}"


def _places(case: Attention | AttentionLayer, options: dict[str, Any]) -> Tensor:
    """Where each query is, [B, Q, 2]: on the pixels of an encoder, anywhere for a decoder."""
    if case.queries is not None:
        return torch.rand(case.batch, case.queries, 2, **options)
    centers = [_centers(height, width, options["device"]) for height, width in case.levels]
    return torch.cat(centers).expand(case.batch, -1, -1)


def _dtype(precision: str) -> str:
    return str(DTYPES[precision]).removeprefix("torch.")


def between_pixels(x: Tensor) -> Tensor:
    """x moved to at least 1/16 from an integer, where gradients jump and rounding decides them."""
    whole = x.floor()
    return whole + 1 / 16 + (x - whole) * (7 / 8)


def _centers(height: int, width: int, device: torch.device) -> Tensor:
    """(x, y) of the pixels [H·W, 2], normalised."""
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    return torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), -1).flatten(0, 1)


_COST = "what a call itself costs"
TINY: tuple[Case, ...] = (
    Conv(1, 2, 2, 1, 16, note=_COST, quick=True),
    Attention(1, ((2, 2),), heads=1, depth=16, note=_COST, quick=True),
    ConvLayer(1, 2, 2, 16, "bf16", note=_COST, quick=True),
    AttentionLayer(1, ((2, 2),), None, "bf16", 16, heads=1, note=_COST, quick=True),
)
"""Next to no work: the time of their calls is measured in each way to call."""

_DETR = ((100, 134), (50, 67), (25, 34), (13, 17))  # an 800 x 1066 image
_HALF_DETR = ((50, 67), (25, 34), (13, 17), (7, 9))

CUDA_MODELS: tuple[Case, ...] = (
    Model("flash_internimage_t", 64, 224, "fp16"),
    Model("flash_internimage_b", 64, 224, "fp16"),
    Model("flash_internimage_t", 2, 800, "fp16", note="a detector's images"),
)
CPU_MODELS: tuple[Case, ...] = (
    Model("flash_internimage_t", 1),
    Model("flash_internimage_t", 1, 224, "bf16"),
)

# The most telling first: a plot shows as many as it has room for, a time limit cuts the last.
CUDA: tuple[Case, ...] = (
    Conv(64, 56, 56, 4, 16, "fp16", note="FlashInternImage-T/224 stage 1", quick=True),
    Conv(64, 56, 56, 4, 16, "fp16", spread=8, quick=True),
    Attention(2, _DETR, None, "fp16", note="Deformable DETR encoder", quick=True),
    Attention(8, _DETR, 300, "fp16", note="Deformable DETR decoder", quick=True),
    ConvLayer(64, 56, 56, 64, "fp16", note="FlashInternImage-T/224 stage 1", quick=True),
    AttentionLayer(2, _DETR, None, "fp16", note="Deformable DETR encoder", quick=True),
    Conv(64, 28, 28, 8, 16, "fp16", note="FlashInternImage-T/224 stage 2"),
    Conv(64, 14, 14, 16, 16, "fp16", note="FlashInternImage-T/224 stage 3"),
    Conv(64, 7, 7, 32, 16, "fp16", note="FlashInternImage-T/224 stage 4"),
    Conv(64, 56, 56, 4, 16, "fp16", spread=2),
    Conv(64, 56, 56, 4, 16, "fp32"),
    Conv(64, 56, 56, 4, 16, "bf16"),
    Attention(2, _DETR, None, "fp32", note="Deformable DETR encoder"),
    Attention(8, _DETR, 900, "fp32", note="DINO decoder"),
    Conv(1, 200, 320, 4, 16, "fp16", note="FlashInternImage-T/800x1280 stage 1"),
    Conv(1, 100, 160, 8, 16, "fp16", note="FlashInternImage-T/800x1280 stage 2"),
    Conv(1, 50, 80, 16, 16, "fp16", note="FlashInternImage-T/800x1280 stage 3"),
    Conv(1, 25, 40, 32, 16, "fp16", note="FlashInternImage-T/800x1280 stage 4"),
    Conv(64, 56, 56, 4, 32, "fp16"),
    Conv(64, 56, 56, 7, 16, "fp16", note="FlashInternImage-B/224 stage 1"),
    Conv(16, 100, 160, 8, 64, "fp16"),
    ConvLayer(64, 28, 28, 128, "fp16", note="FlashInternImage-T/224 stage 2"),
    ConvLayer(64, 14, 14, 256, "fp16", note="FlashInternImage-T/224 stage 3"),
    ConvLayer(64, 7, 7, 512, "fp16", note="FlashInternImage-T/224 stage 4"),
    ConvLayer(1, 200, 320, 64, "fp16", note="FlashInternImage-T/800x1280 stage 1"),
    ConvLayer(64, 56, 56, 64, "bf16", note="FlashInternImage-T/224 stage 1"),
    AttentionLayer(8, _DETR, 300, "fp16", note="Deformable DETR decoder"),
    Conv(16, 56, 56, 4, 16, "fp16", kernel=5),
    Conv(16, 56, 56, 4, 16, "fp16", kernel=7),
    Conv(1, 14, 14, 4, 16, "fp16", note="small"),
    Conv(3, 17, 23, 3, 5, "fp32", note="odd"),
    Conv(2, 31, 29, 5, 24, "fp16", note="odd"),
    Attention(2, _DETR, None, "bf16"),
    Attention(2, _DETR, None, "fp16", locations="fp32"),
    *CUDA_MODELS,
    *TINY,
)

CPU: tuple[Case, ...] = (
    Conv(1, 56, 56, 4, 16, note="FlashInternImage-T/224 stage 1", quick=True),
    Attention(1, _HALF_DETR, 300, note="Deformable DETR decoder", quick=True),
    ConvLayer(1, 56, 56, 64, note="FlashInternImage-T/224 stage 1", quick=True),
    Conv(4, 28, 28, 8, 16, note="FlashInternImage-T/224 stage 2"),
    Conv(4, 14, 14, 16, 16, note="FlashInternImage-T/224 stage 3"),
    Conv(4, 7, 7, 32, 16, note="FlashInternImage-T/224 stage 4"),
    Conv(1, 100, 160, 4, 16, note="FlashInternImage-T/400x640 stage 1"),
    Conv(1, 56, 56, 7, 16, note="FlashInternImage-B/224 stage 1"),
    Conv(1, 50, 80, 8, 64),
    Conv(1, 56, 56, 4, 16, spread=2),
    Conv(1, 56, 56, 4, 16, spread=8),
    Conv(1, 56, 56, 4, 16, kernel=5),
    Conv(1, 56, 56, 4, 16, kernel=7),
    Conv(1, 56, 56, 4, 16, "bf16"),
    Conv(1, 56, 56, 4, 16, "fp16"),
    Conv(1, 14, 14, 4, 16, note="small"),
    Conv(3, 17, 23, 3, 5, note="odd"),
    Attention(1, _HALF_DETR, note="Deformable DETR encoder, half resolution"),
    Attention(1, _HALF_DETR, None, "bf16", locations="fp32"),
    ConvLayer(1, 56, 56, 64, "bf16", note="FlashInternImage-T/224 stage 1"),
    ConvLayer(4, 14, 14, 256, note="FlashInternImage-T/224 stage 3"),
    AttentionLayer(1, _HALF_DETR, 300, note="Deformable DETR decoder"),
    *CPU_MODELS,
    *TINY,
)


def choose(device: torch.device, patterns: Sequence[str], quick: bool) -> list[Case]:
    """The device's cases that a pattern names, or whose name or note one matches; all without, or
    all quick ones."""
    cases = CUDA if device.type == "cuda" else CPU
    named = [case for case in cases if case.name in patterns]
    loose = [pattern for pattern in patterns if pattern not in {case.name for case in named}]
    return [
        case
        for case in cases
        if (not patterns and (case.quick or not quick))
        or case in named
        or (loose and (matches(case.name, loose) or matches(case.note, loose)))
    ]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether `name` fits one of the globs, or contains one of the words; True without any."""
    return not patterns or any(
        fnmatchcase(name, pattern) or pattern in name for pattern in patterns
    )


def floor_bytes(inputs: Sequence[Tensor], output: Tensor, direction: str) -> int:
    """Bytes that `direction` cannot do without: each input read, each result written, once.

    A backward reads the inputs and the output's gradient, and writes the inputs' gradients.
    """
    read = sum(t.numel() * t.element_size() for t in inputs)
    result = output.numel() * output.element_size()
    return {
        "forward": read + result,
        "backward": 2 * read + result,
        "forward+backward": 3 * read + 2 * result,
    }[direction]
