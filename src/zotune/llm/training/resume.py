"""Resuming a run after any end, from its ledger, a full checkpoint, or both.

The ledger alone suffices to resume a zeroth-order run; a checkpoint only makes resuming faster. A run with a
first-order part has no ledger, because its steps cannot be recorded in a few numbers, and resumes from its last
checkpoint. Its first checkpoint, of step 0, has no tensor: it names the rows and the weights that the run began with.

A run to resume is compared with what it began with (`origin`) before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

import zotune
from zotune.errors import UsageError
from zotune.estimate.forward_mode.gradient_check import CheckedForwardGradient
from zotune.estimate.forward_mode.jvp import forward_gradient
from zotune.ledger import Ledger, LedgerError, LedgerWriter, StepRecord, read
from zotune.ledger.files import locked
from zotune.ledger.replay import check, header_of, replay, tuned_digests
from zotune.llm.config.run import TrainConfig
from zotune.llm.data.tokenization import Encoded
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.tuned_sets.aim import Aim
from zotune.llm.output.manifest import LEDGER
from zotune.llm.output.metrics_log import Line, MetricsLog
from zotune.llm.output.output_folder import CHECKPOINT, METRICS, OutputFolder
from zotune.llm.training import checkpoint
from zotune.llm.training.checkpoint import DamagedCheckpointError
from zotune.llm.training.counters import Counters
from zotune.llm.training.in_memory import MemoryOutput, Output
from zotune.llm.training.optimizers import AnyOptimizer
from zotune.llm.training.origin import (
    check_num_steps,
    check_options,
    check_origin,
    origin_of,
    recorded_options,
    with_tuned_weights,
)
from zotune.messages import say
from zotune.model.parameters import ParameterSet
from zotune.model.shards import gathered
from zotune.model.streaming import settle, stream_of
from zotune.optim.zeroth_order import ZerothOrder
from zotune.system.libraries import library_version

_START_AGAIN = "choose another --output-dir, or start again with --overwrite-output-dir."


class Journal:
    """The ledger and the checkpoints of one run.

    Of several processes the first one reads and writes the files, and all go on from what it has read.

    Args:
        output: folder of the run; in a process that does not write the output in memory.
        config: options of the run.
        lm, optimizer: the base model, and the optimizer that tunes it.
        train: the training rows, whose digest the ledger records; dev: the held-out rows, which may choose the weights.
        passes: returns the forward passes of the step in progress.

    Attributes:
        was_stopped: whether a callback ended the run to resume, as far as `check` has seen.
    """

    def __init__(
        self,
        output: Output,
        config: TrainConfig,
        lm: LanguageModel,
        optimizer: AnyOptimizer,
        train: Sequence[Encoded],
        passes: Callable[[], int],
        dev: Sequence[Encoded] = (),
    ) -> None:
        self._config, self._optimizer, self._passes = config, optimizer, passes
        self._output, self._processes = output, lm.mesh.processes
        self._module, self._aim = lm.module, lm.aim
        self._tuned: dict[str, Tensor] = {t.name: t.parameter for t in ParameterSet(lm.module)}
        origin = origin_of(lm, train, dev if config.selects else None)
        self._origin = origin if self.has_ledger else with_tuned_weights(origin, lm)
        # Of a model in shards all processes gather what the first one compares and records.
        self._is_sharded = lm.mesh.is_sharded
        self._digests: list[str] | None = None
        if self._is_sharded and isinstance(optimizer, ZerothOrder):
            self._digests = tuned_digests(optimizer.tuned)
        self._writer: LedgerWriter | None = None
        self._ledger: Ledger | None = None
        self._saved: Any = None
        self.was_stopped = False

    def check(self) -> None:
        """Check that the run to resume, if there is one, is this run. Nothing is changed; `restore` comes after it.

        The run may lie in a folder `checkpoint-N`, from which it is copied in between.

        Raises:
            LedgerError: its ledger is damaged, or another process writes it.
            UsageError: it began with other rows, another base model or other options, has more steps than it shall
                end after, or lacks the file that it resumes from.
        """
        if self._output.is_resumed:
            self._processes.first(self._check)
            self.was_stopped = self._processes.first(lambda: self.was_stopped)

    def _check(self) -> None:
        folder = self._folder.source
        check_options(self._folder.before.model_dump(mode="json"), self._config, str(folder))
        path = folder / (LEDGER if self.has_ledger else CHECKPOINT)
        if not path.exists():
            self._check_not_begun(folder, path.name)
        elif isinstance(self._optimizer, ZerothOrder):
            with locked(path):
                self._ledger = read(path)
            self._check_ledger(self._ledger, self._optimizer)
            saved = self._checkpoint_of(self._ledger, folder / CHECKPOINT)
            self._note_stop(saved, len(self._ledger))
            # Checkpoints do not record the best step.
            self._saved = None if self._config.selects else saved
        else:
            self._saved = self._checked_checkpoint(path)
            self._note_stop(self._saved, self._saved["counters"]["step"])

    def _note_stop(self, saved: Any, num_steps: int) -> None:
        """Note whether a callback ended the run after its last step; with another `max_steps` the run goes on."""
        is_last = saved is not None and saved["counters"]["step"] == num_steps > 0
        stopped = saved["counters"].get("callbacks", {}).get("stopped") if is_last else None
        self.was_stopped = stopped == self._config.max_steps

    def _check_not_begun(self, folder: Path, missing: str) -> None:
        """Check that the run without the file it resumes from has not taken a step, so that it may start."""
        files = [p.name for pattern in ("results.json", "*.safetensors") for p in folder.glob(pattern)]
        if files or MetricsLog(folder / METRICS).has_lines:
            raise UsageError(
                f"{folder} holds a run ({files[0] if files else 'metrics.jsonl'}), but its {missing} is not there to "
                f"resume it from. Restore that file, {_START_AGAIN}"
            )

    def _check_ledger(self, ledger: Ledger, optimizer: ZerothOrder) -> None:
        about = ledger.header.about
        options = about.get("config")
        if not isinstance(options, dict):
            raise LedgerError(f"{ledger.name} does not record the options of its run, so the run cannot resume.")
        check_options(options, self._config, ledger.name)
        check_origin(self._origin, {"data": None, "frozen": None, **about}, ledger.name)
        check(optimizer, ledger, digests=True if self._digests is None else self._digests)
        check_num_steps(len(ledger), self._config, ledger.name)

    def _checkpoint_of(self, ledger: Ledger, path: Path) -> Any:
        """Return the checkpoint if it is sound and of this ledger's run: without it, resuming only takes longer."""
        if not path.exists():
            return None
        try:
            saved = checkpoint.load(path)
        except DamagedCheckpointError as error:
            say(f"{error}; resuming without it")
            return None
        step = saved["counters"]["step"]
        if step > len(ledger):
            return None
        if "ledger" in saved:
            return saved if saved["ledger"] == ledger.first(step).mark else None
        # Checkpoints of earlier versions do not name their ledger.
        try:
            check_options(_options_of(saved), self._config, str(path))
        except UsageError:
            return None
        return saved

    def _checked_checkpoint(self, path: Path) -> Any:
        try:
            saved = checkpoint.load(path)
        except DamagedCheckpointError as error:
            raise UsageError(f"{error}. The run resumes from it: restore it from a copy, {_START_AGAIN}") from None
        check_options(_options_of(saved), self._config, str(path))
        # Checkpoints of earlier versions know only the training rows.
        check_origin(self._origin, saved.get("origin") or {"data": saved["run"].get("data")}, str(path))
        num_steps = max(saved["counters"]["step"], MetricsLog(path.with_name(METRICS)).last_step)
        check_num_steps(num_steps, self._config, str(path.parent))
        return saved

    def restore(self, counters: Counters, note: Callable[[StepRecord], None]) -> None:
        """Restore weights, optimizer and counters of a checked run; a new run starts its ledger.

        Args:
            counters: counters of a new run, updated in place.
            note: called after each replayed step.
        """
        ledger, saved, counters.seconds, lines = self._processes.first(lambda: self._open(counters))
        if isinstance(self._output, MemoryOutput):
            self._output.metrics.earlier = lines
        if saved is not None:
            self._load(saved, counters)
        if not isinstance(self._optimizer, ZerothOrder):
            return
        if ledger is not None:
            self._replay(ledger, self._optimizer, note)
        self._optimizer.on_step = self._append

    @property
    def _folder(self) -> OutputFolder:
        assert isinstance(self._output, OutputFolder)
        return self._output

    def _open(self, counters: Counters) -> tuple[Ledger | None, Any, float, tuple[Line, ...]]:
        """Open the files to write; return what the run goes on from: ledger, checkpoint, seconds and metrics."""
        folder = self._folder
        if folder.is_resumed and self._config.model_copy(update={"resume": False}) != folder.before:
            folder.write_config(self._config)
        if not self.has_ledger:
            return self._open_without_ledger(folder, counters)
        assert isinstance(self._optimizer, ZerothOrder)
        if self._ledger is None:
            about = _description(self._config, self._origin, self._aim)
            header = header_of(self._optimizer, about, digests=self._digests)
            self._writer = LedgerWriter.create(folder.path / LEDGER, header)
            folder.metrics.truncate(0)
            return None, None, 0.0, ()
        self._writer, ledger = LedgerWriter.resume(folder.path / LEDGER)
        if ledger.cut_bytes:
            self._writer.cut_tail()
            say(f"{ledger.name} ends in {ledger.cut_bytes} incomplete or damaged bytes, which were removed")
        seconds = folder.metrics.truncate(len(ledger))
        return ledger, self._saved, seconds, folder.metrics.earlier

    def _open_without_ledger(
        self, folder: OutputFolder, counters: Counters
    ) -> tuple[None, Any, float, tuple[Line, ...]]:
        saved = None
        if self._saved is None:
            tree = {**self._tree(counters), "weights": {}, "optimizer": {}}
            checkpoint.save(folder.path / CHECKPOINT, tree)
        elif self._saved["weights"] and not self._config.selects:
            saved = self._saved
        else:
            say("there is no checkpoint of a step to go on from, so the run starts again at step 0")
        folder.metrics.truncate(0 if saved is None else saved["counters"]["step"])
        return None, saved, 0.0, folder.metrics.earlier

    def _replay(self, ledger: Ledger, optimizer: ZerothOrder, note: Callable[[StepRecord], None]) -> None:
        replay(optimizer, ledger, note)
        say(f"resumed at step {len(ledger)}")
        if optimizer.num_steps and isinstance(optimizer.estimator, CheckedForwardGradient):
            optimizer.estimator = forward_gradient
        optimizer.stop_if_skipping()

    def _append(self, record: StepRecord) -> None:
        if self._writer is not None:
            self._writer.append(replace(record, num_forwards=self._passes()))

    @property
    def has_ledger(self) -> bool:
        """Whether the run records its steps in a ledger."""
        return isinstance(self._optimizer, ZerothOrder)

    def save(self, counters: Counters) -> None:
        """Write a full checkpoint, after ledger and metrics are on the disk, so that it is never ahead of them."""
        writes = not isinstance(self._output, MemoryOutput)
        if not writes and not self._is_sharded:
            return
        # A checkpoint of streamed layers would be read into memory as a whole; their ledger alone suffices.
        streams = self._writer is not None and stream_of(self._module) is not None
        tree = {} if streams else {"weights": self._tuned, "optimizer": self._optimizer.state_dict()}
        state = gathered(tree, keep=writes)
        if isinstance(self._output, MemoryOutput):
            return
        self._output.metrics.sync()
        if self._writer is not None:
            self._writer.sync()
        if streams:
            return
        checkpoint.save(self._output.path / CHECKPOINT, {**self._tree(counters), **state})

    def _tree(self, counters: Counters) -> dict[str, Any]:
        """Return the part of a checkpoint that says of which run and which step it is."""
        mark = {} if self._writer is None else {"ledger": self._writer.mark}
        run = recorded_options(self._config)
        return {"run": run, "counters": vars(counters), "origin": self._origin, **mark}

    def _load(self, saved: Any, counters: Counters) -> None:
        settle(self._module)
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


def _options_of(saved: Any) -> dict[str, Any]:
    """Return the options of a checkpoint's run; those of earlier versions hold the digest of the rows beside them."""
    return {key: value for key, value in saved["run"].items() if key != "data"}


def _description(config: TrainConfig, origin: Mapping[str, str], aim: Aim | None) -> dict[str, Any]:
    """Return the description of a run in a ledger's header."""
    libraries = ("torch", "numpy", "transformers", "peft")
    end = {"max_steps": config.max_steps} if config.schedule_needs_end else {}
    return {
        "config": recorded_options(config),
        **origin,
        **({} if aim is None else {"aim": aim.to_json()}),
        "schedule": {"kind": config.lr_scheduler_type, **end},
        "tuning": config.tuning,
        "versions": {"zotune": zotune.__version__, **{name: library_version(name) for name in libraries}},
    }
