"""Any other adapter of peft, by its name (`peft_type`) and the keys of its configuration (`peft_config`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from zotune.errors import UsageError, did_you_mean
from zotune.llm.checkpoints.adapter_config import check_adapter_config
from zotune.llm.checkpoints.adapter_folder import check_init
from zotune.llm.config.step import StepOptions
from zotune.llm.models.adapters.peft_wrapper import read_a_token, task_type, wrap_with_peft
from zotune.llm.models.language_model import LanguageModel

# Keys of an adapter's configuration that zotune sets itself.
_RESERVED_KEYS = {"peft_type", "task_type", "inference_mode", "base_model_name_or_path", "auto_mapping", "peft_version"}


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
        adapter = schemes[name](task_type=task_type(lm), **config.peft_options)
        check_init(adapter, f"peft_config of {name}")
        wrap_with_peft(lm, adapter, config)
        _check_read_again(adapter)
        read_a_token(lm)
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
