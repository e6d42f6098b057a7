"""Exports that run without this package: its operators become PyTorch's own operations.

These are the ones of the reference backend: gathers and sums of products.
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
    """A context in which traced graphs hold PyTorch's own operations, none of this package.

    They may be traced by `torch.export.export`, `torch.jit.trace` or `torch.compile`. Other calls
    run as they always do. `torch.onnx.export` does not need this context.

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
    """The operations that replace each operator of this package, for
    `ExportedProgram.run_decompositions`.

    Returns:
        A function for each operator. You may merge it with PyTorch's own table.

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
