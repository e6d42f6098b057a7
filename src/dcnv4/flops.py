"""How many operations the operators take, for the usual counters.

As in PyTorch, a multiplication and its addition count as 2 operations, and only sums of products
count (not coordinates, fractions and the softmax). A point sums 4 corners in each channel of its
group: 8 operations for each point and channel in the forward, 16 in the backward (the value's
gradient, and the products of which the gradients of coordinates and weights are made).

`torch.utils.flop_counter.FlopCounterMode` knows these formulas. fvcore and thop count a
multiplication and its addition as 1, and have to be told:

    FlopCountAnalysis(model, inputs).set_op_handle(**dcnv4.flops.FVCORE)
    with dcnv4.flops.thop_hooks(model):
        thop.profile(model, inputs)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .imports import when_imported
from .layers import DCNv3, DCNv4, DCNv4Conv2d, FlashDeformAttn

__all__ = ["FVCORE", "thop_hooks"]


def _products(points: int, output: Sequence[int]) -> int:
    """Multiplications of the forward: `points` a group and output pixel, of 4 corners each."""
    return 4 * points * prod(output)


def _conv_points(kernel_size: Sequence[int], remove_center: bool) -> int:
    return prod(kernel_size) - remove_center


def _forward(points: Callable[..., int]) -> Callable[..., int]:
    return lambda *shapes, out_shape, **_: 2 * _products(points(*shapes), out_shape)


def _backward(points: Callable[..., int]) -> Callable[..., int]:
    return lambda grad, *shapes, **_: 4 * _products(points(*shapes), grad)


def _register(counter: ModuleType) -> None:
    """Teach PyTorch's counter, which calls a formula with the arguments, shapes for tensors."""
    # The flat arguments of both convolutions begin with two others.
    conv_points = lambda *arguments: _conv_points(arguments[2], arguments[8])  # noqa: E731
    for name, points in (
        ("deform_conv", conv_points),
        ("deform_conv_packed", conv_points),
        ("ms_deform_attn", lambda *arguments: prod(arguments[3][3:5])),
        ("ms_deform_attn_from_offsets", lambda *arguments: prod(arguments[4][3:5])),
    ):
        operator = getattr(torch.ops.dcnv4, name)
        operator_backward = getattr(torch.ops.dcnv4, f"{name}_backward")
        counter.register_flop_formula(operator)(_forward(points))
        counter.register_flop_formula(operator_backward)(_backward(points))


when_imported("torch.utils.flop_counter", _register)


def _fvcore_conv(inputs: list[Any], outputs: list[Any]) -> int:
    kernel_size = [size.toIValue() for size in inputs[2].node().inputs()]
    return _products(_conv_points(kernel_size, inputs[8].toIValue()), outputs[0].type().sizes())


def _fvcore_attn(coordinates: int, inputs: list[Any], outputs: list[Any]) -> int:
    return _products(prod(inputs[coordinates].type().sizes()[3:5]), outputs[0].type().sizes())


FVCORE: dict[str, Callable[[list[Any], list[Any]], int]] = {
    "dcnv4::deform_conv": _fvcore_conv,
    "dcnv4::deform_conv_packed": _fvcore_conv,
    "dcnv4::ms_deform_attn": partial(_fvcore_attn, 3),
    "dcnv4::ms_deform_attn_from_offsets": partial(_fvcore_attn, 4),
}
"""The functions by which fvcore counts the operators, for its `set_op_handle`."""


@contextmanager
def thop_hooks(model: nn.Module) -> Iterator[None]:
    """A context in which `thop.profile(model, …)` counts the operators in the layers of `model`.

    thop counts the layers' projections by itself.

    Example:
        >>> import thop
        >>> import torch
        >>> from dcnv4 import DCNv4Conv2d, flops
        >>> layer, x = DCNv4Conv2d(3, 16, padding=1), torch.randn(1, 3, 8, 8)
        >>> with flops.thop_hooks(layer):
        ...     operations, parameters = thop.profile(layer, (x,), verbose=False)
        >>> operations > 0
        True
    """

    def count(layer: Any, inputs: Any, output: Tensor) -> None:
        if isinstance(layer, FlashDeformAttn):
            points, channels = layer.n_levels * layer.n_points, layer.output_proj.in_features
            shape = (*output.shape[:-1], channels)
        else:
            points, shape = layer.window.points(), output.shape
        layer.total_ops += _products(points, shape)

    ours = (DCNv3, DCNv4, DCNv4Conv2d, FlashDeformAttn)
    layers = [module for module in model.modules() if isinstance(module, ours)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
