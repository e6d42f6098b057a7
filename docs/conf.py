"""The documentation site: `sphinx-build -W --keep-going -n docs site` makes it of this folder."""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import dcnv4

project = "dcnv4"
author = "The dcnv4 authors"
copyright = f"2026, {author}"
version = release = dcnv4.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"dcnv4 {release}"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
pygments_style, pygments_dark_style = "friendly", "monokai"

# What the site's environment need not have.
autodoc_mock_imports = ["timm"]

# Headings get the anchors that they have on GitHub.
myst_heading_anchors = 3

# A name between single backticks in a docstring links to what it names, where that is on the site.
default_role = "py:obj"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    # Documented on sites of their own, which a build without a network cannot look up.
    ("py:.*", r"(torch|nn|onnx|numpy|collections|matplotlib|os)\..*"),
    ("py:class", "Tensor|Sequence|Callable|Axes|FigureBase"),
    # Not for users: a base class, a type variable.
    ("py:class", r"WindowedLayer|.*\.Model"),
]


def as_in_markdown(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """In docstrings, an indented block after a blank line is code, * and | are themselves, and
    `a to b:` names the arguments from one to the other."""
    code = False
    result: list[str] = []
    for before, line in zip(["", "", *lines], lines, strict=False):
        starts = line.startswith("    ") and result[-1:] == [""] and before[:1].strip()
        if starts:
            result += ["::", ""]
        line = re.sub(r"^( +\w+) to (\w+: )", r"\1…\2", line)
        code = bool(starts) or (code and (not line or line.startswith("    ")))
        result.append(line if code else re.sub(r"[*|]", r"\\\g<0>", line))
    lines[:] = result


def in_the_package(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement
) -> nodes.reference | None:
    """A name in a docstring may be of the package, not only of the module it stands in."""
    if node["reftype"] != "obj":
        return None
    target = f"dcnv4.{node['reftarget']}"
    python = env.get_domain("py")
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, text)


def where_it_is_written(app: Sphinx, module: str, name: str) -> str | None:
    """Two operators say that they are PyTorch's; they and the function between them are shown where
    they are exported."""
    exported = ("dcnv4_forward", "dcnv4_forward_pytorch", "flash_deform_attn")
    return module if name in exported else None


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", as_in_markdown, priority=400)  # before napoleon
    app.connect("missing-reference", in_the_package)
    app.connect("viewcode-follow-imported", where_it_is_written)
