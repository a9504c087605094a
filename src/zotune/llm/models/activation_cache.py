"""A cache of the activations below the lowest tuned layer, computed once per sequence.

If all tuned parameters are in the last layers of a stack, the input of these layers is the same in every forward
pass of a sequence. The first pass computes and caches it; later passes start at the lowest tuned layer, and the
layers below return their input. The model's code is not changed: the `forward` of its layers is replaced during a
call. Layers that give more than their hidden states (router losses, position biases, attributes) always run.

A matrix product may sum in another order for another shape, so the last bits of a sequence's activations depend on
the batch in which they are computed. Here this batch is always the same, the sequence's group: a few neighbours
when the sequences of a split are sorted by length. This holds whether or not there is room in the cache, so a score
has the same bits with and without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zotune.llm.data.collator import Batch, on_device
from zotune.llm.models.activation_storage.folder import ActivationFolder
from zotune.llm.models.activation_storage.tiers import ActivationStore
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.partial_forward import output_of_module, parameters_read, reads_positions_alone
from zotune.messages import say
from zotune.model.effects import effect_of_layers
from zotune.model.layers import ReadTracer, stack_of
from zotune.model.parameters import ParameterSet, input_device

Tokens = tuple[int, ...]

# Enough tokens for an efficient matrix product, and few enough that recomputing a group is cheap.
GROUP_TOKENS = 256


def lowest_tuned_layer(model: nn.Module) -> int:
    """Return the number of layers below all tuned parameters; 0 if parameters before the stack are tuned.

    The modules after the stack (final norm, an untied head) count as above it.
    """
    path, layers = stack_of(model)
    tuned = {id(tensor.parameter) for tensor in ParameterSet(model)}
    if tuned & parameters_below(model, layers):
        return 0
    places = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in tuned]
    inside = [place.removeprefix(f"{path}.") for place in places if place.startswith(f"{path}.")]
    lowest = min((int(place.split(".")[0]) for place in inside), default=len(layers))
    return lowest and min(lowest, _lowest_read(model))


def _lowest_read(model: nn.Module) -> int:
    """Return how many layers run before the first tuned parameter is read, wherever it is held."""
    tuned = ParameterSet(model)
    with torch.no_grad(), ReadTracer(tuned) as seen:
        token = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
        on_meta_too(model, lambda: model(input_ids=token))
    return min(seen.first.values(), default=len(stack_of(model)[1]))


def depth_without_effects(lm: LanguageModel, depth: int, what: str, run: Callable[[], object]) -> int:
    """Return `depth` if the first hidden states after so many layers are all that these give to a pass, else 0.

    Args:
        lm: the model.
        depth: how many layers may be left out.
        what: what would be reused; where it is not, a message says so and why.
        run: runs a pass.
    """
    layers = stack_of(lm.base)[1][:depth]
    if not depth:
        return 0
    effect = effect_of_layers(lm.base, layers, lambda: on_meta_too(lm.base, run), first_of)
    if effect is None:
        return depth
    say(f"{what} are not reused: of the layers below the tuned parameters, {effect}. Every pass runs all layers.")
    return 0


def first_of(output: Any) -> Any:
    """Return the hidden states in a layer's output."""
    return output[0] if isinstance(output, tuple) else output


def on_meta_too(model: nn.Module, run: Callable[[], object]) -> None:
    """Run a pass; on `meta`, where no number is known, one that needs a number ends there without an error."""
    try:
        run()
    except (NotImplementedError, RuntimeError):
        if not any(p.is_meta for p in model.parameters()):
            raise


def parameters_below(model: nn.Module, layers: Sequence[nn.Module]) -> set[int]:
    """Return the ids of the parameters that a forward pass reads before the stack, or whose modules it enters there."""
    return parameters_read(model, lambda module: module is layers[0])


