"""Stale results that today's code would find again: one job of each kind is run, and the rest of the kind accepted.

Results are of a kind where they came from the same commit and machine, and today's code takes the same way through all
of them: their options are equal, but for numbers, which only have to be both none, both one, or both more. (A coarser
notion, which takes less time and proves less: they have the same method, and tune the same.) Of each kind the cheapest
cell is found again from its own search and runs, of which only the first seed's run and the untuned model's evaluation
are computed, with as many threads as before. Where all numbers agree that are the same each time, to the last bit, the
results of the kind get today's key, and a record of it. What a clock or a gauge gave cannot agree like that: cells that
are about it (memory, time, theory with measurements) are accepted where it is near enough on the same machine.

On another kind of processor last digits differ by themselves. There the code that the results are of can be run beside
today's, from a checkout of its commit: then the two are compared, on this machine, and not the stored numbers.
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
from tempfile import TemporaryDirectory
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

# How far a measured number of a cell that is about it may be from the one before, as a fraction of that.
NEAR_ENOUGH = {"over_baseline_bytes": 0.03, "seconds_per_step": 0.15}
# Measured numbers compare between machines that agree in these.
_MACHINE = ("machine", "processor", "cpu_threads", "gpu")
_PARTS = ("search", "chosen", "runs", "baselines")


@dataclass(frozen=True)
class Stale:
    """A cell, and its result by other code."""

    spec: CellSpec
    result: CellResult

    @property
    def commit(self) -> str:
        """The last code that the result is known to be of."""
        return (self.result.verified[-1] if self.result.verified else self.result).commit

    @property
    def seconds(self) -> float:
        """What the run of the first seed took."""
        return self.result.runs[0].seconds if self.result.runs else 0.0


@dataclass(frozen=True)
class Group:
    """Stale results of a kind, the cheapest first."""

    members: tuple[Stale, ...]
    alike: Alike = "options"

    @property
    def cheapest(self) -> Stale:
        """The one whose job is run."""
        return self.members[0]

    @property
    def name(self) -> str:
        """What people know it by: its kind, method, tuning, model and task."""
        options = self.cheapest.spec.options
        named = (options.get(name) for name in ("method", "tuning", "model", "task"))
        return " · ".join([self.cheapest.spec.kind, *map(str, filter(None, named))])


@dataclass(frozen=True)
class Verdict:
    """What came of a group.

    Attributes:
        differences: the numbers that are others today; nothing where the group was accepted.
        accepted: the cells that have today's key now.
        left: the others, with the reason.
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
        """As plain values."""
        listed = {"differences": list(self.differences), "accepted": list(self.accepted), "left": dict(self.left)}
        return {"kind": self.group.name, "by": self.group.cheapest.spec.path, **listed}


# Which results ---------------------------------------------------------------------------------------------


def stale_of(
    results: Path, specs: Sequence[CellSpec], of_commit: str | None = None
) -> tuple[list[Stale], dict[str, str]]:
    """The stale results of cells that can be verified; of the others by path why not.

    Args:
        results: the folder of results.
        specs: the cells.
        of_commit: the results must be of this commit's code.
    """
    found: list[Stale] = []
    left: dict[str, str] = {}
    for spec in specs:
        if state_of(results, spec) != "stale":
            continue
        result = read_result(result_path(results, spec.scale, spec.experiment, spec.name))
        assert result is not None
        if result.kind != spec.kind or _config_of(result.config, spec) != _config_of(_dumped(spec), spec):
            left[spec.path] = "its config is no longer that of the cell"
        elif result.status != "done":
            left[spec.path] = f"it is not done: {result.status}"
        elif of_commit is not None and of_commit != (last := Stale(spec, result).commit):
            left[spec.path] = f"it is of the code of {last}, and not of {of_commit}"
        else:
            found.append(Stale(spec, result))
    return found, left


