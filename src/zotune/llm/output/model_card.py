"""The model card of a run's folder: what the model is, how it was made, how well it does, and how to load it.

Its first lines are metadata that the Hugging Face Hub reads: the base model, the library, the data. A card goes where
its folder goes, so it names no folder of this machine: models and files that have no name on the Hub are named without
their folders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

import zotune
from zotune.llm.checkpoints.hub_names import hub_id
from zotune.llm.config.data import IN_MEMORY
from zotune.llm.config.run import TrainConfig
from zotune.llm.data.readers import HUB
from zotune.llm.models.builtin import BUILT_IN
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.quantized.layers import has_packed_layers
from zotune.llm.scoring.accuracy import Evaluation
from zotune.llm.tasks import TASKS
from zotune.messages import markdown_text, one_line

LICENCES = {"smollm2-135m": "apache-2.0", "gemma3-270m": "gemma"}
# Metrics of zotune under the names of the Hub.
_METRICS = {"accuracy": "accuracy", "f1": "f1", "log_loss": "perplexity"}


def model_card(results: dict[str, Any], config: TrainConfig, lm: LanguageModel, test: Evaluation | None) -> str:
    """Return the text of the model card, in which names of models, files and functions are text and no markup."""
    metric, result = "accuracy", "not evaluated"
    if test is not None:
        metric, result = f"{test.metric} (95 % interval)", str(test)
    best = "" if results["best_step"] is None else f"\n| best step | {results['best_step']} |"
    again = "`zotune train config.yaml` runs it again"
    if config.data_source == IN_MEMORY:
        again = "the model and the rows were loaded in Python, by a program that called `zotune.llm.train`"
    title = markdown_text(f"{short_name(config.model)}, tuned on {_rows_name(config)}")
    return f"""{front_matter(metadata(config, lm, test))}
# {title}

Made by zotune {zotune.__version__} with `{config.method}`, tuning: {config.tuning}
({results["num_tuned"]:,} numbers tuned).
{remark(base_name(lm))}
| | |
|---|---|
| {markdown_text(metric)} | {markdown_text(result)} |
| steps, forward passes | {results["num_steps"]}, {results["num_forwards"]} |{best}
| objective | {markdown_text(config.objective or "the task's own")} |
| learning rate, μ, queries | {config.learning_rate}, {config.mu}, {config.num_queries} |
| seed | {config.seed} |
| training time | {results["seconds"]:.0f} s |
| peak memory | {results["peak_memory"] / 2**20:.0f} MiB |

```python
{_loading_code(config, lm)}
```

`config.yaml` holds every option; {again}.
"""


def front_matter(values: dict[str, Any]) -> str:
    """Return metadata as the first lines of a card."""
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n"


def metadata(config: TrainConfig, lm: LanguageModel, test: Evaluation | None) -> dict[str, Any]:
    """Return what the Hub reads of a card; what is not known is left out."""
    base, is_packed = hub_id(base_name(lm)), not config.is_adapter and has_packed_layers(lm.module)
    relation = "adapter" if config.is_adapter else "finetune"
    scheme = [config.peft_type or config.tuning] if config.is_adapter else []
    known = {
        "base_model": base,
        "base_model_relation": relation if base else None,
        "library_name": "peft" if config.is_adapter else "zotune" if is_packed else "transformers",
        "pipeline_tag": "text-classification" if lm.classifies else "fill-mask" if lm.masked else "text-generation",
        "license": LICENCES.get(base_name(lm)),
        "datasets": _datasets(config),
        "metrics": [_METRICS[test.metric]] if test is not None and test.metric in _METRICS else [],
        "tags": ["zotune", "zeroth-order", *scheme, *([f"base_model:{relation}:{base}"] if base else [])],
    }
    return {key: value for key, value in known.items() if value}


def base_name(lm: LanguageModel) -> str:
    """Return the name by which zotune loads the base model of a model, which may be an adapter of it."""
    return str(lm.base.name_or_path)


def short_name(model: str) -> str:
    """Return a model's name without the folders that it is in.

    >>> short_name("smollm2-135m"), short_name("facebook/opt-125m"), short_name("/home/me/my-model")
    ('HuggingFaceTB/SmolLM2-135M-Instruct', 'facebook/opt-125m', 'my-model')
    """
    return hub_id(model) or (model if model.startswith("random:") else Path(model).name)


def _files(config: TrainConfig) -> list[str]:
    """Return the files of training rows."""
    given: Any = config.train_file or ()
    return [str(file) for file in (given if isinstance(given, tuple | list) else [given])]


def _rows_name(config: TrainConfig) -> str:
    names = [file if file.startswith(HUB) else Path(file).name for file in _files(config)]
    return config.task or ", ".join(names) or "rows in memory"


def _datasets(config: TrainConfig) -> list[str]:
    """Return the names on the Hub of the data that the model was tuned on."""
    if config.task is not None:
        return [TASKS[config.task].hub[0]] if config.task in TASKS else []
    names = [file.removeprefix(HUB).partition(":")[0] for file in _files(config) if file.startswith(HUB)]
    return ["/".join(name.split("/")[:2]) for name in names]


def remark(base: str) -> str:
    """Return a paragraph on the weights that the model was tuned on, if they are not those of the Hub."""
    if base not in BUILT_IN:
        return ""
    model = BUILT_IN[base]
    return f"""
Its base model is {hub_id(base)}, in weights that were dequantised from a GGUF file of 4 bits
(`{model.gguf}` of the package {model.parts[0].requirement}). Those on the Hub differ from them by
the rounding of the quantisation, so results on them may differ a little.
"""


def _loading_code(config: TrainConfig, lm: LanguageModel) -> str:
    """Return the lines of Python that load the saved model, on any machine."""
    auto = lm.auto_class_name
    if not config.is_adapter and has_packed_layers(lm.module):
        # The base model is the GGUF file; the tuned tensors are in the folder of this card.
        return "from zotune.llm import load\n\nmodel, tokenizer = load(FOLDER)"
    if not config.is_adapter:
        return f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained(FOLDER)"
    base = base_name(lm)
    if lm.classifies or (hub_id(base) and auto.endswith("CausalLM")):
        # The base model has no labels; the head is saved with the adapter.
        loader, labels = f"AutoPeft{auto[4:]}", f", num_labels={lm.config.num_labels}" if lm.classifies else ""
        own = "\n\n# On the weights of the training, those of the GGUF file:\n# from zotune.llm import load"
        more = f"{own}\n# model, tokenizer = load(FOLDER)" if base in BUILT_IN else ""
        return f"from peft import {loader}\n\nmodel = {loader}.from_pretrained(FOLDER{labels}){more}"
    if base.startswith("random:"):
        loaded, imports = f"load({base!r})[0]", "from zotune.llm import load"
    else:
        name = hub_id(base)
        loaded = f"{auto}.from_pretrained({'BASE' if name is None else repr(name)})"
        where = f"\n\nBASE = ...  # the folder of {one_line(short_name(base))}" if name is None else ""
        imports = f"from transformers import {auto}{where}"
    return f"from peft import PeftModel\n{imports}\n\nmodel = PeftModel.from_pretrained({loaded}, FOLDER)"
