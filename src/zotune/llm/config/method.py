"""The options of the optimisation: method, gradient estimate, blocks, sparsity, low rank, rounding, hybrid."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from zotune.llm.config.schema import Options, is_partial

# The names of the methods, for help and validation without loading torch; a test compares them with the tables.
_OfThePaper = Literal["zo_sgd", "zo_sgd_sign", "zo_sgd_mmt", "zo_sgd_cons", "zo_adam", "forward_grad"]
_OfDirections = Literal["fzoo", "randopt", "block_coordinate", "subzero", "lozo", "zo_muon", "mopi", "hizoo", "grzo"]
MethodName = Literal[_OfThePaper, "fo_sgd", "fo_adam", _OfDirections]
FIRST_ORDER = ("fo_sgd", "fo_adam")
# Those of transformers that are functions of the step, so that a ledger and a resumed run repeat them.
_Plain = Literal["constant", "linear", "cosine", "constant_with_warmup", "cosine_with_restarts", "polynomial"]
_WithFloor = Literal["inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"]
SchedulerName = Literal[_Plain, _WithFloor]


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
_ADAPTERS = ("lora", "lora_fa", "lora_xs", "vera", "ia3", "peft")
_MU = {**dict.fromkeys((*_ADAPTERS, "prompt"), 1e-2), "prefix": 1e-1, "scales": 1e-5}


# Defaults of options that are others for some methods: those of their papers.
OF_METHOD: dict[str, dict[str, Any]] = {
    "fzoo": {"num_queries": 8, "difference": "forward"},
    "randopt": {"num_queries": 16, "difference": "forward", "sampler": "gaussian"},
    "block_coordinate": {"blocks": "layer"},
    "subzero": {"sampler": "gaussian", "rank": 24, "rank_interval": 1000},
    "lozo": {"sampler": "gaussian", "rank": 2, "rank_interval": 50, "momentum": 0.0},
    "zo_muon": {"num_queries": 4, "difference": "forward", "sampler": "gaussian", "rank": 64, "rank_interval": 100},
    "hizoo": {"sampler": "gaussian"},
    "grzo": {},
    "mopi": {"num_queries": 8, "sampler": "gaussian", "rank": 64, "rank_interval": 500},
}
LATER = tuple(OF_METHOD)
"""The methods beyond the paper."""
# Methods whose directions are of a shape of their own: neither masked, nor of another sampler.
OWN_DIRECTIONS = ("subzero", "lozo", "zo_muon", "mopi", "hizoo", "grzo")
# Methods whose directions may be one for each group of examples.
BY_EXAMPLES = ("zo_sgd", "zo_sgd_sign", "zo_sgd_mmt", "zo_sgd_cons", "zo_adam", "forward_grad")
_ONE_SIDED, _TWO_SIDED = ("fzoo", "randopt"), ("hizoo", "grzo")
# Options that some methods alone use.
_USERS: dict[str, tuple[str, ...]] = {
    "sign": ("zo_sgd_sign",),
    "momentum": ("zo_sgd_mmt", "lozo", "mopi"),
    "window": ("zo_sgd_mmt", "zo_adam"),
    **dict.fromkeys(("keep_best", "only_better"), ("randopt",)),
    **dict.fromkeys(("std_ddof", "divide_by_mu"), ("fzoo",)),
    "vector_learning_rate": ("zo_muon", "mopi"),
    "spectral_rank": ("mopi",),
    "hessian_share": ("hizoo",),
    "rank_scale": ("lozo",),
    "square_subspaces": ("subzero",),
    **dict.fromkeys(("block_choice", "block_unbiased"), ("block_coordinate",)),
}


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
        "weights (elsewhere: zo_eps). Default: 1e-2 for prompt and other adapters, 1e-1 for prefix, 1e-5 for scales, "
        "else 1e-3.",
    )
    num_queries: int = Field(
        1,
        ge=1,
        description="Number q of random directions per step; the gradient estimate averages over them. Default: 1; for "
        "fzoo and mopi 8, for zo_muon 4, for randopt 16.",
    )
    sampler: Literal["rademacher", "gaussian"] = Field(
        "rademacher",
        description="Distribution of the directions. Default: rademacher; for randopt, subzero, lozo, zo_muon, mopi "
        "and hizoo gaussian.",
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
    difference: Literal["central", "forward"] = Field(
        "central",
        description="Finite differences: two-sided (central) or one-sided (forward). Default: central; for zo_muon, "
        "and always for fzoo and randopt, forward.",
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
    momentum: float = Field(
        0.9, ge=0, lt=1, description="Momentum β (zo_sgd_mmt, lozo, mopi). Default: 0.9; for lozo 0, which is none."
    )
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
        "default: store them.",
    )

    keep_best: int = Field(1, ge=1, description="Number of the best points whose mean is taken (randopt).")
    only_better: bool = Field(True, description="Keep only points that are better than the weights (randopt).")
    std_ddof: Literal[0, 1] = Field(0, description="Divide the losses' sum of squares by N minus this number (fzoo).")
    divide_by_mu: bool = Field(False, description="Divide the estimate by μ, as the paper's text does (fzoo).")
    vector_learning_rate: float = Field(1e-7, ge=0, description="Learning rate of vectors (zo_muon, mopi).")
    spectral_rank: int = Field(32, ge=1, description="Number of leading singular directions of a step (mopi).")
    hessian_share: float = Field(
        1e-8, ge=0, lt=1, description="Share α of a new curvature in the estimate of the Hessian's diagonal (hizoo)."
    )
    square_subspaces: bool = Field(False, description="Reshape thin matrices towards squares (subzero).")
    rank_scale: Literal["mean", "sum"] = Field("mean", description="Divide steps by the rank (mean) or not (lozo).")
    block_choice: Literal["random", "cyclic", "adaptive"] = Field(
        "random",
        description="Choice of the block of a step: at random, by turns, or more often where coefficients are large "
        "(block_coordinate).",
    )
    block_explore: float = Field(
        0.2, gt=0, le=1, description="Share of adaptive choices that is the same for all blocks (block_coordinate)."
    )
    block_decay: float = Field(
        0.9, ge=0, lt=1, description="Share of a block's score that stays when it is measured again (block_coordinate)."
    )
    block_unbiased: bool = Field(False, description="Divide steps by their block's probability (block_coordinate).")

    blocks: Literal["layer", "part", "linear", "size"] | None = Field(
        None,
        description="Blocks of parameters whose gradient is estimated separately: per layer, per attention or "
        "feed-forward part, per linear layer, or by size; default: all tuned parameters at once, for block_coordinate "
        "layer.",
    )
    block_size: int = Field(1_000_000, ge=1, description="Maximum number of parameters of a block (with blocks: size).")
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
        "same sparsity in every tensor (layer).",
    )
    mask_interval: int = Field(1, ge=1, description="Steps between two new masks (with sparsity).")

    rank: int | None = Field(
        None,
        ge=1,
        description="Rank of the directions of matrices, as products of thin factors; default: full rank, for lozo 2, "
        "for subzero 24, for zo_muon and mopi 64.",
    )
    rank_interval: int = Field(
        1,
        ge=1,
        description="Steps that share the right factors, or the subspace of the directions (with rank); 1: each "
        "direction has right factors of its own. Default: 1; for lozo 50, for subzero 1000, for zo_muon 100, for mopi "
        "500.",
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
        "zeroth-order method, or freeze them (with hybrid_layers); default: refuse them.",
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
    def _take_defaults_of_method(self, info: ValidationInfo) -> Self:
        if not is_partial(info):
            for option, value in OF_METHOD.get(self.method, {}).items():
                if option not in self.model_fields_set:
                    # Not an assignment, by which the option would count as given.
                    self.__dict__[option] = value
        return self

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
        if self.hybrid_layers is not None and self.method in FIRST_ORDER:
            raise ValueError(
                "hybrid_layers tunes the first layers with a zeroth-order method; choose one of these as method"
            )
        if self.method in _ONE_SIDED and self.difference == "central":
            raise ValueError(f"{self.method} takes differences to the loss at the weights; leave difference out")
        if self.method in _TWO_SIDED and self.difference == "forward":
            raise ValueError(f"{self.method} takes two-sided differences; leave difference out")
        if self.method == "grzo" and self.hybrid_layers is not None:
            raise ValueError("grzo needs each example's loss, which a hybrid does not compute; leave hybrid_layers out")
        return self

    @property
    def reads_examples(self) -> bool:
        """Whether a step needs the loss of each example: for a direction of its own."""
        return self.directions_per_batch is not None or self.method == "grzo"

    def _uses(self) -> dict[str, tuple[bool, str]]:
        """For each option that only some runs use: whether this run uses it, and the requirement that errors name."""
        zeroth_order = self.method not in FIRST_ORDER
        is_hybrid = self.hybrid_layers is not None
        adam = self.method in ("zo_adam", "fo_adam") or (is_hybrid and self.hybrid_method == "fo_adam")
        any_method = (zeroth_order, "a zeroth-order method")
        any_directions = (
            zeroth_order and self.method not in OWN_DIRECTIONS,
            f"a zeroth-order method without directions of its own ({', '.join(OWN_DIRECTIONS)} have them)",
        )
        sparse = (zeroth_order and self.sparsity > 0, "a zeroth-order method and a sparsity above 0")
        hybrid = (is_hybrid, "hybrid_layers")
        return {
            **{option: (self.method in users, f"method: {' or '.join(users)}") for option, users in _USERS.items()},
            "adam": (self.method == "zo_adam", "method: zo_adam"),
            **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), (adam, "an Adam method")),
            **dict.fromkeys(
                ("block_explore", "block_decay"),
                (self.block_choice == "adaptive", "method: block_coordinate and block_choice: adaptive"),
            ),
            "directions_per_batch": (
                self.method in BY_EXAMPLES and not is_hybrid,
                " or ".join(BY_EXAMPLES) + ", no hybrid",
            ),
            "flipped": (self.directions_per_batch is not None, "directions_per_batch"),
            **dict.fromkeys(("blocks", "num_queries", "max_coefficient", "rounding"), any_method),
            "difference": (zeroth_order and self.method != "forward_grad", "a method of finite differences"),
            "rank": (
                zeroth_order and self.method not in _TWO_SIDED,
                f"a zeroth-order method other than {' and '.join(_TWO_SIDED)}",
            ),
            "sparsity": any_directions,
            "rank_interval": (zeroth_order and self.rank is not None, "a zeroth-order method and a rank"),
            **dict.fromkeys(("mask", "mask_group", "mask_interval"), sparse),
            "block_size": (self.blocks == "size", "blocks: size"),
            "block_order": (self.blocks is not None, "blocks"),
            **dict.fromkeys(("hybrid_method", "hybrid_learning_rate", "hybrid_tied"), hybrid),
        }
