"""Which cells a command is about, by the names of experiments and patterns of cells."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from zotune.bench.spec.resolve import cells, find, names
from zotune.bench.spec.schema import CellSpec
from zotune.bench.spec.vocabulary import Scale
from zotune.errors import UsageError


def chosen_cells(
    experiments: Sequence[str], scale: Scale, patterns: Sequence[str] = ("*",), data_source: str | None = None
) -> dict[str, list[CellSpec]]:
    """Return the cells that match names and patterns, by experiment.

    Args:
        experiments: names of experiments or TOML files; none means every experiment of the scale.
        scale: the size of the cells.
        patterns: patterns of `EXPERIMENT/CELL`, or of an experiment's name alone.
        data_source: the source of the tasks' rows, if it is not the experiment's own.

    Raises:
        UsageError: a name is unknown, or no cell matches.
    """
    selection: dict[str, list[CellSpec]] = {}
    for name in experiments or names():
        stem, experiment = find(name)
        if experiments or scale in experiment.scale:
            candidates = (with_data_source(c, data_source) for c in cells(stem, experiment, scale))
            selection[stem] = [c for c in candidates if any(_matches(c, p) for p in patterns)]
    if not any(selection.values()):
        wanted = " or ".join(patterns)
        raise UsageError(
            f"no cell of {', '.join(selection)} matches {wanted}; `zotune bench run --dry-run` lists the cells."
        )
    return selection


def _matches(spec: CellSpec, pattern: str) -> bool:
    return fnmatchcase(spec.path if "/" in pattern else spec.experiment, pattern)


def with_data_source(spec: CellSpec, data_source: str | None) -> CellSpec:
    """Return the cell with another source of its task's rows; None leaves it as it is."""
    if data_source is None or "task" not in spec.options:
        return spec
    return spec.model_copy(update={"options": {**spec.options, "data_source": data_source}})
