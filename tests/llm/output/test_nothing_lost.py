"""What a command finds in its output folder is there afterwards: somebody else's files, the model, an earlier run.

Each attack compares the folder with copies of all of its bytes made before.
"""

import json
import os
import stat
import threading

import pytest
import yaml
from safetensors.torch import load_file, save_file

from zotune.errors import UsageError
from zotune.llm.ledger.undo import undo
from zotune.llm.output.free_folder import check_inputs
from zotune.llm.output.locked_folder import LockedFolder
from zotune.llm.output.manifest import FILE, Manifest
from zotune.llm.training import loop


def bytes_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def base(tiny, tmp_path):
    """A folder with a model."""
    lm, folder = tiny("llama"), tmp_path / "base"
    lm.module.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("more", [(), ("--overwrite-output-dir",), ("--resume",)])
@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_the_folder_of_the_model_is_no_output_folder(zotune, short, base, tmp_path, weights, more):
    if weights == "bin":
        import torch

        torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    (tmp_path / "link").symlink_to(base)
    before = bytes_of(base)
    said = zotune(*short("--tuning", "lora", *more, model=base, out="link"))
    assert said.code == 2
    assert "is the folder of the model base" in said.err
    assert bytes_of(base) == before


def test_the_base_of_an_adapter_is_no_output_folder(config, tmp_path):
    for name, base in (("adapter", "first"), ("first", "base")):
        (tmp_path / name).mkdir()
        content = json.dumps({"base_model_name_or_path": str(tmp_path / base)})
        (tmp_path / name / "adapter_config.json").write_text(content, encoding="utf-8")
    (tmp_path / "base").mkdir()
    for name in ("adapter", "first", "base"):
        with pytest.raises(UsageError, match=f"is the folder of the model {name}"):
            check_inputs(config(model=str(tmp_path / "adapter"), output_dir=tmp_path / name), Manifest())


def test_what_a_run_reads_is_not_replaced_by_it(config, tmp_path):
    for name in ("checkpoint-5", "rows.jsonl"):
        of_a_run = Manifest({name: None})
        (tmp_path / "out" / "checkpoint-5").mkdir(parents=True, exist_ok=True)
        model, rows = str(tmp_path / "out" / "checkpoint-5"), tmp_path / "out" / "rows.jsonl"
        with pytest.raises(UsageError, match=rf"{name} belongs to an earlier run in .*out"):
            check_inputs(config(model=model, train_file=rows), of_a_run)
    check_inputs(config(model=model, train_file=rows), Manifest())


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", ["config.yaml", "notes.txt", "config.json", "report.html", "README.md", "vocab.json"])
def test_a_file_of_the_users_makes_a_folder_another_ones(zotune, short, tmp_path, name):
    (tmp_path / "out").mkdir()
    text = yaml.safe_dump({"seed": 1, "output_dir": "out"}, sort_keys=False) if name == "config.yaml" else "mine"
    (tmp_path / "out" / name).write_text(text, encoding="utf-8")
    for more in ((), ("--resume",), ("--overwrite-output-dir",)):
        said = zotune(*short(*more))
        if name == "notes.txt" and more == ("--overwrite-output-dir",):
            # As with transformers: what has none of a run's names stays beside the run.
            assert said.code == 0, said.err
        else:
            assert (said.code, name in said.err) == (2, True), said.err
            assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / name]
        assert (tmp_path / "out" / name).read_text(encoding="utf-8") == text


def test_a_recipe_in_the_output_folder_is_not_replaced(zotune, rows_file, tmp_path):
    (tmp_path / "out").mkdir()
    recipe = tmp_path / "out" / "config.yaml"
    text = f"# my recipe\nmodel: random:llama-tiny\ntrain_file: {rows_file}\noutput_dir: {tmp_path}/out\nmax_steps: 2\n"
    recipe.write_text(text, encoding="utf-8")
    for more in ((), ("--resume",), ("--overwrite-output-dir",)):
        said = zotune("train", recipe, *more)
        assert (said.code, "(config.yaml)" in said.err or "replace: config.yaml" in said.err) == (2, True), said.err
        assert bytes_of(tmp_path / "out") == {"config.yaml": text.encode()}


