"""Where an adapter is: in a folder, or in a repository on the Hub, whose files are copied to the Hub's cache.

A repository holds an adapter if it has a configuration of one, as peft and transformers tell. Its files are taken by
name, so that nothing else of the repository is downloaded: no checkpoints of a training, no code.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIG = "adapter_config.json"
RECIPE = "config.yaml"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = (
    *(CONFIG, "adapter_model.safetensors", "adapter_model.bin", "base_model.json", RECIPE),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
)


_SECONDS_TO_ANSWER = 5.0
_asked: dict[str, tuple[float, bool]] = {}


@contextmanager
def without_waiting_for_the_hub() -> Iterator[None]:
    """Within this context a Hub that does not answer counts as switched off: what is in its cache is read at once.

    huggingface_hub repeats each request for half a minute before it gives up, and a model takes several requests.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(endpoint: str) -> bool:
    """Return whether a server answers, whatever it says; it is asked once a minute."""
    from huggingface_hub import get_session

    when, answered = _asked.get(endpoint, (0.0, False))
    if not when or time.monotonic() - when > 60:
        try:
            get_session().head(endpoint, timeout=_SECONDS_TO_ANSWER)
            answered = True
        except Exception:  # the client's errors have no common base among the versions of huggingface_hub
            answered = False
        _asked[endpoint] = time.monotonic(), answered
    return answered


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds an adapter of peft."""
    return (path / CONFIG).is_file()


def folder_of_run(name: str, revision: str | None = None) -> Path:
    """Return the folder that has the `config.yaml` of a model's run if there is one: its own, or the copy of the Hub's.

    What cannot be read counts as a model without a run; whoever loads the model says why it cannot be. Beside a run's
    whole weights lie its results, so that a `config.yaml` of another tool is told apart.

    Args:
        name: any value of the option `model`.
        revision: branch, tag or commit of the repository on the Hub.

    >>> str(folder_of_run("random:llama-tiny"))
    'random:llama-tiny'
    """
    folder = Path(name)
    if not _is_on_hub(name):
        return folder
    try:
        if (adapter := _of_hub(name, revision)) is not None:
            return adapter
        files = [_cached(name, file, revision) for file in (RECIPE, "results.json")]
    except (OSError, ValueError):
        return folder
    return folder if files[0] is None or files[1] is None else Path(files[0]).parent


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
    return _of_hub(name, revision) if _is_on_hub(name) else None


def _is_on_hub(name: str) -> bool:
    """Whether the name of a model is one of a repository on the Hub."""
    return not Path(name).exists() and _HUB_ID.fullmatch(name) is not None and not name.endswith(".gguf")


def _of_hub(name: str, revision: str | None) -> Path | None:
    """Return the copy of a repository on the Hub if it holds an adapter."""
    from huggingface_hub import snapshot_download

    try:
        if _cached(name, CONFIG, revision) is None:
            return None
    except OSError:  # no such repository or revision: whoever loads the model says so in words
        return None
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))


def _cached(name: str, file: str, revision: str | None) -> str | None:
    """Return the place of the copy of a repository's file, or None if the repository has no such file.

    Raises:
        OSError: there is no such repository or revision.
    """
    from transformers.utils import cached_file

    quiet = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    with without_waiting_for_the_hub():
        place: str | None = cached_file(name, file, revision=revision, **quiet)
    return place
