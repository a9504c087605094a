"""Memory and time of one step, measured phase by phase in a process of its own.

Load, forward, backward and update each have a peak of their own. On a CPU this is resident memory: the kernel's
high-water mark, reset before each phase, and the largest sample of a thread that looks every 5 ms. On a GPU it is the
memory that torch's allocator gave out (allocated) and holds (reserved); times are read after synchronisation.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import RunError, ZotuneError
from zotune.estimate.objective import Batched, accumulate
from zotune.llm.config.schema import validate
from zotune.llm.models.load import load
from zotune.llm.models.placement.devices import find_device
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.models.tuned_sets.find import find_aim, needs_aim, set_aim
from zotune.llm.output.environment import environment
from zotune.llm.scoring.closures import candidate_loss
from zotune.llm.scoring.objectives import OBJECTIVES
from zotune.llm.training.optimizers import make_optimizer
from zotune.llm.training.step import try_side_by_side
from zotune.optim.hybrid import Hybrid
from zotune.optim.master_weights import FirstOrder, back_propagate
from zotune.optim.zeroth_order import ZerothOrder
from zotune.plan.workload import Workload, synthetic_examples
from zotune.system.child_python import python, python_path
from zotune.system.malloc import heap_environment, keep_activations, tune_malloc
from zotune.system.peak_memory import forget_peak, peak_memory, resident_memory

INTERVAL = 0.005
"""Seconds between two samples of resident memory."""
LOAD = "load"
"""The phase that belongs to no step."""


@dataclass(frozen=True)
class Phase:
    """Peak memory and times of one phase, over all steps.

    Attributes:
        peak: bytes of resident memory by the kernel's high-water mark; on a GPU, allocated bytes.
        sampled: largest sample of resident memory, in bytes; it can miss a short peak.
        reserved: bytes that torch's allocator held on the GPU; 0 on a CPU.
        seconds: one value for each step; a single value for the load.
    """

    peak: int
    sampled: int
    reserved: int
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Measurement:
    """The measurement of one step of a workload.

    Attributes:
        options: all options of the workload.
        baseline: bytes of the process with its libraries and without a model; 0 on a GPU.
        phases: the phases of the step by name: load, forward, backward, update. The update of `zo_sgd_cons` includes
            its last probes, the forward phase of a hybrid includes its probes.
        step_seconds: seconds of each step after the first, which is a warm-up.
        loss: loss of the last step.
        num_threads: number of torch's threads.
        environment: versions and machine.
    """

    options: dict[str, Any]
    baseline: int
    phases: dict[str, Phase]
    step_seconds: tuple[float, ...]
    loss: float
    num_threads: int
    environment: dict[str, Any]

    @property
    def peak(self) -> int:
        """Peak bytes over all phases."""
        return max(phase.peak for phase in self.phases.values())

    @property
    def over_baseline(self) -> int:
        """Peak bytes minus the baseline."""
        return self.peak - self.baseline

    @property
    def loading(self) -> int:
        """Peak bytes while the model is loaded, minus the baseline."""
        return self.phases[LOAD].peak - self.baseline

    @property
    def running(self) -> int:
        """Peak bytes of the step's own phases, minus the baseline."""
        return max(phase.peak for name, phase in self.phases.items() if name != LOAD) - self.baseline

    @property
    def seconds(self) -> float:
        """Median time of a step."""
        return statistics.median(self.step_seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Quartiles of the time of a step; both are equal if a single step was timed."""
        if len(self.step_seconds) < 2:
            return self.seconds, self.seconds
        low, _, high = statistics.quantiles(self.step_seconds, n=4, method="inclusive")
        return low, high

    def to_json(self) -> dict[str, Any]:
        """The measurement with its derived numbers as a JSON object."""
        bytes_of = {name: getattr(self, name) for name in ("peak", "over_baseline", "loading", "running")}
        derived = {**bytes_of, "seconds": self.seconds}
        return {**asdict(self), **derived, "spread": self.spread}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Measurement:
        """The measurement from the JSON object of `to_json`."""
        parts = {f.name: values[f.name] for f in fields(cls)}
        parts["phases"] = {name: Phase(**{**p, "seconds": tuple(p["seconds"])}) for name, p in parts["phases"].items()}
        return cls(**{**parts, "step_seconds": tuple(parts["step_seconds"])})


def measure(options: dict[str, Any], *, num_steps: int = 2) -> Measurement:
    """Run a workload for some steps in a fresh process and measure it.

    Args:
        options: options of `zotune.plan.workload.Workload`; missing ones have their defaults.
        num_steps: steps to time, at least 1, after one warm-up step. Memory is measured over all steps.

    Raises:
        UsageError: an option is unknown or out of range.
        RunError: the process failed, for instance out of memory; the message is the last line that it printed.
    """
    workload = validate(Workload, options, "measure")
    if num_steps < 1:
        raise ValueError(f"num_steps, the number of timed steps, must be at least 1, got {num_steps}")
    command = python("-m", "zotune.plan.process_memory", workload.model_dump_json(), str(num_steps))
    environment = {**os.environ, **heap_environment(), "PYTHONPATH": python_path()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"signal {-done.returncode}"]
        raise RunError(f"the measuring process of {workload.model} failed: {reason[0]}")
    return Measurement.from_json(json.loads(done.stdout.splitlines()[-1]))


class Recorder:
    """A context that records peaks and times of phases; a thread samples the memory while it is active."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda, self._device = device.type == "cuda", device
        self._phase, self._start = "", 0.0
        self._stopped = threading.Event()
        self._sampled: dict[str, int] = {}
        self._peak: dict[str, int] = {}
        self._reserved: dict[str, int] = {}
        self._seconds: dict[str, list[float]] = {}
        self._now: dict[str, float] = {}
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()

    def enter(self, phase: str) -> None:
        """End the present phase and start another; an empty name starts none."""
        now = self._clock()
        if self._phase:
            self._close(now)
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            forget_peak()
        self._phase, self._start = phase, self._clock()

    def finish(self) -> None:
        """End a step (or the load): each phase gets one more time, the sum of its parts in the step."""
        self.enter("")
        for name, seconds in self._now.items():
            self._seconds.setdefault(name, []).append(seconds)
        self._now = {}

    def phases(self) -> dict[str, Phase]:
        """The peaks and times of the finished steps by phase."""
        return {
            name: Phase(self._peak[name], self._sampled.get(name, 0), self._reserved[name], tuple(seconds))
            for name, seconds in self._seconds.items()
        }

    def _close(self, now: float) -> None:
        name = self._phase
        self._now[name] = self._now.get(name, 0.0) + now - self._start
        self._peak[name] = max(self._peak.get(name, 0), peak_memory(self._device))
        reserved = torch.cuda.max_memory_reserved(self._device) if self._is_cuda else 0
        self._reserved[name] = max(self._reserved.get(name, 0), reserved)

    def _clock(self) -> float:
        if self._is_cuda:
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _sample(self) -> None:
        while not self._stopped.wait(INTERVAL):
            phase = self._phase
            self._sampled[phase] = max(self._sampled.get(phase, 0), resident_memory())


def measure_here(workload: Workload, num_steps: int) -> Measurement:
    """Measure a workload in this process, which should be fresh."""
    tune_malloc()
    _warm_up_libraries(workload)
    tune_malloc()  # again, since the passes of that step changed the settings
    device = find_device(workload.device)
    with Recorder(device) as recorder:
        baseline = 0 if device.type == "cuda" else resident_memory()
        recorder.enter(LOAD)
        step = prepare_step(workload)
        recorder.finish()
        for _ in range(1 + num_steps):
            loss = step(recorder)
            recorder.finish()
        phases = recorder.phases()
    parts = [phase.seconds for name, phase in phases.items() if name != LOAD]
    return Measurement(
        options=workload.model_dump(mode="json"),
        baseline=baseline,
        phases=phases,
        step_seconds=tuple(map(sum, zip(*parts, strict=True)))[1:],
        loss=loss,
        num_threads=torch.get_num_threads(),
        environment=environment(),
    )


def _warm_up_libraries(workload: Workload) -> None:
    """Take a step of a tiny model by the same method, so that the baseline has what libraries allocate once."""
    tiny = {"model": "random:opt-tiny", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    tiny |= {"length": 8, "hybrid_layers": None, "hybrid_method": "fo_sgd", "hybrid_tied": None}
    tiny |= {"tuned_layers": None, "only_layer": None}
    with Recorder(torch.device("cpu")) as recorder:
        prepare_step(workload.model_copy(update={**tiny, "tuning": "lora", "lora_target_modules": ()}))(recorder)
    gc.collect()


def prepare_step(workload: Workload) -> Callable[[Recorder], float]:
    """Load the model as a run does; return a function that takes one step and returns the loss."""
    lm = load(workload, seed=workload.seed)
    prepare_tuning(lm, workload)
    _touch_pages(lm.module)
    examples, objective = synthetic_examples(workload, lm), OBJECTIVES[workload.objective]
    closure = partial(candidate_loss, lm, objective, lm.score)
    if needs_aim(workload):
        set_aim(lm, find_aim(lm, workload, examples))
    optimizer = make_optimizer(lm.module, workload, workload.seed, closure(examples[:1], 0, ()), aim=lm.aim)
    try_side_by_side(optimizer, closure(examples[:2], 0, ()), lm, workload)
    size = workload.per_device_train_batch_size
    parts = [closure(examples[lo : lo + size], 0, ()) for lo in range(0, len(examples), size)]
    if isinstance(optimizer, ZerothOrder):
        keep_activations()
    if isinstance(optimizer, ZerothOrder | Hybrid):
        return lambda recorder: optimizer.step(accumulate([_marked(part, recorder) for part in parts]))
    if workload.gradient_checkpointing:
        lm.module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    lm.module.train()
    return lambda recorder: _first_order_step(optimizer, parts, recorder)


def _touch_pages(module: nn.Module) -> None:
    """Read all pages of memory-mapped weights, since a few synthetic rows read only a part of the embedding."""
    for p in module.parameters():
        if p.device.type == "cpu" and type(p.data) is Tensor and p.is_contiguous():
            p.detach().view(-1).view(torch.uint8)[::1024].sum()


def _marked(closure: Batched, recorder: Recorder) -> Batched:
    """The objective with marks for the recorder: computing it is the forward phase; backward or update follows."""

    def value(copies: int) -> Tensor:
        recorder.enter("forward")
        loss = closure.value(copies)
        recorder.enter("backward" if loss.requires_grad else "update")
        return loss

    return Batched(value, closure.most, closure.name)


def _first_order_step(optimizer: FirstOrder, parts: Sequence[Batched], recorder: Recorder) -> float:
    optimizer.zero_grad()
    total = 0.0
    for part in parts:
        loss = _marked(part, recorder)() / len(parts)
        back_propagate(optimizer, loss)
        total += float(loss.detach())
    recorder.enter("update")
    optimizer.step()
    return total


if __name__ == "__main__":
    _, options, count = sys.argv
    try:
        measurement = measure_here(validate(Workload, json.loads(options), "measure"), int(count)).to_json()
    except ZotuneError as error:
        sys.exit(str(error))
    print(json.dumps(measurement))  # noqa: T201
