"""What each cell cost: a mean run, and all trials of its search together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from zotune.bench.results.cells import Cell
from zotune.bench.results.quantities import Quantity, quantity, run_values
from zotune.bench.results.records import CellResult


def cell_costs(cells: Sequence[Cell]) -> list[dict[str, float | str | None]]:
    """The costs of each usable cell: those of a mean run, and those of all trials of its search together."""
    return [_costs_of(c.result) for c in cells if c.result is not None and c.is_usable]


def _costs_of(result: CellResult) -> dict[str, float | str | None]:
    chosen = result.chosen
    return {
        "cell": result.cell,
        "seeds": len(result.runs),
        "learning rate": chosen.learning_rate if chosen else None,
        "μ": chosen.mu if chosen else None,
        "steps": mean_of(result, "num_steps"),
        "tuned parameters": result.runs[0].num_tuned,
        "forward-equivalents": mean_of(result, "forward_equivalents"),
        "layer passes": mean_of(result, "layer_passes"),
        "calls of the model": mean_of(result, "num_forwards"),
        "tokens": mean_of(result, "num_tokens"),
        "seconds": mean_of(result, "seconds"),
        "step GiB": greatest(result, "step_bytes"),
        "loading GiB": greatest(result, "loading_bytes"),
        "points searched": len(result.search),
        "rates searched": _rates_searched(result),
        "search's forward-equivalents": search_cost(result, "forward_equivalents"),
        "search's seconds": search_cost(result, "seconds"),
    }


def mean_of(result: CellResult, name: str) -> float | None:
    """The mean of a quantity over a cell's runs; None if no run has it."""
    values = run_values(result, _STEPS if name == "num_steps" else quantity(name))
    return sum(values) / len(values) if values else None


def greatest(result: CellResult, name: str) -> float | None:
    """The greatest of a quantity over a cell's runs; None if no run has it."""
    return max(run_values(result, quantity(name)), default=None)


def search_cost(result: CellResult, name: Literal["forward_equivalents", "seconds"]) -> float | None:
    """The cost of all trials of a cell's search together; None if it was not recorded."""
    costs = [getattr(trial, name) for trial in result.search]
    return None if None in costs else float(sum(costs))


_STEPS = Quantity("num_steps", "steps", "", lambda run: run.num_steps)


def _rates_searched(result: CellResult) -> str | None:
    """The range of searched learning rates, with a note if the chosen one lies at an end: a better may lie beyond."""
    rates = sorted({trial.learning_rate for trial in result.search})
    if result.chosen is None or len(rates) < 2:
        return None
    ends = {rates[0]: ", the least chosen", rates[-1]: ", the greatest chosen"}
    return f"{rates[0]:g} to {rates[-1]:g}{ends.get(result.chosen.learning_rate, '')}"
