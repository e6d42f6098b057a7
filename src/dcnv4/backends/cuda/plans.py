"""Remembered launches: what `choice` chose for a call, compiled, and its arguments.

A plan is made once for every set of shapes, strides and settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor

from ...geometry import Window, reference_steps
from . import choice, compile
from .choice import Layout
from .launch import Number, starter

_PLANS = 4096  # remembered
Laid = Union[Layout, "tuple[Any, ...]"]
"""What `layout` says of a tensor; the `Layout` of it is made with a plan alone."""


class Plan(NamedTuple):
    """Launches but for their tensors."""

    start: Callable[..., None]
    """With tensors, by keyword: see `launch.ARGUMENTS`."""
    output: tuple[int, ...] = ()
    """Shape of the forward's result."""
    leftover: int = 0
    """Bytes in which the first launch says what it leaves to the second."""


def layout(tensor: Tensor) -> Laid:
    """Where its numbers lie, as what plans are remembered by."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() & 15


@lru_cache(_PLANS)
def conv_plan(
    value: Laid,
    offset_mask: Laid,
    grads: tuple[Laid, ...] | None,
    window: Window,
    deterministic: bool,
    device: int,
) -> Plan | None:
    """What runs `deform_conv`; None where there is nothing to do.

    Args:
        grads: of the output, `value` and `offset_mask`, for a backward.
    """
    value, offset_mask = Layout(*value), Layout(*offset_mask)
    gradients = None if grads is None else choice.ConvGradients(*(Layout(*g) for g in grads))
    batch, height, width, channels = value.shape
    rows, columns = offset_mask.shape[1:3]
    if 0 in (batch, rows, columns, height, width):
        return None
    chosen = choice.conv(value, offset_mask, gradients, window, deterministic, _gpu(device))
    value_image, value_pixel = value.pixels
    offset_mask_image, offset_mask_pixel = offset_mask.pixels
    numbers: dict[str, Number] = {
        "value_image": value_image,
        "offset_mask_image": offset_mask_image,
        "offset_mask_pixel": offset_mask_pixel,
        "pixel_bytes": value_pixel * choice.itemsize(value.dtype),
        "slices": batch * rows * columns * window.groups,
        "images": batch,
        "offset_scale": window.offset_scale,
        "height": height,
        "width": width,
        "out_height": rows,
        "out_width": columns,
        "strip_tiles": chosen.strip_tiles,
        "strips": chosen.strips,
    }
    if gradients is not None:
        grad_image, grad_pixel = gradients.output.pixels
        numbers |= {
            "grad_image": grad_image,
            "grad_pixel": grad_pixel,
            "grad_offset_mask_pixel": gradients.offset_mask.pixels[1],
            "offset_mask_channels": offset_mask.shape[3],
        }
    start = _starter(chosen.kernels, numbers, device)
    return Plan(start, (batch, rows, columns, channels), chosen.leftover)


@lru_cache(_PLANS)
def attn_plan(
    value: Laid,
    coordinates: Laid,
    weights: Laid,
    reference: tuple[Laid, str] | None,
    grads: tuple[Laid, int, int] | None,
    sizes: tuple[int, ...] | None,
    softmax: bool,
    deterministic: bool,
    device: int,
) -> Plan | None:
    """What runs `ms_deform_attn`; None where there is nothing to do.

    Args:
        reference: points or boxes, and what boxes are normalised by.
        grads: for a backward the output's gradient, and the strides from row (b, q) to row of the
            gradients of coordinates and weights.
    """
    value, coordinates, weights = Layout(*value), Layout(*coordinates), Layout(*weights)
    place = None if reference is None else (Layout(*reference[0]), reference[1])
    grad = None if grads is None else Layout(*grads[0])
    batch, length, groups, depth = value.shape
    queries, levels = coordinates.shape[1], coordinates.shape[3]
    if 0 in (batch, queries, groups, length):
        return None
    tensors = value, coordinates, weights, place, grad
    chosen = choice.attn(*tensors, sizes, softmax, deterministic, _gpu(device))
    steps = [0, 0, 0] if place is None else reference_steps(place[0].shape, place[0].strides)
    numbers: dict[str, Number] = {
        "value_image": value.strides[0],
        "coordinates_image": coordinates.strides[0],
        "coordinates_query": coordinates.strides[1],
        "weights_image": weights.strides[0],
        "weights_query": weights.strides[1],
        "reference_image": steps[0],
        "reference_query": steps[1],
        "reference_level": steps[2],
        "length": length,
        "pixel_bytes": value.strides[1] * choice.itemsize(value.dtype),
        "slices": batch * queries * groups,
        "queries": queries,
        "sizes": sizes or (0,) * 2 * levels,
    }
    if grads is not None and grad is not None:
        numbers["grad_image"], numbers["grad_query"] = grad.pixels
        _, numbers["grad_coordinates_row"], numbers["grad_weights_row"] = grads
    return Plan(_starter(chosen.kernels, numbers, device), (batch, queries, groups * depth))


@lru_cache(_PLANS)
def zeros_plan(size: int, device: int) -> Plan:
    """What clears `size` bytes, whole words."""
    return Plan(_starter((choice.zeros(size, _gpu(device)),), {"bytes": size}, device))


@lru_cache(_PLANS)
def fixed_point_scale_plan(
    grad: Laid,
    weights: tuple[Laid, int, int] | None,
    groups: int,
    points: int,
    device: int,
) -> Plan:
    """What chooses the multipliers of integer sums; `weights` as in `choice.fixed_point_scale`."""
    grad = Layout(*grad)
    held = None if weights is None else (Layout(*weights[0]), *weights[1:])
    kernel = choice.fixed_point_scale(grad, held, groups, _gpu(device))
    images, rows = grad.shape[0], math.prod(grad.shape[1:-1])
    grad_image, grad_row = grad.pixels
    weights_image, weights_row = (grad if held is None else held[0]).pixels
    numbers: dict[str, Number] = {
        "grad_image": grad_image,
        "grad_row": grad_row,
        "weights_image": weights_image,
        "weights_row": weights_row,
        "rows": rows,
        "images": images,
        "blocks": kernel.blocks // (images * (1 if held is None else 2)),
        "terms": (rows * points).bit_length(),
    }
    return Plan(_starter((kernel,), numbers, device))


@lru_cache(_PLANS)
def convert_sums_plan(
    images: int, result: Laid, deterministic: bool, columns: int, device: int
) -> Plan:
    """What makes `result` [B, ..., C], cut into so many `images`, of sums."""
    result = Layout(*result)
    kernel = choice.convert_sums(images, result, deterministic, columns, _gpu(device))
    numbers: dict[str, Number] = {
        "result_row": result.pixels[1],
        "count": math.prod(result.shape) // images,
        "blocks": kernel.blocks // images,
    }
    return Plan(_starter((kernel,), numbers, device))


@lru_cache(_PLANS)
def linear_plan(
    rows: int, channels: int, width: int, given: torch.dtype, dtype: torch.dtype, device: int
) -> Plan | None:
    """What multiplies rows by a weight, where `choice.multiplies`; otherwise None."""
    gpu = _gpu(device)
    if not choice.multiplies(rows, channels, width, given, dtype, gpu):
        return None
    kernel = choice.linear(rows, channels, width, given, dtype, gpu)
    return Plan(_starter((kernel,), {"rows": rows}, device))


@lru_cache(_PLANS)
def fuses_mlp(rows: int, channels: int, hidden: int, dtype: torch.dtype, device: int) -> bool:
    """As `choice.fuses_mlp`, on this GPU."""
    return choice.fuses_mlp(rows, channels, hidden, dtype, _gpu(device))


@lru_cache(_PLANS)
def mlp_plan(
    rows: int, channels: int, hidden: int, dtype: torch.dtype, eps: float, device: int
) -> Plan:
    """What makes the residual branch of an MLP."""
    kernel = choice.mlp(rows, channels, hidden, dtype, _gpu(device))
    return Plan(_starter((kernel,), {"rows": rows, "eps": eps}, device))


@lru_cache(_PLANS)
def layer_norm_plan(
    direction: str,
    rows: int,
    channels: int,
    dtype: torch.dtype,
    weights: torch.dtype,
    eps: float,
    device: int,
) -> Plan:
    """What normalises rows, or makes their gradients, with sums of the shape `output`."""
    kernel = choice.layer_norm(direction, rows, channels, dtype, weights, _gpu(device))
    start = _starter((kernel,), {"rows": rows, "eps": eps}, device)
    return Plan(start, (kernel.blocks, 2, channels))


def _starter(
    kernels: tuple[choice.Kernel, ...], numbers: Mapping[str, Number], device: int
) -> Callable[..., None]:
    """What launches kernels one after another, all with the same arguments."""
    compiled = []
    for name, own, blocks, threads, waits, shared in kernels:
        macros = {"MAX_THREADS": choice.MAX_THREADS, **own}
        texts = tuple((macro, str(value)) for macro, value in macros.items())
        kernel = compile.kernel(name, texts, device, shared)
        compiled.append((kernel, blocks, threads, waits and compile.overlaps(device)))

    def launch(arguments: bytes) -> None:
        if torch._C._cuda_getDevice() != device:
            with torch.cuda.device(device):
                return launch(arguments)
        stream = torch._C._cuda_getCurrentRawStream(device)
        for kernel, blocks, threads, early in compiled:
            kernel(blocks, threads, stream, arguments, early)

    return starter(kernels[0].name, kernels[0].macros, numbers, launch)


def _gpu(index: int) -> choice.GPU:
    properties = torch.cuda.get_device_properties(index)
    # PyTorch before 2.4 does not say.
    shared = getattr(properties, "shared_memory_per_block_optin", 48 << 10)
    return choice.GPU(properties.major, properties.multi_processor_count, shared)
