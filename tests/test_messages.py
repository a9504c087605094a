"""Text from files shows on a terminal, and in Markdown, as the characters that it is; nothing of it is obeyed."""

import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from zotune.messages import markdown_text, one_line, printable, say

# What a terminal or an editor takes for a command, by Unicode's own tables.
_BIDIRECTIONAL = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
ATTACKS = ("\x1b]0;title\x07", "\x1b[2J\x1b[H", "\x9b31m", "a\rb", "\b\b", "\u202eexe.txt", "\u2028", "\ud800", "\x7f")


def is_obeyed(character):
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or (
        unicodedata.bidirectional(character) in _BIDIRECTIONAL
    )


@given(st.text(st.characters()))
@example("".join(ATTACKS))
@example("µ é 日本 🙂 \t\n")
def test_no_character_of_printable_text_is_obeyed_by_a_terminal(text):
    shown = printable(text)
    assert not [c for c in shown if is_obeyed(c) and c not in "\n\t"]
    assert not [c for c in one_line(text) if is_obeyed(c)]
    if not any(is_obeyed(c) and c not in "\n\t" for c in text) and text.isprintable():
        assert shown == text


@pytest.mark.parametrize("attack", ATTACKS, ids=ascii)
def test_messages_show_control_characters_as_escapes(attack, capsys):
    say(f"a{attack}b")
    assert capsys.readouterr().err == f"a{attack.encode('unicode_escape').decode()}b\n"


class _Cell(HTMLParser):
    """The text of the second row's first cell of a page, and all its tags."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self._cells = set(), "", 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self._cells += tag == "td"

    def handle_data(self, data):
        self.text += data if self._cells == 1 else ""


MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


@given(st.text("ab \\`*_{}[]()<>#+-.!|~&;:/\"'=\n\t\x1b$^", max_size=30))
@example("[a](http://x) ![i](y) <b>x</b> <script>alert(1)</script> `c` *e* _f_ ~~g~~ | h &lt; &amp;")
def test_markdown_shows_text_as_it_is(text):
    """Held against a renderer: a cell of a table has the text's characters, and no tag but those of a table."""
    cell = _Cell(MARKDOWN.render(f"| head | two |\n|---|---|\n| {markdown_text(text)} | x |\n"))
    assert cell.tags <= {"table", "thead", "tbody", "tr", "th", "td"}
    assert cell.text.split() == one_line(text).split()
