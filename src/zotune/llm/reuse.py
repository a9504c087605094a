"""Activations below the lowest tuned layer, computed once per sequence and kept.

Where all tuned parameters lie in the last layers of a stack, what enters those layers is the same in
every forward pass of a sequence. It is computed at the first one and kept; later passes give it to the
lowest tuned layer and let the layers below pass their input on. No model code is involved: the layers
are found in the model, and their `forward` is replaced for the duration of a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zotune.llm.models import LanguageModel
from zotune.llm.objective import Batch
from zotune.tuned import TunedTensors


class _Reached(Exception):  # noqa: N818 - not an error: it ends a forward pass that has done its work
    pass


def layers_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of layers of a language model, and its path: the longest `ModuleList` that is not inside another."""
    stacks = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [(p, m) for p, m in stacks if not any(p.startswith(f"{q}.") for q, _ in stacks)]
    return max(outer, key=lambda found: len(found[1]))


def lowest_tuned_layer(model: nn.Module) -> int:
    """How many layers lie below everything that is tuned; 0 where something else below the stack is tuned.

    What comes after the stack (final norm, an untied head) counts as above it.
    """
    path, layers = layers_of(model)
    lowest = len(layers)
    below = parameters_below(model, layers)
    for tensor in TunedTensors(model):
        places = [name for name, p in model.named_parameters(remove_duplicate=False) if p is tensor.parameter]
        for place in places:
            if place.startswith(f"{path}."):
                lowest = min(lowest, int(place[len(path) + 1 :].split(".")[0]))
        if id(tensor.parameter) in below:
            return 0
    return lowest


def parameters_below(model: nn.Module, layers: nn.ModuleList) -> set[int]:
    """Identities of the parameters read before the stack: those of the modules that a forward pass calls before it.

    The order of registration does not tell: OPT registers its final norm before its layers.
    """
    below: set[int] = set()

    def note(module: nn.Module, args: Any) -> None:
        if module is layers[0]:
            raise _Reached
        below.update(id(p) for p in module.parameters(recurse=False))

    handles = [m.register_forward_pre_hook(note) for m in model.modules()]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return below


class ReusedActivations:
    """A language model's scores with the activations below its lowest tuned layer kept between calls.

    Args:
        lm: the model; what it tunes must not change afterwards.
        max_bytes: how much is kept at most; sequences beyond it are computed each time.
    """

    def __init__(self, lm: LanguageModel, max_bytes: int = 1 << 30) -> None:
        _, layers = layers_of(lm.base)
        self.depth = lowest_tuned_layer(lm.base)
        self._lm, self._layers = lm, list(layers[: self.depth])
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self._room = max_bytes
        self._returns_tuple = False

    def score(self, batch: Batch) -> Tensor:
        """As `LanguageModel.score`."""
        if self.depth == 0:
            return self._lm.score(batch)
        entering = self._entering(batch)
        with self._starting_from(entering):
            return self._lm.score(batch)

    def _entering(self, batch: Batch) -> Tensor:
        """(S, L, width): what enters the lowest tuned layer; zeros at padding."""
        found = [self._kept.get(s) for s in batch.sequences]
        if any(one is None for one in found):
            fresh = self._compute(batch)
            for i, sequence in enumerate(batch.sequences):
                if found[i] is None:
                    found[i] = fresh[i, : len(sequence)].clone()
                    self._keep(sequence, found[i])
        return torch.nn.utils.rnn.pad_sequence([one for one in found if one is not None], batch_first=True)

    def _keep(self, sequence: tuple[int, ...], activation: Any) -> None:
        size = activation.numel() * activation.element_size()
        if size <= self._room and sequence not in self._kept:
            self._room -= size
            self._kept[sequence] = activation

    def _compute(self, batch: Batch) -> Tensor:
        """A forward pass through the lower layers alone."""
        top = self._layers[-1]
        caught: list[Any] = []

        def catch(module: nn.Module, args: Any, output: Any) -> None:
            caught.append(output)
            raise _Reached

        handle = top.register_forward_hook(catch)
        try:
            with torch.no_grad():
                self._lm.logits(batch)
        except _Reached:
            pass
        finally:
            handle.remove()
        self._lm.num_forwards -= 1
        (output,) = caught
        self._returns_tuple = isinstance(output, tuple)
        activation: Tensor = output[0] if self._returns_tuple else output
        return activation

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


def _restore(layers: Sequence[nn.Module], own: Sequence[Any]) -> None:
    for layer, forward in zip(layers, own, strict=True):
        if forward is None:
            del layer.forward
        else:
            layer.forward = forward
