"""Which mutants are tried: a line in so many, of all lines that universalmutator can change."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .mutants import Mutant, context, digest

_RULES = {
    ".py": ["universal.rules", "python.rules"],
    "": ["universal.rules", "cpp.rules", "c_like.rules"],
}
# Lines whose changes say nothing of the tests: what names come from, what a compiler is advised.
_IGNORED = [r"^\s*from .* import ", r"^\s*#pragma"]
Lines = list[Mutant]
"""The mutants of one line."""


def generate(root: Path, files: Iterable[str]) -> Iterator[Lines]:
    """All that universalmutator changes in each line of these files.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        mutator: Any = importlib.import_module("universalmutator.mutator")
    except ImportError as error:
        raise SystemExit(
            f"drawing needs universalmutator (pip install --no-deps universalmutator): {error}"
        ) from error
    for file in files:
        source = (root / file).read_text(encoding="utf-8")
        rules = _RULES.get(Path(file).suffix, _RULES[""])
        with contextlib.redirect_stdout(io.StringIO()):
            made = mutator.mutants_regexp(
                source.splitlines(keepends=True),
                ruleFiles=rules,
                ignorePatterns=_IGNORED,
                ignoreStringOnly=True,
            )
        lines = source.split("\n")
        found: dict[int, Lines] = {}
        for number, mutated, *_ in made:
            if "\n" in mutated.rstrip("\n"):  # another statement behind the line
                continue
            place = number - 1
            mutant = Mutant(file, number, lines[place], mutated.rstrip("\n"), context(lines, place))
            found.setdefault(number, []).append(mutant)
        yield from found.values()


def draw(root: Path, lines: Iterable[Lines], count: int, seed: int) -> list[Mutant]:
    """A mutant of each of `count` lines, that says something else; every line is as likely as any
    other.

    A line's place in the draw depends on the seed and on the line, not on the others: what is drawn
    again after a change is mostly what was drawn before.
    """
    drawn: dict[str, Mutant] = {}
    for mutants in sorted(lines, key=lambda mutants: digest(seed, *mutants[0].place)):
        source = (root / mutants[0].file).read_text(encoding="utf-8")
        ordered = sorted(mutants, key=lambda mutant: digest(seed, mutant.key))
        chosen = next((mutant for mutant in ordered if says_something_else(mutant, source)), None)
        if chosen is not None:
            drawn[chosen.key] = chosen
        if len(drawn) == count:
            break
    return list(drawn.values())


def says_something_else(mutant: Mutant, source: str) -> bool:
    """Whether more than text changes: in Python the syntax tree but for docstrings and annotations,
    in C++ what is no comment and no space."""
    if not mutant.file.endswith(".py"):
        return _code(mutant.mutated) != _code(mutant.original)
    lines = source.split("\n")
    lines[mutant.line - 1] = mutant.mutated
    try:
        return _meaning("\n".join(lines)) != _meaning(source)
    except SyntaxError:
        return False


def _code(line: str) -> str:
    return "".join(line.partition("//")[0].split())


def _meaning(source: str) -> str:
    """The syntax tree without docstrings and `pass`, without annotations that nothing reads and the
    comments of C++ in strings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = re.sub("//.*", "", node.value)
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if isinstance(body, list):
                setattr(node, name, [part for part in body if not _is_nothing(part)])
        for name in ("annotation", "returns"):
            annotation = getattr(node, name, None)
            if annotation is not None and "constexpr" not in ast.dump(annotation):
                setattr(node, name, None)
    return ast.dump(tree)


def _is_nothing(node: ast.stmt) -> bool:
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return text or isinstance(node, ast.Pass)
