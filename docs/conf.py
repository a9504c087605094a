"""How the pages of this folder become a site: `make docs`. Nothing here reads the network."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent / "src")]

import zotune  # noqa: E402

project = "zotune"
author = "The zotune authors"
copyright = "the zotune authors, Apache-2.0"
version = release = zotune.__version__
language = "en"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docstrings",
    "zotune_options",
    "public_names",
    "built_links",
]
exclude_patterns = ["_ext", "_static"]

# Markdown.
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# `--option` must not become a dash.
smartquotes = False

# The API reference: text, arguments and types come from docstrings and annotations alone.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
add_module_names = False
# Single backticks in docstrings are code.
default_role = "code"

# Names of other packages have no page here, and their own sites are on the network. Types of zotune's own modules have
# one where they are public; links in text name those, and are checked.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|np|transformers|peft|pydantic|collections|pathlib|typing|types|dataclasses)\..*"),
    (r"py:(class|obj|data|exc)", r"zotune\.\w+\..*"),
    (r"py:(class|obj|data|exc)", r"(nn\.)?[A-Za-z]\w*"),
    (r"py:class", r"\w+\[.*"),
]

html_theme = "furo"
html_title = "zotune"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
