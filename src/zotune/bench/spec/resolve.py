"""From experiments to cells: each combination of an experiment's axis values becomes a cell with all its options.

Four layers set the options of a cell, each over the ones before: the defaults, the defaults' scale, the experiment, the
experiment's scale. Within a layer its options come first, then those of its rules that match the cell, in their order.
An axis that has the name of an option sets this option, unless a rule gives the axis value another meaning.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, get_args

from zotune.bench.spec.schema import Budget, CellSpec, Defaults, Experiment, Layer, Limits, SearchPlan, matches
from zotune.bench.spec.vocabulary import Coordinate, Kind, Scale
from zotune.errors import UsageError, did_you_mean
from zotune.llm.config.method import LATER, MethodName
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.schema import Options, check_file, validate

EXPERIMENTS = Path(__file__).parent / "experiments"
DEFAULTS = Path(__file__).parent / "defaults.toml"
# In place of an option's value: use the default of `zotune train`.
UNSET = "default"


def names() -> tuple[str, ...]:
    """The names of the experiments in this package, in the paper's order."""
    stems = {path.stem for path in EXPERIMENTS.glob("*.toml")}
    order = ("table1", "table2", "fig1", "table3", "table4", "table5", "fig2", "fig3", "table6", "table7", "table8")
    first = [name for name in (*order, "tableA1", "tableA2") if name in stems]
    return (*first, *sorted(stems - set(first)))


def find(name: str) -> tuple[str, Experiment]:
    """Read an experiment by its name or from the path of a TOML file.

    Returns:
        The name under which its results are stored, and the experiment.

    Raises:
        UsageError: there is no such experiment, or its file is wrong.
    """
    path = Path(name) if name.endswith(".toml") else EXPERIMENTS / f"{name}.toml"
    if not path.is_file():
        hint = did_you_mean(name, names())
        raise UsageError(f"there is no experiment {name!r}.{hint} For an experiment of your own, give its TOML file.")
    return path.stem, validate(Experiment, _read(path), str(path))


@cache
def defaults() -> Defaults:
    """The settings that all experiments share."""
    return validate(Defaults, _read(DEFAULTS), str(DEFAULTS))


def cells(name: str, experiment: Experiment, scale: Scale) -> Iterator[CellSpec]:
    """Yield the cells of an experiment at a scale, in the order of its axes.

    Raises:
        UsageError: the experiment lacks the scale, or a cell's options are invalid; the message names the cell.
    """
    if scale not in experiment.scale:
        raise UsageError(f"{name} has no scale {scale!r}.{did_you_mean(scale, experiment.scale)}")
    _check_rules(name, experiment)
    shared = defaults()
    layers = (shared, shared.scale.get(scale, Layer()), experiment, experiment.scale[scale])
    axes: dict[str, tuple[Coordinate, ...]] = {}
    for layer in layers:
        axes |= layer.axes
    values = [_expand(axis, patterns) for axis, patterns in axes.items()]
    places: dict[str, dict[str, Coordinate]] = {}
    for place in itertools.product(*values):
        coordinates = dict(zip(axes, place, strict=True))
        spec = _resolve(name, experiment.kind, scale, coordinates, layers)
        if spec is None:
            continue
        if spec.name in places:
            raise UsageError(
                f"{name}: two cells would be called {spec.name}, at {places[spec.name]} and {coordinates}; give one of "
                "them another value of an axis."
            )
        places[spec.name] = coordinates
        yield spec


def cell_name(coordinates: Mapping[str, Coordinate]) -> str:
    """The name of a cell, which is that of its file too: the values of its axes, without slashes.

    >>> cell_name({"method": "zo_sgd", "model": "facebook/opt-125m", "length": 64})
    'zo_sgd--facebook__opt-125m--64'
    """
    return "--".join(str(value).replace("/", "__") for value in coordinates.values())


