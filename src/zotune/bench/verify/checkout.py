"""The code of stored results, from a checkout of their commit, beside today's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zotune.bench.keys.content_key import PACKAGE
from zotune.bench.run.runner import commit
from zotune.errors import UsageError
from zotune.system.child_python import python


def commit_of(checkout: Path) -> str:
    """Return the commit of another checkout of this package.

    Raises:
        UsageError: the folder is no checkout, or was changed.
    """
    package = checkout / "src" / PACKAGE.name
    name = commit(package) if package.is_dir() else "unknown"
    if name == "unknown" or name.endswith("+"):
        why = "was changed" if name.endswith("+") else "is no checkout"
        raise UsageError(f"--against takes a checkout of the commit that results are of, and {checkout} {why}.")
    return name


def with_checkout(slots: Sequence[Any], checkout: Path | None) -> list[tuple[Any, Any]]:
    """Return each executor of today's code with one of that checkout's; None without a checkout."""
    if checkout is None:
        return [(slot, None) for slot in slots]
    source = (checkout / "src").resolve()
    worker = next(iter(sorted(source.glob("*/bench/**/worker.py")))).relative_to(source).with_suffix("")
    command = tuple(python("-m", ".".join(worker.parts)))
    return [(slot, replace(slot, command=command, source=source)) for slot in slots]
