"""The documentation site: `sphinx-build -W --keep-going -n docs site` makes it of this folder."""

from __future__ import annotations

import ast
import re
import textwrap

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.writers.html5 import HTML5Translator

import dcnv4

project = "dcnv4"
author = "The dcnv4 authors"
copyright = f"2026, {author}"
version = release = dcnv4.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
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

# Headings get the anchors that they have on GitHub, and formulas are written as there.
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
html_math_renderer = "mathml"
copybutton_exclude = ".linenos, .gp, .go"  # what is copied has no prompts and no output

# A name between single backticks in a docstring links to what it names, where that is on the site.
default_role = "py:obj"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"
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
    """In docstrings, an indented block after a blank line is code, or formulas where it is no
    Python; what follows `>>>` is code; * and | are themselves, and `a to b:` names the arguments
    from one to the other."""
    result: list[str] = []
    while lines:
        block = ""
        if len(result) > 1 and not result[-1] and result[-2][:1].strip():
            while lines and (lines[0].startswith("    ") or (block and not lines[0])):
                block += lines.pop(0) + "\n"
        if block:
            text = textwrap.dedent(block)
            formula = None if is_python(text) else as_latex(text)
            result += [".. math::" if formula else "::", ""]
            result += [*textwrap.indent(formula or text, "    ").split("\n"), ""]
            continue
        line = re.sub(r"^( +\w+) to (\w+: )", r"\1…\2", lines.pop(0))
        as_it_is = line.lstrip().startswith((">>> ", "... "))
        result.append(line if as_it_is else re.sub(r"[*|]", r"\\\g<0>", line))
    lines[:] = result


def is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


SYMBOLS = {
    "sum_": r"\sum_",
    "·": r"\cdot ",
    "//": r"\text{ // }",
    "½": r"\tfrac{1}{2}",
    "   ": r"\quad ",
}


def as_latex(formulas: str) -> str:
    """Of plain text, a formula a line: words are upright, and what follows _ is a subscript."""
    rows = re.sub(r"_(\w+)", r"_{\1}", formulas.strip())
    rows = re.sub(r"(?<![{\w])(?!sum_)[a-z]{2,}", r"\\mathrm{\g<0>}", rows)
    for plain, latex in SYMBOLS.items():
        rows = rows.replace(plain, latex)
    rows = re.sub(r"^(.*?) = ", r"\1 &= ", rows, flags=re.MULTILINE)
    return "\\begin{aligned}" + rows.replace("\n", " \\\\\n") + "\\end{aligned}"


def in_the_package(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement
) -> nodes.reference | None:
    """A name in a docstring may be of the package, or the one class or function of another module
    that is called so, not only of the module it stands in."""
    if node["reftype"] != "obj":
        return None
    name, python = node["reftarget"], env.get_domain("py")
    found = [f"dcnv4.{name}"]
    if found[0] not in python.objects and ("." in name or name[:1].isupper()):
        found = [known for known in python.objects if known.endswith(f".{name}")]
    if len(found) != 1:
        return None
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, text)


def without_constructor(
    app: Sphinx, what: str, name: str, obj: object, options: object, given: str, returns: str
) -> tuple[str, str] | None:
    """Nobody makes a protocol."""
    return ("", "") if getattr(obj, "_is_protocol", False) else None


def where_it_is_written(app: Sphinx, module: str, name: str) -> str | None:
    """Two operators say that they are PyTorch's; they and the function between them are shown where
    they are exported."""
    exported = ("dcnv4_forward", "dcnv4_forward_pytorch", "flash_deform_attn")
    return module if name in exported else None


def write_formula(writer: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Formulas are MathML, which browsers draw by themselves: no script, no network."""
    formula = tex2mathml(node.astext())
    if isinstance(node, nodes.math_block):
        formula = formula.replace("<math ", '<math display="block" ', 1)
    writer.body.append(formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
    app.connect("autodoc-process-docstring", as_in_markdown, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", without_constructor)
    app.connect("missing-reference", in_the_package)
    app.connect("viewcode-follow-imported", where_it_is_written)
