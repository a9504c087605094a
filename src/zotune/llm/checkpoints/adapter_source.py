"""Where an adapter is: in a folder, or in a repository on the Hub, whose files are copied to the Hub's cache.

A repository holds an adapter if it has a configuration of one, as peft and transformers tell. Its files are taken by
name, so that nothing else of the repository is downloaded: no checkpoints of a training, no code.
"""

from __future__ import annotations

import re
from pathlib import Path

CONFIG = "adapter_config.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = (
    *(CONFIG, "adapter_model.safetensors", "adapter_model.bin", "base_model.json", "config.yaml"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
)


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds an adapter of peft."""
    return (path / CONFIG).is_file()


def find_adapter(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of an adapter by its path or its name on the Hub, or None if the name is not of an adapter.

    Args:
        name: any value of the option `model`.
        revision: branch, tag or commit of the repository on the Hub.

    Raises:
        OSError, ValueError: the repository cannot be read.

    >>> find_adapter("random:llama-tiny") is None
    True
    """
    folder = Path(name)
    if is_adapter_folder(folder):
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(name) or name.endswith(".gguf"):
        return None
    return _of_hub(name, revision)


def _of_hub(name: str, revision: str | None) -> Path | None:
    """Return the copy of a repository on the Hub if it holds an adapter."""
    from huggingface_hub import snapshot_download
    from transformers.utils import cached_file

    quiet = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    try:
        if cached_file(name, CONFIG, revision=revision, **quiet) is None:
            return None
    except OSError:  # no such repository or revision: whoever loads the model says so in words
        return None
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))
