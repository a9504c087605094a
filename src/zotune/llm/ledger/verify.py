"""Verifying the weights beside a ledger: each saved tensor is compared bit for bit with the rebuilt one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zotune.ledger import Ledger, LedgerError
from zotune.llm.checkpoints.adapter_merge import is_adapter
from zotune.llm.checkpoints.safetensors_shards import Checkpoint
from zotune.llm.checkpoints.tuned_tensors import tuned_groups
from zotune.llm.ledger.merge import find_fine_tune, rebuild_any
from zotune.llm.ledger.rebuild import AnyModel, config_of
from zotune.llm.quantized.backends import is_quantised
from zotune.system.bounds import read_json


@dataclass(frozen=True)
class Verification:
    """The result of verifying a ledger.

    Attributes:
        num_steps: number of steps.
        cut_bytes: bytes of a damaged tail.
        num_tensors: number of compared tensors.
        different: the saved tensors that are not the ledger's.
        missing: the tensors that are not saved, such as those of a lost shard; beside a base that is not saved with
            them, the tuned ones.
        unexpected: the saved tensors that the ledger's model does not have.
    """

    num_steps: int
    cut_bytes: int
    num_tensors: int
    different: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    @property
    def is_right(self) -> bool:
        """Whether the saved weights, if any, are those of the ledger."""
        return not (self.different or self.missing or self.unexpected)


def verify(path: Path, base: str | None = None, device: str | None = None) -> Verification:
    """Check a ledger's checksums and base model, and replay it to compare the weights saved beside it.

    Raises:
        LedgerError: the ledger is damaged, or the base model is another one.
    """
    fine_tune = find_fine_tune(path)
    folder = path if path.is_dir() else path.parent
    rebuilt = rebuild_any(
        fine_tune.first(_best_step(folder, fine_tune)) if isinstance(fine_tune, Ledger) else fine_tune, base, device
    )
    # Saved or not, every tensor of the base is read: tuned ones when they are compared, or after that.
    saved = Checkpoint(sorted(folder.glob("*model*.safetensors")))
    names = sorted(rebuilt.names & saved.names)
    if saved.names and not names:
        raise LedgerError(f"the weights in {folder} are not of the ledger's model: no tensor has the same name.")
    different = [name for name in names if not _same_bits(rebuilt.tensor(name), saved.tensor(name))]
    rebuilt.check_base()
    groups = _groups(rebuilt) if saved.names else []
    missing = sorted(group[0] for group in groups if saved.names.isdisjoint(group))
    # The files of a quantised base hold more tensors than its state, such as the kinds of its blocks.
    unexpected = () if is_quantised(rebuilt.lm.base) else sorted(saved.names - rebuilt.names)
    return Verification(
        len(fine_tune), fine_tune.cut_bytes, len(names), tuple(different), tuple(missing), tuple(unexpected)
    )


def _groups(rebuilt: AnyModel) -> list[tuple[str, ...]]:
    """Return the names under which each tensor that is to be saved may be saved; a tied one has several."""
    module: Any = rebuilt.lm.module
    if is_adapter(module):
        return [(name,) for name in sorted(rebuilt.names)]
    if is_quantised(rebuilt.lm.base):
        # The scales of bitsandbytes are saved in the state of its layers, under other names.
        return [group for group in tuned_groups(module) if not rebuilt.names.isdisjoint(group)]
    groups: dict[int, tuple[str, ...]] = {}
    for name in module.state_dict():
        key = id(module.get_parameter_or_buffer(name))
        groups[key] = (*groups.get(key, ()), name)
    ignored = set(module._keys_to_ignore_on_save or ())
    return [group for group in groups.values() if not ignored.issuperset(group)]


def _best_step(folder: Path, ledger: Ledger) -> int | None:
    """Return the step of the saved weights, or None for the last step."""
    results = folder / "results.json"
    if not config_of(ledger).load_best_model_at_end or not results.is_file():
        return None
    try:
        content = read_json(results)
    except (OSError, ValueError, RecursionError) as error:
        raise LedgerError(f"{results}, which names the step whose weights were saved, is damaged: {error}") from None
    step = content.get("best_step") if isinstance(content, dict) else None
    return step if isinstance(step, int) else None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    a, b = (t.contiguous().view(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(a, b)
