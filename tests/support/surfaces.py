"""What other people's code may call: the names of a class or function, and the list of originals.

`data/surfaces.json` has for each original where it is here, the repository and commit it was read
at, how it was built, and its `Surface`.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

LIST = json.loads((Path(__file__).parents[1] / "data" / "surfaces.json").read_text("utf-8"))

Surface = dict[str, Any]


def named(path: str) -> Any:
    """What is at "package.module.name"."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def arguments(function: Callable[..., Any]) -> list[str]:
    """The names of a function's positional arguments."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    parameters = inspect.signature(function).parameters
    return [name for name, p in parameters.items() if p.kind in kinds and name != "self"]


def keywords(function: Callable[..., Any]) -> list[str]:
    """The names of the arguments that a function takes by name only."""
    parameters = inspect.signature(function).parameters
    return [name for name, p in parameters.items() if p.kind == inspect.Parameter.KEYWORD_ONLY]


def surface(what: Any, built: list[Any]) -> Surface:
    """The arguments of a function; of a layer also its names, each with the kind of thing it is.

    Names of `nn.Module`, and of base classes outside the layer's own package, are left out.
    """
    if not inspect.isclass(what):
        return {"arguments": arguments(what)}
    if not issubclass(what, nn.Module):
        return {"apply": arguments(what.apply)}
    layer = what(*built)
    package = what.__module__.partition(".")[0]
    own = [c for c in what.__mro__ if c.__module__.partition(".")[0] == package]
    names = set(vars(layer)).union(*(vars(c) for c in own))
    for container in (layer._parameters, layer._buffers, layer._modules):
        names |= set(container)
    common = set(dir(nn.Module())) - {"forward"}
    told = (n for n in names - common if not n.startswith(("__", "_abc_")))
    kept = sorted(n for n in told if hasattr(layer, n))
    return {
        "arguments": arguments(what.__init__),
        "forward": arguments(what.forward),
        "names": {n: _kind(getattr(layer, n)) for n in kept},
    }


def _kind(thing: Any) -> str:
    return (
        "method" if callable(thing) and not isinstance(thing, nn.Module) else type(thing).__name__
    )
