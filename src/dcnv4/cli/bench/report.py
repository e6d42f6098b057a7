"""How results are kept and shown: rows, the table, JSON, the comparison of two runs, the plot."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from itertools import cycle, groupby
from typing import Any

from .. import LETTERS
from . import cases

SCHEMA = 1
"""Of the JSON: {"schema", "environment": {name: text}, "rows": [Row as an object]}."""


@dataclass
class Row:
    """One contestant in one case and direction. Times are in µs; None: not measured."""

    case: str
    note: str
    direction: str
    contestant: str
    kind: str
    floor: float | None = None
    """The time to copy as many bytes as the inputs and results have."""
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    least: float | None = None
    """The fastest: what a machine busy with other things disturbs least."""
    memory: int | None = None
    """Bytes held at most during the call beyond those held before."""
    host: float | None = None
    """The time to issue the call."""
    error: float | None = None
    """Relative L2 error, the worst of what was checked."""
    problem: str | None = None
    """Why there is no time."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.case, self.direction, self.contestant

    @property
    def ratio(self) -> float | None:
        """The median as a multiple of the floor."""
        return self.median / self.floor if self.median and self.floor else None


STORIES = {
    "operators": ("deform_conv", "ms_deform_attn"),
    "layers": ("layer", "attention layer"),
    "models": ("model",),
}
"""What a table or a plot tells, and the operators of its cases."""


@dataclass(frozen=True)
class Story:
    """The rows that stand in one table or plot."""

    name: str
    cases: dict[str, str]
    """Their words by their names."""
    directions: tuple[str, str]
    contestants: dict[str, str]
    """Their kinds by their names; those with a time."""
    rows: dict[tuple[str, str, str], Row]

    @property
    def step(self) -> str:
        """The direction whose memory counts: both, or the backward where both were not run."""
        return max((direction for _, direction, _ in self.rows), key=len)


def stories(rows: Iterable[Row]) -> list[Story]:
    """The rows of operators, of layers and of models; what a call on next to nothing costs is in
    none."""
    known = {case.name: case for case in (*cases.CUDA, *cases.CPU) if case not in cases.TINY}
    found = []
    for name, operators in STORIES.items():
        own = {r.key: r for r in rows if r.case in known and known[r.case].op in operators}
        timed = [row for row in own.values() if row.median is not None]
        backward = "backward" if name == "operators" else "forward+backward"
        if timed:
            words = {row.case: known[row.case].words for row in timed}
            contestants = {row.contestant: row.kind for row in timed}
            found.append(Story(name, words, ("forward", backward), contestants, own))
    return found


def best_peer(rows: Iterable[Row]) -> float | None:
    """The median of the fastest peer among the rows of one case and direction."""
    return min((r.median for r in rows if r.kind == "peer" and r.median), default=None)


def header(environment: dict[str, str]) -> str:
    return "\n".join(f"{key:<12}{text}" for key, text in environment.items())


def table(rows: Sequence[Row]) -> str:
    """The rows of one case and direction."""
    first, best = rows[0], best_peer(rows)
    title = [first.case, first.direction, *([first.note] if first.note else [])]
    if first.floor:
        title.append(f"floor {figures(first.floor)} µs")
    if len({row.problem for row in rows}) == 1 and first.problem:
        return f"{'  '.join(title)}\n  {first.problem}"
    names = max(24, *(len(row.contestant) + 2 for row in rows))
    lines = [
        "  ".join(title),
        f"  {'':<{names}}{'median µs':>10}{'p20-p80':>18}{'min':>9}{'x floor':>9}{'vs peer':>9}"
        f"{'memory MB':>11}{'host µs':>9}{'error':>9}",
    ]
    for row in rows:
        label = f"{row.contestant} ~" if row.kind == "yardstick" else row.contestant
        if row.median is None:
            lines.append(f"  {label:<{names}}{row.problem}")
            continue
        spread = f"{figures(row.p20)}-{figures(row.p80)}"
        versus = f"{best / row.median:.2f}" if best and row.kind != "yardstick" else "-"
        memory = "-" if row.memory is None else f"{row.memory / 1e6:.1f}"
        error = "-" if row.error is None else f"{row.error:.0e}"
        lines.append(
            f"  {label:<{names}}{figures(row.median):>10}{spread:>18}{figures(row.least):>9}"
            f"{figures(row.ratio):>9}{versus:>9}{memory:>11}{figures(row.host):>9}{error:>9}"
        )
    return "\n".join(lines)


