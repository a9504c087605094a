"""Control tokens in text: the texts of a tokenizer's special tokens, and where they are read as these tokens.

A row may contain the characters of a control token, such as `</s>` or `<|im_end|>`. Read as the token, they would end
the text or a turn of a chat. So only texts that were written as control tokens are read as such: those of a template
of the user or of the model, and what the tokenizer adds. In the values of rows they are plain text, unless
`read_control_tokens` is set. Non-special added tokens are ordinary words of the vocabulary.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any

from zotune.errors import UsageError

Span = tuple[int, int]
Tokens = tuple[tuple[int, ...], tuple[Span, ...]]

EVERYWHERE: tuple[Span, ...] = ((0, 1 << 62),)
"""The spans in which control tokens are read if they are read in all of a text."""

# The last plane of Unicode is for private use: the characters of the stand-ins.
_PRIVATE = 0x100000
_FILLER = chr(0x10FFFD)


def control_tokens(tokenizer: Any) -> ControlTokens:
    """Return the control tokens of a tokenizer of transformers.

    >>> from zotune.llm.models.random_models import ARCHITECTURES, byte_tokenizer
    >>> sorted(control_tokens(byte_tokenizer(ARCHITECTURES["opt-tiny"]())).ids)
    ['</s>', '<mask>', '<pad>', '<s>', '<unk>']
    """
    return _control_tokens(tokenizer, len(tokenizer), tuple(tokenizer.all_special_tokens))


@lru_cache(maxsize=2)
def _control_tokens(tokenizer: Any, *_: object) -> ControlTokens:
    return ControlTokens(tokenizer)


class ControlTokens:
    """The control tokens of one tokenizer.

    Args:
        tokenizer: a tokenizer of transformers; tokens that are added to it later are not known here.

    Attributes:
        ids: the number of each control token by its text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special and t.content}
        named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        self.ids: dict[str, int] = {**dict(named), **added}
        longest_first = sorted(self.ids, key=lambda text: (-len(text), text))
        # An empty alternation would match everywhere.
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        # A stand-in is as long as its token, so that positions in the text stay the same.
        self._stand_ins = {text: _stand_in(i, len(text)) for i, text in enumerate(longest_first)}
        self._stood_for = {stand_in: text for text, stand_in in self._stand_ins.items()}

    def find(self, text: str) -> list[Span]:
        """Return the spans of the text that are the text of a control token."""
        return [match.span() for match in self._pattern.finditer(text)]

    def literal(self, text: str, controls: Sequence[Span]) -> list[Span]:
        """Return the spans that are the text of a control token, and lie outside `controls`."""
        return [span for span in self.find(text) if not _is_inside(span, controls)]

    def hide(self, text: str) -> str:
        """Replace the texts of control tokens by stand-ins of equal length, which no template knows.

        Raises:
            UsageError: the text already contains characters of stand-ins.
        """
        if not self._pattern.search(text):
            return text
        if any(ord(c) >= _PRIVATE for c in text):
            raise UsageError(
                "the text contains the text of a control token beside characters of the last private-use plane of "
                "Unicode (from U+100000), which stand for it here. Remove these characters, or give "
                "--read-control-tokens."
            )
        return self._pattern.sub(lambda match: self._stand_ins[match[0]], text)

    def show(self, text: str) -> tuple[str, tuple[Span, ...]]:
        """Replace stand-ins by their texts again; return the text and the spans in which control tokens are read."""
        pattern = re.compile("|".join(map(re.escape, self._stood_for)))
        hidden = [match.span() for match in pattern.finditer(text)]
        shown = pattern.sub(lambda match: self._stood_for[match[0]], text)
        ends = [0, *(end for _, end in hidden)]
        starts = [*(start for start, _ in hidden), len(shown)]
        return shown, tuple((lo, hi) for lo, hi in zip(ends, starts, strict=True) if lo < hi)

    def encode(self, text: str, controls: Sequence[Span], *, add_special_tokens: bool = True) -> Tokens:
        """Tokenise a text, with control tokens read within `controls` only.

        Returns:
            The ids, and for each the (start, end) of its characters; (0, 0) for tokens that the tokenizer adds.

        Raises:
            UsageError: the tokenizer cannot read the text of a control token as plain text, or gives no positions.
        """
        literal = self.literal(text, controls)
        read = [span for span in self.find(text) if span not in literal] if literal else []
        if read:
            ids, offsets = self._with_stand_ins(text, read, add_special_tokens)
        elif self._tokenizer.is_fast:
            options = {"split_special_tokens": True} if literal else {}
            found = self._tokenizer(
                text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False, **options
            )
            ids, offsets = tuple(found["input_ids"]), tuple(found["offset_mapping"])
        else:
            ids, offsets = self._aligned(text, add_special_tokens, bool(literal))
        self._check_plain(text, literal, ids, offsets)
        return ids, offsets

    def _with_stand_ins(self, text: str, read: Iterable[Span], add_special_tokens: bool) -> Tokens:
        """Tokenise with the control tokens in `read` replaced by stand-ins, the only ones that are then tokens."""
        if not self._tokenizer.is_fast:
            raise UsageError(
                "the text holds control tokens of the template beside the text of control tokens, which a tokenizer "
                "without a fast implementation cannot tell apart. Give --read-control-tokens, or remove the text."
            )
        if any(ord(c) >= _PRIVATE for c in text):
            raise UsageError(
                "the text contains characters of the last private-use plane of Unicode; remove them, or give "
                "--read-control-tokens."
            )
        pieces, end = [], 0
        for lo, hi in read:
            pieces += [text[end:lo], self._stand_ins[text[lo:hi]]]
            end = hi
        backend, ids_of = self._backend_of_stand_ins
        found = backend.encode("".join([*pieces, text[end:]]), add_special_tokens=add_special_tokens)
        return tuple(ids_of.get(i, i) for i in found.ids), tuple(found.offsets)

    @cached_property
    def _backend_of_stand_ins(self) -> tuple[Any, dict[int, int]]:
        """A copy of the tokenizer that knows the stand-ins in place of its control tokens, and the ids these stand for.

        The stand-ins are added tokens with the flags of the control tokens, except that they are not special: so they
        are still tokens when the text of special tokens is split like other text.
        """
        from tokenizers import AddedToken

        backend = copy.deepcopy(self._tokenizer.backend_tokenizer)
        flags = {t.content: t for t in self._tokenizer.added_tokens_decoder.values()}
        for text, stand_in in self._stand_ins.items():
            like = flags.get(text)
            names = ("lstrip", "rstrip", "single_word", "normalized")
            same = {} if like is None else {name: getattr(like, name) for name in names}
            backend.add_tokens([AddedToken(stand_in, special=False, **same)])
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        return backend, {backend.token_to_id(s): self.ids[text] for text, s in self._stand_ins.items()}

    def _aligned(self, text: str, add_special_tokens: bool, split: bool) -> Tokens:
        """Tokenise with a tokenizer that gives no positions: those of a token are what it adds to the decoded text."""
        tokenizer = self._tokenizer
        options = {"split_special_tokens": True} if split else {}
        bare = tuple(tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])
        ids = bare
        if add_special_tokens:
            ids = tuple(tokenizer(text, verbose=False, **options)["input_ids"])
        start = next((i for i in range(len(ids) - len(bare) + 1) if ids[i : i + len(bare)] == bare), None)
        ends = [len(tokenizer.decode(bare[: i + 1], clean_up_tokenization_spaces=False)) for i in range(len(bare))]
        if start is None or (bare and tokenizer.decode(bare, clean_up_tokenization_spaces=False) != text):
            raise UsageError(
                f"the tokenizer {type(tokenizer).__name__} has no fast implementation and does not give back "
                f"{text[:40]!r} as it was, so the tokens of a candidate cannot be located. Use a model with a "
                "tokenizer.json."
            )
        offsets = list(zip([0, *ends], ends, strict=False))
        return ids, ((0, 0),) * start + tuple(offsets) + ((0, 0),) * (len(ids) - start - len(bare))

    def _check_plain(self, text: str, literal: Sequence[Span], ids: Sequence[int], offsets: Sequence[Span]) -> None:
        """Check that plain text became no control token: some vocabularies hold them as ordinary pieces too."""
        known = {*self.ids.values()} - {self._tokenizer.unk_token_id}
        for lo, hi in literal:
            for i, (start, end) in zip(ids, offsets, strict=True):
                if i in known and start < hi and end > lo:
                    raise UsageError(
                        f"the text contains {text[lo:hi]!r}, which this tokenizer can only read as a control token. "
                        "Remove it, or give --read-control-tokens if it is meant as one."
                    )


def _stand_in(index: int, length: int) -> str:
    return chr(_PRIVATE + index) + _FILLER * (length - 1)


def _is_inside(span: Span, spans: Sequence[Span]) -> bool:
    return any(lo <= span[0] and span[1] <= hi for lo, hi in spans)
