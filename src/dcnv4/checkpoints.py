"""Weights that were trained elsewhere: `load`, and `DCNv3` for those of InternImage."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .conversion import as_patterns, matches
from .layers import DCNv3, DCNv3_pytorch, DCNv4
from .layers.dcnv3 import _ChannelsLast as _ChannelsLast  # whole modules saved before have it here

__all__ = ["DCNv3", "DCNv3_pytorch", "Loaded", "load"]


class Loaded(NamedTuple):
    """What `load` did; its first two fields are those that `load_state_dict` returns.

    Example:
        >>> from dcnv4 import DCNv4, checkpoints
        >>> report = checkpoints.load(DCNv4(64), DCNv4(64).state_dict(), skip="output_proj")
        >>> report.skipped_keys
        ['output_proj.bias', 'output_proj.weight']
    """

    missing_keys: list[str]
    """Names that the model has and the checkpoint does not have."""
    unexpected_keys: list[str]
    """Names that the checkpoint has and the model does not have."""
    skipped_keys: list[str]
    """Names left out because of `skip` or, without `strict`, because shapes differ."""
    source: str
    """The key of the weights in the checkpoint, such as "model_ema"; empty without a key."""


def load(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    strict: bool = True,
    *,
    skip: str | Sequence[str] = (),
    ema: bool = True,
    weights_only: bool = True,
) -> Loaded:
    """Load weights that were trained elsewhere, also with the original DCNv4, or with DCNv3.

    As `model.load_state_dict`, and besides: the weights may lie under "state_dict", "model" or
    "module", or averaged under "state_dict_ema" or "model_ema"; the checkpoint's names or the
    model's may begin with "module.", "_orig_mod.", "model." and "backbone."; `offset_mask` may have
    up to 15 rows that nothing reads, at its end.

    Args:
        model: with `DCNv4`, `FlashDeformAttn` or `DCNv3` layers where the checkpoint's model had
            those of the same names.
        checkpoint: a file of `torch.save` or safetensors, or what `torch.load` made of one.
        strict: whether names and shapes must be the same. False loads what fits.
        skip: names or patterns of tensors, or modules around them, that are left as they are:
            "head" for a classifier of other classes.
        ema: whether averaged weights are preferred where the checkpoint has some.
        weights_only: False reads a file that holds more than tensors and plain containers, and
            runs what code its author put there.

    Returns:
        The names that were missing, left over and skipped, and which weights were taken.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; a `DCNv4` of the model meets the
            weights of a DCNv3.
        RuntimeError: names or shapes differ.

    Example:
        >>> import torch
        >>> from dcnv4 import DCNv4, checkpoints
        >>> torch.save({"state_dict": DCNv4(64).state_dict()}, "layer.pth")
        >>> checkpoints.load(DCNv4(64), "layer.pth").source
        'state_dict'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    state, source = state_of(_read(checkpoint, weights_only), ema)
    own = model.state_dict()
    state, left = as_named(state, own)
    skipped = _skipped(as_patterns("skip", skip), [*own, *state, *left])
    state = _fitted(model, {name: state[name] for name in state if name not in skipped})
    if not strict:
        skipped |= {name for name in state if _differ(state[name], own.get(name))}
        state = {name: state[name] for name in state if name not in skipped}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        hint = "skip=... leaves tensors out by name, strict=False all whose shape differs"
        raise RuntimeError(f"{error}\n\t{hint}") from error
    missing, unexpected = (
        [name for name in names if name not in skipped] for names in (missing, unexpected + left)
    )
    if strict and (missing or unexpected):
        raise RuntimeError(
            "checkpoint must have the names of the model (strict=False loads those that it has); "
            f"got missing: {', '.join(missing) or 'none'}; "
            f"unexpected: {', '.join(unexpected) or 'none'}"
        )
    return Loaded(missing, unexpected, sorted(skipped), source)


def _read(checkpoint: Any, weights_only: bool) -> Any:
    """What a file holds; anything but a path stays as it is."""
    if not isinstance(checkpoint, (str, os.PathLike)):
        return checkpoint
    path = os.fspath(checkpoint)
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(
                f"checkpoint must be read by safetensors (pip install safetensors); got {path}"
            ) from error
        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:
        if not weights_only or isinstance(error, OSError):
            raise
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"checkpoint must be a file of tensors and plain containers; got {path} with "
            f"{found[1] if found else type(error).__name__} (weights_only=False reads it, and runs "
            "what code its author put there)"
        ) from error


