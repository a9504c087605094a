"""The paper's claims as data: a sentence, its place, and which cells must be above which."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from zotune.bench.spec.vocabulary import Coordinate, is_amount
from zotune.llm.config.schema import Options

# From an axis to a value, a pattern, or a tuple of values and patterns.
Selection = dict[str, Coordinate | tuple[Coordinate, ...]]
# What a claim is about, which decides how its verdict can fail: by chance, by the machine, or by arithmetic.
Subject = Literal["accuracy", "memory and time", "formulas"]
_FORMULA_WORDS = frozenset({"formula", "predicted", "expected"})


class Claim(Options):
    """A sentence of the paper and the comparison that it makes: Σ mean(more) − Σ mean(less) > `by`.

    Each selection names axes and their values or patterns; it stands for the mean of all cells that match. `more` and
    `less` may hold several selections, whose means are added: a difference of differences has two of each. Cells are
    compared within settings, that is, at equal values of all axes that no selection names.

    Attributes:
        sentence, where: the claim, and its place in the paper. Text between “ and ” is the paper's, word for word, but
            for omissions (…) and additions in brackets.
        of: the quantity that is compared.
        each: an axis; the claim must hold for each of its values on the side that has several ("the best of all",
            "the worst of all"). `some`: the claim must hold for at least one of them.
        settings: the settings in which the comparison must hold: in their mean, in all, in at least half, or in some.
        spread: an axis; the claim compares the standard deviation over its values instead of the mean.
        among: only cells that match this selection are compared.
        by: the least difference: points of a rate, or a fraction of an amount (0.1 means a tenth more). A value below
            0 means "not worse by more than this".
        within: the claim says that both sides are equal up to this difference; `by` is then ignored.
        contradicted_by: what in the paper's own table contradicts the claim; empty if its numbers support it.
    """

    sentence: str
    where: str
    more: tuple[Selection, ...] = Field(min_length=1)
    less: tuple[Selection, ...] = ()
    of: str = "accuracy"
    each: str | None = None
    some: str | None = None
    settings: Literal["mean", "all", "half", "some"] = "mean"
    spread: str | None = None
    among: Selection = Field(default_factory=dict)
    by: float = 0.0
    within: float | None = Field(None, gt=0)
    contradicted_by: str = ""

    @property
    def subject(self) -> Subject:
        """What the claim is about."""
        if not _FORMULA_WORDS.isdisjoint(self.of.replace("/", "_").split("_")):
            return "formulas"
        return "memory and time" if is_amount(self.of) else "accuracy"

    @model_validator(mode="after")
    def _amounts_stay_above_zero(self) -> Self:
        if self.by <= -1 and is_amount(self.of):
            raise ValueError(f"by = {self.by:g}: for an amount such as {self.of}, by is a fraction above -1")
        return self
