"""A run whose layers are streamed from a file gives what the run in memory gives, to the bit."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from zotune.errors import RunError, UsageError
from zotune.llm.models.load import load
from zotune.llm.training.train import train
from zotune.model.mapped_memory import is_mapped
from zotune.model.streaming import stream_of

PASSING = {"seconds", "peak_memory"}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A function: the folder of a small checkpoint of a family, in some precision."""
    from zotune.llm.config.step import ModelOptions
    from zotune.llm.output.model_files import write_model_files

    folders = {}

    def make(family="llama", dtype="float32"):
        if (family, dtype) not in folders:
            folders[family, dtype] = tmp_path_factory.mktemp(f"{family}-{dtype}")
            lm = load(ModelOptions(model=f"random:{family}-tiny", device="cpu", dtype=dtype))
            write_model_files(lm, folders[family, dtype])
        return folders[family, dtype]

    return make


@pytest.fixture
def both(config, tmp_path):
    """A function: the folders of a streamed run and of one in memory, with the same options."""

    def run(**options):
        options = {"learning_rate": 1e-2, "max_steps": 3, **options}
        folders = tmp_path / "streamed", tmp_path / "resident"
        train(config(**options, output_dir=folders[0], offload_folder=tmp_path / "disk"))
        train(config(**options, output_dir=folders[1]))
        assert not list((tmp_path / "disk").iterdir())
        return folders

    return run


def metrics(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [without_times(line) for line in lines]


def without_times(line):
    plain = {k: v for k, v in line.items() if k not in PASSING}
    return {k: without_times(v) if isinstance(v, dict) else v for k, v in plain.items()}


def assert_same(one, other):
    names = {p.name for p in one.iterdir()}
    assert names == {p.name for p in other.iterdir()}
    for name in sorted(names - {"results.json", "metrics.jsonl", "zotune-files.json", "search.json"}):
        if name.endswith(".safetensors"):
            mine, theirs = load_file(one / name), load_file(other / name)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
        elif name.endswith((".json", ".jinja")):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert metrics(one) == metrics(other)
    assert (one / "ledger.zol").read_bytes()[-64:] == (other / "ledger.zol").read_bytes()[-64:]


RUNS = {
    "zo_sgd": {},
    "zo_adam": {"method": "zo_adam", "eval_steps": 1, "load_best_model_at_end": True},
    "converted": {"dtype": "bfloat16", "mu": 0.05},
    "lora": {"tuning": "lora", "tuned_layers": 1},
    "head": {"tuning": "head"},
    "prefix": {"tuning": "prefix"},
}


@pytest.mark.parametrize("options", RUNS)
def test_a_streamed_run_gives_the_files_of_a_run_in_memory(both, checkpoint, options):
    family = "opt" if options in ("zo_adam", "head") else "llama"
    assert_same(*both(model=str(checkpoint(family)), **RUNS[options]))


@pytest.mark.parametrize("options", ["zo_sgd", "lora"])
def test_a_random_model_is_streamed_too(both, options):
    assert_same(*both(model="random:opt-tiny", **RUNS[options]))


def test_the_users_file_is_read_in_place_and_never_written(config, checkpoint, tmp_path):
    folder = checkpoint("llama")
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    lm = load(config(model=str(folder), offload_folder=tmp_path / "disk"))
    stream = stream_of(lm.module)
    assert all(is_mapped(p.data) for of_layer in stream.matrices for p in of_layer)
    assert stream.scratch._end == 0
    train(config(model=str(folder), offload_folder=tmp_path / "disk", learning_rate=1e-2))
    assert before == {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


def test_a_streamed_run_resumes_from_its_ledger_in_memory_and_from_a_file(config, checkpoint, tmp_path):
    options = {"model": str(checkpoint()), "method": "zo_adam", "learning_rate": 1e-2}
    whole = train(config(**options, max_steps=4, output_dir=tmp_path / "whole")).output_dir
    for parts in (("disk", "disk"), ("disk", None), (None, "disk")):
        out = tmp_path / "-".join(map(str, parts))
        for steps, part in zip((2, 4), parts, strict=True):
            place = {} if part is None else {"offload_folder": tmp_path / part}
            train(config(**options, **place, max_steps=steps, output_dir=out, resume=steps == 4, save_steps=2))
        mine, theirs = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_found_learning_rate_leaves_the_weights_as_they_were(both, checkpoint):
    both_folders = both(model=str(checkpoint()), learning_rate="auto", max_steps=64, logging_steps=64)
    assert_same(*both_folders)


def test_a_loaded_model_whose_layers_are_streamed_is_tuned_in_python(checkpoint, tmp_path):
    from zotune.llm import load as load_by_name
    from zotune.llm import train as train_rows

    rows = [{"text": f"row {i}", "label": ("no", "yes")[i % 2]} for i in range(8)]
    weights = []
    for place in ({}, {"offload_folder": tmp_path}):
        model, tokenizer = load_by_name(checkpoint(), device="cpu", **place)
        assert (stream_of(model) is None) == (not place)
        train_rows(model, tokenizer, rows, max_steps=2, learning_rate=1e-2, num_dev=0, per_device_train_batch_size=4)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *weights))


