"""The Python in the guides runs as it stands, block after block."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
NEEDS = {
    "export.md": ((2, 8), ("onnx", "onnxscript", "onnxruntime")),
    "training.md": ((2, 0), ()),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("page", NEEDS)
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version, packages = NEEDS[page]
    if version > VERSION:
        pytest.skip(f"{page} needs torch >= {version}; got {VERSION}")
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{page} needs {package}; pip install {package}")
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert blocks
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page}
    for block in blocks:
        # Blank lines put an error at its line in the page.
        before = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(before + block[1], page, "exec"), namespace)
