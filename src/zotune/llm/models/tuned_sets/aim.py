"""What forward passes have found for a tuned set: initial values of an adapter, and subspaces of directions.

A ledger holds it in its header, so that whoever replays it, resumes or merges the run needs no rows and no passes.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zotune.directions.samplers import Subspace
from zotune.errors import UsageError
from zotune.ledger import Ledger, LedgerError
from zotune.model.parameters import ParameterSet
from zotune.system.bounds import JSON_BYTES


@dataclass(frozen=True)
class Aim:
    """What was found before the first step.

    Attributes:
        values: initial values by the names of parameters, float32.
        subspaces: of directions, by the canonical names of tuned tensors.
        scales: of directions' entries, by the canonical names of tuned tensors.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    subspaces: Mapping[str, Subspace] = field(default_factory=dict)
    scales: Mapping[str, Tensor] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain values, which `from_json` reads to the same bits."""
        return {
            "values": {name: _packed(value) for name, value in self.values.items()},
            "subspaces": {
                name: {side: _packed(t) for side in ("left", "right") if (t := getattr(space, side)) is not None}
                for name, space in self.subspaces.items()
            },
            "scales": {name: _packed(value) for name, value in self.scales.items()},
        }

    @classmethod
    def from_json(cls, plain: Any, source: str) -> Aim:
        """The aim that was packed.

        Raises:
            LedgerError: it is none.
        """
        try:
            values = {str(name): _unpacked(value) for name, value in plain["values"].items()}
            sides = {str(name): {s: _unpacked(v) for s, v in own.items()} for name, own in plain["subspaces"].items()}
            spaces = {name: Subspace(0, own.get("left"), own.get("right")) for name, own in sides.items()}
            scales = {str(name): _unpacked(value) for name, value in plain.get("scales", {}).items()}
        except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
            raise LedgerError(f"what {source} says of the tuned set cannot be understood: {error!r}") from None
        return cls(values, spaces, scales)

    def check_size(self) -> None:
        """Refuse an aim that a ledger's header has no room for.

        Raises:
            UsageError: it does not.
        """
        sides = [t for space in self.subspaces.values() for t in (space.left, space.right) if t is not None]
        size = sum(4 * t.numel() for t in (*self.values.values(), *sides, *self.scales.values())) * 4 // 3
        if size > JSON_BYTES.value // 2:
            raise UsageError(
                f"what forward passes find for this tuned set takes {size >> 20} MiB, for which the header of a ledger "
                f"has no room ({JSON_BYTES.value >> 21} MiB). Tune fewer layers (--tuned-layers), take a lower rank "
                "(--activation-rank, --lora-r), or leave out --lora-init."
            )


def recorded_aim(ledger: Ledger) -> Aim | None:
    """Return what the run of a ledger found before its first step; None if it found nothing.

    Raises:
        LedgerError: the header's entry cannot be understood.
    """
    recorded = ledger.header.about.get("aim")
    return None if recorded is None else Aim.from_json(recorded, ledger.name)


def num_free(module: nn.Module, aim: Aim | None) -> int:
    """The number of free numbers of a model's tuned tensors: of one with a subspace, the dimensions of that."""
    spaces = {} if aim is None else aim.subspaces
    return sum(_dimensions(t.parameter.shape, spaces.get(t.name)) for t in ParameterSet(module))


def _dimensions(shape: torch.Size, space: Subspace | None) -> int:
    if space is None:
        return shape.numel()
    rows = shape[0] if space.left is None else space.left.shape[1]
    return rows * (shape[1:].numel() if space.right is None else space.right.shape[1])


def _packed(tensor: Tensor) -> dict[str, Any]:
    numbers = tensor.detach().float().cpu().contiguous().numpy().astype("<f4")
    return {"shape": list(tensor.shape), "float32": base64.b64encode(numbers.tobytes()).decode()}


def _unpacked(plain: Any) -> Tensor:
    shape = plain["shape"]
    if not isinstance(shape, list) or not 1 <= len(shape) <= 2 or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"{str(shape)[:80]} is no shape")
    numbers = np.frombuffer(base64.b64decode(plain["float32"], validate=True), dtype="<f4").astype(np.float32)
    if not np.isfinite(numbers).all():
        raise ValueError("it has numbers that are not finite")
    return torch.from_numpy(numbers).reshape(shape)
