"""One currency for the passes of every method: the arithmetic of a forward pass.

A forward pass counts 1, one that carries tangents 2. A back-propagated one counts 3, since the backward pass multiplies
by each weight twice, and 4 where activation checkpointing repeats the forward pass. The numbers of passes are those
that a run counts, whatever the method, so nothing here knows how many a step takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from zotune.estimate.estimators import cost_of_pass
from zotune.optim.hybrid import Hybrid
from zotune.optim.master_weights import FirstOrder
from zotune.optim.zeroth_order import ZerothOrder

BACK_PROPAGATED, CHECKPOINTED = 3, 4


@dataclass(frozen=True)
class PassCost:
    """What the passes of a run cost, in forward passes and in passes of single layers.

    Attributes:
        each: cost of a pass without back-propagation.
        back_propagated: cost of a pass with it.
        per_step: back-propagated passes of a step; None if all passes are.
        layers: layers of the model.
        reused: layers below all tuned parameters, whose activations are computed once a row.
        cut: layers below those that are back-propagated through.

    >>> PassCost().equivalents(num_forwards=20, num_steps=10), PassCost(per_step=None).equivalents(10, 10)
    (20, 30)
    """

    each: int = 1
    back_propagated: int = BACK_PROPAGATED
    per_step: int | None = 0
    layers: int = 1
    reused: int = 0
    cut: int = 0

    def equivalents(self, num_forwards: int, num_steps: int) -> int:
        """The arithmetic of so many passes in so many steps, in forward passes through all layers."""
        back = self._back_propagated(num_forwards, num_steps)
        return self.each * (num_forwards - back) + self.back_propagated * back

    def layer_passes(self, num_forwards: int, num_steps: int, batches_of_rows: float = 0.0) -> float:
        """The same in passes of one layer: reused layers count once a row, and no gradient goes below the cut.

        Activations that the probes of blocks reuse within a step are not left out, so with blocks this is an upper
        bound.

        Args:
            num_forwards: passes of the run.
            num_steps: steps of the run.
            batches_of_rows: distinct training rows that the steps read, in batches of one pass.

        >>> PassCost(layers=30, reused=28).layer_passes(num_forwards=100, num_steps=50, batches_of_rows=25)
        900.0
        """
        back, run = self._back_propagated(num_forwards, num_steps), self.layers - self.reused
        deep = self.layers - max(self.reused, self.cut)
        plain = self.each * (num_forwards - back) * run
        return float(plain + back * (run + (self.back_propagated - 1) * deep) + self.reused * batches_of_rows)

    def _back_propagated(self, num_forwards: int, num_steps: int) -> int:
        return num_forwards if self.per_step is None else min(num_forwards, self.per_step * num_steps)


def pass_cost(
    optimizer: ZerothOrder | Hybrid | FirstOrder,
    *,
    batches: int = 1,
    checkpointing: bool = False,
    layers: int = 1,
    reused: int = 0,
    cut: int = 0,
) -> PassCost:
    """The cost of the passes of an optimizer.

    Args:
        optimizer: the optimizer.
        batches: batches that a step accumulates.
        checkpointing: whether back-propagation repeats the forward pass.
        layers: layers of the model.
        reused: layers below all tuned parameters, whose activations are computed once a row.
        cut: layers of a hybrid that forward passes tune.
    """
    back_propagated = CHECKPOINTED if checkpointing else BACK_PROPAGATED
    if isinstance(optimizer, ZerothOrder):
        return PassCost(cost_of_pass(optimizer.estimator), back_propagated, 0, layers, reused)
    if isinstance(optimizer, Hybrid):
        each = cost_of_pass(optimizer.zeroth_order.estimator)
        return PassCost(each, back_propagated, batches, layers, reused, cut)
    return PassCost(1, back_propagated, None, layers, reused)
