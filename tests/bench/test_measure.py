"""What is measured of a process is what it takes: by phases, over its libraries, and near to what was foretold."""

import json
import sys
import time

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from zotune.errors import RunError, UsageError
from zotune.llm.config.schema import validate
from zotune.llm.models.random_models import byte_tokenizer
from zotune.plan import predict
from zotune.plan.memory import HEAP_FRAGMENTATION
from zotune.plan.process_memory import Measurement, Recorder, measure, prepare_step
from zotune.plan.workload import Workload
from zotune.system.peak_memory import free_memory, peak_memory, resident_memory

MIB = 2**20


def test_a_recorder_tells_the_peaks_and_times_of_phases_apart():
    with Recorder(torch.device("cpu")) as recorder:
        for size in (64, 32):
            before = resident_memory()
            recorder.enter("large")
            held = torch.ones(size * MIB // 4)
            time.sleep(0.05)
            del held
            recorder.enter("small")
            time.sleep(0.02)
            recorder.finish()
    phases = recorder.phases()
    assert set(phases) == {"large", "small"}
    assert phases["large"].peak - phases["small"].peak > 24 * MIB
    # The sampling thread looks every 5 ms: it saw what stayed for 50.
    assert phases["large"].sampled - before > 24 * MIB
    assert [len(phase.seconds) for phase in phases.values()] == [2, 2]
    assert min(phases["large"].seconds) >= 0.05 > max(phases["small"].seconds) - 1


def test_memory_of_this_process_is_between_nothing_and_all():
    assert 0 < resident_memory() <= peak_memory() + MIB
    assert free_memory() > MIB


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of some 46 million random weights, in single precision."""
    config = OPTConfig(
        hidden_size=1024,
        word_embed_proj_dim=1024,
        ffn_dim=4096,
        num_hidden_layers=3,
        num_attention_heads=8,
        vocab_size=8192,
        max_position_embeddings=256,
    )
    path = tmp_path_factory.mktemp("model")
    OPTForCausalLM(config).save_pretrained(path)
    byte_tokenizer(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("method", "tuning"), [("zo_sgd", "full"), ("fo_sgd", "lora"), ("zo_adam", "lora"), ("fo_adam", "full")]
)
@pytest.mark.slow
def test_a_process_takes_what_was_foretold(folder, method, tuning):
    """Within a tenth; the heap may hold less than the fragments that are predicted for forward-only methods."""
    sizes = {"per_device_train_batch_size": 4, "length": 128}
    common = {"model": str(folder), "method": method, "tuning": tuning, "dtype": "float32", "device": "cpu"}
    foretold = predict(**common, batch_size=4, length=128)
    found = measure({**common, **sizes, "learning_rate": 1e-6}, num_steps=2)
    fragments = HEAP_FRAGMENTATION if method.startswith("zo") else 0
    assert 0.9 * (foretold.total - fragments) < found.over_baseline < 1.1 * foretold.total
    running = max(phase.peak for name, phase in found.phases.items() if name != "load") - found.baseline
    assert 0.9 * (foretold.running - fragments) < running < 1.1 * foretold.running
    wanted = {"load", "forward", "update"} | ({"backward"} if method.startswith("fo") else set())
    assert set(found.phases) == wanted
    assert len(found.step_seconds) == 2 and found.spread[0] <= found.seconds <= found.spread[1]
    assert Measurement.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_what_cannot_be_measured_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"batch_sise.*batch_size"):
        measure({"per_device_train_batch_sise": 3})
    with pytest.raises(ValueError, match="at least 1"):
        measure({}, num_steps=0)
    # A measuring process that fails, in place of one that loads torch before it does.
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'many lines' >&2\necho 'out of memory' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RunError, match="random:opt-tiny failed: out of memory"):
        measure({"model": "random:opt-tiny", "device": "cpu"})


@pytest.mark.parametrize(
    ("method", "phases"), [("zo_sgd", {"forward", "update"}), ("fo_sgd", {"forward", "backward", "update"})]
)
def test_a_step_is_recorded_phase_by_phase(method, phases):
    options = {"model": "random:opt-tiny", "method": method, "length": 8, "device": "cpu"}
    with Recorder(torch.device("cpu")) as recorder:
        step = prepare_step(validate(Workload, options, "test"))
        for _ in range(2):
            assert step(recorder) > 0
            recorder.finish()
    found = recorder.phases()
    assert found.keys() == phases
    assert all(len(phase.seconds) == 2 and phase.peak > 0 for phase in found.values())


@pytest.mark.slow
def test_a_refusal_in_the_measuring_process_is_told():
    with pytest.raises(RunError, match="reads at most 512"):
        measure({"model": "random:opt-tiny", "length": 1000, "device": "cpu"})


@pytest.mark.slow
def test_a_plan_tells_the_seconds_of_a_step_where_there_are_weights(zotune):
    said = zotune("plan", "--model", "random:opt-tiny", "--method", "zo_sgd", "--length", 16, "--calibrate", "--json")
    (row,) = json.loads(said.out)["methods"]
    assert 0 < row["seconds"] < 60
