"""The benchmark, end to end on the CPU: what it finds, shows, saves and compares."""

from __future__ import annotations

import argparse
import json
import math
import platform
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

import dcnv4
from dcnv4.cli import bench
from dcnv4.cli.bench import cases, measure, peers, report
from dcnv4.cli.bench.report import Row

CPU = torch.device("cpu")
SMALL = (
    cases.Conv(2, 5, 6, 2, 3, note="a small map", quick=True),
    cases.Attention(1, ((5, 6), (3, 3)), heads=2, depth=4, points=2),
    cases.ConvLayer(1, 4, 5, 16),
    cases.AttentionLayer(1, ((5, 6), (3, 3)), 4, channels=8, heads=2, points=2),
    *cases.TINY,
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "CPU", SMALL)
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e10)


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(["--device", "cpu", "--budget", "0.002", *words]))


def rows_of(path: Path) -> dict[tuple[str, str, str], Row]:
    return {row.key: row for row in report.load(str(path))[1]}


def enter(monkeypatch: pytest.MonkeyPatch, name: str, make: object) -> None:
    contestant = peers.Contestant(name, "deform_conv", "peer", make)  # type: ignore[arg-type]
    monkeypatch.setattr(peers, "CONTESTANTS", [*peers.CONTESTANTS, contestant])
    monkeypatch.setattr(bench, "CONTESTANTS", peers.CONTESTANTS)


def test_every_case_and_direction_is_timed_and_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    assert run("--backends", "reference", "--peers", "grid,conv", "--json", str(file)) == 0
    rows = rows_of(file)
    conv, attention, *others = (case.name for case in SMALL)
    layers, tiny = others[:2], others[2:]
    operator = ("forward", "backward", "forward+backward")
    expected = {(case, d) for case in (conv, attention) for d in operator}
    expected |= {(layer, d) for layer in layers for d in ("forward", "forward+backward")}
    modes = "eager, no grad", "eager, grad", "eager, forward+backward", "compiled, no grad"
    expected |= {(case, mode) for case in tiny for mode in modes}
    assert {key[:2] for key in rows} == expected
    for row in rows.values():
        if row.direction.startswith("compiled") and (row.problem or "").startswith("cannot: needs"):
            assert tuple(map(int, torch.__version__.split(".")[:2])) < (2, 4)
            continue
        assert row.problem is None, row
        assert row.least is not None
        assert 0 < row.least <= row.p20 <= row.median <= row.p80
        assert (row.error is None) == (row.kind == "yardstick"), row
        assert row.error is None or row.error < (4e-2 if "bf16" in row.case else 1e-5)
    for name in ("dcnv4 reference", "grid_sample"):
        assert rows[conv, "backward", name].floor == pytest.approx(
            1e6 * 4 * (2 * (60 * 6 + 60 * 56) + 60 * 6) / 1e10
        )
    printed = capsys.readouterr().out
    assert f"{conv}  forward  a small map" in printed
    assert "depthwise conv2d ~" in printed


def test_a_run_says_on_which_device_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(case: cases.Conv, inputs: tuple[torch.Tensor, ...]) -> peers.Job:
        raise NotImplementedError

    peer = peers.Contestant("peer", "deform_conv", "peer", make, "pytest")  # type: ignore[arg-type]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    environment = bench._environment(CPU, 1e10, [peer], {})
    assert environment["versions"].startswith(
        f"dcnv4 {dcnv4.__version__}, torch {torch.__version__}"
    )
    assert environment["versions"].endswith(f", pytest {pytest.__version__}")
    assert environment["device"] == f"{bench.processor()}, 2 threads"
    monkeypatch.setattr("builtins.open", mock.Mock(side_effect=FileNotFoundError))
    assert bench.processor() == f"{platform.machine()} CPU"


def distorted(where: str) -> object:
    """A contestant whose output or whose gradient of offset_mask is wrong."""

    def make(case: cases.Conv, inputs: tuple[torch.Tensor, ...]) -> peers.Job:
        right = case.operator("reference")

        def call(value: torch.Tensor, offset_mask: torch.Tensor) -> torch.Tensor:
            if where == "output":
                return right(value, offset_mask) + 0.01
            return right(value, offset_mask.detach()) + 0 * offset_mask.sum()

        return peers.Job(inputs, call)

    return make


def test_a_wrong_peer_gets_no_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(monkeypatch, "wrong output", distorted("output"))
    enter(monkeypatch, "wrong gradient", distorted("gradient"))
    file = tmp_path / "run.json"
    words = ("--cases", SMALL[0].name, "--backends", "reference", "--peers", "wrong*")
    assert run(*words, "--json", str(file)) == 0, "no failure of this library"
    rows = rows_of(file)
    forward, backward = ((SMALL[0].name, d) for d in ("forward", "backward"))
    assert rows[(*forward, "wrong gradient")].median is not None
    assert rows[(*backward, "wrong output")].median is not None
    for key in ((*forward, "wrong output"), (*backward, "wrong gradient")):
        assert rows[key].median is None
        assert (rows[key].problem or "").startswith("WRONG: relative error")
    assert capsys.readouterr().out.count("WRONG") == 3  # and the latter's forward+backward


