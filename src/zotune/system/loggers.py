"""The loggers of libraries that warn at import, or of what only their developers can act on."""

from __future__ import annotations

import logging

_TALKATIVE = (
    "accelerate",
    "transformers",
    "huggingface_hub",
    "datasets",
    "peft",
    "bitsandbytes",
    "torchao",
    "torch.utils._pytree",
)


def quiet_loggers() -> None:
    """Let these libraries log errors alone; zotune shows progress and messages of its own. It imports none of them."""
    for name in _TALKATIVE:
        # Setting a level makes every logger of the process forget what it has cached.
        if (logger := logging.getLogger(name)).level != logging.ERROR:
            logger.setLevel(logging.ERROR)
