"""Models in shards: cut over the processes that torchrun started, by FSDP2 or by a tensor-parallel plan.

transformers cuts a checkpoint as it reads it, so that a process reads its own part alone. A tensor-parallel plan says
by which dimension each matrix is cut; where the class of a model has none, one of the table here serves, if there is
one. FSDP2 needs the layers that are gathered one by one: they are the model's stack.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zotune.errors import UsageError
from zotune.llm.checkpoints.no_code import NO_CODE
from zotune.llm.config.method import FIRST_ORDER
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.step import ModelOptions
from zotune.messages import say
from zotune.model.layers import stack_of
from zotune.model.shards import is_gathered_by_fsdp
from zotune.system.processes import asked_for

# By type of model. OPT's attention counts on all heads being there, so its inputs and outputs are gathered.
_PLANS = {
    "opt": {
        **{f"model.decoder.layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in ("q", "k", "v")},
        "model.decoder.layers.*.self_attn.out_proj": "rowwise_split_input",
        "model.decoder.layers.*.fc1": "colwise",
        "model.decoder.layers.*.fc2": "rowwise",
        "model.decoder.embed_tokens": "embedding_rowwise",
        "lm_head": "colwise_gather_output",
    }
}
_FSDP = "--shard fsdp needs no plan and takes any model"
# Styles of a plan that give each process whole attention heads.
_BY_HEADS = "colwise"


def shard_of(options: ModelOptions) -> str | None:
    """Return how a model is to be cut, None for not at all: one process holds all of it.

    Raises:
        UsageError: what the options ask for cannot be done with shards.
    """
    shard = getattr(options, "shard", "none")
    if shard == "none":
        return None
    for is_so, what in _refusals(options, shard):
        if is_so:
            raise UsageError(f"shard: {shard} {what}")
    if asked_for() == 1:
        say(f"shard: {shard} has one process, which holds all of the model; torchrun --nproc-per-node N starts more")
        return None
    return str(shard)


def _refusals(options: ModelOptions, shard: str) -> list[tuple[bool, str]]:
    quantised = options.is_gguf or options.quantization not in (None, "none")
    found = [
        (quantised, "cuts floating-point weights, and those of a quantised base are packed integers: leave one out."),
        (
            shard == "tp" and options.model.startswith("random:"),
            f"reads a checkpoint's slices, and {options.model} has none: use --shard fsdp.",
        ),
    ]
    if not isinstance(options, TrainConfig):
        return found
    tunings = ("full",) if shard == "tp" else ("full", "lora")
    return [
        *found,
        (options.parallel is not None, "runs every pass in all processes, so there is nothing that parallel shares."),
        (options.method in FIRST_ORDER, f"is for forward passes; {options.method} back-propagates. Use a zo_ method."),
        (
            options.hybrid_layers is not None,
            "is for forward passes; a hybrid back-propagates. Leave hybrid_layers out.",
        ),
        (
            shard == "tp" and options.method == "forward_grad",
            "exchanges activations, which lose their tangents on the way; use --shard fsdp, or another method.",
        ),
        (
            options.tuning not in tunings or options.peft_type is not None,
            f"does not go with tuning: {options.tuning}; use {' or '.join(tunings)}"
            + (", or --shard fsdp: an adapter beside slices would need slices of its own." if shard == "tp" else "."),
        ),
    ]


def loading_arguments(shard: str | None, config: Any, auto_class: Any) -> dict[str, Any]:
    """Return the arguments with which transformers cuts a checkpoint as it reads it; none where it cannot.

    Args:
        shard: as `shard_of` returned it.
        config: the model's configuration.
        auto_class: the class of transformers that loads it.

    Raises:
        UsageError: the model has no plan, or heads that the processes cannot divide.
    """
    if shard is None:
        return {}
    from transformers.distributed import DistributedConfig

    size = asked_for()
    with torch.device("meta"):
        model = auto_class.from_config(config, **NO_CODE)
    if shard == "fsdp":
        # transformers ties tensors after it has cut them: FSDP2 would gather each place's own, and not what is tuned.
        if getattr(model, "all_tied_weights_keys", None):
            return {}
        own = None if getattr(model, "fsdp_plan", None) else {f"{stack_of(model)[0]}.*": "free_full_weight"}
        return {"distributed_config": DistributedConfig(fsdp_size=size, fsdp_plan=own)}
    own = _PLANS.get(config.model_type)
    plan = own or getattr(model, "tp_plan", None)
    if not plan:
        raise UsageError(
            f"shard: tp needs a plan of which matrix is cut how, and transformers has none for models of the type "
            f"{config.model_type!r}; {_FSDP}."
        )
    _check_heads(plan, config.get_text_config(), size)
    return {"distributed_config": DistributedConfig(tp_size=size, tp_plan=own or "auto")}


def _check_heads(plan: dict[str, str], config: Any, size: int) -> None:
    """Refuse a number of processes that would cut through an attention head."""
    if plan.get(next((name for name in plan if name.endswith("k_proj")), "")) != _BY_HEADS:
        return
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % size:
            raise UsageError(
                f"shard: tp gives each process whole attention heads, and {size} processes do not divide the model's "
                f"{heads} ({name}). Start a number that does; {_FSDP}."
            )


def forget_loading(model: Any) -> None:
    """Make a model that was cut as it was read behave as any other one: it gathers nothing unasked when it is saved.

    FSDP2 then drops what it has gathered after each pass, so that between two passes the model holds its slices.
    """
    if hasattr(model.config, "distributed_config"):
        del model.config.distributed_config
    if is_gathered_by_fsdp(model):
        model.set_reshard_after_forward(True)


def cut_by_fsdp(model: nn.Module, device: torch.device) -> None:
    """Cut a model that is in memory over all processes: each layer of its stack is gathered for its own pass."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (asked_for(),))
    for layer in stack_of(model)[1]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
