"""The options of a run that name the data: a task, or the user's own files, and how rows become examples."""

from __future__ import annotations

import math
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from zotune.errors import did_you_mean
from zotune.llm.config.objective import OF_ANSWERS, TextOptions, as_list
from zotune.llm.config.schema import is_partial

# The data source of a run from Python on rows that the caller holds, so that no option names them.
IN_MEMORY = "memory"

# The smallest max_length: shorter, prompts say nothing.
MIN_LENGTH = 8

# Roles of columns in the user's own rows; text and label have options of their own.
ROLES = (
    *("prompt", "completion", "messages", "choices", "tools"),
    *("instruction", "input", "output", "system", "conversations"),
)


# For editors: a recipe may name one file, or several.
_FILE_OR_FILES = WithJsonSchema(
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
)


def _as_numbers(value: Any) -> Any:
    """Return numbers in a text, separated by commas or spaces, as a list; other values as `as_list` does."""
    return value.replace(",", " ").split() if isinstance(value, str) else as_list(value)


def _as_one(files: tuple[Path, ...] | None) -> Any:
    """Return the files as a recipe holds them: one by its name, several as a list."""
    names = [str(file) for file in files or ()]
    return names[0] if len(names) == 1 else names or None


class DataOptions(TextOptions):
    """The options of the data: a task that zotune knows, or files of the user's own."""

    task: str | None = Field(
        None, description="Task by name (see `tasks`); for your own rows give --train-file instead."
    )
    data_source: str = Field(
        "sample",
        description="Source of a task's rows: sample (shipped with the repository), hub, or a folder with the task's "
        "files.",
    )
    prompt: Literal["aligned", "none"] = Field(
        "aligned",
        description="Prompt of a task: aligned (words that turn the task into a completion) or none (the texts and "
        "the label "
        "alone; masked models get a classification head).",
    )
    train_file: Annotated[
        tuple[Path, ...] | None, BeforeValidator(as_list), PlainSerializer(_as_one, when_used="json"), _FILE_OR_FILES
    ] = Field(
        None,
        description="File of your own training rows, or several: JSON or JSON lines, CSV or TSV, text (all also "
        "gzipped), Parquet, a folder of save_to_disk, or hub:ORG/NAME[:SPLIT].",
    )
    train_file_weights: Annotated[tuple[float, ...], BeforeValidator(_as_numbers)] = Field(
        (),
        description="Relative frequencies with which rows of the training files are read, as 2 1; default: each row "
        "once a pass.",
    )
    streaming: bool = Field(
        False,
        description="Keep training rows as tokens on the disk and not in memory, and read no more of the files than "
        "num_train rows, or than the steps need.",
    )
    eval_file: Path | None = Field(
        None, description="File of your own evaluation rows; default: rows held out of the training file."
    )
    data_format: (
        Literal["classification", "completion", "chat", "choice", "alpaca", "sharegpt", "prompt", "text"] | None
    ) = Field(None, description="Format of your rows; default: inferred from their columns.")
    delimiter: str | None = Field(
        None,
        description="Delimiter of your CSV files: one character, or `tab`; default: found from the header, a tab for "
        ".tsv files.",
    )
    text_column: str = Field("text", description="Column of your files that holds the text.")
    label_column: str = Field("label", description="Column of your files that holds the label, or the right choice.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Your names of the columns of a shape (prompt, completion, messages, choices, instruction, …); "
        "default: these names.",
    )
    template: str | None = Field(
        None,
        description="Prompt template of your rows; {column} stands for the row's column. "
        "Default: the prompt column alone, or the text and a line 'Label:'.",
    )
    verbalizer: dict[str, str] = Field(
        default_factory=dict,
        description="Word that the model should say for each label; default: the labels themselves.",
    )
    scored_turns: Literal["last", "all"] = Field(
        "last", description="Turns of a chat to learn: the assistant's last one, or all of the assistant's."
    )
    chat_date: str | None = Field(
        None,
        description="Date (YYYY-MM-DD) for chat templates that write today's; default: the day of the run, recorded in "
        "its config.",
    )
    read_control_tokens: bool = Field(
        False,
        description="Read the texts of control tokens in your rows (</s>, <|im_end|>, …) as these tokens; default: as "
        "plain text.",
    )
    exact_match: bool = Field(
        False,
        description="Evaluate completions by generating them (F1 and exact match); default: by their log-loss.",
    )
    num_train: int | None = Field(
        None,
        ge=1,
        description="Number of training rows; default: as the task defines (mostly 1000), or all of your rows.",
    )
    num_dev: int | None = Field(
        None,
        ge=0,
        description="Number of rows held out of the training data; default: as the task defines (mostly 500), or a "
        "fifth "
        "of your rows.",
    )
    num_eval: int | None = Field(
        None,
        ge=0,
        description="Number of evaluation rows; default: as the task defines (at most 1000), or all of your rows.",
    )
    num_more_eval: int = Field(
        0,
        ge=0,
        description="Number of further evaluation rows of a task: public training rows that are neither trained on nor "
        "held out. The sample has 5000 of sst2.",
    )
    data_seed: int = Field(0, ge=0, description="Seed of the permutation that chooses the rows.")
    max_length: int | None = Field(
        None,
        ge=MIN_LENGTH,
        description="Maximum number of tokens; longer prompts are truncated from the left. Default: the model's "
        "context; "
        "longer rows are refused.",
    )
    per_device_eval_batch_size: int = Field(32, ge=1, description="Examples in one forward pass of an evaluation.")

    @field_validator("chat_date")
    @classmethod
    def _is_date(cls, value: str | None) -> str | None:
        try:
            return None if value is None else date.fromisoformat(value).isoformat()
        except ValueError:
            raise ValueError("a date is written YYYY-MM-DD, for instance 2026-01-31") from None

    @field_validator("delimiter")
    @classmethod
    def _is_one_character(cls, value: str | None) -> str | None:
        value = {"tab": "\t", "\\t": "\t"}.get(str(value), value)
        if value is not None and (len(value) != 1 or value in '"\r\n\0 '):
            raise ValueError("give one character that is neither a quote, a space nor a line break, or the word tab")
        return value

    @field_validator("template")
    @classmethod
    def _names_a_column(cls, value: str | None) -> str | None:
        if value is not None and "{" not in value:
            raise ValueError(
                "it names no column, so all rows would have the same prompt; write a column as {column}. The template "
                "of chats is that of the model's tokenizer"
            )
        return value

    @property
    def train_files(self) -> tuple[Path, ...]:
        """The files of training rows; empty without one."""
        return self.train_file or ()

    @property
    def named_files(self) -> str:
        """The files of training rows by name, as text."""
        return " and ".join(map(str, self.train_files)) or "rows in memory"

    @property
    def generates_text(self) -> bool:
        """Whether text is generated, for the objective or for an evaluation."""
        return self.is_generated or self.exact_match or bool(self.compute_metrics)

    @property
    def reads_columns(self) -> bool:
        """Whether a function of the user may read the columns of rows."""
        return self.is_function or any(":" in name for name in self.compute_metrics)

    @property
    def compares_answers(self) -> bool:
        """Whether generated text is compared with the completions."""
        return self.exact_match or self.objective in OF_ANSWERS

    @model_validator(mode="after")
    def _one_source(self, info: ValidationInfo) -> Self:
        num_named = (self.task is not None) + (self.train_file is not None or self.eval_file is not None)
        if not is_partial(info) and num_named != (self.data_source != IN_MEMORY):
            raise ValueError(
                "give either a task (--task sst2) or files of your own (--train-file my.jsonl, or --eval-file my.jsonl "
                f"to evaluate alone); {'both were' if num_named else 'neither was'} given"
            )
        if not is_partial(info) and self.task is None and self.prompt == "none":
            raise ValueError("prompt: none applies to tasks only; set the prompt of your own rows with --template")
        if not is_partial(info) and self.task is None and self.num_more_eval:
            raise ValueError("num_more_eval applies to tasks only; give all rows of your own in --eval-file")
        self._check_weights()
        if self.streaming and self.train_file is None and self.data_source != IN_MEMORY and not is_partial(info):
            raise ValueError("streaming is for training rows: give their files with --train-file")
        of_own_rows = ("packing", "chat_template", "system_prompt", "apply_chat_template", "streaming")
        idle = next((name for name in of_own_rows if self.task is not None and getattr(self, name)), None)
        if idle is not None and not is_partial(info):
            raise ValueError(f"{idle} is for rows of your own, and a task has its own prompts; leave it out")
        unknown = [role for role in self.columns if role not in ROLES]
        if unknown:
            raise ValueError(f"columns: there is no {unknown[0]!r} to name.{did_you_mean(unknown[0], ROLES)}")
        return self

    def _check_weights(self) -> None:
        """Check the weights of the files, of which a recipe may name only the one or the other.

        Raises:
            ValueError: they are not one positive number for each of several files, or a file is named twice.
        """
        weights, files = self.train_file_weights, self.train_file or ()
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(f"train_file_weights are numbers above 0, one for each file; got {list(weights)}")
        if len(set(files)) < len(files):
            raise ValueError("train_file names a file twice; give it once, and a larger weight in train_file_weights")
        if weights and files and (len(weights) != len(files) or len(files) == 1):
            raise ValueError(
                f"train_file_weights has {len(weights)} numbers for {len(files)} training files; give one number for "
                "each of several files"
            )
        if files == () and weights and self.data_source == IN_MEMORY:
            raise ValueError(
                "train_file_weights are for files. Mix rows in memory with datasets.interleave_datasets(…, "
                "probabilities=[…])"
            )
