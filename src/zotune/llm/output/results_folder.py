"""The output folder of an evaluation: `results.json`, which replaces no results that are there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zotune.errors import UsageError
from zotune.llm.output.json_files import write_json
from zotune.llm.output.locked_folder import LockedFolder
from zotune.llm.output.manifest import CONFIG

RESULTS = "results.json"


@contextmanager
def results_folder(path: Path) -> Iterator[LockedFolder]:
    """Yield a locked folder that an evaluation may write its results into.

    Raises:
        UsageError: it holds results, or a run, whose own results have the same name; or it cannot be written.
    """
    with LockedFolder(path) as folder:
        if os.path.lexists(path / RESULTS):
            raise UsageError(f"{path} holds results already ({RESULTS}); choose another --output-dir.")
        if CONFIG in folder.manifest.files:
            raise UsageError(f"{path} holds a run, which writes its own {RESULTS} there; choose another --output-dir.")
        yield folder


def write_results(folder: LockedFolder, results: dict[str, Any]) -> None:
    """Write the results of an evaluation."""
    with folder.staged() as staging:
        write_json(staging / RESULTS, results)
