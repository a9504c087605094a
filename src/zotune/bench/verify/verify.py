"""`zotune bench verify`: rerun one job for each kind of stale results and accept the kind if the numbers agree.

For each kind (see `zotune.bench.verify.groups`) the cheapest cell is recomputed: its search and the runs of other seeds
are taken from the stored result; the run of the first seed and the evaluation of the untuned model are computed, with
as many threads as before. If all repeatable numbers agree to the last bit, the results of the kind get today's key and
a record of the verification. Measured numbers cannot agree exactly: cells of measurements (memory, time, theory) are
accepted if these are close on the same machine.

On another kind of processor the last digits differ. There the code of the stored results can be run beside today's
code, from a checkout of its commit; then both are compared on this machine instead of the stored numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from zotune.bench.results.records import Verified, read_result, result_path, write_result
from zotune.bench.run.jobs import JOBS, Executor, Job, Outcome, Store, locked
from zotune.bench.run.partial_result import CellStopped
from zotune.bench.run.runner import Display, commit, key_of_cell, lock_of
from zotune.bench.spec.vocabulary import State
from zotune.bench.verify.comparison import differences_of, recompute
from zotune.bench.verify.groups import Group, Stale
from zotune.system.scratch_folder import scratch_folder

# An executor of today's code, and one of the code of the stored results.
_Slot = tuple[Executor, Executor | None]


@dataclass(frozen=True)
class Verdict:
    """The outcome for a group.

    Attributes:
        differences: the numbers that differ today; empty if the group was accepted.
        accepted: paths of the cells whose results have today's key now.
        left: from the paths of the other cells to the reasons why they stay stale.
    """

    group: Group
    differences: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        count, by = len(self.group.members), self.group.cheapest.spec.path
        if not self.differences:
            return f"{self.group.name}: {by} agrees, {len(self.accepted)} of {count} accepted"
        return "\n    ".join([f"{self.group.name}: {by} differs, {count} are left stale", *self.differences])

    def to_json(self) -> dict[str, Any]:
        """The verdict as a JSON object."""
        listed = {"differences": list(self.differences), "accepted": list(self.accepted), "left": dict(self.left)}
        return {"kind": self.group.name, "by": self.group.cheapest.spec.path, **listed}


def accept(results: Path, one: Stale, record: Verified) -> str | None:
    """Give a result today's key; return None, or the reason why the result stays as it is."""
    path = result_path(results, one.spec.scale, one.spec.experiment, one.spec.name)
    with locked(lock_of(results, one.spec)) as is_mine:
        if not is_mine():
            return "another runner works on it"
        if read_result(path) != one.result:
            return "it was rewritten meanwhile"
        new = {"key": key_of_cell(one.spec), "verified": (*one.result.verified, record)}
        write_result(results, one.result.model_copy(update=new))
    return None


def verify(
    results: Path,
    groups: Sequence[Group],
    slots: Sequence[_Slot],
    stop: threading.Event,
    display: Display,
) -> list[Verdict]:
    """Rerun a job for each group and accept the groups that agree.

    Each result is accepted by an atomic write, so an interruption leaves some results accepted and the others as they
    were. Finished jobs are cached, and the next call does not run them again.

    Args:
        results: folder of the results.
        groups: the results to verify, by kinds.
        slots: for each job that runs at a time an executor of today's code and an executor of the results' code;
            without the latter, the stored numbers are compared.
        stop: an event that stops the verification when it is set.
        display: shows the cells whose jobs are run.

    Returns:
        The verdicts of the groups that were reached before a stop.
    """
    free, lock = SimpleQueue[_Slot](), threading.Lock()
    for slot in slots:
        free.put(slot)

    def work(group: Group) -> Verdict | None:
        if stop.is_set():
            return None
        slot = free.get()
        try:
            return _verify_group(results, group, slot, stop, display, lock)
        except KeyboardInterrupt:
            stop.set()
            return None
        except BaseException:
            stop.set()
            raise
        finally:
            free.put(slot)

    with ThreadPoolExecutor(len(slots)) as pool:
        waiting = [pool.submit(work, group) for group in groups]
        # Waiting with a timeout lets signals reach the main thread.
        while wait(waiting, timeout=0.2).not_done:
            pass
    return [verdict for verdict in (one.result() for one in waiting) if verdict is not None]


def _verify_group(
    results: Path, group: Group, slot: _Slot, stop: threading.Event, display: Display, lock: threading.Lock
) -> Verdict:
    """Verify a group; the display is called under the lock."""
    spec = group.cheapest.spec
    with lock:
        display.began(spec)
    scale = results / spec.scale
    before = None if slot[1] is None else _uncached(slot[1], scale)
    verdict = _judge(results, group, Store(scale, slot[0], stop.is_set), before)
    with lock:
        finding = f"{len(verdict.differences)} numbers differ" if verdict.differences else "it agrees"
        state: State = "stale" if verdict.differences else "done"
        display.ended(spec, state, f"{finding}; {len(verdict.accepted)} accepted")
    return verdict


def _uncached(executor: Executor, scale: Path) -> Callable[[Job], Outcome]:
    """Run jobs by other code without caching, since the key of a job belongs to today's code."""

    def execute(job: Job) -> Outcome:
        (scale / JOBS).mkdir(parents=True, exist_ok=True)
        with scratch_folder(scale / JOBS) as folder:
            return executor(job, folder)

    return execute


def _judge(
    results: Path, group: Group, execute: Callable[[Job], Outcome], before: Callable[[Job], Outcome] | None
) -> Verdict:
    one, environment = group.cheapest, dict[str, str]()
    try:
        new = recompute(one, execute)
        environment = new.environment
        differences = differences_of(one.result if before is None else recompute(one, before), new)
    except CellStopped as stopped:
        differences = (f"its job failed when it was run again: {stopped.status}, {stopped.message}",)
    paths = [one.spec.path for one in group.members]
    if differences:
        return Verdict(group, differences, left=dict.fromkeys(paths, f"{group.cheapest.spec.path} differs"))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    reasons = {one.spec.path: accept(results, one, _record(group, one, environment, now)) for one in group.members}
    left = {path: reason for path, reason in reasons.items() if reason is not None}
    return Verdict(group, accepted=tuple(path for path in paths if path not in left), left=left)


def _record(group: Group, one: Stale, environment: dict[str, str], now: str) -> Verified:
    by = group.cheapest.spec.path
    return Verified(
        key_before=one.result.key, by=by, alike=group.alike, commit=commit(), environment=environment, time=now
    )
