"""Updates of streamed layers, each applied when its layer is in memory next.

A step's update is a few numbers (`zotune.apply.update.Step`), so it can wait: the next forward pass brings each layer
into memory anyway, and reads it after the update. So a step reads and writes a layer once, and a run that is resumed
goes through all its earlier steps layer by layer. The state of the update (moments, master weights) lies in the file of
the layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from zotune.apply.tensor_update import Rounding, TensorUpdate
from zotune.apply.transforms import State
from zotune.apply.update import Step, read_changed_, update_tensor_, with_master
from zotune.directions.scaled import ScaledSampler
from zotune.directions.schedule import AnySampler, depends_on_weights
from zotune.errors import UsageError
from zotune.model.mapped_memory import release
from zotune.model.parameters import ParameterSet, TunedTensor
from zotune.model.streaming import LayerStream, stream_of
from zotune.optim.undo import UndoLog


class NoDeferredUpdates:
    """All updates of an optimizer are applied at once: no layer is streamed.

    Args:
        tuned: the tuned tensors.
        param_groups: those of the optimizer.
        rounding: how half-precision weights are written.

    """

    def __init__(self, tuned: ParameterSet, param_groups: Sequence[dict[str, Any]], rounding: Rounding) -> None:
        self._tuned, self._rounding = tuned, rounding
        # By name, the version of a parameter with master weights after the last write into it.
        self._versions: dict[str, int] = {}
        self._numbered = [(number, p) for number, group in enumerate(param_groups) for p in group["params"]]

    def updates(self, step: Step, states: Mapping[Any, State], *, waiting: bool = True) -> dict[int, TensorUpdate]:
        """The update of each tensor that a step moves, by tensor id; without `waiting` not those of streamed ones.

        Args:
            step: the step.
            states: those of the optimizer, by parameter.
            waiting: whether tensors count whose updates wait for their layers.
        """
        chosen = [(n, self._tuned.find(p)) for n, p in self._numbered if waiting or not self.is_streamed(p)]
        moved = [(number, t) for number, t in chosen if t is not None and step.moves(t)]
        return {t.id: step.on(t, number, self._state_among(t, states)) for number, t in moved}

    def is_streamed(self, parameter: Tensor) -> bool:
        """Whether the updates of a parameter wait for its layer."""
        return False

    def add(self, step: Step, scale: float, undo: UndoLog, *, in_sequence: bool) -> None:
        """Nothing waits."""

    def _state_among(self, tensor: TunedTensor, states: Mapping[Any, State]) -> State:
        """The state of a tensor among those of an optimizer; with its master weights, if it keeps any."""
        state, p = states[tensor.parameter], tensor.parameter
        is_new = "master" not in state
        if "master" in with_master(tensor, self._rounding, state) and _has_version(tensor):
            if not is_new and self._versions.get(tensor.name) != p._version:
                read_changed_(state["master"], tensor.storage())
            self._versions[tensor.name] = p._version
        return state

    def note_written(self, tensors: Iterable[TunedTensor]) -> None:
        """Note that tensors were written with their master weights, so that what others write is told from it."""
        for tensor in tensors:
            if tensor.name in self._versions:
                self._versions[tensor.name] = tensor.parameter._version

    @contextmanager
    def states_in(self, states: dict[Any, Any]) -> Iterator[None]:
        """Add nothing to an optimizer's states."""
        yield

    def take_states(self, states: dict[Any, Any]) -> None:
        """Take nothing from an optimizer's states."""


