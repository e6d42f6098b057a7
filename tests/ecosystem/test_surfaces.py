"""Every name of what a class or function here replaces exists, and is the same kind of thing."""

from __future__ import annotations

import pytest

from support import surfaces


@pytest.mark.parametrize("original", surfaces.LIST)
def test_surface(original: str) -> None:
    entry = surfaces.LIST[original]
    found = surfaces.surface(surfaces.named(entry["here"]), entry["built"])
    for function in ("arguments", "apply", "forward"):
        expected = entry.get(function, [])
        assert found.get(function, [])[: len(expected)] == expected, function
    names = entry.get("names", {})
    assert {name: found["names"].get(name) for name in names} == names
