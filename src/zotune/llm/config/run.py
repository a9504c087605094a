"""The schema of a run: one frozen record that is recipe file, command-line flags and saved `config.yaml`.

Names follow Hugging Face's where it has one. Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationInfo, model_validator

from zotune.errors import UsageError, did_you_mean
from zotune.llm.config.method import FIRST_ORDER
from zotune.llm.config.objective import OF_ANSWERS, ObjectiveOptions
from zotune.llm.config.schema import is_partial
from zotune.llm.config.selection import SelectionOptions
from zotune.llm.config.step import ModelOptions as ModelOptions
from zotune.llm.config.step import StepOptions

RECIPES = Path(__file__).parent / "recipes"

# What columns of one's own rows hold; text and label have options of their own.
ROLES = ("prompt", "completion", "messages", "choices")


class DataOptions(ObjectiveOptions):
    """Which data: a task that zotune knows, or files of your own."""

    task: str | None = Field(None, description="A task by name (see `tasks`); or give --train-file.")
    data_source: str = Field(
        "sample",
        description="For a task: sample (the rows shipped with the repository), hub, or a folder of its files.",
    )
    prompt: Literal["aligned", "none"] = Field(
        "aligned",
        description="A task's prompt: aligned (words that make it a completion) or none (the texts and the label; "
        "masked models: a classification head).",
    )
    train_file: Path | None = Field(
        None,
        description="Your own rows to train on: JSON lines or CSV (also gzipped), Parquet, or hub:ORG/NAME[:SPLIT].",
    )
    eval_file: Path | None = Field(
        None, description="Your own rows to evaluate on; default: rows held out of the training file."
    )
    data_format: Literal["classification", "completion", "chat", "choice", "prompt"] | None = Field(
        None, description="Shape of your rows; default: told from their columns."
    )
    text_column: str = Field("text", description="Column of your files that holds the text.")
    label_column: str = Field("label", description="Column of your files that holds the label, or the right choice.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Names of your other columns, where they differ: prompt, completion, messages, choices.",
    )
    template: str | None = Field(
        None,
        description="Prompt of your rows; {column} stands for the row's column. "
        "Default: the prompt as it is, or the text and a line 'Label:'.",
    )
    verbalizer: dict[str, str] = Field(
        default_factory=dict, description="Label to the word that the model should say; default: the labels themselves."
    )
    scored_turns: Literal["last", "all"] = Field(
        "last", description="Of a chat: the assistant's last turn is learnt, or all of its turns."
    )
    exact_match: bool = Field(
        False, description="Evaluate completions by generating them (F1 and exact match), not by their log-loss."
    )
    num_train: int | None = Field(
        None, ge=1, description="Training rows to use; default: the task's (mostly 1000), or all of yours."
    )
    num_dev: int | None = Field(
        None,
        ge=0,
        description="Rows held out of the training data; default: the task's (mostly 500), or a fifth of yours.",
    )
    num_eval: int | None = Field(
        None, ge=0, description="Evaluation rows to use; default: the task's (at most 1000), or all of yours."
    )
    data_seed: int = Field(0, ge=0, description="Names the permutation that chooses rows.")
    max_length: int | None = Field(
        None, ge=8, description="Cut longer prompts from the left to so many tokens; default: refuse them."
    )
    per_device_eval_batch_size: int = Field(32, ge=1, description="Examples in one forward pass of an evaluation.")

    @property
    def compares_answers(self) -> bool:
        """Whether completions are what generated text is compared with."""
        return self.exact_match or self.objective in OF_ANSWERS

    @model_validator(mode="after")
    def _one_source(self, info: ValidationInfo) -> Self:
        if not is_partial(info) and (self.task is None) == (self.train_file is None and self.eval_file is None):
            raise ValueError(
                "give either a task (--task sst2) or files of your own (--train-file my.jsonl), not both or none"
            )
        if not is_partial(info) and self.task is None and self.prompt == "none":
            raise ValueError("prompt: none is a task's; the prompt of your own rows is --template")
        unknown = [role for role in self.columns if role not in ROLES]
        if unknown:
            raise ValueError(f"columns: there is no {unknown[0]!r} to name.{did_you_mean(unknown[0], ROLES)}")
        return self


class EvalConfig(ModelOptions, DataOptions):
    """Evaluate a model on tasks or on your own rows: accuracy, or F1 of generated answers, with its 95 % interval."""

    task: str | None = Field(
        None, description="Tasks by name (see `tasks`): one, or several as sst2 rte or sst2,rte; or give --eval-file."
    )
    num_demonstrations: int = Field(
        0, ge=0, description="Training rows with their answers that each prompt begins with, chosen by data_seed."
    )
    baselines: bool = Field(
        False, description="Also the majority class, and of a tuned model its base, with the difference to it."
    )
    predictions: Path | None = Field(
        None, description="Where to write each row's prompt, scores and prediction as JSON lines; default: nowhere."
    )
    output_dir: Path | None = Field(None, description="Where to write results.json; default: nowhere.")

    @property
    def tasks(self) -> tuple[str | None, ...]:
        """The tasks, each once; None stands for your own rows."""
        return (None,) if self.task is None else tuple(dict.fromkeys(self.task.replace(",", " ").split()))

    def of(self, task: str | None) -> Self:
        """The same evaluation of one of the tasks."""
        return self.model_copy(update={"task": task})


class TrainConfig(StepOptions, DataOptions, SelectionOptions):
    """Fine-tune a model with forward passes only (or with a first-order baseline).

    With --dry-run: show what would be read, tuned and taken; start nothing, write nothing.
    """

    output_dir: Path = Field(Path("runs/latest"), description="Where model, config, metrics and results go.")
    overwrite_output_dir: bool = Field(False, description="Replace an earlier run in output_dir.")
    resume: bool = Field(False, description="Go on with the run in output_dir, however it ended; begin it if none is.")
    save_steps: int | None = Field(
        None, ge=1, description="Steps between full checkpoints; default: none, which the ledger makes up for."
    )

    max_steps: int = Field(1000, ge=1, description="Updates.")
    reuse_activations: bool = Field(True, description="Compute what lies below the lowest tuned layer once per row.")
    reuse_memory: float = Field(1.0, ge=0, description="GiB of the model's device that this may take.")
    reuse_file: float = Field(0.0, ge=0, description="GiB of a temporary file in output_dir for what is left.")

    logging_steps: int = Field(10, ge=1, description="Steps between lines of metrics.jsonl.")

    @model_validator(mode="after")
    def _no_idle_option(self, info: ValidationInfo) -> Self:
        if is_partial(info):
            return self
        needs_gradient = self.method in (*FIRST_ORDER, "forward_grad") or self.hybrid_layers is not None
        if needs_gradient and not self.has_gradient:
            which = self.method if self.hybrid_layers is None else "a hybrid's first-order part"
            raise ValueError(
                f"objective: {self.objective} has no gradient, which {which} needs; use a method of finite differences "
                "(zo_sgd, zo_adam, …), or an objective with one (classification, teacher_forcing)"
            )
        if self.resume and self.overwrite_output_dir:
            raise ValueError("resume goes on with the run that overwrite_output_dir would delete; give one of them")
        if self.reuse_file and not self.reuse_activations:
            raise ValueError("reuse_file has no effect where activations are not reused")
        return self


# How rows were read and judged in training, which an evaluation of the tuned model takes over.
_READING = (
    *("data_format", "text_column", "label_column", "columns", "template", "verbalizer"),
    *("scored_turns", "exact_match", "max_length"),
    *("objective", "generation", "temperature", "top_p", "max_new_tokens", "stop_at"),
)


def saved_reading(config: EvalConfig) -> tuple[dict[str, Any], str]:
    """How the rows of one's own were read that a model was tuned on, and the file that says so.

    Nothing where it was not tuned by zotune, or on a task, or now reads a task or rows of another shape.
    """
    path = Path(config.model) / "config.yaml"
    if config.task is not None or not path.is_file():
        return {}, ""
    saved = read_recipe(path)
    same_shape = config.data_format in (None, saved.get("data_format"))
    if saved.get("train_file") is None or not same_shape:
        return {}, ""
    return {name: saved[name] for name in _READING if name in saved}, str(path)


def find_recipe(name: str) -> Path:
    """The recipe file of a path or of a shipped recipe's name.

    Raises:
        UsageError: there is none; the message lists or guesses what there is.
    """
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    shipped = [p.stem for p in RECIPES.glob("*.yaml")]
    raise UsageError(
        f"there is no recipe file {name!r}, and no shipped recipe of that name.{did_you_mean(name, shipped)}"
    )


_MOST_ALIASES = 16


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, in which no key may be given twice: which of two values is meant, nobody can tell.

    Nor may much be repeated by aliases: lists of lists of aliases soon hold more than a memory does.
    """

    num_aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As the base's."""
        self.num_aliases += self.check_event(yaml.AliasEvent)
        if self.num_aliases > _MOST_ALIASES:
            raise ValueError(f"there are more than {_MOST_ALIASES} aliases; write out what they stand for")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base's."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise ValueError(f"the key {twice!r} is there twice")
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a YAML recipe; `1e-6` is a number here, as people mean it."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    # Beside its own errors, the parser lets out those of Python's that its numbers, dates and depth run into.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is not valid YAML: {str(error)[:1000]}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold `key: value` lines, one an option.")
    return values


def write_yaml(path: Path, config: BaseModel) -> None:
    """Write a resolved config, whole or not at all, so that `zotune train PATH` runs it again."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    aside.replace(path)
