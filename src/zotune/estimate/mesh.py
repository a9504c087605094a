"""Which process evaluates what: a step's work is a table of micro-batches and groups of points, dealt out by cells.

A cell's value depends on weights, directions and rows alone, not on who computes it. So the processes exchange their
cells' values, once a step, and go on from the same table: the bits of one process, whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from zotune.errors import UsageError
from zotune.model.shards import mean_of
from zotune.system.processes import ALONE, TIMEOUT, Processes, connected

S = TypeVar("S")
T = TypeVar("T")


class Counter(Protocol):
    """What counts forward passes."""

    num_forwards: int


class Cell(NamedTuple):
    """A piece of a step's work.

    Attributes:
        part: number of the micro-batch.
        group: number of the group of points (or of the direction).
        width: how many numbers it gives.
    """

    part: int
    group: int
    width: int


@dataclass(frozen=True)
class Mesh:
    """Processes in `query` rows and `data` columns: columns share the micro-batches, rows the directions of a step.

    Attributes:
        processes: query · data of them.
        query, data: the extents.
        counter: counts the forward passes of this process; it is given those of the others too.
        is_sharded: the model itself lies on all processes, so that each of them takes part in every forward pass:
            nothing is shared, and all go on from the mean of their values (equal, or different by rounding).
    """

    processes: Processes = ALONE
    query: int = 1
    data: int = 1
    counter: Counter | None = None
    is_sharded: bool = False

    def __post_init__(self) -> None:
        if self.is_sharded:
            return
        if self.query < 1 or self.data < 1 or self.query * self.data != self.processes.size:
            raise UsageError(
                f"a mesh of query={self.query}, data={self.data} has {self.query * self.data} processes, but there "
                f"{'is' if self.processes.size == 1 else 'are'} {self.processes.size}. Their product must be the "
                f"number that was started: torchrun --nproc-per-node {max(1, self.query * self.data)}."
            )

    @property
    def is_alone(self) -> bool:
        """Whether there is one process."""
        return self.processes.size == 1

    def owner(self, cell: Cell) -> int:
        """The rank of the process that computes a cell."""
        return (cell.group % self.query) * self.data + cell.part % self.data

    def evaluate(
        self, cells: Sequence[Cell], compute: Callable[[Sequence[int]], Sequence[Sequence[Any]]]
    ) -> Sequence[Sequence[Any]]:
        """Return the numbers of each cell; each process computes its own.

        Args:
            cells: the same in every process.
            compute: given indices of cells, the numbers of each.

        Raises:
            Exception: whatever `compute` raises in some process is raised in all of them.
        """
        if self.is_alone:
            return compute(range(len(cells)))
        if self.is_sharded:
            return self._together([cell.width for cell in cells], compute)
        shares: list[list[int]] = [[] for _ in range(self.processes.size)]
        for i, cell in enumerate(cells):
            shares[self.owner(cell)].append(i)
        return self._exchange(shares, [cell.width for cell in cells], compute)

    def evaluate_parts(
        self, num_parts: int, width: int, compute: Callable[[Sequence[int]], Sequence[Sequence[Any]]]
    ) -> Sequence[Sequence[Any]]:
        """Return the numbers of each micro-batch; processes of one column compute the same."""
        if self.is_alone:
            return compute(range(num_parts))
        if self.is_sharded:
            return self._together([width] * num_parts, compute)
        shares = [list(range(rank % self.data, num_parts, self.data)) for rank in range(self.processes.size)]
        return self._exchange(shares, [width] * num_parts, compute)

    def evaluate_each(
        self, items: range, width: int, compute: Callable[[Sequence[int]], Sequence[Sequence[Any]]]
    ) -> Sequence[Sequence[Any]]:
        """Return the numbers of each of at most as many items as there are processes, one a process."""
        if self.is_alone:
            return compute(items)
        if self.is_sharded:
            return self._together([width] * len(items), lambda own: compute([items[i] for i in own]))
        shares = [list(range(len(items)))[rank : rank + 1] for rank in range(self.processes.size)]
        return self._exchange(shares, [width] * len(items), lambda own: compute([items[i] for i in own]))

    def map(self, f: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """Return f of each item, in order; each process computes its share, and passes count everywhere."""
        if self.is_sharded:
            return [f(item) for item in items]
        before = self._passes
        found = self.processes.map(lambda item: self._counted(f, item), items)
        if self.counter is not None:
            self.counter.num_forwards = before + sum(passes for _, passes in found)
        return [value for value, _ in found]

    def _counted(self, f: Callable[[S], T], item: S) -> tuple[T, int]:
        before = self._passes
        value = f(item)
        return value, self._passes - before

    def _exchange(
        self,
        shares: Sequence[Sequence[int]],
        widths: Sequence[int],
        compute: Callable[[Sequence[int]], Sequence[Sequence[Any]]],
    ) -> Sequence[Sequence[Any]]:
        rank, before = self.processes.rank, self._passes
        # A pass that several processes took counts once.
        counts = all(rank <= other or share != shares[rank] for other, share in enumerate(shares))

        def own() -> list[float]:
            values = [value for numbers in compute(shares[rank]) for value in numbers]
            return [float(self._passes - before if counts else 0), *map(float, values)]

        rows = self.processes.run(own, 1 + max(sum(widths[i] for i in share) for share in shares))
        if self.counter is not None:
            self.counter.num_forwards = before + int(sum(row[0] for row in rows))
        found: list[Sequence[float]] = [()] * len(widths)
        for share, (_, *numbers) in zip(shares, rows, strict=True):
            for i in share:
                found[i], numbers = numbers[: widths[i]], numbers[widths[i] :]
        return found

    def _together(
        self, widths: Sequence[int], compute: Callable[[Sequence[int]], Sequence[Sequence[Any]]]
    ) -> Sequence[Sequence[Any]]:
        """Compute everything in every process. An error is not exchanged: the others wait within their own passes."""
        own = [float(value) for numbers in compute(range(len(widths))) for value in numbers]
        numbers = iter(mean_of(self.processes.run(lambda: own, sum(widths))))
        return [[next(numbers) for _ in range(width)] for width in widths]

    @property
    def _passes(self) -> int:
        return 0 if self.counter is None else self.counter.num_forwards


ALONE_MESH = Mesh()


def mesh(*, query: int = 1, data: int | None = None, timeout: float = TIMEOUT) -> Mesh:
    """The processes of an initialised `torch.distributed` as a mesh, for `zotune.accumulate(…, mesh=…)`.

    Every process makes the same optimizer over the same model with the same seed, and gives `step` the same
    micro-batches in the same order. A step then exchanges one number a micro-batch and point, and every process takes
    the same step, with the bits of one process.

    Args:
        query: how many processes share the directions of a step.
        data: how many share its micro-batches; default: all that are left.
        timeout: seconds to wait for another process.

    Raises:
        UsageError: query · data is not the number of processes.

    >>> mesh().processes.size
    1
    """
    processes = connected(timeout)
    return Mesh(processes, query, max(1, processes.size // query) if data is None else data)
