"""One run of fine-tuning: `train(config) -> Result`. Zeroth-order methods and first-order baselines share it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from ctypes import c_float
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zotune.errors import NotWrittenError, RunError, UsageError
from zotune.hybrid import Hybrid
from zotune.ledger import StepRecord
from zotune.llm.config import TrainConfig
from zotune.llm.counters import Counters
from zotune.llm.evaluate import Measured, Scorer
from zotune.llm.journal import Journal, check_same_run
from zotune.llm.kept import File, Kept, Memory
from zotune.llm.loading import Rows, load_rows
from zotune.llm.method_options import FIRST_ORDER
from zotune.llm.models import LanguageModel, load
from zotune.llm.objective import Encoded, Objective, collate, mean_loss
from zotune.llm.optimizers import AnyOptimizer, make_optimizer, set_learning_rates
from zotune.llm.output import OutputFolder, environment
from zotune.llm.own import RESOLVED
from zotune.llm.progress import Display, Status, say
from zotune.llm.prompts import ReusedPrompts
from zotune.llm.reuse import ReusedActivations
from zotune.llm.selection import Selection, check_rows
from zotune.llm.stopping import Stop, stoppable
from zotune.llm.tasks import head_labels
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


# Some examples, the step's number, and their places in the step's batch → their mean loss as a closure.
MakeClosure = Callable[[Sequence[Encoded], int, Sequence[int]], Callable[[], Tensor]]


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
    check_rows(config, rows.dev, rows.test)
    # What was told from the rows is saved with the rest, so that an evaluation need not be told again.
    config = config.model_copy(update={name: getattr(rows.options, name) for name in RESOLVED})
    for note in rows.notes:
        say(note)
    with closing(OutputFolder(config)) as output:
        if output.is_resumed:
            check_same_run(output.before, config)
        output.check_room(lm)
        scorer, rows = _scorer(lm, rows, config), _prompts_reused(lm, rows, config)
        with closing(_Run(lm, rows, config, scorer, output)) as run:
            return _train(run, config.model_copy(update={"resume": False}))


def _train(run: _Run, config: TrainConfig) -> Result:
    """The steps, then what is saved and reported."""
    lm, rows, output = run.lm, run.rows, run.output
    before = run.before()
    with Display(config.max_steps) as display, stoppable() as stop:
        try:
            run.steps(display, stop)
        except NotWrittenError:
            # Weights that no ledger knows of are not the run's.
            raise
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
    result = run.result(before, dev, test, stop)
    output.finish({**result.to_json(), "config": config.model_dump(mode="json")}, config, lm, test)
    return result


class _Run:
    """The state of a run between steps."""

    def __init__(
        self, lm: LanguageModel, rows: Rows, config: TrainConfig, scorer: Scorer, output: OutputFolder
    ) -> None:
        self.lm, self.rows, self.config, self.scorer, self.output = lm, rows, config, scorer, output
        self.counters = Counters()
        self._closure: MakeClosure = (
            partial(_scored, lm, rows.objective, scorer)
            if rows.generated is None
            else partial(rows.generated.closure, lm)
        )
        self.optimizer = make_optimizer(
            lm.module, config, config.seed, self._run_once, reuse_prefix=rows.generated is None
        )
        self.update = _update(self.optimizer, lm, config, self.counters)
        self.selection = Selection(config, [p for p in lm.module.parameters() if p.requires_grad], output.path)
        self.journal = Journal(output, config, lm, self.optimizer, rows.train, self._passes)
        self._forwards_before = 0

    def steps(self, display: Display, stop: Stop) -> None:
        """All steps, or those until a signal; of a run that is resumed, those that are left."""
        self.journal.restore(self.counters, partial(self._retaken, display))
        for examples in islice(_batches(self.rows.train, self.config), self.counters.step, None):
            if self.selection.is_over:
                display.say(f"stopped early at step {self.counters.step}: the best was step {self.selection.step}")
                return
            began, self._forwards_before = time.perf_counter(), self.lm.num_forwards
            self._set_learning_rates()
            loss = self.update(self.optimizer, *self._closures(examples))
            passes = self._passes()
            self.counters.seconds += time.perf_counter() - began
            is_flat = isinstance(self.update, ZerothOrderStep) and self.update.is_flat
            self._count(loss, passes, display, is_flat=is_flat)
            self._save_on_the_way(stopped=stop.signal is not None)
            if stop.signal is not None:
                display.say(f"stopped at step {self.counters.step}; saving what there is …")
                return

    def close(self) -> None:
        """Let others write the run's ledger."""
        self.journal.close()

    def _passes(self) -> int:
        """Forward passes of the step in progress."""
        return self.lm.num_forwards - self._forwards_before

    def _set_learning_rates(self) -> float:
        done = self.counters.step / self.config.max_steps
        return set_learning_rates(self.optimizer, self.config.lr_scheduler_type, done)

    def _retaken(self, display: Display, record: StepRecord) -> None:
        """A step of an earlier part of the run was taken again from its record."""
        is_flat = not self.config.has_gradient and not any(record.coefficients)
        self._count(record.loss, record.num_forwards, display, is_flat=is_flat)

    def _count(self, loss: float, passes: int, display: Display, *, is_flat: bool) -> None:
        """A step is over: count, show and log it, and look at the held-out rows if it is time."""
        now, config = self.counters, self.config
        learning_rate = self._set_learning_rates()
        now.step += 1
        now.num_skipped += not math.isfinite(loss)
        now.skipped_in_a_row = 0 if math.isfinite(loss) else now.skipped_in_a_row + 1
        now.num_forwards += passes
        now.num_flat += is_flat
        # In single precision, as the ledger holds it: a run that is resumed logs the same.
        now.recent = [*now.recent, c_float(loss).value][-max(config.logging_steps, 20) :]
        status = self._status(sum(now.recent) / len(now.recent))
        display.update(status)
        if now.step % config.logging_steps == 0 or now.step == config.max_steps:
            line = {**asdict(status), "held_out": now.held_out, "learning_rate": learning_rate}
            self.output.metrics.append(line)
        if self._is_evaluated():
            self._evaluate_on_the_way(display)

    def _save_on_the_way(self, *, stopped: bool) -> None:
        """A full checkpoint every so many steps; without a ledger, also where the run is stopped."""
        every = self.config.save_steps
        last = self.counters.step == self.config.max_steps
        if (every and (last or self.counters.step % every == 0)) or (stopped and not self.journal.has_ledger):
            self.journal.save(self.counters)

    def before(self) -> Measured | None:
        """The held-out rows before the first step, which the best step must beat."""
        found = self.evaluate(self.rows.dev)
        if found is not None:
            self.selection.see(0, found)
        return found

    def after(self) -> Measured | None:
        """The held-out rows with the weights that are saved: what was found when these were kept, if they were."""
        return self.selection.best if self.config.load_best_model_at_end else self.evaluate(self.rows.dev)

    def result(self, before: Measured | None, dev: Measured | None, test: Measured | None, stop: Stop) -> Result:
        """What came of the run."""
        return Result(
            output_dir=self.config.output_dir,
            num_steps=self.counters.step,
            num_skipped=self.counters.num_skipped,
            num_forwards=self.counters.num_forwards,
            num_tuned=sum(p.numel() for p in self.lm.module.parameters() if p.requires_grad),
            seconds=self.counters.seconds,
            peak_memory=peak_memory(self.lm.device),
            dev_before=before,
            dev=dev,
            test=test,
            stopped_by=stop.signal,
            best_step=self.selection.step,
            stopped_early=self.selection.is_over,
        )

    def evaluate(self, examples: Sequence[Encoded]) -> Measured | None:
        """The task's metric on some rows; None where there are none."""
        if not examples:
            return None
        self.lm.module.eval()
        size = self.config.per_device_eval_batch_size
        return self.rows.measure(self.lm, examples, size, self.scorer, self.rows.objective)

    def _is_evaluated(self) -> bool:
        """Every so many steps; also the last one, where it may be the best."""
        last = self.counters.step == self.config.max_steps and self.config.selects
        return self.config.eval_steps is not None and (last or self.counters.step % self.config.eval_steps == 0)

    def _evaluate_on_the_way(self, display: Display) -> None:
        step = self.counters.step
        known = self.output.metrics.evaluation(step)
        if known is not None and not self.config.selects:
            self.counters.held_out = next(iter(known.values()))
            self.counters.held_out_short = f"{self.counters.held_out:.4g}"
            return
        found = self.evaluate(self.rows.dev)
        if found is not None:
            self.counters.held_out, self.counters.held_out_short = found.value, found.short
            self.selection.see(step, found)
            best = {"best_step": self.selection.step} if self.config.selects else {}
            self.output.metrics.append({"step": step, "dev": found.summary(), **best})
            display.say(f"step {step}: held-out {found.metric} {found}, loss {found.loss:.4f}")

    def _closures(self, examples: Sequence[Encoded]) -> tuple[list[Callable[[], Tensor]], list[int]]:
        """The batch cut into forward passes of at most the configured size, examples of one length together.

        With each, its share in the mean.
        """
        size = self.config.per_device_train_batch_size
        order = sorted(range(len(examples)), key=lambda i: examples[i].length)
        places = [order[lo : lo + size] for lo in range(0, len(order), size)]
        cuts = [[examples[i] for i in here] for here in places]
        closures = [self._closure(cut, self.counters.step, here) for cut, here in zip(cuts, places, strict=True)]
        return closures, [sum(map(self.rows.objective.weight, cut)) for cut in cuts]

    def _run_once(self) -> None:
        """One forward pass, by which it is seen where parameters are read."""
        closures, _ = self._closures(self.rows.train[:1])
        closures[0]()
        self.lm.num_forwards -= 1

    def _status(self, loss: float) -> Status:
        now = self.counters
        peak = peak_memory(self.lm.device)
        return Status(
            step=now.step,
            max_steps=self.config.max_steps,
            loss=loss,
            num_forwards=now.num_forwards,
            seconds=now.seconds,
            peak_memory=peak,
            held_out=now.held_out_short,
            num_flat=now.num_flat,
        )


