"""The options of cells that measure one training step."""

from __future__ import annotations

from pydantic import Field

from zotune.plan.workload import Workload


class MeasuredStep(Workload):
    """A workload, the number of timed steps, and the formula that it is compared with."""

    num_steps: int = Field(3, ge=0, description="Steps to time, after one warm-up step; 0: use the formula alone.")
    formula: str | None = Field(None, description="The paper's formula, if it is another than the method's own.")
