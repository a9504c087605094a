"""zotune: fine-tune language models with forward passes only, at the memory of inference.

    import zotune as zo

    opt = zo.zo_sgd(model, lr=1e-6, mu=1e-3)           # tunes the parameters that require a gradient
    loss = opt.step(lambda: loss_fn(model(x), y))      # the closure returns the loss, and never calls backward

Names are imported at their first use, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zotune.blocks import BLOCKS as BLOCKS
    from zotune.blocks import Block as Block
    from zotune.blocks import blocks_by_layer as blocks_by_layer
    from zotune.blocks import blocks_by_linear as blocks_by_linear
    from zotune.blocks import blocks_by_part as blocks_by_part
    from zotune.blocks import blocks_by_size as blocks_by_size
    from zotune.closures import accumulate as accumulate
    from zotune.closures import batched as batched
    from zotune.directions import SAMPLERS as SAMPLERS
    from zotune.directions import Direction as Direction
    from zotune.directions import Sampler as Sampler
    from zotune.directions import gaussian as gaussian
    from zotune.directions import rademacher as rademacher
    from zotune.errors import NonFiniteLossError as NonFiniteLossError
    from zotune.errors import RunError as RunError
    from zotune.errors import UnreadTensorError as UnreadTensorError
    from zotune.errors import UsageError as UsageError
    from zotune.errors import ZotuneError as ZotuneError
    from zotune.estimate import GradientEstimate as GradientEstimate
    from zotune.estimators import central_difference as central_difference
    from zotune.estimators import forward_difference as forward_difference
    from zotune.forward_mode import forward_gradient as forward_gradient
    from zotune.gradient_check import CheckedForwardGradient as CheckedForwardGradient
    from zotune.hybrid import Hybrid as Hybrid
    from zotune.hybrid import split_at_layer as split_at_layer
    from zotune.methods import METHODS as METHODS
    from zotune.methods import forward_grad as forward_grad
    from zotune.methods import zo_adam as zo_adam
    from zotune.methods import zo_sgd as zo_sgd
    from zotune.methods import zo_sgd_cons as zo_sgd_cons
    from zotune.methods import zo_sgd_mmt as zo_sgd_mmt
    from zotune.methods import zo_sgd_sign as zo_sgd_sign
    from zotune.optimizer import ZerothOrder as ZerothOrder
    from zotune.perturb import perturbed as perturbed
    from zotune.rank import low_rank as low_rank
    from zotune.sparsity import sparse as sparse
    from zotune.tuned import TunedTensors as TunedTensors
    from zotune.update import Rounding as Rounding

__version__ = "0.1.0"

_MODULES = {
    "closures": ("accumulate", "batched"),
    "blocks": ("BLOCKS", "Block", "blocks_by_layer", "blocks_by_linear", "blocks_by_part", "blocks_by_size"),
    "directions": ("SAMPLERS", "Direction", "Sampler", "gaussian", "rademacher"),
    "errors": ("NonFiniteLossError", "RunError", "UnreadTensorError", "UsageError", "ZotuneError"),
    "estimate": ("GradientEstimate",),
    "estimators": ("central_difference", "forward_difference"),
    "forward_mode": ("forward_gradient",),
    "gradient_check": ("CheckedForwardGradient",),
    "hybrid": ("Hybrid", "split_at_layer"),
    "methods": ("METHODS", "forward_grad", "zo_adam", "zo_sgd", "zo_sgd_cons", "zo_sgd_mmt", "zo_sgd_sign"),
    "optimizer": ("ZerothOrder",),
    "perturb": ("perturbed",),
    "rank": ("low_rank",),
    "sparsity": ("sparse",),
    "tuned": ("TunedTensors",),
    "update": ("Rounding",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zotune' has no attribute {name!r}")
    value = getattr(import_module(f"zotune.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
