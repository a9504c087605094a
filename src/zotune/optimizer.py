"""The zeroth-order optimizer: direction → estimate → transform → apply, equation (2) of the paper."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zotune.directions import Direction, Sampler, Terms, add_terms, combine, rademacher
from zotune.errors import NonFiniteLossError
from zotune.estimate import GradientEstimate
from zotune.estimators import Closure, Estimator, central_difference
from zotune.noise import compute_dtype, derive_seed, round_to
from zotune.transforms import Transform, identity
from zotune.tuned import TunedTensor, TunedTensors

_DIRECTION, _ROUNDING = 0, 1


class Rounding(StrEnum):
    """How an update is written into bfloat16 or float16 weights. It concerns no other dtype.

    `STOCHASTIC` rounds up or down at random so that the mean is exact and nothing is stored; `MASTER`
    keeps a float32 copy (4 bytes a number); `NEAREST` loses every update below half a rounding unit.
    """

    STOCHASTIC = "stochastic"
    MASTER = "master"
    NEAREST = "nearest"


class ZerothOrder(torch.optim.Optimizer):
    """A torch optimizer that needs forward passes only. Its closure returns the loss and never calls backward.

    Args:
        model: any `nn.Module`; its parameters that require a gradient are tuned.
        lr: learning rate η ≥ 0.
        estimator: how ĝ is made from the objective and the directions; default: `central_difference`, μ = 1e-3.
        transform: h; a function of one tensor's part of ĝ and its state.
        sampler: the distribution of the directions.
        num_queries: q ≥ 1, directions a step.
        rounding: how half-precision weights are written; see `Rounding`.
        seed: names the run: the same seed, model and objective give the same bits.
        params: tune these instead: parameters of `model`, or groups of them as in torch, with their own `lr`.
        max_skipped: after so many steps in a row with a NaN or infinite loss, `NonFiniteLossError` is raised.

    Attributes:
        num_steps: steps taken so far, skipped ones included.
        num_skipped: steps whose loss was NaN or infinite; they left weights and state untouched.
        num_forwards: evaluations of the objective so far.

    >>> model = nn.Linear(3, 1)
    >>> x, y = torch.randn(8, 3), torch.zeros(8, 1)
    >>> opt = ZerothOrder(model, lr=0.05)
    >>> losses = [opt.step(lambda: nn.functional.mse_loss(model(x), y)) for _ in range(100)]
    >>> losses[-1] < losses[0]
    True
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        estimator: Estimator | None = None,
        transform: Transform = identity,
        sampler: Sampler = rademacher,
        num_queries: int = 1,
        rounding: Rounding | str = Rounding.STOCHASTIC,
        seed: int = 0,
        params: Iterable[Any] | None = None,
        max_skipped: int = 10,
    ) -> None:
        if lr < 0:
            raise ValueError(f"the learning rate must not be negative, got {lr=}")
        if num_queries < 1:
            raise ValueError(f"a step needs at least one direction, got {num_queries=}")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"a run's seed is an integer in [0, 2**64), got {seed=}")
        groups = None if params is None else _groups(params)
        chosen = None if groups is None else [p for group in groups for p in group["params"]]
        self.tuned = TunedTensors(model, chosen)
        self.estimator: Estimator = estimator or partial(central_difference, mu=1e-3)
        self.transform, self.sampler = transform, sampler
        self.num_queries, self.rounding, self.seed = num_queries, Rounding(rounding), seed
        self.max_skipped, self._skipped_in_a_row = max_skipped, 0
        self.num_steps = self.num_skipped = self.num_forwards = 0
        super().__init__(groups or [{"params": [t.parameter for t in self.tuned]}], {"lr": lr})

    def directions(self) -> list[Direction]:
        """The directions of the coming step: a function of the seed and the number of steps taken."""
        return [
            Direction(derive_seed(self.seed, self.num_steps, query, _DIRECTION), self.sampler)
            for query in range(self.num_queries)
        ]

    def estimate(self, closure: Closure) -> GradientEstimate:
        """ĝ at the present weights, from forward passes only; the weights are untouched."""
        estimate = self.estimator(closure, self.tuned, self.directions())
        self.num_forwards += estimate.num_forwards
        return estimate

    def apply(self, estimate: GradientEstimate) -> None:
        """X ← x - η h(ĝ), one tensor at a time. An estimate that is not finite is counted and left out.

        Raises:
            NonFiniteLossError: `max_skipped` estimates in a row were not finite.
        """
        if estimate.is_finite:
            self._skipped_in_a_row = 0
            rounding_seed = derive_seed(self.seed, self.num_steps, 0, _ROUNDING)
            for group in self.param_groups:
                for p in group["params"]:
                    tensor = self.tuned.find(p)
                    assert tensor is not None
                    self._update(tensor, estimate.terms, float(group["lr"]), rounding_seed)
            # An enclosing torch.autocast remembers casts of the weights, which are now those before the update.
            torch.clear_autocast_cache()
        self.num_steps += 1
        if not estimate.is_finite:
            self._skip()

    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """One step; returns the loss. `closure` returns the loss and never calls backward.

        It is called `estimate.num_forwards` times, so it must be a function of the weights: the same
        batch each time. Modules are in eval mode meanwhile (no dropout).
        """
        if closure is None:
            raise TypeError(
                "step needs a closure that returns the loss: opt.step(lambda: loss_fn(model(x), y)); "
                "it must not call backward()."
            )
        estimate = self.estimate(closure)
        self.apply(estimate)
        return estimate.loss

    def _skip(self) -> None:
        self.num_skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.max_skipped:
            raise NonFiniteLossError(
                f"the loss was NaN or infinite for {self._skipped_in_a_row} steps in a row (the weights are those "
                "before them). Lower the learning rate or mu, or use bfloat16 or float32 in place of float16."
            )

    @torch.no_grad()
    def _update(self, tensor: TunedTensor, terms: Terms, lr: float, rounding_seed: int) -> None:
        weights, state = tensor.storage(), self.state[tensor.parameter]
        is_half = weights.dtype in (torch.bfloat16, torch.float16)
        x, random = weights.contiguous().view(-1), None
        if is_half and self.rounding == Rounding.MASTER:
            x = state["master"] = state["master"] if "master" in state else x.float()
        elif is_half and self.rounding == Rounding.STOCHASTIC:
            random = rounding_seed
        if self.transform is identity:
            add_terms(x, x, [(-lr * c, u) for c, u in terms], tensor.id, rounding_seed=random)
        else:
            dtype = compute_dtype(weights.dtype)
            gradient = combine(terms, tensor)
            step = self.transform(gradient, state).view(-1)
            round_to(x, x.to(dtype) - lr * step, random, tensor.id)
        if x.data_ptr() != weights.data_ptr():
            weights.copy_(x.view(weights.shape))

    def state_dict(self) -> dict[str, Any]:
        """torch's, and under "zeroth_order" what names the next step: seed and counters."""
        return {**super().state_dict(), "zeroth_order": {name: getattr(self, name) for name in _COUNTERS}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken; float32 state stays float32."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "zeroth_order"})
        # torch casts state to the parameter's dtype, which would round master weights and momenta.
        order = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, p in zip(order, (p for group in self.param_groups for p in group["params"]), strict=True):
            if index in state_dict["state"]:
                self.state[p] = copy.deepcopy(state_dict["state"][index])
        for name, value in state_dict["zeroth_order"].items():
            setattr(self, name, value)


_COUNTERS = ("seed", "num_steps", "num_skipped", "num_forwards", "_skipped_in_a_row")


def _groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Parameters, or torch's groups of them, as groups."""
    given = list(params)
    if given and isinstance(given[0], dict):
        return [{**group, "params": [p] if isinstance(p := group["params"], Tensor) else list(p)} for group in given]
    return [{"params": given}]
