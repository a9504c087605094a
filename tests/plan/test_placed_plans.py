"""A plan of streamed layers counts what is in memory, what visits it, and what is written to the disk."""

import json

import pytest
import torch

from zotune.errors import UsageError
from zotune.llm.models.load import load
from zotune.llm.models.placement.device_map import placement_of
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.training.optimizers import make_optimizer
from zotune.model.streaming import settle, stream_of
from zotune.plan.dry_run import dry_run
from zotune.plan.options import PlanConfig
from zotune.plan.planning import plan

LAYER = "random:opt-tiny"


def resident_bytes(config):
    """Bytes in memory and in the largest streamed layer, counted on the model itself."""
    stream = stream_of(load(config).module)
    matrices = [sum(p.nbytes for p in of_layer) for of_layer in stream.matrices]
    return matrices, sum(matrices)


@pytest.mark.parametrize("method", ["zo_sgd", "zo_adam"])
def test_a_dry_run_says_what_lies_where(config, tmp_path, method):
    options = config(model=LAYER, method=method, offload_folder=tmp_path / "disk")
    streamed, resident = dry_run(options), dry_run(config(model=LAYER, method=method))
    layers, on_disk = resident_bytes(options)
    places = streamed.places
    assert resident.places is None
    assert places.weights == {"cpu": resident.memory.weights - on_disk, "disk": on_disk}
    assert places.layer == max(layers) and places.written == on_disk
    assert streamed.memory.weights == resident.memory.weights - on_disk + max(layers)
    assert places.state == (2 * on_disk if method == "zo_adam" else 0)
    assert streamed.memory.state == resident.memory.state - places.state
    assert "the weights lie in cpu" in str(streamed) and str(tmp_path / "disk") in str(streamed)
    assert json.loads(json.dumps(streamed.to_json()))["places"]["written"] == on_disk
    assert not any((tmp_path / "disk").iterdir())


def test_the_state_of_a_plan_is_what_a_step_writes(config, tmp_path):
    options = config(model=LAYER, method="zo_adam", offload_folder=tmp_path / "disk")
    lm = load(options)
    prepare_tuning(lm, options)
    stream = stream_of(lm.module)
    opt = make_optimizer(lm.module, options.model_copy(update={"learning_rate": 1e-3}), 0)
    ids = torch.arange(8)[None]
    opt.step(lambda: lm.module(input_ids=ids, labels=ids).loss)
    before = stream.scratch._end
    settle(lm.module)
    written = stream.scratch._end - before
    pages = 4096 * 2 * sum(map(len, stream.matrices))
    planned = dry_run(options).places.state
    assert planned <= written < planned + pages


def test_nothing_is_written_for_an_adapter(config, tmp_path):
    streamed = dry_run(config(model=LAYER, tuning="lora", offload_folder=tmp_path / "disk"))
    assert streamed.places.written == streamed.places.state == 0
    assert "nothing of them is written" in str(streamed)


def test_a_plan_counts_streamed_layers(tmp_path):
    options = {"model": LAYER, "device": "cpu", "per_device_train_batch_size": 2, "length": 16}
    streamed = plan(PlanConfig(**options, offload_folder=tmp_path / "disk"))
    resident = {row.method: row for row in plan(PlanConfig(**options)).rows}
    assert {row.method for row in streamed.rows} == {name for name in resident if not name.startswith("fo_")}
    for row in streamed.rows:
        assert row.prediction.weights < resident[row.method].prediction.weights
        assert row.prediction.activations == resident[row.method].prediction.activations
    assert streamed.places.weights["disk"] > 0
    assert streamed.to_json()["places"]["layer"] == streamed.places.layer


def test_a_plan_for_a_gpu_counts_two_layers_and_needs_none_here(config, tmp_path):
    options = PlanConfig(model=LAYER, device="cuda", offload_folder=tmp_path / "disk", method="zo_sgd")
    assert plan(options).places.layers_at_once == 2


def map_of(config, places, tmp_path):
    path = tmp_path / "map.json"
    path.write_text(places if isinstance(places, str) else json.dumps(places))
    plain = config(model=LAYER)
    options = plain.model_copy(update={"device_map": str(path), "device": "auto"})
    return placement_of(options, load(plain).module, torch.device("cpu"))


ALL = {"": "cpu"}


@pytest.mark.parametrize(
    ("places", "reason"),
    [
        ({"model.decoder.layers": "cpu"}, "does not say where"),
        ({**ALL, "lm_head": "disk"}, "puts tied weights, which are one tensor, in two places"),
        ({**ALL, "model.decoder.layers.0": "disk"}, "--offload-folder FOLDER"),
        ("not a map", "must map paths of modules to devices"),
        ("{", "cannot be read"),
    ],
)
def test_a_device_map_that_cannot_work_is_refused_in_words(config, tmp_path, places, reason):
    with pytest.raises(UsageError, match=reason):
        map_of(config, places, tmp_path)


def test_a_device_map_is_read_by_the_longest_path(config, tmp_path):
    places = map_of(config, {**ALL, "model.decoder.layers": "cpu"}, tmp_path)
    assert places.of("model.decoder.layers.1.fc1.weight") == "cpu"
    assert places.streamed_layers == []


def test_a_file_that_is_not_there_is_no_device_map(config):
    with pytest.raises(UsageError, match="is no file, and none of auto, balanced, sequential"):
        options = config(model=LAYER).model_copy(update={"device_map": "atuo"})
        placement_of(options, torch.nn.Linear(1, 1), torch.device("cpu"))
