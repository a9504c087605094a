"""The content key of a result: one hash of its config, code, data and libraries.

Code counts by its computation (`code_hash`): results stay current if code is moved, renamed, commented or reformatted.
Code that only starts runs or shows results does not count.
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

from zotune.bench.keys.code_hash import code_hash

# The folder of the package `zotune`, independent of this module's place in it.
PACKAGE = Path(str(sys.modules[__name__.partition(".")[0]].__file__)).parent
# The functions that compute each job and each kind of cell; `code_hash` follows all their references.
ENTRIES: dict[str, tuple[str, ...]] = {
    "train": ("trained",),
    "evaluate": ("evaluated",),
    "estimate": ("estimated",),
    "step": ("step_taken",),
    "accuracy": ("accuracy", "trained", "evaluated"),
    "quality": ("each_seed", "estimated"),
    **dict.fromkeys(("memory", "time", "theory"), ("each_seed", "step_taken")),
}
# No number of a result depends on this module.
COUNTS_FOR_RESULTS = "never"
_LIBRARIES = ("torch", "transformers", "peft", "numpy")


def key_of(config: Mapping[str, Any], code: str | None = None) -> str:
    """The content key, 16 hexadecimal digits, of a config with today's code and libraries.

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
    """The hash of the code that computes a cell (given by its `kind`) or a job (given by `does`).

    >>> code_of({"does": "train"}) != code_of({"does": "step"})
    True
    """
    every = tuple(sorted({name for names in ENTRIES.values() for name in names}))
    roots = ENTRIES.get(str(config.get("does") or config.get("kind")), every)
    return code_hash(PACKAGE, roots, on_cpu=config.get("device") == "cpu")


@cache
def _data_hash(task: str) -> str:
    """The hash of a task's rows in this repository or package, if there are any."""
    folders = [folder / task for folder in (PACKAGE.parents[1] / "data", *sorted(PACKAGE.rglob("data")))]
    files = [p for folder in folders if folder.is_dir() for p in sorted(folder.glob("*.jsonl*"))]
    return _hash(path.read_bytes() for path in files)


@cache
def _versions() -> dict[str, str]:
    """The versions of the libraries that numbers depend on; "none" for one that is not installed."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    return versions


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]
