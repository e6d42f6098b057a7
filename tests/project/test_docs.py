"""The pages: every Python block runs as it stands, links lead somewhere, the site builds."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
import zlib
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
import torch

import dcnv4
from dcnv4.cli.bench import cases, report

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")))
    if "_build" not in path.parts
]
VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])

# A page runs with torch 2.0 and imports what it needs, but for these: the oldest torch, and the
# packages that what it calls imports.
NEEDS: dict[str, tuple[tuple[int, int], tuple[str, ...]]] = {
    "docs/export.md": ((2, 8), ("onnx", "onnxscript")),
}
# What a section of a page may import and a machine may lack.
OPTIONAL = {
    "deformops",
    "fvcore",
    "matplotlib",
    "mmcv",
    "onnxruntime",
    "segmentation_models_pytorch",
    "thop",
    "timm",
    "torchvision",
    "transformers",
    "ultralytics",
}
NOT_RUN = "# not run here:"
# Languages of fences that hold no Python; directives of the site stand in braces.
OTHER = {"bash", "bibtex", "console", "cpp", "dockerfile", "text", "toml", "yaml"}
# What is in the package and not for its users.
INTERNAL = {
    "imports",
    "initialization",
    "arguments",
    "autocast",
    "eager",
    "geometry",
    "layers",
    "modules",
    "ops",
    "tracing",
    "__main__",
    "cli",
}


class Block(NamedTuple):
    page: str
    line: int
    """Of its first line of code in the page."""
    language: str
    """What stands after the fence; "indented" where there is none."""
    section: int
    """Counted by the page's headings."""
    code: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def why_not_run(self) -> str | None:
        first = self.code.partition("\n")[0].strip()
        return first[len(NOT_RUN) :].strip() if first.startswith(NOT_RUN) else None


@cache
def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def parse(page: str) -> tuple[str, list[Block]]:
    """The page's prose, with its lines in place, and its blocks of code."""
    prose, blocks = [], []
    fence = code = None
    section = start = 0
    language, indent = "", ""
    lines = read(page).split("\n")
    for number, line in enumerate([*lines, ""], 1):
        opening = re.match(r"([ >]*)(`{3,}|~{3,})\s*([^`]*)$", line)
        if fence is not None:
            if opening and opening[2].startswith(fence) and not opening[3]:
                blocks.append(Block(page, start, language, section, "\n".join(code)))
                fence = None
            else:
                code.append(line.removeprefix(indent))
            prose.append("")
            continue
        if opening:
            indent, fence, language = opening[1], opening[2], opening[3].strip()
            code, start = [], number + 1
            prose.append("")
            continue
        section += line.startswith("##")
        if line.startswith("    ") and number > 1 and not lines[number - 2].strip():
            block = line[4:]
            for following in lines[number:]:
                if following.strip() and not following.startswith("    "):
                    break
                block += "\n" + following[4:]
            blocks.append(Block(page, number, "indented", section, block))
        prose.append("" if line.startswith("    ") else line)
    assert fence is None, f"{page}:{start}: the fence is never closed"
    return "\n".join(prose), blocks


BLOCKS = [block for page in PAGES for block in parse(page)[1]]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def missing(block: Block) -> list[str]:
    """The optional packages that a block imports and that are not here."""
    names = set()
    for node in ast.walk(ast.parse(block.code, block.place)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return sorted(name for name in names & OPTIONAL if find_spec(name) is None)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "page", sorted({block.page for block in PYTHON if block.why_not_run is None})
)
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version, packages = NEEDS.get(page, ((2, 0), ()))
    if version > VERSION:
        pytest.skip(f"{page} needs torch >= {version[0]}.{version[1]}; got {torch.__version__}")
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{page} needs {package}; pip install {package}")
    blocks = [block for block in PYTHON if block.page == page and block.why_not_run is None]
    absent: dict[int, set[str]] = {}
    for block in blocks:
        if names := missing(block):
            absent.setdefault(block.section, set()).update(names)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page}
    for block in blocks:
        if block.section not in absent:
            # Blank lines put an error at its line in the page.
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), namespace)
    if absent:
        left_out = sum(block.section in absent for block in blocks)
        names = ", ".join(sorted(set().union(*absent.values())))
        pytest.skip(f"{len(blocks) - left_out} blocks ran; {left_out} in sections need {names}")


