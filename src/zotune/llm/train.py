"""One run of fine-tuning: `train(config) -> Result`. Zeroth-order methods and first-order baselines share it."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from zotune.directions import SAMPLERS
from zotune.errors import NonFiniteLossError, RunError
from zotune.estimators import accumulate, central_difference, forward_difference
from zotune.llm.checks import check_first_estimate, check_mu
from zotune.llm.config import FIRST_ORDER, DataOptions, TrainConfig
from zotune.llm.data import Splits, user_splits
from zotune.llm.evaluate import Evaluation, Scorer, evaluate
from zotune.llm.models import LanguageModel, load
from zotune.llm.objective import Batch, Encoded, Encoder, collate, losses
from zotune.llm.output import OutputFolder, environment
from zotune.llm.progress import Display, Status, say
from zotune.llm.reuse import ReusedActivations
from zotune.llm.tasks import find_task
from zotune.llm.tuning import prepare
from zotune.memory import peak_memory
from zotune.methods import METHODS
from zotune.optimizer import ZerothOrder

_DIFFERENCES = {"central": central_difference, "forward": forward_difference}


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        output_dir: where model, config, metrics and results are.
        num_steps, num_skipped: updates, and steps left out for a loss that was not a number.
        num_forwards: forward passes of the training, evaluations not counted.
        num_tuned: how many numbers were tuned.
        seconds: the training's, evaluations not counted.
        peak_memory: the process's, in bytes.
        dev_before, dev, test: accuracy on the held-out rows before and after, and on the evaluation rows.
        stopped_by: the signal that ended the run early, or None.
    """

    output_dir: Path
    num_steps: int
    num_skipped: int
    num_forwards: int
    num_tuned: int
    seconds: float
    peak_memory: int
    dev_before: Evaluation | None
    dev: Evaluation | None
    test: Evaluation | None
    stopped_by: int | None

    def to_json(self) -> dict[str, Any]:
        """As results.json holds it, versions and machine included."""
        plain = {k: v for k, v in asdict(self).items() if not isinstance(getattr(self, k), Evaluation)}
        found = {k: v.summary() for k in ("dev_before", "dev", "test") if isinstance(v := getattr(self, k), Evaluation)}
        return {**plain, "output_dir": str(self.output_dir), **found, "environment": environment()}


@dataclass(frozen=True)
class Rows:
    """The splits as tokens."""

    train: tuple[Encoded, ...]
    dev: tuple[Encoded, ...]
    test: tuple[Encoded, ...]


def load_rows(lm: LanguageModel, options: DataOptions) -> Rows:
    """The data that `options` name, as tokens of the model."""
    splits = user_splits(options) if options.task is None else find_task(options.task).splits(options, lm.masked)
    encode = Encoder(lm.tokenizer, masked=lm.masked, context=lm.context, max_length=options.max_length)

    def encoded(name: str, splits: Splits) -> tuple[Encoded, ...]:
        return tuple(encode(e, f"{name} row {i}") for i, e in enumerate(getattr(splits, name), start=1))

    return Rows(*(encoded(name, splits) for name in ("train", "dev", "test")))


def train(config: TrainConfig) -> Result:
    """Fine-tune as `config` says; the tuned model and all that is known of the run go to `config.output_dir`.

    Raises:
        UsageError: the run cannot start as asked.
        RunError: it failed on the way; metrics, and weights where there are sound ones, are kept.
    """
    lm = load(config)
    rows = load_rows(lm, config)
    prepare(lm, config)
    output = OutputFolder(config)
    output.check_room(lm)
    scorer: Scorer = ReusedActivations(lm).score if _may_reuse(lm, config) else lm.score
    run = _Run(lm, rows, config, scorer, output)
    before = run.evaluate(rows.dev)
    with Display(config.max_steps) as display, _stoppable() as stop:
        try:
            run.steps(display, stop)
        except RunError:
            # The weights are those of the last sound step.
            output.save_model(lm)
            raise
    output.save_model(lm)
    dev = run.evaluate(rows.dev)
    test = dev if rows.test == rows.dev else run.evaluate(rows.test)
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
    )
    output.finish({**result.to_json(), "config": config.model_dump(mode="json")}, config, lm.masked)
    return result


