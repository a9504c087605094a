"""Resuming a run after any end, from its ledger, a full checkpoint, or both.

The ledger alone suffices to resume a zeroth-order run; a checkpoint only makes resuming faster. A run with a
first-order
part has no ledger, because its steps cannot be recorded in a few numbers, and resumes from its last checkpoint. Its
first checkpoint, of step 0, has no tensor: it names the rows and the weights that the run began with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import zotune
from zotune.errors import UsageError
from zotune.estimate.gradient_check import CheckedForwardGradient
from zotune.estimate.jvp import forward_gradient
from zotune.ledger import Ledger, LedgerError, LedgerWriter, StepRecord
from zotune.ledger.replay import check, digests_of, header_of, replay
from zotune.llm.config.run import TrainConfig
from zotune.llm.data.tokenization import Encoded
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.output.output_folder import CHECKPOINT, LEDGER, OutputFolder
from zotune.llm.quantized.backends import frozen_tensors
from zotune.llm.training import checkpoint
from zotune.llm.training.checkpoint import DamagedCheckpointError
from zotune.llm.training.counters import Counters
from zotune.llm.training.optimizers import AnyOptimizer
from zotune.messages import say
from zotune.model.parameters import ParameterSet
from zotune.optim.zeroth_order import ZerothOrder

# Options that may differ between the parts of a run, because the weights do not depend on them.
_FREE_OPTIONS = frozenset(
    {"output_dir", "overwrite_output_dir", "resume", "save_steps", "accept_terms", "device", "logging_steps"}
    | {"reuse_activations", "reuse_memory", "reuse_file"}
    | {"report_to", "run_name", "save_strategy", "save_total_limit", "resume_from_checkpoint"}
)


class Journal:
    """The ledger and the checkpoints of one run.

    Args:
        output: folder of the run.
        config: options of the run.
        lm, optimizer: the base model, and the optimizer that tunes it.
        train: the training rows, whose digest the ledger records; dev: the held-out rows, which may choose the weights.
        passes: returns the forward passes of the step in progress.
    """

    def __init__(
        self,
        output: OutputFolder,
        config: TrainConfig,
        lm: LanguageModel,
        optimizer: AnyOptimizer,
        train: tuple[Encoded, ...],
        passes: Callable[[], int],
        dev: tuple[Encoded, ...] = (),
    ) -> None:
        self._output, self._config, self._optimizer, self._passes = output, config, optimizer, passes
        self._tuned: dict[str, Tensor] = {t.name: t.parameter for t in ParameterSet(lm.module)}
        self._run = {k: v for k, v in config.model_dump(mode="json").items() if k not in _FREE_OPTIONS}
        self._run["data"] = data_digest(train)
        self._origin = None if self.has_ledger else origin_of(lm, train, dev if config.selects else ())
        self._writer: LedgerWriter | None = None
        self._description = partial(_description, config, lm, train, dev if config.selects else None)

    def restore(self, counters: Counters, note: Callable[[StepRecord], None]) -> None:
        """Restore weights, optimizer and counters of a resumed run; a new run starts its ledger.

        Args:
            counters: counters of a new run, updated in place.
            note: called after each replayed step.

        Raises:
            LedgerError: the ledger is damaged, or belongs to another base model, data or options; nothing was changed.
            UsageError: the same of the checkpoint of a run without a ledger.
        """
        saved = self._checkpoint()
        if not isinstance(self._optimizer, ZerothOrder):
            self._restore_without_ledger(saved, counters)
            return
        path = self._output.path / LEDGER
        if not (self._output.is_resumed and path.exists()):
            self._writer = LedgerWriter.create(path, header_of(self._optimizer, self._description()))
            self._output.metrics.truncate(0)
        else:
            self._replay(saved, counters, note)
        self._optimizer.on_step = self._append

    def _restore_without_ledger(self, saved: Any, counters: Counters) -> None:
        """Check that a resumed run has the rows and weights that it began with, and load its last checkpoint."""
        if not self._output.is_resumed or (saved is None and not self._output.metrics.has_lines):
            self._output.metrics.truncate(0)
            checkpoint.save(self._output.path / CHECKPOINT, {**self._tree(counters), "weights": {}, "optimizer": {}})
            return
        folder, again = self._output.path, "or start again with --overwrite-output-dir."
        if saved is None:
            raise UsageError(f"{folder} has no checkpoint of this run to resume from. Restore {CHECKPOINT}, {again}")
        # Checkpoints of earlier versions know only the training rows.
        theirs, ours = saved.get("origin") or {"data": saved["run"].get("data")}, self._origin or {}
        for name, what in ORIGIN.items():
            if name in theirs and theirs[name] != ours[name]:
                raise UsageError(
                    f"the checkpoint in {folder} is of a run with other {what}, so it cannot resume. Restore them, "
                    f"choose another --output-dir, {again}"
                )
        step = saved["counters"]["step"]
        if step > self._config.max_steps:
            raise UsageError(
                f"{folder} holds a run of {step} steps, so it cannot end after {self._config.max_steps}. Raise "
                f"--max-steps, choose another --output-dir, {again}"
            )
        if saved["weights"] and not self._config.selects:
            self._load(saved, counters)
        else:
            say("there is no checkpoint of a step to go on from, so the run starts again at step 0")
        self._output.metrics.truncate(counters.step)

    def _replay(self, saved: Any, counters: Counters, note: Callable[[StepRecord], None]) -> None:
        assert isinstance(self._optimizer, ZerothOrder)
        path = self._output.path / LEDGER
        self._writer, ledger = LedgerWriter.resume(path)
        check(self._optimizer, ledger)
        self._check_data(ledger)
        ledger = ledger.first(min(len(ledger), self._config.max_steps))
        if ledger.cut_bytes:
            say(f"{path} ends in {ledger.cut_bytes} incomplete or damaged bytes, which were removed")
        counters.seconds = self._output.metrics.truncate(len(ledger))
        if saved is not None and saved["counters"]["step"] <= len(ledger):
            self._load(saved, counters)
        replay(self._optimizer, ledger, note)
        say(f"resumed at step {len(ledger)}")
        if self._optimizer.num_steps and isinstance(self._optimizer.estimator, CheckedForwardGradient):
            self._optimizer.estimator = forward_gradient
        self._optimizer.stop_if_skipping()

    def _check_data(self, ledger: Ledger) -> None:
        ours, theirs = self._description(), ledger.header.about
        names = {"data": "training rows", "frozen": "frozen weights"}
        # Ledgers of earlier versions do not name the held-out rows.
        names |= {"held_out": "held-out rows"} if "held_out" in ours and "held_out" in theirs else {}
        for key, name in names.items():
            if ours[key] != theirs.get(key):
                raise LedgerError(
                    f"{ledger.name} was started with other {name}, so the run cannot resume. Restore them, or start "
                    "again with --overwrite-output-dir."
                )

    def _append(self, record: StepRecord) -> None:
        assert self._writer is not None
        self._writer.append(replace(record, num_forwards=self._passes()))

    @property
    def has_ledger(self) -> bool:
        """Whether the run records its steps in a ledger."""
        return isinstance(self._optimizer, ZerothOrder)

    def save(self, counters: Counters) -> None:
        """Write a full checkpoint, after ledger and metrics are on the disk, so that it is never ahead of them."""
        self._output.metrics.sync()
        if self._writer is not None:
            self._writer.sync()
        state = {"weights": self._tuned, "optimizer": self._optimizer.state_dict()}
        checkpoint.save(self._output.path / CHECKPOINT, {**self._tree(counters), **state})

    def _tree(self, counters: Counters) -> dict[str, Any]:
        """Return the part of a checkpoint that says of which run and which step it is."""
        return {"run": self._run, "counters": vars(counters), "origin": self._origin}

    def _checkpoint(self) -> Any:
        """Return the last checkpoint if it is valid and of this run; with a ledger only if it suffices.

        Checkpoints do not record the best step.
        """
        path = self._output.path / CHECKPOINT
        if not self._output.is_resumed or not path.exists() or (self._config.selects and self.has_ledger):
            return None
        try:
            saved = checkpoint.load(path)
        except DamagedCheckpointError as error:
            say(f"{error}; resuming without it")
            return None
        # Without a ledger the origin says more of the rows than their digest among the options.
        free = {"max_steps"} if self.has_ledger else {"max_steps", "data"}
        ours, theirs = ({k: v for k, v in run.items() if k not in free} for run in (self._run, saved["run"]))
        return saved if ours == theirs else None

    def _load(self, saved: Any, counters: Counters) -> None:
        checkpoint.restore_weights(saved["weights"], self._tuned)
        state = saved["optimizer"]
        if isinstance(self._optimizer, ZerothOrder):
            device = next(iter(self._tuned.values())).device
            state = tree_map_only(Tensor, lambda t: t.to(device), state)
        self._optimizer.load_state_dict(state)
        vars(counters).update(saved["counters"])
        say(f"resuming from the checkpoint of step {counters.step}")

    def close(self) -> None:
        """Release the ledger."""
        if self._writer is not None:
            self._writer.close()


ORIGIN = {"data": "training rows", "held_out": "held-out rows", "weights": "weights of the base model"}
"""What a run without a ledger begins with, besides its options: keys in a checkpoint and names for messages."""


def origin_of(lm: LanguageModel, train: tuple[Encoded, ...], dev: tuple[Encoded, ...]) -> dict[str, str]:
    """Return digests of what a run begins with, of the model before the first step."""
    tuned = {t.name: t.parameter for t in ParameterSet(lm.module)}
    weights = [frozen_digest(lm.module), combined_digest(tuned, digests_of(tuned.values()))]
    return {"data": data_digest(train), "held_out": data_digest(dev), "weights": combined_digest(weights, ())}


def check_same_run(before: TrainConfig, now: TrainConfig) -> None:
    """Check that a resumed run has the options that it was started with.

    Raises:
        UsageError: an option that affects the weights differs; `max_steps` may differ under a constant schedule.
    """
    free = _FREE_OPTIONS | (set() if now.schedule_needs_end else {"max_steps"})
    for key, value in now.model_dump(mode="json").items():
        original = before.model_dump(mode="json")[key]
        if key not in free and value != original:
            raise UsageError(
                f"{now.output_dir} holds a run with {key}: {original}, so it cannot resume with {value}. Give the "
                f"original "
                "value, choose another --output-dir, or start again with --overwrite-output-dir."
            )


def _description(
    config: TrainConfig, lm: LanguageModel, train: tuple[Encoded, ...], dev: tuple[Encoded, ...] | None
) -> dict[str, Any]:
    """Return the description of a run in a ledger's header; `dev` are held-out rows that choose the weights."""
    libraries = ("torch", "numpy", "transformers", "peft")
    return {
        "config": config.model_dump(mode="json"),
        "data": data_digest(train),
        **({} if dev is None else {"held_out": data_digest(dev)}),
        "frozen": frozen_digest(lm.module),
        "schedule": {"kind": config.lr_scheduler_type, "max_steps": config.max_steps},
        "tuning": config.tuning,
        "versions": {"zotune": zotune.__version__, **{name: version(name) for name in libraries}},
    }


def data_digest(train: tuple[Encoded, ...]) -> str:
    """Return a digest of the training rows."""
    return hashlib.blake2b(repr(train).encode(), digest_size=16).hexdigest()


def frozen_digest(module: torch.nn.Module) -> str:
    """Return a digest of all frozen tensors; for a quantised base of its packed integers and their scales."""
    frozen = frozen_tensors(module)
    names = sorted(frozen)
    return combined_digest(names, digests_of(frozen[name] for name in names))


def combined_digest(names: Iterable[str], digests: Iterable[str]) -> str:
    """Return one digest of the names and digests of several tensors."""
    parts = [*names, *digests]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