def _check_rules(name: str, experiment: Experiment) -> None:
    """Check that each rule of an experiment can apply to a cell of some scale.

    Raises:
        UsageError: a rule names an axis, or a value of it, that the experiment does not have.
    """
    layers = (experiment, *experiment.scale.values())
    values: dict[str, list[Coordinate]] = {}
    for layer in layers:
        for axis, some in layer.axes.items():
            values.setdefault(axis, []).extend(_expand(axis, some))
    for axis, wanted in ((axis, one) for layer in layers for rule in layer.rules for axis, one in rule.when.items()):
        if axis not in values:
            raise UsageError(
                f"{name}: a rule's `when` names {axis!r}, which is no axis of the experiment."
                f"{did_you_mean(axis, values)} The axes are {', '.join(values)}."
            )
        for one in wanted if isinstance(wanted, list | tuple) else [wanted]:
            if not any(matches(value, one) for value in values[axis]):
                known = [str(value) for value in dict.fromkeys(values[axis])]
                raise UsageError(
                    f"{name}: a rule's `when` asks for {axis} = {one!r}, which no cell has."
                    f"{did_you_mean(str(one), known)} Its values are {', '.join(known)}."
                )


def _resolve(
    name: str, kind: Kind, scale: Scale, coordinates: dict[str, Coordinate], layers: tuple[Layer, ...]
) -> CellSpec | None:
    """The cell at these coordinates; None if a rule skips it."""
    merged: dict[str, dict[str, Any]] = {"options": {}, "search": {}, "budget": {}, "limits": {}}
    kind = coordinates.get("kind", kind)  # type: ignore[assignment]
    schema = schema_of(kind)
    merged["options"] |= {axis: v for axis, v in coordinates.items() if axis in schema.model_fields}
    seeds: tuple[int, ...] = (0,)
    for layer in layers:
        rules = [rule for rule in layer.rules if rule.applies(coordinates)]
        seeds = next(filter(None, (rule.seeds for rule in reversed(rules))), layer.seeds or seeds)
        if any(rule.skip for rule in rules):
            return None
        for part, values in merged.items():
            # Only a rule may change an option that an axis sets.
            values |= {k: v for k, v in getattr(layer, part).items() if part != "options" or k not in coordinates}
            for rule in rules:
                values |= getattr(rule, part)
        if isinstance(layer, Defaults) or layer is layers[1]:
            # The shared defaults hold options that some kinds of cells do not have.
            merged["options"] = {k: v for k, v in merged["options"].items() if k in schema.model_fields}
    cell = cell_name(coordinates)
    place = f"{name}/{cell} at scale {scale}"
    options = {k: v for k, v in merged["options"].items() if v != UNSET}
    search, budget, limits = (
        validate(of_part, merged[part], place)
        for part, of_part in (("search", SearchPlan), ("budget", Budget), ("limits", Limits))
    )
    check_file(options, place)
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
    """The schema of the options of a kind of cell: those of a training run, or of a measured step."""
    if kind in ("accuracy", "quality"):
        return TrainConfig
    from zotune.bench.spec.measured_step import MeasuredStep

    return MeasuredStep


def _expand(axis: str, values: tuple[Coordinate, ...]) -> tuple[Coordinate, ...]:
    """The values of an axis; values of `method` and `task` may be patterns, so that new tasks join."""
    names_of_axis = _names_of_axis(axis)
    expanded: list[Coordinate] = []
    for value in values:
        is_pattern = names_of_axis and isinstance(value, str) and "*" in value
        expanded += [name for name in names_of_axis if fnmatchcase(name, str(value))] if is_pattern else [value]
    return tuple(dict.fromkeys(expanded))


def _names_of_axis(axis: str) -> tuple[str, ...]:
    """All names that a pattern on an axis can stand for; empty for axes without patterns."""
    if axis == "method":
        # The paper's experiments compare the paper's methods; an experiment names later ones itself.
        return tuple(name for name in get_args(MethodName) if name not in LATER)
    if axis == "task":
        from zotune.llm.tasks import TASKS

        return tuple(TASKS)
    return ()


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}") from None
