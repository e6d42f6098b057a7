"""What came of the mutants, as docs/mutation.md has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from .mutants import ROOT, Mutant
from .selections import PACKAGE

PAGE = ROOT / "docs/mutation.md"
BEGIN, END = "<!-- the report begins -->\n", "<!-- the report ends -->\n"
VERDICTS = ("missed", "equivalent", "speed only")
NOTICED = ("killed", "timeout")


def report(
    mutants: Sequence[Mutant],
    results: Mapping[str, Mapping[str, Any]],
    survivors: Sequence[Mapping[str, str]],
) -> tuple[str, list[Mutant]]:
    """The tables, and the survivors on which there is no verdict.

    Args:
        mutants: those that were drawn.
        results: of each, by its key.
        survivors: a record of each that survived: `key`, `verdict`, `why`.

    Raises:
        ValueError: a verdict is none, or has no reason.
    """
    verdicts = {record["key"]: record for record in survivors}
    for record in survivors:
        if record["verdict"] not in VERDICTS or not record["why"]:
            raise ValueError(f"verdict must be one of {VERDICTS}, with a reason; got {record}")
    groups: dict[str, list[str]] = {}
    rows, open_questions = [], []
    for mutant in mutants:
        outcome = results.get(mutant.key, {}).get("result", "not run")
        if outcome == "survived":
            record = verdicts.get(mutant.key)
            outcome = record["verdict"] if record else "missed"
            if record is None:
                open_questions.append(mutant)
            else:
                rows.append(_row(mutant, record))
        groups.setdefault(_group(mutant.file), []).append(outcome)
    total = [outcome for outcomes in groups.values() for outcome in outcomes]
    groups = {**dict(sorted(groups.items())), "all": total}
    columns = (*NOTICED, *VERDICTS)
    titles = "failed a test", "ran too long", "missed", "equivalent", "speed only"
    others = sorted(set(total) - set(columns))
    lines = [
        f"| where | tried | {' | '.join((*titles, *others))} |",
        "|---" * (2 + len(titles) + len(others)) + "|",
    ]
    for name, outcomes in groups.items():
        tried = sum(outcome in columns for outcome in outcomes)
        counts = (outcomes.count(column) for column in (*columns, *others))
        lines.append(f"| {name} | {tried} | {' | '.join(map(str, counts))} |")
    if rows:
        lines += ["", "| survivor | instead of | is | because |", "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n", open_questions


def write(text: str, page: Path = PAGE) -> None:
    """Put the tables into the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}{text}{END}{after}", encoding="utf-8")


def describe(mutant: Mutant) -> str:
    """The change, for a reader at a terminal."""
    return f"{mutant.key} {mutant.file}:{mutant.line}\n- {mutant.original}\n+ {mutant.mutated}"


def _group(file: str) -> str:
    """The folder of kernels of one technique, or the file."""
    path = PurePosixPath(file).relative_to(PACKAGE)
    name = path if path.suffix == ".py" else path.parent
    return f"`{name.as_posix().removeprefix('backends/')}`"


def _row(mutant: Mutant, record: Mapping[str, str]) -> str:
    name = PurePosixPath(mutant.file).relative_to(PACKAGE).as_posix()
    place = f"`{name.removeprefix('backends/')}:{mutant.line}`"
    cells = place, _code(mutant.mutated), _code(mutant.original)
    return f"| {cells[0]} {cells[1]} | {cells[2]} | {record['verdict']} | {record['why']} |"


def _code(text: str) -> str:
    return "`" + " ".join(text.split()).replace("|", "\\|").replace("`", "'") + "`"
