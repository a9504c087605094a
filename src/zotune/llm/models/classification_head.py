"""A classification head on a masked language model's first token: fine-tuning without task alignment.

The paper's Table 1 compares it with the prompt (its columns marked ✗). The body keeps its weights; the head's
are new, drawn from a seed, so nothing of pre-training tells it about the labels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from zotune.errors import UsageError


def with_head(model: Any, labels: Sequence[str], seed: int) -> Any:
    """A model of transformers that classifies sequences into `labels`, with the body of `model`."""
    import transformers

    config = copy.deepcopy(model.config)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    # Initial weights come from torch's global generator; leave that as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = transformers.AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
    # Strict but for a pooling layer, which only heads read.
    left_out = found.base_model.load_state_dict(model.base_model.state_dict(), strict=False)
    if any("pooler" not in name for name in left_out.missing_keys):
        raise UsageError(f"{model.config.model_type} models cannot be given a classification head here: {left_out}")
    found.name_or_path = model.name_or_path
    return found


def check_labels(name: str, config: Any, labels: Sequence[str]) -> None:
    """Refuse a head that was made for other labels.

    Raises:
        UsageError: their numbers differ.
    """
    if config.num_labels != len(labels):
        raise UsageError(
            f"the head of {name} has {config.num_labels} labels, but the task has {len(labels)} "
            f"({', '.join(labels)}). Use the task it was tuned on."
        )


def parts_of_head(model: Any) -> list[str]:
    """The names of a model's modules beside its body."""
    return [name for name, part in model.named_children() if part is not model.base_model]
