"""The plan as tables on the terminal."""

from __future__ import annotations

import sys
from itertools import groupby

from rich.console import Console
from rich.table import Table

from zotune.messages import one_line
from zotune.plan.formulas import FORMULAS, Layer, Terms
from zotune.plan.planning import Plan, gib

# Width of tables when the output is not a terminal.
_WIDTH = 140
# Labels of the parts outside the layer stack, by their names in `zotune.plan.formulas`.
_LABELS = {
    "before the layers": "before the layers: embedding",
    "after the layers": "after the layers: norm, head, logits",
}


def show(plan: Plan) -> None:
    """Print the formulas, the prediction and the advice on standard output."""
    # Names of models and layers are text, and no markup.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDTH, highlight=False, markup=False)
    config = plan.config
    console.print(
        f"{one_line(config.model)}, {config.tuning} tuning, {config.dtype}: {config.per_device_train_batch_size} x "
        f"{config.length} tokens, {config.objective}"
    )
    console.print(_layers(plan.terms))
    console.print(_terms(plan.terms))
    console.print(_formulas(plan))
    console.print(_prediction(plan))
    if plan.libraries:
        console.print(
            f"The total includes {gib(plan.libraries)} for the process and its libraries, which use the same memory."
        )
    if plan.places is not None:
        console.print(f"{plan.places}.", soft_wrap=True)
    console.print(plan.advice)


def _layers(terms: Terms) -> Table:
    """The bytes of each layer; consecutive equal layers share a row."""
    table = Table(title="Layers, each", title_justify="left")
    for name in ("", "weights ‖x_l‖", "tuned", "activations ‖a_l‖ for a backward pass"):
        table.add_column(name, justify="right" if name else "left")
    for (weights, tuned, activations), equal in groupby(terms.layers, _sizes):
        names = [layer.name for layer in equal]
        name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1].rpartition('.')[2]}"
        table.add_row(_LABELS.get(name, name), gib(weights), gib(tuned), gib(activations))
    return table


def _sizes(layer: Layer) -> tuple[int, int, int]:
    return layer.weights, layer.tuned, layer.activations


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
    table = Table(title="Prediction for zotune's implementation", title_justify="left")
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
