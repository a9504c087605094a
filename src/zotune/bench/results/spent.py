"""What cells spent: steps, passes, time and memory of a run, and what the search for its learning rate looked at."""

from __future__ import annotations

from collections.abc import Sequence

from zotune.bench.results.records import CellResult
from zotune.bench.results.tables import Cell


def budgets(cells: Sequence[Cell]) -> list[dict[str, float | str | None]]:
    """What each cell spent, a run: and its search, all trials together."""
    return [_budget(c.result) for c in cells if c.result is not None and c.is_usable]


def _budget(result: CellResult) -> dict[str, float | str | None]:
    n = len(result.runs)
    chosen = result.chosen
    return {
        "cell": result.cell,
        "seeds": n,
        "learning rate": chosen.learning_rate if chosen else None,
        "μ": chosen.mu if chosen else None,
        "steps": sum(run.num_steps for run in result.runs) / n,
        "numbers tuned": result.runs[0].num_tuned,
        "forward passes": sum(run.num_forwards for run in result.runs) / n,
        "tokens": sum(run.num_tokens for run in result.runs) / n,
        "seconds": sum(run.seconds for run in result.runs) / n,
        "peak GiB": max(run.peak_memory for run in result.runs) / 2**30,
        "points searched": len(result.search),
        "rates searched": _rates_searched(result),
        "search's forward passes": sum(trial.num_forwards for trial in result.search),
        "search's seconds": sum(trial.seconds for trial in result.search),
    }


def _rates_searched(result: CellResult) -> str | None:
    """From which learning rate to which; and if the one chosen lies at an end, for then a better may lie beyond."""
    rates = sorted({trial.learning_rate for trial in result.search})
    if result.chosen is None or len(rates) < 2:
        return None
    ends = {rates[0]: ", the least chosen", rates[-1]: ", the greatest chosen"}
    return f"{rates[0]:g} to {rates[-1]:g}{ends.get(result.chosen.learning_rate, '')}"
