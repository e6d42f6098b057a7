"""Draw the diagrams and the plots of these pages as SVG.

    python docs/pictures.py [FOLDER]

The plots show every run of `dcnv4 bench --json` in benchmarks/results, and tables of benchmarks.md.
A picture follows the light or dark colours of the page that shows it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import cycle, islice
from math import ceil, log, log2, sqrt
from pathlib import Path
from typing import NamedTuple

from dcnv4.cli.bench import report
from dcnv4.cli.bench.report import Row, Story

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks/results"
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #24292f }
.small { font-size: 12px } .bold { font-weight: 600 } .middle { text-anchor: middle }
.end { text-anchor: end } .grid { stroke: #c4ccd4; fill: none }
.axis { stroke: #57606a; fill: none } .soft { fill: #57606a }
.pixel { fill: #f0f3f6; stroke: #c4ccd4 }
.a { fill: #0969da } .b { fill: #d4640d } .c { fill: #7d8590 } .pale { fill-opacity: 0.22 }
.line-a { stroke: #0969da; fill: none } .line-b { stroke: #d4640d; fill: none }
.line-c { stroke: #7d8590; fill: none }
polyline { stroke-width: 2 } .thick { stroke-width: 1.8 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .grid { stroke: #444c56 } .axis { stroke: #9198a1 } .soft { fill: #9198a1 }
  .pixel { fill: #22272e; stroke: #444c56 }
  .a { fill: #58a6ff } .b { fill: #f0883e } .c { fill: #8b949e }
  .line-a { stroke: #58a6ff } .line-b { stroke: #f0883e }
  .line-c { stroke: #8b949e }
}
"""
POINTS = [(column, row) for column in (-1, 0, 1) for row in (-1, 0, 1)]
"""The cells of a 3 x 3 window in the operator's order: columns outermost."""
OFFSETS = (
    *((-0.9, -0.55), (-1.2, 0.35), (-0.55, 0.8), (0.2, -0.9), (0.25, -0.3)),
    *((0.45, 0.75), (1.35, -0.65), (0.7, 0.3), (1.1, 1.2)),
)
WEIGHTS = 0.9, 0.35, 0.2, 0.5, 1.0, 0.6, 0.3, 0.75, 0.45
"""Of these points, to draw."""


