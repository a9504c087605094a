"""Rebuilding a fine-tuned model one tensor at a time, so that it may be larger than memory.

Only the shapes of the model are in memory. Each tensor is computed when it is requested by name: it is read from the
base model's file, updated by the steps of a ledger, or averaged over several models; each of these is a function of
the previous one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zotune.ledger import Ledger, LedgerError
from zotune.ledger.replay import check, digest_of
from zotune.ledger.stream import Trace
from zotune.llm.checkpoints.adapter_source import find_adapter
from zotune.llm.checkpoints.no_code import read_generation_config
from zotune.llm.checkpoints.safetensors_shards import MAX_SHARD_SIZE, Checkpoint
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.builtin import BUILT_IN, fetch
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.meta_model import load_meta_model
from zotune.llm.models.placement.devices import find_device
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.output.model_files import saved_tensors, write_by_tensor, write_errors_in_words
from zotune.llm.tasks import head_labels
from zotune.llm.training.optimizers import make_optimizer
from zotune.llm.training.origin import combined_digest
from zotune.optim.zeroth_order import ZerothOrder
from zotune.system.bounds import read_json

# A function from a tensor's name to its values, on the CPU in memory that the caller may change.
Weights = Callable[[str], Tensor]


class NotStreamedError(Exception):
    """The model cannot be rebuilt one tensor at a time; the message says why."""


@dataclass(frozen=True)
class StreamedModel:
    """A model whose tensors are computed on request.

    Attributes:
        lm: the model on `meta`; tuned parameters require a gradient.
        config: options of the run.
        shapes: its tensors on `meta`, by the names under which they are saved.
        tensor: returns the tensor of a name, after the digest of the base's was checked.
        check_base: reads the base's tensors whose digests were not checked yet, and checks them.
    """

    lm: LanguageModel
    config: TrainConfig
    shapes: dict[str, Tensor]
    tensor: Weights
    check_base: Callable[[], None] = lambda: None

    @property
    def names(self) -> frozenset[str]:
        """The names of the saved tensors."""
        return frozenset(self.shapes)

    @write_errors_in_words()
    def write(self, folder: Path, max_shard_size: str = MAX_SHARD_SIZE) -> None:
        """Write a folder for transformers to load, with one tensor in memory at a time."""
        write_by_tensor(self.lm, folder, self.shapes, self.tensor, max_shard_size)

    def after(self, ledger: Ledger, config: TrainConfig, *, from_base: bool) -> StreamedModel:
        """Return the model after a ledger's steps.

        Args:
            ledger: the steps.
            config: options of the ledger's run.
            from_base: whether the run started from the base model; the digest of each tensor is then checked.

        Raises:
            LedgerError: the ledger is of another model or method.
            NotStreamedError: an update of one tensor needs the other tensors.
        """
        optimizer = make_optimizer(self.lm.module, config, config.seed, reuse_prefix=False)
        assert isinstance(optimizer, ZerothOrder)
        if not Trace.is_possible(optimizer):
            raise NotStreamedError("its masks depend on the weights of all tensors at each step")
        shapes = {t.name: (str(t.parameter.dtype), list(t.parameter.shape)) for t in optimizer.tuned}
        if shapes != {t["name"]: (f"torch.{t['dtype']}", t["shape"]) for t in ledger.header.tensors}:
            raise NotStreamedError("the shapes of its tensors are unknown before they are read")
        check(optimizer, ledger, digests=False)
        device, previous = find_device(config.device), self.tensor
        trace = Trace(optimizer, ledger, lambda t: previous(t.name))
        digests = {t["name"]: t["digest"] for t in ledger.header.tensors} if from_base else {}
        unread = set(digests)

        def base_of(name: str, tuned: str) -> Tensor:
            x = previous(name)
            if digests and (digest := digest_of(x)) != digests[tuned]:
                raise LedgerError(
                    f"{ledger.name} belongs to another base model: the digest of {tuned!r} was "
                    f"{digests[tuned]}, here it is {digest}. Replay it on the model that the run started from."
                )
            unread.discard(tuned)
            return x

        def tensor(name: str) -> Tensor:
            if (tuned := optimizer.tuned.named(name)) is None:
                return previous(name)
            on_device = base_of(name, tuned.name).to(device).contiguous()
            trace.apply(tuned.name, on_device.view(-1))
            return on_device.cpu()

        def check_base() -> None:
            self.check_base()
            for name in sorted(unread):
                base_of(name, name)

        return replace(self, config=config, tensor=tensor, check_base=check_base)


def streamed_base(ledger: Ledger, config: TrainConfig) -> StreamedModel:
    """Return the base model of a ledger's run, without its weights in memory.

    Raises:
        NotStreamedError: the model cannot be rebuilt one tensor at a time.
        LedgerError: the frozen weights differ from those of the run.
    """
    if config.activation_rank is not None or config.direction_scale != "equal":
        raise NotStreamedError("its directions lie in subspaces or have scales of all tensors, which its ledger holds")
    if config.is_adapter:
        raise NotStreamedError("an adapter starts from random weights that its library draws")
    if config.is_gguf or config.quantization not in (None, "none"):
        raise NotStreamedError("its base model is quantised")
    source = _source(config)
    checkpoint = _checkpoint(source, config.model_revision)
    lm, _ = load_meta_model(config)
    if lm.masked and not lm.classifies and head_labels(config):
        raise NotStreamedError("its classification head starts from random weights that its library draws")
    prepare_tuning(lm, config)
    module: Any = lm.module
    if module.can_generate():
        _read_generation_config(module, source, config.model_revision)
    state, sources = module.state_dict(), _sources(module, checkpoint)
    for name, key in sources.items():
        if checkpoint.shape(key) != tuple(state[name].shape):
            raise NotStreamedError(f"its file has another shape for {name}")

    def tensor(name: str) -> Tensor:
        return checkpoint.tensor(sources[name]).to(state[name].dtype)

    _check_frozen(ledger, config, module, tensor)
    return StreamedModel(lm, config, saved_tensors(module, state), tensor)


def mean_of_models(streams: Iterable[StreamedModel]) -> StreamedModel:
    """Return the mean of several models' tuned weights, computed in float64 and rounded once."""
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

    def check_base() -> None:
        for stream in (first, *others):
            stream.check_base()

    return replace(first, tensor=tensor, check_base=check_base)


