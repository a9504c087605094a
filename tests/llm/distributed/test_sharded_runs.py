"""`zotune train --shard`: by FSDP2 the files of the unsharded run, by a plan those of its own ledger, to the bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

import many_cases
import many_processes
from zotune.cli.main import run as zotune
from zotune.errors import RunError, UsageError
from zotune.llm.checkpoints.adapter_merge import merged_model
from zotune.llm.config.run import EvalConfig, TrainConfig
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.load import load
from zotune.llm.models.placement.sharded import shard_of
from zotune.llm.output.model_files import write_model_files
from zotune.llm.training.train import train

# As the processes that the runs are compared with.
pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = {
    "full": {"method": "zo_adam", "tuning": "full", "learning_rate": 1e-3, "save_steps": 2},
    "bfloat16": {"method": "zo_sgd_mmt", "tuning": "full", "learning_rate": 1e-3, "dtype": "bfloat16"},
    "lora": {"method": "zo_sgd_cons", "tuning": "lora", "learning_rate": 1e-3},
    "adapted": {
        **{"method": "zo_adam", "tuning": "lora", "learning_rate": 1e-2, "lora_target_modules": "all-linear"},
        **{"eval_steps": 1, "load_best_model_at_end": True, "save_steps": 2},
    },
    "forward_grad": {"method": "forward_grad", "tuning": "full", "learning_rate": 1e-3},
    "best": {"eval_steps": 2, "load_best_model_at_end": True, "tuning": "full", "learning_rate": 1e-2},
    "blocks": {"blocks": "layer", "tuning": "full", "learning_rate": 1e-3},
    "norms": {"tuning": "norms", "learning_rate": 1e-2, "num_queries": 2},
    "examples": {"directions_per_batch": 2, "rank": 1, "tuning": "full", "learning_rate": 1e-3},
}
FAMILIES = ("llama", "opt", "gpt2")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a tiny model of each family."""
    root = tmp_path_factory.mktemp("models")
    for name in ("llama", "opt"):
        lm = load(ModelOptions(model=f"random:{name}-tiny", device="cpu"))
        write_model_files(lm, root / name)
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": lm.num_embeddings}
    lm.module = GPT2LMHeadModel(GPT2Config(**size))
    write_model_files(lm, root / "gpt2")
    lm.module = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=lm.num_embeddings))
    write_model_files(lm, root / "bloom")
    return root


@pytest.fixture
def options(models, rows_file):
    def of(name, family, folder, **more):
        return {
            **{"model": str(models / family), "train_file": str(rows_file), "num_dev": 3, "device": "cpu", "seed": 3},
            **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3},
            **{"dtype": "float32", "output_dir": str(folder), "per_device_eval_batch_size": 2},
            **RUNS[name],
            **more,
        }

    return of


def follows_its_ledger(folder):
    """Whether the ledger of a run, replayed by one process on the whole base model, gives the weights that it saved."""
    return zotune(["ledger", "verify", str(folder)]) == 0


def check(options, tmp_path, size, cases, **more):
    """Runs of several processes, each of (name, family, shard)."""
    runs, alone = [], []
    for name, family, shard in cases:
        runs.append(options(name, family, tmp_path / f"{shard}-{family}-{name}", shard=shard, **more))
        alone.append(options(name, family, tmp_path / f"one-{family}-{name}", **more))
    many_processes.run(size, many_cases.train_runs, runs)
    for (name, family, shard), own in zip(cases, alone, strict=True):
        folder = tmp_path / f"{shard}-{family}-{name}"
        if shard == "fsdp":
            train(TrainConfig(**own))
            assert many_cases.written_by(folder) == many_cases.written_by(tmp_path / f"one-{family}-{name}"), name
        assert follows_its_ledger(folder), folder


