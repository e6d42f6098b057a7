"""Who may know what: imports between the files, single places, what an import costs."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dcnv4
from dcnv4 import backends

ROOT = Path(dcnv4.__file__).parent
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
NATIVE = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(ROOT.rglob("*"))
    if path.suffix in (".h", ".hpp", ".cuh", ".cu", ".cpp")
}

COMPAT = (
    *("deformable_detr", "extension", "fork", "lwdetr", "mmcv", "opengvlab", "rtdetr"),
    *("torchvision", "ultralytics"),
)

# The package's modules that each one below the command line may import.
ARROWS = {
    "__init__": {
        *("backends", "compat.fork", "conversion", "flops", "functional", "layers", "sharding"),
    },
    "geometry": set(),
    "tracing": set(),
    "autocast": {"geometry", "tracing"},
    "eager": {"autocast", "tracing"},
    "arguments": {"geometry", "backends", "tracing"},
    "initialization": {"geometry"},
    "functional": {"geometry", "backends", "autocast", "arguments", "ops"},
    "ops": {"geometry", "backends", "backends.reference", "autocast", "eager", "tracing"},
    "layers": {"layers.attention", "layers.conv", "layers.dcnv3"},
    "layers.base": {"geometry", "autocast", "tracing", "arguments", "initialization"},
    "layers.projections": {"backends", "autocast", "eager", "tracing", "layers.base"},
    "layers.conv": {
        *("geometry", "tracing", "autocast", "eager", "ops", "backends"),
        *("arguments", "initialization", "functional"),
        *("layers.base", "layers.projections"),
    },
    "layers.attention": {
        *("geometry", "tracing", "autocast", "eager", "ops", "backends"),
        *("arguments", "initialization", "functional"),
        *("layers.base", "layers.projections"),
    },
    "layers.dcnv3": {
        *("arguments", "initialization", "tracing", "functional"),
        *("layers.base", "layers.projections"),
    },
    "modules": {"layers"},
    "backends": {"geometry"},
    "flops": {"imports", "layers"},
    "imports": set(),
    "sharding": {"imports", "ops"},
    "conversion": {"arguments", "layers"},
    "checkpoints": {"conversion", "layers", "layers.dcnv3"},
    "models": {"models.internimage", "models.rates"},
    "models.internimage": {
        *("checkpoints", "layers", "layers.base", "layers.projections"),
        *("models.branch", "models.mlp", "models.norm"),
    },
    "models.branch": {
        *("geometry", "tracing", "autocast", "layers.base", "layers.projections"),
        *("models.norm", "models.mlp"),
    },
    "models.norm": {"backends", "backends.cuda", "autocast", "eager", "tracing", "layers.base"},
    "models.mlp": {
        *("ops", "backends.cuda", "autocast", "tracing", "layers.base", "layers.projections"),
        "models.norm",
    },
    "models.rates": set(),
    "visualize": {"arguments", "layers"},
    "export": {"tracing", "ops"},
    "onnx": {"arguments", "export", "geometry", "ops"},
    "compat": {f"compat.{name}" for name in COMPAT},
    "compat.deformable_detr": {"arguments", "tracing", "functional", "layers"},
    "compat.fork": {"arguments", "compat.opengvlab", "ops"},
    "compat.mmcv": {
        *("arguments", "autocast", "tracing", "layers"),
        *("compat.deformable_detr", "compat.torchvision"),
    },
    "compat.opengvlab": {"arguments", "compat.deformable_detr", "tracing", "functional"},
    "compat.torchvision": {"arguments", "autocast", "tracing", "functional", "geometry"},
    "compat.rtdetr": {"arguments", "compat.deformable_detr", "functional", "geometry", "tracing"},
    "compat.extension": {"compat.deformable_detr", "functional", "ops"},
    "compat.lwdetr": {"compat.deformable_detr", "functional"},
    "compat.ultralytics": {"compat.deformable_detr", "compat.rtdetr"},
    "integrations": set(),
    "integrations.transformers": {"arguments", "compat.rtdetr", "functional", "layers.base"},
}


OPTIONAL = (
    "triton",
    "cuda",
    "ninja",
    "numpy",
    "matplotlib",
    "sklearn",
    "tqdm",
    "transformers",
    "torchvision",
    "mmcv",
    "timm",
)


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_name(file) for file in FILES}


def imports(file: str) -> Iterator[str]:
    """The package's modules that a file imports, as `geometry` or `backends.reference`."""
    package = module_name(file).split(".") if file != "__init__.py" else []
    if not file.endswith("__init__.py"):
        package.pop()
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from (".".join(parts[1:]) for parts in names if parts[0] == "dcnv4")
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if node.module else []
            if node.level:
                parts = [*package[: len(package) - (node.level - 1)], *parts]
            elif parts[0] == "dcnv4":
                parts = parts[1:]
            else:
                continue
            for alias in node.names:
                deeper = ".".join([*parts, alias.name])
                yield deeper if deeper in MODULES else ".".join(parts)


