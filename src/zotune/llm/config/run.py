"""The configs of `zotune train` and `zotune eval`: one frozen record is recipe file, options and saved `config.yaml`.

Options have the names of Hugging Face where these exist. An unknown key is refused with a hint at the nearest known
one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationInfo, WithJsonSchema, model_validator

from zotune.errors import UsageError, did_you_mean
from zotune.llm.config.data import IN_MEMORY, DataOptions
from zotune.llm.config.method import FIRST_ORDER
from zotune.llm.config.output import OutputOptions
from zotune.llm.config.safe_yaml import parse_yaml
from zotune.llm.config.schedule import ScheduleOptions
from zotune.llm.config.schema import COMMAND_LINE_ONLY, check_file, is_partial, validate
from zotune.llm.config.selection import SelectionOptions
from zotune.llm.config.step import ModelOptions as ModelOptions
from zotune.llm.config.step import ParallelOptions, Shard, StepOptions
from zotune.system.atomic_write import atomic_write
from zotune.system.bounds import RECIPE_BYTES, read_bytes

RECIPES = Path(__file__).parent / "recipes"


Placed = TypeVar("Placed", bound=ModelOptions)


def _check_shard(options: Placed, shard: str) -> Placed:
    """Refuse shards of a model that is placed otherwise; returns the options."""
    if shard != "none" and (options.device_map is not None or options.offload_folder is not None):
        raise ValueError(
            "shard cuts a model over several processes; device_map and offload_folder place a whole one for one"
        )
    return options


class EvalConfig(ModelOptions, DataOptions):
    """Evaluate a model on tasks or on your own rows: accuracy, or F1 of generated answers, with its 95 % interval."""

    task: str | None = Field(
        None,
        description="Tasks by name (see `tasks`), several as sst2 rte or sst2,rte; for your own rows give --eval-file "
        "instead.",
    )
    num_demonstrations: int = Field(
        0, ge=0, description="Number of solved training rows at the start of each prompt, chosen by data_seed."
    )
    baselines: bool = Field(
        False,
        description="Also report the majority class, and for a tuned model its base model and the difference to it.",
    )
    vote: bool = Field(
        False,
        description="Let the best points of a randopt run vote on each row, in place of the weights that it saved.",
    )
    predictions: Path | None = Field(
        None,
        description="JSON-lines file for the prompt, scores and prediction of each row; default: not written.",
    )
    output_dir: Path | None = Field(None, description="Folder for results.json; default: not written.")
    timeout: float = Field(
        600.0,
        gt=0,
        description="Seconds that a process started by torchrun waits for the others.",
    )
    shard: Shard = "none"

    @model_validator(mode="after")
    def _no_placed_shards(self, info: ValidationInfo) -> Self:
        return self if is_partial(info) else _check_shard(self, self.shard)

    @property
    def tasks(self) -> tuple[str | None, ...]:
        """The tasks, each once; None stands for the user's own rows."""
        return (None,) if self.task is None else tuple(dict.fromkeys(self.task.replace(",", " ").split()))

    def of(self, task: str | None) -> Self:
        """Return the config that evaluates one of the tasks."""
        return self.model_copy(update={"task": task})


# For editors: a recipe may hold true in place of a folder.
_PATH_OR_SWITCH = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "boolean"}, {"type": "null"}]})


