"""Adapters of peft beside a frozen model: LoRA, a prefix, a prompt, and any other adapter by name.

A prefix is initialised with the keys and values of real tokens, a prompt with their embeddings (Malladi et al., 2023;
Lester et al., 2021), because random virtual tokens are unlike any input that the model was trained on.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import UsageError, did_you_mean, is_out_of_memory, reason_of
from zotune.llm.checkpoints.adapter_config import check_adapter_config
from zotune.llm.checkpoints.adapter_folder import NORM_OF_A_MODEL, check_init
from zotune.llm.checkpoints.hub_names import name_base_for_all
from zotune.llm.config.step import StepOptions
from zotune.llm.models.cache_argument import accept_old_name, cache_argument
from zotune.llm.models.classification_head import head_module_names
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.placement.sharded import check_adapted, cut_adapter
from zotune.model.layers import stack_of
from zotune.model.parameters import input_device
from zotune.model.shards import is_distributed

PREFIX_TOKENS, PROMPT_TOKENS = 5, 10
ALL_LINEAR = ("all-linear",)
# Choices of our own: latent attention makes its queries, and its keys with the values, in layers of these names; of
# state-space models peft refuses the output projections, whose fused kernels read the weights past an adapter.
_BY_TYPE = {
    "deepseek_v2": ("q_b_proj", "kv_b_proj"),
    "deepseek_v3": ("q_b_proj", "kv_b_proj"),
    "mamba": ("in_proj", "x_proj"),
    "falcon_mamba": ("in_proj", "x_proj"),
    "mamba2": ("in_proj",),
}

# Keys of an adapter's configuration that zotune sets itself.
_RESERVED_KEYS = {"peft_type", "task_type", "inference_mode", "base_model_name_or_path", "auto_mapping", "peft_version"}


def add_lora(lm: LanguageModel, config: StepOptions) -> None:
    """Add low-rank matrices beside linear layers (Hu et al., 2021); initially they do not change the output.

    Raises:
        UsageError: `config` names a layer or module that does not exist.
    """
    from peft import LoraConfig

    path, layers = stack_of(lm.text_model)
    first = first_layer(len(layers), config.tuned_layers)
    everywhere = [name for name, _ in linear_layers(lm.text_model)]
    linear = {name.rpartition(".")[2] for name in everywhere}
    targets = config.lora_target_modules or default_targets(lm.config.get_text_config().model_type, linear)
    inside = targets == ALL_LINEAR
    if inside:
        targets = _linear_in(layers)
    if not targets:
        raise UsageError(f"tuning: lora: {lm.name} has no linear layer inside its layers; tune it with --tuning full.")
    unknown = [t for t in targets if not any(is_target(name, t) for name in everywhere)]
    if unknown and set(ALL_LINEAR) & set(unknown):
        raise UsageError("lora_target_modules: all-linear stands for all layers, so it stands alone; drop the others.")
    if unknown:
        raise UsageError(
            f"lora_target_modules: {lm.name} has no linear layer {unknown[0]!r}.{did_you_mean(unknown[0], linear)}"
        )
    paths = target_paths(lm, targets, layers[first:] if inside or config.tuned_layers else [lm.text_model])
    check_adapted(lm.base, paths)
    # peft matches the names of all modules, and in a Sequential these are numbers, as those of layers are.
    only_linear = set(target_paths(lm, targets, [lm.base])) == {
        name for name, _ in lm.base.named_modules() if any(is_target(name, t) for t in targets)
    }
    is_everywhere = bool(config.tuned_layers) or paths == target_paths(lm, targets, [lm.base])
    by_name = lm.text_model is lm.base and only_linear and is_everywhere
    in_layers = by_name and config.tuned_layers is not None
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=list(targets) if by_name else paths,
        layers_to_transform=list(range(first, len(layers))) if in_layers else None,
        layers_pattern=path.rpartition(".")[2] if in_layers else None,
        # Conv1D holds its weight transposed.
        fan_in_fan_out=any(not isinstance(lm.base.get_submodule(name), nn.Linear) for name in paths),
        # A new head is trained in full and saved with the adapter.
        modules_to_save=head_module_names(lm.base) if lm.classifies else None,
        task_type="SEQ_CLS" if lm.classifies else None if lm.masked else "CAUSAL_LM",
        **_initial_values(config),
    )
    try:
        _wrap_with_peft(lm, lora, config)
    except ValueError as error:
        raise UsageError(f"peft cannot add a LoRA adapter to {lm.name}: {reason_of(error)}") from error


def _initial_values(config: StepOptions) -> dict[str, Any]:
    """Return the keys of peft that say where LoRA's initial values are from.

    EVA does not redistribute ranks (rho = 1): the adapter's size is known before a pass.
    """
    from peft import EvaConfig

    return {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)} if config.lora_init == "eva" else {}


def default_targets(model_type: str, linear: Collection[str]) -> tuple[str, ...]:
    """Return the last names of the layers that LoRA adapts by default, given those of a model's linear layers.

    They are the projections to queries and values (Hu et al., 2021, section 7.1) where these have a layer of their own,
    else those that peft chooses for this type of model, else all linear layers inside the model's layers.

    >>> default_targets("llama", {"q_proj", "k_proj", "v_proj"}), default_targets("gpt2", {"c_attn", "c_proj"})
    (('q_proj', 'v_proj'), ('c_attn',))
    >>> default_targets("none_known", {"in_proj", "out_proj"})
    ('all-linear',)
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    of_type = tuple(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, ()))
    choices = (("q_proj", "v_proj"), ("query", "value"), _BY_TYPE.get(model_type), of_type)
    return next((names for names in choices if names and set(names) <= set(linear)), ALL_LINEAR)


