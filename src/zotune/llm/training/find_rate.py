"""`learning_rate: auto`: the rate is found by short trials before the first step.

A trial takes the first steps of the run at one rate and computes the objective on training rows that its steps leave
out; held-out and evaluation rows are not read. The trials go downhill from the default rate of the tuned parameters.
Short trials favour rates at which whole runs diverge, so the smallest rate with half of the best decrease is taken, and
scaled from the trial's length to the run's: the noise of n steps of rate η adds up to η√n, so the best rate falls with
n, as the cube root by measurement (`_FALL`). The weights are then restored bit for bit, so the run is the same as one
with this rate in its config.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from zotune.apply.tensor_update import HALF
from zotune.errors import NotWrittenError, RunError
from zotune.llm.config.rates import default_learning_rate, warnings
from zotune.llm.config.run import TrainConfig
from zotune.llm.data.stored_rows import SelectedRows
from zotune.llm.data.tokenization import Encoded
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.tuned_sets.aim import num_free
from zotune.llm.models.tuned_sets.find import planned_aim
from zotune.llm.search.points import Search, climb
from zotune.llm.tasks.load_data import EncodedData
from zotune.llm.training.best_model import copy_weights, restore_weights
from zotune.llm.training.loop import Run
from zotune.messages import say
from zotune.model.shards import reshard
from zotune.system.processes import PeerError

# All trials together cost at most this share of the passes of the run.
MAX_SHARE = 0.25
MAX_TRIALS, FACTOR = 5, math.sqrt(10)
# Good rates fall with the number of steps to this power, as measured on SST-2, TREC and chats; the theory of noisy
# gradients has powers between none and the square root (`benchmarks/learning_rate.py`).
_FALL = 1 / 3
# A shorter trial says nothing; a longer one says hardly more.
MIN_STEPS, MAX_STEPS = 10, 500
# One training row in so many is left out of the trials' steps, and judges them.
_ONE_IN, _MAX_JUDGES = 5, 128
_REMEDY = "Make room, choose another --output-dir, or give --learning-rate a number."


@dataclass(frozen=True)
class Trial:
    """One trial: its learning rate, and the objective on the left-out rows after it, infinite if it diverged."""

    learning_rate: float
    loss: float


@dataclass(frozen=True)
class FoundRate:
    """The outcome of a search.

    Attributes:
        learning_rate: the rate that was chosen.
        trials: the trials in their order; none if the run is too short for a search.
        loss_before: the objective on the left-out rows before the first step.
        num_steps: steps of each trial.
        num_forwards: forward passes of the search.
    """

    learning_rate: float
    trials: tuple[Trial, ...] = ()
    loss_before: float = math.nan
    num_steps: int = 0
    num_forwards: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the content of search.json."""
        return asdict(self)


def with_steps_and_rate(lm: LanguageModel, config: TrainConfig, num_rows: int) -> tuple[TrainConfig, list[str]]:
    """Return the config with a number of steps and a learning rate, and remarks on both.

    Args:
        lm: the model.
        config: the options, which may name epochs in place of steps, and no learning rate.
        num_rows: number of training rows.
    """
    given, config = config, config.with_steps(num_rows, config.rows_a_step)
    on_epochs = given.epochs_note(num_rows, config.max_steps)
    tuned = [p for p in lm.module.parameters() if p.requires_grad]
    num_tuned = num_free(lm.module, planned_aim(lm, config))
    half_precision = any(p.dtype in HALF for p in tuned)
    if config.learning_rate is None:
        config = config.model_copy(update={"learning_rate": default_learning_rate(config, num_tuned)})
    on_rates = warnings(config, num_tuned, half_precision=half_precision)
    return config, [note for note in (on_epochs, *on_rates) if note is not None]


MakeRun = Callable[[EncodedData, TrainConfig], Run]


def find_rate(
    lm: LanguageModel, rows: EncodedData, config: TrainConfig, make_run: MakeRun, folder: Path | None
) -> FoundRate:
    """Return the learning rate of the best of a few short trials, or the default rate where a run has no room for them.

    Args:
        lm: the model, whose weights are the same afterwards.
        rows: the rows of the run, of which training rows are read.
        config: the options of the run.
        make_run: makes a run of other rows and options, with a new optimizer.
        folder: folder for a copy of weights that are too large for memory; None: they are copied in memory.

    Raises:
        RunError: there is no room for a copy of the tuned weights.
    """
    reshard(lm.module)  # a copy of what FSDP2 has gathered would be one of other tensors than the tuned ones
    tuned = [p for p in lm.module.parameters() if p.requires_grad]
    default = default_learning_rate(config, num_free(lm.module, lm.aim))
    left_out = range(0, len(rows.train), _ONE_IN)[:_MAX_JUDGES]
    judges = tuple(rows.train[i] for i in left_out)
    learned = SelectedRows(rows.train, (i for i in range(len(rows.train)) if i not in left_out))
    if not learned:
        return _default(default, "there are too few training rows for a search")
    if config.max_steps < least_run():
        return _default(default, _too_few(config, least_run()))
    trials = _Trials(lm, make_run, replace(rows, train=learned, dev=(), test=()), judges, config)
    before, copy = lm.num_forwards, copy_weights(tuned, folder, _REMEDY)
    try:
        found = _search(trials, default, config.max_steps, lambda: restore_weights(tuned, copy))
        return _default(default, _too_few(config, found)) if isinstance(found, int) else found
    finally:
        restore_weights(tuned, copy)
        lm.num_forwards = before


