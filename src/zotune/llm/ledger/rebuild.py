"""What can be done with a run's ledger, without its data: rebuild its model, write it, take steps back, show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from zotune.errors import UsageError
from zotune.ledger import Ledger, LedgerError, LedgerWriter, read
from zotune.ledger.replay import replay
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.schema import validate
from zotune.llm.ledger.streaming import NotStreamedError, Streamed, base_of
from zotune.llm.models.load import LanguageModel, load
from zotune.llm.models.safetensors_shards import MAX_SHARD_SIZE
from zotune.llm.models.tuned_parameters import prepare
from zotune.llm.quantized.backends import is_quantised
from zotune.llm.quantized.dequantize import dense
from zotune.llm.quantized.scales import saved_state
from zotune.llm.tasks import head_labels
from zotune.llm.training.metrics_log import MetricsLog
from zotune.llm.training.optimizers import make_optimizer
from zotune.llm.training.output_folder import saving, write_whole
from zotune.llm.training.resume import CHECKPOINT, LEDGER, frozen_digest
from zotune.messages import say
from zotune.optim.zeroth_order import ZerothOrder

# What a folder holds beside the ledgers that were put together in it.
MERGE = "merge.json"


def find_ledger(path: Path) -> Ledger:
    """The ledger of a run's folder, or in a file.

    Raises:
        LedgerError: there is none, or it is damaged.
    """
    found = path / LEDGER if path.is_dir() else path
    if (path / MERGE).is_file():
        raise LedgerError(f"{path} holds a merge of several ledgers; name one of them, such as {path / '1.zol'}.")
    if path.is_dir() and not found.is_file():
        raise LedgerError(
            f"{path} holds no {LEDGER}. Runs with a first-order part have none: their steps cannot be told in a few "
            "numbers."
        )
    return read(found)


def config_of(ledger: Ledger, base: str | None = None, device: str | None = None) -> TrainConfig:
    """The options of the ledger's run; with another name for its base model or another device, if given."""
    kept = ledger.header.about.get("config")
    if not isinstance(kept, dict):
        raise LedgerError(f"{ledger.name} does not say how its run was configured: it is a library's. Replay it there.")
    changed = {"model": base, "device": device}
    values = {**kept, **{k: v for k, v in changed.items() if v is not None}, "resume": False}
    return validate(TrainConfig, values, ledger.name)


@dataclass(frozen=True)
class Rebuilt:
    """A model that was rebuilt in memory, with the optimizer that took the steps."""

    lm: LanguageModel
    optimizer: ZerothOrder
    config: TrainConfig

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        if hasattr(self.lm.module, "peft_config"):
            from peft import get_peft_model_state_dict

            state: dict[str, Tensor] = get_peft_model_state_dict(self.lm.module, save_embedding_layers=False)
            return state
        return saved_state(self.lm.module)

    @property
    def names(self) -> frozenset[str]:
        """The names that tensors are saved under."""
        return frozenset(self._state)

    def tensor(self, name: str) -> Tensor:
        """A tensor by that name, on the CPU."""
        return self._state[name].detach().cpu()

    def write(self, folder: Path, max_shard_size: str = MAX_SHARD_SIZE) -> None:
        """Write what transformers or peft load as it is."""
        write_whole(self.lm, folder, max_shard_size)


AnyModel = Rebuilt | Streamed


def rebuild(ledger: Ledger, base: str | None = None, device: str | None = None) -> AnyModel:
    """The model after the ledger's steps, from its base model, with neither data nor a forward pass of training.

    Its tensors are made one at a time, when they are asked for, if that can be; then digests are checked on the way.

    Raises:
        LedgerError: the base is another; what differs is said.
    """
    config = config_of(ledger, base, device)
    try:
        return base_of(ledger, config).moved(ledger, config, from_base=True)
    except NotStreamedError as why:
        say_in_memory(config, why)
    return rebuild_in_memory(ledger, config)


def say_in_memory(config: TrainConfig, why: NotStreamedError) -> None:
    """Let people know that the model must fit into memory, where it is not an adapter that is rebuilt."""
    if not config.is_adapter:
        say(f"{config.model} is held in memory: {why}")


