"""What the methods share: the options of `ZerothOrder` as types, and checks of their own hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypedDict

from zotune.apply.tensor_update import Rounding
from zotune.directions.block_choice import OneBlock
from zotune.directions.blocks import Block, BlockOrder
from zotune.directions.samplers import PhiloxSampler, Sampler
from zotune.directions.schedule import AnySampler
from zotune.errors import UsageError
from zotune.estimate.finite_difference import Estimator

Difference = Callable[..., Any]


class Shared(TypedDict, total=False):
    """The options that all methods leave to `ZerothOrder`, where it says what they mean."""

    block_order: BlockOrder | str
    reuse_prefix: bool
    weight_decay: float
    max_coefficient: float | None
    rounding: Rounding | str
    seed: int
    max_skipped: int


class OwnBlocks(Shared, total=False):
    """The options of a method that chooses blocks."""

    params: Iterable[Any] | None


class OwnGroups(Shared, total=False):
    """The options of methods that draw directions of their own and give some tensors a learning rate of their own."""

    blocks: Sequence[Block] | OneBlock | None


class OwnDirections(OwnBlocks, total=False):
    """The options of methods that draw directions of their own."""

    blocks: Sequence[Block] | OneBlock | None


class OwnQueries(OwnDirections, total=False):
    """The options of methods that have defaults of their own for sampler and number of queries."""

    window: int | None


class Options(OwnQueries, total=False):
    """The options of methods that leave all but their rule to `ZerothOrder`."""

    sampler: AnySampler
    num_queries: int
    directions_per_batch: int | str | None


def differences(difference: Difference, mu: float, **more: Any) -> Estimator:
    """The estimator of some differences, with its constants.

    Raises:
        ValueError: μ is not positive.
    """
    if not mu > 0:
        raise ValueError(f"mu is the distance moved along a direction and must be positive, got {mu=}")
    return partial(difference, mu=mu, **more)


def check_decay(name: str, beta: float) -> None:
    """Refuse a share of the past that is none.

    Raises:
        ValueError: with the value.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"{name} is the share of the past that is kept, at least 0 and below 1; got {beta}")


def entries_of(method: str, sampler: AnySampler) -> Sampler:
    """The distribution of the entries of a method's own directions.

    Raises:
        UsageError: the sampler has directions of its own.
    """
    if not isinstance(sampler, PhiloxSampler):
        raise UsageError(
            f"{method} makes directions of its own shape; its sampler is the distribution of their entries, gaussian "
            f"or rademacher, not {sampler!r}. For sparse directions and such of low rank use zo_sgd."
        )
    return sampler
