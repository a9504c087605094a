"""The files that a model of several kinds of input needs beside its weights and its tokenizer: those of its processor.

They are JSON that zotune does not read, and are saved with the model as they are, so that it still reads images or
sound.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from zotune.system.bounds import JSON_BYTES, read_bytes

NAMES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json")
"""The files."""


def read_companions(source: str, revision: str | None = None) -> dict[str, bytes]:
    """Return the contents of the processor's files by name, of a folder or of a repository on the Hub.

    Raises:
        OSError, UsageError: a file cannot be read, or is too large.
    """
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = {}
    for name in NAMES:
        path = cached_file(source, name, revision=revision, **quiet)
        if path is not None:
            found[name] = read_bytes(Path(path), JSON_BYTES)
    return found


def write_companions(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write what `read_companions` returned.

    Raises:
        OSError: a file cannot be written.
    """
    for name, content in files.items():
        (folder / name).write_bytes(content)
