"""What a mutant is: one line of one file, changed; kept so that no tool is needed to make it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIST = ROOT / "tests/mutation/mutants.jsonl"
RESULTS = ROOT / "tests/mutation/results.jsonl"
SURVIVORS = ROOT / "tests/mutation/survivors.jsonl"
_AROUND = 2  # lines before and after by which a line is known


class StaleError(Exception):
    """The line that a mutant changes is no longer there."""


def digest(*parts: object) -> str:
    return sha256("\0".join(map(str, parts)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Mutant:
    """A changed line; `line` counts from 1 and only tells lines with the same neighbours apart."""

    file: str
    line: int
    original: str
    mutated: str
    context: str
    """Of the lines around it, see `context`."""

    @cached_property
    def key(self) -> str:
        """What results know it by, wherever in its file the line moves."""
        return digest(self.file, self.original, self.mutated, self.context)

    @property
    def place(self) -> tuple[str, str, str]:
        """The line itself."""
        return self.file, self.original, self.context

    @contextmanager
    def applied(self, root: Path) -> Iterator[None]:
        """The line is changed in the tree `root`, and then as it was.

        Raises:
            StaleError: there is no such line with these neighbours.
        """
        path = root / self.file
        original = path.read_bytes() if path.exists() else b""
        lines = original.decode().split("\n")
        places = [
            place
            for place, line in enumerate(lines)
            if line == self.original and context(lines, place) == self.context
        ]
        if not places:
            raise StaleError(f"{self.file} must have the line {self.original.strip()!r}; got none")
        place = min(places, key=lambda place: abs(place + 1 - self.line))
        lines[place] = self.mutated
        path.write_text("\n".join(lines), encoding="utf-8")
        try:
            yield
        finally:
            path.write_bytes(original)


def context(lines: Sequence[str], place: int) -> str:
    """A hash of the lines around the one at index `place`."""
    return digest(
        *(line.strip() for line in lines[max(place - _AROUND, 0) : place]),
        "",
        *(line.strip() for line in lines[place + 1 : place + 1 + _AROUND]),
    )


def load(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; none where there is no file, or a line is cut off."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def load_mutants(path: Path = LIST) -> list[Mutant]:
    return [Mutant(**record) for record in load(path)]


def save_mutants(mutants: Iterable[Mutant], path: Path = LIST) -> None:
    ordered = sorted(mutants, key=lambda mutant: (mutant.file, mutant.line))
    lines = (json.dumps(asdict(mutant), ensure_ascii=False) + "\n" for mutant in ordered)
    path.write_text("".join(lines), encoding="utf-8")


def load_results(path: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The last result of each mutant, by its key."""
    return {record["key"]: record for record in load(path)}
