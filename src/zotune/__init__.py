"""zotune: fine-tune language models with forward passes only, at the memory of inference.

    import zotune as zo

    opt = zo.zo_sgd(model, lr=1e-6, mu=1e-3)           # tunes the parameters that require a gradient
    loss = opt.step(lambda: loss_fn(model(x), y))      # the closure returns the loss, and never calls backward

Names are imported at their first use, so that the command line answers before torch is loaded.
"""

import warnings

from zotune.system.lazy_names import lazy_names

# `python -m zotune` looks for modules in the current folder until its own first lines run, so nothing is imported here
# that Python has not imported itself, neither `typing` nor `__future__`.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from zotune.apply.tensor_update import Rounding as Rounding
    from zotune.directions.blocks import BLOCKS as BLOCKS
    from zotune.directions.blocks import Block as Block
    from zotune.directions.blocks import blocks_by_layer as blocks_by_layer
    from zotune.directions.blocks import blocks_by_linear as blocks_by_linear
    from zotune.directions.blocks import blocks_by_part as blocks_by_part
    from zotune.directions.blocks import blocks_by_size as blocks_by_size
    from zotune.directions.direction import Direction as Direction
    from zotune.directions.flipped import flipped as flipped
    from zotune.directions.input_scaled import input_scaled as input_scaled
    from zotune.directions.input_scaled import input_scales as input_scales
    from zotune.directions.low_rank import low_rank as low_rank
    from zotune.directions.principal import principal_subspaces as principal_subspaces
    from zotune.directions.samplers import SAMPLERS as SAMPLERS
    from zotune.directions.samplers import Sampler as Sampler
    from zotune.directions.samplers import gaussian as gaussian
    from zotune.directions.samplers import rademacher as rademacher
    from zotune.directions.sparse import sparse as sparse
    from zotune.directions.subspace import subspace as subspace
    from zotune.directions.within import within as within
    from zotune.errors import NonFiniteLossError as NonFiniteLossError
    from zotune.errors import RunError as RunError
    from zotune.errors import UnreadTensorError as UnreadTensorError
    from zotune.errors import UsageError as UsageError
    from zotune.errors import ZotuneError as ZotuneError
    from zotune.estimate.estimate import GradientEstimate as GradientEstimate
    from zotune.estimate.finite_difference import central_difference as central_difference
    from zotune.estimate.finite_difference import forward_difference as forward_difference
    from zotune.estimate.forward_mode.gradient_check import CheckedForwardGradient as CheckedForwardGradient
    from zotune.estimate.forward_mode.jvp import forward_gradient as forward_gradient
    from zotune.estimate.mesh import Mesh as Mesh
    from zotune.estimate.mesh import mesh as mesh
    from zotune.estimate.objective import accumulate as accumulate
    from zotune.estimate.objective import batched as batched
    from zotune.estimate.per_example.objective import per_example as per_example
    from zotune.estimate.perturb import perturbed as perturbed
    from zotune.methods.block_coordinate import block_coordinate as block_coordinate
    from zotune.methods.block_coordinate import dominant_layer as dominant_layer
    from zotune.methods.fzoo import fzoo as fzoo
    from zotune.methods.grzo import grzo as grzo
    from zotune.methods.hizoo import hizoo as hizoo
    from zotune.methods.lozo import lozo as lozo
    from zotune.methods.mopi import mopi as mopi
    from zotune.methods.paper import forward_grad as forward_grad
    from zotune.methods.paper import zo_adam as zo_adam
    from zotune.methods.paper import zo_sgd as zo_sgd
    from zotune.methods.paper import zo_sgd_cons as zo_sgd_cons
    from zotune.methods.paper import zo_sgd_mmt as zo_sgd_mmt
    from zotune.methods.paper import zo_sgd_sign as zo_sgd_sign
    from zotune.methods.randopt import majority as majority
    from zotune.methods.randopt import randopt as randopt
    from zotune.methods.subzero import subzero as subzero
    from zotune.methods.table import METHODS as METHODS
    from zotune.methods.zo_muon import zo_muon as zo_muon
    from zotune.model.parameters import ParameterSet as ParameterSet
    from zotune.optim.hybrid import Hybrid as Hybrid
    from zotune.optim.hybrid import split_at_layer as split_at_layer
    from zotune.optim.zeroth_order import ZerothOrder as ZerothOrder

__version__ = "0.1.0"

_MODULES = {
    "estimate.mesh": ("Mesh", "mesh"),
    "estimate.objective": ("accumulate", "batched"),
    "estimate.per_example.objective": ("per_example",),
    "directions.blocks": ("BLOCKS", "Block", "blocks_by_layer", "blocks_by_linear", "blocks_by_part", "blocks_by_size"),
    "directions.direction": ("Direction",),
    "directions.samplers": ("SAMPLERS", "Sampler", "gaussian", "rademacher"),
    "errors": ("NonFiniteLossError", "RunError", "UnreadTensorError", "UsageError", "ZotuneError"),
    "estimate.estimate": ("GradientEstimate",),
    "estimate.finite_difference": ("central_difference", "forward_difference"),
    "estimate.forward_mode.jvp": ("forward_gradient",),
    "estimate.forward_mode.gradient_check": ("CheckedForwardGradient",),
    "optim.hybrid": ("Hybrid", "split_at_layer"),
    "methods.block_coordinate": ("block_coordinate", "dominant_layer"),
    "methods.fzoo": ("fzoo",),
    "methods.paper": ("forward_grad", "zo_adam", "zo_sgd", "zo_sgd_cons", "zo_sgd_mmt", "zo_sgd_sign"),
    "methods.grzo": ("grzo",),
    "methods.hizoo": ("hizoo",),
    "methods.lozo": ("lozo",),
    "methods.mopi": ("mopi",),
    "methods.randopt": ("majority", "randopt"),
    "methods.subzero": ("subzero",),
    "methods.table": ("METHODS",),
    "methods.zo_muon": ("zo_muon",),
    "optim.zeroth_order": ("ZerothOrder",),
    "estimate.perturb": ("perturbed",),
    "directions.flipped": ("flipped",),
    "directions.low_rank": ("low_rank",),
    "directions.sparse": ("sparse",),
    "directions.subspace": ("subspace",),
    "directions.within": ("within",),
    "directions.input_scaled": ("input_scaled", "input_scales"),
    "directions.principal": ("principal_subspaces",),
    "model.parameters": ("ParameterSet",),
    "apply.tensor_update": ("Rounding",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
_import = lazy_names(__name__, _HOME)

__all__ = sorted([*_HOME, "__version__"])


# Former names, each with its present one; they go with the version after the next.
_RENAMED = {"TunedTensors": "ParameterSet"}


def __getattr__(name: str) -> "Any":
    if name in _RENAMED:
        message = f"zotune.{name} is now zotune.{_RENAMED[name]}; the former name will be removed in version 0.3."
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return _import(_RENAMED[name])
    return _import(name)


def __dir__() -> list[str]:
    return __all__
