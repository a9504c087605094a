"""The rows of a run before it starts: as tokens, as text that a reader can check, and the reasons for those refused."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.examples import Example
from zotune.llm.data.tokenization import Encoded, Encoder, LongRowError, check_distinct
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.rows.sources import RowStreams
from zotune.llm.tasks.load_data import encode_rows, encoder_of
from zotune.llm.tasks.streaming import count_rows
from zotune.llm.tasks.user_data import Data

SHOWN_EXAMPLES, SHOWN_CHARACTERS = 3, 2000
SPLITS = ("train", "dev", "test")


class EncodedRows:
    """The rows of all splits as tokens, and the reasons for rows that are refused."""

    def __init__(self, lm: LanguageModel, config: DataOptions, data: Data) -> None:
        self._encode, self._drops = encoder_of(lm, config), config.long_rows == "drop"
        self._whole = Encoder(
            lm.tokenizer, masked=lm.masked, context=1 << 60, max_length=None, classifies=lm.classifies
        )
        self.encoded: dict[str, list[Encoded]] = {}
        self.lengths: list[int] = []
        self.refused: list[str] = []
        self.shown: list[str] = []
        self.num_cut = self.num_dropped = 0
        self.notes: tuple[str, ...] = ()
        if config.packing:
            self._read_windows(lm, config, data)
            return
        for name in SPLITS:
            examples: tuple[Example, ...] = getattr(data.splits, name)
            if name == "test" and examples == data.splits.dev:
                self.encoded[name] = self.encoded["dev"]
                continue
            every = [self._encode_row(e, e.place or f"{name} row {i}") for i, e in enumerate(examples, start=1)]
            self.encoded[name] = [encoded for encoded in every if encoded is not None]
            if name == "train":
                self.num_train = len(examples) - self.num_dropped
                pairs = [(e, x) for e, x in zip(examples, every, strict=True) if x is not None][:SHOWN_EXAMPLES]
                self.shown = [marked_text(lm, e, x) for e, x in pairs]

    def _read_windows(self, lm: LanguageModel, config: DataOptions, data: Data) -> None:
        """Read plain texts as the windows that packing makes of them."""
        rows = encode_rows(lm, config, data)
        self.notes, self.num_train = rows.notes[len(data.notes) :], len(rows.train)
        self.encoded = {name: list(getattr(rows, name)) for name in SPLITS}
        self.lengths = [e.length for encoded in self.encoded.values() for e in encoded]
        self.shown = [marked_text(lm, data.splits.train[0], e) for e in rows.train[:SHOWN_EXAMPLES]]

    def count_stream(self, lm: LanguageModel, config: DataOptions, data: Data, stream: RowStreams) -> None:
        """Count the training rows of a stream, of which only the first ones are in `data`."""
        assert data.to_example is not None
        of_first = self.num_train
        self.num_train = count_rows(encoder_of(lm, config), stream, data.to_example, config)
        if self.num_train > of_first:
            first = f"the first {len(data.splits.train)} rows stand for all, except for their number (streaming)"
            self.notes += (f"{stream.source}: {first}",)

    def _encode_row(self, example: Example, where: str) -> Encoded | None:
        try:
            whole = self._whole(example, where)
            self.lengths.append(whole.length)
            encoded = self._encode(example, where)
            if example.place:
                check_distinct(encoded, example)
        except LongRowError as error:
            self.num_dropped += self._drops
            self.refused += [] if self._drops else [str(error)]
            return None
        except UsageError as error:
            self.refused.append(str(error))
            return None
        self.num_cut += encoded.sequences != whole.sequences or encoded.prompt != whole.prompt
        return encoded


def marked_text(lm: LanguageModel, example: Example, encoded: Encoded) -> str:
    """An example as the model reads it, decoded from its tokens, with the scored text in ⟦ ⟧.

    The right candidate stands in its place; the others follow, each behind a bar. A prompt for generated text has an
    empty ⟦⟧, followed by the reference answers.
    """
    if not encoded.candidates:
        prompt = _shortened(lm.tokenizer.decode(list(encoded.prompt)))
        return f"{prompt}⟦⟧" + "".join(f" | {answer}" for answer in example.answers)
    if lm.classifies:
        texts = [example.prompt, *([example.second] if example.second else [])]
        return f"{_shortened(' / '.join(texts))} ⟦{example.candidates[example.label]}⟧"
    others = [c for i, c in enumerate(encoded.candidates) if i != encoded.label]
    right = encoded.candidates[encoded.label]
    tokens: list[int | None] = [*encoded.sequences[right.sequence], *([] if lm.masked else [None])]
    places = [p + (not lm.masked) for p in right.positions]
    for place, token in zip(places, right.tokens, strict=True):
        tokens[place] = token
    runs = groupby(range(len(tokens)), key=set(places).__contains__)
    parts = [(is_scored, lm.tokenizer.decode([tokens[i] for i in run])) for is_scored, run in runs]
    text = "".join(f"⟦{part}⟧" if is_scored else _shortened(part) for is_scored, part in parts)
    return text + "".join(f" | ⟦{lm.tokenizer.decode(list(c.tokens))}⟧" for c in others)


def _shortened(text: str) -> str:
    over = len(text) - SHOWN_CHARACTERS
    if over <= 0:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} [… {over} characters …] {text[-half:]}"


def quantiles(lengths: Sequence[int]) -> dict[str, float]:
    """The minimum, median, 95th percentile and maximum; all but the median are values of the list.

    >>> quantiles([3, 1, 2, 10])
    {'min': 1, 'median': 2.5, 'p95': 10, 'max': 10}
    """
    if not lengths:
        return {}
    p95 = int(np.percentile(lengths, 95, method="higher"))
    return {"min": min(lengths), "median": float(np.median(lengths)), "p95": p95, "max": max(lengths)}
