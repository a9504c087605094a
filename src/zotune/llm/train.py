"""One run of fine-tuning: `train(config) -> Result`. Zeroth-order methods and first-order baselines share it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zotune.errors import RunError, UsageError
from zotune.hybrid import Hybrid
from zotune.llm.config import DataOptions, TrainConfig
from zotune.llm.data import Splits, user_splits
from zotune.llm.evaluate import Measure, Measured, Scorer, evaluate
from zotune.llm.kept import File, Kept, Memory
from zotune.llm.method_options import FIRST_ORDER
from zotune.llm.models import LanguageModel, load
from zotune.llm.objective import CLASSIFICATION, Batch, Encoded, Encoder, Objective, collate, mean_loss
from zotune.llm.optimizers import AnyOptimizer, make_optimizer, set_learning_rates
from zotune.llm.output import OutputFolder, environment
from zotune.llm.progress import Display, Status, say
from zotune.llm.reuse import ReusedActivations
from zotune.llm.selection import Selection
from zotune.llm.stopping import Stop, stoppable
from zotune.llm.tasks import find_task, head_labels
from zotune.llm.tuning import prepare
from zotune.llm.updates import FirstOrderStep, Update, ZerothOrderStep, hybrid_step
from zotune.memory import peak_memory
from zotune.optimizer import ZerothOrder


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        output_dir: where model, config, metrics and results are.
        num_steps, num_skipped: updates, and steps left out for a loss that was not a number.
        best_step: the step that was best on the held-out rows, where that was asked for; 0 is the untuned model.
        stopped_early: whether the run ended for want of a better one.
        num_forwards: forward passes of the training, evaluations not counted.
        num_tuned: how many numbers were tuned.
        seconds: the training's, evaluations not counted.
        peak_memory: the process's, in bytes.
        dev_before, dev, test: accuracy (F1 of generated answers) on the held-out rows before and after, and on the
            evaluation rows; the last two of the model that is saved.
        stopped_by: the signal that ended the run early, or None.
    """

    output_dir: Path
    num_steps: int
    num_skipped: int
    num_forwards: int
    num_tuned: int
    seconds: float
    peak_memory: int
    dev_before: Measured | None
    dev: Measured | None
    test: Measured | None
    stopped_by: int | None
    best_step: int | None
    stopped_early: bool

    def to_json(self) -> dict[str, Any]:
        """As results.json holds it, versions and machine included."""
        plain = {k: v for k, v in asdict(self).items() if not isinstance(getattr(self, k), Measured)}
        found = {k: v.summary() for k in ("dev_before", "dev", "test") if isinstance(v := getattr(self, k), Measured)}
        return {**plain, "output_dir": str(self.output_dir), **found, "environment": environment()}


@dataclass(frozen=True)
class Rows:
    """The splits as tokens, what is minimised on them, and what is reported."""

    train: tuple[Encoded, ...]
    dev: tuple[Encoded, ...]
    test: tuple[Encoded, ...]
    objective: Objective = CLASSIFICATION
    measure: Measure = evaluate


def load_rows(lm: LanguageModel, options: DataOptions) -> Rows:
    """The data that `options` name, as tokens of the model."""
    return encode_splits(lm, options, load_splits(lm, options))


def load_splits(lm: LanguageModel, options: DataOptions) -> Splits:
    """The data that `options` name, as examples of the form that suits the model."""
    if lm.classifies and options.prompt == "aligned":
        raise UsageError(f"{lm.name} has a classification head and reads no prompt: give a task and --prompt none.")
    return user_splits(options) if options.task is None else find_task(options.task).splits(options, lm.masked)


def encode_splits(lm: LanguageModel, options: DataOptions, splits: Splits) -> Rows:
    """Examples as tokens of the model."""
    encode = Encoder(
        lm.tokenizer, masked=lm.masked, context=lm.context, max_length=options.max_length, classifies=lm.classifies
    )

    def encoded(name: str) -> tuple[Encoded, ...]:
        return tuple(encode(e, f"{name} row {i}") for i, e in enumerate(getattr(splits, name), start=1))

    train, dev, test = (encoded(name) for name in ("train", "dev", "test"))
    if options.task is None:
        return Rows(train, dev, test)
    task = find_task(options.task)
    return Rows(tuple(map(task.objective.reads, train)), dev, test, task.objective, task.measure)


