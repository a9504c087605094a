"""A run between its steps: batches, updates, what is counted, shown and evaluated on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_float
from dataclasses import asdict
from functools import cache, partial
from itertools import islice

import torch
from torch import Tensor

from zotune.estimate.objective import Batched
from zotune.estimate.probes import NOT_SEPARABLE, is_separable, set_separable
from zotune.ledger import StepRecord
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.step import StepOptions
from zotune.llm.data.tokenization import Batch, Encoded, collate
from zotune.llm.models.load import LanguageModel
from zotune.llm.scoring.accuracy import Measured, Scorer
from zotune.llm.scoring.objectives import Objective, mean_losses
from zotune.llm.tasks.load_data import Rows
from zotune.llm.training.best_model import Selection
from zotune.llm.training.counters import Counters
from zotune.llm.training.optimizers import AnyOptimizer, make_optimizer, set_learning_rates
from zotune.llm.training.output_folder import OutputFolder
from zotune.llm.training.resume import Journal
from zotune.llm.training.signals import Stop
from zotune.llm.training.step import FirstOrderStep, Update, ZerothOrderStep, hybrid_step
from zotune.messages import Display, Status, say
from zotune.optim.hybrid import Hybrid
from zotune.optim.zeroth_order import ZerothOrder
from zotune.system.malloc import keep_activations
from zotune.system.peak_memory import peak_memory

# Some examples, the step's number, and their places in the step's batch → their mean loss as a closure.
MakeClosure = Callable[[Sequence[Encoded], int, Sequence[int]], Callable[[], Tensor]]


class Run:
    """The state of a run between steps: the model, its rows and optimizer, and what has been counted and kept."""

    def __init__(
        self, lm: LanguageModel, rows: Rows, config: TrainConfig, scorer: Scorer, output: OutputFolder
    ) -> None:
        self.lm, self.rows, self.config, self.scorer, self.output = lm, rows, config, scorer, output
        self.counters = Counters()
        self._closure: MakeClosure = (
            partial(scored, lm, rows.objective, scorer)
            if rows.generated is None
            else partial(rows.generated.closure, lm)
        )
        self.optimizer = make_optimizer(
            lm.module, config, config.seed, self._run_once, reuse_prefix=rows.generated is None
        )
        if isinstance(self.optimizer, ZerothOrder):
            keep_activations()
        self.update = _update(self.optimizer, lm, config, self.counters)
        self.selection = Selection(config, [p for p in lm.module.parameters() if p.requires_grad], output.path)
        self.journal = Journal(output, config, lm, self.optimizer, rows.train, self._passes)
        self._forwards_before = 0

    def steps(self, display: Display, stop: Stop) -> None:
        """All steps, or those until a signal; of a run that is resumed, those that are left."""
        self._try_side_by_side()
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

    def _try_side_by_side(self) -> None:
        """See at the start whether probes can share a forward pass, so that a run that is resumed finds the same."""
        closures, _ = self._closures(self.rows.train[:2])
        try_side_by_side(self.optimizer, closures[0], self.lm, self.config)

    def tokens_read(self) -> int:
        """Tokens of the training's forward passes, padding not counted; 0 where text is generated."""
        now, config = self.counters, self.config
        if not now.step or self.rows.generated is not None:
            return 0
        sizes = {id(e): sum(map(len, e.sequences)) for e in self.rows.train}
        batches = islice(_batches(self.rows.train, config), now.step)
        tokens = sum(sizes[id(e)] for batch in batches for e in batch)
        # Every pass reads one of the batches that a step accumulates.
        return round(tokens * now.num_forwards / (now.step * config.gradient_accumulation_steps))

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


def try_side_by_side(
    optimizer: AnyOptimizer, closure: Callable[[], Tensor], lm: LanguageModel, options: StepOptions
) -> None:
    """See whether the probes of the closure's few examples can share a forward pass, and keep what was found."""
    own = optimizer.zeroth_order if isinstance(optimizer, Hybrid) else optimizer
    if not isinstance(own, ZerothOrder):
        return
    if options.method == "forward_grad":  # whose check probes but once
        set_separable(own.tuned, False)
    elif isinstance(closure, Batched) and closure.most > 1:
        before = lm.num_forwards
        separable = set_separable(own.tuned, is_separable(closure, own.tuned))
        lm.num_forwards = before
        if not separable:
            say(NOT_SEPARABLE)


def scored(
    lm: LanguageModel,
    objective: Objective,
    scorer: Scorer,
    examples: Sequence[Encoded],
    step: int,
    places: Sequence[int],
) -> Batched:
    """The mean loss of candidates' scores, for as many probes at once as there is room for."""

    @cache
    def batch_of(copies: int) -> Batch:
        return collate([*examples] * copies, lm.pad_token_id, lm.device, exact=objective.exact)

    def values(copies: int) -> Tensor:
        lm.num_forwards += copies - 1
        batch = batch_of(copies)
        return mean_losses(objective, scorer(batch), batch, examples, copies)

    return Batched(values, lm.copies_at_once(batch_of(1)))