def figures(number: float | None) -> str:
    """Three significant figures, never in exponents."""
    if number is None:
        return "-"
    digits = 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:.{digits}f}"


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of one case and direction together, in order."""
    return [list(group) for _, group in groupby(rows, lambda row: (row.case, row.direction))]


def save(path: str, environment: dict[str, str], rows: Sequence[Row]) -> None:
    """Write the JSON; a reader never meets half a file."""
    document = {"schema": SCHEMA, "environment": environment, "rows": [asdict(r) for r in rows]}
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1, ensure_ascii=False)
    os.replace(temporary, path)


def load(path: str) -> tuple[dict[str, str], list[Row]]:
    """Environment and rows of a saved run."""
    with open(path, encoding="utf-8") as file:
        try:
            document = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} must be a benchmark's JSON; {error}") from error
    version = document.get("schema") if isinstance(document, dict) else None
    if version != SCHEMA:
        raise ValueError(f"{path} must be a benchmark's JSON of schema {SCHEMA}; got {version}")
    known = {field.name for field in fields(Row)}
    return document["environment"], [
        Row(**{key: value for key, value in row.items() if key in known})
        for row in document["rows"]
    ]


def resumed(
    kept: tuple[dict[str, str], list[Row]], environment: dict[str, str], names: set[str]
) -> tuple[dict[str, str], list[Row], set[str]]:
    """What a run that goes on in this environment begins with: its rows but for those of the cases
    that run again, which are the ones of these names that were not finished, or are new.

    Raises:
        ValueError: it was another device's, or other versions'.
    """
    old, rows = kept
    for name in "device", "versions":
        if old[name] != environment[name]:
            raise ValueError(
                f"--resume must go on with a run of the same {name}, {environment[name]}; "
                f"got one of {old[name]}"
            )
    left = {row.case for row in rows if (row.problem or "").startswith("not run")}
    again = names - ({row.case for row in rows} - left)
    commands = old["command"], environment["command"]
    rows = [row for row in rows if row.case not in again]
    return {**old, "command": "\n".join(commands)}, rows, again


def compare(
    old: tuple[dict[str, str], Sequence[Row]], new: tuple[dict[str, str], Sequence[Row]]
) -> str:
    """What changed: each row's time relative to its own run's floor, new over old."""
    before = {row.key: row for row in old[1]}
    lines, ratios = [], []
    for row in new[1]:
        was = before.pop(row.key, None)
        if was is None:
            continue
        label = f"{row.case}  {row.direction}  {row.contestant}"
        if (was.median is None) != (row.median is None):
            lines.append(f"  {label}: {_state(was)} -> {_state(row)}")
            continue
        then, now = was.ratio or was.median, row.ratio or row.median
        if then is None or now is None:
            continue
        ratios.append(now / then)
        lines.append(f"  {now / then:6.2f}  {_verdict(was, row, now / then):<8}{label}")
    heading = "new / old time, each relative to its own run's floor"
    for what in ("device", "copy"):
        if old[0].get(what) != new[0].get(what):
            heading += f"\n  {what}: {old[0].get(what)} -> {new[0].get(what)}"
    summary = "nothing in common"
    if ratios:
        middle = sorted(ratios)[len(ratios) // 2]
        summary = f"{len(ratios)} rows in common, median ratio {middle:.2f}"
    return "\n".join((heading, *lines, f"  {summary}; {len(before)} rows of the old run not run"))


def _state(row: Row) -> str:
    return row.problem or f"{figures(row.median)} µs"


def _verdict(was: Row, now: Row, ratio: float) -> str:
    """Faster or slower where the spreads, put on one scale, lie apart."""
    limits: Any = (was.p20, was.p80, now.p20, now.p80, was.median, now.median)
    p20, p80, new_p20, new_p80, then, new = limits
    if ratio * new_p80 / new < p20 / then:
        return "faster"
    return "slower" if ratio * new_p20 / new > p80 / then else ""


_PLOTTED = 6
"""Cases that a plot has room for."""


def check_plot(path: str) -> None:
    """Raise where there is nothing to plot with, or no such kind of picture."""
    try:
        figure = import_module("matplotlib.figure").Figure()
    except ImportError as error:
        raise RuntimeError(
            f"--plot needs matplotlib (pip install matplotlib); got {error}"
        ) from None
    kinds = figure.canvas.get_supported_filetypes()
    if os.path.splitext(path)[1][1:].lower() not in kinds:
        raise ValueError(f"--plot must end in one of .{', .'.join(sorted(kinds))}; got {path}")


def plot(path: str, environment: dict[str, str], rows: Sequence[Row]) -> int:
    """Draw times relative to the floor as bars: forwards left, backwards right, a case a line.

    A case without a backward alone shows its forward and backward together.

    Returns:
        How many of the rows' cases were left out for want of room.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    by_case: dict[str, dict[str, list[Row]]] = {}
    for group in groups(row for row in rows if row.ratio is not None):
        by_case.setdefault(group[0].case, {})[group[0].direction] = _contestants(group)
    if not by_case:
        raise RuntimeError("--plot needs a row with a time and a floor; got none")
    shown = list(by_case.values())[:_PLOTTED]
    heights = [max(map(len, directions.values())) + 1.1 for directions in shown]
    panels = [
        [directions.get("forward", []) for directions in shown],
        [
            directions.get("backward") or directions.get("forward+backward", [])
            for directions in shown
        ],
    ]
    styles = _styles([row for panel in panels for group in panel for row in group])
    with rc_context(LETTERS):
        figure = Figure(figsize=(13, 2 + 0.22 * sum(heights)), layout="constrained")
        figure.suptitle(
            f"DCNv4 on {environment.get('device', 'this machine')}: time over that of a copy "
            "of the same bytes",
            fontsize=15,
            fontweight="bold",
        )
        axes = figure.subplots(1, 2, sharey=True)
        for axis, panel, title in zip(axes, panels, ("forward", "backward"), strict=True):
            _draw(axis, panel, heights, styles)
            axis.set_title(title, fontsize=13)
        _label(axes[0], shown, heights)
        figure.legend(
            handles=[Patch(label=name, **style) for name, style in styles.items()],
            loc="outside lower center",
            ncols=min(6, len(styles)),
            frameon=False,
            fontsize=11,
        )
        figure.savefig(path, dpi=150, transparent=True)
    return len(by_case) - len(shown)


