"""The examples of a split as tokens: rows that are too long are cut or left out and counted, plain texts are packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.examples import Example
from zotune.llm.data.packing import DEFAULT_LENGTH, packed
from zotune.llm.data.tokenization import Encoded, Encoder, LongRowError, check_distinct


@dataclass(frozen=True)
class EncodedSplit:
    """A split as tokens.

    Attributes:
        rows: the rows that the model reads; windows of several texts with packing.
        kept: the index of the example of each row; empty with packing.
        num_cut: rows that lost tokens because they are too long; num_dropped: rows that were left out for it.
    """

    rows: tuple[Encoded, ...] = ()
    kept: tuple[int, ...] = ()
    num_cut: int = 0
    num_dropped: int = 0


def encode_split(encode: Encoder, examples: Sequence[Example], options: DataOptions, name: str) -> EncodedSplit:
    """Tokenise the examples of a split; the same example is tokenised once, however often it occurs.

    Raises:
        UsageError: a row does not fit the model; the message says which and why.
    """
    if options.packing:
        return EncodedSplit(tuple(packed(map(encode.document, examples), window_length(encode, options))))
    known: dict[int, Encoded | None] = {}
    for i, example in enumerate(examples, start=1):
        if id(example) not in known:
            known[id(example)] = encode_row(encode, example, options, example.place or f"{name} row {i}")
    found = [(i, encoded) for i, e in enumerate(examples) if (encoded := known[id(e)]) is not None]
    return EncodedSplit(
        tuple(encoded for _, encoded in found),
        tuple(i for i, _ in found),
        sum(encoded.num_cut > 0 for _, encoded in found),
        len(examples) - len(found),
    )


def encode_row(encode: Encoder, example: Example, options: DataOptions, where: str) -> Encoded | None:
    """Return an example as tokens, or None if it is too long and such rows are dropped."""
    try:
        encoded = encode(example, where)
    except LongRowError:
        if options.long_rows != "drop":
            raise
        return None
    # The prompts and labels of tasks need no check.
    if options.task is None:
        check_distinct(encoded, example)
    return encoded


def window_length(encode: Encoder, options: DataOptions) -> int:
    """Return how many tokens a window of packed texts reads.

    Raises:
        UsageError: the model reads fewer than are asked for.
    """
    if options.max_length is not None and options.max_length > encode.context:
        raise UsageError(
            f"--packing makes windows of --max-length {options.max_length} tokens, but the model reads at most "
            f"{encode.context}. Lower --max-length."
        )
    return options.max_length or min(DEFAULT_LENGTH, encode.context)


def held_out_windows(train: EncodedSplit) -> tuple[EncodedSplit, EncodedSplit]:
    """Split the windows of too few texts to hold one out: the last fifth of them is held out."""
    num_dev = len(train.rows) // 5
    cut = len(train.rows) - num_dev
    return EncodedSplit(train.rows[:cut]), EncodedSplit(train.rows[cut:])


def check_some_left(splits: dict[str, EncodedSplit]) -> None:
    """Check that rows are left of each split that had some.

    Raises:
        UsageError: all of them are too long.
    """
    for name, split in splits.items():
        if split.num_dropped and not split.rows:
            raise UsageError(
                f"all {split.num_dropped} rows {_NAMES[name]} are too long, so --long-rows drop leaves none. Raise "
                "--max-length, or give --long-rows truncate."
            )


def notes_on_length(splits: dict[str, EncodedSplit], encode: Encoder, options: DataOptions) -> list[str]:
    """Say how many rows were cut or left out because they are too long, and how many windows packing makes."""
    if options.packing:
        counts = ", ".join(f"{len(split.rows)} {_NAMES[name]}" for name, split in splits.items() if split.rows)
        length = window_length(encode, options)
        return [f"the texts are cut into windows of {length} tokens, across their ends (packing): {counts}"]
    notes = []
    total = sum(len(split.rows) + split.num_dropped for split in splits.values())
    num_cut, num_dropped = (sum(getattr(s, key) for s in splits.values()) for key in ("num_cut", "num_dropped"))
    if num_cut:
        notes.append(f"{num_cut} of {total} rows are longer than {encode.limit} tokens and were cut to it")
    if num_dropped:
        notes.append(f"{num_dropped} of {total} rows are longer than {encode.limit} tokens and were left out")
    return notes


_NAMES = {"train": "to train on", "dev": "held out", "test": "for evaluation"}
