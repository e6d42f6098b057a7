"""The table of a run of `dcnv4 bench --json`, as docs/benchmarks.md has it.

    python benchmarks/table.py RESULT.json [CONTESTANT …]

Times in µs; ʰ: bound by the host.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dcnv4.cli.bench import cases, report
from dcnv4.cli.bench.report import Row, figures

DIRECTIONS = "forward", "backward"


def time(row: Row | None) -> str:
    if row is None or row.median is None:
        return "-" if row is None or row.problem is None else row.problem.split(":")[0]
    bound = row.host is not None and row.host >= row.median
    return figures(row.median) + " ʰ" * bound


def table(rows: Sequence[Row], contestants: Sequence[str]) -> str:
    """Markdown: for each case and direction the floor and the time of each contestant."""
    words = {case.name: case.words for case in (*cases.CUDA, *cases.CPU)}
    found = {row.key: row for row in rows}
    names = [name for direction in DIRECTIONS for name in (f"{direction}: floor", *contestants)]
    lines = [f"| case | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for case in dict.fromkeys(row.case for row in rows if row.direction in DIRECTIONS):
        cells = [words.get(case, case)]
        for direction in DIRECTIONS:
            timed = [found.get((case, direction, name)) for name in contestants]
            floors = [row.floor for row in timed if row is not None]
            cells += [figures(floors[0] if floors else None), *map(time, timed)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    _, rows = report.load(sys.argv[1])
    everyone = list(dict.fromkeys(row.contestant for row in rows if row.direction in DIRECTIONS))
    print(table(rows, sys.argv[2:] or everyone))
