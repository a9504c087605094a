"""The options of a run as transformers' `TrainingArguments`, which callbacks read."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from zotune.llm.config.run import TrainConfig


class RunArguments(TrainingArguments):  # type: ignore[misc]
    """The arguments of a run, on the device that its model is on.

    Trackers record `to_dict`, which holds the options of the run and nothing else.
    """

    _run_device = torch.device("cpu")
    _run_options: dict[str, Any] = {}  # noqa: RUF012 - an instance's own replace it

    @cached_property
    def _setup_devices(self) -> torch.device:
        """Return the device of the run. The base class would choose and initialise another one."""
        self.distributed_state = None
        self._n_gpu = int(self._run_device.type == "cuda")
        return self._run_device

    def to_dict(self) -> dict[str, Any]:
        """Return the options of the run."""
        return dict(self._run_options)


def arguments_of(config: TrainConfig, folder: Path, device: torch.device) -> RunArguments:
    """Return the arguments of a run in a folder; what a run has no option for has the default of transformers."""
    arguments = RunArguments(
        output_dir=str(folder),
        run_name=config.run_name,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.num_warmup_steps,
        seed=config.seed,
        logging_strategy=config.logging_strategy,
        logging_steps=config.logging_steps,
        eval_strategy=config.evaluates,
        eval_steps=config.steps_between_evaluations,
        save_strategy=config.saves,
        save_steps=config.steps_between_checkpoints,
        save_total_limit=config.save_total_limit,
        metric_for_best_model=config.metric_for_best_model,
        greater_is_better=config.metric_for_best_model != "loss",
        report_to=list(config.report_to) or "none",
        use_cpu=device.type == "cpu",
    )
    # The base class would compare these with when it saves and evaluates; a run restores its best weights without.
    arguments.load_best_model_at_end = config.load_best_model_at_end
    arguments._run_device = device
    arguments.__dict__.pop("_setup_devices", None)
    arguments._run_options = config.model_dump(mode="json")
    return arguments