def test_a_wrong_backend_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench,
        "CONTESTANTS",
        [
            replace(c, make=distorted("output")) if c.op == "deform_conv" else c
            for c in peers.CONTESTANTS
        ],
    )
    words = ("--cases", SMALL[0].name, "--backends", "reference", "--peers", "none")
    assert run(*words) == 1


def test_what_fails_says_why_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(case: cases.Conv, inputs: tuple[torch.Tensor, ...]) -> peers.Job:
        raise NotImplementedError("no kernel\nand a long story")

    enter(monkeypatch, "broken", make)
    absent = peers.Contestant("absent", "deform_conv", "peer", make, "no_such_module")  # type: ignore[arg-type]
    monkeypatch.setattr(bench, "CONTESTANTS", [absent, *bench.CONTESTANTS])
    file = tmp_path / "run.json"
    words = ("--cases", SMALL[0].name, "--peers", "broken,absent,grid*", "--backends", "reference")
    assert run(*words, "--json", str(file)) == 0
    rows = rows_of(file)
    assert rows[SMALL[0].name, "forward", "broken"].problem == (
        "failed: NotImplementedError: no kernel"
    )
    assert rows[SMALL[0].name, "forward", "grid_sample"].median is not None
    assert "no_such_module: not installed" in capsys.readouterr().out


