"""Loading a model by name: built in, from the Hub, from a local folder, or an architecture with random weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from zotune.errors import UsageError, did_you_mean
from zotune.llm.checkpoints.adapter_folder import AdapterFolder, read_adapter_folder, with_adapter
from zotune.llm.checkpoints.adapter_source import find_adapter
from zotune.llm.checkpoints.attention import attention_arguments
from zotune.llm.checkpoints.causality import check_causal
from zotune.llm.checkpoints.companions import read_companions
from zotune.llm.checkpoints.fingerprint import check_fingerprint, fingerprint
from zotune.llm.checkpoints.model_kind import kind_of
from zotune.llm.checkpoints.no_code import NO_CODE, read_config, read_generation_config, read_tokenizer
from zotune.llm.checkpoints.pretrained import read_pretrained
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.builtin import BUILT_IN, fetch, fetch_gguf
from zotune.llm.models.cache_argument import accept_old_name
from zotune.llm.models.classification_head import check_labels, give_head_of_adapter, with_classification_head
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.loading_errors import errors_in_words
from zotune.llm.models.placement.device_map import is_placed
from zotune.llm.models.placement.devices import find_device
from zotune.llm.models.placement.layers import (
    check_no_new_head,
    open_scratch,
    place_rest,
    read_by_map,
    reads_within_layers,
    stream_in_memory,
)
from zotune.llm.models.placement.sharded import (
    check_loaded_adapter,
    cut_adapter,
    cut_by_fsdp,
    cut_by_plan,
    forget_loading,
    loading_arguments,
    shard_of,
)
from zotune.llm.models.random_models import ARCHITECTURES, byte_tokenizer
from zotune.llm.quantized.backends import (
    QUANTIZERS,
    check_head,
    keep_scales_in_float32,
    loading_options,
    saved_quantization,
)
from zotune.llm.quantized.gguf_model import read_model
from zotune.llm.quantized.gguf_output import load_tuned, tuned_base_model
from zotune.llm.quantized.gguf_reader import read_gguf
from zotune.messages import say
from zotune.model.shards import mesh_of
from zotune.system.loggers import quiet_loggers
from zotune.system.processor import emulates

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(options: ModelOptions, labels: Sequence[str] = (), seed: int = 0) -> LanguageModel:
    """Load the model that `options` name, in eval mode, onto its device.

    Args:
        options: the model's name, precision, quantisation and device.
        labels: if given, a masked language model gets a new classification head for them.
        seed: seed of the new head's weights.

    Raises:
        UsageError: the model cannot be found, read or run here; the message says why and what to do.
    """
    quiet_libraries()
    device = find_device(options.device)
    check_quantization(options)
    check_revision(options)
    adapter = adapter_of(options)
    shard = shard_of(options)
    if adapter is not None and shard is not None:
        check_loaded_adapter(read_adapter_folder(adapter).config, options.model, shard)
    if options.model.startswith("random:"):
        lm = _random(options.model.removeprefix("random:"), options)
        stream_in_memory(lm.module, options, device)
    elif adapter is not None:
        lm = _load_adapter(adapter, options, labels)
    elif (base := tuned_base_model(Path(options.model))) is not None:
        lm = _load_tuned_gguf(base, options)
    else:
        lm = _pretrained(options, new_head=bool(labels))
    if labels and lm.classifies:
        check_labels(lm.name, lm.config, labels)
    elif labels and lm.masked:
        check_head(lm.module, options)
        check_no_new_head(lm.module, lm.name)
        lm.module, lm.classifies = with_classification_head(lm.module, labels, seed), True
    is_quantized = getattr(lm.base, "is_quantized", False)
    _place(lm, options, device, shard)
    lm.module.eval()
    if lm.device.type == "cpu":
        _say_what_is_emulated(lm.base.dtype)
    # What is wrong with a configuration or a tokenizer may show in its first use alone.
    with errors_in_words(options.model):
        lm.tokenizer("a")
        # The base of an adapter has been checked, and a first forward pass would pack the weights of bitsandbytes.
        if not (lm.masked or is_quantized or adapter is not None):
            with reads_within_layers(lm.module, lm.name):
                check_causal(lambda ids: lm.read(ids.to(lm.device), torch.ones_like(ids)), lm.vocabulary, lm.name)
    return lm


@cache
def _say_what_is_emulated(dtype: torch.dtype) -> None:
    """Say once that products of a precision are slow on this processor."""
    if emulates(dtype):
        name = str(dtype).removeprefix("torch.")
        say(
            f"this processor has no instructions for {name} products: they take several times as long as those of "
            "float32. If there is memory for it (twice the bytes of the weights), add --dtype float32."
        )


def check_quantization(options: ModelOptions) -> None:
    """Check that the model can be loaded with the quantisation asked for.

    Raises:
        UsageError: it cannot; the message says what to do.
    """
    name, model = options.quantization, options.model
    is_file = model.endswith(".gguf")
    if is_file and name not in (None, "gguf"):
        raise UsageError(f"{model} is a quantised file already; leave out --quantization {name}.")
    if name == "gguf" and not is_file and model not in BUILT_IN and not Path(model).is_dir():
        raise UsageError(
            f"quantization: gguf needs a built-in model or the path of a GGUF file, not {model!r}. For other models "
            f"use one of: {', '.join(QUANTIZERS)}."
        )
    if name in QUANTIZERS and model.startswith("random:"):
        raise UsageError(
            f"{model} has no checkpoint file for {QUANTIZERS[name][0]} to quantise; leave out --quantization."
        )


def check_revision(options: ModelOptions) -> None:
    """Check that a revision is asked of a model on the Hub, and of no other.

    Raises:
        UsageError: the model has no revisions.
    """
    is_here = options.model in BUILT_IN or options.model.startswith("random:") or Path(options.model).exists()
    if options.model_revision is not None and is_here:
        raise UsageError(
            f"model_revision names a revision of a repository on the Hub, and {options.model} is none; leave it out. "
            "The revision of an adapter's base model is in its adapter_config.json."
        )


def adapter_of(options: ModelOptions) -> Path | None:
    """Return the folder of the adapter that `options` name, or None if they name another model."""
    if options.model in BUILT_IN:
        return None
    with errors_in_words(options.model):
        return find_adapter(options.model, options.model_revision)


def quiet_libraries() -> None:
    """Silence transformers and related libraries; zotune shows progress and messages of its own."""
    import transformers

    transformers.logging.disable_progress_bar()
    quiet_loggers()
    # A warning from peft about transformers that only their developers can act on.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    # Matrices are untied before an adapter on one of them is merged.
    warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True", category=UserWarning)
    # With prompt tuning peft leaves the positions to the model; they are correct because nothing is padded.
    warnings.filterwarnings("ignore", message="Position ids are not supported", category=UserWarning)


def _place(lm: LanguageModel, options: ModelOptions, device: torch.device, shard: str | None) -> None:
    """Move a model, or what of it is not in its place yet, to its device or devices."""
    if is_placed(options):
        place_rest(lm.module, options, device)
    elif shard is not None and mesh_of(lm.base) is None:
        cut_by_fsdp(lm.base, device) if shard == "fsdp" else cut_by_plan(lm.base)
    elif not getattr(lm.base, "is_quantized", False) and shard is None:
        # transformers has placed a quantised model already, and one in shards
        lm.module.to(device)


def _random(name: str, options: ModelOptions) -> LanguageModel:
    """Build an architecture with random weights, the same at each call."""
    if name not in ARCHITECTURES:
        raise UsageError(f"there is no architecture {name!r}.{did_you_mean(name, ARCHITECTURES)}")
    config = ARCHITECTURES[name]()
    kind = kind_of(config, options.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = kind.auto_class.from_config(
            config, dtype=_DTYPES.get(options.dtype, torch.float32), **attention_of(options), **NO_CODE
        )
    module.name_or_path = options.model
    return LanguageModel(module, byte_tokenizer(config), options.model, kind.masked)


def _pretrained(options: ModelOptions, *, new_head: bool) -> LanguageModel:
    if options.is_gguf:
        return _load_gguf(options)
    source = source_of(options)
    if not Path(source).is_dir():
        say(f"looking for {source} on the Hub …")
    with errors_in_words(options.model):
        config = read_config(source, **options.reading)
        kind = kind_of(config, options.model)
        dtype = _DTYPES.get(options.dtype, config.dtype or torch.float32)
        device = find_device(options.device)
        quantisation = loading_options(options.quantization, dtype, device)
        arguments = {
            "new_head": new_head and kind.masked,
            "dtype": _DTYPES.get(options.dtype, "auto"),
            **options.reading,
            **attention_of(options),
            **quantisation,
            **loading_arguments(shard_of(options), source, config, kind.auto_class, dtype=dtype, device=device),
        }
        module = (
            read_by_map(source, kind, options, config, device, arguments)
            if is_placed(options)
            else read_pretrained(source, kind, options.model, **arguments)
        )
        forget_loading(module)
        keep_scales_in_float32(module)
        # An adapter's folder names its base model by this name, not by a path in this machine's cache.
        module.name_or_path = options.model
        tokenizer = read_tokenizer(source, **options.reading)
        companions = read_companions(source, options.model_revision) if kind.note else {}
    if kind.note:
        say(f"{options.model} {kind.note}")
    masked = kind.masked or kind.classifies
    return LanguageModel(module, tokenizer, options.model, masked, classifies=kind.classifies, companions=companions)


def attention_of(options: ModelOptions) -> dict[str, Any]:
    """Return the argument of transformers for the attention that `options` name, if they name one.

    Raises:
        UsageError: it cannot run here.
    """
    if options.attn_implementation is None:
        return {}  # a plan may be for a device that is not here
    return attention_arguments(options.attn_implementation, find_device(options.device))


def source_of(options: ModelOptions) -> str:
    """Return the folder of a model, or its name on the Hub."""
    built_in = options.model in BUILT_IN
    return str(fetch(options.model, accept_terms=options.accept_terms)) if built_in else options.model


def _load_gguf(options: ModelOptions) -> LanguageModel:
    """Load the model of a GGUF file, or a built-in model from its GGUF file."""
    named: dict[str, str] = {}
    if options.model in BUILT_IN:
        file = fetch_gguf(options.model, accept_terms=options.accept_terms)
        folder = fetch(options.model, accept_terms=options.accept_terms)
    else:
        file = Path(options.model)
        read_gguf(file)  # transformers would believe every count in its header
        folder, named["gguf_file"] = file.parent, file.name
        say(f"reading the configuration and tokenizer of {file}; this takes a while …")
    with errors_in_words(options.model):
        config = read_config(folder, **named)
        if attention := attention_of(options):
            config._attn_implementation = attention["attn_implementation"]
        scratch = open_scratch(options)
        keep = None if scratch is None else scratch.kept
        module = read_model(file, config, _DTYPES.get(options.dtype, torch.float32), keep)
        tokenizer = read_tokenizer(folder, **named)
        if not named:
            module.generation_config = read_generation_config(folder)
    module.name_or_path = options.model
    lm = LanguageModel(module, tokenizer, options.model, masked=False)
    stream_in_memory(lm.module, options, find_device(options.device), scratch)
    return lm


def _load_adapter(path: Path, options: ModelOptions, labels: Sequence[str]) -> LanguageModel:
    """Load a base model with the adapter in a folder, and the folder's tokenizer if it has one."""
    folder = read_adapter_folder(path)
    revision = "" if folder.revision is None else f" in the revision {folder.revision}"
    say(f"the adapter {options.model} names the base model {folder.base}{revision}")
    lm = load(base_options(folder, options), labels)
    if folder.num_classes and not lm.classifies:
        check_head(lm.module, options)
        give_head_of_adapter(lm, folder, labels)
        lm.module.to(find_device(options.device)).eval()
    check_fingerprint(path, lm.module, folder.base)
    lm.base_fingerprint = fingerprint(lm.module)
    lm.tokenizer = tokenizer_of(folder, lm.tokenizer)
    lm.module = with_adapter(lm.module, folder, len(lm.tokenizer))
    cut_adapter(lm.base)
    if lm.num_virtual_tokens:
        accept_old_name(lm.base)
    lm.name = options.model
    return lm