class Picture:
    """An SVG in the making; coordinates in pixels, y downwards."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            f'width="{width:g}" height="{height:g}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
        ]

    def add(self, tag: str, kind: str, content: str = "", **attributes: float | str) -> None:
        text = "".join(
            f' {name}="{value if isinstance(value, str) else f"{value:.4g}"}"'
            for name, value in attributes.items()
        )
        self._parts.append(f'<{tag} class="{kind}"{text}>{escape(content)}</{tag}>')

    def text(self, x: float, y: float, content: str, kind: str = "") -> None:
        self.add("text", kind, content, x=x, y=y)

    def lines(self, x: float, y: float, contents: Iterable[str], kind: str = "") -> None:
        for number, content in enumerate(contents):
            self.text(x, y + 19 * number, content, kind)

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        self.add("rect", kind, x=x, y=y, width=width, height=height)

    def disc(self, x: float, y: float, radius: float, kind: str) -> None:
        self.add("circle", kind, cx=x, cy=y, r=radius)

    def line(self, x0: float, y0: float, x1: float, y1: float, kind: str) -> None:
        self.add("line", kind, x1=x0, y1=y0, x2=x1, y2=y1)

    def pixels(self, x: float, y: float, columns: int, rows: int, side: float) -> None:
        for row in range(rows):
            for column in range(columns):
                self.box(x + column * side, y + row * side, side, side, "pixel")

    def __str__(self) -> str:
        return "\n".join((*self._parts, "</svg>", ""))


def operator() -> Picture:
    """One output pixel of one group."""
    picture = Picture(800, 330, "How deform_conv computes one output pixel of one group")
    side, left, top = 34, 10, 40
    picture.text(left, 24, "value, one group's map", "bold")
    picture.pixels(left, top, 8, 7, side)
    x, y = left + 3.5 * side, top + 3.5 * side
    picture.box(x - side / 2, y - side / 2, side, side, "b pale")
    for (column, row), (dx, dy), weight in zip(POINTS, OFFSETS, WEIGHTS, strict=True):
        at = x + column * side, y + row * side
        end = at[0] + dx * side, at[1] + dy * side
        picture.line(*at, *end, "line-a")
        picture.add("circle", "axis", cx=at[0], cy=at[1], r=3)
        picture.disc(*end, 9 * sqrt(weight), "a")
    picture.lines(
        left, top + 7 * side + 22, ["ring: the kernel's grid; line: a point's offset;"], "small"
    )
    picture.text(left, top + 7 * side + 39, "area of the disc: its weight", "small")

    left, cell = 345, 70
    picture.text(left, 24, "one point reads four pixels", "bold")
    picture.pixels(left, top, 2, 2, cell)
    at = left + 0.5 * cell + 0.62 * cell, top + 0.5 * cell + 0.35 * cell
    corners = [(left + (c + 0.5) * cell, top + (r + 0.5) * cell) for r in (0, 1) for c in (0, 1)]
    for corner in corners:
        picture.line(*corner, *at, "line-a")
        picture.disc(*corner, 3, "c")
    picture.disc(*at, 9, "a")
    picture.lines(
        left,
        top + 2 * cell + 24,
        [
            "It is their mean, weighted by",
            "(1-f)(1-g), f(1-g), (1-f)g, f·g",
            "where f, g are the fractions",
            "of its position in x, y.",
        ],
        "small",
    )

    left = 585
    picture.text(left, 24, "the output pixel", "bold")
    picture.pixels(left, top, 3, 3, side)
    picture.box(left + side, top + side, side, side, "b")
    picture.lines(
        left,
        top + 3 * side + 24,
        [
            "The sum over the K points:",
            "weight · what the point read.",
            "Each pixel and each group has",
            "its own offsets and weights;",
            "the channels of a group",
            "share them.",
        ],
        "small",
    )
    return picture


def attention() -> Picture:
    """One head of one query over three levels."""
    picture = Picture(800, 270, "How ms_deform_attn computes one head of one query")
    levels = (
        (10, 8, 6, 30, ((-1.4, -0.8), (0.9, -1.3), (-0.5, 1.1), (1.6, 0.6))),
        (290, 4, 3, 44, ((-0.9, 0.3), (0.5, -0.6), (0.8, 0.5), (-0.3, -0.8))),
        (505, 2, 2, 50, ((0.4, 0.3), (-0.4, 0.2), (0.2, -0.5), (-0.2, -0.3))),
    )
    for number, (left, columns, rows, side, offsets) in enumerate(levels):
        picture.text(left, 24, f"level {number}: {rows} x {columns}", "bold")
        picture.pixels(left, 40, columns, rows, side)
        x, y = left + 0.42 * columns * side, 40 + 0.55 * rows * side
        for (dx, dy), weight in zip(offsets, WEIGHTS[number:], strict=False):
            end = x + dx * side, y + dy * side
            picture.line(x, y, *end, "line-a")
            picture.disc(*end, 9 * sqrt(weight), "a")
        picture.disc(x, y, 5, "b")
    picture.text(640, 24, "the query's output", "bold")
    picture.lines(
        640,
        58,
        [
            "The sum over all points",
            "of all levels: weight ·",
            "what the point read.",
            "Each head has its own",
            "points, and its own",
            "channels of the value.",
        ],
        "small",
    )
    picture.text(10, 244, "orange: the reference point, at the same place of every level;", "small")
    picture.text(10, 261, "line: a point's offset; area of the disc: its weight", "small")
    return picture


def layout() -> Picture:
    """What stands where in the channels of `offset_mask`, and the order of the points."""
    picture = Picture(800, 250, "The channels of offset_mask, and the order of the points")
    picture.text(
        10, 24, "channels of offset_mask at one output pixel: G = 2 groups, K = 9 points", "bold"
    )
    left, top, height = 10, 66, 34
    for group in range(2):
        start = left + 355 * group
        picture.text(start, top - 10, f"group {group}: 3·K = 27 channels", "small")
        names = ("x₀", "y₀", "x₁", "y₁", "x₂", "…", "x₈", "y₈")
        for number, name in enumerate(names):
            picture.box(start + 27 * number, top, 27, height, "a pale")
            picture.add("rect", "grid", x=start + 27 * number, y=top, width=27, height=height)
            picture.text(start + 27 * number + 13.5, top + 22, name, "small middle")
        for number, name in enumerate(("w₀", "w₁", "…", "w₈")):
            at = start + 216 + 32 * number
            picture.box(at, top, 32, height, "b pale")
            picture.add("rect", "grid", x=at, y=top, width=32, height=height)
            picture.text(at + 16, top + 22, name, "small middle")
        picture.text(start + 108, top + 54, "2·K offsets, in pixels", "small middle")
        picture.text(start + 280, top + 54, "K weights", "small middle")
    picture.add("rect", "grid", x=left + 710, y=top, width=64, height=height)
    picture.text(left + 742, top + 22, "padding", "small middle soft")

    side, top = 30, 150
    for k, (column, row) in enumerate(POINTS):
        x, y = left + (column + 1) * side, top + (row + 1) * side
        picture.box(x, y, side, side, "pixel")
        picture.text(x + side / 2, y + 20, str(k), "middle")
    picture.lines(
        left + 115,
        top + 26,
        [
            "The points of a 3 x 3 kernel are numbered down the columns: point k = i·3 + j",
            "is column i and row j. (xₖ, yₖ) is added to its place in the kernel's grid.",
            "What lies past 3·G·K is ignored; layers pad to a multiple of 8.",
        ],
        "small",
    )
    return picture


def tiles() -> Picture:
    """A tile of outputs as a product of small matrices."""
    picture = Picture(800, 330, "A tile of outputs as a small dense product")
    side, left, top = 20, 10, 44
    picture.text(left, 28, "a window of 16 x 10 input pixels", "bold")
    picture.pixels(left, top, 16, 10, side)
    picture.box(left + 4 * side, top + 3 * side, 8 * side, 4 * side, "b pale")
    x, y = left + 6.5 * side, top + 4.5 * side
    picture.box(x - side / 2, y - side / 2, side, side, "b")
    moved = (-0.4, 0.5), (-1.1, -0.3), (0.3, 1.2), (0.4, -1.3), (0.2, 0.2), (-0.4, 0.9)
    for (column, row), (dx, dy) in zip(
        POINTS, (*moved, (1.2, -0.6), (0.9, 0.3), (0.6, 1.5)), strict=True
    ):
        picture.disc(x + (column + dx) * side, y + (row + dy) * side, 4, "a")
    picture.lines(
        left,
        top + 10 * side + 24,
        [
            "A warp computes the 8 x 4 output pixels in the middle.",
            "The points of one of them are drawn.",
        ],
        "small",
    )

    left = 375
    picture.text(left, 28, "S, transposed", "bold")
    picture.box(left, top, 96, 200, "pixel")
    column = left + 33
    picture.box(column, top, 8, 200, "b pale")
    for at in (58, 62, 70, 78, 82, 90, 98, 102, 110, 118, 122, 130):
        picture.box(column, top + at, 8, 4, "a")
    picture.lines(
        left,
        top + 224,
        [
            "160 positions",
            "x 32 pixels: how",
            "much of a position",
            "a pixel takes",
        ],
        "small",
    )

    picture.text(left + 120, top + 108, "·", "bold")
    picture.text(left + 160, 28, "V", "bold")
    picture.box(left + 160, top, 64, 200, "a pale")
    picture.lines(left + 160, top + 224, ["160 positions", "x D channels", "of the value"], "small")
    picture.text(left + 240, top + 108, "=", "bold")
    picture.text(left + 275, 28, "the tile", "bold")
    picture.box(left + 275, top + 80, 64, 40, "b")
    picture.lines(left + 275, top + 145, ["32 pixels", "x D channels, by", "tensor cores"], "small")
    return picture


def table(words: str) -> list[list[str]]:
    """The rows of cells of the table of benchmarks.md with these words in its first row."""
    page = (HERE / "benchmarks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    _, _, *lines = next(b for b in blocks if words in b.partition("\n")[0]).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def number(cell: str) -> float:
    return float(cell.split()[0])


class Panel(NamedTuple):
    """Numbers on one logarithmic axis."""

    title: str
    unit: str
    numbers: dict[str, dict[str, float]]
    """Of each row, by its words, and of each contestant."""


def dots(title: str, kinds: dict[str, str], panels: Sequence[Panel]) -> Picture:
    """A row for each case, and in it a mark for each contestant: this library's are filled.

    Args:
        title: of the whole picture.
        kinds: of the contestants, by name; "backend" for this library's.
        panels: side by side, with the same rows.
    """
    every = dict.fromkeys(row for panel in panels for row in panel.numbers)
    rows = [row for row in every if any(panel.numbers.get(row) for panel in panels)]
    left, right, gap, high, below = 325, 890, 24, 22, 40
    marks = _marks(kinds)
    legend = _legend(marks, right)
    top = 62 + 20 * (1 + max(line for line, _ in legend.values()))
    picture = Picture(900, top + high * len(rows) + below, title)
    picture.text(10, 24, title, "bold")
    for name, (line, x) in legend.items():
        _mark(picture, x, 46 + 20 * line, marks[name])
        picture.text(x + 10, 50 + 20 * line, name, "small")
    for index, row in enumerate(rows):
        picture.text(left - 14, top + high * (index + 0.5) + 4, row, "small end")
    wide = (right - left - gap * (len(panels) - 1)) / len(panels)
    for place, panel in enumerate(panels):
        start = left + place * (wide + gap)
        _panel(picture, panel, rows, marks, start, wide, top, high)
    return picture


SHAPES = {
    "circle": "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z",
    "square": "M-4.5,-4.5h9v9h-9z",
    "diamond": "M0,-6L6,0L0,6L-6,0z",
    "triangle": "M0,-6L5.5,4H-5.5z",
    "cross": "M-4.5,-4.5L4.5,4.5M-4.5,4.5L4.5,-4.5",
    "plus": "M-5.5,0H5.5M0,-5.5V5.5",
    "wedge": "M0,6L5.5,-4H-5.5z",
    "glass": "M-4.5,-5H4.5L-4.5,5H4.5z",
}


def _marks(kinds: dict[str, str]) -> dict[str, tuple[str, str]]:
    """The shape and the colour of each contestant: this library's filled, the others in outline."""
    shapes = {True: cycle(SHAPES), False: islice(cycle(SHAPES), 2, None)}
    colours = cycle("abc")
    marks = {}
    for name, kind in kinds.items():
        ours = kind == "backend"
        marks[name] = SHAPES[next(shapes[ours])], next(colours) if ours else "line-c thick"
    return marks


