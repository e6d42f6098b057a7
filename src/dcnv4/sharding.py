"""How the operators run on tensors that are spread over processes, PyTorch's `DTensor`s.

Where a call is made of calls of their own, as `Operator.splits` says, every process makes its part
of the results from its part of the tensors, and sends nothing. Tensors in other forms are brought
into one of these by PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

from . import ops
from .imports import when_imported

Form = tuple[list[Any], list[Any]]
"""Placements of an operator's results and of its flat arguments, None for what is no tensor."""


def _register(tensor: ModuleType) -> None:
    """Teach PyTorch the forms, as they are along one dimension of a mesh of processes."""
    try:
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError:  # PyTorch says then that the operators have no sharding strategy
        return
    for operator in ops.OPERATORS:
        register_sharding(operator.operator)(partial(_forward, operator, tensor))
        register_sharding(operator.operator_backward)(partial(_backward, operator, tensor))


def _forward(operator: ops.Operator, tensor: ModuleType, *flat: Any) -> list[Form]:
    return [([output], arguments) for _, output, arguments in _forms(operator, tensor, flat)]


def _backward(operator: ops.Operator, tensor: ModuleType, _: Any, *flat: Any) -> list[Form]:
    """Gradients lie as their inputs do. Of an input that is whole while the output is split, every
    part makes a summand."""
    summand = tensor.Partial()
    return [
        (
            [summand if i.is_replicate() and output.is_shard() else i for i in inputs],
            [output, *arguments],
        )
        for inputs, output, arguments in _forms(operator, tensor, flat)
    ]


def _forms(
    operator: ops.Operator, tensor: ModuleType, flat: tuple[Any, ...]
) -> Iterator[tuple[list[Any], Any, list[Any]]]:
    """Placements of the inputs, of the output and of all flat arguments, in each form.

    An argument that is a tensor comes as what `DTensor` knows of it.
    """
    call = operator.unflatten(*flat)
    inputs = [call[i] for i in operator.inputs]
    shapes = [*(i.shape for i in inputs), operator.output_shape(*call)]
    processes = inputs[0].mesh.size()
    for split in ((None,) * len(shapes), *operator.splits(*call)):
        sizes = {s[dim] for s, dim in zip(shapes, split, strict=True) if dim is not None}
        # Parts of unequal sizes fit together only where they are parts of the same size.
        if len(sizes) > 1 and any(size % processes for size in sizes):
            continue
        whole = tensor.Replicate()
        *places, output = (whole if dim is None else tensor.Shard(dim) for dim in split)
        of_input = dict(zip(map(id, inputs), places, strict=True))
        arguments = [of_input.get(id(a), whole if hasattr(a, "mesh") else None) for a in flat]
        yield places, output, arguments


when_imported("torch.distributed.tensor", _register)
