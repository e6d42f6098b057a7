"""The sections of docs/benchmarks.md that show runs of `dcnv4 bench --json`.

    python benchmarks/table.py              # write those of the runs in benchmarks/results
    python benchmarks/table.py RESULT.json  # print that of one run

A section has plots, which `python docs/pictures.py` draws, and tables: of operators, layers and
models the time in each direction in µs, and the memory in MB.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import indent

from dcnv4.cli.bench import report
from dcnv4.cli.bench.report import Row, Story, figures

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/benchmarks.md"
BEGIN, END = "<!-- runs in benchmarks/results -->\n", "<!-- end of runs -->\n"
Cell = Callable[[Row | None], str]


def time(row: Row | None) -> str:
    if row is None or row.median is None:
        return "-" if row is None or row.problem is None else row.problem.split(":")[0]
    return figures(row.median)


def memory(row: Row | None) -> str:
    return "-" if row is None or row.memory is None else f"{row.memory / 1e6:.1f}"


def table(story: Story, direction: str, cell: Cell = time) -> str:
    """Markdown: what each contestant took in every case, times of operators beside the floor."""
    floors = cell is time and story.name == "operators"
    lines = [[story.name.removesuffix("s"), *["floor"] * floors, *story.contestants]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for case, words in story.cases.items():
        rows = [story.rows.get((case, direction, name)) for name in story.contestants]
        floor = next((row.floor for row in rows if row is not None), None)
        lines.append([words, *[figures(floor)] * floors, *(cell(row) for row in rows)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(file: Path) -> str:
    """Markdown: a run's device, versions, command, plots and tables."""
    environment, rows = report.load(str(file))
    parts = [
        f"## {environment['device']}, dcnv4 {environment['versions'].split()[1].rstrip(',')}",
        f"{environment['versions']}; copy bandwidth {environment['copy'].partition(', ')[0]}. "
        f"Median µs, {environment['timing']}:",
        indent(environment["command"], "    "),
    ]
    for story in report.stories(rows):
        name = story.name.capitalize()
        parts.append(f"![{name}: time and memory](images/{file.stem}-{story.name}.svg)")
        for direction in story.directions:
            parts.append(f"{name}, {direction.replace('+', ' and ')}, µs:")
            parts.append(table(story, direction))
        parts.append(f"{name}, memory of {story.step.replace('+', ' and ')}, MB:")
        parts.append(table(story, story.step, memory))
    return "\n\n".join(parts) + "\n"


def page(text: str) -> str:
    """The page with the sections of today."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    sections = "\n".join(section(file) for file in sorted(RESULTS.glob("*.json")))
    return f"{before}{BEGIN}\n{sections}{END}{after}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(section(Path(sys.argv[1])))
    else:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
