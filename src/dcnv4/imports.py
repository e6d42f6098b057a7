"""What is to be done once somebody imports a module of PyTorch's.

Importing such a module here would cost everybody seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class _Finder(MetaPathFinder):
    """Finds these modules as Python does, and makes their import call the functions."""

    def __init__(self) -> None:
        self.functions: dict[str, Callable[[ModuleType], None]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        function = self.functions.get(fullname)
        spec = PathFinder.find_spec(fullname, path, target) if function is not None else None
        if function is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            function(module)

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


_finder = _Finder()
sys.meta_path.insert(0, _finder)


def when_imported(name: str, function: Callable[[ModuleType], None]) -> None:
    """Call the function with this module, now or as soon as it is imported, and again whenever it
    is reloaded."""
    _finder.functions[name] = function
    if name in sys.modules:
        function(import_module(name))
