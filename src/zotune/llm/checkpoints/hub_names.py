"""The names of models on the Hub, by which an adapter or a model card names its base model on any machine.

A built-in model is not downloaded from the Hub: its weights are dequantised from a GGUF file. On the Hub it has a name
all the same, and an adapter of it is saved with that name, so that peft opens it anywhere. zotune itself goes on with
the built-in weights, which the fingerprint beside the adapter names (`zotune.llm.checkpoints.fingerprint`).
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from zotune.llm.checkpoints.fingerprint import FILE as FINGERPRINT
from zotune.system.bounds import read_json

HUB_IDS = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "gemma3-270m": "google/gemma-3-270m",
}
"""The built-in models, and what they are called on the Hub."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# A snapshot in the cache of the Hub's models: models--ORG--NAME/snapshots/REVISION; a folder in it is another model.
_SNAPSHOT = re.compile(r"(?:.*/)?models--([\w.-]+?)--([\w.-]+)/snapshots/[0-9a-f]+/?")


def hub_id(model: str) -> str | None:
    """Return a model's name on the Hub, or None if it has none: a folder, a file, or random weights.

    >>> hub_id("smollm2-135m"), hub_id("facebook/opt-125m"), hub_id("/home/me/model"), hub_id("random:opt-tiny")
    ('HuggingFaceTB/SmolLM2-135M-Instruct', 'facebook/opt-125m', None, None)
    >>> hub_id("/home/me/.cache/huggingface/hub/models--facebook--opt-125m/snapshots/27dcfa")
    'facebook/opt-125m'
    """
    if model in HUB_IDS:
        return HUB_IDS[model]
    if snapshot := _SNAPSHOT.fullmatch(model):
        return f"{snapshot[1]}/{snapshot[2]}"
    is_name = _ID.fullmatch(model) and not Path(model).exists() and Path(model).suffix != ".gguf"
    return model if is_name else None


def name_base_for_all(module: Any) -> None:
    """Let the adapters of a model of peft name their base model so that it means the same wherever they are read.

    A built-in model has the name that it has on the Hub, and a local one its whole path: from another folder, the
    relative path models/llama would be the name of somebody else's model on the Hub.
    """
    for config in module.peft_config.values():
        name = config.base_model_name_or_path
        config.base_model_name_or_path = HUB_IDS.get(name) or (os.path.abspath(name) if _is_local(name) else name)


def _is_local(name: Any) -> bool:
    """Whether a base model is a folder or a GGUF file; the names of the built-in ones are the Hub's in any folder."""
    if not isinstance(name, str) or not name or name in HUB_IDS.values():
        return False
    return Path(name).is_dir() or (Path(name).suffix == ".gguf" and Path(name).is_file())


def built_in_name(folder: Path, base: str) -> str | None:
    """Return the built-in model that an adapter in a folder was tuned on, if `base`, which it names, is its Hub id."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        name = read_json(folder / FINGERPRINT).get("model")
        return name if isinstance(name, str) and HUB_IDS.get(name) == base else None
    return None
