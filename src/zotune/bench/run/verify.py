"""`zotune bench verify`: rerun one job for each kind of stale results and accept the kind if the numbers agree.

Two results are of one kind if they come from the same commit and machine and their options are equal, except numbers,
which must be both 0, both 1, or both larger, so that today's code runs the same branches for all of them. (A coarser
notion, which takes less time and proves less, is the same method, tuning and precision.) For each kind the cheapest
cell is recomputed: its search and the runs of other seeds are taken from the stored result; the run of the first seed
and the evaluation of the untuned model are computed, with as many threads as before. If all repeatable numbers agree to
the last bit, the results of the kind get today's key and a record of the verification. Measured numbers cannot agree
exactly: cells of measurements (memory, time, theory) are accepted if these are close on the same machine.

On another kind of processor the last digits differ. There the code of the stored results can be run beside today's
code, from a checkout of its commit; then both are compared on this machine instead of the stored numbers.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from zotune.bench.results.records import (
    CellResult,
    RunRecord,
    Score,
    Trial,
    Verified,
    read_result,
    repeatable,
    result_path,
    write_result,
)
from zotune.bench.run.jobs import JOBS, Executor, Job, Outcome, Store, locked
from zotune.bench.run.partial_result import CellStopped, PartialResult
from zotune.bench.run.runner import Display, commit, key_of_cell, lock_of, state_of
from zotune.bench.spec.schema import CellSpec
from zotune.bench.spec.vocabulary import Alike, State
from zotune.system.scratch_folder import scratch_folder

# The largest relative difference of a measured number, in cells of measurements.
NEAR_ENOUGH = {"over_baseline_bytes": 0.03, "seconds_per_step": 0.15}
# Measured numbers are comparable between machines that agree in these fields.
_MACHINE = ("machine", "processor", "cpu_threads", "gpu")
# The options in which results of one kind agree by the coarser notion; in half precision first-order methods run other
# code than in single precision, and a hybrid has a first-order part.
_NAMES_OF_A_METHOD = ("method", "tuning", "dtype", "hybrid_method")
_PARTS = ("search", "chosen", "runs", "baselines")
# An executor of today's code, and one of the code of the stored results.
_Slot = tuple[Executor, Executor | None]


@dataclass(frozen=True)
class Stale:
    """A cell and its stored result, which other code computed."""

    spec: CellSpec
    result: CellResult

    @property
    def commit(self) -> str:
        """The commit of the code that computed the result or verified it last."""
        return (self.result.verified[-1] if self.result.verified else self.result).commit

    @property
    def seconds(self) -> float:
        """Seconds of the run of the first seed."""
        return self.result.runs[0].seconds if self.result.runs else 0.0


@dataclass(frozen=True)
class Group:
    """Stale results of one kind, the cheapest first."""

    members: tuple[Stale, ...]
    alike: Alike = "options"

    @property
    def cheapest(self) -> Stale:
        """The result that is recomputed."""
        return self.members[0]

    @property
    def name(self) -> str:
        """A name for readers: kind, method, tuning, model and task."""
        options = self.cheapest.spec.options
        named = (options.get(name) for name in ("method", "tuning", "model", "task"))
        return " · ".join([self.cheapest.spec.kind, *map(str, filter(None, named))])


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


# Which results ---------------------------------------------------------------------------------------------


def stale_of(
    results: Path, specs: Sequence[CellSpec], of_commit: str | None = None
) -> tuple[list[Stale], dict[str, str]]:
    """The stale results that can be verified, and for the others the reasons by path.

    Args:
        results: folder of the results.
        specs: the cells.
        of_commit: accept only results of this commit's code.
    """
    stale: list[Stale] = []
    left: dict[str, str] = {}
    for spec in specs:
        if state_of(results, spec) != "stale":
            continue
        result = read_result(result_path(results, spec.scale, spec.experiment, spec.name))
        assert result is not None
        if result.kind != spec.kind or _config_of(result.config, spec) != _config_of(_dumped(spec), spec):
            left[spec.path] = "the config of the cell has changed"
        elif result.status != "done":
            left[spec.path] = f"it is not done: {result.status}"
        elif of_commit is not None and of_commit != (last := Stale(spec, result).commit):
            left[spec.path] = f"it was computed by the code of {last}, not of {of_commit}"
        else:
            stale.append(Stale(spec, result))
    return stale, left


def _dumped(spec: CellSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", include={"options", "search", "budget", "seeds"})


def _config_of(config: Mapping[str, Any], spec: CellSpec) -> dict[str, Any]:
    """The parts of a config that the result depends on."""
    parts = ("options", "seeds", "search", "budget") if spec.kind == "accuracy" else ("options", "seeds")
    return {name: config.get(name) for name in parts}


def grouped(stale: Sequence[Stale], alike: Alike = "options") -> list[Group]:
    """Group stale results by their kinds."""
    groups: dict[str, list[Stale]] = {}
    for one in stale:
        groups.setdefault(_kind_of(one, alike), []).append(one)
    return [Group(tuple(sorted(some, key=lambda s: (s.seconds, s.spec.path))), alike) for some in groups.values()]


def _kind_of(one: Stale, alike: Alike) -> str:
    """A text that is equal for results of one kind."""
    spec, result = one.spec, one.result
    last = result.verified[-1] if result.verified else result
    named = {name: spec.options.get(name) for name in _NAMES_OF_A_METHOD}
    options = named if alike == "method" else without_amounts(spec.options)
    is_measured = any(run.measured for run in result.runs)
    origin = (one.commit, result.environment, last.environment)
    return json.dumps([spec.kind, is_measured, origin, options], sort_keys=True)


def without_amounts(value: Any) -> Any:
    """Replace each number by "none" (0), "one" (1) or "more".

    >>> without_amounts({"method": "zo_sgd", "num_queries": 16, "sparsity": 0.2, "gated": True, "layers": [1, 0]})
    {'method': 'zo_sgd', 'num_queries': 'more', 'sparsity': 'more', 'gated': True, 'layers': ['one', 'none']}
    """
    if isinstance(value, Mapping):
        return {name: without_amounts(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_amounts(one) for one in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "none" if value == 0 else "one" if value == 1 else "more"
    return value


# Comparison ------------------------------------------------------------------------------------------------


class _PartialRerun:
    """An executor that runs the verified jobs of a cell and takes the outcomes of the others from its result."""

    def __init__(self, one: Stale, execute: Callable[[Job], Outcome]) -> None:
        self._execute, self._one = execute, one
        self._trials = list(one.result.search)
        self.environment: dict[str, str] = {}

    def __call__(self, job: Job) -> Outcome:
        if job.role == "trial" and self._trials:
            return _of_trial(self._trials.pop(0))
        if job.role == "run" and job.options["seed"] != self._one.spec.seeds[0]:
            stored = next((run for run in self._one.result.runs if run.seed == job.options["seed"]), None)
            if stored is not None:
                return Outcome("done", found={"run": stored.model_dump(mode="json"), "environment": {}})
        threads = self._one.result.environment.get("cpu_threads")
        outcome = self._execute(replace(job, environment={"OMP_NUM_THREADS": threads} if threads else {}))
        self.environment = outcome.found.get("environment", self.environment)
        return outcome


def _of_trial(trial: Trial) -> Outcome:
    """The outcome from which a trial was made."""
    dev = None
    if trial.dev_value is not None:
        dev = Score(value=trial.dev_value, num_examples=0, loss=trial.dev_loss)
    shared = trial.model_dump(include={"seed", "num_steps", "num_forwards", "seconds", "peak_memory", "measured"})
    run = RunRecord(dev=dev, **shared)
    return Outcome(trial.status, trial.message, {"run": run.model_dump(mode="json"), "environment": {}})


def recompute(one: Stale, execute: Callable[[Job], Outcome]) -> CellResult:
    """Run the verified jobs of a stale result again; return the result with their outcomes and machine.

    Raises:
        CellStopped: a job failed.
        KeyboardInterrupt: the runner is stopping.
    """
    from zotune.bench.run.cells import KINDS

    rerun, partial = _PartialRerun(one, execute), PartialResult()
    KINDS[one.spec.kind](one.spec, rerun, partial)
    parts = {part: getattr(partial, part) for part in _PARTS}
    return CellResult.model_validate(one.result.model_dump() | parts | {"environment": rerun.environment})


def differences_of(old: CellResult, new: CellResult) -> tuple[str, ...]:
    """The numbers that differ in a recomputed result, each with both values."""
    before, after = ({part: _plain(result)[part] for part in _PARTS} for result in (old, new))
    differences = list(different(before, after))
    was, now = (result.environment.get("processor") for result in (old, new))
    if differences and was != now and old.kind in ("accuracy", "quality"):
        differences.append(f"(the processor may be the reason: {was!r} before, {now!r} now)")
    return (*differences, *_measured_differences(old, new))


def _plain(result: CellResult) -> dict[str, Any]:
    plain: dict[str, Any] = repeatable(result)
    return plain


def different(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """Yield each place where two plain values differ, with both values.

    >>> list(different({"a": [1, 2.0], "b": "x"}, {"a": [1, 2.5], "b": "x"}))
    ['a[1]: 2.0 before, 2.5 now']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from different(old.get(name), new.get(name), f"{place}.{name}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from different(a, b, f"{place}[{i}]")
    elif old != new:
        yield f"{place}: {old!r} before, {new!r} now"


def _measured_differences(old: CellResult, new: CellResult) -> Iterator[str]:
    """Yield the measured numbers that differ too much, for cells of measurements only."""
    if old.kind not in ("memory", "time", "theory") or not any(run.measured for run in (*old.runs, *new.runs)):
        return
    for name in _MACHINE:
        was, now = (result.environment.get(name) for result in (old, new))
        if was != now:
            yield f"environment.{name}: {was!r} before, {now!r} now; measured numbers are not comparable"
    for i, (run, again) in enumerate(zip(old.runs, new.runs, strict=False)):
        for name, near in NEAR_ENOUGH.items():
            a, b = run.measured.get(name), again.measured.get(name)
            if a is None or b is None or abs(b - a) > near * abs(a):
                yield f"runs[{i}].measured.{name}: {a!r} before, {b!r} now; it may differ by {near:.0%}"


# Acceptance ------------------------------------------------------------------------------------------------


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