def _source(options: ModelOptions) -> str:
    """Return the folder of the base model, or its name on the Hub."""
    name = options.model
    if name.startswith("random:") or find_adapter(name, options.model_revision) is not None:
        raise NotStreamedError(f"{name} is not a folder of weights")
    return str(fetch(name, accept_terms=options.accept_terms)) if name in BUILT_IN else name


def _checkpoint(source: str, revision: str | None) -> Checkpoint:
    """Open the safetensors files of the base model, in a folder or in the cache of the Hub."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    def find(file: str) -> str | None:
        path: str | None = cached_file(source, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        return path

    try:
        if (single := find(SAFE_WEIGHTS_NAME)) is not None:
            return Checkpoint([Path(single)])
        if (index := find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
            shards = set(read_json(Path(index))["weight_map"].values())
            return Checkpoint([Path(path) for shard in sorted(shards) if (path := find(shard)) is not None])
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise NotStreamedError(f"its files cannot be found one by one ({error})") from None
    raise NotStreamedError(f"{source} has no safetensors files")


def _read_generation_config(module: Any, source: str, revision: str | None) -> None:
    """Read the generation configuration in the model's folder, which is saved with the model."""
    with suppress(OSError):  # without such a file the model keeps its own configuration
        module.generation_config = read_generation_config(source, revision)


def _sources(module: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the name of each of the model's tensors in the checkpoint: its own, or that of a tensor tied to it."""
    groups: dict[int, list[str]] = {}
    for name in module.state_dict():
        groups.setdefault(id(module.get_parameter_or_buffer(name)), []).append(name)
    sources: dict[str, str] = {}
    for names in groups.values():
        keys = [name for name in names if name in checkpoint.names]
        if not keys:
            raise NotStreamedError(f"its files do not contain {names[0]} under that name")
        key, *others = keys
        # transformers does not tie matrices that differ in the files, whatever the configuration says.
        if any(not torch.equal(checkpoint.tensor(key), checkpoint.tensor(other)) for other in others):
            raise NotStreamedError(f"its files have other values for {others[0]} than for {key}, which it ties")
        sources |= dict.fromkeys(names, key)
    return sources


def _check_frozen(ledger: Ledger, config: TrainConfig, module: nn.Module, tensor: Weights) -> None:
    names = sorted(name for name, p in module.named_parameters() if not p.requires_grad)
    digest, expected = (
        combined_digest(names, (digest_of(tensor(name)) for name in names)),
        ledger.header.about.get("frozen"),
    )
    if digest != expected:
        raise LedgerError(
            f"{ledger.name} belongs to another base model than {config.model}: the digest of the frozen weights was "
            f"{expected}, here it is {digest}. Name the right base with --base."
        )