def _legend(marks: Iterable[str], right: float) -> dict[str, tuple[int, float]]:
    """The line and the x of each name, so that none leaves the picture."""
    result: dict[str, tuple[int, float]] = {}
    line, x = 0, 16.0
    for name in marks:
        wide = 34 + 7.4 * len(name)
        if x + wide > right:
            line, x = line + 1, 16.0
        result[name] = line, x
        x += wide
    return result


def _mark(picture: Picture, x: float, y: float, mark: tuple[str, str]) -> None:
    path, kind = mark
    picture.add("path", kind, d=path, transform=f"translate({x:.1f},{y:.1f})")


def _panel(
    picture: Picture,
    panel: Panel,
    rows: Sequence[str],
    marks: dict[str, tuple[str, str]],
    left: float,
    wide: float,
    top: float,
    high: float,
) -> None:
    """The axis below, and the marks of every row."""
    ticks = _ticks([value for row in panel.numbers.values() for value in row.values()])

    def place(value: float) -> float:
        """The x of a value, the first tick left and the last one right."""
        return left + 6 + (wide - 12) * log(value / ticks[0]) / log(ticks[-1] / ticks[0])

    bottom = top + high * len(rows)
    picture.text(left + wide / 2, top - 10, panel.title, "small bold middle")
    free, end = left - 12, left + wide + 12  # between the labels of other panels
    for tick in ticks:
        label, x = f"{tick:,g}", place(tick)
        half = 3.5 * len(label)
        picture.line(x, top, x, bottom, "grid")
        if free <= x - half and x + half <= end:
            picture.text(x, bottom + 16, label, "small middle soft")
            free = x + half + 6
    picture.text(left + wide / 2, bottom + 33, panel.unit, "small middle soft")
    for index, row in enumerate(rows):
        y = top + high * (index + 0.5)
        picture.line(left, y, left + wide, y, "grid")
        for name, value in reversed(panel.numbers.get(row, {}).items()):
            _mark(picture, place(value), y, marks[name])


