"""A fine-tune is rebuilt tensor by tensor to the bytes that the run saved, and never more than one tensor is held."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import zotune as zo
from ledger_runs import IN_SUBSPACES, LATER, METHODS, bits_of, network, run
from zotune.errors import UsageError
from zotune.ledger import read
from zotune.ledger.replay import replay
from zotune.ledger.stream import Trace
from zotune.llm.checkpoints.safetensors_shards import Checkpoint
from zotune.llm.ledger import merge as merging
from zotune.llm.ledger import rebuild as ledgers
from zotune.llm.training.train import train

MAKES = METHODS | LATER | IN_SUBSPACES
SPARSE = {f"random masks, {i}": zo.sparse(zo.gaussian, 0.4, group="layer", interval=i) for i in (1, 3)}


@pytest.mark.sample(8)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float64, {}),
        (torch.bfloat16, {}),
        (torch.float16, {}),
        (torch.bfloat16, {"rounding": "master"}),
        (torch.float16, {"rounding": "nearest"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("sampler", [zo.rademacher, zo.gaussian, *SPARSE.values()], ids=["±", "normal", *SPARSE])
def test_each_tensor_goes_through_all_steps_alone(make, dtype, options, sampler, tmp_path):
    if make in IN_SUBSPACES.values() and sampler in SPARSE.values():
        pytest.skip("refused")
    opt, base = run(make, tmp_path / "a.zol", 8, dtype, bad=(2, 5), sampler=sampler, **options)
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    traced = Trace(make(network(dtype).to("meta"), seed=3, sampler=sampler, **options), read(tmp_path / "a.zol"))
    for name, x in weights.items():
        traced.apply(name, x.view(-1), size=7)
    assert all(torch.equal(weights[name], p) for name, p in opt.tuned.model.named_parameters())
    assert not all(torch.equal(weights[name], p) for name, p in base.named_parameters())


def test_a_shorter_ledger_and_none_at_all_are_traced(tmp_path):
    _, base = run(METHODS["momentum"], tmp_path / "a.zol", 5)
    for steps in (0, 3):
        again = replay(METHODS["momentum"](network(), seed=3), ledger := read(tmp_path / "a.zol").first(steps))
        trace = Trace(METHODS["momentum"](network().to("meta"), seed=3), ledger)
        for name, p in base.named_parameters():
            x = p.detach().clone()
            trace.apply(name, x.view(-1))
            assert torch.equal(x, again.tuned[name].parameter)


@pytest.mark.parametrize("interval", [1, 3])
def test_shares_of_masks_are_those_of_the_weights_that_the_run_began_with(interval, tmp_path):
    options = {"sampler": zo.sparse(zo.gaussian, 0.4, group="global", interval=interval)}
    opt, base = run(METHODS["momentum"], tmp_path / "a.zol", 8, bad=(0,), **options)
    shaped = METHODS["momentum"](network().to("meta"), seed=3, **options)
    weights = dict(base.named_parameters())
    trace = Trace(shaped, read(tmp_path / "a.zol"), lambda t: weights[t.name].detach())
    for name, p in opt.tuned.model.named_parameters():
        x = weights[name].detach().clone()
        trace.apply(name, x.view(-1))
        assert torch.equal(x, p)


def test_masks_that_follow_the_weights_are_not_traced():
    model = nn.Linear(3, 3)
    for group in ("layer", "global"):
        opt = zo.zo_sgd(model, lr=0.1, sampler=zo.sparse(zo.gaussian, 0.5, mask="magnitude", group=group))
        assert not Trace.is_possible(opt)
        with pytest.raises(UsageError, match="follow the weights"):
            Trace(opt, [])


@pytest.fixture
def folder(tiny, tmp_path):
    """A function: a family and how its files are cut, to a base model's folder with a generation config of its own."""

    def make(family, max_shard_size="50GB", dtype="float32", name="base"):
        lm, path = tiny(family, dtype), tmp_path / name
        torch.manual_seed(1)
        with torch.no_grad():
            for p in lm.module.parameters():
                p.add_(torch.randn(p.shape).to(p.dtype) * 0.01)
        if lm.module.can_generate():
            lm.module.generation_config.max_new_tokens = 17
        lm.module.save_pretrained(path, max_shard_size=max_shard_size)
        lm.tokenizer.save_pretrained(path)
        return path

    return make