def base_options(folder: AdapterFolder, options: ModelOptions) -> ModelOptions:
    """Return the options that load the base model of an adapter."""
    quantization = options.quantization or saved_quantization(folder.path)
    base = {"model": folder.base, "model_revision": folder.revision}
    return options.model_copy(update={**base, "quantization": quantization})


def tokenizer_of(folder: AdapterFolder, of_base: Any) -> Any:
    """Return the tokenizer in an adapter's folder, which may have other tokens than that of its base model.

    A folder may hold a chat template alone, which takes the place of that of the base's tokenizer.
    """
    with errors_in_words(str(folder.path)):
        if folder.has_tokenizer:
            return read_tokenizer(folder.path)
        of_base.chat_template = folder.chat_template or of_base.chat_template
    return of_base


def _load_tuned_gguf(base: str, options: ModelOptions) -> LanguageModel:
    """Load a base model from its GGUF file, with the tuned tensors in a folder."""
    if base not in BUILT_IN and Path(base).is_dir():
        raise UsageError(
            f"the tuned tensors in {options.model} name the folder {base!r} as their base, and no GGUF file."
        )
    say(f"the tuned tensors in {options.model} name the base model {base}")
    lm = load(options.model_copy(update={"model": base, "quantization": "gguf"}))
    check_fingerprint(Path(options.model), lm.module, base)
    load_tuned(lm.module, Path(options.model))
    lm.name = options.model
    return lm
