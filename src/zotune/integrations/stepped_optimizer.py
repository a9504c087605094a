"""A zeroth-order optimizer as a training loop sees it that calls `step()` after back-propagation, with no closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zotune.errors import UsageError
from zotune.estimate.estimate import GradientEstimate
from zotune.estimate.objective import Closure
from zotune.optim.zeroth_order import ZerothOrder


class SteppedOptimizer(torch.optim.Optimizer):
    """Its steps are taken by `take_step`; the loop's own `step()`, which comes after each, confirms that one was.

    Parameter groups, state and `state_dict` are those of the zeroth-order optimizer, so that schedulers and
    checkpoints work.

    Attributes:
        optimizer: the zeroth-order optimizer.

    >>> from torch import nn
    >>> import zotune as zo
    >>> model = nn.Linear(2, 1, bias=False)
    >>> stepped = SteppedOptimizer(zo.zo_sgd(model, lr=0.1))
    >>> loss = stepped.take_step(lambda: model.weight.square().sum())
    >>> stepped.step()
    >>> stepped.optimizer.num_steps
    1
    """

    def __init__(self, optimizer: ZerothOrder) -> None:
        # Not torch's, which would make groups and state of its own.
        self.optimizer, self._is_taken = optimizer, False

    def take_step(self, closure: Closure, inspect: Callable[[GradientEstimate], None] | None = None) -> float:
        """Take one step; see `ZerothOrder.step`."""
        self._is_taken = True
        return self.optimizer.step(closure, inspect=inspect)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Confirm the step that `take_step` has taken.

        Raises:
            UsageError: there is none, or a closure is given.
        """
        if closure is not None or not self._is_taken:
            raise UsageError(
                "step() confirms the step that training_step has taken, and there is none: in a loop of your own, call "
                "the zeroth-order optimizer itself, opt.step(closure)."
            )
        self._is_taken = False

    @property
    def state(self) -> Any:  # type: ignore[override]
        """As torch's."""
        return self.optimizer.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """As torch's."""
        return self.optimizer.param_groups

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """As torch's."""
        return self.optimizer.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As that of the zeroth-order optimizer."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As that of the zeroth-order optimizer."""
        self.optimizer.load_state_dict(state_dict)