def _dumped(spec: CellSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", include={"options", "search", "budget", "seeds"})


def _config_of(config: Mapping[str, Any], spec: CellSpec) -> dict[str, Any]:
    """The parts of a config that the result depends on."""
    parts = ("options", "seeds", "search", "budget") if spec.kind == "accuracy" else ("options", "seeds")
    return {name: config.get(name) for name in parts}


def grouped(found: Sequence[Stale], alike: Alike = "options") -> list[Group]:
    """Stale results by their kinds, the cheapest of each first."""
    groups: dict[str, list[Stale]] = {}
    for one in found:
        groups.setdefault(_kind_of(one, alike), []).append(one)
    return [Group(tuple(sorted(some, key=lambda s: (s.seconds, s.spec.path))), alike) for some in groups.values()]


def _kind_of(one: Stale, alike: Alike) -> str:
    """The same text for results of a kind."""
    spec, result = one.spec, one.result
    last = result.verified[-1] if result.verified else result
    named = {name: spec.options.get(name) for name in ("method", "tuning")}
    way = named if alike == "method" else without_amounts(spec.options)
    is_measured = any(run.measured for run in result.runs)
    origin = (one.commit, result.environment, last.environment)
    return json.dumps([spec.kind, is_measured, origin, way], sort_keys=True)


def without_amounts(value: Any) -> Any:
    """Plain values with numbers replaced by whether they are none, one or more.

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


# Whether they agree ----------------------------------------------------------------------------------------


class _Again:
    """Does those jobs of a cell that are verified; the others' outcomes are taken from its result."""

    def __init__(self, one: Stale, execute: Callable[[Job], Outcome]) -> None:
        self._execute, self._one = execute, one
        self._trials = list(one.result.search)
        self.environment: dict[str, str] = {}

    def __call__(self, job: Job) -> Outcome:
        if job.role == "trial" and self._trials:
            return _of_trial(self._trials.pop(0))
        if job.role == "run" and job.options["seed"] != self._one.spec.seeds[0]:
            kept = next((run for run in self._one.result.runs if run.seed == job.options["seed"]), None)
            if kept is not None:
                return Outcome("done", found={"run": kept.model_dump(mode="json"), "environment": {}})
        threads = self._one.result.environment.get("cpu_threads")
        outcome = self._execute(replace(job, environment={"OMP_NUM_THREADS": threads} if threads else {}))
        self.environment = outcome.found.get("environment", self.environment)
        return outcome


def _of_trial(trial: Trial) -> Outcome:
    """The outcome that a trial was made of."""
    dev = None
    if trial.dev_value is not None:
        dev = Score(value=trial.dev_value, num_examples=0, loss=trial.dev_loss)
    shared = trial.model_dump(include={"seed", "num_steps", "num_forwards", "seconds", "peak_memory", "measured"})
    run = RunRecord(dev=dev, **shared)
    return Outcome(trial.status, trial.message, {"run": run.model_dump(mode="json"), "environment": {}})


def found_again(one: Stale, execute: Callable[[Job], Outcome]) -> CellResult:
    """A stale result with the jobs that are verified done again, and with the machine of these.

    Raises:
        CellStopped: a job could not be done.
        KeyboardInterrupt: the runner is to stop.
    """
    from zotune.bench.run.cell_kinds import KINDS

    again, found = _Again(one, execute), PartialResult()
    KINDS[one.spec.kind](one.spec, again, found)
    parts = {part: getattr(found, part) for part in _PARTS}
    return CellResult.model_validate(one.result.model_dump() | parts | {"environment": again.environment})


def differences_of(old: CellResult, new: CellResult) -> tuple[str, ...]:
    """The numbers that are others in a result that was found again, each with both values."""
    before, after = ({part: _plain(result)[part] for part in _PARTS} for result in (old, new))
    apart = list(different(before, after))
    was, now = (result.environment.get("processor") for result in (old, new))
    if apart and was != now and old.kind in ("accuracy", "quality"):
        apart.append(f"(another processor may be why: {was!r} before, {now!r} now)")
    return (*apart, *_far(old, new))


def _plain(result: CellResult) -> dict[str, Any]:
    plain: dict[str, Any] = repeatable(result)
    return plain


def different(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """Where two plain values differ, with both.

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


def _far(old: CellResult, new: CellResult) -> Iterator[str]:
    """Where cells that are about measured numbers have others today; there is nothing in the cells of other kinds."""
    if old.kind not in ("memory", "time", "theory") or not any(run.measured for run in (*old.runs, *new.runs)):
        return
    for name in _MACHINE:
        was, now = (result.environment.get(name) for result in (old, new))
        if was != now:
            yield f"environment.{name}: {was!r} before, {now!r} now; what is measured does not compare"
    for i, (run, again) in enumerate(zip(old.runs, new.runs, strict=False)):
        for name, near in NEAR_ENOUGH.items():
            a, b = run.measured.get(name), again.measured.get(name)
            if a is None or b is None or abs(b - a) > near * abs(a):
                yield f"runs[{i}].measured.{name}: {a!r} before, {b!r} now; it may differ by {near:.0%}"


# Accepting them --------------------------------------------------------------------------------------------


def accepted(results: Path, one: Stale, record: Verified) -> str | None:
    """Give a result today's key; None, or why it was left as it is."""
    path = result_path(results, one.spec.scale, one.spec.experiment, one.spec.name)
    with locked(lock_of(results, one.spec)) as is_mine:
        if not is_mine():
            return "another runner is at it"
        if read_result(path) != one.result:
            return "it was written anew meanwhile"
        new = {"key": key_of_cell(one.spec), "verified": (*one.result.verified, record)}
        write_result(results, one.result.model_copy(update=new))
    return None


def verify(
    results: Path,
    groups: Sequence[Group],
    slots: Sequence[tuple[Executor, Executor | None]],
    stop: threading.Event,
    display: Display,
) -> list[Verdict]:
    """Run a job of each group and accept the groups that agree; the verdicts there was time for.

    Each result is accepted by one write of a whole file, so that an interruption leaves some accepted and the others
    as they were; jobs that are done are kept, and the next call does not run them again.

    Args:
        results: the folder of results.
        groups: the results to verify, by kinds.
        slots: for each job that runs at a time what runs today's code, and what runs the code that the results are of;
            without the latter the stored numbers are compared.
        stop: set by whoever wants it to end.
        display: is told of the cells whose jobs are run.
    """
    free, shown = SimpleQueue[tuple[Executor, Executor | None]](), threading.Lock()
    for slot in slots:
        free.put(slot)

    def work(group: Group) -> Verdict | None:
        if stop.is_set():
            return None
        slot = free.get()
        try:
            with shown:
                display.began(group.cheapest.spec)
            scale = results / group.cheapest.spec.scale
            before = None if slot[1] is None else _unkept(slot[1], scale)
            verdict = _judged(results, group, Store(scale, slot[0], stop.is_set), before)
            with shown:
                apart = f"{len(verdict.differences)} numbers differ" if verdict.differences else "it agrees"
                state: State = "stale" if verdict.differences else "done"
                display.ended(group.cheapest.spec, state, f"{apart}; {len(verdict.accepted)} accepted")
        except KeyboardInterrupt:
            stop.set()
            return None
        except BaseException:
            stop.set()
            raise
        finally:
            free.put(slot)
        return verdict

    with ThreadPoolExecutor(len(slots)) as pool:
        waiting = [pool.submit(work, group) for group in groups]
        # Waiting in pieces lets signals reach the main thread.
        while wait(waiting, timeout=0.2).not_done:
            pass
    return [verdict for verdict in (one.result() for one in waiting) if verdict is not None]


def _unkept(executor: Executor, scale: Path) -> Callable[[Job], Outcome]:
    """Runs jobs by other code, of which nothing is kept: a job is known by today's."""

    def execute(job: Job) -> Outcome:
        (scale / JOBS).mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=scale / JOBS, prefix="before-") as folder:
            return executor(job, Path(folder))

    return execute


def _judged(
    results: Path, group: Group, execute: Callable[[Job], Outcome], before: Callable[[Job], Outcome] | None
) -> Verdict:
    one, environment = group.cheapest, dict[str, str]()
    try:
        new = found_again(one, execute)
        environment = new.environment
        differences = differences_of(one.result if before is None else found_again(one, before), new)
    except CellStopped as stopped:
        differences = (f"its job could not be done again: {stopped.status}, {stopped.message}",)
    paths = [one.spec.path for one in group.members]
    if differences:
        return Verdict(group, differences, left=dict.fromkeys(paths, f"{group.cheapest.spec.path} differs"))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    said = {one.spec.path: accepted(results, one, _record(group, one, environment, now)) for one in group.members}
    left = {path: reason for path, reason in said.items() if reason is not None}
    return Verdict(group, accepted=tuple(path for path in paths if path not in left), left=left)


def _record(group: Group, one: Stale, environment: dict[str, str], now: str) -> Verified:
    by = group.cheapest.spec.path
    return Verified(
        key_before=one.result.key, by=by, alike=group.alike, commit=commit(), environment=environment, time=now
    )
