"""Peak memory by the paper's formulas, under the names that the tables use, and by our own prediction.

The formulas and their terms are in `zotune.plan.formulas`. This module adds the formulas of mixed precision, in which
activations and a copy of the weights have half their size (the paper, appendix C.2).
"""

from __future__ import annotations

from collections.abc import Callable

from zotune.plan.formulas import FORMULAS, Terms
from zotune.plan.predict import Architecture
from zotune.plan.workload import Workload


def _mixed(terms: Terms) -> float:
    """Bytes that a backward pass in mixed precision needs at its peak, max(½ a + ½ x, Σ_l max(½ a_l, x_l))."""
    halved = sum(max(layer.activations / 2, layer.tuned) for layer in terms.layers)
    return max(terms.a / 2 + terms.x / 2, halved)


_BY_NAME = {formula.name: formula.total for formula in FORMULAS}

VARIANTS: dict[str, Callable[[Terms], float]] = {
    "fo_sgd": _BY_NAME["FO-SGD"],
    "fo_adam": _BY_NAME["FO-Adam"],
    "fo_adam_single": _BY_NAME["FO-Adam, no foreach"],
    "fo_sgd_mixed": lambda t: t.x + _mixed(t),
    "fo_adam_mixed": lambda t: t.x + _mixed(t) + 3 * t.tuned,
    "forward_grad": _BY_NAME["Forward-Grad"],
    "zo_sgd_vanilla": _BY_NAME["vanilla ZO-SGD"],
    **dict.fromkeys(("zo_sgd", "zo_sgd_sign", "zo_sgd_cons"), _BY_NAME["ZO-SGD"]),
    "zo_sgd_mmt": _BY_NAME["ZO-SGD-MMT"],
    "zo_adam": _BY_NAME["ZO-Adam"],
}
"""Peak bytes by the paper's formula, by the name of a method or of a variant of it."""


def memory_by_formula(workload: Workload, variant: str) -> dict[str, float | None]:
    """The memory of a step without running it: the terms, the paper's formula for a variant, and our prediction.

    The prediction, of the step without loading, is None for a variant that zotune does not implement; the formula is
    None for hybrids and for methods that are not in the paper.

    Raises:
        UsageError: the model cannot be found or cannot be tuned as the workload says.
    """
    model = Architecture(workload)
    terms = model.terms(workload)
    formula = VARIANTS.get(variant) if workload.hybrid_layers is None else None
    return {
        "weight_bytes": terms.x,
        "tuned_bytes": terms.tuned,
        "activation_bytes": terms.a,
        "formula_bytes": None if formula is None else formula(terms),
        "predicted_bytes": model.predict(workload).running if variant == workload.method else None,
    }
