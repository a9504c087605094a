"""A plan as tables on the terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from zotune.plan.formulas import FORMULAS, Terms
from zotune.plan.planning import Plan, gib

# Where nobody watches, a table is as wide as it needs to be.
_WIDTH = 140


def show(plan: Plan) -> None:
    """The formulas, the prediction and the advice, on standard output."""
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    config = plan.config
    console.print(
        f"{config.model}, {config.tuning} tuning, {config.dtype}: {config.per_device_train_batch_size} x "
        f"{config.length} tokens, {config.objective}"
    )
    console.print(_terms(plan.terms))
    console.print(_formulas(plan))
    console.print(_prediction(plan))
    if plan.libraries:
        console.print(
            f"total holds {gib(plan.libraries)} of the process itself, which has its libraries in the same memory"
        )
    console.print(plan.advice)


def _terms(terms: Terms) -> str:
    return (
        f"‖x‖ {gib(terms.x)} (tuned {gib(terms.tuned)}), max_l ‖x_l‖ {gib(terms.max_tuned)}, ‖a‖ {gib(terms.a)}, "
        f"max_l ‖a_l‖ {gib(terms.max_a)}, Σ_l max(‖a_l‖, ‖x_l‖) {gib(terms.larger)}"
    )


def _formulas(plan: Plan) -> Table:
    table = Table(title="The paper's formulas (Table 5) with these numbers", title_justify="left")
    for name in ("optimizer", "gradient and step", "state"):
        table.add_column(name)
    table.add_column("total", justify="right")
    if plan.is_papers:
        table.add_column("the paper measured", justify="right")
    for f in FORMULAS:
        paper = [f"{f.paper} GiB"] if plan.is_papers else []
        table.add_row(f.name, f.dynamic, f.state, gib(f.total(plan.terms)), *paper)
    return table


def _prediction(plan: Plan) -> Table:
    table = Table(title="zotune's own", title_justify="left")
    table.add_column("method")
    parts = ("weights", "loading", "state", "gradients", "activations", "scratch", "reused", "overhead")
    used = [part for part in parts if any(getattr(row.prediction, part) for row in plan.rows)]
    limited, timed = plan.config.limit is not None, plan.config.calibrate
    more = ["total", *(["fits", f"largest {plan.config.largest}"] * limited), *(["seconds a step"] * timed)]
    for name in (*used, *more):
        table.add_column(name, justify="right")
    for row in plan.rows:
        sizes = [gib(n) if (n := getattr(row.prediction, part)) else "" for part in used]
        fits = ["yes" if row.fits else "no", str(row.largest)] if limited else []
        seconds = ["too large here" if row.seconds is None else f"{row.seconds:.2f}"] if timed else []
        table.add_row(row.method, *sizes, gib(row.total), *fits, *seconds)
    return table
