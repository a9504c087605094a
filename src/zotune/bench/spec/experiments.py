"""Experiments: one TOML file a table or figure of the paper, holding what differs from `defaults.toml`.

An experiment spans axes (method, tuning, …); each combination of their values is a cell. What a cell runs is settled
by four layers, each over the ones before: the defaults, the defaults' scale, the experiment, the experiment's scale.
Within a layer its options come first, then those of its rules that apply to the cell, in their order. An axis that
bears the name of an option sets it, unless a rule says what the value means.
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from zotune.bench.results.records import Coordinate, Kind, Record, Scale
from zotune.bench.spec.claims import Claim
from zotune.errors import UsageError, did_you_mean
from zotune.llm.config.method import MethodName
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.schema import Options, validate

EXPERIMENTS = Path(__file__).parent / "experiments"
DEFAULTS = Path(__file__).parent / "defaults.toml"
# In place of an option's value: leave it at what `zotune train` has by default.
UNSET = "default"


class Limits(Options):
    """What one process may take before it is ended."""

    minutes: float = Field(60.0, gt=0)
    gib: float | None = Field(None, gt=0)


class SearchPlan(Options):
    """How a cell's learning rate and μ are chosen, by runs that see no evaluation row.

    Attributes:
        by: every point of the grid, or as many as `num_trials` that Optuna proposes between the smallest and the
            largest value. A grid of one point is taken without a run.
        steps: length of a trial, as a fraction of the run's steps.
        seed: of all trials, and of Optuna's proposals.
    """

    by: Literal["grid", "optuna"] = "grid"
    learning_rate: tuple[float, ...] = ()
    mu: tuple[float, ...] = ()
    steps: float = Field(0.1, gt=0, le=1)
    num_trials: int = Field(10, ge=1)
    seed: int = 0


class Budget(Options):
    """What each run may spend, in place of a number of steps.

    Attributes:
        forwards: forward passes' worth of arithmetic; a back-propagation counts as two more (three with checkpointing),
            a forward pass with tangents as two.
        seconds: of training, at the speed that the search's trials had.
        mib: peak memory; the first of `batch_sizes` that stays below it is taken, with as many batches accumulated as
            keep the examples a step what they are.
    """

    forwards: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0)
    mib: float | None = Field(None, gt=0)
    batch_sizes: tuple[int, ...] = ()


class Rule(Options):
    """Options of some cells: those whose coordinates match `when` (patterns with * and ?, or lists of them)."""

    when: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    search: dict[str, Any] = Field(default_factory=dict)
    budget: dict[str, Any] = Field(default_factory=dict)
    limits: dict[str, Any] = Field(default_factory=dict)
    skip: bool = Field(False, description="There are no such cells.")

    def applies(self, coordinates: Mapping[str, Coordinate]) -> bool:
        """Whether the rule is about a cell; an axis that the experiment lacks matches nothing."""
        return all(axis in coordinates and _matches(coordinates[axis], wanted) for axis, wanted in self.when.items())


class Layer(Options):
    """What a file, or one of its scales, says of its cells."""

    axes: dict[str, tuple[Coordinate, ...]] = Field(default_factory=dict)
    seeds: tuple[int, ...] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    search: dict[str, Any] = Field(default_factory=dict)
    budget: dict[str, Any] = Field(default_factory=dict)
    limits: dict[str, Any] = Field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    minutes: float | None = Field(None, description="What all cells of a scale take here, one process at a time.")


class PaperBlock(Options):
    """Numbers of the paper: `values[row] = [one a column]`; NaN where it gives none.

    Attributes:
        metric: what they are; `unit` as the paper prints them.
        fixed: coordinates of all of them; `row`: the axis of the rows; `columns`: the coordinates of each column.
    """

    source: str
    metric: str = "accuracy"
    unit: str = "%"
    fixed: dict[str, Coordinate] = Field(default_factory=dict)
    row: str
    columns: tuple[dict[str, Coordinate], ...]
    values: dict[str, tuple[float, ...]]


class PaperCell(Record):
    """One number of the paper and its place."""

    source: str
    metric: str
    unit: str
    coordinates: dict[str, Coordinate]
    value: float


class Layout(Options):
    """How results are shown: axes of a table's rows and columns; of a figure also what is drawn over what.

    `x` and `y` are names of axes, of numbers in `values` or `measured`, or `accuracy`.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...] = ()
    x: str | None = None
    y: tuple[str, ...] = ()


class Experiment(Layer):
    """One table or figure."""

    title: str
    question: str
    kind: Kind = "accuracy"
    layout: Layout
    comparable: str = Field(description="What may be compared with the paper, and what may not.")
    scale: dict[Scale, Layer]
    paper: tuple[PaperBlock, ...] = ()
    claims: tuple[Claim, ...] = ()

    def paper_cells(self) -> Iterator[PaperCell]:
        """The paper's numbers, one by one."""
        for block in self.paper:
            shared = {"source": block.source, "metric": block.metric, "unit": block.unit}
            for row, values in block.values.items():
                for column, value in zip(block.columns, values, strict=True):
                    if not math.isnan(value):
                        place = {**block.fixed, block.row: _as_coordinate(row), **column}
                        yield PaperCell(coordinates=place, value=value, **shared)


