"""Remarks on the user's own rows: what in them may have been meant in another way than it was read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from zotune.errors import listed
from zotune.llm.config.data import DataOptions
from zotune.llm.data.control_tokens import control_tokens
from zotune.llm.data.examples import Example, Splits
from zotune.llm.data.readers import TABLES, kind_of
from zotune.llm.data.readers.delimited import DELIMITERS, delimiter_of
from zotune.llm.rows.cells import column_of
from zotune.llm.rows.infer import unread_columns
from zotune.llm.rows.labels import likeness
from zotune.llm.rows.records import Chat, Completion
from zotune.llm.rows.rendering import chat_template_of, is_written_as_chat
from zotune.llm.rows.shapes import SHAPES
from zotune.llm.rows.shapes.sharegpt import ends_open
from zotune.llm.rows.sources import UserRows

_SHOWN = 5


def near_equal(labels: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the groups of labels that are not equal, but look so.

    >>> near_equal(["bad", "good", "GOOD "])
    [('good', 'GOOD ')]
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        groups[likeness(label)].append(label)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def label_notes(options: DataOptions) -> list[str]:
    """Name the labels that look equal and are classes of their own."""
    words = options.verbalizer
    # Labels that were given one word are one class, and meant so.
    groups = [g for g in near_equal(words) if len({words[label].strip() for label in g}) > 1]
    return [
        f"the labels {', '.join(map(repr, group[:_SHOWN]))} look alike but are different labels, each a class of its "
        "own; if they are one, correct the rows or give all of them the same word with --verbalizer"
        for group in groups[:_SHOWN]
    ]


def control_token_notes(splits: Splits, options: DataOptions, tokenizer: Any) -> list[str]:
    """Say how the texts of control tokens in the rows were read; nothing without a tokenizer."""
    if tokenizer is None:
        return []
    every = [*splits.train, *splits.dev, *(splits.test if splits.test != splits.dev else ())]
    found = _TextsOfControlTokens(every, tokenizer)
    notes = []
    if found.num_literal:
        notes.append(
            f"{found.num_literal} of {len(every)} rows contain the text of control tokens "
            f"({', '.join(map(repr, sorted(found.literal)[:_SHOWN]))}), which is read as plain text; "
            "--read-control-tokens reads it as these tokens"
        )
    if found.num_begun:
        notes.append(
            f"{found.num_begun} of {len(every)} prompts start with {tokenizer.bos_token!r}, which the tokenizer adds "
            "too; it is read once"
        )
    if options.data_format in ("completion", "text") and not tokenizer.eos_token:
        what = "texts" if options.data_format == "text" else "completions"
        notes.append(
            f"the tokenizer has no end-of-text token, so the {what} have no end: the model does not learn to stop"
        )
    return notes


class _TextsOfControlTokens:
    """How many examples contain the text of control tokens, by how it is read."""

    def __init__(self, examples: Sequence[Example], tokenizer: Any) -> None:
        tokens = control_tokens(tokenizer)
        begin, end = tokenizer.bos_token or "", tokenizer.eos_token or ""
        adds_begin = bool(begin) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self.literal: set[str] = set()
        self.num_literal = self.num_begun = 0
        for example in examples:
            starts = bool(begin) and example.prompt.startswith(begin) and not (example.spans or example.rendered)
            self.num_begun += starts and adds_begin
            # A generated answer's end, and a text's beginning, are read as the tokens that belong there.
            candidate = example.candidates[0].removesuffix(end) if len(example.candidates) == 1 else ""
            text = example.prompt + candidate
            spans = tokens.literal(text, (*example.controls, *([(0, len(begin))] if starts else [])))
            self.literal |= {text[lo:hi] for lo, hi in spans}
            self.num_literal += bool(spans)


def ended_rows_notes(options: DataOptions, given: UserRows, tokenizer: Any) -> list[str]:
    """Count the completions that end in the end-of-text token already."""
    role = {"completion": "completion", "alpaca": "output"}.get(options.data_format or "")
    end = None if role is None else tokenizer.eos_token
    if role is None or not end:
        return []
    values = [row.columns.get(column_of(role, options)) for row in given.first.rows]
    texts = [value for value in values if isinstance(value, str)]
    ended = sum(text.rstrip().endswith(end) for text in texts)
    if not ended:
        return []
    return [f"{ended} of {len(texts)} completions end in {end!r} already, and are not given a second end of text"]


def shape_note(options: DataOptions, given: UserRows, tokenizer: Any) -> str:
    """Describe the sources, the shape of their rows, and how the model reads them."""
    sources = [rows.source for rows in (given.train, given.eval) if rows is not None]
    name = options.data_format or ""
    note = f"{' and '.join(map(str, sources))}: rows of {SHAPES[name].description} (data_format: {name})"
    separated = {d for source in sources if (d := _delimiter(source, options)) not in (None, ",")}
    for delimiter in sorted(separated):
        note += f", separated by {DELIMITERS.get(delimiter, repr(delimiter))}"
    record = SHAPES[name].to_record(given.first.rows[0], options)
    if isinstance(record, Completion) and record.user is not None:
        is_chat = is_written_as_chat(record, options, tokenizer)
        note += ", written with " + ("the model's chat template" if is_chat else "Alpaca's prompt (no chat template)")
    elif isinstance(record, Chat) and name not in ("chat", "sharegpt"):
        note += ", as messages of a chat"
    elif is_written_as_chat(record, options, tokenizer) and not isinstance(record, Chat):
        note += ", written with the model's chat template"
    if options.verbalizer:
        shown = [f"{label!r} → {word.strip()!r}" for label, word in options.verbalizer.items()]
        note += f"; labels {', '.join(shown[:5])}{f' and {len(shown) - 5} more' if len(shown) > 5 else ''}"
    return note


def chat_notes(options: DataOptions, given: UserRows, tokenizer: Any) -> list[str]:
    """Report the parts of chats that the model does not read: tools, and messages after the assistant's last turn."""
    rows, name = given.first.rows, options.data_format or ""
    notes = []
    with_tools = sum(bool(row.columns.get(column_of("tools", options))) for row in rows)
    if "tools" in SHAPES[name].optional and with_tools and not chat_template_of(options, tokenizer).writes_tools:
        notes.append(f"{with_tools} of {len(rows)} rows name tools, which the model's chat template does not write")
    left = sum(ends_open(row, options) for row in rows) if name == "sharegpt" and not options.is_function else 0
    if left:
        notes.append(
            f"{left} of {len(rows)} conversations go on after the assistant's last turn; the rest is left out, because "
            "nothing is learnt from it"
        )
    return notes


def _delimiter(source: str | Path, options: DataOptions) -> str | None:
    """Return what separates the cells of a source that is a table of text."""
    is_table = isinstance(source, Path) and kind_of(source) in TABLES
    return delimiter_of(Path(source), options.delimiter) if is_table else None


def unread_notes(options: DataOptions, given: UserRows) -> list[str]:
    """Name the columns that nothing reads; a reward function sees all of them."""
    names = [] if options.reads_columns else unread_columns(given.first.rows, options)
    if not names:
        return []
    return [f"not read: the column{'s' * (len(names) > 1)} {listed(map(repr, names), _SHOWN)}"]
