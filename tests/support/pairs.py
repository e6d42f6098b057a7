"""Few rows of settings in which every pair of settings meets, instead of all combinations."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

Row = dict[str, Any]
_DRAWN = 40  # rows, of which the one that brings most new pairs is taken


def rows(given: Sequence[Row], free: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Every given row with settings of the free factors, and more such rows until every setting of
    a free factor has met every setting of every other factor.

    A greedy choice from a fixed seed: the same rows on every run.
    """
    rng = random.Random(0)
    settings = {name: list(dict.fromkeys(row[name] for row in given)) for name in given[0]}
    settings |= {name: list(of_factor) for name, of_factor in free.items()}
    missing = {
        frozenset(((name, one), (other, two)))
        for name in free
        for other in settings
        if other != name
        for one in settings[name]
        for two in settings[other]
    }
    found: list[Row] = []
    while missing or len(found) < len(given):
        rest = {name: rng.choices(settings[name], k=_DRAWN) for name in free}
        drawn = [dict(zip(rest, row, strict=True)) for row in zip(*rest.values(), strict=True)]
        if len(found) < len(given):
            drawn = [{**given[len(found)], **row} for row in drawn]
        else:
            pair = dict(min(missing, key=lambda pair: sorted(map(repr, pair))))
            fits = [base for base in given if all(base.get(n, s) == s for n, s in pair.items())]
            drawn = [{**rng.choice(fits), **row, **pair} for row in drawn]
        found.append(max(drawn, key=lambda row: len(_pairs(row) & missing)))
        missing -= _pairs(found[-1])
    return found


def _pairs(row: Row) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(pair) for pair in combinations(row.items(), 2)}