def is_target(path: str, target: str) -> bool:
    """Whether the path of a module ends in a target's name, as peft reads one.

    >>> is_target("layers.0.self_attn.q_proj", "q_proj"), is_target("layers.0.self_attn.q_proj", "attn.q_proj")
    (True, False)
    """
    return path == target or path.endswith(f".{target}")


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the paths and modules of a model's linear layers; GPT-2 has its own kind, Conv1D.

    A class of a model that takes other inputs than its weight says is none: peft would not follow it.
    """
    from transformers.pytorch_utils import Conv1D

    for name, m in module.named_modules():
        is_own_kind = type(m).__module__.startswith("transformers.models.") and type(m).forward is not nn.Linear.forward
        if isinstance(m, Conv1D) or (isinstance(m, nn.Linear) and not (is_own_kind and _is_grouped(m))):
            yield name, m


@torch.no_grad()
def _is_grouped(layer: nn.Linear) -> bool:
    """Whether a layer does not turn `in_features` numbers into `out_features`, as the grouped ones of DeepSeek-V4."""
    try:
        x = torch.zeros(1, 1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
        return tuple(layer(x).shape) != (1, 1, layer.out_features)
    except (RuntimeError, ValueError, IndexError):
        return True


def _linear_in(layers: Sequence[nn.Module]) -> tuple[str, ...]:
    """Return the last names of the linear layers inside a model's layers, as peft's "all-linear" chooses them."""
    inside = (name.rpartition(".")[2] for layer in layers for name, _ in linear_layers(layer))
    return tuple(dict.fromkeys(inside))


def target_paths(lm: LanguageModel, targets: Sequence[str], parts: Sequence[nn.Module]) -> list[str]:
    """Return the paths of the linear layers in some parts of a model that a target names."""
    inside = {m for part in parts for m in part.modules()}
    return [name for name, m in linear_layers(lm.base) if m in inside and any(is_target(name, t) for t in targets)]


def first_layer(num_layers: int, tuned_layers: int | None) -> int:
    """Return the index of the lowest of the last `tuned_layers` layers; None stands for all layers.

    Raises:
        UsageError: the model has fewer layers.

    >>> first_layer(12, None), first_layer(12, 2), first_layer(12, 0)
    (0, 10, 12)
    """
    if tuned_layers is not None and tuned_layers > num_layers:
        raise UsageError(
            f"tuned_layers is {tuned_layers}, but the model has {num_layers} layers; give at most {num_layers}."
        )
    return 0 if tuned_layers is None else num_layers - tuned_layers


def add_prefix(lm: LanguageModel, config: StepOptions) -> None:
    """Put tuned keys and values before those of every layer (Li and Liang, 2021), initialised from real tokens.

    Raises:
        UsageError: the model's layers have no such keys and values.
    """
    from peft import PrefixTuningConfig

    tokens = real_tokens(lm, config.num_virtual_tokens or PREFIX_TOKENS, config.seed)
    with _refused_in_words(lm, _NO_PREFIX):
        keys_values = keys_and_values(lm.base, tokens)
        prefix = PrefixTuningConfig(num_virtual_tokens=len(tokens), task_type=_task_type(lm), **_sizes(lm))
        _wrap_with_peft(lm, prefix, config)
    _set_virtual_tokens(lm, keys_values)
    with _refused_in_words(lm, _NO_PREFIX):
        _read_a_token(lm)


def add_prompt(lm: LanguageModel, config: StepOptions) -> None:
    """Put tuned embeddings before those of the input (Lester et al., 2021), initialised from real tokens.

    Raises:
        UsageError: the model does not read embeddings in place of tokens.
    """
    from peft import PromptTuningConfig

    embeddings = lm.base.get_input_embeddings()
    tokens = real_tokens(lm, config.num_virtual_tokens or PROMPT_TOKENS, config.seed)
    with _refused_in_words(lm, _NO_PROMPT):
        with torch.no_grad():
            rows = embeddings(tokens.to(lm.device)).float()
        sizes = {**_sizes(lm), "token_dim": rows.shape[1]}
        prompt = PromptTuningConfig(num_virtual_tokens=len(tokens), task_type=_task_type(lm), **sizes)
        _wrap_with_peft(lm, prompt, config)
        _read_a_token(lm)  # with random embeddings: Gemma 4 reads those of real tokens, and no others
    _set_virtual_tokens(lm, rows)


_NO_PREFIX = (
    "a prefix is keys and values of one shape that every layer takes in, and the layers of {} do not. Tune a prompt or "
    "a LoRA adapter (--tuning prompt, lora)."
)
_NO_PROMPT = (
    "a prompt of virtual tokens is embeddings that the model reads in place of tokens, and {} does not. Tune a LoRA "
    "adapter (--tuning lora)."
)


@contextmanager
def _refused_in_words(lm: LanguageModel, message: str) -> Iterator[None]:
    """Within this context an error of peft or of the model means that it does not take virtual tokens."""
    try:
        yield
    except (UsageError, Warning):
        raise
    except Exception as error:  # a model may fail in any way on inputs that it was not written for
        if is_out_of_memory(error):
            raise
        raise UsageError(message.format(f"{lm.name} ({lm.config.model_type})")) from error


@torch.no_grad()
def _read_a_token(lm: LanguageModel) -> None:
    token = torch.ones(1, 1, dtype=torch.long, device=lm.device)
    lm.read(token, token)


def add_peft_adapter(lm: LanguageModel, config: StepOptions) -> None:
    """Add the adapter of peft that `peft_type` names, configured by `peft_config`.

    Raises:
        UsageError: peft has no such adapter or key, or cannot add the adapter to this model.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    schemes = {str(kind.value).lower(): schema for kind, schema in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = (config.peft_type or "").lower()
    if name not in schemes:
        raise UsageError(f"peft_type: peft has no adapter {config.peft_type!r}.{did_you_mean(name, schemes)}")
    if any(p.is_meta for p in lm.module.parameters()) and lm.device.type != "meta":
        raise UsageError(
            f"the weights of {lm.name} are offloaded, and adapters by name may begin from them. Tune lora, full, a "
            "prefix or a prompt, or load the model onto one device."
        )
    known = {field.name for field in dataclasses.fields(schemes[name]) if field.init} - _RESERVED_KEYS
    for key in config.peft_options:
        if key not in known:
            raise UsageError(f"peft_config: {name} of peft has no key {key!r}.{did_you_mean(key, known)}")
    check_adapter_config(config.peft_options, "peft_config", lm.name)
    try:
        adapter = schemes[name](task_type=_task_type(lm), **config.peft_options)
        check_init(adapter, f"peft_config of {name}")
        _wrap_with_peft(lm, adapter, config)
        _check_read_again(adapter)
        _read_a_token(lm)
    except (torch.OutOfMemoryError, UsageError):
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"peft cannot tune {lm.name} with {name} as configured: {reason} "
            f"Set its keys with --peft-config, for instance {', '.join(sorted(known)[:5])}."
        ) from error