@pytest.mark.parametrize("file", FILES)
def test_arrows(file: str) -> None:
    name = module_name(file)
    found = set(imports(file)) - {name}
    if name in ARROWS:
        assert found <= ARROWS[name]
    elif name.startswith("backends."):
        own = ".".join(name.split(".")[:2])
        strangers = {n for n in found if n != own and not n.startswith(f"{own}.")}
        assert strangers <= {"geometry", "backends", "backends.folders"}
    else:
        assert "ops" not in found
        assert not {n for n in found if n.startswith("backends.")}


def test_nothing_below_imports_the_command_line() -> None:
    for file in FILES:
        if module_name(file).split(".")[0] in (*ARROWS, "backends"):
            assert not {n for n in imports(file) if n.startswith(("cli", "__main__"))}, file


def words(tree: ast.AST) -> set[str]:
    """Every name and attribute in the code, comments and strings left out."""
    nodes = list(ast.walk(tree))
    return (
        {node.id for node in nodes if isinstance(node, ast.Name)}
        | {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        | {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    )


def test_one_file_reads_the_environment() -> None:
    readers = {file for file, tree in TREES.items() if words(tree) & {"environ", "getenv"}}
    assert readers == {"backends/__init__.py"}


def test_one_place_takes_the_floor_of_a_coordinate() -> None:
    """Triton's mirror of it aside; on the command line, a floor is a time."""
    users = {file for file, tree in TREES.items() if "floor" in words(tree)}
    users = {file for file in users if not file.startswith("cli/")}
    assert users - {"backends/triton/kernels.py"} == {"geometry.py"}
    code = {
        file: re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S) for file, text in NATIVE.items()
    }
    users = {file for file, text in code.items() if re.search(r"floor", text)}
    assert users <= {"backends/include/sampling.h"}


def test_one_file_registers_operators() -> None:
    users = {
        file
        for file in FILES
        if re.search(
            r"\btorch\._?library\b|from torch import .*\blibrary\b",
            FILES[file].read_text(encoding="utf-8"),
        )
    }
    assert users == {"ops.py"}


@pytest.mark.parametrize("name", backends.NAMES)
def test_backends_have_one_shape(name: str) -> None:
    module = backends.load(name)
    for function, expected in vars(backends.Backend).items():
        if function.startswith("_"):
            continue
        _, *wanted = inspect.signature(expected).parameters
        parameters = inspect.signature(getattr(module, function)).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        others = [p for p in parameters if p.kind is not p.POSITIONAL_OR_KEYWORD]
        assert positional == wanted, function
        assert all(p.default is not p.empty for p in others), function


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` on, without the docstring."""
    first = function.body[0]
    described = ast.get_docstring(function) is not None
    lines = (function.end_lineno or 0) - function.lineno + 1
    return lines - ((first.end_lineno or 0) - first.lineno + 1 if described else 0)


def test_functions_are_short() -> None:
    """At most 60 lines, docstrings and Triton kernels apart."""
    long = {
        f"{file}: {node.name}": lines_of_code(node)
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if not any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        if lines_of_code(node) > 60
    }
    assert not long


def test_modules_of_tests_do_not_import_each_other() -> None:
    """Only `support`, which imports none of them."""
    tests = Path(__file__).parents[1]
    for path in sorted(tests.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {
            part
            for node in ast.walk(tree)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or "", *(alias.name for alias in node.names)]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for part in name.split(".")
        }
        assert not {name for name in modules if name.startswith(("test_", "conftest"))}, path


def top_level(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when the module is imported."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from top_level(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for part in ("body", "orelse", "finalbody"):
                yield from top_level(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from top_level(handler.body)


@pytest.mark.parametrize("file", FILES)
def test_optional_packages_are_not_imported_with_the_package(file: str) -> None:
    folder, _, leaf = file.rpartition("/")
    if folder in ("backends/cuda", "backends/triton") and leaf != "__init__.py":
        pytest.skip("a kernel file, imported at first use")
    if folder == "models":
        pytest.skip("made of timm's parts, and imported by who wants them")
    roots = set()
    for node in top_level(TREES[file].body):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif not node.level:
            roots.add((node.module or "").split(".")[0])
    assert not roots & set(OPTIONAL)


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_needs_torch_alone_and_leaves_cuda_alone() -> None:
    code = """
import importlib.abc, sys, warnings
warnings.simplefilter("ignore")

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in %r:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
import torch
before = set(sys.modules)
import dcnv4
assert not torch.cuda.is_initialized()
new = set(sys.modules) - before
assert not new & {"torch._dynamo", "torch.utils.cpp_extension", "subprocess"}, new
layer = dcnv4.DCNv4(8, group=2, backend="reference")
assert layer(torch.ones(1, 4, 8)).shape == (1, 4, 8)
assert dcnv4.functional.deform_conv(torch.ones(1, 2, 2, 1), torch.ones(1, 2, 2, 27), groups=1).shape
print("fine")
"""
    assert fresh(code % (OPTIONAL,)) == "fine"


def test_import_is_quick() -> None:
    """At most 7 % of torch's own import; the best of three, since others use the machine."""
    code = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import dcnv4
print((time.perf_counter() - middle) / (middle - start))
"""
    assert min(float(fresh(code)) for _ in range(3)) <= 0.07