def test_layers_that_a_file_puts_on_the_disk_are_streamed_and_the_others_stay(config, checkpoint, tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text('{"": cpu, model.layers.1: disk}')
    model = {"model": str(checkpoint()), "learning_rate": 1e-2, "tuning": "full"}
    disk = {"device": "auto", "device_map": str(path), "offload_folder": tmp_path / "disk"}
    stream = stream_of(load(config(**model, **disk)).module)
    assert len(stream.layers) == 1 and len(stream.matrices[0]) == 7
    one = train(config(**model, **disk, output_dir=tmp_path / "mapped")).output_dir
    other = train(config(**model)).output_dir
    assert_same(one, other)


@pytest.mark.parametrize("name", ["auto", "sequential"])
def test_what_memory_does_not_hold_is_put_on_the_disk_and_streamed(config, checkpoint, tmp_path, monkeypatch, name):
    whole = sum(p.nbytes for p in load(config(model=str(checkpoint()))).module.parameters())
    for place in ("accelerate.utils.modeling.get_max_memory", "accelerate.utils.get_max_memory"):
        monkeypatch.setattr(place, lambda *_: {"cpu": int(0.9 * whole)})
    options = {"model": str(checkpoint()), "device": "auto", "device_map": name}
    with pytest.raises(UsageError, match=r"would lie on the disk: .* --offload-folder FOLDER"):
        load(config(**options))
    lm = load(config(**options, offload_folder=tmp_path / "disk"))
    assert 0 < len(stream_of(lm.module).layers) < lm.config.num_hidden_layers
    ids = torch.arange(7)[None]
    with torch.no_grad():
        logits = [m.module(input_ids=ids).logits for m in (lm, load(config(model=str(checkpoint()))))]
    assert torch.equal(*logits)


def test_options_that_cannot_be_streamed_are_refused(config, tmp_path):
    disk = {"offload_folder": tmp_path / "disk"}
    for reason, options in {
        "back-propagation": {**disk, "method": "fo_sgd"},
        "bnb-nf4": {**disk, "model": "some/model", "quantization": "bnb-nf4"},
        "leave out device": {"device_map": "auto"},
    }.items():
        with pytest.raises(ValueError, match=reason):
            config(**options)
    with pytest.raises(UsageError, match=r"classification head"):
        load(config(**disk, model="random:roberta-tiny"), labels=("yes", "no"))


def test_a_folder_without_safetensors_is_refused(config, checkpoint, tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    for path in checkpoint().iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"no safetensors file \(it holds pytorch_model.bin\)"):
        load(config(model=str(folder), offload_folder=tmp_path / "disk"))


def test_an_offload_folder_that_cannot_be_written_is_refused(config, checkpoint, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UsageError, match=r"cannot be written"):
        load(config(model=str(checkpoint()), offload_folder=tmp_path / "file" / "disk"))


def test_a_full_disk_is_told_in_words(config, checkpoint, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises((UsageError, RunError), match=r"has no room for .* No space left on device"):
        train(config(model=str(checkpoint()), offload_folder=tmp_path / "disk", learning_rate=1e-2))


def test_a_disk_without_room_for_the_copies_is_refused_before_anything_is_read(
    config, checkpoint, tmp_path, monkeypatch
):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    options = {"model": str(checkpoint()), "offload_folder": tmp_path / "disk" / "deep"}
    with pytest.raises(UsageError, match=r"has no room: the copies of the layers to tune take .*--tuning lora"):
        load(config(**options))
    assert not (tmp_path / "disk").exists()
    assert stream_of(load(config(**options, tuning="lora")).module) is not None


def test_a_layer_larger_than_memory_is_refused(config, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("zotune.llm.models.placement.device_map.free_memory", lambda: 1000)
    with pytest.raises(UsageError, match=r"does not fit: cpu has .* the largest layer"):
        load(config(model=str(checkpoint()), offload_folder=tmp_path / "disk"))
