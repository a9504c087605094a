"""A model's stack of layers: where it is, and at which depth of it each tuned tensor is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zotune.model.intercept import readable
from zotune.model.parameters import ParameterSet


def stack_of(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The model's stack of layers and its path: the longest `ModuleList` or `Sequential` that is inside no other.

    A model without one has an empty stack.

    >>> stack_of(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])}))[0]
    'layers'
    """
    stacks = [
        (path, list(m)) for path, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m)
    ]
    outer = [(p, m) for p, m in stacks if not any(_is_inside(p, q) for q, _ in stacks)]
    return max(outer, key=lambda found: len(found[1]), default=("", []))


def _is_inside(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))


class ReadTracer(TorchFunctionMode):
    """A context that records at which depth of the stack each tuned tensor is read, whatever runs the model.

    A read outside the model that holds the stack counts for the layer that runs next, or comes after all layers.

    Attributes:
        first, last: by tensor id, how many layers had run when the tensor was first and last read.
        in_order: whether the layers ran one after the other.
    """

    def __init__(self, tuned: ParameterSet) -> None:
        super().__init__()
        path, self._layers = stack_of(tuned.model)
        self._above = [m for p, m in tuned.model.named_modules() if _is_inside(path, p) or p == path]
        self.first: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.in_order = True
        self._tuned = tuned
        self._position = self._inside = 0
        self._waiting: set[int] = set()

    def __enter__(self) -> Self:
        self._handles = [m.register_forward_pre_hook(self._begin) for m in self._above]
        self._handles += [m.register_forward_hook(self._end) for m in self._above]
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_pre_hook(self._before(index)))
            self._handles.append(layer.register_forward_hook(self._after(index)))
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._settle(len(self._layers))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        read, named = readable(func, args, kwargs)
        for value in (*read, *named.values()):
            self._note(value)
        return func(*args, **(kwargs or {}))

    def _note(self, value: Any) -> None:
        if isinstance(value, (list, tuple)):
            for v in value:
                self._note(v)
        elif isinstance(value, Tensor) and (tensor := self._tuned.read_as(value)) is not None:
            if self._inside:
                self._put(tensor.id, self._position)
            else:
                self._waiting.add(tensor.id)

    def _put(self, tensor_id: int, depth: int) -> None:
        self.first[tensor_id] = min(depth, self.first.get(tensor_id, depth))
        self.last[tensor_id] = max(depth, self.last.get(tensor_id, depth))

    def _settle(self, depth: int) -> None:
        for tensor_id in self._waiting:
            self._put(tensor_id, depth)
        self._waiting.clear()

    def _begin(self, module: nn.Module, args: Any) -> None:
        if not self._inside:
            self._settle(0)
            self._position = 0
        self._inside += 1

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside -= 1

    def _before(self, index: int) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            self._settle(index)
            self._position = 0 if index == 0 else self._position
            self.in_order &= self._position == index
            self._inside += 1

        return enter

    def _after(self, index: int) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._inside -= 1
            self._position = index + 1

        return leave
