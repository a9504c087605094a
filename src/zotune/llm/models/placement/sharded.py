"""Models in shards: cut over the processes that torchrun started, by FSDP2 or by a tensor-parallel plan.

transformers cuts a checkpoint as it reads it, so that a process reads its own part alone. A tensor-parallel plan says
by which dimension each matrix is cut (`zotune.llm.models.placement.plans`). FSDP2 needs the layers that are gathered
one by one: they are the model's stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zotune.errors import UsageError
from zotune.llm.checkpoints.no_code import NO_CODE
from zotune.llm.config.method import FIRST_ORDER
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.placement.device_map import gib, memory_of
from zotune.llm.models.placement.layers import check_safetensors
from zotune.llm.models.placement.plans import WHOLE_BOUNDARIES, plan_of, style_of
from zotune.messages import say
from zotune.model.layers import stack_of
from zotune.model.shards import is_gathered_by_fsdp, is_tensor_parallel
from zotune.system.processes import asked_for

_FSDP = "--shard fsdp needs no plan and takes any model"
_PACKED = "cuts floating-point weights, and those of a quantised base are packed integers: leave one out."
_TUNINGS = ("full", "head", "norms", "biases", "lora")
# The style of a plan that gives each process whole attention heads.
_BY_HEADS = "colwise"
# Initialisations of LoRA that take a part out of the base's matrices.
_MOVING_INITS = ("pissa", "olora")
# What else an adapter of LoRA may have than its two matrices, by the option of peft.
_OTHER_PARTS = ("use_dora", "lora_bias", "bias", "modules_to_save", "target_parameters", "trainable_token_indices")
# Styles of layers that take or give slices by which an adapter can be cut too.
_WITH_ADAPTER = ("colwise", "rowwise")


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
    found = [(quantised, _PACKED)]
    if not isinstance(options, TrainConfig):
        return found
    other = "; use --shard fsdp, or another method."
    has_slices = options.tuning != "lora" or shard == "tp"  # an adapter beside FSDP2's slices is whole
    return [
        *found,
        (options.parallel is not None, "runs every pass in all processes, so there is nothing that parallel shares."),
        (options.method in FIRST_ORDER, f"is for forward passes; {options.method} back-propagates. Use a zo_ method."),
        (
            options.hybrid_layers is not None,
            "is for forward passes; a hybrid back-propagates. Leave hybrid_layers out.",
        ),
        (
            options.tuning not in _TUNINGS or options.peft_type is not None,
            f"does not go with tuning: {options.tuning}; use one of: {', '.join(_TUNINGS)}.",
        ),
        (
            options.method == "hizoo" and has_slices,
            "has slices of the state in each process, and hizoo scales every direction by all of it; use another "
            "method, or --tuning lora with --shard fsdp.",
        ),
        (
            options.sparsity > 0 and options.mask == "magnitude" and has_slices,
            "has slices of the weights in each process, and a mask by magnitude is one of whole tensors; use "
            "--mask random.",
        ),
        (
            shard == "tp" and options.method == "forward_grad",
            f"exchanges activations, which lose their tangents on the way{other}",
        ),
        (
            shard == "tp" and options.reads_examples,
            "exchanges activations, and there is no exchange of those that each example computes with weights of its "
            "own (directions_per_batch, grzo); use --shard fsdp, or several directions of the whole batch "
            "(--num-queries).",
        ),
    ]


def loading_arguments(
    shard: str | None, source: str, config: Any, auto_class: Any, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Return the arguments with which transformers cuts a checkpoint as it reads it; none where it cannot.

    Args:
        shard: as `shard_of` returned it.
        source: the model's folder, or its name on the Hub.
        config: the model's configuration.
        auto_class: the class of transformers that loads it.
        dtype: the precision that it is loaded in.
        device: the device of this process.

    Raises:
        UsageError: the model has no plan, heads that the processes cannot divide, packed weights, no safetensors files,
            or slices that the device has no room for.
    """
    if shard is None:
        return {}
    from transformers.distributed import DistributedConfig

    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(f"shard: {shard} {_PACKED}")
    check_safetensors(source)
    with torch.device("meta"):
        model = auto_class.from_config(config, **NO_CODE)
    _check_room(model, shard, dtype, device)
    if shard == "tp":
        return {"distributed_config": by_plan(model), "use_safetensors": True}
    # transformers ties tensors after it has cut them: FSDP2 would gather each place's own, and not what is tuned.
    if _is_read_whole(model, shard):
        return {}
    own = None if getattr(model, "fsdp_plan", None) else {f"{stack_of(model)[0]}.*": "free_full_weight"}
    return {"distributed_config": DistributedConfig(fsdp_size=asked_for(), fsdp_plan=own), "use_safetensors": True}