def least_run() -> int:
    """Return the number of steps below which a run has no room for a search."""
    return math.ceil(MAX_TRIALS * MIN_STEPS / MAX_SHARE)


def _too_few(config: TrainConfig, needed: int) -> str:
    return (
        f"learning_rate: auto searches in runs of at least {needed} steps, and max_steps is {config.max_steps}; give "
        "more steps, or learning_rate a number"
    )


def _search(trials: _Trials, default: float, max_steps: int, restore: Callable[[], None]) -> FoundRate | int:
    """Make the trials; if a quarter of the run's passes has no room for them, return the steps at which it has."""
    start, judging = trials.judge(default), trials.passes()
    # A first step also makes its checks, which cost passes of their own.
    first, a_step = trials.passes_of_steps(default)
    budget = MAX_SHARE * max_steps * a_step - trials.passes()
    steps = min(MAX_STEPS, 1 + math.floor((budget / MAX_TRIALS - judging - first) / a_step))
    if steps < MIN_STEPS:
        wanted = trials.passes() + MAX_TRIALS * ((MIN_STEPS - 1) * a_step + judging + first)
        return math.ceil(wanted / (MAX_SHARE * a_step))
    say(f"searching the learning rate: at most {MAX_TRIALS} trials of {steps} steps, on training rows alone")
    results: list[Trial] = []
    for rate in _asked(climb(default, FACTOR, MAX_TRIALS), results):
        restore()
        results.append(Trial(rate, trials.loss_after(rate, steps)))
        say(f"  learning rate {rate:g}: loss {results[-1].loss:.4f} (before: {start:.4f})")
    of_trials, spent = choose(results, start), trials.passes()
    chosen = for_whole_run(of_trials, steps, max_steps)
    share = spent / (a_step * max_steps)
    say(
        f"learning rate {chosen:g} chosen: {of_trials:g} is good for {steps} steps, and the best rate falls with the "
        f"cube root of their number; the search took {spent} forward passes, {share:.0%} of those of the run"
    )
    return FoundRate(chosen, tuple(results), start, steps, spent)


def for_whole_run(rate: float, trial_steps: int, run_steps: int) -> float:
    """Return the rate of a run that a good rate of a shorter trial stands for.

    >>> for_whole_run(0.03, 12, 300)
    0.01
    """
    return float(f"{rate * (trial_steps / run_steps) ** _FALL:.1g}")


def choose(trials: Sequence[Trial], loss_before: float) -> float:
    """Return the smallest rate that lowers the loss by at least half as much as the best one; of none, the smallest.

    >>> choose([Trial(0.01, 1.05), Trial(0.03, 0.85), Trial(0.09, 0.79), Trial(0.3, 2.2)], loss_before=1.06)
    0.03
    """
    enough = loss_before - (loss_before - min(trial.loss for trial in trials)) / 2
    good = [t.learning_rate for t in trials if t.loss <= enough < loss_before]
    return min(good or [t.learning_rate for t in trials])


def _default(rate: float, reason: str) -> FoundRate:
    say(f"learning rate {rate:g}, the default for what is tuned: {reason}")
    return FoundRate(rate)


def _asked(search: Search[float], results: list[Trial]) -> Iterable[float]:
    """Yield the rates of a search, which is told the result that was added after each."""
    try:
        rate = float(f"{next(search):.1g}")
        while True:
            yield rate
            rate = float(f"{search.send(results[-1].loss):.1g}")
    except StopIteration:
        return


class _Trials:
    """Trials that share rows: some for their steps, the others for their judgement."""

    def __init__(
        self,
        lm: LanguageModel,
        make_run: MakeRun,
        rows: EncodedData,
        judges: tuple[Encoded, ...],
        config: TrainConfig,
    ) -> None:
        self._make_run, self._rows, self._judges = make_run, rows, judges
        self._lm, self._before = lm, lm.num_forwards
        self._config = config.model_copy(
            update={"load_best_model_at_end": False, "early_stopping_patience": None, "eval_steps": None}
        )

    def _run(self, rate: float) -> Run:
        return self._make_run(self._rows, self._config.model_copy(update={"learning_rate": rate}))

    def passes(self) -> int:
        """Return the forward passes so far."""
        return self._lm.num_forwards - self._before

    def judge(self, rate: float, run: Run | None = None) -> float:
        """Return the objective on the left-out rows at the present weights: the first process's, in all of them.

        Sums over slices may be rounded otherwise in each process, and all have to go on with one rate.
        """
        own = (run or self._run(rate)).objective_on(self._judges)
        loss = self._lm.mesh.processes.first(lambda: own)
        return loss if math.isfinite(loss) else math.inf

    def take_steps(self, rate: float, steps: int) -> Run:
        """Take the first steps of a run at a rate."""
        run = self._run(rate)
        run.take_steps(steps)
        return run

    def passes_of_steps(self, rate: float) -> tuple[int, int]:
        """Return the forward passes of a run's first step, and of each other one, by taking two."""
        run = self._run(rate)
        counts = [self.passes()]
        for _ in range(2):
            run.take_steps(1)
            counts.append(self.passes())
        return counts[1] - counts[0], counts[2] - counts[1]

    def loss_after(self, rate: float, steps: int) -> float:
        """Return the objective on the left-out rows after a trial; infinite if the steps or the loss are."""
        try:
            return self.judge(rate, self.take_steps(rate, steps))
        except (NotWrittenError, PeerError):
            raise  # these say nothing about the rate
        except RunError:
            return math.inf
