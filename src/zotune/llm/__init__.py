"""Fine-tuning language models from Python: the same options, runs and results as the command line.

    from zotune.llm import load, train

    model, tokenizer = load("smollm2-135m")  # or any model of transformers or peft that you have loaded
    result = train(model, tokenizer, rows, max_steps=100)

Read the packages in the order in which they depend on each other: `config`, `data`, `rows`, `quantized`, `models`,
`scoring`, `tasks`, `output`, `training`, `ledger`, `api`. Names are imported at their first use, so that importing this
package loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zotune.system.lazy_names import lazy_names

if TYPE_CHECKING:
    from zotune.llm.api.evaluate import evaluate as evaluate
    from zotune.llm.api.generate import generate as generate
    from zotune.llm.api.load import load as load
    from zotune.llm.api.train import train as train
    from zotune.llm.config.run import EvalConfig as EvalConfig
    from zotune.llm.config.run import TrainConfig as TrainConfig
    from zotune.llm.config.step import ModelOptions as ModelOptions
    from zotune.llm.models.language_model import LanguageModel as LanguageModel
    from zotune.llm.output.result import Result as Result

_MODULE_OF = {
    "EvalConfig": "config.run",
    "LanguageModel": "models.language_model",
    "ModelOptions": "config.step",
    "Result": "output.result",
    "TrainConfig": "config.run",
    "evaluate": "api.evaluate",
    "generate": "api.generate",
    "load": "api.load",
    "train": "api.train",
}

__all__ = [
    "EvalConfig",
    "LanguageModel",
    "ModelOptions",
    "Result",
    "TrainConfig",
    "evaluate",
    "generate",
    "load",
    "train",
]

__getattr__ = lazy_names(__name__, _MODULE_OF)


def __dir__() -> list[str]:
    return __all__
