"""`zotune ledger`: weights are rebuilt, checked, taken back and put together from kilobytes, to the bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from zotune.bench.report.run_html import write_run_page
from zotune.ledger import LedgerError, read
from zotune.llm.ledger.rebuild import plot
from zotune.llm.training.train import train

RUNS = {
    "full": {},
    "lora, gaussian": {"tuning": "lora", "sampler": "gaussian"},
    "prefix, queries": {"tuning": "prefix", "num_queries": 2},
    "bfloat16, adam": {"dtype": "bfloat16", "method": "zo_adam"},
    "float16, momentum, master": {"dtype": "float16", "method": "zo_sgd_mmt", "rounding": "master"},
    "conservative": {"method": "zo_sgd_cons", "learning_rate": 0.1},
    "masks by magnitude": {"sparsity": 0.3, "mask": "magnitude"},
    "low rank": {"dtype": "bfloat16", "rank": 2, "rank_interval": 3, "sampler": "gaussian"},
    "best": {"eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.1},
    "grzo": {"method": "grzo", "dtype": "bfloat16", "per_device_train_batch_size": 4},
    "singular vectors": {"tuning": "lora_xs", "lora_r": 2},
    "eva, A frozen": {"tuning": "lora_fa", "lora_init": "eva", "lora_r": 3},
    "norms within components": {"tuning": "norms", "tuned_layers": 1, "activation_rank": 3},
    "norms scaled by what they read": {"tuning": "norms", "direction_scale": "inputs", "method": "zo_adam"},
    "components": {"activation_rank": 2, "model": "random:qwen3-tiny", "directions_per_batch": 2},
    "head of a masked model": {"model": "random:roberta-tiny", "verbalizer": {"yes": "Yes", "no": "No"}},
}


def weights_of(folder):
    (path,) = folder.glob("*model.safetensors")
    return load_file(path)


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_rebuilt_from_its_ledger_alone(config, zotune, tmp_path, rows_file, name):
    options = {"max_steps": 6, "learning_rate": 1e-2, **RUNS[name]}
    result = train(config(**options))
    rows_file.unlink()
    said = zotune("ledger", "verify", tmp_path / "out")
    assert said.code == 0, said.err
    assert "bit for bit" in said.out
    step = 6 if result.best_step is None else result.best_step
    (tmp_path / "sent").mkdir()
    shutil.copy(tmp_path / "out/ledger.zol", tmp_path / "sent/mine.zol")
    said = zotune("ledger", "replay", tmp_path / "sent/mine.zol", "--step", step, "--output-dir", tmp_path / "again")
    assert said.code == 0, said.err
    (path,) = (tmp_path / "out").glob("*model.safetensors")
    assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert (tmp_path / "again/tokenizer.json").exists()


def test_steps_are_undone_and_taken_again(config, zotune, tmp_path):
    options = {"learning_rate": 1e-2, "eval_steps": 2}
    train(config(**options, max_steps=4, output_dir=tmp_path / "short"))
    train(config(**options, max_steps=9, save_steps=5))
    whole = weights_of(tmp_path / "out")
    said = zotune("ledger", "undo", tmp_path / "out", "--to-step", 4)
    assert said.code == 0, said.err
    assert same_bits(weights_of(tmp_path / "out"), weights_of(tmp_path / "short"))
    assert zotune("ledger", "verify", tmp_path / "out").code == 0
    assert len(read(tmp_path / "out/ledger.zol")) == 4
    lines = (tmp_path / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 2, 3, 4, 4]
    train(config(**options, max_steps=9, resume=True))
    assert same_bits(weights_of(tmp_path / "out"), whole)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_after_an_undo_nothing_tells_of_the_steps_that_were_taken_back(config, zotune, tuning, tmp_path):
    train(config(max_steps=2, tuning=tuning))
    out = tmp_path / "out"
    (out / "notes.md").write_text("mine", encoding="utf-8")
    write_run_page(out)
    assert zotune("ledger", "undo", out, "--to-step", 1).code == 0
    left = {path.name for path in out.iterdir()}
    assert not left & {"results.json", "README.md", "report.html"}
    assert {"config.yaml", "ledger.zol", "metrics.jsonl", "notes.md"} <= left


def test_an_undo_keeps_a_card_that_the_user_wrote(config, zotune, tmp_path):
    train(config(max_steps=2, tuning="lora"))
    (tmp_path / "out/README.md").write_text("my card", encoding="utf-8")
    assert zotune("ledger", "undo", tmp_path / "out", "--to-step", 1).code == 0
    assert [p.read_text(encoding="utf-8") for p in (tmp_path / "out").glob("README*")] == ["my card"]


def test_other_weights_are_noticed(config, zotune, tmp_path):

    train(config(learning_rate=1e-2))
    weights = weights_of(tmp_path / "out")
    name = sorted(weights)[3]
    weights[name].view(-1)[0] += 1e-6
    save_file(weights, tmp_path / "out/model.safetensors", {"format": "pt"})
    said = zotune("ledger", "verify", tmp_path / "out")
    assert said.code == 1
    assert f"saved tensors are NOT the ledger's: {name}" in said.out


def test_another_base_is_refused(config, zotune, tiny, tmp_path):
    lm = tiny("llama")
    with torch.no_grad():
        lm.base.model.norm.weight[0] += 1e-6
    lm.module.save_pretrained(tmp_path / "other")
    lm.tokenizer.save_pretrained(tmp_path / "other")
    for tuning, why in (("full", "another base model: the digest of"), ("lora", "another base model than")):
        train(config(tuning=tuning, output_dir=tmp_path / tuning))
        said = zotune(
            "ledger", "replay", tmp_path / tuning, "--base", tmp_path / "other", "--output-dir", tmp_path / "n"
        )
        assert said.code == 2
        assert why in said.err
        assert not (tmp_path / "n").exists()


def test_an_adapter_is_exported_as_one_or_put_into_the_weights(config, zotune, tmp_path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    base = train(config(model="random:llama-tiny", output_dir=tmp_path / "b", max_steps=1, learning_rate=0)).output_dir
    train(config(model=str(base), tuning="lora", learning_rate=0.05, max_steps=5))
    assert zotune("ledger", "export", tmp_path / "out", "--output-dir", tmp_path / "adapter").code == 0
    assert zotune("ledger", "export", tmp_path / "out", "--output-dir", tmp_path / "whole", "--merged").code == 0
    ids = torch.arange(3, 12)[None]
    adapter = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        found, expected, before = (m(ids).logits for m in (whole, adapter, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (before - expected).abs().max() > 1e-3
    assert same_bits(weights_of(tmp_path / "adapter"), weights_of(tmp_path / "out"))
    said = zotune("ledger", "export", base, "--output-dir", tmp_path / "n", "--merged")
    assert said.code == 2
    assert "leave out --merged" in said.err


def test_runs_are_averaged_and_put_in_a_row(config, zotune, tiny, tmp_path):
    for seed in (0, 1, 2):
        train(config(seed=seed, learning_rate=1e-2, max_steps=3, output_dir=tmp_path / str(seed)))
    ends = [weights_of(tmp_path / str(seed)) for seed in (0, 1, 2)]
    said = zotune(
        "ledger", "merge", *(tmp_path / str(s) for s in (0, 1, 2)), "--average", "--output-dir", tmp_path / "m"
    )
    assert said.code == 0, said.err
    for name, value in weights_of(tmp_path / "m").items():
        torch.testing.assert_close(value, sum(e[name].double() for e in ends).div(3).float(), rtol=0, atol=0)
    assert zotune("ledger", "merge", tmp_path / "0", tmp_path / "1", "--output-dir", tmp_path / "row").code == 0
    base = dict(tiny("llama").module.state_dict())
    for name, value in weights_of(tmp_path / "row").items():
        expected = base[name] + (ends[0][name] - base[name]) + (ends[1][name] - base[name])
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    train(config(tuning="lora", output_dir=tmp_path / "l"))
    said = zotune("ledger", "merge", tmp_path / "0", tmp_path / "l", "--output-dir", tmp_path / "n")
    assert said.code == 2
    assert "do not tune the same tensors" in said.err


def test_a_ledger_is_shown(config, zotune, tmp_path):
    train(config(max_steps=30, num_queries=2))
    said = zotune("ledger", "show", tmp_path / "out", "--rows", 10)
    assert said.code == 0
    assert "steps: 30" in said.out
    assert "bytes_a_step: 24" in said.out
    table = [line for line in said.out.splitlines() if line.strip()[:1].isdigit() and "|" not in line]
    assert [int(line.split()[0]) for line in table] == list(range(1, 31, 3))
    record = read(tmp_path / "out/ledger.zol")[3]
    assert f"{record.loss:.6g}" in table[1]
    assert all(f"{c:.5g}" in table[1] for c in record.coefficients)
    assert json.loads(zotune("ledger", "show", tmp_path / "out", "--json").out)["forward_passes"] == 120


def test_a_plot_puts_numbers_where_they_belong():
    rows = plot([0.0, 5.0, float("nan"), 10.0], width=4, height=3).splitlines()
    assert [row.split("|")[1] for row in rows] == ["   *", " *", "*"]
    assert plot([float("nan")]) == "no number to plot"


@pytest.mark.parametrize("args", [("show",), ("replay", "x"), ("undo", "x"), ("nothing", "x"), ()])
def test_bad_usage_is_exit_code_two(zotune, args):
    assert zotune("ledger", *args).code == 2


def test_what_is_no_ledger_is_said(zotune, tmp_path):
    assert "contains no ledger.zol" in zotune("ledger", "show", tmp_path).err
    (tmp_path / "x.zol").write_bytes(b"PK\x03\x04 not a ledger at all")
    said = zotune("ledger", "verify", tmp_path / "x.zol")
    assert (said.code, said.out) == (2, "")
    assert "is no ledger" in said.err


def test_a_ledger_damaged_in_the_middle_is_gone_back_before(config, zotune, tmp_path):
    """A byte lost in the middle: refused as it stands, but the steps before it are there, and nothing is lost."""
    options = {"learning_rate": 1e-2, "max_steps": 6}
    train(config(**options))
    path = tmp_path / "out/ledger.zol"
    whole, weights = path.read_bytes(), weights_of(tmp_path / "out")
    at = len(whole) - 3 * 20 + 5
    path.write_bytes(whole[:at] + whole[at + 1 :])
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(LedgerError, match="damaged in the middle"):
        train(config(**options, resume=True))
    for verb in ("show", "verify"):
        said = zotune("ledger", verb, tmp_path / "out")
        assert (said.code, said.out) == (2, "")
        assert "--to-step 3, which keeps" in said.err
    assert zotune("ledger", "undo", tmp_path / "out", "--to-step", 4).code == 2
    said = zotune("ledger", "replay", tmp_path / "out", "--step", 3, "--output-dir", tmp_path / "third")
    assert said.code == 0, said.err
    assert {p: p.read_bytes() for p in before} == before
    said = zotune("ledger", "undo", tmp_path / "out", "--to-step", 3)
    assert said.code == 0, said.err
    assert (tmp_path / "out/ledger.zol.damaged").read_bytes() == before[path]
    assert path.read_bytes() == whole[: len(whole) - 3 * 20]
    assert same_bits(weights_of(tmp_path / "out"), weights_of(tmp_path / "third"))
    train(config(**options, resume=True))
    assert path.read_bytes() == whole
    assert same_bits(weights_of(tmp_path / "out"), weights)
    assert (tmp_path / "out/ledger.zol.damaged").read_bytes() == before[path]


def rewritten(path, **method):
    """A ledger whose header says another method than its run's, with good checksums."""
    from dataclasses import replace

    from zotune.ledger.format import checksum

    ledger = read(path)
    content = replace(ledger.header, method={**ledger.header.method, **method}).to_bytes()
    crc = int.from_bytes(content[16:20], "little")
    for i, row in enumerate(ledger.rows):
        content += checksum(row.tobytes(), i, crc).to_bytes(4, "little") + row.tobytes()[4:]
    path.write_bytes(content)