def broken_run(monkeypatch):
    """Let every run be refused when its first step is due, as for a μ that cannot work."""

    real, calls = loop.Run._closures, []

    def refuse(run, examples):
        calls.append(run)
        # The first call tries whether probes share a pass; the second one is of a step.
        if len(calls) == 2:
            raise UsageError("mu: it cannot work")
        return real(run, examples)

    monkeypatch.setattr(loop.Run, "_closures", refuse)


@pytest.mark.parametrize("method", ["zo_sgd", "fo_sgd"])
def test_a_refused_run_leaves_every_byte_of_the_one_it_would_replace(zotune, short, monkeypatch, tmp_path, method):
    assert zotune(*short("--tuning", "lora")).code == 0
    (tmp_path / "out/notes").write_text("mine", encoding="utf-8")
    before = bytes_of(tmp_path / "out")
    if method == "zo_sgd":
        said = zotune(*short("--overwrite-output-dir", "--mu", "1e-12", "--learning-rate", "1e-3"))
    else:
        broken_run(monkeypatch)
        said = zotune(*short("--overwrite-output-dir", "--method", method))
    assert (said.code, "mu" in said.err) == (2, True), said.err
    assert bytes_of(tmp_path / "out") == before


def test_a_refused_run_leaves_no_folder(zotune, short, monkeypatch, tmp_path):
    broken_run(monkeypatch)
    assert zotune(*short(out="new/out")).code == 2
    assert not (tmp_path / "new").exists()


def test_the_old_model_is_there_until_the_new_one_is_saved(zotune, short, monkeypatch, tmp_path):
    out = tmp_path / "out"
    assert zotune(*short("--tuning", "lora")).code == 0
    before, seen, real = bytes_of(out), [], loop.Run.run_steps

    def look(run, *args):
        real(run, *args)
        (aside,) = (p for p in out.iterdir() if p.name.startswith("."))
        seen.append(bytes_of(aside))
        # An adapter beside it would be loaded in place of the new weights.
        assert not list(out.glob("adapter*"))

    monkeypatch.setattr(loop.Run, "run_steps", look)
    assert zotune(*short("--overwrite-output-dir")).code == 0
    assert seen == [before]
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    assert (out / "model.safetensors").is_file() and not list(out.glob("adapter*"))


def test_a_file_that_was_changed_is_not_replaced(zotune, short, tmp_path):
    assert zotune(*short()).code == 0
    (tmp_path / "out/README.md").write_text("my card", encoding="utf-8")
    weights = load_file(tmp_path / "out/model.safetensors")
    save_file({name: w + 1 for name, w in weights.items()}, tmp_path / "out/model.safetensors")
    before = bytes_of(tmp_path / "out")
    said = zotune(*short("--overwrite-output-dir"))
    assert (said.code, "README.md, model.safetensors" in said.err) == (2, True), said.err
    assert bytes_of(tmp_path / "out") == before


def test_a_run_of_an_earlier_version_is_resumed_and_replaced(zotune, short, tmp_path):
    assert zotune(*short()).code == 0
    (tmp_path / "out" / FILE).unlink()
    assert zotune(*short()).code == 2
    assert zotune(*short("--resume")).code == 0
    assert (tmp_path / "out" / FILE).is_file()
    (tmp_path / "out" / FILE).unlink()
    assert zotune(*short("--overwrite-output-dir", "--tuning", "lora")).code == 0
    assert not (tmp_path / "out/model.safetensors").exists()