# Averaged weights first, timm's and then the original's; then what most people write.
_AVERAGED = ("state_dict_ema", "model_ema")
_PLACES = ("state_dict", "model", "module")


def state_of(checkpoint: Any, ema: bool = True) -> tuple[dict[str, Any], str]:
    """The tensors by name, out of what they were saved in, and the keys that led there."""
    if not isinstance(checkpoint, Mapping):
        raise TypeError(
            "checkpoint must be a path, or the mapping that one holds; "
            f"got {type(checkpoint).__name__}"
        )
    for key in (*(_AVERAGED if ema else ()), *_PLACES):
        if isinstance(checkpoint.get(key), Mapping):
            state, inner = state_of(checkpoint[key], ema)
            return state, f"{key}.{inner}" if inner else key
    if checkpoint and not any(isinstance(value, Tensor) for value in checkpoint.values()):
        raise ValueError(
            f"checkpoint must hold tensors by name, or such a mapping as {', '.join(_PLACES)}, "
            f"{', '.join(_AVERAGED)}; got {', '.join(map(str, checkpoint))}"
        )
    return dict(checkpoint), ""


_WRAPPERS = ("module.", "model.", "backbone.")
_COMPILED = "_orig_mod."  # anywhere in a name


def as_named(state: Mapping[str, Any], own: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """The state by the names that the model has for it, and the names that lie elsewhere.

    Of all that wrappers may have put before the names of both, what fits most names.
    """
    real = {name.replace(_COMPILED, ""): name for name in own}
    state = {name.replace(_COMPILED, ""): tensor for name, tensor in state.items()}
    fits = {
        (theirs, ours): sum(
            name.startswith(ours) and theirs + name[len(ours) :] in state for name in real
        )
        for theirs in _prefixes(state)
        for ours in _prefixes(real)
    }
    theirs, ours = max(fits, key=lambda pair: (fits[pair], -len(pair[0] + pair[1])))
    renamed = {
        ours + name[len(theirs) :]: tensor
        for name, tensor in state.items()
        if name.startswith(theirs)
    }
    left = [name for name in state if not name.startswith(theirs)]
    return {real.get(name, name): tensor for name, tensor in renamed.items()}, left


def _prefixes(names: Iterable[str]) -> set[str]:
    """All that wrappers may have put before some of the names, nothing included."""
    found = {""}
    for name in names:
        start = 0
        while wrapper := next((w for w in _WRAPPERS if name.startswith(w, start)), None):
            start += len(wrapper)
            found.add(name[:start])
    return found


def _skipped(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """The names that a pattern fits."""
    unknown = [p for p in patterns if not any(matches(name, p) for name in names)]
    if unknown:
        raise ValueError(
            f"skip must name tensors of the model or the checkpoint; got {', '.join(unknown)}"
        )
    return {name for name in names if any(matches(name, pattern) for pattern in patterns)}


def _fitted(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The state with as many rows of `offset_mask` as `DCNv4` layers have, none of a DCNv3, and
    with today's names where a layer says what they were."""
    for name, layer in model.named_modules():
        prefix = f"{name}." if name else ""
        former_names = getattr(layer, "_former_names", None)
        for former, now in former_names(prefix).items() if former_names else ():
            if former in state and now not in state:
                state[now] = state.pop(former)
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
    return state


def _differ(loaded: Any, own: Any) -> bool:
    """Whether a tensor has another shape than the model's of the same name."""
    tensors = isinstance(loaded, Tensor) and isinstance(own, Tensor)
    return tensors and not is_lazy(own) and loaded.shape != own.shape


def _resized(rows: Tensor, linear: nn.Linear, used: int) -> Tensor:
    """`rows` of `offset_mask`, those past the `used` ones cut or filled with zeros."""
    if not used <= len(rows) < used + 16:  # of another window, or of other groups
        return rows  # load_state_dict says which shapes differ
    padding = rows.new_zeros(linear.out_features - used, *rows.shape[1:])
    return rows if len(rows) == linear.out_features else torch.cat((rows[:used], padding))
