"""Hybrid ZO-FO tuning: zeroth-order for the first layers, back-propagation for the rest.

Source: the paper, section 5 and Table 7. Back-propagation ends where the first first-order parameter is
read: below it nothing requires a gradient, so no graph is made and no activation kept. Memory then
falls with the number of layers that are left to forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from zotune.errors import UsageError
from zotune.estimate.objective import Closure, as_accumulated, probing
from zotune.model.layers import ReadTracer, stack_of
from zotune.model.parameters import ParameterSet
from zotune.optim.master_weights import (
    FirstOrder,
    finite_gradients,
    inner,
    must_repeat,
    parameters_of,
    with_master_weights,
    written_by_step,
)
from zotune.optim.shared_gradients import back_propagate_all
from zotune.optim.undo import UndoLog
from zotune.optim.zeroth_order import BlockOrder, ZerothOrder


class Hybrid:
    r"""One step of a zeroth-order and a first-order optimizer, both from the gradient at the same x.

        x_S ← x_S - η_zo h(ĝ_S),    x_D ← x_D - η_fo FO(∇_D f),    S the shallow, D the deep parameters

    Args:
        zeroth_order: over the shallow parameters: those of the first layers, and what is read before them.
        first_order: any torch optimizer, over all others that are tuned. Those in half precision get float32 copies,
            which it then moves in their place (`zotune.optim.master_weights`).

    Forward passes a step: the zeroth-order method's, and one whose upper part is back-propagated. Modules of the
    zeroth-order optimizer's model are in eval mode during probes; the first-order pass leaves modes as they are.

    Raises:
        UsageError: a parameter is in both, or the zeroth-order optimizer updates block after block.

    >>> lower, upper = nn.Linear(3, 4), nn.Linear(4, 1)
    >>> model, x = nn.Sequential(lower, nn.Tanh(), upper), torch.randn(8, 3)
    >>> import zotune as zo
    >>> opt = Hybrid(zo.zo_sgd(lower, lr=0.01), torch.optim.SGD(upper.parameters(), lr=0.1))
    >>> losses = [opt.step(lambda: model(x).square().mean()) for _ in range(50)]
    >>> losses[-1] < losses[0]
    True
    """

    def __init__(self, zeroth_order: ZerothOrder, first_order: FirstOrder) -> None:
        if zeroth_order.block_order == BlockOrder.SEQUENTIAL and len(zeroth_order.blocks) > 1:
            raise UsageError(
                "a hybrid takes both gradients at the same weights, but sequential blocks move some before others are "
                'estimated. Use block_order="joint".'
            )
        deep = set(map(id, parameters_of(first_order)))
        both = [t.name for t in zeroth_order.tuned if id(t.parameter) in deep]
        if both:
            raise UsageError(
                f"{both[0]!r} is tuned by both optimizers, so it would be moved twice a step; leave it to one of them."
            )
        self.zeroth_order, self.first_order = zeroth_order, with_master_weights(first_order)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of both optimizers, the zeroth-order one first; for learning-rate schedules."""
        return [*self.zeroth_order.param_groups, *self.first_order.param_groups]

    def step(self, closure: Closure) -> float:
        """Take one step of both optimizers; returns the loss at x. `closure` returns the loss as a tensor and never
        calls backward.

        A closure made by `zotune.accumulate` is differentiated one micro-batch at a time.

        If a loss or a first-order gradient is not finite, neither moves and the step counts as skipped. After an
        exception both are as before the step.
        """
        method, first_order = self.zeroth_order, self.first_order
        try:
            with method.whole_step(inner(first_order)) as undo:
                loss = self._differentiate(closure)
                while math.isfinite(loss) and must_repeat(first_order):
                    loss = self._differentiate(closure)
                if math.isfinite(loss) and finite_gradients(first_order):
                    method.take_step(closure, also=lambda: self._step_first_order(undo))
                else:
                    method.leave_out()
        finally:
            first_order.zero_grad()
        method.stop_if_skipping()
        return loss

    def _step_first_order(self, undo: UndoLog) -> None:
        written = written_by_step(self.first_order)
        undo.keep([p.data for p in written], written)
        self.first_order.step()

    def _differentiate(self, closure: Closure) -> float:
        """Back-propagate into the gradients of the first-order parameters, micro-batch by micro-batch; returns f."""
        micro = as_accumulated(closure)
        with torch.enable_grad(), _frozen(t.parameter for t in self.zeroth_order.tuned):
            losses = back_propagate_all(self.first_order, micro.closures, micro.weights, micro.mesh)
        self.zeroth_order.num_forwards += 1
        return sum(w * loss for w, loss in zip(micro.weights, losses, strict=True)) / sum(micro.weights)

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers' states."""
        return {"zeroth_order": self.zeroth_order.state_dict(), "first_order": self.first_order.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.zeroth_order.load_state_dict(state_dict["zeroth_order"])
        self.first_order.load_state_dict(state_dict["first_order"])


class Tied(StrEnum):
    """The owner of a tensor that both sides of the cut read, such as an embedding that is also the head."""

    ZEROTH_ORDER = "zeroth_order"
    FROZEN = "frozen"


def split_at_layer(
    model: nn.Module, num_layers: int, closure: Callable[[], Any], *, tied: Tied | str | None = None
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The tuned parameters read by the first `num_layers` layers or before them, and those read after.

    With 0 all are deep, with the number of all layers all are shallow (the final norm and the head too).

    Args:
        model: its parameters that require a gradient are tuned.
        num_layers: k, from 0 to the number of layers in the model's stack.
        closure: runs the model once, for instance the objective: where a tensor is read is observed.
        tied: whose tensors are that are read on both sides: "zeroth_order", or "frozen", which leaves them out of both
            and sets their `requires_grad` to False.

    Raises:
        UsageError: there are fewer layers, a tensor is read on both sides and `tied` does not say whose it is, or one
            is not read at all.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    >>> shallow, deep = split_at_layer(model, 1, lambda: model(torch.ones(1, 2)))
    >>> [p.shape for p in shallow], len(deep)
    ([torch.Size([2, 2]), torch.Size([2])], 4)
    """
    tuned = ParameterSet(model)
    _, layers = stack_of(model)
    if not 0 <= num_layers <= len(layers):
        raise UsageError(f"the model's stack has {len(layers)} layers; the first {num_layers} of them do not exist.")
    with probing(model), ReadTracer(tuned) as seen:
        closure()
    shallow: list[nn.Parameter] = []
    deep: list[nn.Parameter] = []
    for tensor in tuned:
        if tensor.id not in seen.first:
            raise UsageError(f"the forward pass does not read {tensor.name!r}; freeze it with requires_grad_(False).")
        if num_layers in (0, len(layers)):
            side: list[nn.Parameter] | None = shallow if num_layers else deep
        elif seen.first[tensor.id] < num_layers <= seen.last[tensor.id]:
            side = _side_of_tied(tensor.name, tied, shallow)
        else:
            side = shallow if seen.first[tensor.id] < num_layers else deep
        if side is None:
            tensor.parameter.requires_grad_(False)
        else:
            side.append(tensor.parameter)
    return shallow, deep


def _side_of_tied(name: str, tied: Tied | str | None, shallow: list[nn.Parameter]) -> list[nn.Parameter] | None:
    if tied is None:
        raise UsageError(
            f"{name!r} is read both below and above the cut (tied weights), so it is neither shallow nor deep. Choose: "
            'tied="zeroth_order" or tied="frozen".'
        )
    return shallow if Tied(tied) == Tied.ZEROTH_ORDER else None


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within this context the given parameters require no gradient, so that no graph reaches below the cut."""
    changed = [p for p in parameters if p.requires_grad]
    try:
        for p in changed:
            p.requires_grad_(False)
        yield
    finally:
        for p in changed:
            p.requires_grad_(True)