def _ticks(values: Sequence[float]) -> list[float]:
    """1, 2, 5, 10, … around the values; powers of ten alone where these are many."""
    steps = [m * 10.0**e for e in range(-6, 10) for m in (1, 2, 5)]
    first = max(index for index, step in enumerate(steps) if step <= min(values))
    last = min(index for index, step in enumerate(steps) if step > max(values))
    if last - first > 5:
        first, last = first - first % 3, last + -last % 3
        return steps[first : last + 1 : 3]
    return steps[first : last + 1]


def of_results(folder: Path) -> dict[str, Picture]:
    """The plots of every run in a folder: of operators, layers and models."""
    result = {}
    for file in sorted(folder.glob("*.json")):
        environment, rows = report.load(str(file))
        for story in report.stories(rows):
            title = f"{story.name.capitalize()} on {environment['device']}: less is better"
            result[f"{file.stem}-{story.name}.svg"] = dots(title, story.contestants, _panels(story))
    return result


def _panels(story: Story) -> list[Panel]:
    """Time in both directions, and memory."""

    def numbers(direction: str, of: Callable[[Row], float | None]) -> dict[str, dict[str, float]]:
        return {
            words: {
                name: value
                for name in story.contestants
                if (row := story.rows.get((case, direction, name))) and (value := of(row))
            }
            for case, words in story.cases.items()
        }

    def time(row: Row) -> float | None:
        return row.ratio if story.name == "operators" else row.median and row.median / 1e3

    unit = "times the floor" if story.name == "operators" else "ms"
    panels = [Panel(d.replace("+", " and "), unit, numbers(d, time)) for d in story.directions]
    memory = numbers(story.step, lambda row: row.memory and row.memory / 1e6)
    panels.append(Panel("memory", "MB", memory))
    return [panel for panel in panels if any(panel.numbers.values())]


