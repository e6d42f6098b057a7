"""The commands of `dcnv4`, a module each: `add_arguments(parser)` and `run(args)`."""

from typing import Any

LETTERS: dict[Any, str] = dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#767676"
)
"""Settings of matplotlib for pictures that can be read on a bright and on a dark page."""
