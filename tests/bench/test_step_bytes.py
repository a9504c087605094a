"""The memory of a step is that of its own phases: loading, which may take more, is another number."""

import pytest
import torch

from zotune.bench.measure.step import devices, numbers_of
from zotune.bench.measure.step_memory import StepMemory
from zotune.bench.spec.resolve import find
from zotune.plan.process_memory import Measurement, Phase

MIB = 2**20


def measured(**peaks):
    """A measurement with these peaks by phase, in MiB above a baseline of 100."""
    phases = {name: Phase((100 + peak) * MIB, 0, 0, (1.0, 2.0)) for name, peak in peaks.items()}
    return Measurement({}, 100 * MIB, phases, (3.0, 3.0, 4.0), 0.5, 1, {})


@pytest.mark.parametrize(
    ("peaks", "step", "loading"),
    [
        ({"load": 600, "forward": 500, "update": 450}, 500, 600),
        ({"load": 600, "forward": 500, "backward": 900, "update": 700}, 900, 600),
        ({"load": 10, "forward": 20, "update": 30}, 30, 10),
    ],
)
def test_a_step_takes_the_largest_of_its_own_phases_whatever_loading_took(peaks, step, loading):
    numbers = numbers_of(measured(**peaks))
    assert (numbers["step_bytes"], numbers["loading_bytes"]) == (step * MIB, loading * MIB)
    assert numbers["baseline_bytes"] == 100 * MIB
    assert "over_baseline_bytes" not in numbers
    assert measured(**peaks).over_baseline == max(step, loading) * MIB


def test_the_papers_bytes_fill_the_papers_devices():
    """Its GB are GiB, and so are those of its devices: 158 GB fill two of 80."""
    numbers = {}
    for number in find("table4")[1].paper_cells():
        numbers.setdefault(number.coordinates["method"], {})[number.unit] = number.value
    assert len(numbers) == 8
    assert {m: devices(n["GB"] * 2**30) for m, n in numbers.items()} == {m: n["A100s"] for m, n in numbers.items()}


def test_the_steps_of_a_run_are_measured_apart_from_what_comes_before_and_between():
    memory = StepMemory("cpu")
    held = torch.ones(48 * MIB // 4)
    del held
    memory.on_train_begin()
    memory.on_step_begin()
    held = torch.ones(16 * MIB // 4)
    del held
    memory.on_step_end()
    between = torch.ones(64 * MIB // 4)  # as an evaluation does
    del between
    memory.on_step_begin()
    memory.on_step_end()
    numbers = memory.numbers()
    assert numbers["loading_bytes"] - numbers["step_bytes"] > 24 * MIB
    assert memory.peak - numbers["baseline_bytes"] >= numbers["loading_bytes"]
    assert StepMemory("cpu").numbers() == {}
