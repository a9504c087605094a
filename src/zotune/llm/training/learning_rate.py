"""The learning rate of each step, by the schedules of transformers.

A schedule is a function of the step alone, so a replayed or resumed run takes the same learning rates.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch

from zotune.errors import UsageError
from zotune.llm.config.schedule import ScheduleOptions
from zotune.llm.training.optimizers import AnyOptimizer

# Completed steps → factor of the learning rate.
Schedule = Callable[[int], float]


def schedule_of(options: ScheduleOptions) -> Schedule:
    """Return the factor of the learning rate as a function of the number of completed steps.

    Raises:
        UsageError: `lr_scheduler_kwargs` does not suit the schedule.

    >>> [schedule_of(ScheduleOptions(lr_scheduler_type=kind, max_steps=4))(1) for kind in ("constant", "linear")]
    [1.0, 0.75]
    """
    steps = options.max_steps
    if options.lr_scheduler_type == "linear" and not options.num_warmup_steps and not options.scheduler_arguments:
        # As transformers, but for the rounding of runs before its schedules were used.
        return lambda step: 1 - step / steps
    from transformers import get_scheduler

    # The schedules read the initial learning rate from an optimizer.
    rate = options.learning_rate if isinstance(options.learning_rate, float) else 1.0  # one that is not found yet
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    try:
        scheduler = get_scheduler(
            options.lr_scheduler_type,
            optimizer,
            options.num_warmup_steps,
            steps,
            options.scheduler_arguments or None,
        )
        (factor,) = scheduler.lr_lambdas
        factors = [float(factor(step)) for step in (0, steps // 2, steps - 1)]
    except (TypeError, ValueError, ArithmeticError, UnboundLocalError) as error:
        raise UsageError(_explanation(options, str(error))) from None
    if not all(map(math.isfinite, factors)):
        raise UsageError(_explanation(options, "it gives learning rates that are no finite numbers"))
    return lambda step: float(factor(step))


def _explanation(options: ScheduleOptions, problem: str) -> str:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    common = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    names = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[options.lr_scheduler_type]).parameters.keys() - common
    takes = f"it takes {', '.join(sorted(names))}" if names else "it takes none"
    return (
        f"lr_scheduler_type {options.lr_scheduler_type} with lr_scheduler_kwargs {options.lr_scheduler_kwargs} and "
        f"learning_rate {options.learning_rate}: {problem}. Change lr_scheduler_kwargs ({takes}) or the schedule."
    )


def set_learning_rates(optimizer: AnyOptimizer, factor: float) -> float:
    """Set each group's learning rate to its initial value times the factor; return the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return float(optimizer.param_groups[0]["lr"])
