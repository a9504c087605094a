"""The processes that run one command together: how many there are, and what they tell each other.

torchrun starts them, torch.distributed connects them. All take the same decisions from the same numbers, so each
exchange has two rules: every process takes part in it, and an error in one process is raised in all of them. A process
that ends otherwise closes its connections, by which the others notice it.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from zotune.errors import RunError, UsageError, reason_of

T = TypeVar("T")
S = TypeVar("S")

TIMEOUT = 600.0
"""Seconds that a process waits for the others."""
_FAILED, _SEEN = "zotune/failed", "zotune/seen"
# How long a process that fails waits until the others have read why.
_LAST_WORDS = 5.0


class PeerError(RunError):
    """Another process failed or was lost; the message says which and why."""


class Processes:
    """One process alone: what it would exchange with others it has.

    Attributes:
        rank: number of this process, from 0; size: number of processes.
        attention: returns a number that each exchange tells the others, such as that of a signal; 0 for nothing.
        agreed: the largest of these in the last exchange: the same in every process.

    >>> ALONE.size, ALONE.map(abs, [-1, 2]), ALONE.first(lambda: 5)
    (1, [1, 2], 5)
    """

    rank, size = 0, 1

    def __init__(self) -> None:
        self.attention: Callable[[], int] = int

    @property
    def agreed(self) -> int:
        """The largest `attention` of all processes in the last exchange."""
        return self.attention()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def run(self, f: Callable[[], Sequence[float]], width: int) -> list[list[float]]:
        """Run `f` in every process, and return the numbers of each: one row a process, `width` numbers a row.

        Args:
            f: returns at most `width` numbers; rows are filled up with zeros. Numbers travel as float64, bit for bit.
            width: the same in every process.

        Raises:
            PeerError: a process was lost, or failed with an error that cannot travel.
            Exception: whatever `f` raised in some process.
        """
        return [list(f())]

    def every(self, f: Callable[[], T]) -> list[T]:
        """Run `f` in every process, and return the result of each; as `run`, of any objects that can be pickled."""
        return [f()]

    def first(self, f: Callable[[], T]) -> T:
        """Run `f` in the first process alone, and return its result in all of them."""
        return f()

    def map(self, f: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """Return f of each item, in order; each process computes its share."""
        return [f(item) for item in items]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, which have one shape and dtype."""
        return [tensor]

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process ends before they do, unless they know."""

    def explained(self, error: BaseException) -> BaseException:
        """Return what an error means: of a connection that broke within a pass of a model in shards, why it did."""
        return error


ALONE = Processes()
"""A process without others."""


class Group(Processes):
    """Several processes that torch.distributed connects.

    Args:
        store: the key-value store by which they met; it takes the last words of one that fails.
        timeout: seconds that a process waits for the others.
    """

    def __init__(self, store: Any, timeout: float = TIMEOUT) -> None:
        super().__init__()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._store, self._timeout, self._agreed, self._is_told = store, timeout, 0, False
        # Numbers travel in the host's memory, whatever computes them.
        self._scalars: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    @property
    def agreed(self) -> int:
        """As `Processes.agreed`."""
        return self._agreed

    def run(self, f: Callable[[], Sequence[float]], width: int) -> list[list[float]]:
        """As `Processes.run`: one all-gather of `width` + 2 numbers a process."""
        numbers, error = _result_of(f)
        row = torch.zeros(width + 2, dtype=torch.float64)
        row[0], row[1] = error is not None, self.attention()
        if numbers:
            row[2 : 2 + len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
        rows = [torch.empty_like(row) for _ in range(self.size)]
        with self._explained():
            dist.all_gather(rows, row, group=self._scalars)
        self._agreed = int(max(row[1].item() for row in rows))
        if any(row[0].item() for row in rows):
            self._raise(error)
        return [row[2:].tolist() for row in rows]

    def every(self, f: Callable[[], T]) -> list[T]:
        """As `Processes.every`."""
        value, error = _result_of(f)
        self.run(lambda: () if error is None else _raising(error), 0)
        return self._objects(value)

    def first(self, f: Callable[[], T]) -> T:
        """As `Processes.first`."""
        return self.every(f if self.is_first else lambda: None)[0]  # type: ignore[return-value]

    def map(self, f: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """As `Processes.map`: item i goes to process i modulo their number."""
        found = self.every(lambda: [f(item) for item in items[self.rank :: self.size]])
        return [found[i % self.size][i // self.size] for i in range(len(items))]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """As `Processes.gather`."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._explained():
            dist.all_gather(found, tensor.contiguous(), group=self._scalars if tensor.device.type == "cpu" else None)
        return found

    def explained(self, error: BaseException) -> BaseException:
        """As `Processes.explained`."""
        return self._lost(error) if isinstance(error, RuntimeError) and _is_of_connection(error) else error

    def fail(self, error: BaseException) -> None:
        """As `Processes.fail`."""
        if self._is_told or isinstance(error, PeerError):
            return
        with suppress(Exception):
            self._store.set(_FAILED, pickle.dumps((self.rank, _portable(error, self.rank))))
            # The closed connections wake those who wait for this process.
            dist.destroy_process_group(self._scalars)
            self._scalars = None
            end = time.monotonic() + _LAST_WORDS
            while self._store.add(_SEEN, 0) < self.size - 1 and time.monotonic() < end:
                time.sleep(0.02)

    def _objects(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with self._explained():
            dist.all_gather_object(found, value, group=self._scalars)
        return found

    def _raise(self, error: BaseException | None) -> None:
        """Raise in every process the error of the first that has one, or its own."""
        found = self._objects(None if error is None else _portable(error, self.rank))
        self._is_told = True
        first = next(e for e in found if e is not None)
        # Where all find the same wrong, one says so.
        if error is None or (rank_of(first) != self.rank and type(error) is type(first) and str(error) == str(first)):
            raise first
        raise error

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the error of a broken connection into one that says what happened."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> BaseException:
        with suppress(Exception):
            if self._has_last_words():
                self._store.add(_SEEN, 1)
                rank, said = pickle.loads(self._store.get(_FAILED))
                if rank != self.rank:
                    self._is_told = True
                    return said  # type: ignore[no-any-return]
        if "imed out" in str(error) or "timeout" in str(error).lower():
            return PeerError(
                f"the other processes sent nothing for {self._timeout:g} s: one of them hangs, or is slower than that "
                "(--timeout SECONDS waits longer). What was recorded so far is kept; --resume goes on from it."
            )
        return PeerError(
            "the connection to another process ended: it was killed, or its machine or network is gone. What was "
            "recorded so far is kept; the same command with --resume goes on from it, and so does torchrun by itself "
            "with --max-restarts."
        )

    def _has_last_words(self) -> bool:
        # They are set before the connection ends, but a killed process leaves none.
        return bool(self._store.check([_FAILED]))


def _is_of_connection(error: RuntimeError) -> bool:
    """Whether torch.distributed has raised an error; gloo's is of no class of its own.

    >>> _is_of_connection(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    True
    >>> _is_of_connection(RuntimeError("The size of tensor a (2) must match"))
    False
    """
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))


