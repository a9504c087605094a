"""Using the ledger of a run without its data: rebuild its model, write it, undo steps, summarise and plot it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from zotune.errors import UsageError
from zotune.ledger import Ledger, LedgerError, read
from zotune.ledger.files import DamagedLedgerError
from zotune.ledger.replay import replay
from zotune.llm.checkpoints.adapter_merge import is_adapter, merged_model
from zotune.llm.checkpoints.safetensors_shards import MAX_SHARD_SIZE
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.schema import validate
from zotune.llm.ledger.streaming import NotStreamedError, StreamedModel, streamed_base
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.load import load
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.models.tuned_sets.aim import recorded_aim
from zotune.llm.models.tuned_sets.find import set_aim
from zotune.llm.output.locked_folder import LockedFolder, new_folder, tidy
from zotune.llm.output.manifest import LEDGER
from zotune.llm.output.model_files import write_model_files
from zotune.llm.quantized.backends import is_quantised
from zotune.llm.quantized.scales import state_dict_with_scales
from zotune.llm.tasks import head_labels
from zotune.llm.training.optimizers import make_optimizer
from zotune.llm.training.origin import frozen_digest
from zotune.messages import say
from zotune.optim.zeroth_order import ZerothOrder
from zotune.system.bounds import COUNT

# Counts of a run's options for which something of their size is made to replay it.
_COUNTS = ("num_queries", "window", "lora_r", "num_virtual_tokens", "rank", "directions_per_batch")
# Options that are not taken from a ledger: it names no code to run, and to replay it takes no attention.
_FOR_REPLAY = {"resume": False, "trust_remote_code": False, "attn_implementation": None, "device_map": None}
_FOR_REPLAY |= {"offload_folder": None}
# The file that describes a merge, beside its ledgers.
MERGE = "merge.json"


def find_ledger(path: Path, num_steps: int | None = None) -> Ledger:
    """Read the ledger in a run's folder or in a file.

    Args:
        path: the folder or the file.
        num_steps: read the first steps only, also those before damage in the middle; all steps for None.

    Raises:
        LedgerError: there is none, it has fewer steps, or it is damaged before that step.
    """
    if path.is_dir():
        tidy(path)
    file = path / LEDGER if path.is_dir() else path
    if (path / MERGE).is_file():
        raise LedgerError(f"{path} holds a merge of several ledgers; name one of them, such as {path / '1.zol'}.")
    if path.is_dir() and not file.is_file():
        raise LedgerError(
            f"{path} contains no {LEDGER}. Runs with a first-order part have none, because their steps cannot be "
            f"recorded "
            "in a few numbers."
        )
    try:
        return read(file).first(num_steps)
    except DamagedLedgerError as error:
        if num_steps is None or num_steps > len(error.intact):
            raise
        return error.intact.first(num_steps)


def config_of(ledger: Ledger, base: str | None = None, device: str | None = None) -> TrainConfig:
    """Return the options of the ledger's run, with another base model or device if given.

    Raises:
        LedgerError: the ledger does not record them.
    """
    recorded = ledger.header.about.get("config")
    if not isinstance(recorded, dict):
        raise LedgerError(
            f"{ledger.name} does not record the options of its run, because a program wrote it with the library. "
            f"Replay it in "
            "that program with zotune.ledger.replay."
        )
    values = {**recorded, **_FOR_REPLAY}
    if base is not None:
        values |= {"model": base, "model_revision": None}
    if device is not None:
        values["device"] = device
    config = validate(TrainConfig, values, ledger.name)
    for key in _COUNTS:
        if isinstance(value := getattr(config, key, None), int):
            COUNT.check(value, f"{key} in {ledger.name}")
    return config


@dataclass(frozen=True)
class RebuiltModel:
    """A model rebuilt in memory, with the optimizer that replayed the steps."""

    lm: LanguageModel
    optimizer: ZerothOrder
    config: TrainConfig

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        if is_adapter(self.lm.module):
            from peft import get_peft_model_state_dict

            state: dict[str, Tensor] = get_peft_model_state_dict(self.lm.module, save_embedding_layers=False)
            return state
        return state_dict_with_scales(self.lm.module)

    @property
    def names(self) -> frozenset[str]:
        """The names of the saved tensors."""
        return frozenset(self._state)

    def tensor(self, name: str) -> Tensor:
        """Return the tensor of a name, on the CPU."""
        return self._state[name].detach().cpu()

    def check_base(self) -> None:
        """Do nothing: the base was read and checked when the model was rebuilt."""

    def write(self, folder: Path, max_shard_size: str = MAX_SHARD_SIZE) -> None:
        """Write a folder for transformers or peft to load."""
        write_model_files(self.lm, folder, max_shard_size)


AnyModel = RebuiltModel | StreamedModel


def rebuild(ledger: Ledger, base: str | None = None, device: str | None = None) -> AnyModel:
    """Rebuild the model after the ledger's steps from its base model, without data or forward passes.

    If possible, its tensors are computed one at a time on request, and their digests are checked then.

    Raises:
        LedgerError: the base model is another one; the message says what differs.
    """
    config = config_of(ledger, base, device)
    try:
        return streamed_base(ledger, config).after(ledger, config, from_base=True)
    except NotStreamedError as why:
        say_in_memory(config, why)
    return rebuild_in_memory(ledger, config)


def say_in_memory(config: TrainConfig, why: NotStreamedError) -> None:
    """Report that the whole model is held in memory, unless an adapter is rebuilt."""
    if not config.is_adapter:
        say(f"the whole model {config.model} is held in memory: {why}")


def rebuild_in_memory(ledger: Ledger, config: TrainConfig) -> RebuiltModel:
    """Rebuild the model as `rebuild` does, with the whole model in memory."""
    lm = load(config, head_labels(config), config.seed)
    prepare_tuning(lm, config)
    set_aim(lm, recorded_aim(ledger))
    optimizer = make_optimizer(lm.module, config, config.seed, aim=lm.aim)
    assert isinstance(optimizer, ZerothOrder)
    if (digest := frozen_digest(lm.module)) != ledger.header.about.get("frozen"):
        raise LedgerError(
            f"{ledger.name} belongs to another base model than {config.model}: the digest of the frozen weights was "
            f"{ledger.header.about.get('frozen')}, here it is {digest}. Name the right base with --base."
        )
    replay(optimizer, ledger)
    return RebuiltModel(lm, optimizer, config)


def export(rebuilt: AnyModel, folder: Path, *, merged: bool = False, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Write a folder for transformers or peft to load.

    Args:
        rebuilt: the model.
        folder: a folder without files.
        merged: whether to merge the adapter into the weights, and to dequantise a quantised base.
        max_shard_size: maximum size of a file of whole weights.

    Raises:
        UsageError: the folder holds files or another command writes there, or the tuned parameters cannot be merged.
    """
    with new_folder(folder) as locked:
        export_into(locked, rebuilt, merged=merged, max_shard_size=max_shard_size)


