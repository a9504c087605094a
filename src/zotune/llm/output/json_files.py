"""JSON files, written atomically, with null in place of numbers that JSON cannot represent."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from zotune.system.atomic_write import atomic_write


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(json_safe(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def json_safe(value: Any) -> Any:
    """Return `value` with None in place of NaN and infinities, which JSON cannot represent."""
    if isinstance(value, dict):
        return {k: json_safe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