def test_the_time_limit_leaves_out_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    assert run("--limit", "1e-9", "--backends", "reference", "--json", str(file)) == 0
    assert {row.problem for row in rows_of(file).values()} == {"not run: over --limit"}


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole cases stay as they are, the others run; on the same machine alone."""
    file = str(tmp_path / "run.json")
    words = "--backends", "reference", "--peers", "none", "--json", file
    assert run(*words) == 0
    environment, rows = report.load(file)
    problems = {row.key: row.problem for row in rows}
    first, second = list(dict.fromkeys(row.case for row in rows))[:2]
    for row in rows:
        row.median = 7.0
        if (row.case, row.direction) == (second, "backward"):
            row.median, row.problem = None, "not run: over --limit"
    report.save(file, environment, rows)
    assert run(*words, "--resume", "--cases", first) == 0
    assert list(rows_of(file).values()) == rows  # nothing is lost
    report.save(file, environment, rows)
    assert run(*words, "--resume") == 0
    found = rows_of(file)
    assert set(found) == {row.key for row in rows}
    for row in found.values():
        assert row.problem == problems[row.key]
        assert (row.median == 7.0) is (row.case != second), row.key
    assert found[first, "forward", "dcnv4 reference"].median == 7.0
    lines = report.load(file)[0]["command"].splitlines()
    assert lines[0] == environment["command"]
    assert len(lines) == 2
    for words, message in (
        (("--resume",), "--resume must come with --json"),
        (("--resume", "--json", str(tmp_path / "none.json")), "No such file"),
    ):
        assert run(*words) == 2
        assert message in capsys.readouterr().err
    report.save(file, {**environment, "device": "an abacus"}, rows)
    assert run("--resume", "--json", file) == 2
    assert "got one of an abacus" in capsys.readouterr().err


ROWS = [
    Row("a", "", "forward", "dcnv4 cpu", "backend", 10.0, 40.0, 39.0, 41.0, 38.0, 5, None, 1e-7),
    Row("a", "", "forward", "other", "peer", 10.0, 60.0, 50.0, 70.0, 50.0),
    Row("b", "note", "backward", "dcnv4 cpu", "backend", 10.0, 30.0, 29.0, 31.0, 28.0),
    Row("b", "note", "backward", "other", "peer", 10.0, problem="cannot: reads tea leaves"),
]


def test_json_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    report.save(str(file), {"device": "here"}, ROWS)
    assert report.load(str(file)) == ({"device": "here"}, ROWS)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    document = json.loads(file.read_text(encoding="utf-8"))
    assert set(document) == {"schema", "environment", "rows"}
    assert document["rows"][3]["problem"] == "cannot: reads tea leaves"
    document["schema"] = 99
    file.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ValueError, match=r"schema 1; got 99"):
        report.load(str(file))


def test_table_shows_speed_over_the_best_peer() -> None:
    text = report.table(ROWS[:2])
    assert "floor 10.0 µs" in text
    ours, other = text.splitlines()[2:]
    assert ours.split() == [
        *("dcnv4", "cpu", "40.0", "39.0-41.0", "38.0", "4.00", "1.50", "0.0", "-", "1e-07"),
    ]
    assert other.split()[4:6] == ["6.00", "1.00"]
    assert "cannot: reads tea leaves" in report.table(ROWS[2:])
    assert report.table(ROWS[3:]).splitlines()[1:] == ["  cannot: reads tea leaves"]


def test_compare_is_relative_to_each_runs_floor() -> None:
    faster = replace(ROWS[0], median=20.0, p20=19.0, p80=21.0)
    # Half the bandwidth and twice the time: the same.
    same = replace(ROWS[2], floor=20.0, median=60.0, p20=58.0, p80=62.0)
    mended = replace(ROWS[3], problem=None, median=5.0, p20=5.0, p80=5.0)
    text = report.compare(({"device": "x"}, ROWS), ({"device": "y"}, [faster, same, mended]))
    lines = [line.split() for line in text.splitlines()]
    assert ["device:", "x", "->", "y"] in lines
    assert ["0.50", "faster", "a", "forward", "dcnv4", "cpu"] in lines
    assert ["1.00", "b", "backward", "dcnv4", "cpu"] in lines
    assert "b  backward  other: cannot: reads tea leaves -> 5.00 µs" in text
    assert "2 rows in common" in text
    assert "1 rows of the old run not run" in text


def test_compare_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "old.json")
    words = ("--cases", SMALL[0].name, "--backends", "reference", "--peers", "none")
    assert run(*words, "--json", file) == 0
    assert run(*words, "--compare", file) == 0
    assert "3 rows in common" in capsys.readouterr().out


def test_plot_draws_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    file = tmp_path / "plot.png"
    assert report.plot(str(file), {"device": "here"}, ROWS) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    many = [replace(ROWS[0], case=f"case {i}") for i in range(9)]
    assert report.plot(str(file), {}, many) == 3
    with pytest.raises(RuntimeError, match="--plot needs a row"):
        report.plot(str(file), {}, ROWS[3:])


def test_impossible_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (
            ("--cases", "nothing-like-it"),
            "--cases must match a case of --list; got nothing-like-it",
        ),
        (("--backends", "reference,abacus"), "--backends must be of cuda, triton, cpu, reference"),
        (("--backends", "reference,cuda"), "--backends must run here; got cuda, which needs "),
        (("--compare", str(tmp_path / "none.json")), "No such file"),
        (("--compare", __file__), f"{__file__} must be a benchmark's JSON; "),
        (("--json", str(tmp_path)), f"must be files in a folder that exists; got {tmp_path}"),
        (("--json", str(tmp_path / "none" / "x.json")), "must be files in a folder that exists"),
        (("--device", "abacus"), "--device must be cuda or cpu; got abacus"),
        (("--peers", "grid,nosuch"), ", or be none; got nosuch"),
    ):
        assert run(*words) == 2
        assert message in capsys.readouterr().err


def test_a_plot_that_cannot_be_drawn_is_refused_before_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    assert run("--plot", "foo.txt") == 2
    said = capsys.readouterr()
    assert ".svg" in said.err
    assert said.err.strip().endswith("; got foo.txt")
    assert said.out == ""


@pytest.mark.parametrize("option", ["--budget", "--limit"])
@pytest.mark.parametrize("given", ["-1", "0", "nan", "soon"])
def test_seconds_are_positive(option: str, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(option, given)
    assert f"argument {option}: must be a number > 0; got {given}" in capsys.readouterr().err


def test_cases_are_chosen_by_name_word_or_glob(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    name = "conv-1x56x56x4x16-fp32"
    assert [c.name for c in cases.choose(CPU, [name], False)] == [name]
    spread = {c.name for c in cases.choose(CPU, ["spread", "*-k5"], False)}
    assert spread == {f"{name}-spread2", f"{name}-spread8", f"{name}-k5"}
    assert all(c.quick for c in cases.choose(CPU, [], True))
    assert [c.name for c in cases.choose(CPU, [f"{name}-k5"], True)] == [f"{name}-k5"]
    assert run("--list") == 0
    assert "grid_sample" in capsys.readouterr().out
    for device in (cases.CPU, cases.CUDA):
        names = [c.name for c in device]
        assert len(names) == len(set(names)), "names are what results are filed under"


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_inputs_are_the_same_in_every_run(case: cases.Case) -> None:
    for first, second in zip(case.inputs(CPU), case.inputs(CPU), strict=True):
        assert torch.equal(first, second)


def test_points_keep_away_from_pixel_centres() -> None:
    moved = cases.between_pixels(torch.tensor([-1.0, -0.01, 0.0, 0.5, 2.999]))
    apart = (moved - moved.round()).abs()
    assert apart.min() >= 1 / 16 - 1e-6
    assert moved.floor().tolist() == [-1, -1, 0, 0, 2]
    assert math.isclose(moved[3].item(), 0.5)
