"""Say before a run starts that it cannot work: a μ or a learning rate below what the precision can hold."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from zotune.apply.tensor_update import Rounding
from zotune.apply.update import updated_slice
from zotune.errors import UsageError
from zotune.estimate.estimate import GradientEstimate
from zotune.model.parameters import ParameterSet, TunedTensor
from zotune.optim.zeroth_order import ZerothOrder

# Elements of each tensor that are tried.
_SAMPLE = 4096
# Refuse where fewer of them than this fraction would change. Zeros do not count: anything changes them.
_LEAST = 0.001


def check_mu(tuned: ParameterSet, mu: float) -> None:
    """Refuse a μ that leaves every tuned number as it is once rounded to its precision.

    Raises:
        UsageError: x + μ = x for (nearly) every non-zero element tried.
    """
    samples = [_sample(tensor) for tensor in tuned]
    if _changed((x, x + mu) for x in samples) >= _LEAST:
        return
    dtypes = ", ".join(sorted({str(t.storage().dtype).removeprefix("torch.") for t in tuned}))
    raise UsageError(
        f"mu is {mu:g}, too small for weights in {dtypes}: every weight plus or minus mu rounds to itself, so "
        f"both probes see the same model. Use mu of at least {_least_mu(tuned):.0e}, or float32 weights or adapters."
    )


def check_first_estimate(optimizer: ZerothOrder, estimate: GradientEstimate, mu: float | None) -> None:
    """Refuse probes whose losses do not differ, and updates that would all be rounded away.

    `mu` is None where equal losses are no fault: without probes, or where the objective is a staircase.

    Raises:
        UsageError: with what to change.
    """
    # A single block may well have no slope at first: that of an adapter's first factor, say, while the second is zero.
    if estimate.is_finite and mu is not None and all(c == 0 and u.block is None for c, u in estimate.terms):
        raise UsageError(
            f"mu is {mu:g}, below the resolution of the loss: both probes gave the same loss ({estimate.loss:.6g}), so "
            "every coefficient would be zero. Use a larger mu, or float32 in place of half precision."
        )
    has_slope = estimate.is_finite and any(c != 0 for c, _ in estimate.terms)
    if optimizer.rounding == Rounding.NEAREST and has_slope and not _moves(optimizer, estimate):
        raise UsageError(
            f"the learning rate {optimizer.param_groups[0]['lr']:g} cannot work with rounding to nearest: "
            "the first update is below half a rounding unit of every weight, so nothing would move. "
            "Use --rounding stochastic or master, a larger learning rate, or float32."
        )


def _moves(optimizer: ZerothOrder, estimate: GradientEstimate) -> bool:
    """Whether an update, rounded to nearest, changes more than a trace of the elements tried."""
    pairs = []
    for update in optimizer.updates(estimate).values():
        x = _sample(update.tensor)
        after = torch.empty_like(x)
        updated_slice(update, after, x, start=0, scale=1.0)
        pairs.append((x, after))
    return _changed(pairs) >= _LEAST


def _sample(tensor: TunedTensor) -> Tensor:
    return tensor.storage().flatten()[:_SAMPLE].clone()


def _changed(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The fraction of non-zero elements that differ between before and after; 1 where all are zero."""
    counts = [(int((x != 0).sum()), int(((x != 0) & (after != x)).sum())) for x, after in pairs]
    total = sum(n for n, _ in counts)
    return sum(moved for _, moved in counts) / total if total else 1.0


def _least_mu(tuned: ParameterSet) -> float:
    """A power of ten at which the median weight moves."""
    sizes = [_sample(t).float().abs().median() * torch.finfo(t.storage().dtype).eps for t in tuned]
    return float(10 ** torch.stack([s.cpu() for s in sizes]).max().log10().ceil())