def _check_read_again(adapter: Any) -> None:
    """Check that peft accepts the configuration that it saves, with what it has filled in for this model.

    Raises:
        ValueError, TypeError: it does not, so that the saved adapter could not be loaded.
    """
    # Of IA3 it fills in the feed-forward layers of this type of model, also those that get no adapter.
    targets, forward = getattr(adapter, "target_modules", None), getattr(adapter, "feedforward_modules", None)
    if isinstance(targets, set) and isinstance(forward, set):
        adapter.feedforward_modules = forward & targets
    saved = adapter.to_dict()
    type(adapter)(**{f.name: saved[f.name] for f in dataclasses.fields(adapter) if f.init and f.name in saved})


def real_tokens(lm: LanguageModel, count: int, seed: int) -> Tensor:
    """Return the (count,) ids of random ordinary tokens of the vocabulary, drawn with `seed`."""
    special = set(lm.tokenizer.all_special_ids)
    ordinary = [i for i in range(min(len(lm.tokenizer), lm.vocabulary)) if i not in special]
    drawn = torch.randint(len(ordinary), (count,), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(ordinary)[drawn]


# Names under which peft looks for a model's sizes.
_KNOWN_SIZES = {
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


def _sizes(lm: LanguageModel) -> dict[str, int]:
    """Return the model's sizes that its configuration has under names that peft does not know, as peft names them."""
    config = lm.config.get_text_config()
    written = config.to_dict()
    values = {"token_dim": getattr(config, "hidden_size", None)}
    values["num_attention_heads"] = getattr(config, "num_attention_heads", None)
    return {
        name: value
        for name, value in values.items()
        if value is not None and not any(known in written for known in _KNOWN_SIZES[name])
    }


@torch.no_grad()
def keys_and_values(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the keys and values of T tokens in every layer, (T, layers · 2 · heads · head size) in float32."""
    from transformers import DynamicCache

    cache = DynamicCache()
    device = input_device(model)
    model(input_ids=tokens[None].to(device), **{cache_argument(model): cache})
    pairs = torch.stack([t[0] for layer in cache.layers for t in (layer.keys, layer.values)])
    # (2 · layers, heads, T, head size) → a row for each token
    return pairs.permute(2, 0, 1, 3).reshape(len(tokens), -1).float()


def _set_virtual_tokens(lm: LanguageModel, values: Tensor) -> None:
    encoder: Any = lm.module.prompt_encoder
    (virtual,) = encoder.parameters()
    if virtual.shape != values.shape:
        raise UsageError(
            f"the layers of {lm.name} differ in the shape of their keys, which a prefix of peft does not support. "
            "Tune a prompt or a LoRA adapter (--tuning prompt, lora)."
        )
    with torch.no_grad():
        virtual.copy_(values)


def _task_type(lm: LanguageModel) -> str:
    if lm.classifies:
        return "SEQ_CLS"
    # peft has no class for masked language models; its class for feature extraction passes all outputs through.
    return "FEATURE_EXTRACTION" if lm.masked else "CAUSAL_LM"


def _wrap_with_peft(lm: LanguageModel, adapter: Any, config: StepOptions) -> None:
    from peft import get_peft_model

    if adapter.is_prompt_learning:
        accept_old_name(lm.base)
    # peft draws initial weights from torch's global generators, whose states are restored afterwards.
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        _stand_ins(lm.module, lm.device),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="lora with eva initialization used with low_cpu_mem_usage")
        warnings.filterwarnings("ignore", message=NORM_OF_A_MODEL)
        torch.manual_seed(config.seed)
        lm.module = get_peft_model(lm.module, adapter, revision=config.model_revision)
    cut_adapter(lm.base)
    name_base_for_all(lm.module)
    lm.module.eval()


@contextmanager
def _stand_ins(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within this context offloaded weights have a place: on the device of their use, without memory; so have shards.

    peft puts the tensors of an adapter beside the weights that it adapts; on `meta` they would have no values, and
    beside slices those of slices.
    """
    offloaded = [
        (m, name, p)
        for m in module.modules()
        for name, p in m._parameters.items()
        if p is not None and (p.is_meta or is_distributed(p))
    ]
    if device.type == "meta":
        offloaded = []
    for m, name, p in offloaded:
        place = torch.zeros((), dtype=p.dtype, device=device).expand(p.shape)
        m._parameters[name] = nn.Parameter(place, requires_grad=False)
    try:
        yield
    finally:
        for m, name, p in offloaded:
            p.requires_grad_(False)
            m._parameters[name] = p
