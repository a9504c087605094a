"""Which stale results can be verified, and which of them are of one kind.

Two results are of one kind if they come from the same commit and machine and their options are equal, except numbers,
which must be both 0, both 1, or both larger, so that today's code runs the same branches for all of them. (A coarser
notion, which takes less time and proves less, is the same method, tuning and precision.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zotune.bench.results.records import CellResult, read_result, result_path
from zotune.bench.run.runner import state_of
from zotune.bench.spec.schema import CellSpec
from zotune.bench.spec.vocabulary import Alike

# The options in which results of one kind agree by the coarser notion; in half precision first-order methods run other
# code than in single precision, and a hybrid has a first-order part.
_NAMES_OF_A_METHOD = ("method", "tuning", "dtype", "hybrid_method")


@dataclass(frozen=True)
class Stale:
    """A cell and its stored result, which other code computed."""

    spec: CellSpec
    result: CellResult

    @property
    def commit(self) -> str:
        """The commit of the code that computed the result or verified it last."""
        return (self.result.verified[-1] if self.result.verified else self.result).commit

    @property
    def seconds(self) -> float:
        """Seconds of the run of the first seed."""
        return self.result.runs[0].seconds if self.result.runs else 0.0


@dataclass(frozen=True)
class Group:
    """Stale results of one kind, the cheapest first."""

    members: tuple[Stale, ...]
    alike: Alike = "options"

    @property
    def cheapest(self) -> Stale:
        """The result that is recomputed."""
        return self.members[0]

    @property
    def name(self) -> str:
        """A name for readers: kind, method, tuning, model and task."""
        options = self.cheapest.spec.options
        named = (options.get(name) for name in ("method", "tuning", "model", "task"))
        return " · ".join([self.cheapest.spec.kind, *map(str, filter(None, named))])


def stale_of(
    results: Path, specs: Sequence[CellSpec], of_commit: str | None = None
) -> tuple[list[Stale], dict[str, str]]:
    """The stale results that can be verified, and for the others the reasons by path.

    Args:
        results: folder of the results.
        specs: the cells.
        of_commit: accept only results of this commit's code.
    """
    stale: list[Stale] = []
    left: dict[str, str] = {}
    for spec in specs:
        if state_of(results, spec) != "stale":
            continue
        result = read_result(result_path(results, spec.scale, spec.experiment, spec.name))
        assert result is not None
        if result.kind != spec.kind or _config_of(result.config, spec) != _config_of(_dumped(spec), spec):
            left[spec.path] = "the config of the cell has changed"
        elif result.status != "done":
            left[spec.path] = f"it is not done: {result.status}"
        elif of_commit is not None and of_commit != (last := Stale(spec, result).commit):
            left[spec.path] = f"it was computed by the code of {last}, not of {of_commit}"
        else:
            stale.append(Stale(spec, result))
    return stale, left


def _dumped(spec: CellSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", include={"options", "search", "budget", "seeds"})


def _config_of(config: Mapping[str, Any], spec: CellSpec) -> dict[str, Any]:
    """The parts of a config that the result depends on."""
    parts = ("options", "seeds", "search", "budget") if spec.kind == "accuracy" else ("options", "seeds")
    return {name: config.get(name) for name in parts}


def grouped(stale: Sequence[Stale], alike: Alike = "options") -> list[Group]:
    """Group stale results by their kinds."""
    groups: dict[str, list[Stale]] = {}
    for one in stale:
        groups.setdefault(_kind_of(one, alike), []).append(one)
    return [Group(tuple(sorted(some, key=lambda s: (s.seconds, s.spec.path))), alike) for some in groups.values()]


def _kind_of(one: Stale, alike: Alike) -> str:
    """A text that is equal for results of one kind."""
    spec, result = one.spec, one.result
    last = result.verified[-1] if result.verified else result
    named = {name: spec.options.get(name) for name in _NAMES_OF_A_METHOD}
    options = named if alike == "method" else without_amounts(spec.options)
    is_measured = any(run.measured for run in result.runs)
    origin = (one.commit, result.environment, last.environment)
    return json.dumps([spec.kind, is_measured, origin, options], sort_keys=True)


def without_amounts(value: Any) -> Any:
    """Replace each number by "none" (0), "one" (1) or "more".

    >>> without_amounts({"method": "zo_sgd", "num_queries": 16, "sparsity": 0.2, "gated": True, "layers": [1, 0]})
    {'method': 'zo_sgd', 'num_queries': 'more', 'sparsity': 'more', 'gated': True, 'layers': ['one', 'none']}
    """
    if isinstance(value, Mapping):
        return {name: without_amounts(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_amounts(one) for one in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "none" if value == 0 else "one" if value == 1 else "more"
    return value
