"""Which of many like tests are quick enough for `pytest` alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def one_in(step: int, params: Iterable[Any], name: Callable[[Any], str] = str) -> list[Any]:
    """All of them as parameters; the exhaustive tier alone runs those between every `step`th."""
    return [
        pytest.param(one, id=name(one), marks=pytest.mark.exhaustive if i % step else ())
        for i, one in enumerate(params)
    ]
