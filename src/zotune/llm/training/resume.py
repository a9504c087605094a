"""What a run writes down so that it can go on after any end: a ledger, full checkpoints, or both.

A zeroth-order run is its ledger, and needs no checkpoint; one only makes resuming faster. A run with a
first-order part has no ledger, for its steps cannot be told in a few numbers, and goes on from its last checkpoint.
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
from zotune.llm.models.load import LanguageModel
from zotune.llm.quantized.backends import frozen_tensors
from zotune.llm.training import checkpoint
from zotune.llm.training.checkpoint import DamagedCheckpointError
from zotune.llm.training.counters import Counters
from zotune.llm.training.optimizers import AnyOptimizer
from zotune.llm.training.output_folder import OutputFolder
from zotune.messages import say
from zotune.model.parameters import ParameterSet
from zotune.optim.zeroth_order import ZerothOrder

LEDGER, CHECKPOINT = "ledger.zol", "checkpoint.safetensors"

# What may differ between the parts of a run, for no weight depends on it.
_FREE = frozenset(
    {"output_dir", "overwrite_output_dir", "resume", "save_steps", "accept_terms", "device", "logging_steps"}
    | {"reuse_activations", "reuse_memory", "reuse_file"}
)


class Journal:
    """The ledger and the checkpoints of one run.

    Args:
        output: the run's folder.
        config: the run's.
        lm, optimizer: the base model, and what will change it.
        train: the rows, which the ledger names by a fingerprint.
        passes: forward passes of the step in progress.
    """

    def __init__(
        self,
        output: OutputFolder,
        config: TrainConfig,
        lm: LanguageModel,
        optimizer: AnyOptimizer,
        train: tuple[Encoded, ...],
        passes: Callable[[], int],
    ) -> None:
        self._output, self._config, self._optimizer, self._passes = output, config, optimizer, passes
        self._tuned: dict[str, Tensor] = {t.name: t.parameter for t in ParameterSet(lm.module)}
        self._run = {k: v for k, v in config.model_dump(mode="json").items() if k not in _FREE}
        self._run["data"] = data_digest(train)
        self._writer: LedgerWriter | None = None
        self._about = partial(_about, config, lm, train)

    def restore(self, counters: Counters, note: Callable[[StepRecord], None]) -> None:
        """Bring weights, optimizer and counters to where the run was. A new run begins its ledger.

        Args:
            counters: those of a beginning run; changed in place.
            note: called after each step that is taken again.

        Raises:
            LedgerError: the ledger is damaged, or of another base model, data or options; nothing was changed.
        """
        saved = self._checkpoint()
        if not isinstance(self._optimizer, ZerothOrder):
            if saved is not None:
                self._load(saved, counters)
            self._output.metrics.cut(counters.step)
            return
        path = self._output.path / LEDGER
        if not (self._output.is_resumed and path.exists()):
            self._writer = LedgerWriter.create(path, header_of(self._optimizer, self._about()))
            self._output.metrics.cut(0)
        else:
            self._replay(saved, counters, note)
        self._optimizer.on_step = self._append

    def _replay(self, saved: Any, counters: Counters, note: Callable[[StepRecord], None]) -> None:
        assert isinstance(self._optimizer, ZerothOrder)
        path = self._output.path / LEDGER
        self._writer, ledger = LedgerWriter.resume(path)
        check(self._optimizer, ledger)
        self._check_data(ledger)
        ledger = ledger.first(min(len(ledger), self._config.max_steps))
        if ledger.cut_bytes:
            say(f"{path} ends in {ledger.cut_bytes} torn or damaged bytes, which were cut off")
        counters.seconds = self._output.metrics.cut(len(ledger))
        if saved is not None and saved["counters"]["step"] <= len(ledger):
            self._load(saved, counters)
        replay(self._optimizer, ledger, note)
        say(f"resumed at step {len(ledger)}")
        if self._optimizer.num_steps and isinstance(self._optimizer.estimator, CheckedForwardGradient):
            self._optimizer.estimator = forward_gradient
        self._optimizer.stop_if_skipping()

    def _check_data(self, ledger: Ledger) -> None:
        ours, theirs = self._about(), ledger.header.about
        for key, what in (("data", "training rows"), ("frozen", "weights that are not tuned")):
            if ours[key] != theirs.get(key):
                raise LedgerError(
                    f"{ledger.name} was begun with other {what}, so the run cannot go on. Bring them back, or begin "
                    "anew with --overwrite-output-dir."
                )

    def _append(self, record: StepRecord) -> None:
        assert self._writer is not None
        self._writer.append(replace(record, num_forwards=self._passes()))

    @property
    def has_ledger(self) -> bool:
        """Whether the run's steps are recorded one by one."""
        return isinstance(self._optimizer, ZerothOrder)

    def save(self, counters: Counters) -> None:
        """Write a full checkpoint; ledger and metrics before it, so that it is never ahead of them."""
        self._output.metrics.sync()
        if self._writer is not None:
            self._writer.sync()
        tree = {
            "run": self._run,
            "counters": vars(counters),
            "weights": self._tuned,
            "optimizer": self._optimizer.state_dict(),
        }
        checkpoint.save(self._output.path / CHECKPOINT, tree)

    def _checkpoint(self) -> Any:
        """The last checkpoint, if it is good and of this run; what the best step was is in none."""
        path = self._output.path / CHECKPOINT
        if not self._output.is_resumed or not path.exists() or self._config.selects:
            return None
        try:
            saved = checkpoint.load(path)
        except DamagedCheckpointError as error:
            say(f"{error}; going on without it")
            return None
        ours, theirs = ({k: v for k, v in run.items() if k != "max_steps"} for run in (self._run, saved["run"]))
        return saved if ours == theirs else None

    def _load(self, saved: Any, counters: Counters) -> None:
        checkpoint.put(saved["weights"], self._tuned)
        state = saved["optimizer"]
        if isinstance(self._optimizer, ZerothOrder):
            device = next(iter(self._tuned.values())).device
            state = tree_map_only(Tensor, lambda t: t.to(device), state)
        self._optimizer.load_state_dict(state)
        vars(counters).update(saved["counters"])
        say(f"going on from the checkpoint of step {counters.step}")

    def close(self) -> None:
        """Let others write the ledger."""
        if self._writer is not None:
            self._writer.close()


