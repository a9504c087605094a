"""Loading a checkpoint of transformers whose tensors all find their place.

transformers draws tensors that a checkpoint lacks at random, and leaves out those that it has no place for. Here both
are errors that name the tensor. A checkpoint may hold heads of other tasks (the pooler and the next-sentence head of
BERT, a value head): the model does not read them, and one line says so.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from zotune.errors import UsageError, listed
from zotune.llm.checkpoints.model_kind import ModelKind
from zotune.llm.checkpoints.no_code import NO_CODE
from zotune.messages import say

# What the readers of a checkpoint raise when it is damaged or does not fit: anything, for they trust its content.
LOADING_ERRORS = (Exception,)
_WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DistributedDataParallel", "_fsdp_wrapped_module.": "FSDP"}
_GIT_LFS = b"version https://git-lfs"


def read_pretrained(
    source: str, kind: ModelKind, name: str, *, new_head: bool = False, heed: bool = True, **options: Any
) -> Any:
    """Load a checkpoint, and check that each tensor found its place.

    Args:
        source: a folder, or a name on the Hub.
        kind: how the model is read.
        name: its name, for errors.
        new_head: whether the model gets a new head, so that the checkpoint needs to hold its body alone.
        heed: whether to say which heads of other tasks are not read.
        options: further arguments of `from_pretrained`; without `trust_remote_code` no code of the model runs.

    Returns:
        The model of transformers.

    Raises:
        UsageError: a tensor is missing, has no place, or has another shape; the message names it.
        OSError, ValueError, KeyError, RuntimeError: the checkpoint cannot be read.
    """
    _check_files(source)
    # Tensors of another shape are then listed with the missing ones, and are errors here.
    options = {**NO_CODE, **options, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = kind.auto_class.from_pretrained(source, **options)
    check_arrival(model, info, kind, name, new_head=new_head, heed=heed)
    return model


def check_pretrained(source: str, kind: ModelKind, name: str, *, new_head: bool = False, **options: Any) -> None:
    """Check as `read_pretrained` does that each tensor finds its place, without reading values.

    Nothing is downloaded: a model of the Hub is checked if it is in the cache.

    Raises:
        UsageError: as `read_pretrained`.
    """
    absent = () if Path(source).is_dir() else (OSError,)
    with suppress(*absent):
        places = {"device_map": "meta", "local_files_only": bool(absent)}
        read_pretrained(source, kind, name, new_head=new_head, heed=False, **options, **places)


def check_arrival(
    model: Any, info: dict[str, Any], kind: ModelKind, name: str, *, new_head: bool = False, heed: bool = True
) -> None:
    """Check the tensors of a checkpoint that found no place in a model, and those of the model that found no values.

    Args:
        model: the model.
        info: the loading information of transformers: missing, unexpected and mismatched keys.
        kind: how the model is read.
        name: its name, for errors.
        new_head: whether tensors outside the body may be missing.
        heed: whether to say which heads of other tasks are not read.

    Raises:
        UsageError: a tensor that the model reads is missing, has no place, or has another shape.
    """

    def is_read(key: str) -> bool:
        return not (new_head and _is_outside_body(model, key))

    missing, unexpected = sorted(filter(is_read, info["missing_keys"])), sorted(info["unexpected_keys"])
    misshapen = sorted(entry for entry in info["mismatched_keys"] if is_read(entry[0]))
    if misshapen:
        key, found, expected = misshapen[0]
        raise UsageError(
            f"the checkpoint {name} holds {key} in the shape {tuple(found)}, but by its configuration it has the shape "
            f"{tuple(expected)} (tensors of another shape: {len(misshapen)}). Check its config.json."
        )
    if missing:
        raise UsageError(
            f"the checkpoint {name} does not hold {listed(missing)}, which {kind.words} of its configuration reads"
            f"{_hint(model, missing, unexpected)}"
        )
    other_heads = [key for key in unexpected if _is_of_another_head(model, key)]
    if strangers := sorted(set(unexpected) - set(other_heads)):
        raise UsageError(
            f"the checkpoint {name} holds {listed(strangers)}, for which {kind.words} of its configuration has no "
            f"place. Check its config.json: it would compute something else than the model that was saved."
        )
    if other_heads and heed:
        say(f"{name} also holds {listed(other_heads)}: another head, which {kind.words} does not read")


def _check_files(source: str) -> None:
    """Refuse a folder whose weights are pointers of git-lfs in place of the files."""
    for file in (file for pattern in ("*.safetensors", "*.bin") for file in Path(source).glob(pattern)):
        with file.open("rb") as stream:
            if stream.read(len(_GIT_LFS)) == _GIT_LFS:
                raise UsageError(
                    f"{file} is a pointer of git-lfs and not the file itself. Fetch the file with `git lfs pull`."
                )


def _hint(model: Any, missing: list[str], unexpected: list[str]) -> str:
    for prefix, wrapper in _WRAPPERS.items():
        if any(key.startswith(prefix) for key in unexpected):
            return (
                f". Its tensors are named {prefix}…, as {wrapper} wraps a model: save the model inside the wrapper, or "
                f"rename its tensors."
            )
    if all(_is_outside_body(model, key) for key in missing):
        return ": it has no such head. Use a checkpoint with the head; a new one would be random."
    return ". Its files are incomplete, or its config.json belongs to another model."


def _is_outside_body(model: Any, key: str) -> bool:
    """Whether a parameter of a model belongs to a head."""
    return model.base_model is not model and not key.startswith(f"{model.base_model_prefix}.")


def _is_of_another_head(model: Any, key: str) -> bool:
    """Whether a tensor without a place belongs to a head that the model does not have.

    It does if a whole module is unknown beside the body or beside a part of the head; an unknown part of the body or of
    the output layer would change what the model computes. A checkpoint of the body alone names its parts without the
    body's prefix.
    """
    body = model.base_model
    if type(body).__name__ in (model.config.architectures or ()):
        key = f"{model.base_model_prefix}.{key}"
    module, parts = model, key.split(".")
    while len(parts) > 1 and isinstance(inner := getattr(module, parts[0], None), nn.Module):
        module, parts = inner, parts[1:]
    if module is body and module is not model:
        return parts[0] == "pooler"
    is_beside = module is model or (
        any(module is part for part in model.children()) and module is not model.get_output_embeddings()
    )
    return is_beside and len(parts) > 1 and not isinstance(module, nn.ModuleList)
