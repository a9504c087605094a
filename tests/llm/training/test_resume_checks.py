"""A run is resumed as what it is or not at all: whatever decides its result is compared before a byte is written."""

import json
import shutil

import pytest
import yaml

from zotune.cli import main as command_line
from zotune.errors import UsageError
from zotune.ledger import read
from zotune.llm.tasks.load_data import load_examples
from zotune.llm.training import checkpoint
from zotune.llm.training.train import train

KINDS = {
    "zo_sgd": {},
    "fo_sgd": {"method": "fo_sgd", "save_steps": 2},
    "hybrid": {"hybrid_layers": 1, "hybrid_tied": "zeroth_order", "save_steps": 2},
}
OPTIONS = {"max_steps": 4, "learning_rate": 1e-2}
SELECTS = {"eval_steps": 2, "load_best_model_at_end": True}

each_kind = pytest.mark.parametrize("kind", KINDS)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def base(tiny, tmp_path):
    """The folder of a model of its own."""
    lm = tiny("llama")
    lm.tokenizer.save_pretrained(tmp_path / "base")
    lm.base.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def scale_weights(base, part, factor):
    from safetensors.torch import load_file, save_file

    path = base / "model.safetensors"
    scaled = {k: v * factor if part in k else v for k, v in load_file(path).items()}
    save_file(scaled, path, {"format": "pt"})


def other_rows(folder):
    path = folder / "rows.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("film", "movie").replace("yawn", "sigh"), encoding="utf-8")


def other_order(folder):
    path = folder / "rows.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[::-1]), encoding="utf-8")


def other_configuration(folder):
    path = folder / "base/config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "rms_norm_eps": 0.01}), encoding="utf-8")


def edited_recipe(folder):
    path = folder / "out/config.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("\nseed: 0", "\nseed: 3"), encoding="utf-8")


def no_journal(folder):
    for name in ("ledger.zol", "checkpoint.safetensors"):
        (folder / "out" / name).unlink(missing_ok=True)
    (folder / "out/metrics.jsonl").write_bytes(b"")


# What was changed between start and resume: how, options of the resumed run, and what the refusal says.
CHANGES = {
    "rows": (other_rows, {}, "other training rows"),
    "order": (other_order, {}, "other training rows"),
    "base": (lambda folder: scale_weights(folder / "base", "mlp", 1.5), {}, "the base model|another base model"),
    "configuration": (other_configuration, {}, "other configuration of the base model"),
    "recipe and options": (edited_recipe, {"seed": 3}, "of a run with seed: 0, so it cannot resume with 3"),
    "fewer steps": (lambda folder: None, {"max_steps": 3}, "a run of 4 steps, so it cannot end after 3"),
    "no ledger and no checkpoint": (no_journal, {}, "is not there to resume it from"),
}


@each_kind
@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_is_named_and_nothing_is_touched(config, base, tmp_path, kind, change):
    how, changed, said = CHANGES[change]
    options = {**OPTIONS, **KINDS[kind], "model": str(base)}
    train(config(**options))
    if (ledger := tmp_path / "out/ledger.zol").exists():
        ledger.write_bytes(ledger.read_bytes() + b"torn")
    how(tmp_path)
    before = files_of(tmp_path / "out")
    with pytest.raises(UsageError, match=said):
        train(config(**{**options, "max_steps": 6, **changed}, resume=True))
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["zo_sgd", "fo_sgd"])
@pytest.mark.parametrize("chooses", [False, True])
def test_only_held_out_rows_that_choose_the_weights_may_not_change(config, tiny, rows_file, tmp_path, kind, chooses):
    options = {**OPTIONS, **KINDS[kind], **(SELECTS if chooses else {})}
    train(config(**options))
    text = rows_file.read_text(encoding="utf-8")
    held_out = {row.prompt.splitlines()[0] for row in load_examples(tiny("llama"), config()).splits.dev}
    (line, *_) = (line for line in text.splitlines() if json.loads(line)["text"] in held_out)
    rows_file.write_text(text.replace(line, line.replace('{"text": "', '{"text": "so ')), encoding="utf-8")
    before = files_of(tmp_path / "out")
    if chooses:
        with pytest.raises(UsageError, match="other held-out rows"):
            train(config(**options, resume=True))
        assert files_of(tmp_path / "out") == before
    else:
        train(config(**options, resume=True))


