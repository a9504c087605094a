"""The options of what a run writes and reports while it runs: metrics, checkpoints, trackers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator, model_validator

from zotune.errors import did_you_mean
from zotune.llm.config.schema import Options, StepsOrFraction, is_partial

Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]
TRACKERS: tuple[str, ...] = get_args(Tracker)

# Steps between checkpoints with save_strategy: steps and no save_steps, as in transformers.
_DEFAULT_SAVE_STEPS = 500
_DEFAULT_LOGGING_STEPS = 10


def _tracker_names(value: Any) -> Any:
    """Return the trackers that a name, a list of names, `all` or `none` stands for.

    Raises:
        ValueError: there is no such tracker.
    """
    given = [value] if isinstance(value, str) else value or ()
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        return value
    names = [name for text in given for name in text.replace(",", " ").split()]
    for name in names:
        if name not in (*TRACKERS, "all", "none"):
            raise ValueError(
                f"there is no tracker {name!r}.{did_you_mean(name, [*TRACKERS, 'all', 'none'])} From Python, "
                "train(…, callbacks=[…]) takes the callback of any other tracker"
            )
    if "none" in names and len(names) > 1:
        raise ValueError("none excludes every tracker; give it alone")
    return TRACKERS if "all" in names else () if "none" in names else tuple(dict.fromkeys(names))


_REPOSITORY = re.compile(r"([A-Za-z0-9_](?:[\w.-]*[\w])?/)?[A-Za-z0-9_](?:[\w.-]*\w)?", re.ASCII)


def check_repository(name: str) -> str:
    """Return the name of a repository of the Hub.

    Raises:
        ValueError: the Hub has no repositories of this name.

    >>> check_repository("me/my-model")
    'me/my-model'
    """
    if _REPOSITORY.fullmatch(name) and ".." not in name and "--" not in name and len(name) <= 96:
        return name
    raise ValueError(
        "a repository is ORG/NAME or NAME, of at most 96 letters, digits, single hyphens, dots and underscores"
    )


# For editors: a recipe may hold one name.
_NAME_OR_NAMES = WithJsonSchema(
    {"anyOf": [{"enum": [*TRACKERS, "all", "none"]}, {"type": "array", "items": {"enum": list(TRACKERS)}}]}
)


class OutputOptions(Options):
    """What a run writes into its folder and reports to trackers, and when."""

    output_dir: Path = Field(Path("runs/latest"), description="Folder for the model, config, metrics and results.")
    overwrite_output_dir: bool = Field(False, description="Replace an earlier run in output_dir; default: refuse to.")
    save_strategy: Literal["no", "steps", "epoch", "best"] | None = Field(
        None,
        description="When to write a folder checkpoint-N: every save_steps steps, after each pass over the training "
        "rows, or after each new best evaluation; default: steps if save_steps is given, else no.",
    )
    save_steps: StepsOrFraction | None = Field(
        None,
        description="Steps between two folders checkpoint-N, below 1 a fraction of all steps; default: none, because "
        "the ledger suffices to resume.",
    )
    save_total_limit: int | None = Field(
        None, ge=1, description="Keep the last N folders checkpoint-N of the run, and the best one; default: all."
    )
    logging_strategy: Literal["no", "steps", "epoch"] = Field(
        "steps",
        description="When to write a line of training into metrics.jsonl: every logging_steps steps, after each pass "
        "over the training rows, or never.",
    )
    logging_steps: StepsOrFraction = Field(
        _DEFAULT_LOGGING_STEPS, description="Steps between two lines of metrics.jsonl; below 1 a fraction of all steps."
    )
    report_to: Annotated[tuple[str, ...], BeforeValidator(_tracker_names), _NAME_OR_NAMES] = Field(
        (),
        description="Trackers that get the metrics, one or several of tensorboard, trackio, wandb, mlflow, or all; "
        "default: none.",
    )
    run_name: str | None = Field(None, description="Name of the run in trackers; default: theirs.")
    push_to_hub: bool = Field(
        False, description="Upload the model to the Hugging Face Hub when the run has ended (later: zotune push)."
    )
    hub_model_id: str | None = Field(
        None, description="Repository to upload to, ORG/NAME or NAME; default: the name of output_dir."
    )
    hub_private_repo: bool = Field(False, description="Make a private repository, if it is a new one.")

    @field_validator("hub_model_id")
    @classmethod
    def _is_repository(cls, value: str | None) -> str | None:
        return None if value is None else check_repository(value)

    @model_validator(mode="after")
    def _no_idle_output_option(self, info: ValidationInfo) -> Self:
        if is_partial(info):
            return self
        if self.save_steps is not None and self.save_strategy not in (None, "steps"):
            raise ValueError(f"save_steps has no effect with save_strategy: {self.save_strategy}; give only one")
        if self.logging_steps != _DEFAULT_LOGGING_STEPS and self.logging_strategy != "steps":
            raise ValueError(
                f"logging_steps has no effect with logging_strategy: {self.logging_strategy}; give only one"
            )
        if self.save_total_limit is not None and self.saves == "no":
            raise ValueError("save_total_limit limits the folders checkpoint-N: give --save-steps or --save-strategy")
        for name in ("hub_model_id", "hub_private_repo"):
            if getattr(self, name) and not self.push_to_hub:
                raise ValueError(f"{name} has no effect without an upload: give --push-to-hub too")
        return self

    @property
    def saves(self) -> Literal["no", "steps", "epoch", "best"]:
        """When the run writes checkpoints."""
        return self.save_strategy or ("no" if self.save_steps is None else "steps")

    @property
    def steps_between_checkpoints(self) -> int | float:
        """Steps between two checkpoints, if they are written every so many steps; a whole number of a run."""
        return self.save_steps or _DEFAULT_SAVE_STEPS
