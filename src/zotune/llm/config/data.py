"""The options of a run that name the data: a task, or the user's own files, and how rows become examples."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from zotune.errors import did_you_mean
from zotune.llm.config.objective import OF_ANSWERS, ObjectiveOptions
from zotune.llm.config.schema import is_partial

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