@pytest.mark.exhaustive
def test_notebook_runs() -> None:
    """Its last layer finds the pixel that it is to copy."""
    if find_spec("matplotlib") is None:
        pytest.skip("needs matplotlib; pip install matplotlib")
    notebook = json.loads((ROOT / "examples/tour.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    namespace: dict[str, Any] = {"__name__": "tour"}
    for number, cell in enumerate(cells):
        assert not cell["outputs"], f"cell {number}: clear the outputs before you commit"
        exec(compile("".join(cell["source"]), f"tour.ipynb, cell {number}", "exec"), namespace)
    assert namespace["loss"] < 1e-3


def test_blocks_that_are_not_run_say_why() -> None:
    reasons = []
    for block in PYTHON:
        if block.why_not_run is not None:
            compile(block.code, block.place, "exec")
            assert block.why_not_run, f"{block.place}: give a reason after {NOT_RUN!r}"
            reasons.append(f"{block.place}: {block.why_not_run}")
    if reasons:
        pytest.skip("; ".join(reasons))


def test_no_python_hides_from_being_run() -> None:
    """A block is `python`, of another language, or a directive; and no other block is Python."""
    for block in BLOCKS:
        if block.language == "python":
            continue
        assert block.language in {*OTHER, "indented"} or block.language.startswith("{"), (
            f"{block.place}: the fence must be python, one of {sorted(OTHER)} or a directive; "
            f"got {block.language!r}"
        )
        try:
            tree = ast.parse(block.code)
        except SyntaxError:
            continue
        hidden = (ast.Import, ast.ImportFrom, ast.Call, ast.Assign, ast.With, ast.FunctionDef)
        assert not any(isinstance(node, hidden) for node in ast.walk(tree)), (
            f"{block.place} is Python: mark it so, and where it cannot run begin it with "
            f"'{NOT_RUN} …'"
        )


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    found: dict[str, int] = {}
    result = set()
    for heading in re.findall(r"^#{1,6} +(.+)$", parse(page)[0], re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        result.add(f"{slug}-{count}" if count else slug)
    return result


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """As read on GitHub: relative to the page's own folder."""
    prose = re.sub(r"`[^`\n]*`", "code", parse(page)[0])
    for target in re.findall(r"\]\(\s*<?([^)>\s]+)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}, which is not there"
        if anchor:
            where = file.resolve().relative_to(ROOT).as_posix()
            assert anchor in anchors(where), f"{page} links to {target}, which has no such heading"


def test_contributing_knows_every_file() -> None:
    """The table names what there is, and nothing else."""
    page = read("CONTRIBUTING.md")
    folders = (ROOT, ROOT / "src/dcnv4", ROOT / "src/dcnv4/backends")
    for name in re.findall(r"`([\w./]+(?:/|\.(?:py|h|md)))`", page):
        assert any((folder / name).exists() for folder in folders), f"{name} is not there"
    for path in (ROOT / "src/dcnv4").iterdir():
        known = path.name in page or path.name in ("__init__.py", "__pycache__", "py.typed")
        assert known, f"CONTRIBUTING.md says nothing of {path.name}"


def section(page: str, heading: str) -> str:
    """What stands under a heading, up to the next one of any level."""
    start = re.search(rf"^#+ {re.escape(heading)}$", read(page), re.MULTILINE)
    assert start, f"{page} has no heading {heading!r}"
    return re.split(r"^#+ ", read(page)[start.end() :], maxsplit=1, flags=re.MULTILINE)[0]


def test_readme_has_every_parameter() -> None:
    """In the signature's order, with its defaults."""
    rows = re.findall(
        r"^\| `(\w+)` \| [^|]+ \| `([^`]+)` \| [^|]+ \|$",
        section("README.md", "Parameters of `dcnv4`"),
        re.MULTILINE,
    )
    parameters = inspect.signature(dcnv4.DCNv4).parameters.values()
    assert rows == [(p.name, repr(p.default).replace("'", '"')) for p in parameters]


def test_readme_measures_nothing_of_its_own() -> None:
    """Each row of its table of times is what a kept run has of the case."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section("README.md", "Speed").splitlines()
        if line.startswith("| 64")
    ]
    _, rows = report.load(str(ROOT / "benchmarks/results/h200-0.2.0.json"))
    operators = next(story for story in report.stories(rows) if story.name == "operators")
    measured = {
        words: [
            report.figures(operators.rows[case, direction, name].median)
            for direction in operators.directions
            for name in ("dcnv4 cuda", "deformops triton")
        ]
        for case, words in operators.cases.items()
    }
    assert len(cells) >= 3
    for case, *times in cells:
        assert times == measured[case], case


def test_install_page_mends_every_reason() -> None:
    """What `dcnv4 info` may say begins with words that the page has."""
    page = read("docs/install.md")
    reasons = set()
    for file in sorted((ROOT / "src/dcnv4/backends").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            first = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else node
            if isinstance(first, ast.Constant) and str(first.value).startswith("needs "):
                reasons.add(re.split(r" \(| \d|[;,]|$", first.value)[0].strip())
    assert len(reasons) >= 15
    assert not {reason for reason in reasons if reason not in page}


@cache
def has_timm() -> bool:
    try:
        importlib.import_module("timm")
    except (ImportError, RuntimeError):  # the latter of torchvision beside another PyTorch
        return False
    return True


def public() -> Iterator[tuple[str, str]]:
    """Every public name, with its module."""
    names = [
        ".".join(path.relative_to(ROOT / "src/dcnv4").with_suffix("").parts)
        for path in sorted((ROOT / "src/dcnv4").rglob("*.py"))
    ]
    for name in (re.sub(r"\.?__init__$", "", name) for name in names):
        parts = name.split(".")
        if parts[0] in INTERNAL or (parts[0] == "backends" and len(parts) > 1):
            continue
        if any(part.startswith("_") for part in parts):
            continue
        if parts[0] == "models" and not has_timm():
            continue
        module = importlib.import_module(f"dcnv4.{name}" if name else "dcnv4")
        own = [
            key
            for key, thing in vars(module).items()
            if not key.startswith("_")
            and (inspect.isclass(thing) or inspect.isroutine(thing))
            and thing.__module__ == module.__name__
        ]
        for key in getattr(module, "__all__", own):
            thing = getattr(module, key)
            again = name and (
                any(thing is vars(dcnv4)[other] for other in dcnv4.__all__)
                or getattr(thing, "__module__", "").startswith(f"{module.__name__}.")
            )
            if not inspect.ismodule(thing) and not again:
                yield module.__name__, key


@pytest.mark.parametrize(("module", "name"), sorted(public()))
def test_public_names_have_docstrings(module: str, name: str) -> None:
    thing = getattr(importlib.import_module(module), name)
    if inspect.isclass(thing) or inspect.isroutine(thing):
        text = inspect.getdoc(thing)
        assert text, f"{module}.{name} has no docstring"
        parameters = [p for p in inspect.signature(thing).parameters if not p.startswith("_")]
        if inspect.isroutine(thing) and parameters:
            said = set(re.findall(r"\w+", text))
            for first, last in re.findall(r"^ *(\w+) to (\w+): ", text, re.MULTILINE):
                said |= set(parameters[parameters.index(first) : parameters.index(last)])
            unknown = set(parameters) - said
            assert not unknown, f"{module}.{name} does not say what {', '.join(sorted(unknown))} is"


SCRIPTS = {
    name: runpy.run_path(str(ROOT / name)) for name in ("benchmarks/table.py", "docs/pictures.py")
}
CONV, LAYER = (next(c for c in cases.CUDA if c.op == op) for op in ("deform_conv", "layer"))


@pytest.fixture
def gpu_run(tmp_path: Path) -> Path:
    """Of an operator, a layer and a call on next to nothing, as `dcnv4 bench --json` keeps them."""
    ours, peer = ("dcnv4 cuda", "backend"), ("peer", "peer")
    rows = [
        report.Row(CONV.name, "", "forward", *ours, 32.25, 52.4, memory=2_000_000, host=60.0),
        report.Row(CONV.name, "", "forward", *peer, 32.25, 90.0, memory=3_000_000, host=20.0),
        report.Row(CONV.name, "", "backward", *ours, 55.9, 170.2, memory=4_000_000, host=20.0),
        report.Row(CONV.name, "", "backward", *peer, 55.9, problem="WRONG: error 3e-2"),
        report.Row(LAYER.name, "", "forward", *ours, 30.0, 160.0, memory=5_000_000, host=250.0),
        report.Row(LAYER.name, "", "forward+backward", *ours, 60.0, 534.0, memory=6_000_000),
        report.Row(cases.TINY[0].name, "", "eager, grad", *ours, None, 33.0),
    ]
    environment = {
        "device": "NVIDIA H100",
        "versions": "dcnv4 0.2.0, torch 2.11.0",
        "command": "dcnv4 bench --json gpu.json",
        "copy": "2,990.0 GB/s, bytes read and written",
        "timing": "CUDA events",
    }
    report.save(str(tmp_path / "gpu.json"), environment, rows)
    return tmp_path / "gpu.json"


def test_section_of_a_run_is_written_in_the_words_of_the_page(gpu_run: Path) -> None:
    text = SCRIPTS["benchmarks/table.py"]["section"](gpu_run)
    paragraphs = text.split("\n\n")
    assert paragraphs[:4] == [
        "## NVIDIA H100, dcnv4 0.2.0",
        "dcnv4 0.2.0, torch 2.11.0; copy bandwidth 2,990.0 GB/s. Median µs, CUDA events:",
        "    dcnv4 bench --json gpu.json",
        "![Operators: time and memory](images/gpu-operators.svg)",
    ]
    tables = {
        heading: table.splitlines()[-1]
        for heading, table in pairwise(paragraphs)
        if table.startswith("|")
    }
    assert tables == {
        "Operators, forward, µs:": f"| {CONV.words} | 32.2 | 52.4 | 90.0 |",
        "Operators, backward, µs:": f"| {CONV.words} | 55.9 | 170 | WRONG |",
        "Operators, memory of backward, MB:": f"| {CONV.words} | 4.0 | - |",
        "Layers, forward, µs:": f"| {LAYER.words} | 160 |",
        "Layers, forward and backward, µs:": f"| {LAYER.words} | 534 |",
        "Layers, memory of forward and backward, MB:": f"| {LAYER.words} | 6.0 |",
    }
    assert f"| {CONV.words} |" in read("docs/benchmarks.md")


def test_a_run_of_a_gpu_is_drawn_by_the_same_command(gpu_run: Path) -> None:
    """A plot for operators and one for layers."""
    drawn = SCRIPTS["docs/pictures.py"]["of_results"](gpu_run.parent)
    assert list(drawn) == ["gpu-operators.svg", "gpu-layers.svg"]
    text = str(drawn["gpu-operators.svg"])
    assert "Operators on NVIDIA H100" in text
    assert f">{CONV.words}<" in text
    # Of ours the legend, both times and the memory; of the peer the legend and the forward.
    assert [text.count(f'class="{kind}" d=') for kind in ("a", "line-c thick")] == [4, 2]


def test_a_plot_has_room_for_every_contestant() -> None:
    """Each has a mark of its own, and its name in the legend."""
    script = SCRIPTS["docs/pictures.py"]
    names = [f"another implementation {i}" for i in range(8)]
    panel = script["Panel"]("forward", "µs", {"case": {n: i + 1.0 for i, n in enumerate(names)}})
    text = str(script["dots"]("", dict.fromkeys(names, "peer"), [panel]))
    paths = re.findall(r'<path class="line-c thick" d="(.+?)" ', text)
    assert {paths.count(path) for path in paths} == {2}
    assert len(paths) == 16
    places = [float(x) for n in names for x in re.findall(rf'x="([\d.]+)" y=".+">{n}<', text)]
    assert len(places) == 8
    assert max(places) < 700


def test_labels_of_axes_do_not_touch() -> None:
    """Nor leave the picture, of whatever runs there are."""
    results = ROOT / "benchmarks/results"
    for name, picture in SCRIPTS["docs/pictures.py"]["of_results"](results).items():
        found = re.findall(
            r'<text class="small middle soft" x="([\d.]+)" y="([\d.]+)">([\d.,]+)<', str(picture)
        )
        assert len(found) > 5, name
        for line in {y for _, y, _ in found}:
            labels = sorted((float(x), 3.5 * len(words)) for x, y, words in found if y == line)
            for (x, half), (after, other) in pairwise(labels):
                assert x + half < after - other, (name, x, after)
            assert labels[-1][0] + labels[-1][1] <= 902


def test_page_has_a_section_for_every_run_that_is_kept() -> None:
    text = read("docs/benchmarks.md")
    assert SCRIPTS["benchmarks/table.py"]["page"](text) == text, "run python benchmarks/table.py"


def test_pictures_show_what_the_pages_say() -> None:
    """Each is what its script draws, the plots of the tables of today."""
    drawn = SCRIPTS["docs/pictures.py"]["pictures"]()
    for name, picture in drawn.items():
        file = DOCS / "images" / name
        assert file.read_text(encoding="utf-8") == str(picture), "run python docs/pictures.py"
        assert any(f"images/{name}" in read(page) for page in PAGES), f"no page shows {name}"
    kept = {path.name for path in (DOCS / "images").glob("*.svg")}
    assert kept == set(drawn), "remove what the script does not draw"


# What an example needs besides the packages that it imports, by its module.
EXAMPLE_NEEDS = {
    "dcnv4.export": ((2, 7), ()),
    "dcnv4.onnx": ((2, 8), ("onnx", "onnxscript")),
    "dcnv4.visualize": ((2, 0), ("matplotlib",)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (module, name)
        for module, name in sorted(public())
        if callable(thing := getattr(importlib.import_module(module), name))
        and not getattr(thing, "_is_protocol", False)
    ],
)
def test_public_names_have_examples_that_run(
    module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = inspect.getdoc(getattr(importlib.import_module(module), name)) or ""
    place = f"{module}.{name}"
    example = doctest.DocTestParser().get_doctest(text, {}, place, None, 0)
    assert example.examples, f"{place} has no example"
    version, packages = EXAMPLE_NEEDS.get(module, ((2, 0), ()))
    if version > VERSION:
        pytest.skip(f"{place} needs torch >= {version[0]}.{version[1]}; got {torch.__version__}")
    code = "".join(line.source for line in example.examples)
    block = Block(place, 0, "python", 0, code)
    absent = {package for package in packages if find_spec(package) is None} | {*missing(block)}
    if absent:
        pytest.skip(f"{place} needs {', '.join(sorted(absent))}")
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert not failed, "".join(said)


class Links(HTMLParser):
    """Where a built page links to, and what it can be linked at."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for key, value in attributes:
            if key == "id" and value:
                self.ids.add(value)
            elif key in ("href", "src") and value and not re.match(r"[a-z]+:", value):
                self.targets.append(unquote(value))


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    """And has every public name and no link that leads nowhere."""
    for package in ("sphinx", "myst_parser", "furo", "sphinx_copybutton"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}; pip install -e '.[docs]'")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-d"]
    done = subprocess.run(
        [*command, str(tmp_path / "trees"), str(DOCS), str(site)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(dcnv4.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr

    pages = {file: Links(file) for file in site.rglob("*.html")}
    for file, links in pages.items():
        for target in links.targets:
            path, _, anchor = target.partition("#")
            path = path.partition("?")[0]
            other = (file.parent / path).resolve() if path else file
            assert other.exists(), f"{file.relative_to(site)} links to {target}"
            if anchor and other in pages:
                assert anchor in pages[other].ids, f"{file.relative_to(site)} links to {target}"

    # The formulas of docstrings are drawn, three blocks of them.
    assert (site / "api/functional.html").read_text(encoding="utf-8").count("<math") == 3

    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    entries = zlib.decompress(inventory).decode().splitlines()
    documented = {entry.split()[0] for entry in entries if entry.split()[1].startswith("py:")}
    absent = {f"{module}.{name}" for module, name in public()} - documented
    assert not absent, f"no page of docs/api documents {', '.join(sorted(absent))}"
