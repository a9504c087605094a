"""The memory of a training step, predicted from the architecture alone; no weight is read for a prediction.

Read `workload` (one step as options), `live_memory` and `passes` (bytes of a pass, counted on the `meta` device),
`memory` (their sum with weights and state), `placed` (weights on several devices, a disk, or in several processes) and
`predict`. `formulas` holds the paper's formulas; `planning`, `search`, `options` and `report` make `zotune plan`, and
`dry_run` and `shown_rows` make `zotune train --dry-run`. `process_memory` measures one step in a fresh process.
"""

from typing import TYPE_CHECKING

from zotune.system.lazy_names import lazy_names

if TYPE_CHECKING:
    from zotune.plan.memory import Memory as Memory
    from zotune.plan.predict import predict as predict

# Imported at their first use, so that `zotune plan --help` answers before torch is loaded.
_HOME = {"Memory": "memory", "predict": "predict"}

__all__ = sorted(_HOME)

__getattr__ = lazy_names(__name__, _HOME)
