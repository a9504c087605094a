"""Merging several runs: their steps in sequence, or the mean of their weights; stored as ledgers, in kilobytes.

The folder of a merge holds `merge.json` and the numbered ledgers it names; the weights beside them follow from these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from zotune.errors import UsageError
from zotune.ledger import Ledger, LedgerError, read
from zotune.ledger.replay import check
from zotune.llm.config.schema import Options, validate
from zotune.llm.ledger.rebuild import (
    MERGE,
    AnyModel,
    RebuiltModel,
    config_of,
    find_ledger,
    rebuild,
    rebuild_in_memory,
    say_in_memory,
)
from zotune.llm.ledger.streaming import NotStreamedError, StreamedModel, mean_of_models, streamed_base
from zotune.llm.models.tuned_sets.aim import recorded_aim
from zotune.llm.output.json_files import write_json
from zotune.llm.output.locked_folder import tidy
from zotune.llm.training.optimizers import make_optimizer
from zotune.model.parameters import ParameterSet
from zotune.optim.zeroth_order import ZerothOrder
from zotune.system.bounds import read_json


class _Part(Options):
    file: str = Field(pattern=r"^[0-9]+\.zol$")
    steps: int = Field(ge=0)
    digest: str


class _MergeFile(Options):
    """The content of merge.json."""

    kind: Literal["row", "average"]
    ledgers: tuple[_Part, ...] = Field(min_length=2)


@dataclass(frozen=True)
class Merge:
    """Ledgers to merge: "row" applies the steps of one after those of the other, "average" takes the mean weights."""

    kind: Literal["row", "average"]
    ledgers: tuple[Ledger, ...]

    def __post_init__(self) -> None:
        first = self.ledgers[0]
        for other in self.ledgers[1:]:
            ours, theirs = ([(t["name"], t["shape"]) for t in x.header.tensors] for x in (first, other))
            if ours != theirs:
                raise LedgerError(
                    f"{first.name} and {other.name} do not tune the same tensors, so they cannot be merged. Merge "
                    f"runs with the same "
                    "--tuning of the same model."
                )
            if first.header.about.get("frozen") != other.header.about.get("frozen"):
                raise LedgerError(
                    f"{other.name} was tuned beside other frozen weights than {first.name}, so what they tuned does "
                    "not belong to one model. Merge runs on the same base model."
                )
            same_base = [t["digest"] for t in first.header.tensors] == [t["digest"] for t in other.header.tensors]
            if self.kind == "average" and not same_base:
                raise LedgerError(
                    f"{other.name} starts from other weights than {first.name}, so their mean is meaningless. Merge "
                    f"runs "
                    "from the same base model."
                )

    def __len__(self) -> int:
        """The number of steps of all ledgers."""
        return sum(map(len, self.ledgers))

    @property
    def cut_bytes(self) -> int:
        """The bytes of incomplete tails of all ledgers."""
        return sum(ledger.cut_bytes for ledger in self.ledgers)

    def rebuild(self, base: str | None = None, device: str | None = None) -> AnyModel:
        """Rebuild the merged model, one tensor at a time if possible.

        Args:
            base: another name of the base model.
            device: another device.

        Raises:
            LedgerError: the base is not the model that the runs started from.
        """
        streamed, in_memory = _REBUILDERS[self.kind]
        try:
            return streamed(self.ledgers, base, device)
        except NotStreamedError as why:
            say_in_memory(config_of(self.ledgers[0], base, device), why)
        return in_memory(self.ledgers, base, device)

    def write(self, folder: Path) -> None:
        """Write the ledgers and merge.json."""
        parts = []
        for number, ledger in enumerate(self.ledgers, start=1):
            content = ledger.to_bytes()
            (folder / f"{number}.zol").write_bytes(content)
            parts.append({"file": f"{number}.zol", "steps": len(ledger), "digest": _digest(content)})
        write_json(folder / MERGE, {"kind": self.kind, "ledgers": parts})


def find_fine_tune(path: Path, num_steps: int | None = None) -> Ledger | Merge:
    """Read the ledger in a folder or file, or the merge in a folder.

    Args:
        path: the folder or the file.
        num_steps: as in `find_ledger`.

    Raises:
        LedgerError: there is none, it has fewer steps, or it is damaged.
        UsageError: only some steps of a merge are asked for.
    """
    if path.is_dir():
        tidy(path)
    file = path / MERGE
    if not file.is_file():
        return find_ledger(path, num_steps)
    if num_steps is not None:
        raise UsageError(
            f"--step does not apply to {path}, which holds a merge of several runs; replay one of its ledgers."
        )
    return _read_merge(file)


def rebuild_any(fine_tune: Ledger | Merge, base: str | None = None, device: str | None = None) -> AnyModel:
    """Rebuild the model of a ledger or of a merge."""
    return fine_tune.rebuild(base, device) if isinstance(fine_tune, Merge) else rebuild(fine_tune, base, device)


def _read_merge(path: Path) -> Merge:
    try:
        values = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise LedgerError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise LedgerError(f"{path} is not a JSON object that describes a merge.")
    content = validate(_MergeFile, values, str(path))
    ledgers = []
    for part in content.ledgers:
        ledger = read(path.parent / part.file)
        if _digest(ledger.to_bytes()) != part.digest:
            raise LedgerError(f"{ledger.name} is not the ledger that {path} was written with: its digest differs.")
        ledgers.append(ledger)
    return Merge(content.kind, tuple(ledgers))


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _row_streamed(ledgers: Sequence[Ledger], base: str | None, device: str | None) -> StreamedModel:
    first, *others = ledgers
    config = config_of(first, base, device)
    model = streamed_base(first, config).after(first, config, from_base=True)
    for other in others:
        model = model.after(other, config_of(other, device=device), from_base=False)
    return model


def _row(ledgers: Sequence[Ledger], base: str | None, device: str | None) -> RebuiltModel:
    first, *others = ledgers
    rebuilt = rebuild_in_memory(first, config_of(first, base, device))
    for other in others:
        config = config_of(other, device=device)
        optimizer = make_optimizer(rebuilt.lm.module, config, config.seed, aim=recorded_aim(other))
        assert isinstance(optimizer, ZerothOrder)
        check(optimizer, other, digests=False)
        for record in other:
            optimizer.replay_step(record)
        rebuilt = RebuiltModel(rebuilt.lm, optimizer, config)
    return rebuilt


def _mean_streamed(ledgers: Sequence[Ledger], base: str | None, device: str | None) -> StreamedModel:
    configs = [config_of(ledger, base, device) for ledger in ledgers]
    pairs = zip(ledgers, configs, strict=True)
    return mean_of_models(
        [streamed_base(ledger, config).after(ledger, config, from_base=True) for ledger, config in pairs]
    )


def _mean(ledgers: Sequence[Ledger], base: str | None, device: str | None) -> RebuiltModel:
    sums: dict[str, Tensor] = {}
    for ledger in ledgers:
        rebuilt = rebuild_in_memory(ledger, config_of(ledger, base, device))
        for t in ParameterSet(rebuilt.lm.module):
            value = t.parameter.detach().double()
            sums[t.name] = sums[t.name] + value if t.name in sums else value
    with torch.no_grad():
        for t in ParameterSet(rebuilt.lm.module):
            t.parameter.copy_(sums[t.name] / len(ledgers))
    return rebuilt


_REBUILDERS = {"row": (_row_streamed, _row), "average": (_mean_streamed, _mean)}
