"""Blocks: a partition of the tuned tensors into sets that are estimated apart.

Source: the paper, section 5 (block-wise ZO fine-tuning). A block's coefficient is measured with all
other tensors at rest, so the variance of the whole estimate falls from (d + 1) ‖∇f‖² to the sum of
(d_b + 1) ‖∇_b f‖² over the blocks (Gaussian directions). A direction's parts for different tensors are
independent, so blocks may share a seed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from torch import nn

from zotune.errors import UsageError
from zotune.model.layers import stack_of
from zotune.model.parameters import ParameterSet, TunedTensor, canonical_name
from zotune.model.wrappers import own_paths
from zotune.noise.spec import NOISE_VERSIONS, tensor_id


@dataclass(frozen=True)
class Block:
    """Some of the tuned tensors, by canonical name.

    >>> tensor_id("embed.weight") in Block("embedding", ("embed.weight",)).ids
    True
    """

    name: str
    tensors: tuple[str, ...]

    @cached_property
    def ids(self) -> frozenset[int]:
        """The ids of its tensors, in each version of the noise specification: a run has those of one."""
        return frozenset(tensor_id(name, version) for name in self.tensors for version in NOISE_VERSIONS)


class BlockOrder(StrEnum):
    """Estimate all blocks at the same x (`JOINT`), or each block after the block before it was updated (`SEQUENTIAL`).

    A joint step whose loss is NaN or infinite moves nothing. Of a sequential one the blocks are left out whose own
    losses are; those before and after them have moved.
    """

    JOINT = "joint"
    SEQUENTIAL = "sequential"

    def rounds(self, blocks: tuple[Block | None, ...]) -> list[tuple[Block | None, ...]]:
        """The blocks that are estimated at the same weights, in the order of a step."""
        return [(block,) for block in blocks] if self == BlockOrder.SEQUENTIAL else [blocks]


Blocks = tuple[Block, ...]
# The parameters to partition; by default those of the model that require a gradient.
Params = Iterable[nn.Parameter] | None

_NORM = re.compile("norm", re.IGNORECASE)
_ATTENTION = re.compile("attn|attention", re.IGNORECASE)


def blocks_by_layer(model: nn.Module, params: Params = None) -> Blocks:
    """One block a layer, and one for each module outside the layers (embedding, final norm, head).

    A layer is a member of the model's longest stack (`nn.ModuleList` or `nn.Sequential`); tensors outside it are
    grouped by the module that holds them.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> [(b.name, b.tensors) for b in blocks_by_layer(model)]
    [('0', ('0.weight', '0.bias')), ('2', ('2.weight', '2.bias'))]
    """
    return _group(model, _by_layer(model), params)


def blocks_by_part(model: nn.Module, params: Params = None) -> Blocks:
    """As `blocks_by_layer`, each layer cut in two: its attention, and the rest (feed-forward network and norms).

    >>> class Layer(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.self_attn, self.norm, self.mlp = nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2)
    >>> model = nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])})
    >>> [b.name for b in blocks_by_part(model)]
    ['layers.0.attention', 'layers.0.mlp', 'layers.1.attention', 'layers.1.mlp']
    """
    return _group(model, _by_part(model), params)


def blocks_by_linear(model: nn.Module, params: Params = None) -> Blocks:
    """One block for each module that holds tuned tensors of its own: linear layers, embeddings, norms.

    >>> [b.name for b in blocks_by_linear(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))]
    ['0', '1']
    """
    return _group(model, lambda name: name.rpartition(".")[0] or name, params)


def blocks_by_size(model: nn.Module, max_elements: int, params: Params = None) -> Blocks:
    """Blocks of neighbouring tensors with at most `max_elements` numbers together; a larger tensor is a block of its
    own.

    Raises:
        ValueError: `max_elements` < 1.

    >>> [b.tensors for b in blocks_by_size(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 6)]
    [('0.weight', '0.bias'), ('1.weight', '1.bias')]
    """
    if max_elements < 1:
        raise ValueError(f"a block holds at least one number, got {max_elements=}")
    groups: list[list[TunedTensor]] = []
    room = 0
    for tensor in ParameterSet(model, params):
        size = tensor.parameter.numel()
        if size > room or not groups:
            groups.append([])
            room = max_elements
        groups[-1].append(tensor)
        room -= size
    return tuple(Block(group[0].name, tuple(t.name for t in group)) for group in groups)


BLOCKS: dict[str, Callable[[nn.Module, Params], Blocks]] = {
    "layer": blocks_by_layer,
    "part": blocks_by_part,
    "linear": blocks_by_linear,
}
"""Ways to cut a model by name."""


def check_partition(blocks: Sequence[Block], tuned: ParameterSet) -> None:
    """Check that every tuned tensor is in exactly one block.

    Raises:
        UsageError: one is in none or in several, a block names a tensor that is not tuned, or two have one name.
    """
    twice = [name for name, count in Counter(block.name for block in blocks).items() if count > 1]
    if twice:
        raise UsageError(f"two blocks are called {twice[0]!r}; give each its own name, by which a saved run finds it.")
    owner: dict[str, str] = {}
    for block in blocks:
        for name in block.tensors:
            if name in owner:
                raise UsageError(f"the tensor {name!r} is in two blocks: {owner[name]!r}, {block.name!r}.")
            owner[name] = block.name
    known = {t.name for t in tuned}
    strange = [name for name in owner if name not in known]
    if strange:
        raise UsageError(f"the blocks name {strange[0]!r}, which is not among the {len(tuned)} tuned tensors.")
    missing = [t.name for t in tuned if t.name not in owner]
    if missing:
        raise UsageError(
            f"{len(missing)} tuned tensors are in no block, so they would never move: {', '.join(missing[:5])}. "
            "Add a block for them, or freeze them with requires_grad_(False)."
        )


def _by_layer(model: nn.Module) -> Callable[[str], str]:
    path, layers = stack_of(model)
    own = canonical_name([own_paths(model)[path]])
    prefix = f"{own}." if own else ""

    def block_of(name: str) -> str:
        if layers and name.startswith(prefix):
            return prefix + name[len(prefix) :].split(".")[0]
        return name.rpartition(".")[0] or name

    return block_of


def _by_part(model: nn.Module) -> Callable[[str], str]:
    layer_of = _by_layer(model)

    def block_of(name: str) -> str:
        layer = layer_of(name)
        child = name[len(layer) + 1 :].split(".")[0]
        if layer == name.rpartition(".")[0]:
            return layer
        is_attention = _ATTENTION.search(child) and not _NORM.search(child)
        return f"{layer}.{'attention' if is_attention else 'mlp'}"

    return block_of


def _group(model: nn.Module, block_of: Callable[[str], str], params: Params) -> Blocks:
    groups: dict[str, list[str]] = {}
    for tensor in ParameterSet(model, params):
        groups.setdefault(block_of(tensor.name), []).append(tensor.name)
    return tuple(Block(name, tuple(tensors)) for name, tensors in groups.items())
