"""Targets of an experiment: what a run has to reach, and the methods that others are compared with."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from zotune.llm.config.schema import Options


class Target(Options):
    """What the evaluations on held-out rows have to reach, and stay at.

    Attributes:
        when: coordinates of the cells that have this target (values, patterns, or lists of these).
        loss: at most so much.
        accuracy: at least so much, in points.
    """

    when: dict[str, Any] = Field(default_factory=dict)
    loss: float | None = None
    accuracy: float | None = Field(None, ge=0, le=100)

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        if (self.loss is None) == (self.accuracy is None):
            raise ValueError("a target is a loss or an accuracy; give one of the two")
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
