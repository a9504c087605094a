"""A model without its numbers: every shape of it on the `meta` device, for what can be known before a run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from zotune.errors import UsageError
from zotune.llm.config.run import ModelOptions
from zotune.llm.models.builtin import BUILT_IN, fetch
from zotune.llm.models.cache_argument import accept_old_name
from zotune.llm.models.classification_head import with_head
from zotune.llm.models.load import LanguageModel, load, quiet_libraries
from zotune.llm.models.random_models import ARCHITECTURES, byte_tokenizer
from zotune.llm.quantized.backends import check_quantization, put_shapes, saved_quantization

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def skeleton(options: ModelOptions, labels: tuple[str, ...] = ()) -> tuple[LanguageModel, torch.dtype]:
    """The model that `options` name, with its tokenizer but with no weight in memory, and its checkpoint's precision.

    The configuration and the tokenizer are read as `load` reads them (a model of the package index is fetched if it
    never was); the weights are not.

    Raises:
        UsageError: it cannot be found or read; the message is that of `load`.
    """
    quiet_libraries()
    folder = Path(options.model)
    if (folder / "adapter_config.json").is_file():
        return _adapted(folder, options, labels)
    check_quantization(options)
    if options.is_gguf:  # of whose packed weights, mapped from their file, none is read here
        lm, stored = load(options), _DTYPES.get(options.dtype, torch.float32)
        lm.module.to("meta")
    else:
        lm, stored = _base(options)
        if options.quantization not in (None, "none"):
            put_shapes(lm.base, options.quantization)
    if labels and lm.masked and not lm.classifies:
        with torch.device("meta"):
            lm.module, lm.classifies = with_head(lm.module, labels, 0), True
    lm.module.eval()
    return lm, stored


def bare(options: ModelOptions, config: Any) -> tuple[LanguageModel, torch.dtype]:
    """As `skeleton`, of a configuration of transformers alone; the tokenizer is one of bytes."""
    quiet_libraries()
    stored = _DTYPES.get(options.dtype, config.dtype or torch.float32)
    lm = _shaped(options, config, byte_tokenizer(config), stored)
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
            return _shaped(options, config, tokenizer, stored), stored
        load(options)  # which says what is wrong
        raise UsageError(f"the model {options.model!r} cannot be read.")
    return _shaped(options, config, tokenizer, stored), stored


def _shaped(options: ModelOptions, config: Any, tokenizer: Any, stored: torch.dtype) -> LanguageModel:
    import transformers

    made = {name.rpartition("For")[2] for name in config.architectures or []}
    classifies = "SequenceClassification" in made
    masked = "MaskedLM" in made or (not made and config.model_type == "roberta")
    auto: Any = transformers.AutoModelForCausalLM
    if classifies or masked:
        auto = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForMaskedLM
    with torch.device("meta"):
        module = auto.from_config(config, dtype=_DTYPES.get(options.dtype, stored))
    module.name_or_path = options.model
    return LanguageModel(module, tokenizer, options.model, masked or classifies, classifies=classifies)


def _adapted(folder: Path, options: ModelOptions, labels: tuple[str, ...]) -> tuple[LanguageModel, torch.dtype]:
    from peft import PeftConfig, get_peft_model

    adapter = PeftConfig.from_pretrained(str(folder))
    quantization = options.quantization or saved_quantization(folder)
    base = options.model_copy(update={"model": str(adapter.base_model_name_or_path), "quantization": quantization})
    lm, stored = skeleton(base, labels)
    with torch.device("meta"):
        lm.module = get_peft_model(lm.module, adapter)
    if lm.num_virtual_tokens:
        accept_old_name(lm.base)
    lm.name = options.model
    return lm, stored
