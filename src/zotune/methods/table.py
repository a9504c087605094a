"""The zeroth-order methods by name."""

from __future__ import annotations

from collections.abc import Callable

from zotune.methods import paper
from zotune.methods.block_coordinate import block_coordinate
from zotune.methods.fzoo import fzoo
from zotune.methods.grzo import grzo
from zotune.methods.hizoo import hizoo
from zotune.methods.lozo import lozo
from zotune.methods.mopi import mopi
from zotune.methods.randopt import randopt
from zotune.methods.subzero import subzero
from zotune.methods.zo_muon import zo_muon
from zotune.optim.zeroth_order import ZerothOrder

METHODS: dict[str, Callable[..., ZerothOrder]] = {
    **paper.METHODS,
    "fzoo": fzoo,
    "randopt": randopt,
    "block_coordinate": block_coordinate,
    "subzero": subzero,
    "lozo": lozo,
    "zo_muon": zo_muon,
    "mopi": mopi,
    "hizoo": hizoo,
    "grzo": grzo,
}
"""Every zeroth-order method by name: feeds the command line, the docs and the tests."""

OF_EXAMPLES = ("grzo",)
"""Those whose objective has to know each example's loss (`zotune.per_example`)."""
