"""The paper's formulas of peak memory (Table 5, appendix C), with the sizes of a given model.

A layer l has ‖x_l‖ bytes of weights, of which ‖ε_l‖ bytes are tuned (all in full tuning, Table A1; those of the adapter
in Table A2), and stores ‖a_l‖ bytes of activations for a backward pass. The layers are those of the model's stack and
two more: the modules before it (embedding) and after it (norm, head and logits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zotune.llm.data.collator import Batch
from zotune.llm.models.language_model import LanguageModel
from zotune.model.layers import stack_of
from zotune.plan.live_memory import FakeScalars, fused_attention
from zotune.plan.passes import score


@dataclass(frozen=True)
class Layer:
    """Bytes of a layer: weights, tuned weights, and activations stored for a backward pass."""

    name: str
    weights: int
    tuned: int
    activations: int


@dataclass(frozen=True)
class Terms:
    """The terms of the formulas, in bytes.

    Attributes:
        layers: the modules before the stack as one layer, the layers of the stack, the modules after it as one layer.
    """

    layers: tuple[Layer, ...]

    @property
    def x(self) -> int:
        """‖x‖, all weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def tuned(self) -> int:
        """‖ε‖, the tuned weights."""
        return sum(layer.tuned for layer in self.layers)

    @property
    def a(self) -> int:
        """‖a‖, all activations that a backward pass needs."""
        return sum(layer.activations for layer in self.layers)

    @property
    def max_tuned(self) -> int:
        """The largest layer's tuned weights, max_l ‖x_l‖."""
        return max(layer.tuned for layer in self.layers)

    @property
    def max_a(self) -> int:
        """The largest layer's activations, max_l ‖a_l‖."""
        return max(layer.activations for layer in self.layers)

    @property
    def larger(self) -> int:
        """Σ_l max(‖a_l‖, ‖x_l‖)."""
        return sum(max(layer.activations, layer.tuned) for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """The terms by their names in the paper."""
        names = {"x": self.x, "tuned": self.tuned, "a": self.a, "max_l x_l": self.max_tuned, "max_l a_l": self.max_a}
        return {**names, "sum_l max(a_l, x_l)": self.larger, "layers": [vars(layer) for layer in self.layers]}


@dataclass(frozen=True)
class Formula:
    """A row of Table 5: the memory of a method besides the weights.

    Attributes:
        name: name of the method in the paper.
        method: name in zotune; None for variants that zotune does not implement because they need more memory.
        dynamic, state: the terms as the paper writes them, for full tuning.
        bytes_dynamic, bytes_state: the same terms as functions.
        paper: GiB that the paper measured for OPT-13B with about 400 tokens per example (Table A1; full tuning, single
            precision).
    """

    name: str
    method: str | None
    dynamic: str
    state: str
    bytes_dynamic: Callable[[Terms], int]
    bytes_state: Callable[[Terms], int]
    paper: int

    def total(self, terms: Terms) -> int:
        """Total bytes with the weights."""
        return terms.x + self.bytes_dynamic(terms) + self.bytes_state(terms)


def _times(n: int) -> Callable[[Terms], int]:
    return lambda t: n * t.tuned


_LARGER, _TENSOR = "Σ max(‖a_l‖, ‖x_l‖)", "max ‖x_l‖"

FORMULAS = (
    Formula("FO-SGD", "fo_sgd", _LARGER, "0", lambda t: t.larger, _times(0), 97),
    Formula("FO-Adam, no foreach", "fo_adam", _LARGER, "2 ‖x‖", lambda t: t.larger, _times(2), 195),
    Formula("FO-Adam", None, _LARGER, "3 ‖x‖", lambda t: t.larger, _times(3), 239),
    Formula("Forward-Grad", "forward_grad", "‖x‖ + max ‖a_l‖", "0", lambda t: t.tuned + t.max_a, _times(0), 103),
    Formula("vanilla ZO-SGD", None, "‖x‖", "0", lambda t: t.tuned, _times(0), 96),
    Formula("ZO-SGD", "zo_sgd", _TENSOR, "0", lambda t: t.max_tuned, _times(0), 51),
    Formula("ZO-SGD-MMT", "zo_sgd_mmt", _TENSOR, "‖x‖", lambda t: t.max_tuned, _times(1), 100),
    Formula("ZO-Adam", "zo_adam", _TENSOR, "2 ‖x‖", lambda t: t.max_tuned, _times(2), 151),
)
"""Table 5. For a model in half precision all terms are halved, as in the rows that the paper marks F16."""


def terms_of(lm: LanguageModel, batch: Batch) -> Terms:
    """The terms of a model on `meta` for a batch; every tensor that autograd saves is counted once."""
    path, layers = stack_of(lm.base)
    before, *stack, after = ["before the layers", *(f"{path}.{i}" for i in range(len(layers))), "after the layers"]
    saved = _SavedActivations(before, after)
    handles = saved.add_hooks(layers, stack)
    try:
        with (
            FakeScalars(),
            fused_attention(),
            torch.autograd.graph.saved_tensors_hooks(saved.count, lambda t: t),
        ):
            saved.exclude_weights(lm)
            loss = score(lm, batch)
        del loss
    finally:
        for handle in handles:
            handle.remove()
    weights = _weights_by_layer(lm, layers, stack, before, after)
    return Terms(tuple(Layer(name, *weights[name], saved.bytes[name]) for name in (before, *stack, after)))


class _SavedActivations:
    """Counts the bytes that autograd saves in each layer during a forward pass."""

    def __init__(self, before: str, after: str) -> None:
        self.here, self._after = before, after
        self.bytes: dict[str, int] = {before: 0, after: 0}
        self._known: set[int] = set()
        self._alive: list[Tensor] = []

    def add_hooks(self, layers: Iterable[nn.Module], names: list[str]) -> list[Any]:
        """Follow which layer runs; returns the handles that remove the hooks."""
        handles = []
        for layer, name in zip(layers, names, strict=True):
            self.bytes[name] = 0

            def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                self.here = name

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                self.here = self._after

            handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(layer.register_forward_hook(leave))
        return handles

    def exclude_weights(self, lm: LanguageModel) -> None:
        """Do not count the weights, which are in memory anyway."""
        self._known = {p.untyped_storage()._cdata for p in lm.module.parameters()}

    def count(self, tensor: Tensor) -> Tensor:
        """Count a saved tensor, unless its storage has been counted."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._alive.append(tensor.detach())  # so that no later tensor gets the same address
            self.bytes[self.here] += storage.nbytes()
        return tensor


def _weights_by_layer(
    lm: LanguageModel, layers: Iterable[nn.Module], names: list[str], before: str, after: str
) -> dict[str, tuple[int, int]]:
    """Bytes of weights and of tuned weights in each layer, in the input embedding, and in the rest (the head)."""
    places = {id(p): name for layer, name in zip(layers, names, strict=True) for p in layer.parameters()}
    inputs = {id(p) for p in lm.base.get_input_embeddings().parameters()}
    sizes = dict.fromkeys((before, *names, after), (0, 0))
    for p in {id(p): p for p in lm.module.parameters()}.values():
        name = places.get(id(p), before if id(p) in inputs else after)
        weights, tuned = sizes[name]
        sizes[name] = weights + p.nbytes, tuned + p.nbytes * p.requires_grad
    return sizes
