"""One whole model of an adapter and its base model, or of a quantised base: a folder that transformers loads."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zotune.errors import UsageError
from zotune.llm.checkpoints.adapter_merge import is_adapter, merged_model
from zotune.llm.checkpoints.adapter_source import folder_of_run
from zotune.llm.checkpoints.hub_names import hub_id
from zotune.llm.checkpoints.safetensors_shards import MAX_SHARD_SIZE
from zotune.llm.config.run import TrainConfig, read_recipe
from zotune.llm.config.schema import validate
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.load import load
from zotune.llm.output.manifest import CONFIG
from zotune.llm.output.model_card import LICENCES, base_name, front_matter, remark, short_name
from zotune.llm.output.model_files import write_model_files
from zotune.llm.quantized.backends import is_quantised
from zotune.llm.tasks import head_labels
from zotune.messages import markdown_text, say

# No number of a result depends on this module.
COUNTS_FOR_RESULTS = "never"


@dataclass(frozen=True)
class WholeModel:
    """A model whose weights are whole, and what it was made of.

    Attributes:
        lm: the model.
        base: the name of the base model.
        recipe: the options of the run, if its folder has them.
    """

    lm: LanguageModel
    base: str
    recipe: Path | None

    def write(self, folder: Path, max_shard_size: str = MAX_SHARD_SIZE) -> None:
        """Write weights, configuration, tokenizer and model card, and the options by which the model is asked.

        Raises:
            OSError, NotWrittenError: a file cannot be written.
        """
        write_model_files(self.lm, folder, max_shard_size)
        (folder / "README.md").write_text(_card(self), encoding="utf-8")
        if self.recipe is not None:
            shutil.copyfile(self.recipe, folder / CONFIG)


def whole_model(options: ModelOptions, *, may_be_whole: bool = False) -> WholeModel:
    """Load a model, merge its adapter into its weights, and dequantise them if they are quantised.

    Args:
        options: the model: the folder of a run, or of an adapter of peft.
        may_be_whole: whether a model whose weights are whole already is returned as it is, and is no error.

    Raises:
        UsageError: there is nothing to merge, or it cannot be merged; the message says why.
    """
    recipe = folder_of_run(options.model, options.model_revision) / CONFIG
    lm = load(options, _labels(recipe))
    base, quantised = base_name(lm), is_quantised(lm.base)
    if not is_adapter(lm.module) and not quantised:
        if may_be_whole:
            return WholeModel(lm, base, recipe if recipe.is_file() else None)
        raise UsageError(
            f"{options.model} has whole weights, so there is nothing to merge: transformers, zotune export and zotune "
            "push take it as it is."
        )
    if quantised:
        dtype = str(lm.base.dtype).removeprefix("torch.")
        say(f"the weights of {base} are quantised: the merged model has them dequantised, in {dtype}")
    lm.module = merged_model(lm.module, lm.read_with, lm.name)
    return WholeModel(lm, base, recipe if recipe.is_file() else None)


def _labels(recipe: Path) -> tuple[str, ...]:
    """Return the labels of the classification head that a run gave its model; none if it kept the model's own head."""
    if not recipe.is_file():
        return ()
    names = ("task", "prompt")
    known: dict[str, Any] = {name: value for name, value in read_recipe(recipe).items() if name in names}
    return head_labels(validate(TrainConfig, known, str(recipe), partial=True))


def _card(model: WholeModel) -> str:
    base, lm = hub_id(model.base), model.lm
    kind = "text-classification" if lm.classifies else "fill-mask" if lm.masked else "text-generation"
    tags = ["zotune", *([f"base_model:finetune:{base}"] if base else [])]
    named = {"base_model": base, "base_model_relation": "finetune"} if base else {}
    licence = {"license": LICENCES[model.base]} if model.base in LICENCES else {}
    values = {**named, "library_name": "transformers", "pipeline_tag": kind, **licence, "tags": tags}
    auto = lm.auto_class_name
    return f"""{front_matter(values)}
# {markdown_text(Path(lm.name).name)}, merged

An adapter that zotune tuned, merged into the weights of its base model {markdown_text(short_name(model.base))}.
{remark(model.base)}
```python
from transformers import {auto}, AutoTokenizer

model, tokenizer = {auto}.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
```
"""