def rebuild_in_memory(ledger: Ledger, config: TrainConfig) -> Rebuilt:
    """As `rebuild`, with the whole model in memory."""
    lm = load(config, head_labels(config), config.seed)
    prepare(lm, config)
    optimizer = make_optimizer(lm.module, config, config.seed)
    assert isinstance(optimizer, ZerothOrder)
    if (found := frozen_digest(lm.module)) != ledger.header.about.get("frozen"):
        raise LedgerError(
            f"{ledger.name} belongs to another base model than {config.model}: the digest of the weights that are not "
            f"tuned was {ledger.header.about.get('frozen')}, here it is {found}. Name the right one with --base."
        )
    replay(optimizer, ledger)
    return Rebuilt(lm, optimizer, config)


def export(rebuilt: AnyModel, folder: Path, *, merged: bool = False, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Write a folder that transformers or peft load as it is.

    Args:
        rebuilt: the model.
        folder: where to; it holds no model yet.
        merged: whole weights, the adapter put into them; of a quantised base all as numbers.
        max_shard_size: of whole weights, how large a file may get.

    Raises:
        UsageError: the folder holds a model, or what is tuned cannot be put into the weights.
    """
    check_empty(folder)
    if merged:
        merge: Any = getattr(rebuilt.lm.module, "merge_and_unload", None)
        has_own = not rebuilt.config.is_adapter and not is_quantised(rebuilt.lm.base)
        if has_own or (rebuilt.config.is_adapter and merge is None) or rebuilt.config.tuning in ("prefix", "prompt"):
            raise UsageError(
                f"tuning: {rebuilt.config.tuning} leaves nothing to put into the weights; leave out --merged."
            )
        rebuilt.lm.module = dense(rebuilt.lm.module) if is_quantised(rebuilt.lm.base) else merge()
    with saving(folder) as aside:
        rebuilt.write(aside, max_shard_size)


def check_empty(folder: Path) -> None:
    """Refuse to write a model where there is one.

    Raises:
        UsageError: there is.
    """
    found = [p.name for pattern in ("*.safetensors", "*.zol") for p in folder.glob(pattern)] if folder.is_dir() else []
    if found:
        raise UsageError(f"{folder} holds a model already ({found[0]}); choose another --output-dir.")


def undo(folder: Path, num_steps: int, base: str | None = None, device: str | None = None) -> None:
    """Bring a run's folder back to an earlier step: weights, ledger and metrics. `--resume` goes on from there.

    Raises:
        LedgerError: there are not so many steps, or another process writes the ledger.
    """
    path = folder / LEDGER
    ledger = find_ledger(folder).first(num_steps)
    writer, _ = LedgerWriter.resume(path)
    with writer:
        rebuilt = rebuild(ledger, base, device)
        with saving(folder) as aside:
            # Tensors are made, and checked, as they are written: nothing is cut before all of them are good.
            rebuilt.write(aside)
            (folder / CHECKPOINT).unlink(missing_ok=True)
            (folder / "results.json").unlink(missing_ok=True)
            (aside / LEDGER).write_bytes(ledger.to_bytes())
            (aside / LEDGER).replace(path)
            MetricsLog(folder / "metrics.jsonl").cut(num_steps)


def summary(ledger: Ledger) -> dict[str, Any]:
    """What a ledger says of its run, for people."""
    config = ledger.header.about.get("config") or {}
    return {
        "steps": len(ledger),
        "skipped": sum(record.is_skipped for record in ledger),
        "bytes": ledger.end,
        "bytes_a_step": ledger.rows.dtype.itemsize,
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
    """Numbers over steps in characters: the mean of each column's steps, those that are no numbers left out.

    >>> print(plot([0.0, 1.0, 2.0, 3.0], width=4, height=2))
         3 |  **
         0 |**
    """
    columns: list[float | None] = []
    count = min(width, len(values))
    for i in range(count):
        part = [v for v in values[i * len(values) // count : (i + 1) * len(values) // count] if abs(v) < float("inf")]
        columns.append(sum(part) / len(part) if part else None)
    known = [c for c in columns if c is not None]
    if not known:
        return "no number to plot"
    low, high = min(known), max(known)
    level = [None if c is None else round((c - low) / (high - low or 1) * (height - 1)) for c in columns]
    rows = ["".join("*" if at == row else " " for at in level) for row in reversed(range(height))]
    labels = [high, *[None] * (height - 2), low]
    return "\n".join(
        f"{'' if v is None else f'{v:.4g}':>6} |{row.rstrip()}" for v, row in zip(labels, rows, strict=True)
    )
