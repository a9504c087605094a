"""Examples: a prompt, candidate continuations and the right one; and the splits of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zotune.llm.data.readers import Row as Row


@dataclass(frozen=True)
class Example:
    """One example of a task.

    Attributes:
        prompt: the text that the model reads.
        candidates: texts that may follow the prompt, with their leading space; for a classification head the names of
            the labels; empty if a reward function judges generated text.
        label: index of the right candidate; if several are right, index of the one to train on.
        suffix: text after the candidate in the sentence of a masked language model; causal models do not read it.
        also_right: indices of other candidates that count as right.
        answers: all accepted answers, if the answer is generated; the only candidate is then the first of them.
        text_limit: (n, k): a masked language model reads at most k tokens of the prompt's first n characters.
        second: the second text for a classification head, read as `<s> prompt </s></s> second </s>`.
        spans: for a chat, the (start, end) of the characters to score in the prompt, which is the whole chat as
            rendered by its template, with special tokens. The only candidate is then empty. If an answer is to be
            generated, the span is its position at the end.
        controls: the (start, end) of the characters of the prompt, followed by the candidate, in which the texts of
            control tokens are read as these tokens; elsewhere they are plain text.
        rendered: whether a chat template wrote prompt and candidates, so that they contain all special tokens.
        columns: the row's columns, for a reward or a metric that reads them.
        place: file and line of the row, for messages.
    """

    prompt: str
    candidates: tuple[str, ...]
    label: int
    suffix: str = ""
    also_right: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    text_limit: tuple[int, int] | None = None
    second: str | None = None
    spans: tuple[tuple[int, int], ...] = ()
    controls: tuple[tuple[int, int], ...] = field(default=(), compare=False)
    rendered: bool = False
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class Splits:
    """Training rows, rows held out of them to choose hyper-parameters, and evaluation rows to report on."""

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
