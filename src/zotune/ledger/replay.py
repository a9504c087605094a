"""From an optimizer to a header, and from a ledger back to weights: neither data nor a forward pass is needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from zotune.apply.curvature import OfNoise
from zotune.apply.subspace import InSubspace
from zotune.directions.schedule import description_of
from zotune.ledger.files import Ledger, LedgerWriter
from zotune.ledger.format import AnyLayout, Header, Layout, LedgerError
from zotune.ledger.free_layout import FreeLayout
from zotune.model.mapped_memory import release
from zotune.model.parameters import ParameterSet
from zotune.model.shards import is_distributed, whole
from zotune.optim.record import StepRecord
from zotune.optim.zeroth_order import BlockOrder, ZerothOrder

# Functions are recorded by names that do not follow the package's layout, so that a ledger outlives it: by module of
# today, the module name that ledgers hold.
_RECORDED_MODULES = {
    "zotune.apply.line_search": "zotune.steps",
    "zotune.apply.transforms": "zotune.transforms",
    "zotune.estimate.cuda_graph": "zotune.graphs",
    "zotune.estimate.finite_difference": "zotune.estimators",
    "zotune.estimate.forward_mode.gradient_check": "zotune.gradient_check",
    "zotune.estimate.forward_mode.jvp": "zotune.forward_mode",
}


def header_of(
    optimizer: ZerothOrder, about: dict[str, Any] | None = None, *, digests: Sequence[str] | None = None
) -> Header:
    """The header of a run that begins with the present weights.

    Args:
        optimizer: what takes the steps; none has been taken yet.
        about: whatever else is to be known of the run, in plain values.
        digests: those of the tuned tensors, if they are known.

    Raises:
        LedgerError: steps have been taken.
    """
    if optimizer.num_steps:
        raise LedgerError(f"a ledger begins with the first step, but {optimizer.num_steps} have been taken.")
    version = optimizer.tuned.noise_version
    return Header(layout_of(optimizer), describe(optimizer), describe_tensors(optimizer, digests), about or {}, version)


def layout_of(optimizer: ZerothOrder) -> AnyLayout:
    """The numbers in a record of the optimizer's steps."""
    num_blocks = len(optimizer.active_blocks)
    num_estimates = num_blocks if optimizer.block_order == BlockOrder.SEQUENTIAL else 1
    num_groups, precision = len(optimizer.param_groups), "f8" if _tunes_doubles(optimizer) else "f4"
    if not optimizer.has_fixed_records:
        return FreeLayout(num_estimates, num_groups, precision)
    return Layout(num_estimates, num_groups, num_blocks * optimizer.num_queries, precision)


def record_to(writer: LedgerWriter, optimizer: ZerothOrder) -> None:
    """Write each step that the optimizer takes from now on; what is not written of each must not change meanwhile.

    Raises:
        LedgerError: the optimizer, its weights before the first step or the number of its steps is not as the ledger
            says, so a replay would lead to other weights.

    >>> import tempfile, zotune as zo
    >>> from torch import nn
    >>> from zotune.ledger import read
    >>> folder = tempfile.TemporaryDirectory()
    >>> model = nn.Linear(2, 1)
    >>> opt = zo.zo_sgd(model, lr=0.1)
    >>> with LedgerWriter.create(f"{folder.name}/run.zol", header_of(opt)) as writer:
    ...     record_to(writer, opt)
    ...     losses = [opt.step(lambda: model.weight.square().sum() + model.bias.square().sum()) for _ in range(3)]
    >>> len(read(f"{folder.name}/run.zol"))
    3
    >>> folder.cleanup()
    """
    name, count = str(writer.path), optimizer.num_steps
    _check_method(optimizer, writer.header, name)
    if count != writer.num_steps:
        raise LedgerError(
            f"{name} holds {writer.num_steps} steps, but the optimizer has taken {count}: replay the ledger first "
            "(zotune.ledger.replay.replay), or begin another one."
        )
    # Of a model in shards the numbers would have to be gathered by all processes.
    _check_tensors(optimizer, writer.header, name, digests=not optimizer.tuned.is_distributed)
    optimizer.on_step = writer.append


