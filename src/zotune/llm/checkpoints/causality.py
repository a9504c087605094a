"""A causal language model predicts each token from those before it; here it is tried on two short sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zotune.errors import UsageError

# Rounding may differ between the rows of a batch, but by no more than this many units of the logits' precision.
_ROUNDING = 32


@torch.no_grad()
def check_causal(read: Callable[[Tensor], Tensor], vocabulary: int, name: str) -> None:
    """Check that no logits of a causal language model depend on a later token.

    Args:
        read: function from (S, L) tokens to (S, L, V) logits.
        vocabulary: number of tokens; the check uses up to six of them.
        name: the model's name, for errors.

    Raises:
        UsageError: an earlier position sees the last token.

    >>> check_causal(lambda ids: ids.cumsum(1)[:, :, None].float(), 10, "a sum")
    """
    *start, one, other = (max(0, vocabulary // 2 - 3 + i) % vocabulary for i in range(6))
    logits = read(torch.tensor([[*start, one], [*start, other]]))
    difference, size = (logits[0, :-1] - logits[1, :-1]).abs().max(), logits.abs().max()
    if difference > _ROUNDING * torch.finfo(logits.dtype).eps * size:
        raise UsageError(
            f"{name} cannot be read as a causal language model: its prediction of a token depends on the tokens after "
            "it, as those of an encoder or of a prefix language model do. Use a decoder, or the masked language model "
            "of this family."
        )