def _update(optimizer: AnyOptimizer, lm: LanguageModel, config: TrainConfig, counters: Counters) -> Update:
    if isinstance(optimizer, Hybrid):
        return hybrid_step
    if isinstance(optimizer, ZerothOrder):
        mu = None if config.method == "forward_grad" else config.mu
        return ZerothOrderStep(mu, has_steps=not config.has_gradient)
    return FirstOrderStep(lm, counters, checkpointing=config.gradient_checkpointing, seed=config.seed)


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


def _scored(
    lm: LanguageModel,
    objective: Objective,
    scorer: Scorer,
    examples: Sequence[Encoded],
    step: int,
    places: Sequence[int],
) -> Callable[[], Tensor]:
    """The mean loss of candidates' scores, as a function to call with each probe."""
    batch = collate(examples, lm.pad_token_id, lm.device, exact=objective.exact)
    return lambda: mean_loss(objective, scorer(batch), batch, examples)


def _scorer(lm: LanguageModel, rows: Rows, config: TrainConfig) -> Scorer:
    """How rows are scored: the layers below the tuned ones once a row, where they are the same in every pass."""
    if rows.generated is not None:
        return lm.score  # which nothing asks for
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


def _prompts_reused(lm: LanguageModel, rows: Rows, config: TrainConfig) -> Rows:
    """The rows, their prompts' part below the tuned layers computed once where text is generated from them."""
    if rows.generated is None:
        return rows
    reused = ReusedPrompts(lm, _kept(config))
    if reused.depth and config.reuse_activations:
        say(
            f"reusing prompts: what they leave in layers 1 to {reused.depth} of {reused.num_layers}, below what is "
            f"tuned, is computed once and kept in at most {config.reuse_memory:g} GiB of memory"
        )
    generated = replace(rows.generated, starting=reused.starting)
    return replace(rows, generated=generated, measure=generated.measure)


def _kept(config: TrainConfig) -> Kept:
    """Where the activations of those layers are kept."""
    if not config.reuse_activations:
        return Kept()
    memory, file = (int(gib * 2**30) for gib in (config.reuse_memory, config.reuse_file))
    return Kept([Memory(memory), *([File(file, config.output_dir)] if file else [])])
