"""Are the weights beside a ledger the ledger's? Each saved tensor is compared with the one rebuilt, bit for bit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zotune.ledger import Ledger, LedgerError
from zotune.llm.ledger.merge import find_fine_tune, rebuild_any
from zotune.llm.ledger.rebuild import config_of
from zotune.llm.models.safetensors_shards import Checkpoint


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
    found = find_fine_tune(path)
    folder = path if path.is_dir() else path.parent
    ours = rebuild_any(found.first(_best_step(folder, found)) if isinstance(found, Ledger) else found, base, device)
    saved = Checkpoint(sorted(folder.glob("*model*.safetensors")))
    both = sorted(ours.names & saved.names)
    if saved.names and not both:
        raise LedgerError(f"the weights in {folder} are not of the ledger's model: no tensor has the same name.")
    different = [name for name in both if not _same_bits(ours.tensor(name), saved.tensor(name))]
    return Verified(len(found), found.cut_bytes, len(both), tuple(different))


def _best_step(folder: Path, ledger: Ledger) -> int | None:
    """Which step's weights were saved, where that is not the last."""
    results = folder / "results.json"
    if not config_of(ledger).load_best_model_at_end or not results.is_file():
        return None
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LedgerError(f"{results}, which names the step whose weights were saved, is damaged: {error}") from None
    step = found.get("best_step") if isinstance(found, dict) else None
    return step if isinstance(step, int) else None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    a, b = (t.contiguous().view(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(a, b)
