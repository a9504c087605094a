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


class Passes(Options):
    """The comparison of methods by the passes that they take to targets.

    Attributes:
        method: the axis of the methods; cells that agree on all other axes are compared.
        reference: the methods of which the best is the reference.
        beside: methods that are shown beside the others and not compared, such as first-order ones.
    """

    method: str
    reference: tuple[str, ...]
    beside: tuple[str, ...] = ()
    targets: tuple[Target, ...]
