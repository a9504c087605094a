"""Activations below the lowest tuned layer, computed once per sequence and kept.

Where all tuned parameters lie in the last layers of a stack, what enters those layers is the same in
every forward pass of a sequence. It is computed at the first one and kept; later passes give it to the
lowest tuned layer and let the layers below pass their input on. No model code is involved: the layers
are found in the model, and their `forward` is replaced for the duration of a call.

A matrix product may sum in another order for another shape, so a sequence's activations depend in their
last bits on the batch that they are computed in. Here that batch is always the same one, the sequence's
group: a few neighbours when a split's sequences are sorted by length. It is so whether the outcome is kept
or not, so a score is the same to the bit with and without reuse, and whatever has found room.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zotune.llm.data.tokenization import Batch
from zotune.llm.models.cache_storage import Kept
from zotune.llm.models.load import LanguageModel
from zotune.llm.models.partial_forward import entered, output_of
from zotune.model.layers import stack_of
from zotune.model.parameters import ParameterSet

Tokens = tuple[int, ...]

# So many that a matrix product is efficient, so few that a group costs little where it must be computed again.
GROUP_TOKENS = 256


def lowest_tuned_layer(model: nn.Module) -> int:
    """How many layers lie below everything that is tuned; 0 where something else below the stack is tuned.

    What comes after the stack (final norm, an untied head) counts as above it.
    """
    path, layers = stack_of(model)
    lowest = len(layers)
    below = parameters_below(model, layers)
    for tensor in ParameterSet(model):
        places = [name for name, p in model.named_parameters(remove_duplicate=False) if p is tensor.parameter]
        for place in places:
            if place.startswith(f"{path}."):
                lowest = min(lowest, int(place[len(path) + 1 :].split(".")[0]))
        if id(tensor.parameter) in below:
            return 0
    return lowest


def parameters_below(model: nn.Module, layers: Sequence[nn.Module]) -> set[int]:
    """Identities of the parameters read before the stack: those of the modules that a forward pass enters before it."""
    before = [m for m in entered(model, lambda module: module is layers[0]) if m is not layers[0]]
    return {id(p) for module in before for p in module.parameters(recurse=False)}


def groups_of(sequences: Iterable[Tokens]) -> list[tuple[Tokens, ...]]:
    """The sequences, each once, by length and in groups of at most `GROUP_TOKENS` padded tokens or of one sequence.

    >>> [[len(s) for s in group] for group in groups_of([(1,) * 100, (2,) * 90, (3,) * 300, (4,) * 10])]
    [[10, 90], [100], [300]]
    """
    groups: list[list[Tokens]] = []
    for s in sorted(set(sequences), key=lambda s: (len(s), s)):
        if groups and (len(groups[-1]) + 1) * len(s) <= GROUP_TOKENS:
            groups[-1].append(s)
        else:
            groups.append([s])
    return [tuple(group) for group in groups]


class ReusedActivations:
    """A language model's scores, its lower layers computed once a sequence as far as there is room to keep them.

    Args:
        lm: the model; what it tunes must not change afterwards.
        kept: where activations are kept; without a tier they are computed each time, with the same bits.
        splits: the sequences to come, split by split: no split's groups depend on the splits after it. A
            sequence of none is its own group.

    Attributes:
        depth: how many layers lie below everything that is tuned; where it is 0, scores are the model's own.
        num_layers: how many there are in all.
    """

    def __init__(self, lm: LanguageModel, kept: Kept, splits: Sequence[Iterable[Tokens]] = ()) -> None:
        _, layers = stack_of(lm.base)
        self.num_layers = len(layers)
        self.depth = 0 if tunes_outside(lm) else lowest_tuned_layer(lm.base)
        self._lm, self._layers, self._kept = lm, list(layers[: self.depth]), kept
        self._returns_tuple = False
        self._group_of: dict[Tokens, tuple[Tokens, ...]] = {}
        for split in splits:
            new = [s for s in split if s not in self._group_of]
            self._group_of |= {s: group for group in groups_of(new) for s in group}

    def score(self, batch: Batch) -> Tensor:
        """As `LanguageModel.score`, up to the last bits of the lower layers' activations."""
        if self.depth == 0:
            return self._lm.score(batch)
        with self._starting_from(self._entering(batch)):
            return self._lm.score(batch)

    @property
    def num_bytes(self) -> int:
        """What keeping all of the splits takes, about."""
        size: int = self._lm.base.dtype.itemsize * self._lm.config.hidden_size
        return size * sum(map(len, self._group_of))

    def _entering(self, batch: Batch) -> Tensor:
        """(S, L, width): what enters the lowest tuned layer; zeros at padding, which no scored position sees."""
        found: dict[Tokens, Tensor] = {}
        for s in batch.sequences:
            kept = found.get(s)
            kept = self._kept.get(s) if kept is None else kept
            if kept is not None:
                found[s] = kept
                continue
            fresh = self._compute(self._group_of.get(s, (s,)))
            for one, activation in fresh.items():
                self._kept.put(one, activation)
            found |= fresh
        return torch.nn.utils.rnn.pad_sequence([found[s] for s in batch.sequences], batch_first=True)

    def _compute(self, group: Sequence[Tokens]) -> dict[Tokens, Tensor]:
        """(L, width) for each sequence of a group: one forward pass of it through the lower layers alone."""
        with torch.no_grad():
            inputs = padded(group, self._lm.pad_token_id, self._lm.device)
            output = output_of(self._layers[-1], lambda: self._lm.read(*inputs))
        self._returns_tuple = isinstance(output, tuple)
        activations: Tensor = output[0] if self._returns_tuple else output
        return {s: activation[: len(s)] for s, activation in zip(group, activations, strict=True)}

    @contextmanager
    def _starting_from(self, entering: Tensor) -> Iterator[None]:
        """Within this context the lower layers pass their input on, and the last of them gives `entering`."""

        def wrap(value: Any) -> Any:
            return (value,) if self._returns_tuple else value

        own = [vars(layer).get("forward") for layer in self._layers]
        for layer in self._layers[:-1]:
            layer.forward = lambda hidden_states, *args, **kwargs: wrap(hidden_states)
        self._layers[-1].forward = lambda *args, **kwargs: wrap(entering)
        try:
            yield
        finally:
            _restore(self._layers, own)


def padded(sequences: Sequence[Tokens], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(S, L) token ids, padded on the right, and the mask of what is no padding.

    >>> padded([(5, 6), (7,)], 0, torch.device("cpu"))
    (tensor([[5, 6],
            [7, 0]]), tensor([[1, 1],
            [1, 0]]))
    """
    length = max(map(len, sequences))
    ids = [[*s, *[pad_token_id] * (length - len(s))] for s in sequences]
    mask = [[1] * len(s) + [0] * (length - len(s)) for s in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def tunes_outside(lm: LanguageModel) -> bool:
    """Whether something is tuned that is no part of the model itself: virtual tokens reach all its layers."""
    inside = {id(p) for p in lm.base.parameters()}
    return any(p.requires_grad and id(p) not in inside for p in lm.module.parameters())


def _restore(layers: Sequence[nn.Module], own: Sequence[Any]) -> None:
    for layer, forward in zip(layers, own, strict=True):
        if forward is None:
            del layer.forward
        else:
            layer.forward = forward
