"""A cache of prompts to generate from: the part below the lowest tuned layer is computed once per prompt.

It corresponds to `zotune.llm.models.activation_cache` for generated text. The lower layers turn a prompt into keys and
values, which generation caches, and into the input of the next layer; all of these are the same at each probe. The
first pass of a generation takes them from this cache and starts at the lowest tuned layer; later passes, of new tokens,
run through all layers. Each prompt is computed alone, so its bits do not depend on its batch, nor on the room in the
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zotune.llm.models.activation_cache import (
    depth_without_effects,
    first_of,
    lowest_tuned_layer,
    on_meta_too,
    tunes_outside_base,
)
from zotune.llm.models.activation_storage.tiers import ActivationStore
from zotune.llm.models.cache_argument import cache_argument, cache_in_call
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.partial_forward import output_of_module
from zotune.messages import say
from zotune.model.layers import stack_of

Tokens = tuple[int, ...]


class PromptCache:
    """A cache of the lower layers' keys, values and outputs for prompts, as far as there is room.

    Args:
        lm: the model; the set of tuned parameters must not change afterwards.
        store: storage of keys, values and activations; without a tier they are recomputed each time.

    Attributes:
        depth: number of layers below all tuned parameters; also 0 if a layer's cache is a sliding window, which does
            not
            hold the whole prompt.
        num_layers: number of layers in all.
    """

    def __init__(self, lm: LanguageModel, store: ActivationStore) -> None:
        from transformers import DynamicCache

        _, layers = stack_of(lm.base)
        slides = any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=lm.config).layers)
        self.num_layers = len(layers)
        self._lm, self._store = lm, store
        lowest = 0 if slides or tunes_outside_base(lm) else lowest_tuned_layer(lm.base)
        if lowest and not self._holds_keys_and_values(lowest):
            say("prompts are not reused: the model's cache holds more of them than keys and values.")
            lowest = 0
        self.depth = depth_without_effects(lm, lowest, "prompts", lambda: self._fill((0, 1, 2), _empty_cache()))
        self._layers = list(layers[: self.depth])
        self._rest: tuple[None, ...] | None = None
        self._heads: list[tuple[int, int]] = []

    @contextmanager
    def prefill(self, prompts: Sequence[Tokens]) -> Iterator[None]:
        """Within this context the first pass, over `prompts` padded on the left, starts at the lowest tuned layer."""
        if not self.depth:
            yield
            return
        cached = [self._find(prompt) for prompt in prompts]
        padded = torch.nn.utils.rnn.pad_sequence(cached, batch_first=True, padding_side="left")
        widths = [heads * size for heads, size in self._heads]
        entering, *parts = torch.split(padded, [padded.shape[2] - sum(widths), *widths], dim=2)
        pairs = [part.reshape(*part.shape[:2], *h).transpose(1, 2) for part, h in zip(parts, self._heads, strict=True)]
        originals = [vars(layer).get("forward") for layer in self._layers]
        for index, layer in enumerate(self._layers):
            output = entering if index == self.depth - 1 else None
            layer.forward = self._first_forward(index, originals[index], pairs[2 * index], pairs[2 * index + 1], output)
        try:
            yield
        finally:
            for index in range(self.depth):
                self._restore(index, originals[index])

    def _first_forward(
        self, index: int, original: Any, keys: Tensor, values: Tensor, output: Tensor | None
    ) -> Callable[..., Any]:
        """Return a forward that fills the layer's cache, returns `output` or its input, and restores the original."""

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._restore(index, original)
            cache = cache_in_call(self._layers[index], (hidden_states, *args), kwargs)
            cache.update(keys, values, index)
            result = hidden_states if output is None else output
            return result if self._rest is None else (result, *self._rest)

        return forward

    def _restore(self, index: int, original: Any) -> None:
        if original is None:
            vars(self._layers[index]).pop("forward", None)
        else:
            self._layers[index].forward = original

    def _find(self, prompt: Tokens) -> Tensor:
        cached = self._store.get(prompt)
        if cached is None:
            cached = self._compute(prompt)
            self._store.put(prompt, cached)
        return cached

    def _fill(self, prompt: Tokens, cache: Any) -> Any:
        """Run the model over a prompt; returns the cache, which it has filled."""
        self._lm.base(
            input_ids=torch.tensor([prompt], device=self._lm.device), **{cache_argument(self._lm.base): cache}
        )
        return cache

    @torch.no_grad()
    def _holds_keys_and_values(self, depth: int) -> bool:
        """Whether the first layers put keys and values of all tokens into the cache, and nothing else."""
        from transformers.cache_utils import DynamicLayer

        caches: list[Any] = []
        on_meta_too(self._lm.base, lambda: caches.append(self._fill((0, 1, 2), _empty_cache())))
        layers = caches[0].layers[:depth] if caches else []
        return not caches or (
            len(layers) == depth and all(type(c) is DynamicLayer and c.keys is not None for c in layers)
        )

    @torch.no_grad()
    def _compute(self, prompt: Tokens) -> Tensor:
        """Return (L, width + keys and values) of a prompt's tokens, side by side."""
        cache = _empty_cache()
        output = output_of_module(self._layers[-1], lambda: self._fill(prompt, cache))
        self._rest = (None,) * (len(output) - 1) if isinstance(output, tuple) else None
        pairs = [t[0].transpose(0, 1) for layer in cache.layers[: self.depth] for t in (layer.keys, layer.values)]
        self._heads = [(t.shape[1], t.shape[2]) for t in pairs]
        return torch.cat([first_of(output)[0], *(t.flatten(1) for t in pairs)], dim=1)


def _empty_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()