class CellSpec(Record):
    """A cell, settled: all that its result depends on but code and machine.

    Attributes:
        options: those of `zotune train` that differ from its defaults, without seed and what the search chooses.
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
        """As `--only` sees it."""
        return f"{self.experiment}/{self.name}"


class Defaults(Layer):
    """`defaults.toml`."""

    scale: dict[Scale, Layer] = Field(default_factory=dict)


def names() -> tuple[str, ...]:
    """The experiments that are shipped, in the paper's order."""
    found = {path.stem for path in EXPERIMENTS.glob("*.toml")}
    order = ("table1", "table2", "fig1", "table3", "table4", "table5", "fig2", "fig3", "table6", "table7", "table8")
    first = [name for name in (*order, "tableA1", "tableA2") if name in found]
    return (*first, *sorted(found - set(first)))


def find(name: str) -> tuple[str, Experiment]:
    """An experiment of a name, or of a TOML file of one's own; with the name that its results go by.

    Raises:
        UsageError: there is none, or its file is wrong.
    """
    path = Path(name) if name.endswith(".toml") else EXPERIMENTS / f"{name}.toml"
    if not path.is_file():
        hint = did_you_mean(name, names())
        raise UsageError(f"there is no experiment {name!r}.{hint} One of your own is a TOML file's path.")
    return path.stem, validate(Experiment, _read(path), str(path))


@cache
def defaults() -> Defaults:
    """What all experiments share."""
    return validate(Defaults, _read(DEFAULTS), str(DEFAULTS))


def cells(name: str, experiment: Experiment, scale: Scale) -> Iterator[CellSpec]:
    """The cells of an experiment at a scale, in the order of its axes.

    Raises:
        UsageError: a cell's options make no sense; the message names the cell.
    """
    if scale not in experiment.scale:
        raise UsageError(f"{name} has no scale {scale!r}.{did_you_mean(scale, experiment.scale)}")
    shared = defaults()
    layers = (shared, shared.scale.get(scale, Layer()), experiment, experiment.scale[scale])
    axes: dict[str, tuple[Coordinate, ...]] = {}
    for layer in layers:
        axes |= layer.axes
    values = [_expanded(axis, given) for axis, given in axes.items()]
    for place in itertools.product(*values):
        coordinates = dict(zip(axes, place, strict=True))
        spec = _settled(name, experiment.kind, scale, coordinates, layers)
        if spec is not None:
            yield spec


def _settled(
    name: str, kind: Kind, scale: Scale, coordinates: dict[str, Coordinate], layers: tuple[Layer, ...]
) -> CellSpec | None:
    """A cell of these coordinates; None where a rule says that there is none."""
    merged: dict[str, dict[str, Any]] = {"options": {}, "search": {}, "budget": {}, "limits": {}}
    kind = coordinates.get("kind", kind)  # type: ignore[assignment]
    schema = schema_of(kind)
    merged["options"] |= {axis: v for axis, v in coordinates.items() if axis in schema.model_fields}
    seeds: tuple[int, ...] = (0,)
    for layer in layers:
        seeds = layer.seeds or seeds
        rules = [rule for rule in layer.rules if rule.applies(coordinates)]
        if any(rule.skip for rule in rules):
            return None
        for part, values in merged.items():
            # What an axis sets, only a rule may change.
            values |= {k: v for k, v in getattr(layer, part).items() if part != "options" or k not in coordinates}
            for rule in rules:
                values |= getattr(rule, part)
        if isinstance(layer, Defaults) or layer is layers[1]:
            # What all experiments share holds options that some kinds of cells have no use for.
            merged["options"] = {k: v for k, v in merged["options"].items() if k in schema.model_fields}
    cell = "--".join(str(value) for value in coordinates.values())
    place = f"{name}/{cell} at scale {scale}"
    options = {k: v for k, v in merged["options"].items() if v != UNSET}
    search, budget, limits = (
        validate(of_part, merged[part], place)
        for part, of_part in (("search", SearchPlan), ("budget", Budget), ("limits", Limits))
    )
    validate(schema, options, place)
    return CellSpec(
        experiment=name,
        scale=scale,
        name=cell,
        coordinates=coordinates,
        kind=kind,
        options=options,
        search=search,
        budget=budget,
        limits=limits,
        seeds=seeds,
    )


def schema_of(kind: Kind) -> type[Options]:
    """The schema of the options of a kind of cell: a run's, or a step's."""
    if kind in ("accuracy", "quality"):
        return TrainConfig
    from zotune.bench.measure.step import MeasuredStep

    return MeasuredStep


def _expanded(axis: str, values: tuple[Coordinate, ...]) -> tuple[Coordinate, ...]:
    """The values of an axis; those of methods and tasks may be patterns, so that a new one appears by itself."""
    known = _known(axis)
    found: list[Coordinate] = []
    for value in values:
        is_pattern = known and isinstance(value, str) and "*" in value
        found += [k for k in known if fnmatchcase(k, str(value))] if is_pattern else [value]
    return tuple(dict.fromkeys(found))


def _known(axis: str) -> tuple[str, ...]:
    if axis == "method":
        return get_args(MethodName)
    if axis == "task":
        from zotune.llm.tasks import TASKS

        return tuple(TASKS)
    return ()


def _matches(value: Coordinate, wanted: Any) -> bool:
    if isinstance(wanted, list | tuple):
        return any(_matches(value, one) for one in wanted)
    return fnmatchcase(str(value), wanted) if isinstance(wanted, str) else value == wanted


def _as_coordinate(text: str) -> Coordinate:
    """A key of a TOML table as the axis has it: keys are always text."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}") from None