def train(config: TrainConfig) -> Result:
    """Fine-tune as `config` says; the tuned model and all that is known of the run go to `config.output_dir`.

    Raises:
        UsageError: the run cannot start as asked.
        RunError: it failed on the way; metrics, and weights where there are sound ones, are kept.
    """
    lm = load(config, head_labels(config), config.seed)
    # Virtual tokens take of the context that the rows must fit into.
    prepare(lm, config)
    rows = load_rows(lm, config)
    if not rows.train:
        raise UsageError("there is no row to train on: give --train-file, or --data-source with training rows.")
    _check_selection(rows, config)
    output = OutputFolder(config)
    output.check_room(lm)
    scorer = _scorer(lm, rows, config)
    run = _Run(lm, rows, config, scorer, output)
    before = run.before()
    with Display(config.max_steps) as display, stoppable() as stop:
        try:
            run.steps(display, stop)
        except RunError:
            # The weights are those of the last sound step, or of the best.
            run.selection.restore()
            output.save_model(lm)
            raise
    run.selection.restore()
    output.save_model(lm)
    # Who stops a run wants it to end, not to evaluate.
    dev = run.after() if stop.signal is None else None
    test = dev if rows.test == rows.dev or stop.signal is not None else run.evaluate(rows.test)
    result = Result(
        output_dir=config.output_dir,
        num_steps=run.step,
        num_skipped=run.num_skipped,
        num_forwards=run.num_forwards,
        num_tuned=sum(p.numel() for p in lm.module.parameters() if p.requires_grad),
        seconds=run.seconds,
        peak_memory=peak_memory(lm.device),
        dev_before=before,
        dev=dev,
        test=test,
        stopped_by=stop.signal,
        best_step=run.selection.step,
        stopped_early=run.selection.is_over,
    )
    output.finish({**result.to_json(), "config": config.model_dump(mode="json")}, config, lm)
    return result


def _check_selection(rows: Rows, config: TrainConfig) -> None:
    """Refuse to choose a step without rows to choose by; say where the rows that choose are those that are reported."""
    if not config.selects:
        return
    if not rows.dev:
        raise UsageError("there is no held-out row to choose the best step by: give --num-dev above 0.")
    if rows.test and set(rows.test) <= set(rows.dev):
        say(
            "the rows that choose the best step are also those that are reported on, which makes the report "
            "optimistic; give --eval-file for rows that chose nothing"
        )


class _Run:
    """The state of a run between steps."""

    def __init__(
        self, lm: LanguageModel, rows: Rows, config: TrainConfig, scorer: Scorer, output: OutputFolder
    ) -> None:
        self.lm, self.rows, self.config, self.scorer, self.output = lm, rows, config, scorer, output
        self.optimizer = make_optimizer(lm.module, config, config.seed, self._run_once)
        self.update = _update(self.optimizer, lm, config)
        self.selection = Selection(config, [p for p in lm.module.parameters() if p.requires_grad], output.path)
        self.step = self.num_skipped = self.num_forwards = 0
        self.seconds = 0.0
        self._held_out: float | None = None

    def steps(self, display: Display, stop: Stop) -> None:
        """All steps, or those until a signal."""
        recent: list[float] = []
        for examples in _batches(self.rows.train, self.config):
            began, before = time.perf_counter(), self.lm.num_forwards
            done = self.step / self.config.max_steps
            learning_rate = set_learning_rates(self.optimizer, self.config.lr_scheduler_type, done)
            loss = self.update(self.optimizer, *self._closures(examples))
            self.step += 1
            self.num_skipped += not math.isfinite(loss)
            self.num_forwards += self.lm.num_forwards - before
            self.seconds += time.perf_counter() - began
            recent = [*recent, loss][-max(self.config.logging_steps, 20) :]
            status = self._status(sum(recent) / len(recent))
            display.update(status)
            if self.step % self.config.logging_steps == 0 or self.step == self.config.max_steps:
                self.output.log({**asdict(status), "learning_rate": learning_rate})
            if self._is_evaluated():
                self._evaluate_on_the_way(display)
            if self.selection.is_over:
                display.say(f"stopped early at step {self.step}: the best was step {self.selection.step}")
                return
            if stop.signal is not None:
                display.say(f"stopped at step {self.step}; saving what there is …")
                return

    def before(self) -> Measured | None:
        """The held-out rows before the first step, which the best step must beat."""
        found = self.evaluate(self.rows.dev)
        if found is not None:
            self.selection.see(0, found)
        return found

    def after(self) -> Measured | None:
        """The held-out rows with the weights that are saved: what was found when these were kept, if they were."""
        return self.selection.best if self.config.load_best_model_at_end else self.evaluate(self.rows.dev)

    def evaluate(self, examples: Sequence[Encoded]) -> Measured | None:
        """The task's metric on some rows; None where there are none."""
        if not examples:
            return None
        self.lm.module.eval()
        size = self.config.per_device_eval_batch_size
        return self.rows.measure(self.lm, examples, size, self.scorer, self.rows.objective)

    def _is_evaluated(self) -> bool:
        """Every so many steps; also the last one, where it may be the best."""
        last = self.step == self.config.max_steps and self.config.selects
        return self.config.eval_steps is not None and (last or self.step % self.config.eval_steps == 0)

    def _evaluate_on_the_way(self, display: Display) -> None:
        found = self.evaluate(self.rows.dev)
        if found is not None:
            self._held_out = found.value
            self.selection.see(self.step, found)
            best = {"best_step": self.selection.step} if self.config.selects else {}
            self.output.log({"step": self.step, "dev": found.summary(), **best})
            display.say(f"step {self.step}: held-out {found.metric} {found}, loss {found.loss:.4f}")

    def _closures(self, examples: Sequence[Encoded]) -> tuple[list[Callable[[], Tensor]], list[int]]:
        """The batch cut into forward passes of at most the configured size, examples of one length together.

        With each, its share in the mean.
        """
        objective = self.rows.objective
        size = self.config.per_device_train_batch_size
        ordered = sorted(examples, key=lambda e: e.length)
        cuts = [ordered[lo : lo + size] for lo in range(0, len(ordered), size)]
        batches = [collate(cut, self.lm.pad_token_id, self.lm.device, exact=objective.exact) for cut in cuts]
        closures: list[Callable[[], Tensor]] = [
            partial(_loss, objective, self.scorer, *both) for both in zip(batches, cuts, strict=True)
        ]
        return closures, [sum(map(objective.weight, cut)) for cut in cuts]

    def _run_once(self) -> None:
        """One forward pass, by which it is seen where parameters are read."""
        closures, _ = self._closures(self.rows.train[:1])
        closures[0]()
        self.lm.num_forwards -= 1

    def _status(self, loss: float) -> Status:
        peak = peak_memory(self.lm.device)
        return Status(self.step, self.config.max_steps, loss, self.num_forwards, self.seconds, peak, self._held_out)