_OURS = {"cuda": "#0b7a53", "cpu": "#0b7a53", "triton": "#55b98f", "reference": "#b5dfca"}
_PEERS = ("#5b6c8f", "#c08552", "#8e6aa8", "#c9a13b", "#a34a5c", "#6f9bb8")
_HATCHES = ("", "////", "....", "xxxx")


def _contestants(group: Sequence[Row]) -> list[Row]:
    """The fastest first; the reference only where it is all there is of this library."""
    ours = {row.contestant for row in group if row.kind == "backend"}
    left_out = "dcnv4 reference" if len(ours) > 1 else None
    return sorted((r for r in group if r.contestant != left_out), key=lambda row: row.ratio or 0)


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """What a contestant's bars look like, as matplotlib names it: greens for this library, hatched
    greys for yardsticks, other hues for peers."""

    def names(kind: str) -> dict[str, None]:
        return dict.fromkeys(row.contestant for row in rows if row.kind == kind)

    grey = {"facecolor": "#c4c6cb", "edgecolor": "#55585f"}
    yardsticks = zip(names("yardstick"), cycle(_HATCHES), strict=False)
    return {
        **{name: {"facecolor": _OURS[name.removeprefix("dcnv4 ")]} for name in names("backend")},
        **{n: {"facecolor": c} for n, c in zip(names("peer"), cycle(_PEERS), strict=False)},
        **{name: {**grey, "hatch": hatch} for name, hatch in yardsticks},
    }


def _draw(
    axis: Any,
    panel: Sequence[Sequence[Row]],
    heights: Sequence[float],
    styles: dict[str, dict[str, Any]],
) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    ratios = [row.ratio or 1 for group in panel for row in group] or [1]
    axis.set_xscale("log")
    axis.set_xlim(min(1, *ratios) * 0.8, max(ratios) * 1.8)
    top = 0.0
    for group, height in zip(panel, heights, strict=True):
        for at, row in enumerate(group):
            ratio = row.ratio or 1
            weight = "bold" if row.kind == "backend" else "normal"
            axis.barh(top + at, ratio, 0.84, **styles[row.contestant])
            axis.annotate(
                f" {figures(ratio)}", (ratio, top + at), va="center", fontsize=9, weight=weight
            )
        top += height
    axis.set_ylim(top - 0.5, -0.8)
    axis.axvline(1, color=LETTERS["text.color"], linewidth=1)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("times the floor; shorter is better", fontsize=10)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.3, linewidth=0.8)
    axis.set_axisbelow(True)


def _label(axis: Any, shown: Sequence[dict[str, list[Row]]], heights: Sequence[float]) -> None:
    """Name the cases beside their bars."""
    ticks, labels, top = [], [], 0.0
    for directions, height in zip(shown, heights, strict=True):
        row = next(iter(directions.values()))[0]
        both = "" if "backward" in directions else "right: forward and backward"
        ticks.append(top + (height - 2.1) / 2)
        labels.append("\n".join(line for line in (row.case, row.note, both) if line))
        top += height
    axis.set_yticks(ticks, labels, fontsize=9)
