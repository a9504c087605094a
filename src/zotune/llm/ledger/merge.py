"""Several runs put together: their steps in a row, or the mean of their weights; kept as ledgers, so in kilobytes.

A folder of a merge holds `merge.json` and, numbered, the ledgers it names; the weights beside them follow from these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from zotune.ledger import Ledger, LedgerError, read
from zotune.llm.config.schema import Options, validate
from zotune.llm.ledger.rebuild import (
    MERGE,
    AnyModel,
    Rebuilt,
    config_of,
    find_ledger,
    rebuild,
    rebuild_in_memory,
    say_in_memory,
)
from zotune.llm.ledger.streaming import NotStreamedError, Streamed, base_of, mean
from zotune.llm.training.optimizers import make_optimizer
from zotune.llm.training.output_folder import write_json
from zotune.model.parameters import ParameterSet
from zotune.optim.zeroth_order import ZerothOrder


class _Part(Options):
    file: str = Field(pattern=r"^[0-9]+\.zol$")
    steps: int = Field(ge=0)
    digest: str


class _Note(Options):
    """What merge.json holds."""

    kind: Literal["row", "average"]
    ledgers: tuple[_Part, ...] = Field(min_length=2)


@dataclass(frozen=True)
class Merge:
    """Ledgers, and how they are put together: "row" takes one's steps after the other's, "average" the mean."""

    kind: Literal["row", "average"]
    ledgers: tuple[Ledger, ...]

    def __post_init__(self) -> None:
        first = self.ledgers[0]
        for other in self.ledgers[1:]:
            ours, theirs = ([(t["name"], t["shape"]) for t in x.header.tensors] for x in (first, other))
            if ours != theirs:
                raise LedgerError(
                    f"{first.name} and {other.name} do not tune the same tensors, so they cannot be put together."
                )
            same_base = [t["digest"] for t in first.header.tensors] == [t["digest"] for t in other.header.tensors]
            if self.kind == "average" and not same_base:
                raise LedgerError(
                    f"{other.name} begins with other weights than {first.name}; their mean means nothing."
                )

    def __len__(self) -> int:
        """Steps of all."""
        return sum(map(len, self.ledgers))

    @property
    def cut_bytes(self) -> int:
        """Of all, bytes of torn tails."""
        return sum(ledger.cut_bytes for ledger in self.ledgers)

    def rebuild(self, base: str | None = None, device: str | None = None) -> AnyModel:
        """The model, tensor by tensor where that can be.

        Raises:
            LedgerError: the base is another.
        """
        streamed, in_memory = _WAYS[self.kind]
        try:
            return streamed(self.ledgers, base, device)
        except NotStreamedError as why:
            say_in_memory(config_of(self.ledgers[0], base, device), why)
        return in_memory(self.ledgers, base, device)

    def write(self, folder: Path) -> None:
        """Write the ledgers and what is done with them."""
        parts = []
        for number, ledger in enumerate(self.ledgers, start=1):
            content = ledger.to_bytes()
            (folder / f"{number}.zol").write_bytes(content)
            parts.append({"file": f"{number}.zol", "steps": len(ledger), "digest": _digest(content)})
        write_json(folder / MERGE, {"kind": self.kind, "ledgers": parts})


def find_fine_tune(path: Path) -> Ledger | Merge:
    """The ledger of a folder or in a file, or the merge in a folder.

    Raises:
        LedgerError: there is none, or it is damaged.
    """
    note = path / MERGE
    return _read_merge(note) if note.is_file() else find_ledger(path)


def rebuild_any(found: Ledger | Merge, base: str | None = None, device: str | None = None) -> AnyModel:
    """The model of a ledger or of a merge."""
    return found.rebuild(base, device) if isinstance(found, Merge) else rebuild(found, base, device)


def _read_merge(path: Path) -> Merge:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LedgerError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise LedgerError(f"{path} says of no merge what it is.")
    note = validate(_Note, values, str(path))
    ledgers = []
    for part in note.ledgers:
        ledger = read(path.parent / part.file)
        if _digest(ledger.to_bytes()) != part.digest:
            raise LedgerError(f"{ledger.name} is not the ledger that {path} was written with: its digest is another.")
        ledgers.append(ledger)
    return Merge(note.kind, tuple(ledgers))


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _row_streamed(ledgers: Sequence[Ledger], base: str | None, device: str | None) -> Streamed:
    first, *others = ledgers
    config = config_of(first, base, device)
    model = base_of(first, config).moved(first, config, from_base=True)
    for other in others:
        model = model.moved(other, config_of(other, device=device), from_base=False)
    return model


def _row(ledgers: Sequence[Ledger], base: str | None, device: str | None) -> Rebuilt:
    first, *others = ledgers
    rebuilt = rebuild_in_memory(first, config_of(first, base, device))
    for other in others:
        config = config_of(other, device=device)
        optimizer = make_optimizer(rebuilt.lm.module, config, config.seed)
        assert isinstance(optimizer, ZerothOrder)
        for record in other:
            optimizer.replay_step(record)
        rebuilt = Rebuilt(rebuilt.lm, optimizer, config)
    return rebuilt


def _mean_streamed(ledgers: Sequence[Ledger], base: str | None, device: str | None) -> Streamed:
    configs = [config_of(ledger, base, device) for ledger in ledgers]
    pairs = zip(ledgers, configs, strict=True)
    return mean([base_of(ledger, config).moved(ledger, config, from_base=True) for ledger, config in pairs])


def _mean(ledgers: Sequence[Ledger], base: str | None, device: str | None) -> Rebuilt:
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


_WAYS = {"row": (_row_streamed, _row), "average": (_mean_streamed, _mean)}
