"""The loop of a run: batches, updates, counters, progress, and evaluations during the run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from ctypes import c_float
from dataclasses import asdict
from functools import cached_property, partial
from itertools import islice
from typing import Any

from torch import Tensor

from zotune.estimate.mesh import ALONE_MESH
from zotune.estimate.objective import accumulate, probing
from zotune.ledger import StepRecord
from zotune.llm.callbacks.events import Events, training_metrics
from zotune.llm.config.run import TrainConfig
from zotune.llm.data.batches import batches
from zotune.llm.data.tokenization import Encoded
from zotune.llm.distributed.agreement import check_weights
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.output.checkpoint_folder import remove_old_checkpoints, write_checkpoint
from zotune.llm.output.model_files import whole_state
from zotune.llm.scoring.accuracy import Evaluation, Scorer
from zotune.llm.scoring.closures import candidate_loss, candidate_loss_per_example
from zotune.llm.tasks.load_data import EncodedData
from zotune.llm.training.best_model import BestModelTracker
from zotune.llm.training.counters import Counters, cost_of_passes, spent, tokens_read
from zotune.llm.training.in_memory import FollowerOutput, MemoryOutput, NoJournal, Output
from zotune.llm.training.learning_rate import Schedule, schedule_of, set_learning_rates
from zotune.llm.training.optimizers import make_optimizer
from zotune.llm.training.progress import Display, Status
from zotune.llm.training.resume import Journal
from zotune.llm.training.signals import StopRequest
from zotune.llm.training.step import ZerothOrderStep, try_side_by_side, update_of
from zotune.optim.zeroth_order import ZerothOrder
from zotune.system.malloc import keep_activations
from zotune.system.peak_memory import peak_memory

# Examples, the step's number, and their places in the step's batch → a closure that computes their mean loss.
MakeClosure = Callable[[Sequence[Encoded], int, Sequence[int]], Callable[[], Tensor]]


class Run:
    """The state of a run between steps: the model, its rows, its optimizer, its counters and its journal."""

    def __init__(
        self,
        lm: LanguageModel,
        rows: EncodedData,
        config: TrainConfig,
        scorer: Scorer,
        output: Output,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.lm, self.rows, self.config, self.scorer, self.output = lm, rows, config, scorer, output
        self.counters = Counters()
        self._closure: MakeClosure = (
            partial(_loss_of(config), lm, rows.objective, scorer)
            if rows.generated is None
            else partial(rows.generated.closure, lm)
        )
        self.optimizer = make_optimizer(
            lm.module, config, config.seed, self._run_once, reuse_prefix=rows.generated is None, aim=lm.aim
        )
        if isinstance(self.optimizer, ZerothOrder):
            keep_activations()
        self.cost = cost_of_passes(self.optimizer, lm, scorer, config)
        self.update = update_of(self.optimizer, lm, config, self.counters)
        self.selection = BestModelTracker(
            config, [p for p in lm.module.parameters() if p.requires_grad], output.scratch
        )
        self.journal = (
            NoJournal()
            if isinstance(output, MemoryOutput) and not isinstance(output, FollowerOutput)
            else Journal(output, config, lm, self.optimizer, rows.train, self._passes, rows.dev)
        )
        self._forwards_before = 0
        self.events = Events(callbacks, config, lm, self.optimizer, len(rows.train), output.path)

    @cached_property
    def _schedule(self) -> Schedule:
        return schedule_of(self.config)

    def run_steps(self, display: Display, stop: StopRequest) -> None:
        """Run all steps, or the remaining ones of a resumed run, until the end, early stopping or a signal."""
        self._try_side_by_side()
        self.journal.restore(self.counters, partial(self._count_replayed, display))
        self._restore_events()
        self.events.control.should_training_stop = self.journal.was_stopped
        if "tensorboard" in self.config.report_to and self.output.path is not None:
            self.output.claim("runs")
        self.events.begin()
        self._save_missed_checkpoint()
        for examples in islice(batches(self.rows.train, self.config), self.counters.step, None):
            if self.stops_early:
                self._stop_early(display)
                return
            self.events.begin_step()
            self._run_step(examples, display)
            self._check_ranks()
            if self._is_stopped(stop):
                self._save_if_needed()
                display.say(f"stopped at step {self.counters.step}; saving the model …")
                return

    def _check_ranks(self) -> None:
        """Compare the processes' weights, if it is due."""
        every, step = self.config.check_ranks, self.counters.step
        if every and step % every == 0:
            check_weights(self.lm.mesh.processes, self.lm.module, step)

    def _is_stopped(self, stop: StopRequest) -> bool:
        """Whether a signal ends the run after this step; of several processes all end after the same one."""
        mesh = self.lm.mesh
        return stop.signal is not None if mesh.is_alone else bool(mesh.processes.agreed)

    def _stop_early(self, display: Display) -> None:
        """Say why the run ends; what a callback decided is saved, so that a resumed run stays stopped."""
        best = f": the best step is {self.selection.step}"
        if not self.selection.is_exhausted:
            best = " by a callback; to go on, resume with another max_steps"
            self._save_state()
        display.say(f"stopped early at step {self.counters.step}{best}")

    def _run_step(self, examples: Sequence[Encoded], display: Display) -> None:
        """Take a step, and count it."""
        start, self._forwards_before = time.perf_counter(), self.lm.num_forwards
        set_learning_rates(self.optimizer, self._schedule(self.counters.step))
        loss = self.update(self.optimizer, *self._closures(examples))
        passes = self._passes()
        self.counters.seconds += time.perf_counter() - start
        is_flat = isinstance(self.update, ZerothOrderStep) and self.update.is_flat
        self._count(loss, passes, is_flat=is_flat)
        self.events.end_step(self.counters.step)
        self._share_control()
        self._report(display)
        self._save_checkpoint()
        if self.events.ends_epoch(self.counters.step):
            self.events.end_epoch()
            self._share_control()
            self._evaluate_if_due(display)
            self._save_checkpoint()

    def _share_control(self) -> None:
        """Let the other processes do what the callbacks asked for, which the first process alone calls."""
        if self.events.has_callbacks:
            self.events.control = self.lm.mesh.processes.first(lambda: self.events.control)

    @property
    def stops_early(self) -> bool:
        """Whether the patience of early stopping is exhausted, or a callback asked to stop."""
        return self.selection.is_exhausted or self.events.control.should_training_stop

    def take_steps(self, count: int) -> None:
        """Take the first steps of the run without counting, logging or recording them, as a trial does."""
        self._try_side_by_side()
        for examples in islice(batches(self.rows.train, self.config), count):
            self.update(self.optimizer, *self._closures(examples))

    def objective_on(self, examples: Sequence[Encoded]) -> float:
        """Return the objective on some rows at the present weights."""
        closures, weights = self._closures(examples)
        mesh = self.lm.mesh if len(closures) >= self.lm.mesh.data else ALONE_MESH
        with probing(self.lm.module):
            return float(accumulate(closures, weights, mesh=mesh)())

    def _try_side_by_side(self) -> None:
        """Test at the start whether probes can share a forward pass, so that a resumed run gets the same answer."""
        closures, _ = self._closures(self.rows.train[:2])
        try_side_by_side(self.optimizer, closures[0], self.lm, self.config)

    def spent(self) -> dict[str, Any]:
        """The arithmetic of training so far, without evaluations."""
        return spent(self.counters, self.cost, self.config, len(self.rows.train))

    def tokens_read(self) -> int:
        """Return the tokens of the forward passes of training, without padding; 0 if text is generated."""
        return 0 if self.rows.generated is not None else tokens_read(self.counters, self.config, self.rows.train)

    def close(self) -> None:
        """Release the run's ledger."""
        self.journal.close()

    def _passes(self) -> int:
        """Return the forward passes of the step in progress."""
        return self.lm.num_forwards - self._forwards_before

    def _count_replayed(self, display: Display, record: StepRecord) -> None:
        """Count a step of an earlier part of the run, which was replayed from its record."""
        self._restore_events()
        is_flat = not self.config.has_gradient and not any(record.coefficients)
        self._count(record.loss, record.num_forwards, is_flat=is_flat)
        self.events.replay_step(self.counters.step)
        self._report(display, replayed=True)

    def _restore_events(self) -> None:
        """Restore the callbacks of a resumed run, once, before the first step after its checkpoint."""
        if self.events.state.global_step or not self.output.is_resumed:
            return
        step = self.counters.step
        lines = [line for line in self.output.metrics.earlier if line["step"] <= step]
        self.events.restore(self.counters.callbacks, lines, step)

    def _count(self, loss: float, passes: int, *, is_flat: bool) -> None:
        """Count a completed step."""
        counters = self.counters
        counters.step += 1
        counters.num_skipped += not math.isfinite(loss)
        counters.skipped_in_a_row = 0 if math.isfinite(loss) else counters.skipped_in_a_row + 1
        counters.num_forwards += passes
        counters.num_flat += is_flat
        # In single precision, as in the ledger, so that a resumed run logs the same.
        counters.recent = [*counters.recent, c_float(loss).value][-int(max(self.config.logging_steps, 20)) :]

    def _report(self, display: Display, *, replayed: bool = False) -> None:
        """Show and log a counted step, and evaluate on the held-out rows if it is due."""
        counters = self.counters
        status = self._status(sum(counters.recent) / len(counters.recent))
        display.update(status)
        if self.events.control.should_log:
            rate = set_learning_rates(self.optimizer, self._schedule(counters.step - 1))
            line = {**asdict(status), **self.spent(), "held_out": counters.held_out, "learning_rate": rate}
            self.output.metrics.append(line)
            self.events.log(training_metrics(line), replayed=replayed)
        self._evaluate_if_due(display, replayed=replayed)

    def _evaluate_if_due(self, display: Display, *, replayed: bool = False) -> None:
        """Evaluate if it is due; what a callback asked for in an earlier part of the run is in its metrics."""
        is_logged = replayed and self.output.metrics.evaluation(self.counters.step) is not None
        if self.events.control.should_evaluate or is_logged:
            self._evaluate_held_out(display, replayed=replayed)

    def _save_checkpoint(self) -> None:
        """Write a folder checkpoint-N if it is due and the run has a folder."""
        if self.events.control.should_save and (self.output.path is not None or self.lm.mesh.is_sharded):
            self._save_state()
            weights = whole_state(self.lm)
            if isinstance(self.output, MemoryOutput):
                return
            write_checkpoint(self.lm, self.output, self.counters.step, self.events.write_state, weights)
            remove_old_checkpoints(self.output, self.config.save_total_limit, self.selection.step)
            self.events.saved()

    def _save_missed_checkpoint(self) -> None:
        """Write the checkpoint that was due after the last step of the part before, if a kill prevented it."""
        step, path = self.counters.step, self.output.path
        is_missed = path is not None and step > 0 and not (path / f"checkpoint-{step}").exists()
        if not (self.lm.mesh.processes.first(lambda: is_missed) if self.lm.mesh.is_sharded else is_missed):
            return
        is_best = self.config.saves == "best" and self.selection.step == step
        self.events.find_missed(step, is_best=is_best)
        self._save_checkpoint()

    def _save_if_needed(self) -> None:
        """Without a ledger, save what resuming needs when the run is stopped."""
        if not self.journal.has_ledger:
            self._save_state()

    def _save_state(self) -> None:
        self.counters.callbacks = self.events.exported()
        self.journal.save(self.counters)

    def evaluate_before(self) -> Evaluation | None:
        """Evaluate on the held-out rows before the first step; the best step must beat this result."""
        evaluation = self.evaluate(self.rows.dev)
        if evaluation is not None:
            self.events.higher_is_better = evaluation.higher_is_better
            self.selection.observe(0, evaluation)
        return evaluation

    def evaluate_after(self) -> Evaluation | None:
        """Return the held-out evaluation of the saved weights; that of the best step is known already."""
        return self.selection.best if self.config.load_best_model_at_end else self.evaluate(self.rows.dev)

    def evaluate(self, examples: Sequence[Encoded]) -> Evaluation | None:
        """Evaluate the task's metric on some rows; None if there are none."""
        if not examples:
            return None
        self.lm.module.eval()
        size = self.config.per_device_eval_batch_size
        found = self.rows.measure(self.lm, examples, size, self.scorer, self.rows.objective)
        # A reward or a metric of the user may return something else in each process.
        return self.lm.mesh.processes.first(lambda: found)

    def _evaluate_held_out(self, display: Display, *, replayed: bool) -> None:
        step = self.counters.step
        logged = self.output.metrics.evaluation(step)
        if logged is not None and not self.config.selects:
            self.counters.held_out = next(iter(logged.values()))
            self.counters.held_out_short = f"{self.counters.held_out:.4g}"
            self.events.evaluated(logged, replayed=replayed)
            return
        evaluation = self.evaluate(self.rows.dev)
        if evaluation is None:
            return
        self.counters.held_out, self.counters.held_out_short = evaluation.value, evaluation.short
        self.selection.observe(step, evaluation)
        best = {"best_step": self.selection.step} if self.config.selects else {}
        self.output.metrics.append({"step": step, "dev": evaluation.summary(), **best})
        display.say(f"step {step}: held-out {evaluation.line}")
        if self.config.saves == "best" and self.selection.step == step:
            self.events.control.should_save = True
        self.events.evaluated(evaluation.summary(), replayed=replayed)

    def _closures(self, examples: Sequence[Encoded]) -> tuple[list[Callable[[], Tensor]], list[int]]:
        """Split a batch by length into micro-batches of at most the configured size; return closures and weights."""
        size = self.config.per_device_train_batch_size
        order = sorted(range(len(examples)), key=lambda i: examples[i].length)
        places = [order[lo : lo + size] for lo in range(0, len(order), size)]
        parts = [[examples[i] for i in indices] for indices in places]
        closures = [self._closure(part, self.counters.step, at) for part, at in zip(parts, places, strict=True)]
        return closures, [sum(map(self.rows.objective.weight, part)) for part in parts]

    def _run_once(self) -> None:
        """Run one forward pass, in which a hybrid records the layers that read each parameter."""
        closures, _ = self._closures(self.rows.train[:1])
        closures[0]()
        self.lm.num_forwards -= 1

    def _status(self, loss: float) -> Status:
        counters = self.counters
        peak = peak_memory(self.lm.device)
        return Status(
            step=counters.step,
            max_steps=self.config.max_steps,
            loss=loss,
            num_forwards=counters.num_forwards,
            seconds=counters.seconds,
            peak_memory=peak,
            held_out=counters.held_out_short,
            num_flat=counters.num_flat,
        )


def _loss_of(config: TrainConfig) -> Callable[..., Callable[[], Tensor]]:
    """Return what makes closures of the mean loss, of single examples where a step needs these."""
    return candidate_loss_per_example if config.reads_examples else candidate_loss