class DeferredUpdates(NoDeferredUpdates):
    """The updates of an optimizer's streamed tensors that wait for their layers: a `zotune.model.streaming.Pending`.

    Args:
        tuned: the tuned tensors.
        param_groups: those of the optimizer.
        rounding: how half-precision weights are written.
        stream: the layers.
        waits_for_layers: whether steps wait; else each is applied at once, layer by layer.
    """

    def __init__(
        self,
        tuned: ParameterSet,
        param_groups: Sequence[dict[str, Any]],
        rounding: Rounding,
        stream: LayerStream,
        *,
        waits_for_layers: bool,
    ) -> None:
        super().__init__(tuned, param_groups, rounding)
        self._stream, self._waits_for_layers = stream, waits_for_layers
        self._of_layer: dict[int, list[tuple[int, nn.Parameter]]] = defaultdict(list)
        for number, p in self._numbered:
            if (layer := stream.layer_of(p)) is not None:
                self._of_layer[layer].append((number, p))
        self._streamed = [p for of_layer in self._of_layer.values() for _, p in of_layer]
        self._states: dict[int, State] = {id(p): {} for p in self._streamed}
        # Steps are numbered from the first one on; `_first` is the number of the first that still waits somewhere.
        self._waiting: list[tuple[Step, float]] = []
        self._first = 0
        self._done = dict.fromkeys(self._of_layer, 0)
        stream.make_writable(self._streamed)
        stream.pending = self

    @property
    def _count(self) -> int:
        return self._first + len(self._waiting)

    def add(self, step: Step, scale: float, undo: UndoLog, *, in_sequence: bool) -> None:
        """Let a step wait; `undo` is told how to take it back.

        Args:
            step: the step.
            scale: its factor a.
            undo: of the optimizer's whole step.
            in_sequence: whether it is that of a block with others after it: their forward passes apply it, and then it
                cannot be taken back.
        """
        if self._stream.pending is not self:  # another optimizer of this model has taken steps meanwhile
            self._stream.settle()
            self._stream.pending = self
        undo.then(None if in_sequence or not self._waits_for_layers else partial(self._cut, self._count))
        self._waiting.append((step, scale))
        if not self._waits_for_layers:
            self._stream.settle()

    def _cut(self, count: int) -> None:
        """Take back all steps but the first `count`; none of those taken back was applied to any layer."""
        del self._waiting[count - self._first :]

    def waits(self, layer: int) -> bool:
        """As `Pending.waits`."""
        return self._done.get(layer, self._count) < self._count

    def apply(self, layer: int) -> None:
        """As `Pending.apply`."""
        for group, p in self._of_layer[layer]:
            tensor = self._tuned.find(p)
            assert tensor is not None
            for step, scale in self._waiting[self._done[layer] - self._first :]:
                if step.moves(tensor):
                    self._update(tensor, group, step, scale)
            for value in self._states[id(p)].values():
                if isinstance(value, Tensor):
                    release(value)
        self._done[layer] = self._count
        oldest = min(self._done.values())
        del self._waiting[: oldest - self._first]
        self._first = oldest

    def _update(self, tensor: TunedTensor, group: int, step: Step, scale: float) -> None:
        """Apply a step to a tensor in memory; its state is copied there and back where it lies elsewhere."""
        kept = self._state_of(tensor)
        device = tensor.parameter.device
        state = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kept.items()}
        after = update_tensor_(step.on(tensor, group, state), scale)
        for key, value in {**state, **after}.items():
            kept[key] = self._put(kept.get(key), value)

    def _put(self, home: Any, value: Any) -> Any:
        """Write an entry of a state to the file; returns it as it lies there."""
        if not isinstance(value, Tensor):
            return value
        if not isinstance(home, Tensor) or home.shape != value.shape or home.dtype != value.dtype:
            home = self._stream.empty(tuple(value.shape), value.dtype)
        return home if home.data_ptr() == value.data_ptr() else home.copy_(value)

    def is_streamed(self, parameter: Tensor) -> bool:
        """As `NoDeferredUpdates.is_streamed`."""
        return id(parameter) in self._states

    def _state_among(self, tensor: TunedTensor, states: Mapping[Any, State]) -> State:
        if self.is_streamed(tensor.parameter):
            return self._state_of(tensor)
        return super()._state_among(tensor, states)

    def _state_of(self, tensor: TunedTensor) -> State:
        """The state of a streamed tensor, which lies in the file."""
        state = self._states[id(tensor.parameter)]
        if "master" not in state and "master" in with_master(tensor, self._rounding, state):
            state["master"] = self._put(None, state["master"])
        return state

    @contextmanager
    def states_in(self, states: dict[Any, Any]) -> Iterator[None]:
        """Within this context an optimizer's states, by parameter, hold those of its streamed tensors too."""
        self._stream.settle()
        states.update((p, self._states[id(p)]) for p in self._streamed if self._states[id(p)])
        try:
            yield
        finally:
            for p in self._streamed:
                states.pop(p, None)

    def take_states(self, states: dict[Any, Any]) -> None:
        """Take the states of the streamed tensors out of an optimizer's, and put them into the file."""
        self._stream.settle()
        for p in self._streamed:
            self._states[id(p)] = {key: self._put(None, value) for key, value in states.pop(p, {}).items()}


def _has_version(tensor: TunedTensor) -> bool:
    """Whether torch counts the writes into a tensor's weights where it lies."""
    return not tensor.is_offloaded and tensor.shard is None and not tensor.parameter.is_inference()


def deferred_updates(
    tuned: ParameterSet, param_groups: Sequence[dict[str, Any]], rounding: Rounding, sampler: AnySampler
) -> NoDeferredUpdates:
    """The updates of an optimizer that wait for streamed layers, if its model has any.

    Where masks follow the weights they cannot wait, for the next step begins by reading all weights.

    Raises:
        UsageError: the directions depend on the state of all tensors.
    """
    stream = stream_of(tuned.model)
    if stream is None:
        return NoDeferredUpdates(tuned, param_groups, rounding)
    stream.settle()
    if all(stream.layer_of(t.parameter) is None for t in tuned):
        return NoDeferredUpdates(tuned, param_groups, rounding)
    if isinstance(sampler, ScaledSampler):
        raise UsageError(
            "the directions of hizoo are scaled by the state of every tensor, so its layers cannot be streamed. Use "
            "another method, or load the model without --offload-folder and --device-map."
        )
    waits = not depends_on_weights(sampler)
    return DeferredUpdates(tuned, param_groups, rounding, stream, waits_for_layers=waits)
