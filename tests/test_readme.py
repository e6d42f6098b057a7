"""The README's Python runs as it stands, block after block."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_readme_code_runs() -> None:
    text = README.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert blocks, "README.md must have a ```python block"
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        # Blank lines put an error at its line in the README.
        before = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(before + block[1], str(README), "exec"), namespace)