@pytest.fixture
def only_streamed(monkeypatch):
    """From now on no ledger's command may have a model's numbers."""

    def forbidden(*args, **options):
        raise AssertionError("a whole model was loaded")

    def forbid():
        monkeypatch.setattr(ledgers, "load", forbidden)

    return forbid


def contents(path, *, but=()):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name not in but and p.is_file()}


# What a run writes beside the model.
OF_A_RUN = {"README.md", "config.yaml", "ledger.zol", "metrics.jsonl", "results.json", "zotune-files.json"}
VERBALIZER = {"verbalizer": {"yes": "Yes", "no": "No"}}


@pytest.mark.sample(2)
@pytest.mark.parametrize("max_shard_size", ["50GB", "40KB"])
def test_every_family_comes_out_with_the_bytes_of_the_run(
    config, zotune, folder, only_streamed, tmp_path, family, max_shard_size
):
    base = folder(family, max_shard_size)
    own = VERBALIZER if family == "roberta" else {}
    train(config(model=str(base), learning_rate=1e-2, max_steps=3, **own))
    only_streamed()
    said = zotune("ledger", "replay", tmp_path / "out", "--output-dir", tmp_path / "again")
    assert said.code == 0, said.err
    assert "memory" not in said.err
    assert contents(tmp_path / "again", but=OF_A_RUN) == contents(tmp_path / "out", but=OF_A_RUN)
    said = zotune("ledger", "verify", tmp_path / "out")
    assert said.code == 0, said.err
    assert "bit for bit" in said.out


OPTIONS = {
    "bfloat16 of a float32 file, adam": {"dtype": "bfloat16", "method": "zo_adam"},
    "master weights": {"dtype": "float16", "method": "zo_sgd_mmt", "rounding": "master"},
    "window": {"method": "zo_sgd_mmt", "window": 2},
    "some layers": {"tuned_layers": 1},
    "some weights": {"tuned_parameters": "q_proj|norm"},
    "head": {"tuning": "head"},
    "blocks": {"blocks": "layer", "block_order": "sequential", "num_queries": 2},
    "random masks": {"sparsity": 0.3},
    "random masks, the same share everywhere": {"sparsity": 0.3, "mask_group": "layer"},
    "decay": {"weight_decay": 0.1, "lr_scheduler_type": "cosine"},
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_kind_of_run_is_streamed(config, zotune, folder, only_streamed, tmp_path, name):
    train(config(model=str(folder("llama")), learning_rate=1e-2, max_steps=4, **OPTIONS[name]))
    only_streamed()
    said = zotune("ledger", "replay", tmp_path / "out", "--output-dir", tmp_path / "again")
    assert said.code == 0, said.err
    assert contents(tmp_path / "again", but=OF_A_RUN) == contents(tmp_path / "out", but=OF_A_RUN)


def test_where_tensors_depend_on_each_other_that_is_said(config, zotune, folder, tmp_path):
    train(config(model=str(folder("llama")), learning_rate=1e-2, sparsity=0.3, mask="magnitude"))
    said = zotune("ledger", "replay", tmp_path / "out", "--output-dir", tmp_path / "again")
    assert said.code == 0
    assert "is held in memory: its masks depend on the weights of all tensors at each step" in said.err
    assert contents(tmp_path / "again", but=OF_A_RUN) == contents(tmp_path / "out", but=OF_A_RUN)


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_files_are_cut_as_transformers_cuts_them(config, zotune, folder, tmp_path, family):
    from transformers import AutoModelForCausalLM

    train(config(model=str(folder(family)), learning_rate=1e-2))
    said = zotune("ledger", "export", tmp_path / "out", "--output-dir", tmp_path / "cut", "--max-shard-size", "30KB")
    assert said.code == 0, said.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    ours, theirs = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text(encoding="utf-8"))
        for name in ("cut", "theirs")
    )
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    files = list((tmp_path / "cut").glob("model*.safetensors"))
    assert len(files) > 3
    for path in files:
        weights = load_file(path)
        assert len(weights) == 1 or sum(w.nbytes for w in weights.values()) <= 30_000
        assert {name for name, file in ours["weight_map"].items() if file == path.name} == weights.keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(bits_of(model), bits_of(again), strict=True))
    for size in ("0GB", "5", "five GB"):
        said = zotune("ledger", "replay", tmp_path / "out", "--output-dir", tmp_path / "n", "--max-shard-size", size)
        assert said.code == 2
        assert f"such as 5GB or 500MB; got {size!r}" in said.err


