"""Where zotune keeps what it fetched or built once."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`ZOTUNE_CACHE`, else `zotune` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ZOTUNE_CACHE") or Path(base) / "zotune")
