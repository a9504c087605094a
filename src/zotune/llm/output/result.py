"""The result of a run: its counts, costs and evaluations, as `train` returns it and results.json holds it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from zotune.llm.output.environment import environment
from zotune.llm.scoring.accuracy import Evaluation


@dataclass(frozen=True, repr=False)
class Result:
    """The result of a run.

    Attributes:
        output_dir: folder of the model, config, metrics and results; None if the run wrote nothing.
        model, tokenizer: the tuned model, and its tokenizer.
        num_steps, num_skipped: number of updates, and of steps skipped because the loss was not finite.
        best_step: step of the best held-out evaluation if the run selects one; 0 is the untuned model.
        stopped_early: whether the run ended because no new best evaluation came.
        num_forwards: forward passes of training, without evaluations; num_tokens: tokens that these passes read.
        forward_equivalents, layer_passes: their arithmetic in forward passes (a back-propagated one counts 3, one with
            tangents 2), and in passes of single layers, where reused layers count once a row.
        num_tuned: number of tuned parameters.
        seconds: duration of training, without evaluations.
        peak_memory: peak memory of the process, in bytes.
        dev_before, dev, test: accuracy (F1 of generated answers) on the held-out rows before and after training, and on
            the evaluation rows; the last two are of the saved model.
        stopped_by: the signal that ended the run early, or None.
        log_history: the lines of metrics.jsonl: a line of training every `logging_steps` steps, and one of each
            evaluation during the run.
    """

    output_dir: Path | None
    num_steps: int
    num_skipped: int
    num_forwards: int
    num_tokens: int
    num_tuned: int
    seconds: float
    peak_memory: int
    dev_before: Evaluation | None
    dev: Evaluation | None
    test: Evaluation | None
    stopped_by: int | None
    best_step: int | None
    stopped_early: bool
    model: Any = field(default=None, repr=False, compare=False)
    tokenizer: Any = field(default=None, repr=False, compare=False)
    log_history: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    forward_equivalents: int = 0
    layer_passes: float = 0.0

    def __repr__(self) -> str:
        """Return the outcome in a few lines, as a notebook shows it."""
        stopped = "" if self.stopped_by is None else ", stopped before the end"
        losses = [f"loss {loss:.4f}" for loss in [self.metrics.get("train_loss")] if loss is not None]
        shown = [("held-out rows before", self.dev_before), ("held-out rows", self.dev)]
        shown += [("evaluation rows", self.test)] if self.test is not self.dev else []
        lines = [f"{name}: {evaluation.line}" for name, evaluation in shown if evaluation is not None]
        folder = "nothing written" if self.output_dir is None else f"saved in {self.output_dir}"
        steps = f"{self.num_steps} step{'s' * (self.num_steps != 1)}{stopped}, {self.num_forwards} forward passes"
        return "\n  ".join([f"<Result: {', '.join([steps, *losses])}", *lines, f"{folder}>"])

    @property
    def metrics(self) -> dict[str, Any]:
        """The result in a few numbers: `train_loss` of the last steps, cost, and `eval_…` on the evaluation rows."""
        losses = [line["loss"] for line in self.log_history if "loss" in line]
        test = {} if self.test is None else {f"eval_{k}": v for k, v in self.test.summary().items()}
        cost = {"train_runtime": self.seconds, "num_steps": self.num_steps, "num_forwards": self.num_forwards}
        return {**({"train_loss": losses[-1]} if losses else {}), **cost, **test}

    def to_json(self) -> dict[str, Any]:
        """Return the content of results.json, with versions and machine."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_IN_JSON}
        scalars = {k: v for k, v in values.items() if not isinstance(v, Evaluation)}
        evaluations = {k: v.summary() for k, v in values.items() if isinstance(v, Evaluation)}
        output_dir = None if self.output_dir is None else str(self.output_dir)
        return {**scalars, "output_dir": output_dir, **evaluations, "environment": environment()}


_NOT_IN_JSON = ("model", "tokenizer", "log_history")
