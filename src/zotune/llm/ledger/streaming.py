"""A fine-tune rebuilt one tensor at a time, so that it may be larger than memory: read, moved, written.

The model is there as shapes only. Each of its tensors is asked for by name, and made when it is: a base's file gives
it, a ledger moves it, a mean is taken of several, each a function around the last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zotune.ledger import Ledger, LedgerError
from zotune.ledger.replay import check, digest_of
from zotune.ledger.stream import Trace
from zotune.llm.config.run import ModelOptions, TrainConfig
from zotune.llm.models.builtin import BUILT_IN, fetch
from zotune.llm.models.load import LanguageModel, find_device
from zotune.llm.models.meta_model import skeleton
from zotune.llm.models.safetensors_shards import MAX_SHARD_SIZE, Checkpoint, write_shards
from zotune.llm.models.tuned_parameters import prepare
from zotune.llm.tasks import head_labels
from zotune.llm.training.optimizers import make_optimizer
from zotune.llm.training.resume import combined_digest
from zotune.optim.zeroth_order import ZerothOrder

# A tensor's name to its numbers, on the CPU and the caller's to keep.
Weights = Callable[[str], Tensor]


class NotStreamedError(Exception):
    """The model cannot be had tensor by tensor; why."""


@dataclass(frozen=True)
class Streamed:
    """A model whose numbers are made when they are asked for.

    Attributes:
        lm: the model on `meta`; what is tuned requires a gradient.
        shapes: by the names that it is saved under, its tensors on `meta`.
        tensor: gives the numbers of a name.
    """

    lm: LanguageModel
    config: TrainConfig
    shapes: dict[str, Tensor]
    tensor: Weights

    @property
    def names(self) -> frozenset[str]:
        """What there is."""
        return frozenset(self.shapes)

    def write(self, folder: Path, max_shard_size: str = MAX_SHARD_SIZE) -> None:
        """Write what transformers loads as it is, with no more than one tensor in memory at a time."""
        module: Any = self.lm.module
        module.config.dtype = str(module.dtype).removeprefix("torch.")
        module.config.architectures = [type(module).__name__]
        module.config.save_pretrained(str(folder))
        if module.can_generate():
            module.generation_config.save_pretrained(str(folder))
        self.lm.tokenizer.save_pretrained(str(folder))
        write_shards(folder, self.shapes, self.tensor, module.num_parameters(), max_shard_size)

    def moved(self, ledger: Ledger, config: TrainConfig, *, from_base: bool) -> Streamed:
        """The model after a ledger's steps; if they began `from_base`, each tensor's digest is checked when it is made.

        Raises:
            LedgerError: the ledger is of another model or method.
            NotStreamedError: its steps move no tensor without the others.
        """
        optimizer = make_optimizer(self.lm.module, config, config.seed, reuse_prefix=False)
        assert isinstance(optimizer, ZerothOrder)
        if not Trace.is_possible(optimizer):
            raise NotStreamedError("its masks follow the weights of all tensors as they move")
        known = {t.name: (str(t.parameter.dtype), list(t.parameter.shape)) for t in optimizer.tuned}
        if known != {t["name"]: (f"torch.{t['dtype']}", t["shape"]) for t in ledger.header.tensors}:
            raise NotStreamedError("the shapes of its tensors are not known before they are read")
        if from_base:
            check(optimizer, ledger, digests=False)
        device, before = find_device(config.device), self.tensor
        trace = Trace(optimizer, ledger, lambda t: before(t.name))
        digests = {t["name"]: t["digest"] for t in ledger.header.tensors} if from_base else {}

        def tensor(name: str) -> Tensor:
            x, tuned = before(name), optimizer.tuned.named(name)
            if tuned is None:
                return x
            if digests and (found := digest_of(x)) != digests[tuned.name]:
                raise LedgerError(
                    f"{ledger.name} belongs to another base model: the digest of {tuned.name!r} was "
                    f"{digests[tuned.name]}, here it is {found}. Replay it on the model that the run began with."
                )
            on_device = x.to(device).contiguous()
            trace.apply(tuned.name, on_device.view(-1))
            return on_device.cpu()

        return replace(self, config=config, tensor=tensor)


def base_of(ledger: Ledger, config: TrainConfig) -> Streamed:
    """The base model of a ledger's run, with nothing of it in memory.

    Raises:
        NotStreamedError: it is not to be had tensor by tensor.
        LedgerError: weights that are not tuned are others than the run's.
    """
    if config.is_adapter:
        raise NotStreamedError("an adapter begins with random numbers that its library draws")
    if config.is_gguf or config.quantization not in (None, "none"):
        raise NotStreamedError("its base is packed")
    source = _source(config)
    checkpoint = _checkpoint(source)
    lm, _ = skeleton(config)
    if lm.masked and not lm.classifies and head_labels(config):
        raise NotStreamedError("its classification head begins with random numbers that its library draws")
    prepare(lm, config)
    module: Any = lm.module
    if module.can_generate():
        _read_generation(module, source)
    state, sources = module.state_dict(), _sources(module, checkpoint)
    for name, key in sources.items():
        if checkpoint.shape(key) != tuple(state[name].shape):
            raise NotStreamedError(f"its file has another shape of {name}")

    def tensor(name: str) -> Tensor:
        return checkpoint.tensor(sources[name]).to(state[name].dtype)

    _check_frozen(ledger, config, module, tensor)
    return Streamed(lm, config, _saved(module, state), tensor)


def mean(streams: Iterable[Streamed]) -> Streamed:
    """The mean of several models' tuned weights, taken in float64 and rounded once."""
    first, *others = streams
    tuned = {name for name, p in first.lm.module.named_parameters(remove_duplicate=False) if p.requires_grad}

    def tensor(name: str) -> Tensor:
        x = first.tensor(name)
        if name not in tuned:
            return x
        total = x.double()
        for other in others:
            total += other.tensor(name)
        return (total / (1 + len(others))).to(x.dtype)

    return replace(first, tensor=tensor)