def test_an_evaluation_does_not_replace_the_results_of_a_run(zotune, short, rows_file, tmp_path):
    out = tmp_path / "out"
    assert zotune(*short("--eval-steps", 1, "--load-best-model-at-end", "--learning-rate", "1e-2")).code == 0
    before = bytes_of(out)
    evaluate = ["eval", "--model", out, "--eval-file", rows_file, "--device", "cpu", "--output-dir"]
    for _ in range(2):
        said = zotune(*evaluate, out)
        assert (said.code, "choose another --output-dir" in said.err) == (2, True)
        # Without results of its own it is still a run's folder.
        (out / "results.json").unlink(missing_ok=True)
    (out / "results.json").write_bytes(before["results.json"])
    assert bytes_of(out) == before
    assert zotune("ledger", "verify", out).code == 0
    assert zotune(*evaluate, tmp_path / "measured").code == 0
    first = bytes_of(tmp_path / "measured")
    assert zotune(*evaluate, tmp_path / "measured").code == 2
    assert bytes_of(tmp_path / "measured") == first


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["config.json", "README.md", "adapter_config.json"])
def test_a_replay_and_a_merge_replace_nothing(zotune, short, tmp_path, name):
    assert zotune(*short("--tuning", "lora")).code == 0
    target = tmp_path / "target"
    target.mkdir()
    (target / name).write_text("mine", encoding="utf-8")
    for command in (["replay"], ["export", "--merged"], ["merge", tmp_path / "out"]):
        said = zotune("ledger", command[0], tmp_path / "out", *command[1:], "--output-dir", target)
        assert (said.code, f"is not empty ({name})" in said.err) == (2, True), said.err
        assert bytes_of(target) == {name: b"mine"}


# One writer ------------------------------------------------------------------------------------------------


def test_every_command_that_writes_takes_the_folders_lock(zotune, short, rows_file, tmp_path):
    assert zotune(*short()).code == 0
    out = tmp_path / "out"
    commands = [
        short("--resume"),
        short("--overwrite-output-dir"),
        ["ledger", "undo", out, "--to-step", 1],
        *(["ledger", verb, out, "--output-dir", out] for verb in ("replay", "export")),
        ["ledger", "merge", out, out, "--output-dir", out],
        ["eval", "--model", out, "--eval-file", rows_file, "--output-dir", out],
        ["bench", "report", "--run", out],
    ]
    with LockedFolder(out):
        before = bytes_of(out)
        for command in commands:
            said = zotune(*command)
            assert (said.code, "another run is writing to" in said.err) == (2, True), (command, said.err)
        assert bytes_of(out) == before


def test_of_two_replays_at_once_one_is_refused_and_the_other_right(zotune, short, tmp_path):
    assert zotune(*short("--learning-rate", "1e-2")).code == 0
    from zotune.llm.ledger.rebuild import export, find_ledger, rebuild

    ledger, codes = find_ledger(tmp_path / "out"), []
    rebuilt = {num_steps: rebuild(ledger.first(num_steps)) for num_steps in (1, 2)}
    both = threading.Barrier(2)

    def replay(num_steps):
        both.wait()
        try:
            export(rebuilt[num_steps], tmp_path / "again")
            codes.append(num_steps)
        except UsageError:
            codes.append(None)

    threads = [threading.Thread(target=replay, args=(n,)) for n in (1, 2)]
    [t.start() for t in threads], [t.join() for t in threads]
    (done,) = set(codes) - {None}
    export(rebuilt[done], tmp_path / "alone")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "alone")


def test_an_undo_changes_all_or_nothing(zotune, short, monkeypatch, tmp_path):
    assert zotune(*short("--save-steps", 1)).code == 0
    out = tmp_path / "out"
    before = bytes_of(out)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("zotune.llm.ledger.undo.MetricsLog.truncate", full)
        with pytest.raises(OSError, match="No space"):
            undo(out, 1)
    assert bytes_of(out) == before
    undo(out, 1)
    assert not (out / "checkpoint.safetensors").exists() and not (out / "results.json").exists()
    assert len((out / "ledger.zol").read_bytes()) < len(before["ledger.zol"])
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_a_run_obeys_the_umask_and_leaves_nothing_hidden(zotune, short, tmp_path):
    before = os.umask(0o027)
    try:
        assert zotune(*short("--save-steps", 1)).code == 0
    finally:
        os.umask(before)
    modes = {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in (tmp_path / "out").iterdir()}
    assert {name: mode for name, mode in modes.items() if mode != "0o640"} == {
        name: "0o750" for name in modes if name.startswith("checkpoint-")
    }
    assert not [name for name in modes if name.startswith(".")]
    listed = json.loads((tmp_path / "out" / FILE).read_text(encoding="utf-8"))["files"]
    assert set(listed) == set(modes) - {FILE}
