"""The directive {zotune-aliases} TOOL: the names of a tool's options, and what zotune makes of each of them.

The rows come from the table that the recipe reader and the command line use, `zotune/llm/config/aliases.toml`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from alias_text import meaning_text
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from zotune.llm.config.aliases import alias_table


class Aliases(SphinxDirective):
    """The table of one tool."""

    required_arguments = 1
    final_argument_whitespace: ClassVar[bool] = True
    has_content = False

    def run(self) -> list[nodes.Node]:
        """As Sphinx asks."""
        tool = self.arguments[0]
        rows = [f"| `{n}` | {meaning_text(n).replace('|', chr(92) + '|')} |" for n in alias_table().tools[tool]]
        return self.parse_text_to_nodes("\n".join([f"| {tool} | zotune |", "|---|---|", *rows]))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("zotune-aliases", Aliases)
    return {"version": "1", "parallel_read_safe": True}
