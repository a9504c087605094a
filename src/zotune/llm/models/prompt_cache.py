"""Prompts that text is generated from: what lies below the lowest tuned layer is computed once a prompt and kept.

As `zotune.llm.models.activation_cache` does for scores. A prompt leaves keys and values in every layer's cache and an
input for the next; below the lowest tuned layer they are the same at each probe. The first pass of a generation puts
them into its cache and begins at that layer; later passes, of the new tokens, run whole. Each prompt is computed
alone, so the bits do not depend on what it is batched with, nor on whether there was room to keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zotune.llm.models.activation_cache import lowest_tuned_layer, tunes_outside_base
from zotune.llm.models.cache_argument import cache_argument, cache_in_call
from zotune.llm.models.cache_storage import ActivationStore
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.partial_forward import output_of_module
from zotune.model.layers import stack_of

Tokens = tuple[int, ...]


class PromptCache:
    """A language model's passes over prompts, the lower layers' part computed once as far as there is room to keep it.

    Args:
        lm: the model; what it tunes must not change afterwards.
        kept: where keys, values and activations are kept; without a tier they are computed each time.

    Attributes:
        depth: how many layers lie below everything that is tuned; 0 also where a layer's cache is a sliding window,
            which does not hold the whole prompt.
        num_layers: how many there are in all.
    """

    def __init__(self, lm: LanguageModel, kept: ActivationStore) -> None:
        from transformers import DynamicCache

        _, layers = stack_of(lm.base)
        slides = any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=lm.config).layers)
        self.num_layers = len(layers)
        self.depth = 0 if slides or tunes_outside_base(lm) else lowest_tuned_layer(lm.base)
        self._lm, self._layers, self._kept = lm, list(layers[: self.depth]), kept
        self._returns_tuple = False
        self._heads: list[tuple[int, int]] = []

    @contextmanager
    def prefill(self, prompts: Sequence[Tokens]) -> Iterator[None]:
        """Within this context the first pass, of `prompts` padded on the left, begins at the lowest tuned layer."""
        if not self.depth:
            yield
            return
        found = [self._find(prompt) for prompt in prompts]
        whole = torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_side="left")
        widths = [heads * size for heads, size in self._heads]
        entering, *parts = torch.split(whole, [whole.shape[2] - sum(widths), *widths], dim=2)
        pairs = [part.reshape(*part.shape[:2], *h).transpose(1, 2) for part, h in zip(parts, self._heads, strict=True)]
        own = [vars(layer).get("forward") for layer in self._layers]
        for index, layer in enumerate(self._layers):
            output = entering if index == self.depth - 1 else None
            layer.forward = self._first(index, own[index], pairs[2 * index], pairs[2 * index + 1], output)
        try:
            yield
        finally:
            for index in range(self.depth):
                self._restore(index, own[index])

    def _first(self, index: int, own: Any, keys: Tensor, values: Tensor, output: Tensor | None) -> Callable[..., Any]:
        """A forward that fills the layer's cache, gives `output` or its input, and hands back to the layer's own."""

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._restore(index, own)
            cache = cache_in_call(self._layers[index], (hidden_states, *args), kwargs)
            cache.update(keys, values, index)
            found = hidden_states if output is None else output
            return (found,) if self._returns_tuple else found

        return forward

    def _restore(self, index: int, own: Any) -> None:
        if own is None:
            vars(self._layers[index]).pop("forward", None)
        else:
            self._layers[index].forward = own

    def _find(self, prompt: Tokens) -> Tensor:
        kept = self._kept.get(prompt)
        if kept is None:
            kept = self._compute(prompt)
            self._kept.put(prompt, kept)
        return kept

    @torch.no_grad()
    def _compute(self, prompt: Tokens) -> Tensor:
        """(L, width + keys and values): what the prompt's tokens leave, side by side."""
        from transformers import DynamicCache

        cache = DynamicCache()
        ids = torch.tensor([prompt], device=self._lm.device)
        inputs = {"input_ids": ids, cache_argument(self._lm.base): cache}
        output = output_of_module(self._layers[-1], lambda: self._lm.base(**inputs))
        self._returns_tuple = isinstance(output, tuple)
        pairs = [t[0].transpose(0, 1) for layer in cache.layers[: self.depth] for t in (layer.keys, layer.values)]
        self._heads = [(t.shape[1], t.shape[2]) for t in pairs]
        entering = output[0] if self._returns_tuple else output
        return torch.cat([entering[0], *(t.flatten(1) for t in pairs)], dim=1)
