"""The common part of the entailment tasks SNLI, MNLI, RTE and CB: does a premise imply a hypothesis?

The masked form is that of Malladi et al. (2023), after Gao et al. (2021), "Making pre-trained language models
better few-shot learners"; the causal one, by Malladi et al., is CB's (RTE has its own).
"""

from __future__ import annotations

from collections.abc import Callable

from zotune.llm.data.examples import Example, Row

Labels = dict[str, str]
"""The names of the labels in the order of their numbers, with their words."""


def suppose(labels: Labels) -> Callable[[Row], Example]:
    """Return the causal form of CB."""

    def causal(row: Row) -> Example:
        """`Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?⏎` → `Yes` | `No` | `Maybe`."""
        question = f'Suppose {row["premise"]} Can we infer that "{row["hypothesis"]}"? Yes, No, or Maybe?\n'
        return Example(question, tuple(labels.values()), int(row["label"]))

    return causal


def fill_in(labels: Labels) -> Callable[[Row], Example]:
    """Return the masked form, which reads at most 240 tokens of the premise."""

    def masked(row: Row) -> Example:
        """`{premise without its last character}?[M], {hypothesis, first letter lower-cased}`."""
        premise, hypothesis = row["premise"][:-1], row["hypothesis"]
        return Example(
            f"{premise}?",
            tuple(f" {word}" for word in labels.values()),
            int(row["label"]),
            suffix=f", {hypothesis[:1].lower()}{hypothesis[1:]}",
            text_limit=(len(premise), 240),
        )

    return masked


def unaligned(labels: Labels) -> Callable[[Row], Example]:
    """Return the causal form without task alignment."""

    def plain(row: Row) -> Example:
        """`{premise}⏎"{hypothesis}"⏎` → the same words."""
        return Example(f'{row["premise"]}\n"{row["hypothesis"]}"\n', tuple(labels.values()), int(row["label"]))

    return plain


def pair(labels: Labels) -> Callable[[Row], Example]:
    """Return the form for a classification head."""

    def head(row: Row) -> Example:
        """Premise and hypothesis."""
        return Example(row["premise"], tuple(labels), int(row["label"]), second=row["hypothesis"])

    return head