def against_convolutions() -> Picture:
    """Times and memory of layers on the GPU, of two versions and of ordinary convolutions."""
    kinds = {"DCNv4, dcnv4 0.2": "backend", "DCNv4, dcnv4 0.1": "backend"}
    kinds |= dict.fromkeys(("1 x 1, depthwise, 1 x 1", "3 x 3"), "yardstick")
    panels = []
    for title, unit in (("forward", "µs"), ("forward and backward", "µs"), ("peak memory", "MiB")):
        rows = table(f"`DCNv4`, {title}, {unit}")
        numbers = {}
        for case, old, new, *others in rows:
            timed = zip(kinds, (new, old, *others), strict=False)
            numbers[case.replace("`", "")] = {n: number(c) for n, c in timed if c != "-"}
        panels.append(Panel(title, unit, numbers))
    return dots("Layers on an NVIDIA H100, float16 autocast: less is better", kinds, panels)


def against_spread() -> Picture:
    """Times of direct kernels and of what a call takes by default, over the spread of offsets."""
    rows = table("forward: direct")
    case = "64 x 56 x 56, 4 x 16, float16"
    times = {
        float(row[0].partition("spread ")[2] or 0.5): [number(cell) for cell in row[1:]]
        for row in rows
        if re.fullmatch(rf"{case}(, spread [\d.]+)?", row[0])
    }
    picture = Picture(800, 330, "Time against the spread of offsets")
    picture.text(10, 24, f"{case} on an NVIDIA H100, µs", "bold")
    for place, (name, kind) in enumerate(
        zip(("direct kernels", "default", "floor"), "cab", strict=True)
    ):
        picture.box(10 + 130 * place, 38, 12, 12, kind)
        picture.text(28 + 130 * place, 49, name, "small")
    for panel, direction in enumerate(("forward", "backward")):
        columns = {spread: row[3 * panel : 3 * panel + 3] for spread, row in sorted(times.items())}
        _curves(picture, 45 + 400 * panel, direction, columns)
    return picture


def _curves(picture: Picture, left: float, title: str, times: dict[float, list[float]]) -> None:
    """Two curves over the spread, and the floor: of direct, default, default as floors."""
    bottom, wide, high = 280, 320, 190
    first, last = log2(min(times)), log2(max(times))
    most = 40 * ceil(max(max(row[:2]) for row in times.values()) / 40)
    places = {spread: left + wide * (log2(spread) - first) / (last - first) for spread in times}
    picture.text(left, bottom - high - 14, title, "small bold")
    for part in range(5):
        y = bottom - high * part / 4
        picture.line(left, y, left + wide, y, "grid")
        picture.text(left - 6, y + 4, f"{most * part // 4}", "small end soft")
    _, default, floors = times[min(times)]
    floor = bottom - high * default / floors / most
    picture.line(left, floor, left + wide, floor, "line-b")
    for series, kind in enumerate("ca"):
        at = [(x, bottom - high * times[spread][series] / most) for spread, x in places.items()]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        picture.add("polyline", f"line-{kind}", points=path)
        for x, y in at:
            picture.disc(x, y, 4, kind)
    for spread, x in places.items():
        picture.text(x, bottom + 18, f"{spread:g}", "small middle soft")
    picture.text(left + wide / 2, bottom + 38, "spread of the offsets, pixels", "small middle soft")


def pictures() -> dict[str, Picture]:
    """Every picture by the name of its file."""
    return {
        "operator.svg": operator(),
        "attention.svg": attention(),
        "offset_mask.svg": layout(),
        "tiles.svg": tiles(),
        "h100-layers.svg": against_convolutions(),
        **of_results(RESULTS),
        "spread.svg": against_spread(),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "images"
    for name, picture in pictures().items():
        (folder / name).write_text(str(picture), encoding="utf-8")
