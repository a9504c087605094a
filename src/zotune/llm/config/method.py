"""The options of the optimisation: method, gradient estimate, blocks, sparsity, low rank, rounding, hybrid."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from zotune.llm.config.schema import Options, is_partial

# The names of the methods, for help and validation without loading torch; a test compares them with the tables.
MethodName = Literal[
    "zo_sgd", "zo_sgd_sign", "zo_sgd_mmt", "zo_sgd_cons", "zo_adam", "forward_grad", "fo_sgd", "fo_adam"
]
FIRST_ORDER = ("fo_sgd", "fo_adam")
# Those of transformers that are functions of the step, so that a ledger and a resumed run repeat them.
SchedulerName = Literal[
    "constant",
    "linear",
    "cosine",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]


def _function_of_the_step(value: Any) -> Any:
    """Refuse the schedules of transformers that follow the loss.

    Raises:
        ValueError: the schedule is no function of the step.
    """
    if value in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(
            "this schedule follows the noise of the losses and not the step, so a resumed run could not repeat it; "
            "use linear, cosine or another schedule of the step"
        )
    return value


# μ of each tuning scheme, from the searches of the benchmark and of MeZO.
_MU = {"lora": 1e-2, "peft": 1e-2, "prompt": 1e-2, "prefix": 1e-1, "scales": 1e-5}


def default_mu(tuning: str) -> float:
    """Return the μ to begin with.

    >>> default_mu("lora"), default_mu("full")
    (0.01, 0.001)
    """
    return _MU.get(tuning, 1e-3)


class MethodOptions(Options):
    """The options of the optimisation."""

    method: MethodName = Field("zo_sgd", description="Optimisation method (see `methods`).")
    learning_rate: Annotated[float, Field(ge=0)] | Literal["auto"] | None = Field(
        None,
        description="Learning rate η at the first step: a number, or auto, which finds one by short trials on training "
        "rows. Default: auto for zotune train without a recipe, else a rate for this method and number of tuned "
        "parameters.",
    )
    lr_scheduler_type: Annotated[SchedulerName, BeforeValidator(_function_of_the_step)] = Field(
        "constant", description="Schedule of the learning rate, by transformers' names."
    )
    mu: float = Field(
        default_factory=lambda data: default_mu(data.get("tuning", "full")),
        gt=0,
        validation_alias=AliasChoices("mu", "zo_eps"),
        description="Smoothing parameter μ: distance of the probes from the weights along a direction, in units of the "
        "weights (elsewhere: zo_eps). Default: 1e-2 for lora, prompt and peft, 1e-1 for prefix, 1e-5 for scales, else "
        "1e-3.",
    )
    num_queries: int = Field(
        1, ge=1, description="Number q of random directions per step; the gradient estimate averages over them."
    )
    directions_per_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="Directions per query, each for a group of a step's examples, in the passes of one direction: from "
        "1 to one an example, or auto, which follows how far the examples agree and raises the learning rate with it; "
        "default: one for all examples.",
    )
    flipped: bool = Field(
        False,
        description="Sign-flipped directions of matrices, which share one matrix a step (with directions_per_batch).",
    )
    sampler: Literal["rademacher", "gaussian"] = Field("rademacher", description="Distribution of the directions.")
    difference: Literal["central", "forward"] = Field(
        "central", description="Finite differences: two-sided (central) or one-sided (forward)."
    )
    rounding: Literal["stochastic", "master", "nearest"] = Field(
        "stochastic",
        description="Rounding of updates to half-precision weights: stochastic, to the nearest, or none with a float32 "
        "master copy of the weights.",
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="Decoupled weight decay λ; biases and norms (parameters of fewer than two dimensions) are exempt.",
    )
    max_coefficient: float | None = Field(
        None, gt=0, description="Clip directional derivatives to plus or minus this value; default: no clipping."
    )

    sign: Literal["scalar", "elementwise"] = Field(
        "scalar",
        description="Take the sign of each coefficient (scalar) or of each element of the gradient estimate "
        "(zo_sgd_sign).",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum β (zo_sgd_mmt).")
    adam: Literal["torch", "adamm", "amsgrad"] = Field(
        "torch",
        description="Variant of Adam: as in torch, as in the paper's appendix (adamm), or AMSGrad (zo_adam).",
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay β₁ of Adam's first moment (zo_adam, fo_adam).")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay β₂ of Adam's second moment (zo_adam, fo_adam).")
    adam_epsilon: float = Field(1e-8, gt=0, description="Term ε added to Adam's denominator (zo_adam, fo_adam).")
    window: int | None = Field(
        None,
        ge=1,
        description="Recompute the moments from the last N steps instead of storing them (zo_sgd_mmt, zo_adam); "
        "default: "
        "store them.",
    )

    blocks: Literal["layer", "part", "linear", "size"] | None = Field(
        None,
        description="Blocks of parameters whose gradient is estimated separately: per layer, per attention or "
        "feed-forward "
        "part, per linear layer, or by size; default: all tuned parameters at once.",
    )
    block_size: int = Field(1_000_000, ge=1, description="Parameters per block at most (with blocks: size).")
    block_order: Literal["joint", "sequential"] = Field(
        "joint",
        description="Estimate all blocks at the same weights (joint), or each after the previous block was updated "
        "(sequential).",
    )
    sparsity: float = Field(0.0, ge=0, lt=1, description="Fraction of the entries of a direction that are set to zero.")
    mask: Literal["random", "magnitude"] = Field(
        "random",
        description="Positions of a direction's zeros: random, or the weights of smallest magnitude (with sparsity).",
    )
    mask_group: Literal["global", "layer"] = Field(
        "global",
        description="Choose each tensor's sparsity from one magnitude threshold over all tensors (global), or use the "
        "same "
        "sparsity in every tensor (layer).",
    )
    mask_interval: int = Field(1, ge=1, description="Steps between two new masks (with sparsity).")

    rank: int | None = Field(
        None, ge=1, description="Rank of the directions of matrices, as products of thin factors; default: full rank."
    )
    rank_interval: int = Field(
        1,
        ge=1,
        description="Steps that share the right factors (with rank); 1: each direction has right factors of its own.",
    )

    hybrid_layers: int | None = Field(
        None,
        ge=0,
        description="Use the method in the first N layers only, and back-propagation in the layers above; default: the "
        "method everywhere.",
    )
    hybrid_method: Literal["fo_sgd", "fo_adam"] = Field(
        "fo_sgd", description="First-order method of the layers above (with hybrid_layers)."
    )
    hybrid_learning_rate: float = Field(
        1e-3, ge=0, description="Learning rate of the layers above (with hybrid_layers)."
    )
    hybrid_tied: Literal["zeroth_order", "frozen"] | None = Field(
        None,
        description="Treatment of weights that both parts read, such as tied embeddings: tune them with the "
        "zeroth-order "
        "method, or freeze them (with hybrid_layers); default: refuse them.",
    )

    @field_validator("learning_rate", mode="before")
    @classmethod
    def _is_rate(cls, value: Any) -> Any:
        if value is None or value == "auto":
            return value
        try:
            rate = float(value)
        except (TypeError, ValueError):
            raise ValueError("give a number of at least 0, as 1e-3, or auto") from None
        if not 0 <= rate < math.inf:
            raise ValueError("a learning rate is a finite number greater than or equal to 0, or auto")
        return rate

    @model_validator(mode="after")
    def _no_idle_method_option(self, info: ValidationInfo) -> Self:
        if is_partial(info):
            return self
        for option, (used, needs) in self._uses().items():
            if not used and getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(f"{option} has no effect here: it needs {needs}")
        if self.flipped and (self.rank is not None or self.sparsity):
            other = "rank" if self.rank is not None else "sparsity"
            raise ValueError(f"flipped and {other} are two kinds of directions; leave one of them out")
        if self.directions_per_batch is not None and self.hybrid_layers is not None:
            raise ValueError("directions_per_batch does not go with hybrid_layers; leave one of them out")
        if self.hybrid_layers is not None and self.method in FIRST_ORDER:
            raise ValueError(
                "hybrid_layers tunes the first layers with a zeroth-order method; choose one of these as method"
            )
        return self

    def _uses(self) -> dict[str, tuple[bool, str]]:
        """For each option that only some runs use: whether this run uses it, and the requirement that errors name."""
        zeroth_order = self.method not in FIRST_ORDER
        is_hybrid = self.hybrid_layers is not None
        adam = self.method in ("zo_adam", "fo_adam") or (is_hybrid and self.hybrid_method == "fo_adam")
        moments = self.method in ("zo_sgd_mmt", "zo_adam")
        any_method = (zeroth_order, "a zeroth-order method")
        sparse = (zeroth_order and self.sparsity > 0, "a zeroth-order method and a sparsity above 0")
        hybrid = (is_hybrid, "hybrid_layers")
        return {
            "sign": (self.method == "zo_sgd_sign", "method: zo_sgd_sign"),
            "momentum": (self.method == "zo_sgd_mmt", "method: zo_sgd_mmt"),
            "adam": (self.method == "zo_adam", "method: zo_adam"),
            **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), (adam, "an Adam method")),
            "window": (moments, "method: zo_sgd_mmt or zo_adam"),
            **dict.fromkeys(("sparsity", "blocks", "rank"), any_method),
            "directions_per_batch": (
                zeroth_order and self.method != "forward_grad",
                "a zeroth-order method of finite differences",
            ),
            "flipped": (self.directions_per_batch is not None, "directions_per_batch"),
            "rank_interval": (zeroth_order and self.rank is not None, "a zeroth-order method and a rank"),
            **dict.fromkeys(("mask", "mask_group", "mask_interval"), sparse),
            "block_size": (self.blocks == "size", "blocks: size"),
            "block_order": (self.blocks is not None, "blocks"),
            **dict.fromkeys(("hybrid_method", "hybrid_learning_rate", "hybrid_tied"), hybrid),
        }