def replay(
    optimizer: ZerothOrder, ledger: Ledger, each: Callable[[StepRecord], None] = lambda record: None
) -> ZerothOrder:
    """Take all steps of a ledger that the optimizer has not taken; the weights and state are then those of its run.

    Args:
        optimizer: made as the run's was, over the base model's weights (or those after its first steps).
        ledger: of the run; `Ledger.first` gives a shorter one.
        each: called after each step.

    Raises:
        LedgerError: the optimizer, its tensors or the base's numbers are not those of the header; nothing was changed.
    """
    check(optimizer, ledger)
    for step in range(optimizer.num_steps, len(ledger)):
        record = ledger[step]
        optimizer.replay_step(record)
        each(record)
    return optimizer


def check(optimizer: ZerothOrder, ledger: Ledger, *, digests: bool | Sequence[str] = True) -> None:
    """Check that the ledger's records belong to this optimizer and these weights.

    Without `digests` no number is read, nor where these are given. Once steps have been taken, numbers are others and
    their digests pass. An optimizer that has taken no step takes over the ledger's version of the noise specification.

    Raises:
        LedgerError: what differs, both values.
    """
    header = ledger.header
    match_noise(optimizer, ledger)
    _check_method(optimizer, header, ledger.name)
    _check_tensors(optimizer, header, ledger.name, digests=digests)
    if (layout := layout_of(optimizer)) != header.layout:
        raise LedgerError(f"{ledger.name} has records with {header.layout}, but this run's have {layout}.")


def _check_tensors(optimizer: ZerothOrder, header: Header, name: str, *, digests: bool | Sequence[str]) -> None:
    with_numbers = bool(digests) and optimizer.num_steps == 0
    given = digests if with_numbers and not isinstance(digests, bool) else None
    found = {t["name"]: t for t in describe_tensors(optimizer, given if with_numbers else [""] * len(optimizer.tuned))}
    for tensor in header.tensors:
        mine = found.pop(tensor["name"], None)
        if mine is None:
            raise LedgerError(f"{name} moves {tensor['name']!r}, which is not tuned here: another base model.")
        for key in ("id", "dtype", "shape", "digest") if with_numbers else ("id", "dtype", "shape"):
            if tensor[key] != mine[key]:
                raise LedgerError(
                    f"{name} belongs to another base model: the {key} of {tensor['name']!r} was "
                    f"{tensor[key]}, here it is {mine[key]}. Replay it on the model that the run began with."
                )
    if found:
        raise LedgerError(f"{name} does not move {min(found)!r}, which is tuned here: another base model.")


def match_noise(optimizer: ZerothOrder, ledger: Ledger) -> None:
    """Let the optimizer make the noise of the version that the ledger was written with.

    Raises:
        LedgerError: it has taken steps of another version.
    """
    version, own = ledger.header.noise_version, optimizer.tuned.noise_version
    if version != own and optimizer.num_steps:
        raise LedgerError(
            f"{ledger.name} is of version {version} of the noise specification, but the optimizer's steps were of "
            f"version {own}: make the optimizer anew."
        )
    optimizer.set_noise_version(version)


def _check_method(optimizer: ZerothOrder, header: Header, name: str) -> None:
    ours, theirs = describe(optimizer), header.method
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise LedgerError(f"{name} is of a run with {key}: {theirs.get(key)}, not {ours.get(key)}.")


def describe(optimizer: ZerothOrder) -> dict[str, Any]:
    """Every constant that an update depends on, in plain values (and the estimator's constants, for readers).

    Tensors are named by their place in the header's list.
    """
    place = {t.id: i for i, t in enumerate(optimizer.tuned)}
    own = {
        "seed": optimizer.seed,
        "sampler": description_of(optimizer.sampler),
        "num_queries": optimizer.num_queries,
        "blocks": [
            b and {"name": b.name, "tensors": sorted(place[t.id] for t in optimizer.tuned if t.id in b.ids)}
            for b in optimizer.blocks
        ],
        "block_order": str(optimizer.block_order),
        "estimator": _function(optimizer.estimator),
        "coefficient": _function(optimizer.coefficient),
        "max_coefficient": optimizer.max_coefficient,
        "transform": _function(optimizer.transform),
        "step": _function(optimizer.line_search),
        "window": optimizer.window,
        "rounding": str(optimizer.rounding),
        "groups": [
            {"weight_decay": group["weight_decay"], "tensors": [place[_id(optimizer, p)] for p in group["params"]]}
            for group in optimizer.param_groups
        ],
    }
    if (choice := optimizer.block_choice.constants) is not None:
        own["block_choice"] = choice
    plain: dict[str, Any] = json.loads(json.dumps(own, default=repr))
    return plain