def _result_of(f: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return f(), None
    except BaseException as error:
        return None, error


def _raising(error: BaseException) -> Any:
    raise error


def _portable(error: BaseException, rank: int) -> BaseException:
    """Return an error as one that can be pickled, which knows the process that it is from."""
    try:
        found = pickle.loads(pickle.dumps(error))
        same = type(found) is type(error) and str(found) == str(error)
    except Exception:
        same = False
    if not same:
        found = PeerError(f"{type(error).__name__}: {error}")
    found.rank = rank
    return found  # type: ignore[no-any-return]


def rank_of(error: BaseException) -> int | None:
    """Return the rank of the other process that an error is from; None if it is from this one."""
    return getattr(error, "rank", None)


def asked_for() -> int:
    """Return the number of processes that this one was started as one of."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else _number("WORLD_SIZE", 1)


def is_restarted() -> bool:
    """Whether torchrun has started the processes again, after one of them ended."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0) > 0


def is_first_process() -> bool:
    """Whether this process is the only one, or the first of those that torchrun started."""
    return asked_for() == 1 or _number("RANK", 0) == 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def connected(timeout: float = TIMEOUT) -> Processes:
    """Return the processes that a program has connected with `torch.distributed.init_process_group`; else `ALONE`."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ALONE
    return Group(dist.distributed_c10d._get_default_store(), timeout)


@contextmanager
def joined(timeout: float = TIMEOUT) -> Iterator[Processes]:
    """Within this context the processes that torchrun started are connected; one process is `ALONE`.

    A program that has called `torch.distributed.init_process_group` itself keeps its group.

    Raises:
        UsageError: the processes cannot meet: the port is in use, the first one is not there, a variable is missing.
    """
    if asked_for() == 1:
        yield ALONE
        return
    owns = not dist.is_initialized()
    processes = Group(_meet(timeout), timeout) if owns else connected(timeout)
    try:
        yield processes
    except BaseException as error:
        found = processes.explained(error)
        found.is_told = True  # type: ignore[attr-defined]
        processes.fail(found)
        if found is error:
            raise
        raise found from error
    finally:
        if owns and dist.is_initialized():
            with suppress(Exception):
                dist.destroy_process_group()


_MEETINGS = count()


@cache
def _rendezvous(limit: timedelta) -> tuple[Any, int, int]:
    """The store by which the processes meet, the rank and the number; the first process serves it until it ends."""
    store, rank, size = next(rendezvous("env://", timeout=limit))
    return store, rank, size


def _meet(timeout: float) -> Any:
    """Connect this process with the others, and return the store by which they met."""
    limit = timedelta(seconds=timeout)
    try:
        found, rank, size = _rendezvous(limit)
        # Each meeting has keys of its own; torchrun keeps its store when it starts the processes again.
        store = PrefixStore(f"zotune/{_number('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_MEETINGS)}", found)
        backend = "gloo"
        if torch.cuda.is_available():
            # Each process of a machine has a GPU of its own, which "cuda" then names.
            torch.cuda.set_device(_number("LOCAL_RANK", rank) % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise UsageError(
            f"the {_number('WORLD_SIZE', 1)} processes could not meet at {address} ({reason_of(error)}). Start them "
            "with torchrun --nproc-per-node N -m zotune …; where the port is in use, give another --master-port."
        ) from error
    return store
