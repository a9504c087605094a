"""What the paper says, as data in an experiment's file: a sentence, its place, and which cells must be above which."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from zotune.bench.results.quantities import quantity
from zotune.bench.results.records import Coordinate
from zotune.llm.config.schema import Options

# Axis to value, to a pattern, or to several of them.
Selection = dict[str, Coordinate | tuple[Coordinate, ...]]


class Claim(Options):
    """A sentence of the paper and the comparison that it makes: Σ mean(more) − Σ mean(less) > `by`.

    Each selection names axes and their values, also as patterns; it stands for the mean of the cells that match. `more`
    and `less` may hold several, which are added: a difference of differences has two of each.

    Attributes:
        sentence, where: what the paper says, in its words or near them, and in which place.
        of: the quantity that is compared.
        each: an axis: the claim must hold for each of its values by itself, on the side that has several ("the best of
            all", "the worst of all"); `some`: for one of them at least.
        spread: an axis: what is compared is the standard deviation over the values of it, not the mean.
        among: only cells that match count.
        by: how much more at least: points of a rate, else a fraction (0.1: a tenth more). Below 0: not worse by more.
        within: the claim is that both are the same up to so much; `by` is not used.
    """

    sentence: str
    where: str
    more: tuple[Selection, ...] = Field(min_length=1)
    less: tuple[Selection, ...] = ()
    of: str = "accuracy"
    each: str | None = None
    some: str | None = None
    spread: str | None = None
    among: Selection = Field(default_factory=dict)
    by: float = 0.0
    within: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _amounts_stay_above_zero(self) -> Self:
        if self.by <= -1 and quantity(self.of).by_ratio:
            raise ValueError(f"by = {self.by:g}: of an amount it is a fraction, above -1")
        return self
