"""Remarks on the user's own rows: what in them may have been meant in another way than it was read."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from zotune.llm.config.data import DataOptions
from zotune.llm.data.control_tokens import control_tokens
from zotune.llm.data.examples import Example, Splits

_SHOWN = 5


def likeness(label: str) -> str:
    r"""Return what near-equal labels have in common: no case, spaces, invisible characters or forms of numbers.

    >>> [likeness(label) for label in ("good", " GOOD", "go\u200bod", "1", "1.0", "true", "True")]
    ['good', 'good', 'good', '1', '1', 'true', 'true']
    """
    visible = "".join(c for c in unicodedata.normalize("NFKC", label) if unicodedata.category(c) not in ("Cf", "Cc"))
    same = " ".join(visible.split()).casefold()
    with suppress(ValueError, OverflowError):
        number = float(same)
        return str(int(number)) if number.is_integer() else str(number)
    return same


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
    if options.data_format == "completion" and not tokenizer.eos_token:
        notes.append(
            "the tokenizer has no end-of-text token, so the completions have no end: the model does not learn to stop"
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
            starts = bool(begin) and example.prompt.startswith(begin) and not example.spans
            self.num_begun += starts and adds_begin
            # A generated answer's end, and a text's beginning, are read as the tokens that belong there.
            candidate = example.candidates[0].removesuffix(end) if len(example.candidates) == 1 else ""
            text = example.prompt + candidate
            spans = tokens.literal(text, (*example.controls, *([(0, len(begin))] if starts else [])))
            self.literal |= {text[lo:hi] for lo, hi in spans}
            self.num_literal += bool(spans)


def ended_rows_note(values: Iterable[Any], end: str | None) -> list[str]:
    """Count the completions that end in the end-of-text token already."""
    texts = [value for value in values if isinstance(value, str)]
    ended = sum(bool(end) and text.rstrip().endswith(str(end)) for text in texts)
    if not ended:
        return []
    return [f"{ended} of {len(texts)} completions end in {end!r} already, and are not given a second end of text"]
