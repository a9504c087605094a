"""What lies before the perturbed block is computed once: the activations of the layers below it are reused.

A block of layer k leaves the outputs of layers 0 … k - 1 as they are at x. One pass at x records what each
layer of the model's stack gives out; in a probe of the block the layers below k return that, and the rest
runs. The probes of p blocks of equal depth then cost (p + 1) / 2 forward passes in place of p, for the
same bits. No model code is involved: layers are found by `stack_of`, and which layers come before a tensor
is observed, not guessed, each time a pass is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from zotune.estimators import Closure, evaluate, probing
from zotune.stack import Observer, stack_of
from zotune.tuned import TunedTensors


class PrefixReuse:
    """Closures that skip the layers which the present perturbation cannot reach.

    Memory: the outputs of all layers of the stack for one evaluation of the objective.
    """

    def __init__(self, tuned: TunedTensors) -> None:
        self._tuned = tuned
        _, self._layers = stack_of(tuned.model)
        self.forget()

    def forget(self) -> None:
        """The objective is another one now."""
        self._depth: dict[int, int] = {}
        self._outputs: list[list[Any]] = [[] for _ in self._layers]
        self._valid = 0
        self._value: float | None = None

    @property
    def knows_value(self) -> bool:
        """Whether f(x) is answered without a pass."""
        return self._value is not None

    def moved(self, tensors: frozenset[int]) -> None:
        """The weights of these tensors have changed: what comes after them is no longer what was recorded."""
        self._valid = min([self._valid, *(self._depth.get(i, 0) for i in tensors)])
        self._value = None

    def record(self, closure: Closure) -> int:
        """See to it that a whole pass at x is recorded; how many passes that took (0 or 1)."""
        if self._value is not None or not self._layers:
            return 0
        outputs: list[list[Any]] = [[] for _ in self._layers]
        observer = Observer(self._tuned, lambda index, output: outputs[index].append(_copy(output)))
        with probing(self._tuned.model), self._replaced(self._valid), observer as seen:
            self._value = evaluate(closure)
        if not seen.in_order:
            self._valid, self._depth = 0, {}
            return 1
        self._outputs[self._valid :] = outputs[self._valid :]
        # A pass that skipped layers did not see what they read, but an earlier one of the same objective did.
        self._depth = seen.first | self._depth if self._valid else seen.first
        self._valid = len(self._layers)
        return 1

    def of(self, closure: Closure) -> Closure:
        """The same objective, with what is recorded put in place of the layers that need not run."""

        def reusing() -> Tensor | float:
            replaced = self._tuned.replaced
            if not replaced and self._value is not None:
                return self._value
            with self._replaced(min([self._valid, *(self._depth.get(i, 0) for i in replaced)])):
                return closure()

        return reusing

    @contextmanager
    def _replaced(self, depth: int) -> Iterator[None]:
        """Within this context the first `depth` layers return what was recorded of them."""
        layers = self._layers[:depth]
        own = [vars(layer).get("forward") for layer in layers]
        for layer, outputs in zip(layers, self._outputs, strict=False):
            layer.forward = _recorded(outputs)
        try:
            yield
        finally:
            for layer, forward in zip(layers, own, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward


def _recorded(outputs: list[Any]) -> Callable[..., Any]:
    """A forward that returns copies of the recorded outputs in turn: what uses them may write into them."""
    calls = iter(outputs)
    return lambda *args, **kwargs: _copy(next(calls))


def _copy(output: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, output)
