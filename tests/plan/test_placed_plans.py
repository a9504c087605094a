"""A plan of streamed layers counts what is in memory, what visits it, and what is written to the disk."""

import json

import pytest
import torch

from zotune.errors import UsageError
from zotune.llm.models.load import load
from zotune.llm.models.placement.device_map import placement_of
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.output.model_files import write_model_files
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


def test_what_is_converted_is_written(config, tmp_path, checkpoint_in_float16):
    options = {"model": str(checkpoint_in_float16), "tuning": "lora", "offload_folder": tmp_path / "disk"}
    same, converted = (dry_run(config(**options, dtype=dtype)) for dtype in ("float16", "float32"))
    matrices = resident_bytes(config(model=LAYER, offload_folder=tmp_path / "disk"))[1]
    assert (same.places.written, converted.places.written) == (0, matrices)


@pytest.fixture
def checkpoint_in_float16(config, tmp_path):
    lm = load(config(model=LAYER))
    lm.module.to(torch.float16)
    write_model_files(lm, tmp_path / "model")
    return tmp_path / "model"


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


def slices_of(config, monkeypatch, num_processes, **options):
    """What a dry run says of a process that holds a part of a model."""
    monkeypatch.setenv("WORLD_SIZE", str(num_processes))
    return dry_run(config(**options))


def test_a_dry_run_in_shards_says_what_a_process_holds(config, monkeypatch):
    options = {"model": "random:llama-tiny", "method": "zo_adam"}
    alone, model = dry_run(config(**options)), load(config(model=options["model"])).module
    by_fsdp = slices_of(config, monkeypatch, 3, **options, shard="fsdp")
    whole, layers = alone.memory.weights, [sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers]
    outside = whole - sum(layers)
    assert by_fsdp.places.weights == -(-whole // 3) and by_fsdp.places.gathered == outside + 2 * max(layers)
    assert by_fsdp.memory.state == -(-alone.memory.state // 3)
    assert "each of 3 processes (fsdp) holds" in str(by_fsdp)
    by_plan = slices_of(config, monkeypatch, 2, **options, shard="tp")
    norms = sum(p.nbytes for name, p in model.named_parameters() if "norm" in name)
    assert by_plan.places.weights == -(-(whole - norms) // 2) + norms and not by_plan.places.gathered
    assert json.loads(json.dumps(by_plan.to_json()))["places"]["num_processes"] == 2
    with pytest.raises(UsageError, match="do not divide"):
        slices_of(config, monkeypatch, 3, **options, shard="tp")


def test_an_adapter_beside_gathered_layers_is_whole_in_a_process(config, monkeypatch):
    options = {"model": "random:opt-tiny", "tuning": "lora", "method": "zo_adam"}
    alone = dry_run(config(**options))
    found = slices_of(config, monkeypatch, 2, **options, shard="fsdp")
    adapter = 4 * alone.num_tuned
    assert found.places.weights == (alone.memory.weights - adapter) // 2 + adapter
    assert found.memory.state == alone.memory.state