def test_max_steps_may_change_on_resume_and_the_recipe_tells_it(config, tmp_path):
    """Down to what the ledger has. A ledger does not tell at which number of steps its run was to end."""
    train(config(**{**OPTIONS, "max_steps": 7}, output_dir=tmp_path / "whole"))
    train(config(**OPTIONS))
    out = tmp_path / "out"
    shutil.copytree(out, tmp_path / "same")
    train(config(**{**OPTIONS, "max_steps": 7}, resume=True))
    assert yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))["max_steps"] == 7
    for name in ("ledger.zol", "model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    ledger = out / "ledger.zol"
    ledger.write_bytes(read(ledger).first(4).to_bytes())
    train(config(**{**OPTIONS, "max_steps": 4}, resume=True))
    assert yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))["max_steps"] == 4
    for name in ("ledger.zol", "model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "same" / name).read_bytes()


def test_where_rates_depend_on_it_max_steps_stays(config, tmp_path):
    options = {**OPTIONS, "lr_scheduler_type": "cosine"}
    for kind in KINDS:
        out = tmp_path / kind
        train(config(**options, **KINDS[kind], output_dir=out))
        before = files_of(out)
        with pytest.raises(UsageError, match="with max_steps: 4, so it cannot resume with 6"):
            train(config(**{**options, "max_steps": 6}, **KINDS[kind], output_dir=out, resume=True))
        assert files_of(out) == before
        train(config(**options, **KINDS[kind], output_dir=out, resume=True))


def test_a_checkpoint_of_another_ledger_is_done_without(config, tmp_path, capsys):
    """As when a checkpoint was copied between runs; it holds other weights."""
    options = {**OPTIONS, "tuning": "lora", "save_steps": 2}
    whole, other = tmp_path / "whole", tmp_path / "other"
    train(config(**options, output_dir=whole))
    train(config(**{**options, "learning_rate": 0.5}, output_dir=other))
    for name, is_used in (("whole", True), ("other", False)):
        found = checkpoint.load(tmp_path / name / "checkpoint.safetensors")
        mine = checkpoint.load(whole / "checkpoint.safetensors")
        shutil.copytree(whole, tmp_path / "part", dirs_exist_ok=True)
        # Whatever else is like this run's.
        checkpoint.save(tmp_path / "part/checkpoint.safetensors", {**found, "run": mine["run"]})
        capsys.readouterr()
        train(config(**options, output_dir=tmp_path / "part", resume=True))
        assert ("from the checkpoint of step 4" in capsys.readouterr().err) == is_used
        for file in ("ledger.zol", "adapter_model.safetensors"):
            assert (tmp_path / "part" / file).read_bytes() == (whole / file).read_bytes()


def test_a_damaged_checkpoint_of_a_run_without_a_ledger_is_refused(config, tmp_path):
    options = {**OPTIONS, **KINDS["fo_sgd"], "logging_steps": 100}
    train(config(**options))
    path = tmp_path / "out/checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-3] + b"xyz")
    before = files_of(tmp_path / "out")
    with pytest.raises(UsageError, match="is damaged"):
        train(config(**options, resume=True))
    assert files_of(tmp_path / "out") == before


def test_a_run_that_wrote_nothing_yet_may_start(config, tmp_path):
    options = {**OPTIONS, "max_steps": 2}
    train(config(**options, output_dir=tmp_path / "whole"))
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "whole", out)
    for name in ("ledger.zol", "results.json", "model.safetensors"):
        (out / name).unlink()
    (out / "metrics.jsonl").write_bytes(b"")
    train(config(**options, resume=True))
    assert (out / "ledger.zol").read_bytes() == (tmp_path / "whole/ledger.zol").read_bytes()


