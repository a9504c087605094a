"""What can be done with a run's ledger, without its data: rebuild, undo, verify, export, put several together."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from zotune.errors import UsageError
from zotune.ledger import Ledger, LedgerError, LedgerWriter, read
from zotune.ledger.replay import replay
from zotune.llm.config import TrainConfig
from zotune.llm.journal import CHECKPOINT, LEDGER, frozen_digest
from zotune.llm.metrics import MetricsLog
from zotune.llm.models import LanguageModel, load
from zotune.llm.optimizers import make_optimizer
from zotune.llm.output import save_whole
from zotune.llm.schema import validate
from zotune.llm.tasks import head_labels
from zotune.llm.tuning import prepare
from zotune.optimizer import ZerothOrder
from zotune.tuned import TunedTensors


def find_ledger(path: Path) -> Ledger:
    """The ledger of a run's folder, or in a file.

    Raises:
        LedgerError: there is none, or it is damaged.
    """
    found = path / LEDGER if path.is_dir() else path
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
    """A model that was rebuilt, with the optimizer that took the steps."""

    lm: LanguageModel
    optimizer: ZerothOrder
    config: TrainConfig


def rebuild(ledger: Ledger, base: str | None = None, device: str | None = None) -> Rebuilt:
    """The model after the ledger's steps, from its base model, with neither data nor a forward pass of training.

    Raises:
        LedgerError: the base is another; what differs is said.
    """
    rebuilt = _begin(ledger, base, device)
    replay(rebuilt.optimizer, ledger)
    return rebuilt


def _begin(ledger: Ledger, base: str | None, device: str | None) -> Rebuilt:
    """The base model, and the optimizer of the ledger's run."""
    config = config_of(ledger, base, device)
    lm = load(config, head_labels(config), config.seed)
    prepare(lm, config)
    optimizer = make_optimizer(lm.module, config, config.seed)
    assert isinstance(optimizer, ZerothOrder)
    if (found := frozen_digest(lm.module)) != ledger.header.about.get("frozen"):
        raise LedgerError(
            f"{ledger.name} belongs to another base model than {config.model}: the digest of the weights that are not "
            f"tuned was {ledger.header.about.get('frozen')}, here it is {found}. Name the right one with --base."
        )
    return Rebuilt(lm, optimizer, config)


def export(rebuilt: Rebuilt, folder: Path, *, merged: bool = False) -> None:
    """Write a folder that transformers or peft load as it is.

    Args:
        rebuilt: the model.
        folder: where to; it holds no model yet.
        merged: of an adapter's run, whole weights with the adapter put into them.

    Raises:
        UsageError: the folder holds a model, or what is tuned cannot be put into the weights.
    """
    found = [p.name for pattern in ("*.safetensors", LEDGER) for p in folder.glob(pattern)] if folder.is_dir() else []
    if found:
        raise UsageError(f"{folder} holds a model already ({found[0]}); choose another --output-dir.")
    lm = rebuilt.lm
    if merged:
        merge: Any = getattr(lm.module, "merge_and_unload", None)
        if not rebuilt.config.is_adapter or merge is None or rebuilt.config.tuning in ("prefix", "prompt"):
            raise UsageError(
                f"tuning: {rebuilt.config.tuning} leaves nothing to put into the weights; leave out --merged."
            )
        lm.module = merge()
    save_whole(lm, folder)


@dataclass(frozen=True)
class Verified:
    """What a ledger's check found: steps, bytes of a damaged tail, and tensors that were compared and differ."""

    num_steps: int
    cut_bytes: int
    num_tensors: int
    different: tuple[str, ...]


def verify(path: Path, base: str | None = None, device: str | None = None) -> Verified:
    """Check a ledger's checksums and base, and by replaying it that the weights saved beside it are the ledger's.

    Raises:
        LedgerError: the ledger is damaged, or the base another.
    """
    ledger = find_ledger(path)
    folder = path if path.is_dir() else path.parent
    rebuilt = rebuild(ledger.first(_best_step(folder, ledger)), base, device)
    saved = _saved(folder)
    ours = _state(rebuilt.lm)
    both = sorted(ours.keys() & saved.keys())
    if saved and not both:
        raise LedgerError(f"the weights in {folder} are not of the ledger's model: no tensor has the same name.")
    different = [name for name in both if not _same_bits(ours[name], saved[name])]
    return Verified(len(ledger), ledger.cut_bytes, len(both), tuple(different))


def _best_step(folder: Path, ledger: Ledger) -> int | None:
    """Which step's weights were saved, where that is not the last."""
    results = folder / "results.json"
    if not config_of(ledger).load_best_model_at_end or not results.is_file():
        return None
    found = json.loads(results.read_text(encoding="utf-8")).get("best_step")
    return found if isinstance(found, int) else None


def _saved(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder, read lazily where the platform can."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a file, not a dict
    return found


def _state(lm: LanguageModel) -> dict[str, Tensor]:
    """The model's tensors by the names that they are saved under."""
    if hasattr(lm.module, "peft_config"):
        from peft import get_peft_model_state_dict

        state: dict[str, Tensor] = get_peft_model_state_dict(lm.module, save_embedding_layers=False)
        return state
    return dict(lm.module.state_dict())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    a, b = (t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(a, b)


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
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_bytes(ledger.to_bytes())
        aside.replace(path)
        (folder / CHECKPOINT).unlink(missing_ok=True)
        (folder / "results.json").unlink(missing_ok=True)
        MetricsLog(folder / "metrics.jsonl").cut(num_steps)
        save_whole(rebuilt.lm, folder)


def continued(first: Ledger, second: Ledger, base: str | None = None, device: str | None = None) -> Rebuilt:
    """The steps of one ledger, then those of another, whatever the second one's base was.

    Raises:
        LedgerError: they do not tune the same tensors.
    """
    _check_alike(first, second)
    rebuilt = rebuild(first, base, device)
    config = config_of(second)
    optimizer = make_optimizer(rebuilt.lm.module, config, config.seed)
    assert isinstance(optimizer, ZerothOrder)
    for record in second:
        optimizer.retake(record)
    return Rebuilt(rebuilt.lm, optimizer, config)


def average(ledgers: Sequence[Ledger], base: str | None = None, device: str | None = None) -> Rebuilt:
    """The mean of several runs' tuned weights, taken in float64 and rounded once.

    Raises:
        LedgerError: they do not begin with the same weights.
    """
    for other in ledgers[1:]:
        _check_alike(ledgers[0], other)
        if [t["digest"] for t in other.header.tensors] != [t["digest"] for t in ledgers[0].header.tensors]:
            raise LedgerError(
                f"{other.name} begins with other weights than {ledgers[0].name}; their mean means nothing."
            )
    sums: dict[str, Tensor] = {}
    for ledger in ledgers:
        rebuilt = rebuild(ledger, base, device)
        for t in TunedTensors(rebuilt.lm.module):
            value = t.parameter.detach().double()
            sums[t.name] = sums[t.name] + value if t.name in sums else value
    with torch.no_grad():
        for t in TunedTensors(rebuilt.lm.module):
            t.parameter.copy_(sums[t.name] / len(ledgers))
    return rebuilt


def _check_alike(one: Ledger, other: Ledger) -> None:
    ours, theirs = ([(t["name"], t["shape"]) for t in ledger.header.tensors] for ledger in (one, other))
    if ours != theirs:
        raise LedgerError(f"{one.name} and {other.name} do not tune the same tensors, so they cannot be put together.")


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