@pytest.mark.sample(1)
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_method_of_every_ledger_in_a_row_is_checked(config, zotune, tmp_path, tuning):
    for name in ("a", "b"):
        train(config(tuning=tuning, output_dir=tmp_path / name))
    arguments = ("ledger", "merge", tmp_path / "a", tmp_path / "b", "--output-dir")
    assert zotune(*arguments, tmp_path / "row").code == 0
    rewritten(tmp_path / "b/ledger.zol", max_coefficient=0.5)
    said = zotune(*arguments, tmp_path / "n")
    assert said.code == 2
    assert "is of a run with max_coefficient: 0.5, not None" in said.err
    assert not (tmp_path / "n").exists()


def test_a_base_is_called_right_only_if_all_of_it_was_read(config, zotune, tiny, tmp_path):
    lm = tiny("llama")
    lm.tokenizer.save_pretrained(tmp_path / "base")
    lm.base.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    shards = sorted((tmp_path / "base").glob("model-*.safetensors"))
    train(config(model=str(tmp_path / "base"), tuned_layers=1))
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "out/ledger.zol", tmp_path / "alone")
    for folder in ("out", "alone"):
        said = zotune("ledger", "verify", tmp_path / folder)
        assert said.code == 0, said.err
        assert "of this base model" in said.out
    for shard in shards:
        kept = shard.read_bytes()
        tensors = load_file(shard)
        name = sorted(tensors)[-1]
        for how in ("gone", "changed"):
            shard.unlink()
            if how == "changed":
                changed = {**tensors, name: tensors[name] * 1.5}
                save_file(changed, shard, {"format": "pt"})
            for folder in ("out", "alone"):
                said = zotune("ledger", "verify", tmp_path / folder)
                assert said.code != 0
                assert "of this base model" not in said.out
            shard.write_bytes(kept)


def test_a_lost_shard_of_frozen_weights_is_noticed(config, zotune, tmp_path):
    train(config(tuned_layers=1))
    out = tmp_path / "out"
    weights = weights_of(out)
    frozen = sorted(name for name in weights if "layers.0." in name)
    save_file({k: v for k, v in weights.items() if k not in frozen}, out / "model.safetensors", {"format": "pt"})
    said = zotune("ledger", "verify", out)
    assert said.code == 1
    assert f"{len(frozen)} tensors of the model are NOT saved: {frozen[0]}" in said.out
