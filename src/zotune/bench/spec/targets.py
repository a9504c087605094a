"""Targets of an experiment: what a run has to reach, and the methods that others are compared with."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from zotune.llm.config.schema import Options


class Target(Options):
    """What the evaluations on held-out rows have to reach, and stay at: a number, or a share of the reference's way.

    The reference's way leads from the untuned model to the end of its best trial in the search, whose seed none of the
    compared runs has. So no target depends on a run that is compared by it.

    Attributes:
        when: coordinates of the cells that have this target (values, patterns, or lists of these).
        loss: at most so much.
        accuracy: at least so much, in points.
        way: so much of the reference's way, for each place by itself.
        measure: the way in loss or in accuracy.
    """

    when: dict[str, Any] = Field(default_factory=dict)
    loss: float | None = None
    accuracy: float | None = Field(None, ge=0, le=100)
    way: float | None = Field(None, gt=0)
    measure: Literal["loss", "accuracy"] = "loss"

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        if sum(one is not None for one in (self.loss, self.accuracy, self.way)) != 1:
            raise ValueError("a target is a loss, an accuracy or a way; give one of the three")
        return self


class Published(Options):
    """What the authors of a method publish, as a comparison that our runs can make.

    Attributes:
        method: the method, a value of the experiment's axis of methods.
        sentence: the claim in our words; source: where it is published.
        against: the method it is compared with; empty: the reference.
        times: at least so many times fewer passes.
        points: at least so many points more accuracy for the same passes; below 0: not worse by more than this.
    """

    method: str
    sentence: str
    source: str
    against: str = ""
    times: float | None = Field(None, gt=0)
    points: float | None = None

    @model_validator(mode="after")
    def _compares_one(self) -> Self:
        if (self.times is None) == (self.points is None):
            raise ValueError("a published claim is about times fewer passes or points of accuracy; give one of the two")
        return self


class Passes(Options):
    """The comparison of methods by the passes that they take to targets.

    Attributes:
        method: the axis of the methods; cells that agree on all other axes are compared.
        reference: the methods of which the best is the reference.
        beside: methods that are shown beside the others and not compared, such as first-order ones.
        published: what the methods' authors claim; published_target: where "times fewer" is measured.
    """

    method: str
    reference: tuple[str, ...]
    beside: tuple[str, ...] = ()
    targets: tuple[Target, ...]
    published: tuple[Published, ...] = ()
    published_target: Target = Target(way=1.0)
