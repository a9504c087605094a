"""Checks of the arguments of `ZerothOrder`: values, options that exclude each other, estimates of other directions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any

from torch import Tensor

from zotune.directions.direction import Direction
from zotune.directions.scaled import ScaledSampler
from zotune.directions.schedule import AnySampler, depends_on_weights
from zotune.errors import NonFiniteLossError, RunError, UsageError
from zotune.estimate.estimate import GradientEstimate
from zotune.estimate.objective import Closure
from zotune.model.intercept import is_replaced
from zotune.model.parameters import ParameterSet

TORN = (
    "This step could not be undone: some weights are written and others not, or no record holds what was written. "
    "Load the model and the optimizer's state again, or replay the ledger on the base model."
)
# Options of optimizers that a parameter group may have in torch, and that are one for all groups here.
_NOT_BY_GROUP = (
    *("mu", "momentum", "beta", "betas", "eps", "dampening", "nesterov", "amsgrad", "maximize", "max_coefficient"),
    *("num_queries", "sampler", "rounding", "window", "decoupled_weight_decay"),
)


def check_group(group: dict[str, Any]) -> None:
    """Refuse values of a parameter group that are out of range, or that no update would use.

    Raises:
        UsageError: with the option and where it belongs.
        ValueError: a rate is negative or not finite.
    """
    found = [name for name in _NOT_BY_GROUP if group.get(name)]
    if found:
        raise UsageError(
            f"a parameter group has {found[0]}={group[found[0]]!r}, which would be ignored: groups have their own lr "
            "and weight_decay, every other option is the optimizer's. Give it when the optimizer is made."
        )
    for name in ("lr", "weight_decay"):
        if not 0 <= float(group[name]) < math.inf:
            raise ValueError(f"{name} of a parameter group must be a finite number, not negative, got {group[name]}")


def check_rates(rates: Sequence[float]) -> None:
    """Refuse learning rates that would make all weights NaN or infinite.

    Raises:
        ValueError: with the rates.
    """
    if not all(map(math.isfinite, rates)):
        raise ValueError(
            f"the learning rates of a step must be finite numbers (in single precision, as they are applied), got "
            f"{list(rates)}. Nothing was moved: correct what sets them, such as a schedule."
        )


def check_nested(groups: Iterable[Mapping[str, Any]], *, is_within_step: bool) -> None:
    """Refuse a step within a step or a probe of the same weights, whose other probes would meet other weights.

    Raises:
        UsageError: there is one in progress.
    """
    if is_within_step or any(is_replaced(p) for group in groups for p in group["params"]):
        raise UsageError(
            "a step was begun within the closure (or the callback) of a step over the same weights, whose probes have "
            "to meet the same weights. The closure returns the loss and leaves the weights alone: take the inner steps "
            "before, or tune a copy of the model."
        )


def check_trainable(names: Iterable[str]) -> None:
    """Refuse to go on with tensors that were frozen after the optimizer was made, and that it would move.

    Raises:
        UsageError: with the first of their names.
    """
    for name in names:
        raise UsageError(
            f"{name!r} was frozen (requires_grad is False) after the optimizer was made, which would still move it: "
            "what an optimizer tunes is fixed. Make a new one after freezing, or let the tensor require a gradient."
        )


def check_settings(recorded: dict[str, Any], present: dict[str, Any]) -> None:
    """Refuse a constant that is not the one that the header of the steps' records holds.

    Raises:
        UsageError: with both values.
    """
    for name, value in recorded.items():
        if present[name] != value:
            raise UsageError(
                f"the steps are recorded, and a ledger holds {name} once for all of them: it was {value!r} and is now "
                f"{present[name]!r}. Set it back, or begin another ledger on the present weights (of constants only "
                "learning rates may change from step to step)."
            )


def check_state(state_dict: Mapping[str, Any], transform: str, has_window: bool, choice: Sequence[Any] | None) -> None:
    """Refuse a state that the optimizer could not go on from, or of which it would leave a part out.

    Args:
        state_dict: the state to load. One that does not name its transform is taken to be of this one.
        transform: the name of the optimizer's transform.
        has_window: whether the optimizer keeps coefficients in place of its transform's state.
        choice: the scores by which it chooses a block each step; None if it does not.

    Raises:
        UsageError: with what the state is of.
    """
    own = state_dict.get("zeroth_order")
    if own is None:
        raise UsageError(
            "this is no state of a zeroth-order optimizer: it has no entry 'zeroth_order'. Load what opt.state_dict() "
            "of an optimizer made alike has returned."
        )
    if own["num_steps"] and own.get("transform", transform) != transform:
        raise UsageError(
            f"the state was saved by an optimizer with the transform {own['transform']}. This one's is {transform}, "
            "to which such a state means something else. Make it by the same method, or begin without a state."
        )
    if own["num_steps"] and (own.get("history") is not None) != has_window:
        was, now = ("without", "with") if has_window else ("with", "without")
        raise UsageError(
            f"the state was saved {was} a window and this optimizer was made {now} one, so that its momentum or "
            f"moments would begin again. Make it {was} window=…, as the one that was saved."
        )
    saved = own.get("block_choice")
    if (saved is None) != (choice is None) or len(saved or ()) != len(choice or ()):
        raise UsageError(
            f"the state was saved with {len(saved or ())} blocks of which each step chooses one, and this optimizer "
            f"chooses among {len(choice or ())}. Make it as the one that was saved."
        )


def check_torn(is_torn: bool) -> None:
    """Refuse to go on after a step that could not be undone.

    Raises:
        RunError: it is so.
    """
    if is_torn:
        raise RunError(f"An error broke off an earlier step. {TORN}")


def check_values(
    lr: float, num_queries: int, window: int | None, weight_decay: float, max_coefficient: float | None, seed: int
) -> None:
    """Refuse numbers out of their ranges.

    Raises:
        TypeError: the seed is no integer.
        ValueError: with the value and what it may be.
    """
    if not 0 <= lr < math.inf:
        raise ValueError(f"the learning rate must be a finite number, not negative, got {lr=}")
    if num_queries < 1:
        raise ValueError(f"a step needs at least one direction, got {num_queries=}")
    if window is not None and window < 1:
        raise ValueError(f"a window holds at least the present step, got {window=}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight decay must be a finite number, not negative, got {weight_decay=}")
    if max_coefficient is not None and not max_coefficient > 0:
        raise ValueError(f"the limit of coefficients must be positive, got {max_coefficient=}")
    if not 0 <= index(seed) < 1 << 64:
        raise ValueError(f"a run's seed is an integer in [0, 2**64), got {seed=}")


def check_sampler(sampler: AnySampler, tuned: ParameterSet, window: int | None) -> None:
    """Refuse directions that cannot be made again, or not of the weights that this process holds.

    Raises:
        UsageError: they depend on weights that are gone, or on weights or a state that lie in shards.
    """
    if isinstance(sampler, ScaledSampler) and any(t.shard is not None for t in tuned):
        raise UsageError(
            "the directions of hizoo are scaled by the state of every element, and of this model a process holds a "
            "shard. Use another method, or tune the model unsharded."
        )
    if not depends_on_weights(sampler):
        return
    if window is not None:
        raise UsageError(
            "a window makes the directions of earlier steps again, but masks by magnitude are those of weights "
            'that have moved since. Use mask="random", or keep the state (window=None).'
        )
    if any(t.shard is not None for t in tuned):
        raise UsageError(
            "masks by magnitude compare weights as they are when they are read, and of this model a process holds a "
            'shard. Use mask="random", whose zeros follow an element\'s place, or tune the model unsharded.'
        )


def check_closure(closure: Closure | None) -> Closure:
    """Refuse a step without a closure, which torch's signature allows.

    Raises:
        TypeError: always with the remedy.
    """
    if closure is None:
        raise TypeError(
            "step needs a closure that returns the loss: opt.step(lambda: loss_fn(model(x), y)); "
            "it must not call backward()."
        )
    return closure


def check_own(estimate: GradientEstimate, directions: Sequence[Direction] | None) -> None:
    """Refuse an estimate along directions that are not the optimizer's own, which no record could describe.

    Raises:
        UsageError: its directions are not these, those of the step; None where a step has several estimates.
    """
    if [u for _, u in estimate.terms] != directions:
        raise UsageError(
            "a ledger holds steps along the optimizer's own directions; this estimate is of other ones, or of some "
            "blocks only. Use step(closure), or set on_step to None."
        )


def check_skipped(num_in_a_row: int, limit: int) -> None:
    """Stop a run whose steps are all skipped.

    Raises:
        NonFiniteLossError: so many steps in a row were skipped.
    """
    if num_in_a_row >= limit:
        raise NonFiniteLossError(
            f"the loss was NaN or infinite for {num_in_a_row} steps in a row (the weights are those "
            "before them). Lower the learning rate or mu, or use bfloat16 or float32 in place of float16."
        )


def as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Parameters, or torch's groups of them, as groups; of a (name, parameter) the parameter.

    >>> as_groups([1, ("b", 2)]), as_groups([{"params": [1], "lr": 0.5}])
    ([{'params': [1, 2]}], [{'params': [1], 'lr': 0.5}])
    """

    def plain(own: Any) -> list[Any]:
        return [p[1] if isinstance(p, tuple) else p for p in ([own] if isinstance(own, Tensor) else own)]

    given = plain(params)
    if given and isinstance(given[0], dict):
        return [{**group, "params": plain(group["params"])} for group in given]
    return [{"params": plain(given)}]