def _update(optimizer: AnyOptimizer, lm: LanguageModel, config: TrainConfig) -> Update:
    if isinstance(optimizer, Hybrid):
        return hybrid_step
    if isinstance(optimizer, ZerothOrder):
        return ZerothOrderStep(None if config.method == "forward_grad" else config.mu)
    return FirstOrderStep(lm, checkpointing=config.gradient_checkpointing)


def _batches(examples: Sequence[Encoded], config: TrainConfig) -> Iterator[list[Encoded]]:
    """`max_steps` batches: passes over the rows, each in a new order that the seed names."""
    generator = torch.Generator().manual_seed(config.seed)
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    waiting: list[int] = []
    for _ in range(config.max_steps):
        while len(waiting) < size:
            waiting += torch.randperm(len(examples), generator=generator).tolist()
        yield [examples[i] for i in waiting[:size]]
        waiting = waiting[size:]


def _loss(objective: Objective, scorer: Scorer, batch: Batch, examples: Sequence[Encoded]) -> Tensor:
    return mean_loss(objective, scorer(batch), batch, examples)


def _scorer(lm: LanguageModel, rows: Rows, config: TrainConfig) -> Scorer:
    """How rows are scored: the layers below the tuned ones once a row, where they are the same in every pass."""
    drops = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in lm.module.modules())
    if drops and config.method in FIRST_ORDER:  # a step of back-propagation leaves dropout on
        return lm.score
    splits = [[s for e in split for s in e.sequences] for split in (rows.train, rows.dev, rows.test)]
    reused = ReusedActivations(lm, _kept(config), splits)
    if reused.depth and config.reuse_activations:
        file = f" and {config.reuse_file:g} GiB of a file" if config.reuse_file else ""
        say(
            f"reusing activations: layers 1 to {reused.depth} of {reused.num_layers} lie below what is tuned and are "
            f"computed once a row; that takes {reused.num_bytes / 2**30:.2g} GiB, of which at most "
            f"{config.reuse_memory:g} GiB of memory{file}"
        )
    return reused.score


def _kept(config: TrainConfig) -> Kept:
    """Where the activations of those layers are kept."""
    if not config.reuse_activations:
        return Kept()
    memory, file = (int(gib * 2**30) for gib in (config.reuse_memory, config.reuse_file))
    return Kept([Memory(memory), *([File(file, config.output_dir)] if file else [])])
