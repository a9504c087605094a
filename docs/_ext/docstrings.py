"""Small repairs on the way from a docstring to a page, so that docstrings stay plain text.

Indented lines are equations or code, not quotations; a property's first line may hold a colon; short names in code are
marked, so that the style sheet keeps them on one line.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

# A heading of a Google docstring, whose indented lines are entries.
_SECTION = re.compile(r"^(Args|Attributes|Example|Examples|Note|Raises|Returns|Source|Yields|Warns|Keyword Args):$")
_SHORT = 28


def with_literal_blocks(lines: list[str]) -> list[str]:
    """The lines, with `::` before each indented block that follows a paragraph.

    >>> with_literal_blocks(["Momentum.", "", "    m = 0", "", "More."])
    ['Momentum.', '', '::', '', '    m = 0', '', 'More.']
    """
    found: list[str] = []
    above = ""
    for i, line in enumerate(lines):
        starts = line.startswith("    ") and i > 0 and not lines[i - 1].strip()
        if starts and _is_paragraph(above):
            found += ["::", ""]
        found.append(line)
        above = line if line.strip() else above
    return found


def _is_paragraph(line: str) -> bool:
    """Whether a line ends a paragraph, after which what is indented stands for itself."""
    ends_otherwise = line.endswith("::") or line.startswith((" ", "- ", "* ", ">>>")) or _SECTION.match(line)
    return bool(line) and not ends_otherwise


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what == "property" and lines:
        # Napoleon takes what stands before a colon there for a type.
        lines[0] = lines[0].replace(": ", " – ")
    lines[:] = with_literal_blocks(lines)


def _finish(app: Sphinx, doctree: nodes.document) -> None:
    for literal in doctree.findall(nodes.literal):
        if len(literal.astext()) <= _SHORT:
            literal["classes"].append("short")
    for text in list(doctree.findall(nodes.Text)):
        if text.astext() == " -- ":
            text.parent.replace(text, nodes.Text(" – "))


def setup(app: Sphinx) -> dict[str, Any]:
    """Run before napoleon, and once a page is read."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    app.connect("doctree-read", _finish)
    return {"version": "1", "parallel_read_safe": True}
