"""Loading a model and its tokenizer by name, to hold them in Python."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

from zotune.errors import UsageError
from zotune.llm.checkpoints.adapter_merge import is_adapter
from zotune.llm.config.schema import validate
from zotune.llm.config.step import ModelOptions
from zotune.llm.models import load as by_name
from zotune.llm.models.continued_adapter import make_trainable
from zotune.llm.models.language_model import LanguageModel


@overload
def load(model: ModelOptions, labels: Sequence[str] = (), seed: int = 0) -> LanguageModel: ...


@overload
def load(model: str | Path, **options: Any) -> tuple[Any, Any]: ...


def load(
    model: str | Path | ModelOptions, labels: Sequence[str] = (), seed: int = 0, **options: Any
) -> LanguageModel | tuple[Any, Any]:
    """Load a model and its tokenizer by name, in eval mode, onto its device.

    Args:
        model: a built-in name (`smollm2-135m`), a name on the Hub, a folder, such as the output of a run, a GGUF file,
            or `random:NAME`, a known architecture with random weights. Or `ModelOptions`, which name everything.
        labels: with `ModelOptions`: if given, a masked language model gets a new classification head for them.
        seed: seed of the new head's weights.
        options: options of `ModelOptions` by name: `model_revision`, `dtype`, `quantization`, `device`,
            `device_map`, `offload_folder`, `attn_implementation`, `trust_remote_code`, `accept_terms`.

    Returns:
        The model and its tokenizer, both of transformers; a `peft.PeftModel`, whose adapter can be tuned on, for the
        folder of an adapter. For `ModelOptions` both as a `LanguageModel`.

    Raises:
        UsageError: the model cannot be found, read or run here; the message says why and what to do.

    >>> from zotune.llm import load
    >>> model, tokenizer = load("random:llama-tiny", device="cpu")
    >>> type(model).__name__, tokenizer("ab")["input_ids"][-2:] != []
    ('LlamaForCausalLM', True)
    """
    if isinstance(model, ModelOptions):
        return by_name.load(model, labels, seed)
    lm = by_name.load(validate(ModelOptions, {**options, "model": str(model)}, "load()"))
    if is_adapter(lm.module):
        with suppress(UsageError):  # an adapter that cannot be tuned further is still one to read with
            make_trainable(lm.module, lm.name)
    return lm.module, lm.tokenizer
