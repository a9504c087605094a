"""Building the optimizer from a run's options."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

import torch
from torch import nn

from zotune.directions.blocks import BLOCKS, Block, blocks_by_size
from zotune.directions.flipped import flipped
from zotune.directions.input_scaled import input_scaled
from zotune.directions.low_rank import low_rank
from zotune.directions.samplers import SAMPLERS
from zotune.directions.schedule import AnySampler
from zotune.directions.sparse import sparse
from zotune.directions.within import within
from zotune.errors import UsageError
from zotune.estimate.finite_difference import central_difference, forward_difference
from zotune.llm.config.method import FIRST_ORDER, OWN_DIRECTIONS, MethodOptions
from zotune.llm.config.rates import initial_learning_rate
from zotune.llm.models.tuned_sets.aim import Aim, num_free
from zotune.methods.table import METHODS
from zotune.optim.hybrid import Hybrid, split_at_layer
from zotune.optim.master_weights import FirstOrder, with_master_weights
from zotune.optim.zeroth_order import ZerothOrder

_DIFFERENCES = {"central": central_difference, "forward": forward_difference}

AnyOptimizer = ZerothOrder | Hybrid | FirstOrder


def make_optimizer(
    module: nn.Module,
    options: MethodOptions,
    seed: int,
    run_once: Callable[[], Any] | None = None,
    *,
    reuse_prefix: bool = True,
    aim: Aim | None = None,
) -> AnyOptimizer:
    """Build the method that the options name, over the parameters that require a gradient.

    Args:
        module: the model.
        options: the method and its hyper-parameters.
        seed: seed of the directions.
        run_once: runs a forward pass; a hybrid needs it to find the layers that read each parameter.
        reuse_prefix: with blocks, whether all evaluations of a step run the same forward passes, so that they can
            share cached activations.
        aim: what was found for the tuned set before the first step.

    Raises:
        UsageError: the method does not go with the tuned set, or nothing was found for a set that needs it.
    """
    _check_aim(options, aim)
    tuned = [p for p in module.parameters() if p.requires_grad]
    rate = initial_learning_rate(options, num_free(module, aim))
    options = options.model_copy(update={"learning_rate": rate})
    if options.method in FIRST_ORDER:
        return first_order(options.method, tuned, rate, options)
    if options.hybrid_layers is None:
        return _zeroth_order(module, options, seed, None, reuse_prefix=reuse_prefix, aim=aim)
    assert run_once is not None
    shallow, deep = split_at_layer(module, options.hybrid_layers, run_once, tied=options.hybrid_tied)
    if not shallow:
        return first_order(options.hybrid_method, deep, options.hybrid_learning_rate, options)
    method = _zeroth_order(module, options, seed, shallow)
    if not deep:
        return method
    return Hybrid(method, first_order(options.hybrid_method, deep, options.hybrid_learning_rate, options))


def first_order(
    name: str, parameters: Iterable[nn.Parameter], learning_rate: float, options: MethodOptions
) -> FirstOrder:
    """Build `fo_sgd` or `fo_adam` of torch, with decoupled weight decay from which biases and norms are exempt.

    Parameters in half precision get float32 copies, which take the steps.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "fo_sgd":
        # Without momentum, coupled and decoupled weight decay are the same.
        return with_master_weights(torch.optim.SGD(groups, lr=learning_rate))
    betas = (options.adam_beta1, options.adam_beta2)
    adam = torch.optim.Adam(
        groups, lr=learning_rate, betas=betas, eps=options.adam_epsilon, decoupled_weight_decay=True
    )
    return with_master_weights(adam)


def _zeroth_order(
    module: nn.Module,
    options: MethodOptions,
    seed: int,
    params: list[nn.Parameter] | None,
    *,
    reuse_prefix: bool = True,
    aim: Aim | None = None,
) -> ZerothOrder:
    assert isinstance(options.learning_rate, float)
    shared: dict[str, Any] = {
        "num_queries": options.num_queries,
        "block_order": options.block_order,
        "reuse_prefix": reuse_prefix,
        "weight_decay": options.weight_decay,
        "max_coefficient": options.max_coefficient,
        "rounding": options.rounding,
        "seed": seed,
        "params": params,
        "sampler": SAMPLERS[options.sampler] if options.method in OWN_DIRECTIONS else _sampler(options, aim),
        "blocks": _blocks(module, options, params),
    }
    shared |= {name: value for name in _RARE if (value := getattr(options, name)) is not None}
    return METHODS[options.method](module, options.learning_rate, **hyper_parameters(options), **shared)


# Options that not every method has.
_RARE = ("window", "directions_per_batch")


def hyper_parameters(options: MethodOptions) -> dict[str, Any]:
    """The arguments of a method that are its own: those that it takes, by the names that methods share.

    An argument that no option sets keeps the method's default.
    """
    values = {
        "mu": options.mu,
        "difference": _DIFFERENCES[options.difference],
        "sign": options.sign,
        "beta": options.momentum,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
        "adam": options.adam,
        "ddof": options.std_ddof,
        "per_mu": options.divide_by_mu,
        "keep": options.keep_best,
        "only_better": options.only_better,
        "choice": options.block_choice,
        "explore": options.block_explore,
        "decay": options.block_decay,
        "unbiased": options.block_unbiased,
        "rank": options.rank,
        "interval": options.rank_interval,
        "scale": options.rank_scale,
        "square": options.square_subspaces,
        "vector_lr": options.vector_learning_rate,
        "top": options.spectral_rank,
        "alpha": options.hessian_share,
    }
    taken = signature(METHODS[options.method]).parameters
    return {name: value for name, value in values.items() if name in taken}


def _check_aim(options: MethodOptions, aim: Aim | None) -> None:
    """Check that what the directions are aimed by was found.

    Raises:
        UsageError: it was not.
    """
    aims = ("activation_rank", None), ("tuning", "lora_xs"), ("direction_scale", "inputs")
    asked = (getattr(options, name, None) == value if value else getattr(options, name, None) for name, value in aims)
    if aim is None and any(asked):
        raise UsageError(
            "activation_rank, direction_scale and tuning: lora_xs take their directions from what zotune train finds "
            "before the first step, which this command or program does not do. Leave them out here."
        )


def _sampler(options: MethodOptions, aim: Aim | None) -> AnySampler:
    base: AnySampler = SAMPLERS[options.sampler]
    if aim is not None and aim.subspaces:
        return within(SAMPLERS[options.sampler], aim.subspaces)
    if aim is not None and aim.scales:
        return input_scaled(SAMPLERS[options.sampler], aim.scales)
    if options.flipped:
        return flipped(SAMPLERS[options.sampler])
    if options.rank is not None:
        base = low_rank(SAMPLERS[options.sampler], options.rank, interval=options.rank_interval)
    if not options.sparsity:
        return base
    return sparse(base, options.sparsity, mask=options.mask, group=options.mask_group, interval=options.mask_interval)


def _blocks(module: nn.Module, options: MethodOptions, params: list[nn.Parameter] | None) -> tuple[Block, ...] | None:
    if options.blocks is None:
        return None
    if options.blocks == "size":
        return blocks_by_size(module, options.block_size, params)
    return BLOCKS[options.blocks](module, params)
