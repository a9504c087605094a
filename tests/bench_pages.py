"""A reader of the HTML pages that the benchmark writes, which holds them to what every page must have."""

import re
from html.parser import HTMLParser

LOADS = r"""(?:src|action|<link[^>]*href)\s*=\s*["']?\s*(?!["']?(?:\#|data:))|url\(|@import|<script|<iframe|<object"""
OUTSIDE = re.compile(LOADS, re.IGNORECASE)


class Reader(HTMLParser):
    """Tags and ids of a page, and whether every tag that must be closed is."""

    VOID = {"meta", "link", "br", "img", "input", "hr"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.headings, self.regions, self._open = [], [], [], [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


def sound(text):
    """The page has what every page must have, and asks for nothing from outside."""
    assert not OUTSIDE.search(text), OUTSIDE.search(text)
    read = Reader(text)
    assert len(read.ids) == len(set(read.ids))
    # No heading skips a level.
    assert read.headings[0] == 1
    assert all(b - a <= 1 for a, b in zip(read.headings, read.headings[1:], strict=False))
    addresses = [a["href"] for tag, a in read.tags if tag == "a"]
    assert {address[1:] for address in addresses if address.startswith("#")} <= set(read.ids)
    # All other links lead to files beside the page.
    assert not [address for address in addresses if re.match(r"\s*([a-z][a-z0-9+.-]*:|//)", address, re.IGNORECASE)]
    named = [a["aria-labelledby"] for _, a in read.tags if "aria-labelledby" in a]
    assert set(named) <= set(read.ids)
    # Tables wider than the window scroll in a region that the keyboard reaches.
    regions = sum(a.get("role") == "region" and a.get("tabindex") == "0" for _, a in read.tags)
    assert regions == sum(tag == "table" for tag, _ in read.tags)
    return read
