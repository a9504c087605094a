"""Handing a text on while it is generated, through the streamer of transformers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """Where the text of one prompt goes while it is generated.

    Attributes:
        write: called with each further piece of the text, which begins with its first character that is no space.
        is_stopped: asked after each token; the text ends there if it returns True.
    """

    write: Callable[[str], None]
    is_stopped: Callable[[], bool] = lambda: False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return whether the text ends, as a stopping criterion of transformers."""
        return torch.full((len(input_ids),), self.is_stopped(), dtype=torch.bool, device=input_ids.device)


def streamer_of(stream: Stream, tokenizer: Any, ends: Collection[int]) -> Any:
    """Return the streamer of transformers that writes a text without its end tokens, which may be no special tokens."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        has_begun = False

        def put(self, value: Tensor) -> None:
            is_prompt = self.next_tokens_are_prompt
            if is_prompt or not any(int(token) in ends for token in value.flatten()):
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            piece = text if self.has_begun else text.lstrip()
            if piece:
                self.has_begun = True
                stream.write(piece)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
