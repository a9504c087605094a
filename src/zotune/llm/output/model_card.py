"""The model card of a run's folder: how the model was made, how well it does, and how to load it."""

from __future__ import annotations

from typing import Any

import zotune
from zotune.llm.config.data import IN_MEMORY
from zotune.llm.config.run import TrainConfig
from zotune.llm.models.builtin import BUILT_IN
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.quantized.layers import has_packed_layers
from zotune.llm.scoring.accuracy import Evaluation
from zotune.messages import markdown_text


def model_card(results: dict[str, Any], config: TrainConfig, lm: LanguageModel, test: Evaluation | None) -> str:
    """Return the text of the model card, in which names of models, files and functions are text and no markup."""
    metric, result = "accuracy", "not evaluated"
    if test is not None:
        metric, result = f"{test.metric} (95 % interval)", str(test)
    best = "" if results["best_step"] is None else f"\n| best step | {results['best_step']} |"
    again = "`zotune train config.yaml` runs it again"
    if config.data_source == IN_MEMORY:
        again = "the model and the rows were loaded in Python, by a program that called `zotune.llm.train`"
    return f"""---
library_name: {"peft" if config.is_adapter else "transformers"}
tags: [zotune, zeroth-order]
---

# {markdown_text(f"{config.model}, tuned on {config.task or config.train_file or 'rows in memory'}")}

Made by zotune {zotune.__version__} with `{config.method}`, tuning: {config.tuning}
({results["num_tuned"]:,} numbers tuned).

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


def _loading_code(config: TrainConfig, lm: LanguageModel) -> str:
    """Return the lines of Python that load the saved model, on any machine."""
    auto = lm.auto_class_name
    if not config.is_adapter and has_packed_layers(lm.module):
        # The base model is the GGUF file; the tuned tensors are in the folder of this card.
        lines = "from zotune.llm.config.run import ModelOptions\nfrom zotune.llm.models.load import load"
        return f"{lines}\n\nmodel = load(ModelOptions(model=FOLDER)).module"
    if config.is_adapter and lm.classifies:
        # The base model has no labels; the head is saved with the adapter.
        loader = f"AutoPeft{auto[4:]}"
        labels = f"num_labels={lm.config.num_labels}"
        return f"from peft import {loader}\n\nmodel = {loader}.from_pretrained(FOLDER, {labels})"
    if not config.is_adapter:
        return f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained(FOLDER)"
    if config.model in BUILT_IN:
        terms = ", accept_terms=True" if BUILT_IN[config.model].terms else ""
        base = f"{auto}.from_pretrained(fetch({config.model!r}{terms}))"
        imports = f"from transformers import {auto}\nfrom zotune.llm.models.builtin import fetch"
    elif config.model.startswith("random:"):
        base = f"load(ModelOptions(model={config.model!r})).module"
        imports = "from zotune.llm.config.run import ModelOptions\nfrom zotune.llm.models.load import load"
    else:
        base, imports = f"{auto}.from_pretrained({config.model!r})", f"from transformers import {auto}"
    return f"from peft import PeftModel\n{imports}\n\nmodel = PeftModel.from_pretrained({base}, FOLDER)"
