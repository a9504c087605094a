"""The folder of an adapter of peft: its base model, its tokenizer, and its tensors, each of which finds its place."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import UsageError, ZotuneError, is_out_of_memory, listed, reason_of
from zotune.llm.checkpoints.adapter_config import check_adapter_config
from zotune.llm.checkpoints.adapter_source import find_adapter
from zotune.llm.checkpoints.hub_names import built_in_name
from zotune.llm.checkpoints.no_code import check_metadata
from zotune.llm.checkpoints.pretrained import LOADING_ERRORS
from zotune.llm.checkpoints.stand_ins import stand_ins
from zotune.model.shards import is_distributed, is_tensor_parallel
from zotune.system.bounds import JSON_BYTES, read_bytes, read_json

# Initialisations of LoRA that leave the base as it is, or move it by a function of its weights alone. The others move
# it by random draws or by data (pissa_niter_*, corda, lora_ga, loftq), so that loading the adapter cannot repeat them.
REPEATABLE_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica", "pissa", "olora")
NORM_OF_A_MODEL = "Unsupported layer type '<class 'transformers.*Norm'>'"
"""peft's warning of a norm of another class than torch's own, which `ln_tuning` calls as it is."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter in a folder.

    Attributes:
        path: the folder.
        config: its configuration of peft.
        base: the name or folder of its base model.
        revision: the revision of that model on the Hub, if the adapter names one.
    """

    path: Path
    config: Any
    base: str
    revision: str | None = None

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder holds a tokenizer of its own, perhaps with other tokens or another chat template."""
        return any((self.path / name).is_file() for name in _TOKENIZER_FILES)

    @property
    def num_classes(self) -> int:
        """The number of classes of the classification head that is saved with the adapter; 0 without one."""
        from peft.utils import load_peft_weights

        if self.config.task_type != "SEQ_CLS":
            return 0
        weights = load_peft_weights(str(self.path), device="cpu")
        is_head = {k: v.dim() == 2 and "lora_" not in k and k.endswith("weight") for k, v in weights.items()}
        # The output layer has fewer rows than a layer before it.
        return min((v.shape[0] for k, v in weights.items() if is_head[k]), default=0)

    @property
    def chat_template(self) -> str | None:
        """The chat template in a file of its own, if the folder has one."""
        file = self.path / "chat_template.jinja"
        return read_bytes(file, JSON_BYTES).decode("utf-8") if file.is_file() else None


def read_adapter_folder(path: Path) -> AdapterFolder:
    """Read the configuration of the adapter in a folder.

    Raises:
        UsageError: it cannot be read, names no base model, or cannot be loaded as it was saved.
    """
    from peft import PeftConfig

    try:
        check_metadata(path)
        config = PeftConfig.from_pretrained(str(path))
    except (ZotuneError, ImportError):
        raise
    except LOADING_ERRORS as error:
        file = path / "adapter_config.json"
        raise UsageError(f"{file} is no configuration of an adapter of peft: {reason_of(error)}") from None
    base, revision = revised_base_of_adapter(path)
    check_adapter_config(config.to_dict(), f"the adapter in {path}", base)
    check_init(config, f"the adapter in {path}")
    return AdapterFolder(path, config, base, revision)


def base_of_adapter(path: Path) -> str:
    """Return the base model that an adapter's configuration names; a relative path may start at the adapter's folder.

    Raises:
        UsageError: it names none, a folder that is not there, or the adapter itself.
    """
    return revised_base_of_adapter(path)[0]


def revised_base_of_adapter(path: Path) -> tuple[str, str | None]:
    """As `base_of_adapter`, with the base model's revision on the Hub, if the adapter names one.

    Raises:
        UsageError: it names none, a folder that is not there, or the adapter itself.
    """
    base, revision = _named_base(path)
    seen, folder = {path.resolve()}, find_adapter(base, revision)
    while folder is not None:
        if folder.resolve() in seen:
            raise UsageError(
                f"the adapter in {path} names itself as its base model, directly or by way of other adapters ({base}). "
                f"Write the base model's name or folder into {path / 'adapter_config.json'}."
            )
        seen.add(folder.resolve())
        folder = find_adapter(*_named_base(folder))
    return base, revision


def _named_base(path: Path) -> tuple[str, str | None]:
    """Return the base model that the configuration of the adapter in a folder names, and its revision."""
    file = path / "adapter_config.json"
    try:
        values = read_json(file)
        base, revision = values.get("base_model_name_or_path"), values.get("revision")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"{file} is no configuration of an adapter: {error}") from None
    if not base or not isinstance(base, str):
        raise UsageError(f'{file} names no base model; write its name or folder there as "base_model_name_or_path".')
    if revision is not None and not isinstance(revision, str):
        raise UsageError(f"{file} names the revision {revision!r} of its base model, which is no text; correct it.")
    if (built_in := built_in_name(path, base)) is not None:
        return built_in, None
    if not Path(base).exists() and (path / base).is_dir():
        return str(path / base), None
    is_path = Path(base).is_absolute() or base.startswith(("./", "../")) or base.count("/") > 1
    if is_path and not Path(base).exists():
        raise UsageError(
            f"the adapter in {path} names the base model {base!r}, and there is no such folder, neither from here nor "
            f"from the adapter's folder. Write its place into {file}."
        )
    return base, None if Path(base).exists() else revision