def _is_read_whole(model: Any, shard: str) -> bool:
    """Whether a checkpoint is read whole by each process before it is cut."""
    return shard == "fsdp" and bool(getattr(model, "all_tied_weights_keys", None))


def _check_room(model: Any, shard: str, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse weights of which a device does not hold this process's part, whatever else it takes."""
    size, read_whole = sum(p.numel() for p in model.parameters()) * dtype.itemsize, _is_read_whole(model, shard)
    if read_whole:
        device = torch.device("cpu")
    part, free = size if read_whole else -(-size // asked_for()), memory_of(device)
    if part > free:
        how = ", read whole by each because of tied embeddings" * read_whole
        raise UsageError(
            f"shard: {shard} does not fit: of {gib(size)} of weights each of {asked_for()} processes would hold "
            f"{gib(part)}{how}, and {device} has {gib(free)} free. "
            f"{'Use' if read_whole else 'Start more processes, or use'} --dtype bfloat16, or take the model from a "
            "disk (--offload-folder)."
        )


def by_plan(model: Any) -> Any:
    """Return what transformers needs to know to cut a model by its plan over all processes.

    Raises:
        UsageError: the model has no plan, or heads that the processes cannot divide.
    """
    from transformers.distributed import DistributedConfig

    plan, is_own = plan_of(model)
    if not plan:
        raise UsageError(
            f"shard: tp needs a plan of which matrix is cut how, and transformers has none for models of the type "
            f"{model.config.model_type!r}; {_FSDP}."
        )
    _check_heads(plan, model.config.get_text_config(), asked_for())
    return DistributedConfig(tp_size=asked_for(), tp_plan=plan if is_own else "auto")


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


def cut_by_plan(model: Any) -> None:
    """Cut a model that is in memory by its tensor-parallel plan.

    Raises:
        UsageError: the model has no plan, or heads that the processes cannot divide.
    """
    config, _, mesh = model.prepare_distribute_model(by_plan(model))
    # Each place of tied tensors is cut by itself, as transformers does before it ties them.
    seen: set[int] = set()
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) in seen:
                module._parameters[name] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
            seen.add(id(p))
    model.maybe_distribute_model(model, config, mesh)
    model.tie_weights()
    forget_loading(model)


def check_adapted(model: Any, paths: Sequence[str]) -> None:
    """Check that a LoRA adapter can lie beside layers of a model that is cut by a plan.

    Raises:
        UsageError: it cannot lie beside one of them.
    """
    for path in paths if is_tensor_parallel(model) else ():
        style = style_of(model, path)
        if style not in (None, *_WITH_ADAPTER, *WHOLE_BOUNDARIES):
            raise UsageError(
                f"shard: tp cuts {path} in a way ({style}) that an adapter cannot follow. Choose other layers with "
                "--lora-target-modules, or use --shard fsdp."
            )


def check_loaded_adapter(adapter: Any, name: str, shard: str) -> None:
    """Check that an adapter in a folder can be put beside a base model in shards, before that is read.

    Args:
        adapter: its configuration of peft.
        name: its name, for errors.
        shard: as `shard_of` returned it.

    Raises:
        UsageError: it changes whole matrices of the base, or has parts that a plan does not cut.
    """
    init = getattr(adapter, "init_lora_weights", True)
    if init in _MOVING_INITS:
        raise UsageError(
            f"shard: {shard} holds slices of the matrices, and the adapter {name} changes whole ones when it is loaded "
            f"(init_lora_weights: {init}). Merge it first, without --shard: zotune merge."
        )
    kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    parts = [key for key in _OTHER_PARTS if getattr(adapter, key, None) not in (None, False, "none", [], {})]
    if shard == "tp" and (kind != "LORA" or parts):
        raise UsageError(
            f"shard: tp cuts the two matrices of LoRA as the layer that they lie beside, and the adapter {name} is of "
            f"another kind ({', '.join([kind, *parts])}). Use --shard fsdp, or merge it first (zotune merge)."
        )


def cut_adapter(model: Any) -> None:
    """Cut a LoRA adapter as the layers that it lies beside: B where these give slices, A where they take slices.

    Raises:
        UsageError: it lies beside a layer that is cut otherwise.
    """
    if not is_tensor_parallel(model):
        return
    check_adapted(model, [path for path, layer in model.named_modules() if hasattr(layer, "lora_A")])
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    mesh = model._mesh_manager.get_mesh("tp")
    for path, layer in model.named_modules():
        if (name := style_of(model, path)) not in _WITH_ADAPTER or not hasattr(layer, "lora_A"):
            continue
        style = ALL_PARALLEL_STYLES[name]
        for factor in (layer.lora_B if name == "colwise" else layer.lora_A).values():
            style.shard_param(factor, "weight", mesh)
            style.install_forward(factor, mesh)
