"""The schema of an experiment's TOML file and of the cells that it expands to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import Field

from zotune.bench.spec.claims import Claim
from zotune.bench.spec.targets import Passes
from zotune.bench.spec.vocabulary import Coordinate, Kind, Record, Scale
from zotune.llm.config.schema import Options


class Limits(Options):
    """The time (minutes) and the memory (GiB) after which a process is ended."""

    minutes: float = Field(60.0, gt=0)
    gib: float | None = Field(None, gt=0)


class SearchPlan(Options):
    """The search for a cell's learning rates and μ, by runs that see no evaluation row.

    Attributes:
        learning_rate, mu, hybrid_learning_rate: the values; the last one is that of a hybrid's first-order part.
        by: "grid" tries every point of the grid; "optuna" tries `num_trials` points that Optuna proposes between the
            smallest and the largest value. A grid of one point needs no run.
        steps: length of a trial, as a fraction of the run's steps.
        seed: the seed of all trials and of Optuna's proposals.
    """

    by: Literal["grid", "optuna"] = "grid"
    learning_rate: tuple[float, ...] = ()
    mu: tuple[float, ...] = ()
    hybrid_learning_rate: tuple[float, ...] = ()
    steps: float = Field(0.1, gt=0, le=1)
    num_trials: int = Field(10, ge=1)
    seed: int = 0


class Budget(Options):
    """The budget of each run, in place of a number of steps.

    Attributes:
        forward_equivalents: arithmetic in units of a forward pass: one with tangents counts 2, a back-propagated one 3
            (4 with checkpointing). The number of steps follows from what a few steps of the run take.
        seconds: training time, at the speed measured in the search's trials.
        mib: memory in MiB of a step and of loading above the process without a model. The run uses the first of
            `batch_sizes` whose peak stays below it and accumulates batches, so that the number of examples per step
            does not change.
        batch_sizes: the batch sizes to try, in this order.
    """

    forward_equivalents: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0)
    mib: float | None = Field(None, gt=0)
    batch_sizes: tuple[int, ...] = ()


class Rule(Options):
    """Options for the cells whose coordinates match `when` (values, patterns with * and ?, or lists of these)."""

    when: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    search: dict[str, Any] = Field(default_factory=dict)
    budget: dict[str, Any] = Field(default_factory=dict)
    limits: dict[str, Any] = Field(default_factory=dict)
    seeds: tuple[int, ...] | None = None
    skip: bool = Field(False, description="The experiment has no such cells.")

    def applies(self, coordinates: Mapping[str, Coordinate]) -> bool:
        """Whether the rule applies to a cell; an axis that the experiment lacks matches nothing."""
        return all(axis in coordinates and matches(coordinates[axis], wanted) for axis, wanted in self.when.items())


def matches(value: Coordinate, wanted: Any) -> bool:
    """Whether a value of an axis is one that a rule asks for: a value, a pattern, or a list of these."""
    if isinstance(wanted, list | tuple):
        return any(matches(value, one) for one in wanted)
    return fnmatchcase(str(value), wanted) if isinstance(wanted, str) else value == wanted


class Layer(Options):
    """The settings that a file, or one of its scales, gives to its cells."""

    axes: dict[str, tuple[Coordinate, ...]] = Field(default_factory=dict)
    seeds: tuple[int, ...] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    search: dict[str, Any] = Field(default_factory=dict)
    budget: dict[str, Any] = Field(default_factory=dict)
    limits: dict[str, Any] = Field(default_factory=dict)
    rules: tuple[Rule, ...] = ()


class PaperBlock(Options):
    """A block of the paper's numbers: `values[row]` has one number for each column, NaN where the paper gives none.

    Attributes:
        source: the table or figure of the paper.
        metric, unit: the name of the quantity, and the unit that the paper prints.
        fixed: the coordinates that all numbers share.
        row: the axis of the rows.
        columns: the coordinates of each column.
    """

    source: str
    metric: str = "accuracy"
    unit: str = "%"
    fixed: dict[str, Coordinate] = Field(default_factory=dict)
    row: str
    columns: tuple[dict[str, Coordinate], ...]
    values: dict[str, tuple[float, ...]]


class PaperCell(Record):
    """One number of the paper and its coordinates."""

    source: str
    metric: str
    unit: str
    coordinates: dict[str, Coordinate]
    value: float


class Layout(Options):
    """How results are shown: the axes of a table's rows and columns, and the x and y of figures.

    `x` is the name of an axis; each of `y` is the name of a quantity: `accuracy`, or a key of `values` or `measured`.
    `ranked` is the axis whose values are ranked by their accuracy in each column.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...] = ()
    x: str | None = None
    y: tuple[str, ...] = ()
    ranked: str | None = None


class Experiment(Layer):
    """A table or figure of the paper, or a user's own: the content of one TOML file."""

    title: str
    question: str
    kind: Kind = "accuracy"
    layout: Layout
    comparable: str = Field(description="Which numbers can be compared with the paper, and which cannot.")
    scale: dict[Scale, Layer]
    paper: tuple[PaperBlock, ...] = ()
    passes: Passes | None = Field(None, description="The comparison of methods by their passes to targets.")
    claims: tuple[Claim, ...] = ()

    def paper_cells(self) -> Iterator[PaperCell]:
        """Yield the paper's numbers one by one."""
        for block in self.paper:
            shared = {"source": block.source, "metric": block.metric, "unit": block.unit}
            for row, values in block.values.items():
                for column, value in zip(block.columns, values, strict=True):
                    if not math.isnan(value):
                        place = {**block.fixed, block.row: _coordinate(row), **column}
                        yield PaperCell(coordinates=place, value=value, **shared)


class CellSpec(Record):
    """A cell with all its options: everything that its result depends on except code and machine.

    Attributes:
        options: options of `zotune train` that differ from its defaults, without the seed and the searched options.
    """

    experiment: str
    scale: Scale
    name: str
    coordinates: dict[str, Coordinate]
    kind: Kind
    options: dict[str, Any]
    search: SearchPlan
    budget: Budget
    limits: Limits
    seeds: tuple[int, ...]

    @property
    def path(self) -> str:
        """The path that `--only` matches, `EXPERIMENT/CELL`."""
        return f"{self.experiment}/{self.name}"


class Defaults(Layer):
    """The content of `defaults.toml`."""

    scale: dict[Scale, Layer] = Field(default_factory=dict)


def _coordinate(key: str) -> Coordinate:
    """The value of an axis from a key of a TOML table, which is always text."""
    for number in (int, float):
        try:
            return number(key)
        except ValueError:
            continue
    return key
