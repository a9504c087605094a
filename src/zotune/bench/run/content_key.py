"""What a result is a result of: one hash over config, code, data and libraries.

Code counts by what it computes (`code_hash`): it may move, be renamed, commented or laid out anew, and results stay as
they are. What only starts runs or shows results does not count.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zotune.bench.run.code_hash import code_hash

# The folder of the package, wherever in it this module is.
PACKAGE = Path(str(sys.modules[__name__.partition(".")[0]].__file__)).parent
# The functions that each job of the worker, and each kind of cell, comes from; all that they refer to is followed.
ENTRIES: dict[str, tuple[str, ...]] = {
    "train": ("trained",),
    "evaluate": ("evaluated",),
    "estimate": ("estimated",),
    "step": ("step_taken",),
    "accuracy": ("accuracy", "trained", "evaluated"),
    "quality": ("each_seed", "estimated"),
    **dict.fromkeys(("memory", "time", "theory"), ("each_seed", "step_taken")),
}
# It tells results apart; no number depends on it.
COUNTS_FOR_RESULTS = "never"
_LIBRARIES = ("torch", "transformers", "peft", "numpy")


def key_of(config: Mapping[str, Any], code: str | None = None) -> str:
    """The hash, 16 hexadecimal digits, of a config run by the code and the libraries of today.

    >>> key_of({"task": "sst2"}) == key_of({"task": "sst2"}) != key_of({"task": "rte"})
    True
    """
    parts = {
        "config": config,
        "code": code_of(config) if code is None else code,
        "data": _data_hash(str(config.get("task"))),
        "libraries": _versions(),
    }
    return _hash([json.dumps(parts, sort_keys=True).encode()])


def code_of(config: Mapping[str, Any]) -> str:
    """The hash of the code that such a cell (by its `kind`) or job (by what it `does`) passes through.

    >>> code_of({"does": "train"}) != code_of({"does": "step"})
    True
    """
    every = tuple(sorted({name for names in ENTRIES.values() for name in names}))
    roots = ENTRIES.get(str(config.get("does") or config.get("kind")), every)
    return code_hash(PACKAGE, roots, on_cpu=config.get("device") == "cpu")


@cache
def _data_hash(task: str) -> str:
    """The hash of a task's rows that are shipped, where there are some."""
    folders = [folder / task for folder in (PACKAGE.parents[1] / "data", *sorted(PACKAGE.rglob("data")))]
    files = [p for folder in folders if folder.is_dir() for p in sorted(folder.glob("*.jsonl*"))]
    return _hash(path.read_bytes() for path in files)


@cache
def _versions() -> dict[str, str]:
    """Of the libraries that numbers depend on; "none" where one is not installed."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]
