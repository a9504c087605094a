"""A search over options by whole runs that never read an evaluation row; stopped, it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from zotune.errors import RunError, UsageError
from zotune.llm.config.run import TrainConfig, write_yaml
from zotune.llm.config.schema import validate
from zotune.llm.output.json_files import write_json
from zotune.llm.output.locked_folder import LockedFolder
from zotune.llm.output.result import Result
from zotune.llm.search.points import Point, Search, grid, optuna_trials
from zotune.llm.tasks.user_data import RESOLVED_OPTIONS
from zotune.llm.training.train import train
from zotune.messages import say

RECIPE, RESULTS = "best.yaml", "tune.json"


class SearchStoppedError(RunError):
    """A signal stopped a run of a search; the same search goes on with it."""

    def __init__(self, signal: int) -> None:
        super().__init__("the search was stopped; the same command goes on with it")
        self.signal = signal


@dataclass(frozen=True)
class TrialResult:
    """One run of a search.

    Attributes:
        point: its values of the options that are compared.
        folder: its output folder.
        loss, value: loss and metric on the held-out rows; None if the run failed, with its message.
    """

    point: Mapping[str, Any]
    folder: str
    loss: float | None = None
    value: float | None = None
    metric: str = ""
    num_forwards: int = 0
    seconds: float = 0.0
    message: str = ""


@dataclass(frozen=True)
class Outcome:
    """The runs of a search in their order, the best one, and the recipe that repeats it."""

    trials: tuple[TrialResult, ...]
    best: TrialResult
    recipe: Path

    def to_json(self) -> dict[str, Any]:
        """Return the content of tune.json."""
        trials = [asdict(trial) for trial in self.trials]
        return {"trials": trials, "best": asdict(self.best), "recipe": str(self.recipe)}


def sweep(config: TrainConfig, axes: Mapping[str, Sequence[Any]], num_trials: int | None = None) -> Outcome:
    """Train at the points of a search, and write the best one's options as a recipe.

    Args:
        config: the options that all runs share; its `output_dir` holds a folder for each run.
        axes: values by option. All combinations are tried.
        num_trials: try so many points that Optuna chooses instead.

    Raises:
        UsageError: the rows leave nothing to compare by, or a run cannot start as configured.
        SearchStoppedError: a run was stopped by a signal.
        RunError: no run has a loss.
    """
    if config.num_dev == 0:
        raise UsageError("a search compares runs on held-out rows: give --num-dev above 0.")
    points = grid(axes) if num_trials is None else optuna_trials(axes, num_trials, config.seed)
    with LockedFolder(config.output_dir) as folder:
        trials = tuple(_trials(points, config))
        done = [trial for trial in trials if trial.loss is not None]
        if not done:
            raise RunError(f"no run of the search has a loss: {trials[-1].message}")
        best = min(done, key=lambda trial: trial.loss if trial.loss is not None else math.inf)
        outcome = Outcome(trials, best, config.output_dir / RECIPE)
        with folder.staged() as staging:
            write_yaml(staging / RECIPE, _at(config, best.point, config.output_dir / "best"))
            write_json(staging / RESULTS, outcome.to_json())
    return outcome


# Nor is any other run uploaded.
_NO_UPLOAD = {"push_to_hub": False, "hub_model_id": None, "hub_private_repo": False}


def _trials(points: Search[Point], config: TrainConfig) -> list[TrialResult]:
    trials: list[TrialResult] = []
    point: Point | None = next(points)
    while point is not None:
        trials.append(_trial(config, point, is_first=not trials))
        loss = trials[-1].loss
        say(f"{_text(point)}: {f'held-out loss {loss:.4f}' if loss is not None else trials[-1].message}")
        try:
            point = points.send(math.inf if loss is None else loss)
        except StopIteration:
            point = None
    return trials


def _at(config: TrainConfig, point: Mapping[str, Any], folder: Path) -> TrainConfig:
    """Return the options of a run at a point."""
    changed = {**config.model_dump(exclude_unset=True), **point, "output_dir": folder, "overwrite_output_dir": False}
    return validate(TrainConfig, changed, _text(point))


def _trial(config: TrainConfig, point: Point, *, is_first: bool) -> TrialResult:
    """Run a trial, or the rest of one that was stopped; of a finished one, read the results."""
    values = json.dumps({k: str(v) for k, v in point.items()}, sort_keys=True)
    name = f"{_text(point, '-')}-{hashlib.blake2b(values.encode(), digest_size=3).hexdigest()}".replace("/", "_")
    folder = config.output_dir / name[-80:]
    trial = TrialResult(point, str(folder))
    try:
        # Evaluation rows are for the run that the recipe makes.
        options = _at(config, point, folder).model_copy(update={"num_eval": 0, "num_more_eval": 0, **_NO_UPLOAD})
        return _finished(trial, options) or _summary(trial, train(options.model_copy(update={"resume": True})))
    except SearchStoppedError:
        raise
    except (RunError, UsageError) as error:
        # What is wrong with the first point is wrong with all of them.
        if is_first and isinstance(error, UsageError):
            raise
        return replace(trial, message=str(error).splitlines()[0])


def _finished(trial: TrialResult, options: TrainConfig) -> TrialResult | None:
    """Return the result of a run that has ended already, with these options."""
    path = Path(trial.folder) / "results.json"
    if not path.is_file():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    given, dev = options.model_dump(mode="json"), saved.get("dev")
    # What the rows and the defaults decide was open.
    fixed = {k: v for k, v in given.items() if k not in RESOLVED_OPTIONS and v not in (None, "auto")}
    if dev is None or any(saved["config"].get(k) != v for k, v in fixed.items()):
        return None
    metric, value = next(iter(dev.items()))
    cost = {name: saved[name] for name in ("num_forwards", "seconds")}
    return replace(trial, loss=dev["loss"], value=value, metric=metric, **cost)


def _summary(trial: TrialResult, result: Result) -> TrialResult:
    if result.stopped_by is not None:
        raise SearchStoppedError(result.stopped_by)
    dev = result.dev
    if dev is None or not math.isfinite(dev.loss):
        return replace(trial, message="the held-out loss is not finite")
    metric, value = next(iter(dev.summary().items()))
    return replace(
        trial, loss=dev.loss, value=value, metric=metric, num_forwards=result.num_forwards, seconds=result.seconds
    )


def _text(point: Mapping[str, Any], equals: str = " ") -> str:
    return ("-" if equals == "-" else ", ").join(
        f"{name}{equals}{value:g}" if isinstance(value, float) else f"{name}{equals}{value}"
        for name, value in point.items()
    )


def table(outcome: Outcome) -> str:
    """Return the runs as a table of text, the best one marked."""
    names = list(outcome.trials[0].point)
    # A log-loss is the loss.
    metrics = [] if outcome.best.value == outcome.best.loss else [outcome.best.metric or "metric"]
    rows = [[*names, "held-out loss", *metrics, "forward passes", ""]]
    for trial in outcome.trials:
        cells = [f"{v:g}" if isinstance(v, float) else str(v) for v in trial.point.values()]
        if trial.loss is None:
            rows.append([*cells, "-", *("-" for _ in metrics), "-", trial.message])
            continue
        mark = "best" if trial is outcome.best else ""
        values = [f"{trial.value:.4g}" for _ in metrics]
        rows.append([*cells, f"{trial.loss:.4f}", *values, str(trial.num_forwards), mark])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
