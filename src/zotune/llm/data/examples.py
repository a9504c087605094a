"""Examples: a prompt, the candidates that may follow it, and the right one; and the splits that a run reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from zotune.llm.data.readers import Row as Row


@dataclass(frozen=True)
class Example:
    """One example of a task.

    Attributes:
        prompt: what the model reads.
        candidates: texts that may follow it, with their leading space; the labels' names for a classification head;
            none where text is generated for a function to judge.
        label: index of the right candidate; of the one that is trained on, where several are right.
        suffix: what follows the candidate in a masked language model's sentence; causal models never see it.
        also_right: indices of other candidates that count as right.
        answers: where the answer is generated rather than chosen, every accepted one; the one candidate is the first.
        text_limit: (n, k): of the prompt's first n characters a masked language model reads at most k tokens.
        second: the second text of a classification head's pair, read as `<s> prompt </s></s> second </s>`.
        spans: of a chat, whose prompt is the whole of it as its template writes it, special tokens and all: the
            (start, end) of the characters that are scored. The one candidate has no text of its own. Where an answer
            is to be generated, its place at the end.
        place: where the row stands, for messages.
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
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class Splits:
    """Rows to train on, rows held out of them to choose hyper-parameters on, and rows to report on."""

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