def _source(options: ModelOptions) -> str:
    """The folder of the base model, or its name on the Hub."""
    name = options.model
    if name.startswith("random:") or (Path(name) / "adapter_config.json").is_file():
        raise NotStreamedError(f"{name} is no folder of weights")
    return str(fetch(name, accept_terms=options.accept_terms)) if name in BUILT_IN else name


def _checkpoint(source: str) -> Checkpoint:
    """The base model's safetensors files: a folder's, or those of the Hub's cache."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    def find(file: str) -> str | None:
        found: str | None = cached_file(source, file, _raise_exceptions_for_missing_entries=False)
        return found

    try:
        if (single := find(SAFE_WEIGHTS_NAME)) is not None:
            return Checkpoint([Path(single)])
        if (index := find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
            shards = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
            return Checkpoint([Path(found) for shard in sorted(shards) if (found := find(shard)) is not None])
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise NotStreamedError(f"its files cannot be found one by one ({error})") from None
    raise NotStreamedError(f"{source} has no safetensors files")


def _read_generation(module: Any, source: str) -> None:
    """Let the model know what its folder says of generation, which is saved with it; it has no say in weights."""
    from transformers import GenerationConfig

    with suppress(OSError):  # there is no such file: what the model's configuration says holds
        module.generation_config = GenerationConfig.from_pretrained(source)


def _sources(module: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Under which name the checkpoint has each of the model's tensors: its own, or that of a tensor tied to it."""
    groups: dict[int, list[str]] = {}
    for name in module.state_dict():
        groups.setdefault(id(module.get_parameter_or_buffer(name)), []).append(name)
    found: dict[str, str] = {}
    for names in groups.values():
        key = next((name for name in names if name in checkpoint.names), None)
        if key is None:
            raise NotStreamedError(f"its files do not hold {names[0]} under that name")
        found |= dict.fromkeys(names, key)
    return found


def _saved(module: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers saves of a model's tensors: of those that are tied, one."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = set(module._keys_to_ignore_on_save or ())
    kept = {name: value for name, value in state.items() if name not in ignored}
    found: dict[str, Tensor] = remove_tied_weights_from_state_dict(kept, module)
    return found


def _check_frozen(ledger: Ledger, config: TrainConfig, module: nn.Module, tensor: Weights) -> None:
    names = sorted(name for name, p in module.named_parameters() if not p.requires_grad)
    found, expected = combined_digest(names, (digest_of(tensor(name)) for name in names)), ledger.header.about["frozen"]
    if found != expected:
        raise LedgerError(
            f"{ledger.name} belongs to another base model than {config.model}: the digest of the weights that are not "
            f"tuned was {expected}, here it is {found}. Name the right one with --base."
        )