def describe_tensors(optimizer: ZerothOrder, digests: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Name, id, dtype, shape of each tuned tensor, and a digest of its numbers, which are read if it is not given."""
    tensors = list(optimizer.tuned)
    found = tuned_digests(optimizer.tuned) if digests is None else digests
    return [
        {
            "name": t.name,
            "id": t.id,
            "dtype": str(t.parameter.dtype).removeprefix("torch."),
            "shape": list(t.parameter.shape),
            "digest": digest,
        }
        for t, digest in zip(tensors, found, strict=True)
    ]


def tuned_digests(tuned: ParameterSet) -> list[str]:
    """A digest of the numbers of each tuned tensor; every process of a model in shards has to call this."""
    return digests_of(t.storage() if t.shard is None else t.parameter for t in tuned)


def digests_of(tensors: Iterable[Tensor]) -> list[str]:
    """A 64-bit BLAKE2b digest of each tensor's bytes, in hexadecimal; tensors in shards are gathered one by one."""
    tensors = list(tensors)
    if any(map(is_distributed, tensors)):
        return [digest_of(whole(tensor.detach())) for tensor in tensors]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(digest_of, tensors))


def digest_of(tensor: Tensor) -> str:
    """A 64-bit BLAKE2b digest of a tensor's bytes, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=8)
    for part in _bytes(tensor):
        digest.update(part)
    release(tensor)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Iterator[Any]:
    """The tensor's bytes, some megabytes at a time."""
    flat = tensor.detach().contiguous().view(-1)
    for lo in range(0, flat.numel(), 1 << 22):
        yield flat[lo : lo + (1 << 22)].cpu().view(torch.uint8).numpy()


def _function(function: Any) -> dict[str, Any]:
    """A function by name, with all that is bound to it: arguments, what it closes over, the state of an object.

    What is not bound has no entry, so that the plain functions of this package are described as they always were.
    """
    if isinstance(function, partial):
        bound = {k: _value(v) for k, v in function.keywords.items()}
        return {**_function(function.func), **({"args": _value(function.args)} if function.args else {}), **bound}
    if isinstance(function, InSubspace | OfNoise):
        name = f"{type(function).__module__}.{type(function).__qualname__}"
        return {"name": name, **{k: _value(v) for k, v in vars(function).items()}}
    name = getattr(function, "__qualname__", type(function).__qualname__)
    module = getattr(function, "__module__", "")
    own = {"name": f"{_RECORDED_MODULES.get(module, module)}.{name}"}
    if (constants := getattr(function, "constants", None)) is not None:
        return {**own, **{key: _value(value) for key, value in constants.items()}}
    if module.partition(".")[0] == "zotune":
        return own
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    state = {} if isinstance(function, (FunctionType, type)) else getattr(function, "__dict__", {})
    defaults = getattr(function, "__defaults__", None)
    found = {"closes over": _value(cells), "defaults": _value(defaults or ()), "state": _value(state)}
    return {**own, **{key: value for key, value in found.items() if value}}


def _value(value: Any) -> Any:
    """A value that is bound to a function, in plain values; tensors by shape and digest."""
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "digest": digest_of(value)}
    if isinstance(value, dict):
        return {str(k): _value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_value(v) for v in value]
    return _function(value) if callable(value) else value


def _id(optimizer: ZerothOrder, parameter: Any) -> int:
    tensor = optimizer.tuned.find(parameter)
    assert tensor is not None
    return tensor.id


def _tunes_doubles(optimizer: ZerothOrder) -> bool:
    return any(t.parameter.dtype == torch.float64 for t in optimizer.tuned)
