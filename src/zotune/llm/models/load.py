"""Models by name: the built-in one, a Hub id, a local folder, or a known architecture with random weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from zotune.errors import UsageError, did_you_mean
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.builtin import BUILT_IN, fetch, fetch_gguf
from zotune.llm.models.classification_head import check_labels, with_head
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.random_models import ARCHITECTURES, byte_tokenizer
from zotune.llm.quantized.backends import QUANTIZERS, check_head, keep_scales, quantised_on_load, saved_quantization
from zotune.llm.quantized.gguf_model import read_model
from zotune.llm.quantized.gguf_output import base_of_tuned, put_tuned
from zotune.messages import say

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(options: ModelOptions, labels: Sequence[str] = (), seed: int = 0) -> LanguageModel:
    """The model that `options` name, in eval mode, on its device.

    Args:
        options: which model.
        labels: where given, a masked language model gets a classification head for them.
        seed: names the new head's weights.

    Raises:
        UsageError: it cannot be found, read, or run here; the message says which and what to do.
    """
    quiet_libraries()
    device = find_device(options.device)
    check_quantization(options)
    if options.model.startswith("random:"):
        lm = _random(options.model.removeprefix("random:"), options)
    elif (adapter := _adapter_folder(options)) is not None:
        lm = _adapted(adapter, options, labels)
    elif (base := base_of_tuned(Path(options.model))) is not None:
        lm = _tuned(base, options)
    else:
        lm = _pretrained(options)
    if labels and lm.classifies:
        check_labels(lm.name, lm.config, labels)
    elif labels and lm.masked:
        check_head(lm.module, options)
        lm.module, lm.classifies = with_head(lm.module, labels, seed), True
    if not getattr(lm.base, "is_quantized", False):  # which transformers has put in its place, and does not move
        lm.module.to(device)
    lm.module.eval()
    return lm


def check_quantization(options: ModelOptions) -> None:
    """Refuse a quantisation that the model cannot be had in.

    Raises:
        UsageError: with what can be done.
    """
    name, model = options.quantization, options.model
    is_file = model.endswith(".gguf")
    if is_file and name not in (None, "gguf"):
        raise UsageError(f"{model} is packed as it comes; leave out --quantization {name}.")
    if name == "gguf" and not is_file and model not in BUILT_IN and not Path(model).is_dir():
        raise UsageError(
            f"quantization: gguf takes a built-in model or the path of a GGUF file, not {model!r}. Of other models "
            f"there are: {', '.join(QUANTIZERS)}."
        )
    if name in QUANTIZERS and model.startswith("random:"):
        raise UsageError(f"{model} is in no file that {QUANTIZERS[name][0]} could quantise; leave out --quantization.")


def quiet_libraries() -> None:
    """Transformers and its companions speak through zotune's own progress and messages."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("huggingface_hub", "datasets", "peft", "bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # What peft asks of transformers concerns their developers.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    # With a prompt peft leaves positions to the model, which counts them as it should: nothing is padded.
    warnings.filterwarnings("ignore", message="Position ids are not supported", category=UserWarning)


def find_device(name: str) -> torch.device:
    """A device by name; `auto` is a GPU where there is one.

    Raises:
        UsageError: it cannot be used here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"the device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def _random(name: str, options: ModelOptions) -> LanguageModel:
    """An architecture with random weights, the same ones each time."""
    import transformers

    if name not in ARCHITECTURES:
        raise UsageError(f"there is no architecture {name!r}.{did_you_mean(name, ARCHITECTURES)}")
    config = ARCHITECTURES[name]()
    masked = config.model_type == "roberta"
    auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = auto.from_config(config, dtype=_DTYPES.get(options.dtype, torch.float32))
    module.name_or_path = options.model
    return LanguageModel(module, byte_tokenizer(config), options.model, masked)


def _pretrained(options: ModelOptions) -> LanguageModel:
    import transformers

    if options.is_gguf:
        return _packed(options)
    built_in = options.model in BUILT_IN
    source = str(fetch(options.model, accept_terms=options.accept_terms)) if built_in else options.model
    if not Path(source).is_dir():
        say(f"looking for {source} on the Hub …")
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        made = {name.rpartition("For")[2] for name in config.architectures or []}
        masked, classifies = "MaskedLM" in made, "SequenceClassification" in made
        auto = (
            transformers.AutoModelForSequenceClassification
            if classifies
            else transformers.AutoModelForMaskedLM
            if masked
            else transformers.AutoModelForCausalLM
        )
        dtype = _DTYPES.get(options.dtype, config.dtype or torch.float32)
        quantised = quantised_on_load(options.quantization, dtype, find_device(options.device))
        module = auto.from_pretrained(source, dtype=_DTYPES.get(options.dtype, "auto"), **quantised)
        keep_scales(module)
        # An adapter's folder names its base by this: not by where this machine's cache is.
        module.name_or_path = options.model
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UsageError(_not_loaded(options.model, error)) from None
    return LanguageModel(module, tokenizer, options.model, masked or classifies, classifies=classifies)


def _packed(options: ModelOptions) -> LanguageModel:
    """A model of a GGUF file, or the built-in one as its file has it."""
    import transformers

    named: dict[str, str] = {}
    if options.model in BUILT_IN:
        file = fetch_gguf(options.model, accept_terms=options.accept_terms)
        folder = fetch(options.model, accept_terms=options.accept_terms)
    else:
        file = Path(options.model)
        folder, named["gguf_file"] = file.parent, file.name
        say(f"reading configuration and tokenizer of {file}; that takes a while …")
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), **named)
        module = read_model(file, config, _DTYPES.get(options.dtype, torch.float32))
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **named)
        if not named:
            module.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(_not_loaded(options.model, error)) from None
    module.name_or_path = options.model
    return LanguageModel(module, tokenizer, options.model, masked=False)


def _adapter_folder(options: ModelOptions) -> Path | None:
    folder = Path(options.model)
    return folder if (folder / "adapter_config.json").is_file() else None


def _adapted(folder: Path, options: ModelOptions, labels: Sequence[str]) -> LanguageModel:
    """A base model with the adapter of a folder, as peft loads it."""
    from peft import PeftConfig, PeftModel

    base = str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
    quantization = options.quantization or saved_quantization(folder)
    lm = load(options.model_copy(update={"model": base, "quantization": quantization}), labels)
    lm.module = PeftModel.from_pretrained(lm.module, str(folder))
    lm.name = options.model
    return lm


def _tuned(base: str, options: ModelOptions) -> LanguageModel:
    """A base model of a GGUF file with the tensors of a folder."""
    lm = load(options.model_copy(update={"model": base, "quantization": "gguf"}))
    put_tuned(lm.module, Path(options.model))
    lm.name = options.model
    return lm


def _not_loaded(name: str, error: Exception) -> str:
    known = [*BUILT_IN, *(f"random:{a}" for a in ARCHITECTURES)]
    reason = str(error).strip().splitlines()[0]
    if Path(name).is_dir():
        return f"the folder {name!r} does not hold a model that transformers can load: {reason}"
    return (
        f"the model {name!r} is neither built in nor a local folder, and could not be had from the Hub ({reason})."
        f"{did_you_mean(name, known)} Without a network, fetch it where there is one with `hf download {name}` "
        "and give the folder."
    )
