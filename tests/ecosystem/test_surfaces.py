"""Every name of what a class or function here replaces exists, and is the same kind of thing."""

from __future__ import annotations

import inspect

import pytest

from support import surfaces


@pytest.mark.parametrize("original", surfaces.LIST)
def test_surface(original: str) -> None:
    entry = surfaces.LIST[original]
    what = surfaces.named(entry["here"])
    found = surfaces.surface(what, entry["built"])
    # Of two originals with other arguments in one place, one's is here by name.
    named = surfaces.keywords(what) if inspect.isclass(what) else []
    expected = [name for name in entry.get("arguments", []) if name not in named]
    assert found.get("arguments", [])[: len(expected)] == expected
    expected = entry.get("apply", [])
    assert found.get("apply", [])[: len(expected)] == expected
    # Everybody gives a layer's input by its place.
    expected = entry.get("forward", [])
    assert found.get("forward", [])[1 : len(expected)] == expected[1:]
    names = entry.get("names", {})
    assert {name: found["names"].get(name) for name in names} == names