def test_what_is_rebuilt_is_evaluated_like_the_run(config, zotune, folder, rows_file, tmp_path):
    train(config(model=str(folder("llama")), learning_rate=0.3, max_steps=3))
    zotune("ledger", "replay", tmp_path / "out", "--output-dir", tmp_path / "again")
    evaluated = [
        json.loads(
            zotune("eval", "--model", tmp_path / name, "--eval-file", rows_file, "--device", "cpu", "--json").out
        )
        for name in ("out", "again")
    ]
    found = [{k: v for k, v in e.items() if k in ("accuracy", "loss", "value")} for e in evaluated]
    assert found[0] == found[1]


@pytest.mark.slow
def test_no_more_than_one_tensor_is_held(config, zotune, folder, tmp_path, monkeypatch):
    train(config(model=str(folder("llama", "40KB")), learning_rate=1e-2))
    alive, most, read_one = [], [], Checkpoint.tensor

    def counted(self, name):
        gc.collect()
        most.append(sum(ref() is not None for ref in alive))
        found = read_one(self, name)
        alive.append(weakref.ref(found.untyped_storage()))
        return found

    monkeypatch.setattr(Checkpoint, "tensor", counted)
    assert zotune("ledger", "replay", tmp_path / "out", "--output-dir", tmp_path / "again").code == 0
    assert len(most) > 10
    assert max(most) <= 1


@pytest.mark.sample(2)
@pytest.mark.parametrize("tuning", [{}, {"tuned_layers": 1}], ids=["tuned", "frozen"])
@pytest.mark.parametrize("command", ["replay", "undo", "verify"])
def test_another_base_is_refused_and_nothing_written(config, zotune, folder, tmp_path, command, tuning):
    base = folder("llama")
    train(config(model=str(base), learning_rate=1e-2, **tuning))
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight" if tuning else "model.norm.weight"].view(-1)[0] += 1e-3
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    before = contents(tmp_path / "out")
    more = {"replay": ("--output-dir", tmp_path / "n"), "undo": ("--to-step", 1), "verify": ()}[command]
    said = zotune("ledger", command, tmp_path / "out", *more)
    assert said.code == 2
    assert "another base model" in said.err
    assert not (tmp_path / "n").exists()
    assert contents(tmp_path / "out") == before
    assert not (tmp_path / "out/.saving").exists()


def test_steps_are_undone_without_the_model_in_memory(config, zotune, folder, only_streamed, tmp_path):
    base = folder("opt", "40KB")
    options = {"model": str(base), "learning_rate": 1e-2}
    train(config(**options, max_steps=2, output_dir=tmp_path / "short"))
    train(config(**options, max_steps=5))
    only_streamed()
    assert zotune("ledger", "undo", tmp_path / "out", "--to-step", 2).code == 0
    assert contents(tmp_path / "out", but=OF_A_RUN) == contents(tmp_path / "short", but=OF_A_RUN)
    assert len(read(tmp_path / "out/ledger.zol")) == 2


def test_files_of_other_names_are_read_in_memory(config, zotune, folder, tmp_path):
    base = folder("llama")
    weights = load_file(base / "model.safetensors")
    bare = {name.removeprefix("model."): value for name, value in weights.items()}
    save_file(bare, base / "model.safetensors", {"format": "pt"})
    train(config(model=str(base), learning_rate=1e-2))
    said = zotune("ledger", "replay", tmp_path / "out", "--output-dir", tmp_path / "again")
    assert said.code == 0, said.err
    assert "is held in memory: its files do not contain" in said.err
    assert (
        load_file(tmp_path / "again/model.safetensors").keys() == load_file(tmp_path / "out/model.safetensors").keys()
    )


def test_a_base_that_cannot_be_read_is_said(config, zotune, folder, tmp_path):
    base = folder("llama")
    train(config(model=str(base), learning_rate=1e-2))
    content = (base / "model.safetensors").read_bytes()
    for damaged in (content[:1000], b"", b"\xff" * 100):
        (base / "model.safetensors").write_bytes(damaged)
        said = zotune("ledger", "replay", tmp_path / "out", "--output-dir", tmp_path / "n")
        assert said.code == 2
        assert "cannot be read" in said.err or "does not hold a model" in said.err
        assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("model", ["streamed", "in memory"])
