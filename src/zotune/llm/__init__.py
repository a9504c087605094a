"""Fine-tuning language models from Python: the same options, runs and results as the command line.

    from zotune.llm import TrainConfig, train

    result = train(TrainConfig(model="smollm2-135m", task="sst2", max_steps=100, output_dir="runs/first"))

Read the packages in the order in which they depend on each other: `config`, `data`, `quantized`, `models`, `scoring`,
`tasks`, `output`, `training`, `ledger`. Names are imported at their first use, so that importing this package loads
neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zotune.system.lazy_names import lazy_names

if TYPE_CHECKING:
    from zotune.llm.config.run import EvalConfig as EvalConfig
    from zotune.llm.config.run import TrainConfig as TrainConfig
    from zotune.llm.models.language_model import LanguageModel as LanguageModel
    from zotune.llm.models.load import load as load
    from zotune.llm.training.evaluation import evaluate as evaluate
    from zotune.llm.training.train import Result as Result
    from zotune.llm.training.train import train as train

_MODULE_OF = {
    "EvalConfig": "config.run",
    "LanguageModel": "models.language_model",
    "Result": "training.train",
    "TrainConfig": "config.run",
    "evaluate": "training.evaluation",
    "load": "models.load",
    "train": "training.train",
}

__all__ = ["EvalConfig", "LanguageModel", "Result", "TrainConfig", "evaluate", "load", "train"]

__getattr__ = lazy_names(__name__, _MODULE_OF)


def __dir__() -> list[str]:
    return __all__
