"""The activations of the layers below a perturbed block, computed once and reused by all probes of the block.

A block of layer k leaves the outputs of layers 0 … k - 1 as they are at x. One pass at x records what each
layer of the model's stack gives out; in a probe of the block the layers below k return that, and the rest
runs. The probes of p blocks of equal depth then cost (p + 1) / 2 forward passes in place of p, for the
same bits. No model code is involved: layers are found by `stack_of`, and which layers come before a tensor
is observed, not guessed, each time a pass is recorded. A layer is skipped only if its output is all that it
gives, which is observed too (`zotune.model.effects`); otherwise nothing is reused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from zotune.estimate.objective import Closure, evaluate, probing
from zotune.messages import say
from zotune.model.effects import EffectTracer, forwards, modules_of
from zotune.model.intercept import intercepted_ids
from zotune.model.layers import ReadTracer, stack_of
from zotune.model.parameters import ParameterSet

NOT_REUSED = (
    "no activations are reused between the probes of blocks: {}. Each pass runs all layers, which gives the same and "
    "takes longer (reuse_prefix=False says nothing)."
)


class Diverged(BaseException):
    """A later call of the stack got other inputs than in the recorded pass, so no layer may be skipped."""


class ActivationCache:
    """A cache of activations for one objective: its closures skip the layers that the current perturbation cannot
    reach.

    An objective may call the stack several times (micro-batches). Where a later call's input follows from an earlier
    call's output, as in generation, the perturbation reaches it: that is noticed, and the objective is run in full.

    Memory: the outputs of all layers of the stack for one evaluation of the objective, and the first layer's inputs.

    Attributes:
        num_passes: evaluations of the objective made here, less those whose value was known, since it was last counted.
    """

    def __init__(self, tuned: ParameterSet) -> None:
        self._tuned = tuned
        _, self._layers = stack_of(tuned.model)
        self._effect: str | None = None
        self._has_said = False
        self.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.forget()

    def forget(self) -> None:
        """Empty the cache: the objective changes."""
        self.num_passes = 0
        self._depth: dict[int, int] = {}
        self._outputs: list[list[Any]] = [[] for _ in self._layers]
        self._inputs: list[list[Any]] = []
        self._valid = 0
        self._value: float | None = None
        # The same module twice has one record, and an effect of a layer is one of the model, whatever the objective.
        self._is_reusable = 0 < len(self._layers) == len(set(self._layers)) and self._effect is None

    def moved(self, tensors: frozenset[int]) -> None:
        """Drop the activations after these tensors, whose weights have changed."""
        self._valid = min([self._valid, *(self._depth.get(i, 0) for i in tensors)])
        self._value = None

    def record(self, closure: Closure) -> None:
        """Record a full pass at x, unless the cache already holds one."""
        if self._value is not None or not self._is_reusable:
            return
        outputs: list[list[Any]] = [[] for _ in self._layers]
        inputs: list[list[Any]] = []
        note = self._layers[0].register_forward_pre_hook(
            lambda layer, args, kwargs: inputs.append(_copy(_given(args, kwargs)) if inputs else []), with_kwargs=True
        )
        effects, seen = EffectTracer(), ReadTracer(self._tuned)
        self.num_passes += 1
        try:
            layers = self._replaced(self._valid), self._recording(outputs, effects)
            with probing(self._tuned.model), layers[0], layers[1], seen, effects:
                self._value = evaluate(closure)
        except Diverged:
            self._stop("the stack of layers is run again on what it gave")
            return
        finally:
            note.remove()
        self._effect = effects.found
        if self._effect is not None or not seen.in_order:
            self._stop(
                f"of a layer of {type(self._tuned.model).__name__}, {self._effect}"
                if self._effect
                else "the layers do not run one after the other"
            )
            return
        self._outputs[self._valid :], self._inputs = outputs[self._valid :], inputs
        # A pass that skipped layers did not see what they read, but an earlier one of the same objective did.
        self._depth = seen.first | self._depth if self._valid else seen.first
        self._valid = len(self._layers)

    def _recording(self, outputs: list[list[Any]], effects: EffectTracer) -> AbstractContextManager[None]:
        """Within this context the layers that run record what they return, before any hook of their own."""
        layers = self._layers[self._valid :]
        runs = zip(layers, outputs[self._valid :], strict=True)
        return forwards(layers, [_recording(layer, self._around(layer), found, effects) for layer, found in runs])

    def _around(self, layer: nn.Module) -> list[nn.Module]:
        return modules_of(layer, self._tuned.model, self._layers)

    def of(self, closure: Closure) -> Closure:
        """The same objective, with cached activations in place of the layers that need not run."""

        def reusing() -> Tensor | float:
            replaced = intercepted_ids(self._tuned)
            if not replaced and self._value is not None:
                self.num_passes -= 1
                return self._value
            try:
                with self._replaced(min([self._valid, *(self._depth.get(i, 0) for i in replaced)])):
                    return closure()
            except Diverged:
                self._stop("the stack of layers is run again on what it gave")
                self.num_passes += 1
            return closure()

        return reusing

    def _stop(self, reason: str) -> None:
        """Stop using the cache for this objective, and say once why."""
        self._is_reusable, self._valid = False, 0
        if not self._has_said:
            self._has_said = True
            say(NOT_REUSED.format(reason))

    def _replaced(self, depth: int) -> AbstractContextManager[None]:
        """Within this context the first `depth` layers return their recorded outputs."""
        recorded = zip(range(depth), self._outputs, strict=False)
        functions = [_recorded(found) if index else _checked(self._inputs, found) for index, found in recorded]
        return forwards(self._layers[:depth], functions)


class NoActivationCache:
    """The same interface without a cache: every pass runs in full."""

    num_passes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """There is nothing to release."""

    def moved(self, tensors: frozenset[int]) -> None:
        """As `ActivationCache.moved`."""

    def record(self, closure: Closure) -> None:
        """As `ActivationCache.record`."""

    def of(self, closure: Closure) -> Closure:
        """As `ActivationCache.of`."""
        return closure


def _recording(
    layer: nn.Module, modules: list[nn.Module], outputs: list[Any], effects: EffectTracer
) -> Callable[..., Any]:
    """A layer's own forward function, which also records what it returns, and observes what else it does."""
    run = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        effects.enter(modules)
        output = effects.leave(run(*args, **kwargs))
        outputs.append(_copy(output))
        return output

    return forward


def _recorded(outputs: list[Any]) -> Callable[..., Any]:
    """A forward function that returns copies of the recorded outputs in turn, since the layers above may write into
    them.
    """
    calls = iter(outputs)
    return lambda *args, **kwargs: _copy(next(calls))


def _checked(inputs: list[list[Any]], outputs: list[Any]) -> Callable[..., Any]:
    """The same for the first layer, which checks that its inputs are the recorded ones (those of the first call always
    are).
    """
    calls = enumerate(zip(inputs, outputs, strict=True))

    def forward(*args: Any, **kwargs: Any) -> Any:
        index, (given, output) = next(calls, (0, (None, None)))
        if given is None or (index and not _is_same(given, _given(args, kwargs))):
            raise Diverged
        return _copy(output)

    return forward


def _given(*arguments: Any) -> list[Any]:
    """The comparable arguments of a call: tensors and plain values."""
    return [value for value in tree_leaves(arguments) if isinstance(value, (Tensor, int, float, str))]


def _is_same(one: list[Any], other: list[Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return type(a) is type(b) and bool(a == b)

    return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))


def _copy(output: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, output)