def test_a_ledgers_bytes_do_not_depend_on_how_the_run_was_started(config, zotune, short, rows_file, tmp_path):
    """From Python, by options or by a recipe; resumed or not; wherever it writes, logs and saves."""
    python = {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 16}
    train(config(**python, output_dir=tmp_path / "python"))
    flags = ["--learning-rate", "1e-3", "--max-steps", 3, "--save-steps", 2, "--resume"]
    assert zotune(*short(out="flags"), *flags).code == 0
    values = {"model": "random:llama-tiny", "train_file": str(rows_file), "num_dev": 3, "learning_rate": "1e-3"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**values, "max_steps": 2, "output_dir": str(tmp_path / "recipe")}))
    assert zotune("train", recipe).code == 0
    assert zotune("train", recipe, "--max-steps", 3, "--resume", "--device", "cpu").code == 0
    python, flags, recipe = ((tmp_path / name / "ledger.zol").read_bytes() for name in ("python", "flags", "recipe"))
    assert python == flags == recipe
    recorded = read(tmp_path / "python/ledger.zol").header.about["config"]
    assert not {"output_dir", "resume", "max_steps", "device"} & recorded.keys()


def test_ledgers_and_checkpoints_of_earlier_versions_are_resumed(config, tmp_path):
    """They record all options, no configuration of the base, and checkpoints do not name their ledger."""
    from zotune.ledger import Header
    from zotune.ledger.format import checksum

    for kind in KINDS:
        whole, part = tmp_path / f"whole {kind}", tmp_path / f"part {kind}"
        options = {**OPTIONS, **KINDS[kind], "save_steps": 2}
        train(config(**options, output_dir=part))
        shutil.copytree(part, whole)
        saved = checkpoint.load(part / "checkpoint.safetensors")
        saved.pop("ledger", None)
        origin = {k: v for k, v in saved["origin"].items() if k in ("data", "held_out", "weights")}
        run = {**saved["run"], "max_steps": 4, "data": origin["data"]}
        checkpoint.save(part / "checkpoint.safetensors", {**saved, "run": run, "origin": origin})
        if (part / "ledger.zol").exists():
            ledger = read(part / "ledger.zol")
            about = {k: v for k, v in ledger.header.about.items() if k != "architecture"}
            about["config"] = yaml.safe_load((part / "config.yaml").read_text(encoding="utf-8"))
            header = ledger.header
            content = Header(header.layout, header.method, header.tensors, about, header.noise_version).to_bytes()
            crc = int.from_bytes(content[16:20], "little")
            for i, row in enumerate(ledger.rows):
                content += checksum(row.tobytes(), i, crc).to_bytes(4, "little") + row.tobytes()[4:]
            (part / "ledger.zol").write_bytes(content)
        train(config(**{**options, "max_steps": 6}, output_dir=part, resume=True))
        train(config(**{**options, "max_steps": 6}, output_dir=whole, resume=True))
        assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


class Full:
    """A stream on a full disk."""

    def __init__(self, error):
        self.error, self.num_tried = error, 0

    def write(self, text):
        self.num_tried += 1
        raise self.error

    flush = isatty = lambda self: self.write("")


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), BrokenPipeError(), ValueError("closed"), None], ids=str
)
def test_a_full_or_closed_stderr_ends_no_run(config, short, tmp_path, monkeypatch, error):
    stream = None if error is None else Full(error)
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", stream)
        result = train(config(output_dir=tmp_path / "python"))
    assert result.num_steps == 2
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.stderr", stream)
        command_line.main([str(arg) for arg in short(out="flags")])
    assert end.value.code == 0
    assert stream is None or stream.num_tried > 3
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.stderr", stream)
        command_line.main(["no such verb"])
    assert end.value.code == 2
    assert (tmp_path / "flags/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", "0<&- 2>&-"])
def test_a_process_without_a_usable_stderr_runs_to_its_end(short, tmp_path, where):
    import os
    import subprocess
    import sys

    words = [sys.executable, "-m", "zotune", *map(str, short("--json"))]
    command = f'exec "$@" {where}'
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        ["bash", "-c", command, "bash", *words],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["num_steps"] == 2
    assert len(read(tmp_path / "out/ledger.zol")) == 2