class _Run:
    """The state of a run between steps."""

    def __init__(
        self, lm: LanguageModel, rows: Rows, config: TrainConfig, scorer: Scorer, output: OutputFolder
    ) -> None:
        self.lm, self.rows, self.config, self.scorer, self.output = lm, rows, config, scorer, output
        self.optimizer = make_optimizer(lm.module, config)
        zeroth_order = isinstance(self.optimizer, ZerothOrder)
        self.update: _Update = _ZerothOrderStep(config.mu) if zeroth_order else _FirstOrderStep(lm)
        self.step = self.num_skipped = self.num_forwards = 0
        self.seconds = 0.0
        self._accuracy: float | None = None

    def steps(self, display: Display, stop: _Stop) -> None:
        """All steps, or those until a signal."""
        recent: list[float] = []
        for examples in _batches(self.rows.train, self.config):
            began, before = time.perf_counter(), self.lm.num_forwards
            learning_rate = self._set_learning_rate()
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
            if self.config.eval_steps and self.step % self.config.eval_steps == 0:
                self._evaluate_on_the_way(display)
            if stop.signal is not None:
                display.say(f"stopped at step {self.step}; saving what there is …")
                return

    def _set_learning_rate(self) -> float:
        """η of the coming step."""
        learning_rate = scheduled(
            self.config.learning_rate, self.config.lr_scheduler_type, self.step / self.config.max_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        return learning_rate

    def evaluate(self, examples: Sequence[Encoded]) -> Evaluation | None:
        """Accuracy on some rows; None where there are none."""
        if not examples:
            return None
        self.lm.module.eval()
        return evaluate(self.lm, examples, self.config.per_device_eval_batch_size, self.scorer)

    def _evaluate_on_the_way(self, display: Display) -> None:
        found = self.evaluate(self.rows.dev)
        if found is not None:
            self._accuracy = found.accuracy
            self.output.log({"step": self.step, "dev": found.summary()})
            display.say(f"step {self.step}: held-out accuracy {found}, loss {found.loss:.4f}")

    def _closures(self, examples: Sequence[Encoded]) -> tuple[list[Callable[[], Tensor]], list[int]]:
        """The batch cut into forward passes of at most the configured size, examples of one length together."""
        size = self.config.per_device_train_batch_size
        ordered = sorted(examples, key=lambda e: e.length)
        cuts = [ordered[lo : lo + size] for lo in range(0, len(ordered), size)]
        batches = [collate(cut, self.lm.pad_token_id, self.lm.device) for cut in cuts]
        return [partial(_mean_loss, self.scorer, batch) for batch in batches], [len(cut) for cut in cuts]

    def _status(self, loss: float) -> Status:
        peak = peak_memory(self.lm.device)
        return Status(self.step, self.config.max_steps, loss, self.num_forwards, self.seconds, peak, self._accuracy)


def make_optimizer(module: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The method by name, over the parameters that require a gradient."""
    if config.method in FIRST_ORDER:
        tuned = [p for p in module.parameters() if p.requires_grad]
        kind: Any = torch.optim.SGD if config.method == "fo_sgd" else torch.optim.Adam
        optimizer: torch.optim.Optimizer = kind(tuned, lr=config.learning_rate)
        return optimizer
    return METHODS[config.method](
        module,
        config.learning_rate,
        mu=config.mu,
        num_queries=config.num_queries,
        sampler=SAMPLERS[config.sampler],
        difference=_DIFFERENCES[config.difference],
        rounding=config.rounding,
        seed=config.seed,
    )


def scheduled(learning_rate: float, kind: str, done: float) -> float:
    """η when a fraction `done` of the steps, in [0, 1), is behind.

    >>> [scheduled(2.0, kind, 0.5) for kind in ("constant", "linear")], round(scheduled(2.0, "cosine", 0.5), 6)
    ([2.0, 1.0], 1.0)
    """
    factors = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return learning_rate * factors[kind]


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


def _mean_loss(scorer: Scorer, batch: Batch) -> Tensor:
    return losses(scorer(batch), batch).mean()


_Update = Callable[[Any, Sequence[Callable[[], Tensor]], Sequence[int]], float]


class _ZerothOrderStep:
    """One step of forward passes only; the micro-batches add up to one objective. The first is looked at hard."""

    def __init__(self, mu: float) -> None:
        self._mu = mu

    def __call__(
        self, optimizer: ZerothOrder, closures: Sequence[Callable[[], Tensor]], weights: Sequence[int]
    ) -> float:
        is_first = optimizer.num_steps == 0
        if is_first:
            check_mu(optimizer.tuned, self._mu)
        estimate = optimizer.estimate(accumulate(closures, weights))
        if is_first:
            check_first_estimate(optimizer, estimate, self._mu)
        optimizer.apply(estimate)
        return estimate.loss


class _FirstOrderStep:
    """One step by back-propagation, the micro-batches' gradients added up."""

    def __init__(self, lm: LanguageModel, max_skipped: int = 10) -> None:
        self._lm, self._max_skipped, self._skipped = lm, max_skipped, 0

    def __call__(
        self, optimizer: torch.optim.Optimizer, closures: Sequence[Callable[[], Tensor]], weights: Sequence[int]
    ) -> float:
        self._lm.module.train()
        optimizer.zero_grad()
        total = 0.0
        for closure, weight in zip(closures, weights, strict=True):
            loss = closure() * (weight / sum(weights))
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if math.isfinite(total):
            self._skipped = 0
            optimizer.step()
            return total
        self._skipped += 1
        if self._skipped >= self._max_skipped:
            raise NonFiniteLossError(
                f"the loss was NaN or infinite for {self._skipped} steps in a row. Lower the learning rate."
            )
        return total


def _may_reuse(lm: LanguageModel, config: TrainConfig) -> bool:
    """Whether what lies below the tuned layers is the same in every pass: a first-order step leaves dropout on."""
    if config.method in FIRST_ORDER and config.gradient_checkpointing:
        lm.module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    drops = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in lm.module.modules())
    return config.reuse_activations and not (drops and config.method in FIRST_ORDER)


@dataclass
class _Stop:
    signal: int | None = None


@contextmanager
def _stoppable() -> Iterator[_Stop]:
    """Let the first Ctrl-C or SIGTERM end the run after its step; a second one ends it at once."""
    stop = _Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = number
        say("stopping after this step (once more to stop at once) …")

    kept = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
