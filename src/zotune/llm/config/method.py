"""The options of a run that say how it optimises: method, estimate, blocks, masks, numerics, hybrid."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import AliasChoices, Field, ValidationInfo, model_validator

from zotune.llm.config.schema import Options, is_partial

# Which methods there are, for help and validation without loading torch; a test holds it against the tables.
MethodName = Literal[
    "zo_sgd", "zo_sgd_sign", "zo_sgd_mmt", "zo_sgd_cons", "zo_adam", "forward_grad", "fo_sgd", "fo_adam"
]
FIRST_ORDER = ("fo_sgd", "fo_adam")


class MethodOptions(Options):
    """How a run optimises."""

    method: MethodName = Field("zo_sgd", description="See `methods`.")
    learning_rate: float = Field(1e-3, ge=0, description="η, at the first step.")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="How the learning rate goes from its first value: stays, or falls to 0."
    )
    mu: float = Field(
        1e-3,
        gt=0,
        validation_alias=AliasChoices("mu", "zo_eps"),
        description="μ, the distance moved along a direction, in units of the parameters (elsewhere: zo_eps).",
    )
    num_queries: int = Field(1, ge=1, description="q, directions a step.")
    sampler: Literal["rademacher", "gaussian"] = Field("rademacher", description="Distribution of the directions.")
    difference: Literal["central", "forward"] = Field("central", description="Two-sided or one-sided differences.")
    rounding: Literal["stochastic", "master", "nearest"] = Field(
        "stochastic", description="How updates enter half-precision weights."
    )
    weight_decay: float = Field(
        0.0, ge=0, description="λ of decoupled weight decay; biases and norms (fewer than two dimensions) are exempt."
    )
    max_coefficient: float | None = Field(
        None, gt=0, description="Cut directional derivatives to plus or minus this; default: no limit."
    )

    sign: Literal["scalar", "elementwise"] = Field(
        "scalar", description="zo_sgd_sign: the sign of each coefficient, or of each element of the estimate."
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="zo_sgd_mmt: β.")
    adam: Literal["torch", "adamm", "amsgrad"] = Field(
        "torch", description="zo_adam: torch's Adam, the paper's appendix, or AMSGrad."
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="zo_adam, fo_adam: β₁.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="zo_adam, fo_adam: β₂.")
    adam_epsilon: float = Field(1e-8, gt=0, description="zo_adam, fo_adam: ε.")
    window: int | None = Field(
        None, ge=1, description="zo_sgd_mmt, zo_adam: rebuild moments from so many last steps instead of storing them."
    )

    blocks: Literal["layer", "part", "linear", "size"] | None = Field(
        None, description="Estimate the gradient block by block; default: all tuned parameters at once."
    )
    block_size: int = Field(1_000_000, ge=1, description="With blocks: size, numbers in a block at most.")
    block_order: Literal["joint", "sequential"] = Field(
        "joint", description="All blocks at the same weights, or each after the last was updated."
    )
    sparsity: float = Field(0.0, ge=0, lt=1, description="Fraction of a direction's entries that are zero.")
    mask: Literal["random", "magnitude"] = Field(
        "random", description="With sparsity: zeros at random places, or at the smallest weights."
    )
    mask_group: Literal["global", "layer"] = Field(
        "global", description="With sparsity: each tensor's share from one magnitude threshold, or the same for all."
    )
    mask_interval: int = Field(1, ge=1, description="With sparsity: steps between two masks.")

    rank: int | None = Field(
        None, ge=1, description="Directions that are matrices of so low a rank, made by thin products; default: dense."
    )
    rank_interval: int = Field(
        1, ge=1, description="With rank: steps that share the right factors; 1: each direction has its own."
    )

    hybrid_layers: int | None = Field(
        None, ge=0, description="Use the method for the first so many layers only, and back-propagation for the rest."
    )
    hybrid_method: Literal["fo_sgd", "fo_adam"] = Field("fo_sgd", description="With hybrid_layers: for the rest.")
    hybrid_learning_rate: float = Field(1e-3, ge=0, description="With hybrid_layers: the rest's learning rate.")
    hybrid_tied: Literal["zeroth_order", "frozen"] | None = Field(
        None, description="With hybrid_layers: whose weights are that are read on both sides, as tied embeddings."
    )

    @model_validator(mode="after")
    def _no_idle_method_option(self, info: ValidationInfo) -> Self:
        if is_partial(info):
            return self
        for option, (used, needs) in self._uses().items():
            if not used and getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(f"{option} has no effect here: it needs {needs}")
        if self.hybrid_layers is not None and self.method in FIRST_ORDER:
            raise ValueError("hybrid_layers leaves the first layers to a zeroth-order method; choose one as method")
        return self

    def _uses(self) -> dict[str, tuple[bool, str]]:
        """For each option that not every run uses, whether this one does, and what it needs."""
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
            "rank_interval": (zeroth_order and self.rank is not None, "a zeroth-order method and a rank"),
            **dict.fromkeys(("mask", "mask_group", "mask_interval"), sparse),
            "block_size": (self.blocks == "size", "blocks: size"),
            "block_order": (self.blocks is not None, "blocks"),
            **dict.fromkeys(("hybrid_method", "hybrid_learning_rate", "hybrid_tied"), hybrid),
        }
