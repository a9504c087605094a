"""RandOpt: random points, of which the best are kept. What it reaches, every other method has to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Unpack

import torch
from torch import Tensor, nn

from zotune.directions.direction import Direction
from zotune.directions.samplers import gaussian
from zotune.directions.schedule import AnySampler
from zotune.errors import UsageError
from zotune.estimate.coefficients import best, by_block
from zotune.estimate.estimate import GradientEstimate
from zotune.estimate.estimators import takes
from zotune.estimate.finite_difference import forward_difference
from zotune.estimate.objective import Closure, probing
from zotune.estimate.perturb import perturbed
from zotune.methods.options import OwnQueries, differences
from zotune.model.parameters import ParameterSet
from zotune.optim.zeroth_order import ZerothOrder


def randopt(
    model: nn.Module,
    lr: float,
    *,
    mu: float = 1e-3,
    num_queries: int = 16,
    keep: int = 1,
    only_better: bool = True,
    sampler: AnySampler = gaussian,
    **options: Unpack[OwnQueries],
) -> ZerothOrder:
    r"""RandOpt: the mean of the best few of some random points, the control of every comparison.

        lᵢ = f(x + μuᵢ)        for uᵢ drawn anew each step, i = 1 … K
        x  ← x + η (1/k) Σ uᵢ over the k smallest lᵢ

    With η = μ a step lands on the mean of the k best points. One step with the whole training set as its batch is the
    published method, which draws thousands of points once; more steps begin where the last one has led. In place of
    the mean, the best points may vote: see `majority`.

    Args:
        model: its parameters that require a gradient are tuned.
        lr: η ≥ 0, how far to go along the mean of the best directions; μ as published.
        mu: μ > 0, the distance of the points from x along a direction, in units of the parameters.
        num_queries: K ≥ 1 points a step.
        keep: k, from 1 to K.
        only_better: x competes as well: points that are no better than x are not among the best, and x stays where
            there are no others. False keeps the k best of the points, as published.
        sampler: the distribution of the points around x; Gaussian as published.
        options: those of `ZerothOrder`.

    Forward passes a step: K + 1. Memory: at most the largest tuned tensor. No state.

    Raises:
        ValueError: k is not in 1 … K.

    Source: Gan and Isola, 2026 (Neural Thickets), who keep 50 of 5,000 points and let them vote.

    >>> model = nn.Linear(3, 1, bias=False)
    >>> opt = randopt(model, lr=0.1, mu=0.1)
    >>> losses = [opt.step(lambda: model.weight.square().sum()) for _ in range(20)]
    >>> losses == sorted(losses, reverse=True), opt.num_forwards
    (True, 340)
    """
    if not 1 <= keep <= num_queries:
        raise ValueError(f"of {num_queries} points at least 1 and at most all are kept, got {keep=}")
    estimator = differences(best_points, mu, keep=keep, only_better=only_better)
    return ZerothOrder(model, lr, estimator=estimator, num_queries=num_queries, sampler=sampler, **options)


@takes(each=1, at_x=1)
def best_points(
    closure: Closure, tuned: ParameterSet, directions: Sequence[Direction], *, mu: float, keep: int, only_better: bool
) -> GradientEstimate:
    """The directions to the `keep` best of the points x + μuᵢ of each block: coefficients -1/k, and 0 of the others."""
    estimate = forward_difference(closure, tuned, directions, mu=mu)
    return by_block(estimate, partial(best, keep=keep, only_better=only_better))


def majority(
    model: nn.Module | ParameterSet, estimate: GradientEstimate, mu: float, predict: Callable[[], Tensor]
) -> Tensor:
    """The answers that most of the best points give; the weights do not move.

    Args:
        model: the model that the estimate was made at, with the same weights.
        estimate: of `randopt`: opt.estimate(closure).
        mu: μ of that optimizer.
        predict: runs the model and returns a class for each row: integers ≥ 0 of shape (rows,).

    Returns:
        The most frequent class of each row, the smallest of equally frequent ones: shape (rows,).

    Raises:
        UsageError: the estimate has no best points.

    >>> model = nn.Linear(2, 2)
    >>> x, y = torch.randn(64, 2), torch.randint(2, (64,))
    >>> opt = randopt(model, lr=0.3, mu=0.3, keep=5)
    >>> estimate = opt.estimate(lambda: nn.functional.cross_entropy(model(x), y))
    >>> majority(model, estimate, 0.3, lambda: model(x).argmax(dim=1)).shape
    torch.Size([64])
    """
    tuned, voters = ParameterSet.of(model), [u for c, u in estimate.terms if c]
    if not voters:
        raise UsageError("no point of this estimate was better than the weights themselves, so there is none to vote.")
    ballots = []
    with probing(tuned.model):
        for u in voters:
            with perturbed(tuned, u, mu):
                ballots.append(predict().long())
    return counted(torch.stack(ballots)).argmax(dim=0)


def counted(votes: Tensor) -> Tensor:
    """How many voters (voters, rows) have given each class to each row: shape (classes, rows).

    >>> counted(torch.tensor([[0, 2], [0, 1], [1, 1]])).tolist()
    [[2, 0], [1, 2], [0, 1]]
    """
    return torch.stack([(votes == label).sum(dim=0) for label in range(int(votes.max()) + 1)])
