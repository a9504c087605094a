"""What the processes of a run compare: at the start what each begins with, on the way the tuned weights."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

import zotune
from zotune.errors import UsageError, listed
from zotune.ledger.replay import tuned_digests
from zotune.model.parameters import ParameterSet
from zotune.system.processes import PeerError, Processes

_LIBRARIES = ("torch", "numpy", "transformers", "peft", "tokenizers")


class RanksDifferError(PeerError):
    """The processes of a run no longer have the same weights."""


def check_start(processes: Processes, parts: Mapping[str, Any]) -> None:
    """Check that all processes begin a run with the same.

    Args:
        processes: those of the run.
        parts: what the run begins with, by name: values that JSON can write, digests of larger ones.

    Raises:
        UsageError: some differ; the message names what differs, and in which processes.
    """
    if processes.size == 1:
        return
    found = processes.every(lambda: {name: _text(value) for name, value in {**parts, **_machine()}.items()})
    for name in found[0]:
        values = [one.get(name, "") for one in found]
        if len(set(values)) > 1:
            raise UsageError(_difference(name, values))


def _difference(name: str, values: list[str]) -> str:
    common, others = _odd_ones(values)
    shown = f": {common[:60]} and {values[others[0]][:60]}" if len(common) < 200 else ""
    return (
        f"the processes do not begin with the same {name}: {_ranks(others)} differ{'s' * (len(others) == 1)} from the "
        f"others{shown}. Give all machines the same files, versions and options."
    )


def _odd_ones(values: list[str]) -> tuple[str, list[int]]:
    """Return the value that most processes have, and the ranks of those that have another."""
    common = Counter(values).most_common(1)[0][0]
    return common, [rank for rank, value in enumerate(values) if value != common]


def _ranks(ranks: list[int]) -> str:
    return f"process{'es' * (len(ranks) > 1)} {listed(map(str, ranks), 8)}"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _machine() -> dict[str, Any]:
    """Return what the bits of a forward pass depend on besides the model."""
    is_gpu = torch.cuda.is_available()
    return {
        "version of zotune": zotune.__version__,
        **{f"version of {name}": version(name) for name in _LIBRARIES},
        "version of Python": platform.python_version_tuple()[:2],
        "number of threads (OMP_NUM_THREADS)": torch.get_num_threads(),
        "kind of processor": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "kind of GPU": torch.cuda.get_device_name() if is_gpu else None,
    }


def check_weights(processes: Processes, module: nn.Module, step: int) -> None:
    """Check that all processes have the same tuned weights after a step.

    Raises:
        RanksDifferError: some differ; the message names the step and the processes.
    """
    if processes.size == 1:
        return
    digests = processes.every(lambda: tuned_digest(module))
    if len(set(digests)) == 1:
        return
    _, others = _odd_ones(digests)
    raise RanksDifferError(
        f"after step {step} the tuned weights of {_ranks(others)} are others than those of the rest, although all took "
        "the same steps: memory or a processor fails there, or its libraries compute otherwise. Nothing more was "
        "saved; --resume goes on from the ledger once the machine is repaired or left out."
    )


def tuned_digest(module: nn.Module) -> str:
    """Return a digest of the tuned tensors."""
    tuned = ParameterSet(module)
    parts = [*(t.name for t in tuned), *tuned_digests(tuned)]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
