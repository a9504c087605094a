"""Models without weights: all shapes on the `meta` device, for everything that can be computed before a run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from zotune.errors import UsageError
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.builtin import BUILT_IN, fetch
from zotune.llm.models.cache_argument import accept_old_name
from zotune.llm.models.classification_head import with_classification_head
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.load import check_quantization, load, quiet_libraries
from zotune.llm.models.random_models import ARCHITECTURES, byte_tokenizer
from zotune.llm.quantized.backends import replace_with_packed_shapes, saved_quantization

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_meta_model(options: ModelOptions, labels: tuple[str, ...] = ()) -> tuple[LanguageModel, torch.dtype]:
    """Return the model that `options` name without weights, with its tokenizer, and its checkpoint's precision.

    The configuration and the tokenizer are read as by `load`; a built-in model is fetched if it is not in the cache.

    Raises:
        UsageError: the model cannot be found or read; the message is that of `load`.
    """
    quiet_libraries()
    folder = Path(options.model)
    if (folder / "adapter_config.json").is_file():
        return _with_adapter(folder, options, labels)
    check_quantization(options)
    if options.is_gguf:  # its packed weights are mapped from the file and not read here
        lm, stored = load(options), _DTYPES.get(options.dtype, torch.float32)
        lm.module.to("meta")
    else:
        lm, stored = _base(options)
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


def _base(options: ModelOptions) -> tuple[LanguageModel, torch.dtype]:
    import transformers

    name = options.model.removeprefix("random:")
    if name != options.model and name in ARCHITECTURES:
        config: Any = ARCHITECTURES[name]()
        tokenizer, stored = byte_tokenizer(config), _DTYPES.get(options.dtype, torch.float32)
    else:
        source = options.model
        if source in BUILT_IN:
            source = str(fetch(source, accept_terms=options.accept_terms))
        with suppress(OSError, ValueError, KeyError):
            config = transformers.AutoConfig.from_pretrained(source)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            stored = config.dtype or torch.float32
            return _on_meta(options, config, tokenizer, stored), stored
        load(options)  # raises an error that says what is wrong
        raise UsageError(f"the configuration of the model {options.model!r} cannot be read; check its name or folder.")
    return _on_meta(options, config, tokenizer, stored), stored


def _on_meta(options: ModelOptions, config: Any, tokenizer: Any, stored: torch.dtype) -> LanguageModel:
    import transformers

    heads = {name.rpartition("For")[2] for name in config.architectures or []}
    classifies = "SequenceClassification" in heads
    masked = "MaskedLM" in heads or (not heads and config.model_type == "roberta")
    auto: Any = transformers.AutoModelForCausalLM
    if classifies or masked:
        auto = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForMaskedLM
    with torch.device("meta"):
        module = auto.from_config(config, dtype=_DTYPES.get(options.dtype, stored))
    module.name_or_path = options.model
    return LanguageModel(module, tokenizer, options.model, masked or classifies, classifies=classifies)


def _with_adapter(folder: Path, options: ModelOptions, labels: tuple[str, ...]) -> tuple[LanguageModel, torch.dtype]:
    from peft import PeftConfig, get_peft_model

    adapter = PeftConfig.from_pretrained(str(folder))
    quantization = options.quantization or saved_quantization(folder)
    base = options.model_copy(update={"model": str(adapter.base_model_name_or_path), "quantization": quantization})
    lm, stored = load_meta_model(base, labels)
    with torch.device("meta"):
        lm.module = get_peft_model(lm.module, adapter)
    if lm.num_virtual_tokens:
        accept_old_name(lm.base)
    lm.name = options.model
    return lm, stored
