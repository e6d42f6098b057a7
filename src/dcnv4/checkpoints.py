"""Weights that were trained elsewhere: `load`, and `DCNv3` for those of InternImage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .layers import DCNv3, DCNv4
from .layers.dcnv3 import _ChannelsLast as _ChannelsLast  # whole modules saved before have it here

__all__ = ["DCNv3", "load"]


def load(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Load the weights of a model that was trained with the original DCNv4, or with DCNv3.

    As `model.load_state_dict(checkpoint, strict=True)`, and besides: the weights may lie under
    "state_dict", "model" or "module" among other things that were saved; all names may start with
    "module."; `offset_mask` may have any number of rows that nothing reads, at its end.

    Args:
        model: with `DCNv4`, `FlashDeformAttn` or `DCNv3` layers where the checkpoint's model had
            those of the same names.
        checkpoint: as `torch.load` returned it.

    Raises:
        ValueError: a `DCNv4` of the model meets the weights of a DCNv3.
        RuntimeError: names or shapes differ.
    """
    state = _state(checkpoint)
    for name, layer in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(layer, DCNv4):
            if f"{prefix}dw_conv.0.weight" in state:
                raise ValueError(
                    f"{name or 'model'} must be a dcnv4.checkpoints.DCNv3 to compute what its "
                    "weights did, with norm, activation and softmax; got a DCNv4"
                )
            for key in (f"{prefix}offset_mask.weight", f"{prefix}offset_mask.bias"):
                if key in state:
                    state[key] = _resized(
                        state[key], layer.offset_mask, layer.window.offset_mask_channels()
                    )
    model.load_state_dict(state, strict=True)


def _state(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors by name, out of what they were saved in."""
    for key in ("state_dict", "model", "module"):
        if isinstance(checkpoint.get(key), Mapping):
            return _state(checkpoint[key])
    if checkpoint and all(name.startswith("module.") for name in checkpoint):
        return {name.removeprefix("module."): tensor for name, tensor in checkpoint.items()}
    return dict(checkpoint)


def _resized(rows: Tensor, linear: nn.Linear, used: int) -> Tensor:
    """`rows` of `offset_mask`, those past the `used` ones cut or filled with zeros."""
    if len(rows) < used:
        return rows  # load_state_dict says which shapes differ
    padding = rows.new_zeros(linear.out_features - used, *rows.shape[1:])
    return rows if len(rows) == linear.out_features else torch.cat((rows[:used], padding))