def check_init(config: Any, what: str) -> None:
    """Refuse an initialisation that moves the base in a way that loading the adapter cannot repeat.

    Raises:
        UsageError: `config` has such an initialisation.
    """
    init = getattr(config, "init_lora_weights", True)
    if init not in REPEATABLE_INITS:
        raise UsageError(
            f"{what} has init_lora_weights: {init!r}, which changes the weights of the base model by random draws or "
            "by data, so that the saved adapter would be loaded onto another base than it was tuned on. Use one of: "
            f"true, {', '.join(str(name) for name in REPEATABLE_INITS if isinstance(name, str))}; or convert the "
            "adapter with peft (save_pretrained with path_initial_model_for_weight_conversion)."
        )


def with_adapter(base: Any, folder: AdapterFolder, num_tokens: int) -> Any:
    """Return a base model with the adapter in a folder.

    Args:
        base: the base model; its embedding gets the rows of the adapter's, if these are more.
        folder: the adapter.
        num_tokens: number of tokens of the tokenizer.

    Raises:
        UsageError: a tensor of the adapter is missing, has no place in the base or another shape; the message names it.
    """
    from peft import PeftModel, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    path = str(folder.path)
    own = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
    try:
        weights = load_peft_weights(path, device="cpu")
        _resize_embedding(base, folder, weights, num_tokens)
        own |= {id(tensor) for tensor in base.parameters()}
        device = next(base.parameters()).device
        # FSDP2 would miss its slices, and its layers have the sizes of whole matrices anyway.
        whole = stand_ins(base, device, offloaded=False) if is_tensor_parallel(base) else nullcontext()
        with warnings.catch_warnings(), whole:
            warnings.filterwarnings("ignore", message=".*to a meta parameter in the current model, which is a no-op")
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # they are errors below
            warnings.filterwarnings("ignore", message=NORM_OF_A_MODEL)
            model: Any = PeftModel.from_pretrained(base, path)
            info = set_peft_model_state_dict(model, weights)
    except (ZotuneError, ImportError):
        raise
    except LOADING_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(_misfit_message(folder, error)) from None
    # The tensors of virtual tokens are read apart from the others.
    missing = [name for name in _missing(model, info.missing_keys, own) if not name.startswith("prompt_encoder.")]
    unexpected = _without_place(weights, [key for key in info.unexpected_keys if key != "prompt_embeddings"])
    if missing or unexpected:
        which = f"does not hold {listed(missing)}" if missing else f"holds {listed(unexpected)}, which has no place"
        raise UsageError(
            f"the adapter in {path} {which} in the base model {folder.base}. Is it the adapter of another base model?"
        )
    # A relative path in the file starts at the adapter's folder; what goes on from it is saved elsewhere.
    model.active_peft_config.base_model_name_or_path = folder.base
    return model


def _without_place(weights: dict[str, Tensor], unexpected: list[str]) -> list[str]:
    """Return the tensors that have no place; peft saves a resized embedding under two names, of which one has."""
    arrived = [value for key, value in weights.items() if key not in unexpected]

    def is_copy(key: str) -> bool:
        value = weights.get(key)
        return value is not None and any(v.shape == value.shape and torch.equal(v, value) for v in arrived)

    return sorted(key for key in unexpected if not is_copy(key))


def _missing(model: nn.Module, absent: list[str], own: set[int]) -> list[str]:
    """Return the adapter's parameters that got no values; a shared parameter gets them under one of its names."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) not in own:
            names.setdefault(id(p), []).append(name)
    without = set(absent)
    return sorted(group[0] for group in names.values() if without.issuperset(group))


def _resize_embedding(base: Any, folder: AdapterFolder, weights: dict[str, Tensor], num_tokens: int) -> None:
    """Give the base's embedding as many rows as the adapter's own embedding has."""
    embedding = base.get_input_embeddings()
    here = int(getattr(embedding, "num_embeddings", num_tokens))
    name = next(name for name, m in base.named_modules() if m is embedding)
    found = [
        value.shape[1 if "lora_embedding_A" in key else 0]
        for key, value in weights.items()
        if f".{name}." in key and (key.endswith("weight") or "lora_embedding_A" in key)
    ]
    rows = max(found, default=here)
    if num_tokens > max(rows, here):
        raise UsageError(
            f"the tokenizer in {folder.path} has {num_tokens} tokens, but the embedding of {folder.base} has {here} "
            "rows and the adapter holds none of its own. Save the adapter with its embedding (save_embedding_layers)."
        )
    if rows == here:
        return
    if is_distributed(embedding.weight):
        raise UsageError(
            f"the adapter in {folder.path} has an embedding of {rows} rows, but that of {folder.base} has {here} and "
            "lies in shards, which cannot be resized. Merge it first, without --shard: zotune merge."
        )
    if not isinstance(embedding, nn.Embedding) or not embedding.weight.is_floating_point():
        raise UsageError(
            f"the adapter in {folder.path} has an embedding of {rows} rows, but that of the quantised base "
            f"{folder.base} has {here} and cannot be resized. Load it without --quantization."
        )
    # The adapter's tensors replace those of the base, so the values of new rows do not matter.
    with torch.random.fork_rng(devices=[]):
        base.resize_token_embeddings(rows, mean_resizing=False)


def _misfit_message(folder: AdapterFolder, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    reason = next((line for line in lines if "size mismatch" in line), reason_of(error))
    if isinstance(error, KeyError):
        reason = f"it does not hold {error.args[0]}"
    return (
        f"the adapter in {folder.path} does not fit its base model {folder.base}: {reason} Is it the adapter of "
        "another base model?"
    )