class TrainConfig(StepOptions, ScheduleOptions, DataOptions, SelectionOptions, OutputOptions, ParallelOptions):
    """Fine-tune a model with forward passes only (or with a first-order baseline).

    With --dry-run: show the data, the tuned parameters and the costs; start nothing, write nothing.
    """

    resume: bool = Field(
        False, description="Resume the run in output_dir, however it ended; start a new one if there is none."
    )
    resume_from_checkpoint: Annotated[Path | None, _PATH_OR_SWITCH] = Field(
        None, description="Go on from a folder checkpoint-N; true stands for --resume. Default: start a new run."
    )
    reuse_activations: bool = Field(
        True, description="Cache the activations below the lowest tuned layer, computed once per row."
    )
    reuse_memory: float = Field(1.0, ge=0, description="Memory for cached activations on the model's device, in GiB.")
    reuse_file: float = Field(
        0.0, ge=0, description="Size of a temporary file in output_dir for further activations, in GiB."
    )
    reuse_folder: Path | None = Field(
        None,
        description="Folder in which runs of the same model and rows share these activations, as in a search. It "
        "grows; delete it when you like. Default: each run computes its own.",
    )

    @model_validator(mode="before")
    @classmethod
    def _resume_from(cls, values: Any) -> Any:
        """Read `resume_from_checkpoint` as transformers does: true, false or a folder; each but false resumes."""
        if not isinstance(values, dict) or (asked := values.get("resume_from_checkpoint")) is None:
            return values
        switch = {"true": True, "false": False}.get(str(asked).lower())
        if switch is None:
            return {**values, "resume": True}
        return {**values, "resume_from_checkpoint": None, "resume": switch or values.get("resume", False)}

    @model_validator(mode="after")
    def _no_idle_option(self, info: ValidationInfo) -> Self:
        if is_partial(info):
            return self
        needs_gradient = self.method in (*FIRST_ORDER, "forward_grad") or self.hybrid_layers is not None
        if needs_gradient and not self.has_gradient:
            user = self.method if self.hybrid_layers is None else "a hybrid's first-order part"
            raise ValueError(
                f"objective: {self.objective} has no gradient, which {user} needs; use a method of finite differences "
                "(zo_sgd, zo_adam, …), or an objective with one (classification, teacher_forcing)"
            )
        _check_shard(self, self.shard)
        if self.resume and self.overwrite_output_dir:
            raise ValueError("resume continues the run that overwrite_output_dir would delete; give only one of them")
        for option in ("reuse_file", "reuse_folder"):
            if getattr(self, option) and not self.reuse_activations:
                raise ValueError(f"{option} has no effect without reuse_activations; give both or neither")
        if self.saves == "best" and self.evaluates == "no":
            raise ValueError("save_strategy: best compares evaluations during the run: give --eval-steps")
        return self

    @model_validator(mode="after")
    def _no_lost_example(self, info: ValidationInfo) -> Self:
        """Refuse directions of examples where examples are not alone, or are too few."""
        if is_partial(info):
            return self
        of_examples = "directions_per_batch" if self.directions_per_batch is not None else f"method: {self.method}"
        if self.reads_examples and self.is_generated:
            raise ValueError(
                f"objective: {self.objective} generates text, for which {of_examples} is not available; use "
                "num_queries, or an objective of candidates' scores"
            )
        if self.method == "grzo" and self.rows_a_step < 2:
            raise ValueError("grzo divides by the spread of the examples' losses: a step must read 2 rows or more")
        if self.reads_examples and self.tuning in ("prefix", "prompt"):
            raise ValueError(
                f"{of_examples} does not go with tuning: {self.tuning}, whose virtual tokens all rows share; "
                "use lora or full, or num_queries"
            )
        if isinstance(self.directions_per_batch, int) and self.directions_per_batch > self.rows_a_step:
            raise ValueError(
                f"directions_per_batch is {self.directions_per_batch}, but a step reads {self.rows_a_step} examples; "
                "use at most as many, or a larger per_device_train_batch_size"
            )
        return self

    @property
    def selects(self) -> bool:
        """Whether the run compares its evaluations with each other."""
        return super().selects or self.saves == "best"

    @property
    def steps_between_evaluations(self) -> int | float:
        """Steps between two evaluations, if the run evaluates every so many steps; a whole number of a run."""
        return self.eval_steps or self.logging_steps

    def with_steps(self, num_rows: int, rows_a_step: int) -> Self:
        """Return the options with epochs turned into `max_steps`, and fractions of all steps into numbers of steps.

        >>> config = TrainConfig(task="sst2", max_steps=300, eval_steps=0.25).with_steps(1000, 16)
        >>> config.eval_steps, config.logging_steps
        (75, 10)
        """
        config = super().with_steps(num_rows, rows_a_step)
        asked = {name: getattr(config, name) for name in ("logging_steps", "eval_steps", "save_steps")}
        fractions = {name: value for name, value in asked.items() if isinstance(value, float)}
        return config.model_copy(update={name: math.ceil(f * config.max_steps) for name, f in fractions.items()})

    @property
    def rows_a_step(self) -> int:
        """Training rows that one step reads."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def rows_of_all_steps(self) -> int:
        """Training rows that `max_steps` steps read."""
        return self.max_steps * self.rows_a_step


NEW_RUN: dict[str, Any] = {"resume": False, "resume_from_checkpoint": None, "parallel": None, "shard": "none"}
"""The options that a recipe does not repeat: whoever runs it again begins a new run."""

# Options of the data and the objective that an evaluation of a tuned model inherits from its training.
_INHERITED = (
    *("data_format", "text_column", "label_column", "columns", "template", "verbalizer"),
    *("scored_turns", "chat_date", "read_control_tokens", "exact_match", "max_length"),
    *("packing", "long_rows", "system_prompt", "apply_chat_template"),
    *("objective", "generation", "temperature", "top_p", "max_new_tokens", "stop_at"),
)


def inherited_options(config: EvalConfig, folder: Path) -> tuple[dict[str, Any], str]:
    """Return the options that the evaluation of a tuned model inherits from its training, and the file they come from.

    There are none if zotune did not tune the model, if it was tuned on a task, or if it now reads a task or rows of
    another format. They are data: the file may be somebody else's, so it names no code.

    Args:
        config: the evaluation.
        folder: the folder of the model, `folder_of_run` of its name.

    Raises:
        UsageError: the model was tuned with a function of the user, and `config` names no objective.
    """
    path = folder / "config.yaml"
    if config.task is not None or not path.is_file():
        return {}, ""
    saved = read_recipe(path)
    same_format = config.data_format in (None, saved.get("data_format"))
    of_a_task = saved.get("train_file") is None and saved.get("data_source") != IN_MEMORY
    if of_a_task or not same_format:
        return {}, ""
    inherited = {name: saved[name] for name in _INHERITED if name in saved}
    if ":" in str(inherited.get("objective")):
        function = inherited.pop("objective")
        if config.objective is None:
            raise UsageError(
                f"{path} names the objective {str(function)[:80]!r}, a function in a file of Python. A model's folder "
                "names no code to run: if you trust that file, name the function with --objective; else name another "
                "objective."
            )
    return inherited, str(path)


def training_rows_note(config: EvalConfig, folder: Path) -> str | None:
    """Return a remark if an evaluation reads the file that the model was tuned on, and how it reads other rows.

    Args:
        config: the evaluation.
        folder: the folder of the model, `folder_of_run` of its name.
    """
    path = folder / "config.yaml"
    if config.eval_file is None or not path.is_file():
        return None
    saved = read_recipe(path)
    named = saved.get("train_file")
    files = named if isinstance(named, list) else [named]
    if not any(isinstance(file, str) and Path(file).resolve() == config.eval_file.resolve() for file in files):
        return None
    held_out = saved.get("num_dev")
    options = "".join(
        f" {flag} {n}" for flag, n in (("--num-dev", held_out), ("--data-seed", saved.get("data_seed"))) if n
    )
    remedy = f"--train-file {config.eval_file}{options} reads the rows that were held out"
    return (
        f"the model was tuned on rows of {config.eval_file}, so the result is not about rows that are new to it; "
        f"{remedy if held_out != 0 else 'none of its rows was held out, so give another file'}"
    )


# What a run may choose for itself, and records.
_CHOSEN = ("chat_date", "learning_rate", "num_train", "only_layer")


def with_recorded_choices(config: TrainConfig) -> TrainConfig:
    """Return the config of a run to resume with what the run chose and recorded at its start, unless it is given.

    These are the date for chats, the learning rate of a search or of the defaults, the dominant layer, and how many
    rows of a stream its steps may read. A new run chooses the latter here, so that it can be resumed for more
    steps on the same rows.
    """
    path = (config.resume_from_checkpoint or config.output_dir) / "config.yaml"
    is_open = {
        "chat_date": config.chat_date is None,
        "learning_rate": not isinstance(config.learning_rate, float),
        "num_train": config.streaming and config.num_train is None,
        "only_layer": config.only_layer == "dominant",
    }
    if not config.resume or not path.is_file():
        reads_by_steps = is_open["num_train"] and config.num_train_epochs is None
        return config.model_copy(update={"num_train": config.rows_of_all_steps} if reads_by_steps else {})
    if not any(is_open.values()):
        return config
    recorded = validate(TrainConfig, read_recipe(path), str(path))
    return config.model_copy(update={name: getattr(recorded, name) for name, is_so in is_open.items() if is_so})


def recorded_choices(config: TrainConfig) -> dict[str, Any]:
    """Return the options that `with_recorded_choices` changes, with their values."""
    found = with_recorded_choices(config)
    return {n: value for n in _CHOSEN if (value := getattr(found, n)) != getattr(config, n)}


def find_recipe(name: str) -> Path:
    """Return the recipe file of a path or of a shipped recipe's name.

    Raises:
        UsageError: there is no such recipe; the message names the nearest one or lists all.
    """
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    shipped = [p.stem for p in RECIPES.glob("*.yaml")]
    raise UsageError(
        f"there is no recipe file {name!r}, and no shipped recipe of that name.{did_you_mean(name, shipped)}"
    )


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML recipe.

    Raises:
        UsageError: the file cannot be read, is not valid YAML, is no mapping, or sets what no file may set.
    """
    try:
        values = parse_yaml(read_bytes(path, RECIPE_BYTES).decode("utf-8"))
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    # The parser also raises errors of Python for malformed numbers and dates, and for nesting that is too deep.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is not valid YAML: {str(error)[:1000]}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold `key: value` lines, one per option.")
    check_file(values, str(path))
    return values


def write_yaml(path: Path, config: BaseModel) -> None:
    """Write a resolved config atomically, so that `zotune train PATH` runs it again."""
    with atomic_write(path) as temporary:
        values = config.model_dump(mode="json", exclude=set(COMMAND_LINE_ONLY))
        temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
