"""The memory of a training step, predicted from the architecture alone; no weight is read for a prediction.

Read `workload` (one step as options), `live_memory` and `passes` (bytes of a pass, counted on the `meta` device),
`memory` (their sum with weights and state) and `predict`. `formulas` holds the paper's formulas; `planning`, `search`,
`options` and `report` make `zotune plan`, and `dry_run` makes `zotune train --dry-run`. `process_memory` measures one
step in a fresh process.
"""

from zotune.plan.memory import Memory as Memory
from zotune.plan.predict import predict as predict
