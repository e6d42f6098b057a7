"""The tables of a run of `dcnv4 bench --json`, as docs/benchmarks.md has them.

    python benchmarks/table.py RESULT.json

Of operators, layers and models one for each direction in µs, and one of the memory in MB. ʰ: bound
by the host.
"""

from __future__ import annotations

import sys

from dcnv4.cli.bench import report
from dcnv4.cli.bench.report import Row, Story, figures


def time(story: Story, row: Row | None) -> str:
    if row is None or row.median is None:
        return "-" if row is None or row.problem is None else row.problem.split(":")[0]
    return figures(row.median) + "ʰ" * story.bound_by_host(row)


def memory(story: Story, row: Row | None) -> str:
    return "-" if row is None or row.memory is None else f"{row.memory / 1e6:.1f}"


def table(story: Story, direction: str, cell=time) -> str:  # type: ignore[no-untyped-def]
    """Markdown: the floor, where it is of times, and what each contestant took."""
    floors = cell is time and story.name == "operators"
    lines = [[story.name.removesuffix("s"), *["floor"] * floors, *story.contestants]]
    for case, words in story.cases.items():
        rows = [story.rows.get((case, direction, name)) for name in story.contestants]
        floor = next((row.floor for row in rows if row is not None), None)
        cells = [cell(story, row) for row in rows]
        lines.append([words, *[figures(floor)] * floors, *cells])
    lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(rows: list[Row]) -> dict[str, str]:
    """Every table of a run by what stands above it."""
    result = {}
    for story in report.stories(rows):
        for direction in story.directions:
            said = direction.replace("+", " and ")
            result[f"{story.name.capitalize()}, {said}, µs"] = table(story, direction)
        said = story.step.replace("+", " and ")
        heading = f"{story.name.capitalize()}, memory of {said}, MB"
        result[heading] = table(story, story.step, memory)
    return result


if __name__ == "__main__":
    environment, rows = report.load(sys.argv[1])
    print(report.header(environment))
    for heading, text in tables(rows).items():
        print(f"\n{heading}:\n\n{text}")
