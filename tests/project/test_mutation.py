"""The command that tries mutants, on a project of a few lines."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mutation import __main__ as command
from mutation import codes, compiler, draw, mutants, report, run, selections
from mutation.mutants import Mutant, context
from mutation.selections import Stage

FILE = "src/small.py"
SOURCE = '''"""A module."""


def larger(a: int, b: int) -> int:
    """The larger one."""
    return a if a > b else b


TEXT = "int a;  // one"


def count(n):
    total = 0
    while total < n:
        total += 1
    return total
'''
TESTS = """
from small import count, larger


def test_larger():
    assert larger(1, 2) == 2


def test_count():
    assert count(3) == 3
"""


def change(original: str, mutated: str) -> Mutant:
    """One place of the small module."""
    lines = SOURCE.split("\n")
    (place,) = (i for i, line in enumerate(lines) if original in line)
    changed = lines[place].replace(original, mutated)
    return Mutant(FILE, place + 1, lines[place], changed, context(lines, place))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tree = tmp_path / "root"
    for name, text in ((FILE, SOURCE), ("tests/test_small.py", TESTS), ("pyproject.toml", "")):
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    package = Path(run.__file__).parent
    shutil.copytree(package, tree / "tests/mutation", ignore=shutil.ignore_patterns("*.jsonl"))
    return tree


def bench(root: Path, seconds: float = 300.0, patience: float = 60.0) -> run.Bench:
    stage = Stage(("tests/test_small.py",), ())
    deadline = time.monotonic() + seconds
    return run.Bench(root, root.parent / "bench", patience, deadline, lambda mutant: (stage,))


def results(where: run.Bench, tried: Sequence[Mutant]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    run.run(where, tried, found.append)
    return found


def test_a_mutant_finds_its_line_again(root: Path) -> None:
    mutant = change("a > b", "a < b")
    path = root / FILE
    path.write_text("import os\n\n" + SOURCE)
    with mutant.applied(root):
        assert path.read_text() == "import os\n\n" + SOURCE.replace("a > b", "a < b")
    assert path.read_text() == "import os\n\n" + SOURCE
    path.write_text(SOURCE.replace("The larger one", "The smaller one"))
    stale = pytest.raises(mutants.StaleError, match=r"small\.py must have the line")
    with stale, mutant.applied(root):
        pass


def test_what_is_kept_is_what_was_drawn(tmp_path: Path) -> None:
    drawn = [change("total < n", "total <= n"), change("a > b", "a < b\nbreak")]
    mutants.save_mutants(drawn, tmp_path / "list")
    assert mutants.load_mutants(tmp_path / "list") == drawn[::-1]
    with (tmp_path / "list").open("a") as file:
        file.write('{"file": "cut o')
    assert len(mutants.load_mutants(tmp_path / "list")) == 2


def test_results(root: Path) -> None:
    noticed, kept = change("a > b", "a < b"), change("total < n", "total != n")
    found = {entry["key"]: entry for entry in results(bench(root), [noticed, kept])}
    assert found[noticed.key]["result"] == "killed"
    assert found[noticed.key]["test"] == "tests/test_small.py::test_larger"
    assert found[kept.key]["result"] == "survived"
    gone = Mutant(FILE, 1, "no such line", "", "")
    (entry,) = results(bench(root), [gone])
    assert (entry["key"], entry["result"]) == (gone.key, "stale")
    assert (root / FILE).read_text() == SOURCE


@pytest.mark.exhaustive
def test_a_mutant_that_never_ends(root: Path) -> None:
    (entry,) = results(bench(root, patience=5), [change("total += 1", "total += 0")])
    assert entry["result"] == "timeout"
    assert entry["test"] == "tests/test_small.py::test_count"


def test_an_import_that_fails_does_not_count(root: Path) -> None:
    (entry,) = results(bench(root), [change("a: int", "a: int = larger")])
    assert entry["result"] == "uncompiled"


@pytest.mark.exhaustive
def test_a_test_that_fails_anyway_notices_nothing(root: Path) -> None:
    path = root / "tests/test_small.py"
    path.write_text("def test_fails():\n    assert False\n" + TESTS)
    where = bench(root)
    (entry,) = results(where, [change("a > b", "a < b")])
    assert entry["result"] == "killed"
    assert entry["test"] == "tests/test_small.py::test_larger"
    assert where.failing == ["tests/test_small.py::test_fails"]
    path.write_text("import nothing_of_this_name\n")
    with pytest.raises(RuntimeError, match="must pass as it is"):
        results(bench(root), [change("a > b", "a < b")])


def test_the_budget_ends_a_run(root: Path) -> None:
    began = time.monotonic()
    tried = [change("total += 1", "total += 0"), change("a > b", "a < b")]
    found: list[dict[str, Any]] = []
    assert run.run(bench(root, seconds=3), tried, found.append) == 2
    assert found == []
    assert time.monotonic() - began < 20


@pytest.mark.exhaustive
def test_a_test_that_is_gone(root: Path) -> None:
    stage = Stage(("tests/test_small.py",), ())
    where = bench(root)
    tree = where.tree("0")
    assert where.run_stage(tree, stage.alone("tests/test_small.py::test_gone")).passed
    assert where.run_stage(tree, stage.alone("tests/test_small.py::test_count")).passed
    nothing = ("tests/test_small.py", "-k", "nothing")
    assert where.run_stage(tree, stage._replace(arguments=nothing, may_be_gone=True)).passed
    assert not where.run_stage(tree, stage._replace(arguments=nothing)).passed
    gone = stage._replace(arguments=("tests/test_small.py::test_gone",))
    assert not where.run_stage(tree, gone).passed


def test_the_draw(root: Path) -> None:
    """Every line as likely as another; of a line, a mutant that says something else."""
    lines = [
        [change("a > b", "a < b"), change("a > b", "a > (b)")],
        [change("total = 0", "total = (")],
        [change("total < n", "total != n")],
    ]
    drawn = draw.draw(root, lines, 5, 0)
    assert {mutant.key for mutant in drawn} == {lines[0][0].key, lines[2][0].key}
    assert draw.draw(root, lines[::-1], 5, 0) == drawn
    firsts = {draw.draw(root, lines, 1, seed)[0].key for seed in range(20)}
    assert firsts == {mutant.key for mutant in drawn}


@pytest.mark.parametrize(
    ("original", "mutated", "counts"),
    [
        ("a > b", "a < b", True),
        ("a > b", "a > (b)", False),
        ("a > b", "a > ", False),
        ("larger one", "smaller one", False),
        ('"""The larger one."""', "pass", False),
        ("b: int", "b: str", False),
        ("total = 0", "total = 0  # none", False),
        ("int a;  // one", "int a;  // two", False),
        ("int a;  // one", "int b;  // one", True),
    ],
)
def test_which_changes_of_python_count(original: str, mutated: str, counts: bool) -> None:
    assert draw.says_something_else(change(original, mutated), SOURCE) is counts


@pytest.mark.parametrize(
    ("mutated", "counts"),
    [("a  = b;  // that", False), ("a = c;  // this", True), ("/*a = b;*/  // this", True)],
)
def test_which_changes_of_cpp_count(mutated: str, counts: bool) -> None:
    mutant = Mutant("a.cuh", 1, "a = b;  // this", mutated, "")
    assert draw.says_something_else(mutant, "") is counts


def test_whether_a_survivor_is_another_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = shutil.which("g++")
    if found is None:
        pytest.skip("needs g++")
    trees = tmp_path / "0/tree", tmp_path / "1/tree"
    cache, log = tmp_path / "cache", tmp_path / "log"
    environment = {"CACHE": cache, "LOG": log, "TREE": trees[1]}
    for name, path in environment.items():
        monkeypatch.setenv(f"MUTATION_{name}", str(path))
    for changed, expected in {"2 * x": [True], "x + x": [False], "3 * x": []}.items():
        for tree, text in zip(trees, ("3 * x", changed), strict=True):
            tree.mkdir(parents=True, exist_ok=True)
            (tree / "a.h").write_text(f"inline int f(int x) {{ return {text}; }}\n")
        if changed == "x + x":
            (trees[0] / "a.h").write_text("inline int f(int x) { return 2 * x; }\n")
        log.unlink(missing_ok=True)
        written = tmp_path / "written.cpp"
        written.write_text('#include "a.h"\nint g(int x) { return f(x); }\n')
        command = [found, "-shared", "-fPIC", "-O0", f"-I{trees[1]}", str(written), "-o"]
        assert compiler.main([*command, str(tmp_path / "library")]) == 0
        compiled = mutants.load(log)
        assert list(codes.differ("a.h", compiled, trees, cache)) == expected


def test_the_compiler_compiles_the_same_text_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = shutil.which("g++")
    if found is None:
        pytest.skip("needs g++")
    monkeypatch.setenv("MUTATION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MUTATION_LOG", str(tmp_path / "log"))
    texts = {
        "one": "int f() { return ONE; }",
        "two": "int f() { return ONE; }  // the same",
        "three": "int f() { return ONE + 1; }",
        "four": "int f() { return TWO; }",
    }
    codes = []
    for name, text in texts.items():
        tree = tmp_path / name
        tree.mkdir()
        (tree / "one.h").write_text("#define ONE 1\n")
        (tree / "a.cpp").write_text(f'#include "one.h"\n{text}\n')
        monkeypatch.setenv("MUTATION_TREE", str(tree))
        command = [found, "-shared", "-fPIC", f"-I{tree}", str(tree / "a.cpp"), "-o"]
        codes.append(compiler.main([*command, str(tree / "library")]))
    assert codes == [0, 0, 0, 1]
    assert len(list((tmp_path / "cache").iterdir())) == 2
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert log[0]["files"] == ["a.cpp", "one.h"]
    assert log[0]["command"][-1] == "{tree}/a.cpp"
    assert ["error" in entry for entry in log] == [False, False, False, True]


def test_every_mutated_file_has_tests() -> None:
    files = list(selections.mutated_files(mutants.ROOT))
    assert {Path(file).suffix for file in files} == {".cpp", ".cu", ".cuh", ".h", ".py"}
    for file in files:
        for stage in selections.stages(file):
            for argument in stage.arguments:
                path = argument.partition("::")[0]
                assert not path.startswith("tests/") or (mutants.ROOT / path).exists(), argument
    with pytest.raises(ValueError, match="got other"):
        selections.stages("other")


def test_report(tmp_path: Path) -> None:
    tried = [
        Mutant("src/dcnv4/geometry.py", number, "a", f"a | {number}", "") for number in range(6)
    ]
    names = "killed", "killed", "timeout", "survived", "survived", "uncompiled"
    found = {m.key: {"result": name} for m, name in zip(tried, names, strict=True)}
    why = {"key": tried[3].key, "verdict": "equivalent", "why": "it is the same"}
    text, missed = report.report(tried, found, [why])
    assert missed == [tried[4]]
    titles, _, row, total, *_ = text.splitlines()
    assert titles == (
        "| where | tried | failed a test | ran too long | missed | equivalent | speed only "
        "| uncompiled |"
    )
    assert row == "| `geometry.py` | 5 | 2 | 1 | 1 | 1 | 0 | 1 |"
    assert total == row.replace("`geometry.py`", "all")
    assert "| `geometry.py:3` `a \\| 3` | `a` | equivalent | it is the same |" in text
    page = tmp_path / "page"
    page.write_text(f"before\n{report.BEGIN}old\n{report.END}after\n")
    report.write(text, page)
    assert page.read_text() == f"before\n{report.BEGIN}{text}{report.END}after\n"
    with pytest.raises(ValueError, match="verdict must be one of"):
        report.report(tried, found, [{**why, "why": ""}])


def test_the_page_has_the_report() -> None:
    found = mutants.load_results()
    text, missed = report.report(mutants.load_mutants(), found, mutants.load(mutants.SURVIVORS))
    assert text in report.PAGE.read_text(encoding="utf-8")
    assert missed == []


def test_it_says_how_it_is_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mutation", "--help"])
    with pytest.raises(SystemExit, match="0"):
        command.main()
    assert "draw" in capsys.readouterr().out
