"""The files of a model: weights or adapter, configuration and tokenizer, for transformers or peft to load."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from zotune.errors import NotWrittenError, reason_of
from zotune.llm.checkpoints.adapter_merge import is_adapter
from zotune.llm.checkpoints.adapter_source import CONFIG
from zotune.llm.checkpoints.companions import write_companions
from zotune.llm.checkpoints.fingerprint import write_fingerprint
from zotune.llm.checkpoints.hub_names import HUB_IDS, name_base_for_all
from zotune.llm.checkpoints.safetensors_shards import MAX_SHARD_SIZE, write_shards
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.quantized.gguf_output import write_tuned
from zotune.llm.quantized.layers import has_packed_layers
from zotune.llm.quantized.scales import save_pretrained
from zotune.model.mapped_memory import release
from zotune.model.shards import gathered
from zotune.model.streaming import settle, stream_of

_WEIGHTS = re.compile(r"(adapter_|tuned_)?model(-.*)?\.safetensors(\.index\.json)?")


def old_weights(names: Iterable[str]) -> list[str]:
    """Return those names of files that hold weights, which could otherwise remain beside weights of other names."""
    return [name for name in names if _WEIGHTS.fullmatch(name)]


def is_write_error(error: Exception) -> bool:
    """Whether an error says that files could not be written; of a tokenizer it is a plain `Exception`."""
    return isinstance(error, OSError | RuntimeError | SafetensorError) or type(error) is Exception


@contextmanager
def write_errors_in_words() -> Iterator[None]:
    """Within this context a library that cannot write a file raises an error in words; its own is of no known kind.

    Raises:
        NotWrittenError: safetensors, or tokenizers, which raises a plain `Exception`, could not write a file.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, SafetensorError) and type(error) is not Exception:
            raise
        raise NotWrittenError(f"the model's files could not be written: {reason_of(error)}") from None


@write_errors_in_words()
def whole_state(lm: LanguageModel) -> dict[str, Any] | None:
    """Return the weights of a model in shards, whole, in the process that writes them; None for any other model.

    They are gathered one after the other, which every process has to take part in. Of an adapted model they are those
    of the adapter alone.
    """
    if not lm.mesh.is_sharded:
        return None
    own = lm.module.state_dict(keep_vars=True)
    if is_adapter(lm.module):
        own = {name: p for name, p in own.items() if f".{lm.module.active_adapter}." in name}
    state: dict[str, Any] = gathered(own, keep=lm.mesh.processes.is_first)
    return state


def write_model_files(
    lm: LanguageModel, folder: Path, max_shard_size: str = MAX_SHARD_SIZE, state: dict[str, Any] | None = None
) -> None:
    """Write weights or adapter, config and tokenizer; the weights of a model in shards are those of `state`.

    Raises:
        OSError, NotWrittenError: a file cannot be written.
    """
    settle(lm.module)
    if not is_adapter(lm.module) and has_packed_layers(lm.module):
        write_tuned(lm.module, folder)
        write_fingerprint(folder, lm.base_fingerprint)
        return
    if not is_adapter(lm.module) and stream_of(lm.module) is not None and not _is_converted(lm.module):
        state = saved_tensors(lm.module, lm.module.state_dict())
        write_by_tensor(lm, folder, state, _one_by_one(state), max_shard_size)
        return
    # Without this option, peft asks the Hub for the base model's vocabulary when it saves an adapter.
    extra: dict[str, Any] = (
        {"save_embedding_layers": False} if is_adapter(lm.module) else {"max_shard_size": max_shard_size}
    )
    if state is not None:
        extra["state_dict"] = state
    card = folder / "README.md"
    has_card = card.exists()
    if is_adapter(lm.module):
        name_base_for_all(lm.module)
    save_pretrained(lm.module, str(folder), **extra)
    if not has_card:  # the form of a card that peft writes, with nothing filled in
        card.unlink(missing_ok=True)
    if is_adapter(lm.module):
        _order_sets(lm.module, folder / CONFIG)
        write_fingerprint(folder, lm.base_fingerprint, built_in=_built_in(lm))
    else:
        write_companions(folder, lm.companions)
    lm.tokenizer.save_pretrained(str(folder))


def _is_converted(module: Any) -> bool:
    """Whether transformers writes other tensors than the model has, as of mixtures of experts."""
    return bool(getattr(module, "_weight_conversions", None))


def _one_by_one(state: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    """A function from a name to its tensor on the CPU; a mapped one takes no memory once the next is asked for."""
    last: list[Tensor] = []

    def tensor(name: str) -> Tensor:
        for x in last:
            release(x)
        last[:] = [state[name].detach()]
        return last[0].cpu()

    return tensor


def saved_tensors(module: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a model that transformers saves: one of each group of tied tensors."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = set(module._keys_to_ignore_on_save or ())
    state = {name: value for name, value in state.items() if name not in ignored}
    tensors: dict[str, Tensor] = remove_tied_weights_from_state_dict(state, module)
    return tensors


def write_by_tensor(
    lm: LanguageModel,
    folder: Path,
    shapes: Mapping[str, Tensor],
    tensor: Callable[[str], Tensor],
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write a whole model's folder as transformers does, with one tensor in memory at a time.

    Args:
        lm: the model, whose weights need not be in memory.
        folder: an existing folder.
        shapes: tensors of the dtypes and shapes to write, by name, see `saved_tensors`.
        tensor: returns the values of a name on the CPU.
        max_shard_size: maximum size of a file.

    Raises:
        OSError, NotWrittenError: a file cannot be written.
    """
    module: Any = lm.module
    module.config.dtype = str(module.dtype).removeprefix("torch.")
    module.config.architectures = [type(module).__name__]
    module.config.save_pretrained(str(folder))
    if module.can_generate():
        module.generation_config.save_pretrained(str(folder))
    lm.tokenizer.save_pretrained(str(folder))
    write_companions(folder, lm.companions)
    write_shards(folder, shapes, tensor, module.num_parameters(), max_shard_size)


def _order_sets(module: Any, file: Path) -> None:
    """Write the sets of an adapter's configuration in order: peft's order differs from process to process."""
    sets = [name for name, value in vars(module.active_peft_config).items() if isinstance(value, set)]
    if sets:
        values = json.loads(file.read_text(encoding="utf-8"))
        values |= {name: sorted(values[name]) for name in sets}
        file.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def _built_in(lm: LanguageModel) -> str | None:
    name = str(lm.base.name_or_path)
    return name if name in HUB_IDS else None
