"""Looks at the pages as they were built: every local link and anchor leads somewhere, and nothing is loaded from afar.

Sphinx itself checks the links that it resolves. This also sees those of raw HTML, images, style sheets and scripts, and
would see a theme that begins to fetch fonts. What it finds is a warning, and `make docs` takes warnings for errors.
"""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sphinx.application import Sphinx
from sphinx.util import logging

_LOGGER = logging.getLogger(__name__)
# Attributes by which a page makes a browser load something.
_LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
_NOT_LOADED = ("canonical", "author", "license")


class Page(HTMLParser):
    """The anchors of a page, its links, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag names and what it refers to."""
        found = dict(attrs)
        self.anchors |= {v for k, v in attrs if k in ("id", "name") and v}
        target = found.get(_LOADS.get(tag, ""))
        if target and not set((found.get("rel") or "").split()) & set(_NOT_LOADED):
            self.loads.append(target)
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))


def faults(folder: Path) -> list[str]:
    """What is wrong with the pages of a folder, a line each."""
    pages = {path.resolve(): Page(path) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        where = path.relative_to(folder.resolve())
        for target in page.loads:
            if urlsplit(target).scheme in ("http", "https") or target.startswith("//"):
                found.append(f"{where} loads {target} from the network")
        for target in [*page.links, *page.loads]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            file = file / "index.html" if file.is_dir() else file
            if not file.exists():
                found.append(f"{where} links to {target}, which is not there")
            elif parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].anchors:
                found.append(f"{where} links to {target}, but that page has no such anchor")
    return found


def _check(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        for fault in faults(Path(app.outdir)):
            _LOGGER.warning("%s", fault)


def setup(app: Sphinx) -> dict[str, Any]:
    """Look once the build has ended."""
    app.connect("build-finished", _check)
    return {"version": "1", "parallel_read_safe": True}