@pytest.mark.parametrize("kind", ["average", "row"])
def test_merges_are_the_same_either_way_and_follow_from_their_ledgers(
    config, zotune, folder, tmp_path, kind, model, monkeypatch
):
    base = folder("llama")
    for seed, method in ((0, "zo_sgd"), (1, "zo_adam"), (2, "zo_sgd")):
        train(
            config(
                model=str(base),
                seed=seed,
                method=method,
                learning_rate=1e-2,
                max_steps=3,
                output_dir=tmp_path / str(seed),
            )
        )
    runs, flag = [tmp_path / str(seed) for seed in range(3)], ["--average"] if kind == "average" else []
    if model == "in memory":
        monkeypatch.setattr(merging, "streamed_base", ledgers_refuse)
    said = zotune("ledger", "merge", *runs, *flag, "--output-dir", tmp_path / "m")
    assert said.code == 0, said.err
    assert ("held in memory" in said.err) == (model == "in memory")
    monkeypatch.undo()
    ends = [load_file(path / "model.safetensors") for path in runs]
    merged, before = load_file(tmp_path / "m/model.safetensors"), load_file(base / "model.safetensors")
    for name, value in merged.items():
        if kind == "average":
            assert torch.equal(value, sum(e[name].double() for e in ends).div(3).float())
        else:
            steps = sum(e[name] - before[name] for e in ends)
            torch.testing.assert_close(value, before[name] + steps, rtol=0, atol=1e-6)
    # The folder without its weights is the merge in kilobytes.
    (tmp_path / "sent").mkdir()
    for name in ("merge.json", "1.zol", "2.zol", "3.zol"):
        shutil.copy(tmp_path / "m" / name, tmp_path / "sent" / name)
    assert zotune("ledger", "replay", tmp_path / "sent", "--output-dir", tmp_path / "again").code == 0
    assert load_file(tmp_path / "again/model.safetensors").keys() == merged.keys()
    same = load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(same[name], merged[name]) for name in merged)
    assert "bit for bit" in zotune("ledger", "verify", tmp_path / "m").out


@pytest.mark.sample(1)
@pytest.mark.parametrize("options", [{}, {"sparsity": 0.3}], ids=["dense", "masks"])
def test_a_run_begun_on_the_end_of_another_comes_out_of_both_ledgers(config, zotune, folder, tmp_path, options):
    train(config(model=str(folder("llama")), learning_rate=1e-2, max_steps=3, output_dir=tmp_path / "a", **options))
    train(
        config(model=str(tmp_path / "a"), learning_rate=1e-2, max_steps=3, output_dir=tmp_path / "b", seed=1, **options)
    )
    assert zotune("ledger", "merge", tmp_path / "a", tmp_path / "b", "--output-dir", tmp_path / "ab").code == 0
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("ab", "b"))
    assert ours == theirs


def ledgers_refuse(*args):
    raise ledgers.NotStreamedError("a test says so")


def test_a_merge_whose_ledgers_are_not_its_own_is_refused(config, zotune, tmp_path):
    for seed in (0, 1):
        train(config(seed=seed, learning_rate=1e-2, output_dir=tmp_path / str(seed)))
    assert zotune("ledger", "merge", tmp_path / "0", tmp_path / "1", "--output-dir", tmp_path / "m").code == 0
    assert zotune("ledger", "verify", tmp_path / "m").code == 0
    said = zotune("ledger", "show", tmp_path / "m")
    assert said.code == 2
    assert "holds a merge of several ledgers" in said.err
    assert zotune("ledger", "show", tmp_path / "m/2.zol").code == 0
    said = zotune("ledger", "replay", tmp_path / "m", "--step", 1, "--output-dir", tmp_path / "n")
    assert (said.code, "--step does not apply" in said.err) == (2, True)
    shutil.copy(tmp_path / "0/ledger.zol", tmp_path / "m/2.zol")
    said = zotune("ledger", "verify", tmp_path / "m")
    assert (said.code, "its digest differs" in said.err) == (2, True)
    for text in ("", "[]", "{}", '{"kind": "row", "ledgers": [{"file": "../x", "steps": 1, "digest": ""}]}'):
        (tmp_path / "m/merge.json").write_text(text, encoding="utf-8")
        said = zotune("ledger", "verify", tmp_path / "m")
        assert said.code == 2
        assert "merge.json" in said.err
