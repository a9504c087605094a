"""Reading the configuration and the tokenizer of a model that somebody else made: none of its code runs unasked.

A model's folder may hold Python modules, and its config.json may name kernels for transformers to fetch and load. Both
are refused in words, and nothing asks at the terminal whether to run them. Only the user's own trust_remote_code, on
the command line or as an argument in Python, lets the modules of a model run; nothing lets a kernel be fetched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zotune.errors import UsageError
from zotune.system.bounds import JSON_BYTES, JSON_VALUES, LAYERS, count_values, read_bytes

NO_CODE = {"trust_remote_code": False}
"""The argument of transformers with which it runs no code of a model, and does not ask."""

# Anything else is the name of compiled code on the Hub, or stands for such a name where no package provides it.
_ATTENTION = (None, "eager", "sdpa", "flex_attention")
_EXPERTS = (None, "eager", "batched_mm", "grouped_mm")
_LAYER_COUNTS = ("num_hidden_layers", "num_local_experts", "num_experts")
_TEXT_FILES = ("tokenizer.json", "vocab.json")


def read_config(source: str | Path, **named: Any) -> Any:
    """Read the configuration of a model of transformers.

    Args:
        source: a folder, or a name on the Hub.
        named: further arguments of `from_pretrained`, such as `gguf_file`; with `trust_remote_code` its code may run.

    Raises:
        UsageError: it asks for code of the model or of the Hub, or is too large.
        OSError, ValueError, KeyError: it cannot be read.
    """
    import transformers

    check_metadata(Path(source))
    config = transformers.AutoConfig.from_pretrained(str(source), **{**NO_CODE, **named})
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())):
        _check_part(part, str(source))
    return config


def read_tokenizer(source: str | Path, **named: Any) -> Any:
    """Read a tokenizer of transformers, as `read_config` reads a configuration."""
    import transformers

    check_metadata(Path(source))
    return transformers.AutoTokenizer.from_pretrained(str(source), **{**NO_CODE, **named})


def read_generation_config(source: str | Path, revision: str | None = None) -> Any:
    """Read the generation configuration of a model of transformers, as `read_config` reads its configuration."""
    import transformers

    check_metadata(Path(source))
    at = {} if revision is None else {"revision": revision}
    return transformers.GenerationConfig.from_pretrained(str(source), **at)


def check_metadata(folder: Path) -> None:
    """Check the sizes of the JSON files in a model's folder, which libraries read whole; do nothing for another source.

    Raises:
        UsageError: a file is too large, or has too many values.
        OSError: a file cannot be read.
    """
    if not folder.is_dir():
        return
    files = {*folder.glob("*config.json"), *folder.glob("*.index.json"), *folder.glob("*_tokens*.json")}
    for path in sorted(files | {path for name in _TEXT_FILES if (path := folder / name).exists()}):
        content = read_bytes(path, JSON_BYTES)
        JSON_VALUES.check(count_values(content), str(path))


def _check_part(config: Any, source: str) -> None:
    for key, allowed in (("attn_implementation", _ATTENTION), ("experts_implementation", _EXPERTS)):
        value = getattr(config, f"_{key}", None)
        if value not in allowed:
            raise UsageError(
                f"the configuration of {source} sets {key}: {str(value)[:80]!r}, for which transformers may load "
                f"compiled code from the Hub. Remove the key from its config.json; zotune uses sdpa."
            )
    for key in _LAYER_COUNTS:
        value = getattr(config, key, None)
        if isinstance(value, int):
            LAYERS.check(value, f"{key} in the configuration of {source}")
