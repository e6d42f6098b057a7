"""What autograd recorded."""

from __future__ import annotations

from torch import Tensor


def nodes(output: Tensor) -> list[str]:
    """The names of all nodes behind a tensor but for those of leaves, sorted."""
    found, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [following for following, _ in node.next_functions]
    return sorted(node.name() for node in found if "AccumulateGrad" not in node.name())
