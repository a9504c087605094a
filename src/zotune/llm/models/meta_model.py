"""Models without weights: all shapes on the `meta` device, for everything that can be computed before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zotune.llm.checkpoints.adapter_folder import read_adapter_folder, with_adapter
from zotune.llm.checkpoints.companions import read_companions
from zotune.llm.checkpoints.model_kind import kind_of
from zotune.llm.checkpoints.no_code import NO_CODE, read_config, read_tokenizer
from zotune.llm.checkpoints.pretrained import check_pretrained
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.cache_argument import accept_old_name
from zotune.llm.models.classification_head import give_head_of_adapter, with_classification_head
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.load import (
    adapter_of,
    attention_of,
    base_options,
    check_quantization,
    check_revision,
    load,
    quiet_libraries,
    source_of,
    tokenizer_of,
)
from zotune.llm.models.loading_errors import errors_in_words
from zotune.llm.models.random_models import ARCHITECTURES, byte_tokenizer
from zotune.llm.quantized.backends import replace_with_packed_shapes

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_meta_model(options: ModelOptions, labels: tuple[str, ...] = ()) -> tuple[LanguageModel, torch.dtype]:
    """Return the model that `options` name without weights, with its tokenizer, and its checkpoint's precision.

    The configuration and the tokenizer are read as by `load`; a built-in model is fetched if it is not in the cache.

    Raises:
        UsageError: the model cannot be found or read; the message is that of `load`.
    """
    quiet_libraries()
    check_revision(options)
    if (adapter := adapter_of(options)) is not None:
        return _with_adapter(adapter, options, labels)
    check_quantization(options)
    if options.is_gguf:  # its packed weights are mapped from the file and not read here
        lm, stored = load(options), _DTYPES.get(options.dtype, torch.float32)
        lm.module.to("meta")
    else:
        lm, stored = _base(options, new_head=bool(labels))
        if options.quantization not in (None, "none"):
            replace_with_packed_shapes(lm.base, options.quantization)
    if labels and lm.masked and not lm.classifies:
        with torch.device("meta"):
            lm.module, lm.classifies = with_classification_head(lm.module, labels, 0), True
    lm.module.eval()
    return lm, stored


def meta_model_from_config(options: ModelOptions, config: Any) -> tuple[LanguageModel, torch.dtype]:
    """As `load_meta_model`, from a configuration of transformers alone, with a tokenizer of bytes."""
    quiet_libraries()
    stored = _DTYPES.get(options.dtype, config.dtype or torch.float32)
    lm = _on_meta(options, config, byte_tokenizer(config), stored)
    lm.module.eval()
    return lm, stored


def _base(options: ModelOptions, *, new_head: bool) -> tuple[LanguageModel, torch.dtype]:
    name = options.model.removeprefix("random:")
    if name != options.model and name in ARCHITECTURES:
        config: Any = ARCHITECTURES[name]()
        stored = _DTYPES.get(options.dtype, torch.float32)
        return _on_meta(options, config, byte_tokenizer(config), stored), stored
    if name != options.model:
        load(options)  # raises an error that suggests a name
    source = source_of(options)
    with errors_in_words(options.model):
        config = read_config(source, **options.reading)
        kind = kind_of(config, options.model)
        if getattr(config, "quantization_config", None) is None:
            check_pretrained(source, kind, options.model, new_head=new_head and kind.masked, **options.reading)
        tokenizer = read_tokenizer(source, **options.reading)
        stored = config.dtype or torch.float32
        lm = _on_meta(options, config, tokenizer, stored)
        lm.companions = read_companions(source, options.model_revision) if kind.note else {}
        return lm, stored


def _on_meta(options: ModelOptions, config: Any, tokenizer: Any, stored: torch.dtype) -> LanguageModel:
    kind = kind_of(config, options.model)
    with torch.device("meta"):
        module = kind.auto_class.from_config(
            config,
            dtype=_DTYPES.get(options.dtype, stored),
            **attention_of(options),
            **{**NO_CODE, "trust_remote_code": options.trust_remote_code},
        )
    module.name_or_path = options.model
    return LanguageModel(module, tokenizer, options.model, kind.masked or kind.classifies, classifies=kind.classifies)


def _with_adapter(path: Path, options: ModelOptions, labels: tuple[str, ...]) -> tuple[LanguageModel, torch.dtype]:
    folder = read_adapter_folder(path)
    lm, stored = load_meta_model(base_options(folder, options), labels)
    with torch.device("meta"):
        give_head_of_adapter(lm, folder, labels)
    lm.tokenizer = tokenizer_of(folder, lm.tokenizer)
    with torch.device("meta"):
        lm.module = with_adapter(lm.module, folder, len(lm.tokenizer))
    if lm.num_virtual_tokens:
        accept_old_name(lm.base)
    lm.name = options.model
    return lm, stored
