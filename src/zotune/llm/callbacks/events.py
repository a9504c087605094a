"""Calling the callbacks of a run at its events, in the order of transformers' `Trainer`.

After a step: on_step_end, then on_log, on_evaluate and on_save if they are due, and the same after on_epoch_end; a
callback may ask for each of these, or call it off, and may end the run. Steps that a resumed run replays call nothing,
but a callback that exports its state (as `EarlyStoppingCallback` does) sees their evaluations again, because its
decisions depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState

from zotune.llm.callbacks.arguments import arguments_of
from zotune.llm.config.run import TrainConfig
from zotune.llm.models.language_model import LanguageModel

STATE_FILE = "trainer_state.json"


class Events:
    """The callbacks of a run with the state and the control that they share.

    Args:
        callbacks: transformers' callbacks.
        config: options of the run.
        lm: the model.
        optimizer: its optimizer.
        num_rows: number of training rows.
        folder: folder of the run; None if it writes none.

    Attributes:
        state: the step, the epoch, the logs and the best evaluation, as `trainer_state.json` holds them.
        control: what the callbacks asked for.
        higher_is_better: whether a higher value of the task's metric is better.
    """

    higher_is_better = True

    def __init__(
        self,
        callbacks: Sequence[Any],
        config: TrainConfig,
        lm: LanguageModel,
        optimizer: Any,
        num_rows: int,
        folder: Path | None,
    ) -> None:
        self._config, self._lm, self._has_callbacks = config, lm, bool(callbacks)
        self._callbacks = tuple(callbacks) if lm.mesh.processes.is_first else ()
        self._folder = folder or Path()
        self._model = {"model": lm.module, "processing_class": lm.tokenizer, "optimizer": optimizer}
        self._rows_an_epoch = num_rows / config.rows_a_step
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=config.max_steps,
            num_train_epochs=math.ceil(self.epoch_of(config.max_steps)),
            logging_steps=config.logging_steps,
            eval_steps=config.steps_between_evaluations,
            save_steps=config.steps_between_checkpoints,
            train_batch_size=config.per_device_train_batch_size,
        )

    @cached_property
    def arguments(self) -> Any:
        """The options of the run as callbacks read them."""
        arguments = arguments_of(self._config, self._folder, self._lm.device)
        arguments.greater_is_better = self._is_maximised
        return arguments

    @property
    def has_callbacks(self) -> bool:
        """Whether the run has callbacks, which its first process calls; the same in every process."""
        return self._has_callbacks

    def epoch_of(self, step: int) -> float:
        """Return the passes over the training rows after a step."""
        return step / self._rows_an_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether a pass over the training rows ended in a step, or the run did."""
        return int(self.epoch_of(step)) > int(self.epoch_of(step - 1)) or step == self._config.max_steps

    def begin(self) -> None:
        """Call the callbacks at the beginning of training, after a resumed run was restored."""
        self._call("on_init_end")
        self._call("on_train_begin")

    def begin_step(self) -> None:
        """Call the callbacks before a step, and before the epoch that it begins."""
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        if self.state.global_step == 0 or self.ends_epoch(self.state.global_step):
            self._call("on_epoch_begin")
        self._call("on_step_begin")

    def end_step(self, step: int) -> None:
        """Find out what is due after a step, and let the callbacks change it."""
        self._advance(step)
        control, config = self.control, self._config
        control.should_log = self._log_is_due(step)
        control.should_evaluate = evaluation_is_due(config, step, "steps")
        control.should_save = checkpoint_is_due(config, step, "steps")
        self._call("on_step_end")

    def end_epoch(self) -> None:
        """Find out what is due after the last step of an epoch, and let the callbacks change it."""
        control, config, step = self.control, self._config, self.state.global_step
        control.should_log = False
        control.should_evaluate = evaluation_is_due(config, step, "epoch")
        control.should_save = checkpoint_is_due(config, step, "epoch")
        self._call("on_epoch_end")

    def replay_step(self, step: int) -> None:
        """Find out what was due after a step of an earlier part of the run, by its options."""
        self._advance(step)
        control, config = self.control, self._config
        control.should_log = self._log_is_due(step)
        kinds = ("steps", "epoch") if self.ends_epoch(step) else ("steps",)
        control.should_evaluate = any(evaluation_is_due(config, step, kind) for kind in kinds)

    def find_missed(self, step: int, *, is_best: bool) -> None:
        """Find out what was due when the checkpoint of the last step of an earlier part of the run was, by its options.

        Args:
            step: the step.
            is_best: whether a checkpoint is due because the step is the best one.
        """
        control, config = self.control, self._config
        kind = config.evaluates if config.saves == "best" else config.saves
        is_due = kind == "steps" or (kind == "epoch" and self.ends_epoch(step))
        control.should_log = kind == "steps" and self._log_is_due(step)
        control.should_evaluate = is_due and evaluation_is_due(config, step, kind)
        control.should_save = is_due and (is_best or checkpoint_is_due(config, step, kind))

    def _log_is_due(self, step: int) -> bool:
        """Whether a line of training is due after a step, the last one of an epoch among them."""
        config = self._config
        if config.logging_strategy != "steps":
            return config.logging_strategy == "epoch" and self.ends_epoch(step)
        return step == config.max_steps or step % config.logging_steps == 0

    def _advance(self, step: int) -> None:
        self.state.global_step, self.state.epoch = step, self.epoch_of(step)

    def log(self, values: Mapping[str, Any], *, replayed: bool = False) -> None:
        """Add the numbers among some values to the log, and call the callbacks unless the step is replayed."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        logs = {**numbers, "epoch": round(self.state.epoch, 4)}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        if not replayed:
            self._call("on_log", logs=logs)

    def evaluated(self, summary: Mapping[str, Any], *, replayed: bool = False) -> None:
        """Log an evaluation, and let the callbacks compare it with the best one before it.

        Args:
            summary: the evaluation as metrics.jsonl holds it.
            replayed: whether an earlier part of the run went through it already.
        """
        metrics = evaluation_metrics(summary)
        self.log(metrics, replayed=replayed)
        self._call("on_evaluate", only_exporting=replayed, metrics=dict(metrics))
        self._note_best(metrics[f"eval_{self._config.metric_for_best_model}"])

    def log_evaluation(self, summary: Mapping[str, Any]) -> None:
        """Log the evaluation of the last step after training, unless its own was logged during training."""
        history, step = self.state.log_history, self.state.global_step
        if not any("eval_loss" in logs and logs["step"] == step for logs in history):
            self.log(evaluation_metrics(summary))

    def saved(self) -> None:
        """Call the callbacks after a checkpoint was saved."""
        self._call("on_save")

    def end(self) -> None:
        """Call the callbacks at the end of training."""
        self._call("on_train_end")

    def exported(self) -> dict[str, Any]:
        """Return what the callbacks and the best evaluation so far leave to a resumed run, as plain values."""
        states = {type(c).__name__: c.state() for c in self._callbacks if isinstance(c, ExportableState)}
        best = [self.state.best_metric, self.state.best_global_step]
        # The run that a callback ended is one of so many steps; a longer one goes on.
        stopped = self._config.max_steps if self.control.should_training_stop else None
        return {"callbacks": states, "best": best, "stopped": stopped}

    def restore(self, exported: Mapping[str, Any], lines: Iterable[Mapping[str, Any]], step: int) -> None:
        """Restore what `exported` returned after a step, and the log from the lines of metrics.jsonl up to it."""
        for callback in self._callbacks:
            attributes = exported.get("callbacks", {}).get(type(callback).__name__, {}).get("attributes", {})
            for name, value in attributes.items():
                setattr(callback, name, value)
        self.state.best_metric, self.state.best_global_step = exported.get("best", (None, None))
        for line in lines:
            self._advance(line["step"])
            self.log(evaluation_metrics(line["dev"]) if "dev" in line else training_metrics(line), replayed=True)
        self._advance(step)

    def write_state(self, folder: Path) -> None:
        """Write `trainer_state.json`, with the states of the callbacks that export theirs."""
        if self._config.selects and self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(self._folder / f"checkpoint-{self.state.global_step}")
        exporting = [c for c in (*self._callbacks, self.control) if isinstance(c, ExportableState)]
        state = TrainerState(**{**vars(self.state), "stateful_callbacks": exporting})
        state.save_to_json(str(folder / STATE_FILE))

    @property
    def _is_maximised(self) -> bool:
        return self._config.metric_for_best_model != "loss" and self.higher_is_better

    def _note_best(self, value: float) -> None:
        state, sign = self.state, 1 if self._is_maximised else -1
        if not math.isnan(value) and (state.best_metric is None or sign * value > sign * state.best_metric):
            state.best_metric, state.best_global_step = value, state.global_step

    def _call(self, event: str, *, only_exporting: bool = False, **values: Any) -> None:
        for callback in self._callbacks:
            if only_exporting and not isinstance(callback, ExportableState):
                continue
            returned = getattr(callback, event)(self.arguments, self.state, self.control, **self._model, **values)
            self.control = self.control if returned is None else returned


def evaluation_is_due(config: TrainConfig, step: int, after: str) -> bool:
    """Whether the held-out rows are evaluated after a step; after the last one only if it may be the best.

    `after` says of what the step is one: of all steps, or of the last steps of epochs.
    """
    if config.evaluates != after:
        return False
    if step == config.max_steps and config.selects:
        return True
    return step < config.max_steps if after == "epoch" else step % config.steps_between_evaluations == 0


def checkpoint_is_due(config: TrainConfig, step: int, after: str) -> bool:
    """Whether a checkpoint is written after a step; with save_strategy: best that depends on its evaluation."""
    is_last = step == config.max_steps
    return config.saves == after and (after == "epoch" or is_last or step % config.steps_between_checkpoints == 0)


def training_metrics(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the callbacks get of a training line of metrics.jsonl."""
    return {name: line[name] for name in ("loss", "learning_rate", "num_forwards", "peak_memory") if name in line}


def evaluation_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return an evaluation as the `Trainer` reports one: its metric by name and as `eval_metric`, and its loss."""
    name, value = next(iter(summary.items()))
    # JSON has no NaN, so that a logged one is None.
    loss, value = (math.nan if x is None else x for x in (summary["loss"], value))
    return {f"eval_{name}": value, "eval_metric": value, "eval_loss": loss, "eval_runtime": summary["seconds"]}