def groups_of(sequences: Iterable[Tokens]) -> list[tuple[Tokens, ...]]:
    """Group distinct sequences by length, at most `GROUP_TOKENS` padded tokens or a single sequence per group.

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


class SequenceCache:
    """Scores of a language model whose lower layers are computed once per sequence, as far as the cache has room.

    Args:
        lm: the model; the set of tuned parameters must not change afterwards.
        store: storage of the activations; without a tier they are recomputed each time, with the same bits.
        splits: the sequences to come, split by split: the groups of a split do not depend on later splits. A
            sequence of no split is its own group.
        folder: a folder in which runs of the same model and rows share the activations.

    Attributes:
        depth: number of layers below all tuned parameters; if it is 0, scores are computed without a cache.
        num_layers: number of layers in all.
    """

    def __init__(
        self,
        lm: LanguageModel,
        store: ActivationStore,
        splits: Sequence[Iterable[Tokens]] = (),
        folder: Path | None = None,
    ) -> None:
        _, layers = stack_of(lm.base)
        self.num_layers = len(layers)
        splits = [list(split) for split in splits]
        is_padded = lm.reads_padded(max((len(s) for split in splits for s in split), default=0))
        lowest = lowest_tuned_layer(lm.base) if is_padded and not tunes_outside_base(lm) else 0
        trial = padded([(0, 1, 2, 3), (0, 1)], lm.pad_token_id, lm.device)
        self.depth = depth_without_effects(lm, lowest, "activations", lambda: lm.read(*trial))
        self._lm, self._layers, self._store = lm, list(layers[: self.depth]), store
        self._shared = None if folder is None or not self.depth else ActivationFolder(folder, lm, self.depth)
        # Whether positions that nothing scores can be left out after the layers.
        self._positions_alone = (
            0 < self.depth == self.num_layers
            and not lm.classifies
            and reads_positions_alone(lm.base, layers[-1], lambda: on_meta_too(lm.base, lambda: lm.read(*trial)))
        )
        # What follows the hidden states in a layer's output, without its numbers; None for an output that is no tuple.
        self._rest: tuple[None, ...] | None = None
        self._group_of: dict[Tokens, tuple[Tokens, ...]] = {}
        for split in splits:
            new = [s for s in split if s not in self._group_of]
            self._group_of |= {s: group for group in groups_of(new) for s in group}

    def score(self, batch: Batch) -> Tensor:
        """Return `LanguageModel.score`, up to the last bits of the lower layers' activations."""
        if self.depth == 0:
            return self._lm.score(batch)
        activations = self._activations(batch.sequences)
        if self._positions_alone:
            batch, activations = _at_positions(batch, activations)
        with self._skip_to(torch.nn.utils.rnn.pad_sequence(activations, batch_first=True)):
            return self._lm.score(batch)

    @property
    def num_bytes(self) -> int:
        """About how many bytes the activations of all splits take."""
        size: int = self._lm.base.dtype.itemsize * self._lm.config.get_text_config().hidden_size
        return size * sum(map(len, self._group_of))

    def _activations(self, sequences: Sequence[Tokens]) -> list[Tensor]:
        """Return the (L, width) inputs of the lowest tuned layer of each sequence."""
        found: dict[Tokens, Tensor] = {}
        for s in sequences:
            cached = found.get(s)
            cached = self._store.get(s) if cached is None else cached
            if cached is not None:
                found[s] = cached
                continue
            fresh = self._compute(self._group_of.get(s, (s,)))
            for one, activation in fresh.items():
                self._store.put(one, activation)
            found |= fresh
        return [found[s] for s in sequences]

    def _compute(self, group: Sequence[Tokens]) -> dict[Tokens, Tensor]:
        """Return the (L, width) activations of each sequence, from one pass of the group through the lower layers."""
        found = None if self._shared is None else self._shared.get(group)
        if found is None:
            found = self._pass(group)
            if self._shared is not None:
                self._shared.put(group, *found)
        activations, rest = found
        self._rest = None if rest is None else (None,) * rest
        return dict(zip(group, activations, strict=True))

    def _pass(self, group: Sequence[Tokens]) -> tuple[tuple[Tensor, ...], int | None]:
        """Return the activations of a group, and how many values follow them in a layer's output if it is a tuple."""
        with torch.no_grad():
            inputs = padded(group, self._lm.pad_token_id, self._lm.device)
            output = output_of_module(self._layers[-1], lambda: self._lm.read(*inputs))
        activations: Tensor = first_of(output)
        rest = len(output) - 1 if isinstance(output, tuple) else None
        return tuple(own[: len(s)] for s, own in zip(group, activations, strict=True)), rest

    @contextmanager
    def _skip_to(self, inputs: Tensor) -> Iterator[None]:
        """Within this context the lower layers return their input, and the last of them returns `inputs`."""

        def wrap(value: Any) -> Any:
            return value if self._rest is None else (value, *self._rest)

        originals = [vars(layer).get("forward") for layer in self._layers]
        for layer in self._layers[:-1]:
            layer.forward = lambda hidden_states, *args, **kwargs: wrap(hidden_states)
        alone = self._lm.rows_alone
        self._layers[-1].forward = lambda *args, **kwargs: wrap(inputs if alone is None else alone.own(inputs))
        try:
            yield
        finally:
            _restore(self._layers, originals)


def _at_positions(batch: Batch, activations: Sequence[Tensor]) -> tuple[Batch, list[Tensor]]:
    """Return a batch whose rows are their scored positions alone, and the (n, width) activations of each row there.

    The tokens are some of each row: the layers, which would read them, do not run.
    """
    length = batch.input_ids.shape[1]
    scored: list[list[int]] = [[] for _ in activations]
    places = []
    for position in batch.positions.tolist():
        row, column = divmod(position, length)
        places.append((row, len(scored[row])))
        scored[row].append(column)
    width = max(map(len, scored))
    found = [own[columns] for own, columns in zip(activations, scored, strict=True)]
    ids, mask = batch.input_ids[:, :1].expand(-1, width), batch.attention_mask[:, :1].expand(-1, width)
    positions = on_device([row * width + slot for row, slot in places], batch.positions.device)
    return replace(batch, input_ids=ids, attention_mask=mask, positions=positions), found


def padded(sequences: Sequence[Tokens], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (S, L) token ids, padded on the right, and their attention mask.

    >>> padded([(5, 6), (7,)], 0, torch.device("cpu"))
    (tensor([[5, 6],
            [7, 0]]), tensor([[1, 1],
            [1, 0]]))
    """
    length = max(map(len, sequences))
    ids = [[*s, *[pad_token_id] * (length - len(s))] for s in sequences]
    mask = [[1] * len(s) + [0] * (length - len(s)) for s in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def tunes_outside_base(lm: LanguageModel) -> bool:
    """Whether tuned parameters lie outside the base model: virtual tokens, which affect all of its layers."""
    inside = {id(p) for p in lm.base.parameters()}
    return any(p.requires_grad and id(p) not in inside for p in lm.module.parameters())


def _restore(layers: Sequence[nn.Module], originals: Sequence[Any]) -> None:
    for layer, forward in zip(layers, originals, strict=True):
        if forward is None:
            del layer.forward
        else:
            layer.forward = forward
