"""`zotune train --shard`: by FSDP2 the files of the unsharded run, by a plan those of its own ledger, to the bit."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import many_cases
import many_processes
from zotune.cli.main import run as zotune
from zotune.errors import UsageError
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.load import load
from zotune.llm.models.placement.sharded import shard_of
from zotune.llm.output.model_files import write_model_files
from zotune.llm.training.train import train

RUNS = {
    "full": {"method": "zo_adam", "tuning": "full", "learning_rate": 1e-3, "save_steps": 2},
    "bfloat16": {"method": "zo_sgd_mmt", "tuning": "full", "learning_rate": 1e-3, "dtype": "bfloat16"},
    "lora": {"method": "zo_sgd_cons", "tuning": "lora", "learning_rate": 1e-3},
    "forward_grad": {"method": "forward_grad", "tuning": "full", "learning_rate": 1e-3},
    "best": {"eval_steps": 2, "load_best_model_at_end": True, "tuning": "full", "learning_rate": 1e-2},
    "blocks": {"blocks": "layer", "tuning": "full", "learning_rate": 1e-3},
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


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def follows_its_ledger(folder):
    """Whether the ledger of a run, replayed by one process on the whole base model, gives the weights that it saved."""
    return zotune(["ledger", "verify", str(folder)]) == 0


def check(options, tmp_path, size, cases):
    """Runs of several processes, each of (name, family, shard)."""
    runs, alone = [], []
    for name, family, shard in cases:
        runs.append(options(name, family, tmp_path / f"{shard}-{family}-{name}", shard=shard))
        alone.append(options(name, family, tmp_path / f"one-{family}-{name}"))
    many_processes.run(size, many_cases.train_runs, runs)
    for (name, family, shard), own in zip(cases, alone, strict=True):
        folder = tmp_path / f"{shard}-{family}-{name}"
        if shard == "fsdp":
            train(TrainConfig(**own))
            assert many_cases.written_by(folder) == many_cases.written_by(tmp_path / f"one-{family}-{name}"), name
        assert follows_its_ledger(folder), folder


def test_a_run_in_shards_writes_what_an_unsharded_one_does(options, tmp_path):
    check(options, tmp_path, 2, [("full", "gpt2", "fsdp"), ("full", "opt", "tp")])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_every_run_in_shards_writes_what_an_unsharded_one_does(options, tmp_path, size):
    cases = [(name, family, "fsdp") for name, family in zip(RUNS, FAMILIES * 2, strict=True)]
    by_plan = ("full", "bfloat16", "best", "blocks")
    cases += [(name, family, "tp") for name in by_plan for family in ("opt", "llama") if family == "opt" or size == 2]
    check(options, tmp_path, size, cases)


@pytest.mark.slow
def test_a_run_resumes_in_another_number_of_processes(options, tmp_path):
    train(TrainConfig(**options("full", "opt", tmp_path / "whole", max_steps=4)))
    parts = tmp_path / "parts"
    many_processes.run(3, many_cases.train_runs, [options("full", "opt", parts, max_steps=2, shard="fsdp")])
    (parts / "checkpoint.safetensors").unlink()  # the ledger suffices
    many_processes.run(
        2, many_cases.train_runs, [options("full", "opt", parts, max_steps=3, shard="fsdp", resume=True)]
    )
    train(TrainConfig(**options("full", "opt", parts, max_steps=4, resume=True)))
    whole, resumed = (many_cases.written_by(tmp_path / name) for name in ("whole", "parts"))
    for name in ("ledger.zol", "model.safetensors", "checkpoint.safetensors"):
        assert resumed[name] == whole[name], name


def test_heads_that_a_plan_would_cut_and_models_without_a_plan_are_refused(options, tmp_path):
    for family, size, says in (("gpt2", 2, "has none for models of the type 'gpt2'"), ("llama", 3, "do not divide")):
        run = options("full", family, tmp_path / "out", shard="tp")
        errors = many_processes.run(size, many_cases.train_runs, [run], raises=True)
        assert all(isinstance(error, UsageError) and says in str(error) for error in errors), errors
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shard": "tp", "tuning": "lora"}, "use full, or --shard fsdp"),
        ({"shard": "fsdp", "tuning": "prefix"}, "use full or lora"),
        ({"shard": "tp", "method": "forward_grad"}, "lose their tangents"),
        ({"shard": "fsdp", "method": "fo_adam"}, "fo_adam back-propagates"),
        ({"shard": "fsdp", "quantization": "gguf", "model": "smollm2-135m", "tuning": "lora"}, "packed integers"),
        ({"shard": "fsdp", "hybrid_layers": 1}, "a hybrid back-propagates"),
        ({"shard": "fsdp", "parallel": "data=2"}, "nothing that parallel shares"),
        ({"shard": "tp", "model": "random:opt-tiny"}, "use --shard fsdp"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_shards_do_not_go_with_is_refused_before_anything_is_loaded(options, tmp_path, change, says):
    with pytest.raises(UsageError, match=says):
        shard_of(TrainConfig(**options("full", "opt", tmp_path / "out", **change)))
