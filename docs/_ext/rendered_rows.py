"""The rows of `examples/data` as the built-in model reads them, in the pages of `docs/data` and as snapshots of tests.

A page has a mark `<!-- rendered: NAME -->`, blocks, and a mark `<!-- end -->`; the blocks are a row of the file, and
what the model reads of it with the scored text in ⟦ ⟧. A test compares both with the code. After a change that is meant
to alter them, write them anew:

    python docs/_ext/rendered_rows.py
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))

from zotune.llm.config.data import DataOptions  # noqa: E402
from zotune.llm.data.examples import Example  # noqa: E402
from zotune.llm.data.readers import LocatedRow, read_located_rows  # noqa: E402

DATA, PAGES, SNAPSHOTS = (
    ROOT / "examples" / "data",
    ROOT / "docs" / "data",
    ROOT / "tests" / "llm" / "rows" / "snapshots",
)
_MARK = re.compile(r"(<!-- rendered: (?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Rendered:
    """A file of `examples/data` and how it is read.

    Attributes:
        file: its name.
        options: options of `DataOptions`.
        template: the chat template in place of the model's own; empty for a model without one.
        shown: the rows that a page shows.
    """

    file: str
    options: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    shown: tuple[int, ...] = (0,)


_REVIEWS = {
    "text_column": "review",
    "label_column": "stars",
    "template": "{review} It was",
    "verbalizer": {"1": "terrible", "5": "great"},
}
RENDERED = {
    "reviews": Rendered("reviews.csv", _REVIEWS),
    "reviews-excel": Rendered("reviews-excel.csv", _REVIEWS),
    "capitals": Rendered("capitals.jsonl"),
    "answers": Rendered("answers.jsonl", shown=(1,)),
    "support": Rendered("support.jsonl", {"scored_turns": "all"}),
    "parts": Rendered("parts.jsonl"),
    "tools": Rendered(
        "tools.jsonl", {"scored_turns": "all"}, (ROOT / "examples" / "chatml-tools.jinja").read_text("utf-8")
    ),
    "consequences": Rendered("consequences.jsonl"),
    "instructions": Rendered("instructions.json"),
    "instructions-plain": Rendered("instructions.json", template="", shown=(0, 1)),
    "conversations": Rendered("conversations.json", {"scored_turns": "all"}),
    "stories": Rendered("stories.jsonl"),
    "capitals-chat": Rendered("capitals.jsonl", {"apply_chat_template": True, "system_prompt": "Answer in one word."}),
    "reviews-chat": Rendered("reviews.csv", {**_REVIEWS, "apply_chat_template": True}),
    "sums": Rendered("sums.jsonl", {"objective": "rewards:exact"}),
}
"""What is rendered, by the name in a mark."""


def tokenizer() -> Any:
    """Return the tokenizer of the built-in model."""
    from zotune.llm.checkpoints.no_code import read_tokenizer
    from zotune.llm.models.builtin import fetch

    return read_tokenizer(fetch("smollm2-135m"))


def examples(one: Rendered, tokenizer: Any) -> tuple[list[LocatedRow], tuple[Example, ...], tuple[str, ...]]:
    """Return the rows of a file, their examples, and the notes on them, with the name of the file for its path."""
    from zotune.llm.tasks.user_data import load_user_data

    tokenizer = copy(tokenizer)
    if one.template is not None:
        tokenizer.chat_template = one.template or None
    path = DATA / one.file
    data = load_user_data(DataOptions(eval_file=path, num_eval=None, **one.options), tokenizer)
    return list(read_located_rows(path)), data.splits.test, tuple(n.replace(str(path), one.file) for n in data.notes)


def marked(example: Example) -> str:
    """Return what a model reads, with the scored text in ⟦ ⟧; other candidates and references follow behind bars."""
    if not example.candidates:
        return f"{example.prompt}⟦⟧" + "".join(f" | {answer}" for answer in example.answers)
    if example.spans:
        text = example.prompt
        for start, end in reversed(example.spans):
            text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
        return text
    right, others = example.candidates[example.label], list(example.candidates)
    del others[example.label]
    return f"{example.prompt}⟦{right}⟧" + "".join(f" | ⟦{other}⟧" for other in others)


def snapshot(one: Rendered, tokenizer: Any) -> str:
    """Return all rows of a file as a model reads them, under the notes on them."""
    _, found, notes = examples(one, tokenizer)
    parts = [f"== {example.place.removeprefix(str(DATA) + '/')}\n{marked(example)}" for example in found]
    return "\n".join([*notes, *parts]) + "\n"


def blocks(one: Rendered, tokenizer: Any) -> str:
    """Return the blocks of a page: rows as they are written, each with what a model reads."""
    rows, found, _ = examples(one, tokenizer)
    kind = "json" if one.file.endswith(("json", "jsonl")) else "text"
    return "\n".join(
        f"```{kind}\n{_written(one, rows[i])}\n```\n\n```text\n{marked(found[i]).rstrip()}\n```\n" for i in one.shown
    )


def _written(one: Rendered, row: LocatedRow) -> str:
    """Return a row as it is written, with more lines if it is long; of a table with its header."""
    if not one.file.endswith(("json", "jsonl")):
        header, first, *_ = (DATA / one.file).read_text("utf-8-sig").splitlines()
        return f"{header}\n{first}"
    return _pretty(row.columns, "")


def _pretty(value: Any, indent: str) -> str:
    """Return JSON on one line, or on more of them if it is long."""
    line, inner = json.dumps(value, ensure_ascii=False), f"{indent}  "
    if len(indent + line) <= 120 or not isinstance(value, dict | list):
        return line
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_pretty(part, inner)}" for key, part in value.items()]
    else:
        parts = [_pretty(part, inner) for part in value]
    opened, closed = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([opened, *(f"{inner}{part}," for part in parts[:-1]), f"{inner}{parts[-1]}", f"{indent}{closed}"])


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the pages with marks, and their texts as they should be."""
    known = tokenizer()
    for path in sorted(PAGES.glob("*.md")):
        text = path.read_text("utf-8")
        yield path, _MARK.sub(lambda mark: f"{mark[1]}{blocks(RENDERED[mark['name']], known)}{mark[3]}", text)


def _write() -> None:
    SNAPSHOTS.mkdir(exist_ok=True)
    known = tokenizer()
    for name, one in RENDERED.items():
        (SNAPSHOTS / f"{name}.txt").write_text(snapshot(one, known), "utf-8")
    for path, text in pages():
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    _write()