def export_into(folder: LockedFolder, rebuilt: AnyModel, *, merged: bool, max_shard_size: str) -> None:
    """Write a model as `export` does, into a folder that is locked already."""
    if merged:
        lm, tuning = rebuilt.lm, rebuilt.config.tuning
        is_merged = not rebuilt.config.is_adapter and not is_quantised(lm.base)
        has_merge = hasattr(lm.module, "merge_and_unload")
        if is_merged or (rebuilt.config.is_adapter and not has_merge) or tuning in ("prefix", "prompt"):
            raise UsageError(f"tuning: {tuning} has nothing to merge into the weights; leave out --merged.")
        lm.module = merged_model(lm.module, lm.read_with, lm.name)
    with folder.staged() as staging:
        rebuilt.write(staging, max_shard_size)


def summary(ledger: Ledger) -> dict[str, Any]:
    """Return a summary of a ledger and its run."""
    config = ledger.header.about.get("config")
    config = config if isinstance(config, dict) else {}
    return {
        "steps": len(ledger),
        "skipped": sum(record.is_skipped for record in ledger),
        "bytes": ledger.end,
        "bytes_a_step": ledger.bytes_a_step,
        "cut_bytes": ledger.cut_bytes,
        "model": config.get("model"),
        "method": config.get("method"),
        "tuning": config.get("tuning"),
        "tensors": len(ledger.header.tensors),
        "seed": ledger.header.method["seed"],
        "noise_version": ledger.header.noise_version,
        "forward_passes": sum(record.num_forwards for record in ledger),
        "versions": ledger.header.about.get("versions"),
    }


def plot(values: Sequence[float], width: int = 72, height: int = 8) -> str:
    """Plot values over steps in characters; each column is a mean over steps, without non-finite values.

    >>> print(plot([0.0, 1.0, 2.0, 3.0], width=4, height=2))
         3 |  **
         0 |**
    """
    columns: list[float | None] = []
    count = min(width, len(values))
    for i in range(count):
        part = [v for v in values[i * len(values) // count : (i + 1) * len(values) // count] if abs(v) < float("inf")]
        columns.append(sum(part) / len(part) if part else None)
    means = [c for c in columns if c is not None]
    if not means:
        return "no number to plot"
    low, high = min(means), max(means)
    level = [None if c is None else round((c - low) / (high - low or 1) * (height - 1)) for c in columns]
    rows = ["".join("*" if at == row else " " for at in level) for row in reversed(range(height))]
    labels = [high, *[None] * (height - 2), low]
    return "\n".join(
        f"{'' if v is None else f'{v:.4g}':>6} |{row.rstrip()}" for v, row in zip(labels, rows, strict=True)
    )