def test_a_run_in_shards_writes_what_an_unsharded_one_does(options, tmp_path):
    """By plans; the run by FSDP2 is the one that is resumed."""
    check(options, tmp_path, 2, [("full", "gpt2", "tp"), ("adapted", "llama", "tp")], max_steps=2, num_dev=2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_every_run_in_shards_writes_what_an_unsharded_one_does(options, tmp_path, size):
    cases = [(name, family, "fsdp") for name, family in zip(RUNS, FAMILIES * 3, strict=False)]
    by_plan = [name for name in RUNS if name not in ("forward_grad", "examples")]
    # Three processes do not divide the heads of the llama, whose plan gives each of them whole ones.
    cases += [(name, family, "tp") for name in by_plan for family in FAMILIES if family != "llama" or size == 2]
    check(options, tmp_path, size, cases)


def resumed_in(options, folder, sizes, name="full", shard="fsdp"):
    """A run whose every step is taken by another number of processes, which have its ledger alone."""
    family = "opt"
    for step, size in enumerate(sizes, start=1):
        run = options(name, family, folder, max_steps=step, resume=step > 1)
        if size == 1:
            train(TrainConfig(**run))
        else:
            many_processes.run(size, many_cases.train_runs, [run | {"shard": shard}])
        if step < len(sizes):
            (folder / "checkpoint.safetensors").unlink(missing_ok=True)  # the ledger suffices
    return many_cases.written_by(folder)


def test_a_run_in_shards_is_resumed_by_one_process(options, tmp_path):
    parts = resumed_in(options, tmp_path / "parts", (2, 1))
    train(TrainConfig(**options("full", "opt", tmp_path / "whole", max_steps=2)))
    whole = many_cases.written_by(tmp_path / "whole")
    for name in ("ledger.zol", "model.safetensors", "checkpoint.safetensors"):
        assert parts[name] == whole[name], name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora"])
@pytest.mark.parametrize("sizes", [(2, 3, 1), (3, 2, 1), (1, 2, 3)], ids=str)
def test_a_run_resumes_in_another_number_of_processes(options, tmp_path, name, sizes):
    parts = resumed_in(options, tmp_path / "parts", sizes, name)
    train(TrainConfig(**options(name, "opt", tmp_path / "whole", max_steps=3)))
    whole = many_cases.written_by(tmp_path / "whole")
    for file in ("ledger.zol", "model.safetensors", "adapter_model.safetensors", "checkpoint.safetensors"):
        assert parts.get(file) == whole.get(file), file


@pytest.mark.slow
def test_a_run_by_a_plan_resumes_to_the_bits_of_its_ledger(options, tmp_path):
    resumed_in(options, tmp_path / "parts", (2, 3, 1), shard="tp")
    assert follows_its_ledger(tmp_path / "parts")


@pytest.mark.slow
def test_a_full_disk_of_the_first_process_ends_a_run_in_shards_in_words(options, tmp_path):
    """The other one is within a pass, and reads why from torchrun's store; here the store ends with the first."""
    run = options("lora", "llama", tmp_path / "out", shard="fsdp", max_steps=1)
    first, second = many_processes.run(2, many_cases.run_on_a_full_disk, run, raises=True)
    assert isinstance(first, RunError) and "could not be saved" in str(first)
    assert "No space left on device" in str(first)
    assert isinstance(second, RunError) and "the connection to another process ended" in str(second)


def evaluations(options, folder, found, **more):
    """Options of evaluations of a run's model, and of its base."""
    keep = ("train_file", "num_dev", "device", "dtype", "per_device_eval_batch_size")
    plain = {key: value for key, value in options(*found, folder).items() if key in keep} | {"data_seed": 3}
    return [plain | {"model": str(model)} | more for model in (folder, options(*found, folder)["model"])]


def test_a_model_in_shards_is_evaluated_as_one_in_memory(options, tmp_path):
    folder = tmp_path / "run"
    train(TrainConfig(**options("lora", "llama", folder, max_steps=1)))
    base = evaluations(options, folder, ("lora", "llama"))
    (alone,) = [many_cases.evaluated(base)]
    shards = [run | {"shard": shard} for shard in ("fsdp", "tp") for run in base]
    for found in many_processes.run(2, many_cases.evaluated, shards):
        assert found[:2] == alone
        for by_plan, whole in zip(found[2:], alone, strict=True):
            assert by_plan[0]["predictions"] == whole[0]["predictions"]
            assert by_plan[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("way", ["fsdp", pytest.param("tp", marks=pytest.mark.slow)])
def test_a_loaded_model_that_its_owner_has_cut_is_tuned_and_evaluated(rows_file, way):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    alone = many_cases.tuned_in_shards(rows, way)
    one, other = many_processes.run(2, many_cases.tuned_in_shards, rows, way)
    assert one == other and one[3] == alone[3] and abs(one[2] - alone[2]) < 1e-4
    assert way == "tp" or one == alone


@pytest.fixture
def refusal(models, tmp_path, monkeypatch):
    """A function: what is said of a checkpoint in one of three processes, before it is read."""
    monkeypatch.setenv("WORLD_SIZE", "3")

    def said(name, shard="tp", **config):
        folder = tmp_path / name
        shutil.copytree(models / name, folder)
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(written | config))
        if not config:
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(UsageError) as error:
            load(EvalConfig(model=str(folder), shard=shard, device="cpu", task="sst2"))
        return str(error.value)

    return said


def test_what_a_checkpoint_does_not_allow_is_refused_before_it_is_read(refusal):
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert "3 processes do not divide the model's 4" in refusal("llama", use_cache=True)
    assert "has none for models of the type 'bloom'" in refusal("bloom", use_cache=True)
    assert "packed integers" in refusal("gpt2", "fsdp", **quantised)
    assert "it holds pytorch_model.bin" in refusal("opt")


@pytest.mark.parametrize(
    ("family", "shard", "part"),
    [("llama", "fsdp", "would hold"), ("llama", "tp", "would hold"), ("opt", "fsdp", "whole")],
)
def test_slices_that_do_not_fit_are_refused_before_they_are_read(models, monkeypatch, family, shard, part):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("zotune.llm.models.placement.sharded.memory_of", lambda device: 1000)
    monkeypatch.setattr("zotune.llm.models.load.read_pretrained", None)
    with pytest.raises(UsageError, match=rf"shard: {shard} does not fit: .*{part}"):
        load(EvalConfig(model=str(models / family), shard=shard, device="cpu", task="sst2"))


def written_with(folder, key, value):
    """Change the configuration of an adapter in a folder."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def test_an_adapter_is_tuned_further_by_a_plan(options, tmp_path):
    """Its steps are those of an unsharded run up to rounding, for it begins with the same weights."""
    first = tmp_path / "first"
    short = {"max_steps": 1, "num_dev": 1}
    train(TrainConfig(**options("lora", "llama", first, **short)))
    short["model"] = str(first)
    runs = [options("lora", "llama", tmp_path / name, **short) for name in ("tp", "one")]
    many_processes.run(2, many_cases.train_runs, [runs[0] | {"shard": "tp"}])
    train(TrainConfig(**runs[1]))
    assert follows_its_ledger(tmp_path / "tp")
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "tp", tmp_path / "one", first)]
    for name, other in weights[1].items():
        torch.testing.assert_close(weights[0][name], other, atol=1e-4, rtol=0)
    assert not any(torch.equal(value, weights[2][name]) for name, value in weights[0].items())


def test_an_adapter_that_is_loaded_with_its_base_is_refused_where_it_cannot_be_right(options, tmp_path, monkeypatch):
    train(TrainConfig(**options("lora", "llama", tmp_path / "adapter", max_steps=1)))
    config = EvalConfig(model=str(tmp_path / "adapter"), shard="tp", device="cpu", task="sst2")
    for change, says in {
        ("init_lora_weights", "olora"): "changes whole ones when it is loaded",
        ("use_dora", True): r"of another kind \(LORA, use_dora\)",
        ("bias", "all"): r"of another kind \(LORA, bias\)",
    }.items():
        with monkeypatch.context() as patch, pytest.raises(UsageError, match=says):
            patch.setenv("WORLD_SIZE", "2")
            written_with(tmp_path / "adapter", *change)
            load(config)
        written_with(
            tmp_path / "adapter", change[0], "none" if change[0] == "bias" else change[0] == "init_lora_weights"
        )
    lm = load(config)
    monkeypatch.setattr("zotune.llm.checkpoints.adapter_merge.mesh_of", lambda module: "a mesh")
    with pytest.raises(UsageError, match="merged into weights that lie in shards"):
        merged_model(lm.module, lm.read_with, lm.name)


@pytest.mark.parametrize("schema", [TrainConfig, EvalConfig])
def test_shards_of_a_model_that_is_placed_otherwise_are_refused(schema, tmp_path):
    with pytest.raises(ValueError, match="place a whole one for one"):
        schema(task="sst2", shard="fsdp", offload_folder=tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shard": "tp", "tuning": "lora_fa"}, "use one of: full, head, norms, biases, lora"),
        ({"shard": "tp", "quantization": "bnb-nf4", "tuning": "lora"}, "packed integers"),
        ({"shard": "fsdp", "method": "hizoo"}, "scales every direction"),
        ({"shard": "fsdp", "sparsity": 0.5, "mask": "magnitude"}, "--mask random"),
        ({"shard": "tp", "directions_per_batch": 2}, "weights of its own"),
        ({"shard": "tp", "method": "grzo"}, "use --shard fsdp, or several directions of the whole batch"),
        ({"shard": "fsdp", "tuning": "prefix"}, "use one of: full"),
        ({"shard": "tp", "method": "forward_grad"}, "lose their tangents"),
        ({"shard": "fsdp", "method": "fo_adam"}, "fo_adam back-propagates"),
        ({"shard": "fsdp", "quantization": "gguf", "model": "smollm2-135m", "tuning": "lora"}, "packed integers"),
        ({"shard": "fsdp", "hybrid_layers": 1}, "a hybrid back-propagates"),
        ({"shard": "fsdp", "parallel": "data=2"}, "nothing that parallel shares"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_shards_do_not_go_with_is_refused_before_anything_is_loaded(options, tmp_path, change, says):
    with pytest.raises(UsageError, match=says):
        shard_of(TrainConfig(**options("full", "opt", tmp_path / "out", **change)))
