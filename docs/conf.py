"""Sphinx settings of the documentation site: ``make docs`` builds it into ``site/``."""

import importlib.util
import os
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # docstrings are read, nothing is compiled

from selcon_plugin import __version__  # noqa: E402

project = "selcon_plugin"
author = "the selcon_plugin authors"
copyright = author
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["benchmarks/results", "api/modules/modules.rst"]
nitpicky = True

# Markdown
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

# The API reference: every public name, from its docstring.
apidoc_modules = [
    {
        "path": "../selcon_plugin",
        "destination": "api/modules",
        "exclude_patterns": ["**/compiled/*"],  # kernels of clustering, not for callers
        "separate_modules": False,
        "module_first": True,
        "include_private": False,
    }
]
# A name is documented where it is defined, and not again where it is re-exported.
autodoc_default_options = {"ignore-module-all": True, "members": True}
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
# Names of torch, NumPy and the hosts have no pages here, nor have private names and types.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!selcon_plugin\.).*"),
    (r"py:.*", r".*\._\w+"),
    (
        r"py:.*",
        r".*\.(LabelerClass|MethodClass|PlannerFunction|Entry|Registered|\w+_names)",
    ),
]

# The look: nothing is fetched from elsewhere, and the search works from file:// too.
html_theme = "furo"
html_title = f"selcon_plugin {release}"
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # a browser reads no other page from file://
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["custom.css"]
pygments_style = "friendly"
pygments_dark_style = "github-dark"


def _is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a class
        return False


def resolve_short_name(app, env, node, contnode):
    """Resolve a name that is re-exported, or short for the only object of that name."""
    if node.get("refdomain") != "py":
        return None
    domain = env.get_domain("py")
    target = node["reftarget"]
    module, _, name = target.rpartition(".")
    exported = None
    if module.startswith("selcon_plugin") and _is_module(module):
        exported = getattr(importlib.import_module(module), name, None)
    full = f"{getattr(exported, '__module__', '')}.{getattr(exported, '__qualname__', '')}"
    found = [full] if full in domain.objects else []
    found = found or [key for key in domain.objects if key.rpartition(".")[2] == name]
    if len(found) != 1:
        return None
    node["reftarget"] = found[0]
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], found[0], node, contnode
    )


def mark_code(app, what, name, obj, options, lines):
    """Show an indented block of a module's docstring as it stands, not as a quotation."""
    if what != "module":
        return
    for i in range(len(lines) - 1, 0, -1):
        begins = lines[i].startswith("    ") and not lines[i - 1].strip()
        before = next((line for line in reversed(lines[:i]) if line.strip()), "    ")
        if begins and not before.startswith(" ") and not before.endswith("::"):
            lines[i:i] = ["::", ""]


def visit_math(translator, node):
    """Write an equation as MathML, which browsers render without a script."""
    block = node.tagname == "math_block"
    translator.body.append(tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def setup(app):
    """Register the functions above with Sphinx."""
    app.add_html_math_renderer(
        "mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math, None)
    )
    app.connect("missing-reference", resolve_short_name)
    app.connect("autodoc-process-docstring", mark_code)
