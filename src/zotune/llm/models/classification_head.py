"""A classification head on a masked language model's first token: fine-tuning without task alignment.

The paper's Table 1 compares it with prompts (its columns marked ✗). The body keeps its pre-trained weights; those of
the head are new and drawn from a seed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from zotune.errors import UsageError
from zotune.llm.checkpoints.adapter_folder import AdapterFolder
from zotune.llm.checkpoints.no_code import NO_CODE
from zotune.llm.models.language_model import LanguageModel


def with_classification_head(model: Any, labels: Sequence[str], seed: int) -> Any:
    """Return a model that classifies sequences into `labels`, with the body of `model` and a new head drawn by `seed`.

    Raises:
        UsageError: the architecture cannot be given a head.
    """
    import transformers

    config = copy.deepcopy(model.config)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    # Initial weights come from torch's global generator, whose state is restored afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = transformers.AutoModelForSequenceClassification.from_config(config, dtype=model.dtype, **NO_CODE)
    # Strict, apart from a pooling layer, which only heads read.
    differences = classifier.base_model.load_state_dict(model.base_model.state_dict(), strict=False)
    if any("pooler" not in name for name in differences.missing_keys):
        raise UsageError(
            f"{model.config.model_type} models cannot be given a classification head: {differences}. Use "
            "--prompt aligned, which keeps the language-modelling head."
        )
    classifier.name_or_path = model.name_or_path
    return classifier


def give_head_of_adapter(lm: LanguageModel, folder: AdapterFolder, labels: Sequence[str]) -> None:
    """Give a language model a head in whose place that of an adapter comes, if the adapter was saved with one.

    Args:
        lm: the base model, without an adapter.
        folder: the adapter.
        labels: the names of the classes; the adapter's folder names none, so peft numbers them (LABEL_0, …).

    Raises:
        UsageError: the architecture cannot be given a head, or the number of labels is another.
    """
    if lm.classifies or not (count := folder.num_classes):
        return
    names = tuple(labels) or tuple(f"LABEL_{i}" for i in range(count))
    lm.module, lm.masked, lm.classifies = with_classification_head(lm.module, names, 0), True, True
    check_labels(str(folder.path), lm.config, names)
    if lm.config.pad_token_id is None:
        lm.config.pad_token_id = lm.pad_token_id


def check_labels(name: str, config: Any, labels: Sequence[str]) -> None:
    """Check that a head fits the labels of a task.

    Raises:
        UsageError: their numbers differ.
    """
    if config.num_labels != len(labels):
        raise UsageError(
            f"the head of {name} has {config.num_labels} labels, but the task has {len(labels)} "
            f"({', '.join(labels)}). Use the task it was tuned on."
        )


def head_module_names(model: Any) -> list[str]:
    """Return the names of a model's modules outside its body that have parameters.

    peft finds them by the ends of names: a head's `dropout` would also be each `lora_dropout`.
    """
    parts = [(name, part) for name, part in model.named_children() if part is not model.base_model]
    return [name for name, part in parts if any(True for _ in part.parameters())]