def check_same_run(before: TrainConfig, now: TrainConfig) -> None:
    """See that a run that is to go on is asked for as it was begun.

    Raises:
        UsageError: an option on which weights depend is another. More steps are fine under a constant schedule.
    """
    free = _FREE | ({"max_steps"} if now.lr_scheduler_type == "constant" else set())
    for key, value in now.model_dump(mode="json").items():
        was = before.model_dump(mode="json")[key]
        if key not in free and value != was:
            raise UsageError(
                f"{now.output_dir} holds a run with {key}: {was}, so it cannot go on with {value}. Give the option as "
                "it was, choose another --output-dir, or begin anew with --overwrite-output-dir."
            )


def _about(config: TrainConfig, lm: LanguageModel, train: tuple[Encoded, ...]) -> dict[str, Any]:
    """What a ledger's header says of a run besides its updates."""
    libraries = ("torch", "numpy", "transformers", "peft")
    return {
        "config": config.model_dump(mode="json"),
        "data": data_digest(train),
        "frozen": frozen_digest(lm.module),
        "schedule": {"kind": config.lr_scheduler_type, "max_steps": config.max_steps},
        "tuning": config.tuning,
        "versions": {"zotune": zotune.__version__, **{name: version(name) for name in libraries}},
    }


def data_digest(train: tuple[Encoded, ...]) -> str:
    """A digest of the rows that are trained on."""
    return hashlib.blake2b(repr(train).encode(), digest_size=16).hexdigest()


def frozen_digest(module: torch.nn.Module) -> str:
    """A digest of all that is not tuned; of a quantised base, of its packed integers and their scales."""
    frozen = frozen_tensors(module)
    names = sorted(frozen)
    return combined_digest(names, digests_of(frozen[name] for name in names))


def combined_digest(names: Iterable[str], digests: Iterable[str]) -> str:
    """One digest of several tensors' names and digests."""
    parts = [*names, *digests]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
