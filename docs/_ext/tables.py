"""Tables in the pages that are made from the program: `python docs/_ext/tables.py` writes them anew.

They are text of the pages, so that a page reads the same on the site and as a file. A table stands between two marks:

    <!-- table: aliases Axolotl -->
    <!-- end of table -->

A test compares them with the program. This needs no Sphinx.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(DOCS.parent / "src")]

from alias_text import meaning_text  # noqa: E402

from zotune.llm.config.aliases import alias_table  # noqa: E402

_TABLE = re.compile(r"(<!-- table: (\w+) (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """A page with its tables as the program makes them now."""
    return _TABLE.sub(lambda m: f"{m[1]}\n{_KINDS[m[2]](m[3])}\n\n{m[4]}", text)


def aliases(tool: str) -> str:
    """The names of a tool's options, and what zotune makes of each of them."""
    rows = [f"| `{n}` | {meaning_text(n).replace('|', chr(92) + '|')} |" for n in alias_table().tools[tool]]
    return "\n".join([f"| {tool} | zotune |", "|---|---|", *rows])


def listing(verb: str) -> str:
    """The rows that `zotune VERB --json` prints."""
    from zotune.cli.main import run

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run([verb, "--json"])
    rows = [f"| `{name}` | {text} |" for name, text in json.loads(printed.getvalue()).items()]
    return "\n".join(["| name | |", "|---|---|", *rows])


_KINDS = {"aliases": aliases, "list": listing}


def main() -> None:
    """Write the tables of all pages."""
    for page in DOCS.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        page.write_text(with_tables(text), encoding="utf-8")


if __name__ == "__main__":
    main()
