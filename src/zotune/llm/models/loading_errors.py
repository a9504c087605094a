"""What is said where a model cannot be loaded: errors of the libraries that read it, in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from pathlib import Path

from zotune.errors import UsageError, ZotuneError, is_out_of_memory, reason_of
from zotune.llm.checkpoints.adapter_source import without_waiting_for_the_hub
from zotune.llm.checkpoints.pretrained import LOADING_ERRORS
from zotune.llm.models.builtin import BUILT_IN
from zotune.llm.models.random_models import ARCHITECTURES


@contextmanager
def errors_in_words(name: str) -> Iterator[None]:
    """Within this context an error of the libraries that read a model is raised in words.

    Raises:
        UsageError: the model cannot be read; the message says why and what to do.
    """
    is_here = Path(name).exists() or name in BUILT_IN or name.startswith("random:")
    try:
        with nullcontext() if is_here else without_waiting_for_the_hub():
            yield
    except (ZotuneError, ImportError):
        raise
    except LOADING_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(_not_loaded_message(name, error)) from None


def _not_loaded_message(name: str, error: Exception) -> str:
    reason = reason_of(error)
    if "custom code" in reason:
        return (
            f"the model {name!r} comes with Python code of its own, without which transformers cannot read it, and "
            "zotune runs no code of a model unasked. If you trust its author, add --trust-remote-code; else use a "
            "model of an architecture that transformers has."
        )
    if "attention implementation" in reason or "attn_implementation" in reason:
        return f"{name} does not run with the attention that was asked for: {reason}"
    if name.endswith(".gguf"):
        return f"{name} is a GGUF file that cannot be read as a model: {reason}"
    if Path(name).is_dir():
        return f"the folder {name!r} does not hold a model that transformers can load: {reason}"
    return _absent_message(name, reason)


def _absent_message(name: str, reason: str) -> str:
    """Return a sentence on a name that is no model's: why, and the nearest name or where to get it."""
    why = f"could not be loaded from the Hub ({reason})"
    if "couldn't connect" in reason or "offline" in reason.lower():
        why = "the Hub cannot be reached from here"
    elif "not a valid model identifier" in reason:
        why = "the Hub has none of that name"
    parent = Path(name).parent
    folders = [str(path) for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    near = get_close_matches(name, [*BUILT_IN, *(f"random:{a}" for a in ARCHITECTURES), *folders], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"give a folder, such as one that `hf download {name}` fetches."
    return f"the model {name!r} is neither built in nor a folder, and {why}; {hint} `zotune models` lists the names."
