"""Exports that run where nobody knows this package: its operators become PyTorch's own operations.

They become what the reference backend computes: gathers and sums of products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from . import ops
from .tracing import portable as _portable

__all__ = ["decompositions", "portable"]


@contextmanager
def portable() -> Iterator[None]:
    """What is traced inside holds no operator of this package.

    That goes for `torch.export.export`, `torch.jit.trace` and `torch.compile`. Calls that nobody
    traces run as ever. `torch.onnx.export` needs no such context.

    Example:
        >>> import torch
        >>> import dcnv4.export
        >>> model = dcnv4.DCNv4Conv2d(3, 16, padding=1).eval()
        >>> with dcnv4.export.portable():
        ...     program = torch.export.export(model, (torch.randn(1, 3, 32, 48),))
        >>> any("dcnv4" in str(node.target) for node in program.graph.nodes)
        False
    """
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def decompositions() -> dict[Any, Callable[..., Tensor]]:
    """What each operator of this package becomes, for `ExportedProgram.run_decompositions`.

    Returns:
        A function by the operator that it stands for. PyTorch's own table may be merged with it.

    Example:
        >>> import torch
        >>> import dcnv4.export
        >>> model = dcnv4.DCNv4Conv2d(3, 16, padding=1).eval()
        >>> program = torch.export.export(model, (torch.randn(1, 3, 32, 48),))
        >>> program = program.run_decompositions(dcnv4.export.decompositions())
        >>> any("dcnv4" in str(node.target) for node in program.graph.nodes)
        False
    """
    return {
        operator.operator: partial(_decomposed, operator.unflatten, operator.differentiable)
        for operator in ops.OPERATORS
    }


def _decomposed(
    unflatten: Callable[..., tuple[Any, ...]], function: Callable[..., Tensor], *flat: Any
) -> Tensor:
    return function(*unflatten(*flat))
