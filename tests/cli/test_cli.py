"""The command line says what is wrong and what to do: exit codes, messages, suggestions; results on stdout alone.

A run that is interrupted leaves a model, and every command that is documented parses.
"""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import yaml

from zotune.cli import main as cli
from zotune.cli.options import parse
from zotune.llm.config.method import FIRST_ORDER, MethodName
from zotune.llm.config.run import RECIPES, EvalConfig, TrainConfig, find_recipe, read_recipe
from zotune.llm.config.schema import validate
from zotune.llm.training.loop import Run
from zotune.methods.table import METHODS

README = Path(__file__).parents[2] / "README.md"


# Runs ------------------------------------------------------------------------------------------------------


def test_results_go_to_stdout_and_progress_to_stderr(zotune, short, tmp_path):
    said = zotune(*short())
    assert said.code == 0
    assert re.fullmatch(
        r"held-out rows before: .* %.*n = 3\)\nheld-out rows: .* %.*n = 3\)\n"
        r"2 steps, 4 forward passes, \d+ s, peak memory \d+ MiB\nsaved in .*out\n",
        said.out,
    )
    assert "step 2/2 · loss" in said.err
    assert (tmp_path / "out/model.safetensors").is_file()


def test_json_is_one_object_on_stdout(zotune, short, tmp_path, rows_file):
    said = zotune(*short("--json"))
    result = json.loads(said.out)
    assert (said.code, result["num_steps"], result["output_dir"]) == (0, 2, str(tmp_path / "out"))
    said = zotune("eval", "--json", "--model", tmp_path / "out", "--eval-file", rows_file)
    assert (said.code, said.err.count("\n")) == (0, 2)
    assert "rows.jsonl: rows of a text and its label" in said.err
    assert json.loads(said.out)["num_examples"] == 11
    for command in ("models", "tasks", "methods", "env"):
        said = zotune(command, "--json")
        assert (said.code, said.err) == (0, "")
        assert json.loads(said.out)


@pytest.mark.sample(1)
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_evaluating_what_was_saved_gives_what_was_reported(zotune, short, tmp_path, rows_file, tuning):
    trained = json.loads(zotune(*short("--json", "--tuning", tuning, "--learning-rate", "0.05")).out)
    said = zotune(
        "eval",
        "--model",
        tmp_path / "out",
        "--train-file",
        rows_file,
        "--num-dev",
        3,
        "--json",
        "--output-dir",
        tmp_path / "e",
    )
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert (found["accuracy"], found["loss"]) == (
        trained["dev"]["accuracy"],
        pytest.approx(trained["dev"]["loss"], abs=1e-6),
    )
    assert found["loss"] != pytest.approx(trained["dev_before"]["loss"], abs=1e-6)
    assert json.loads((tmp_path / "e/results.json").read_text(encoding="utf-8")) == found


def test_options_take_dashes_underscores_and_equals(zotune, short, tmp_path):
    said = zotune(
        *short(
            "--learning_rate",
            "1e-2",
            "--per-device_train-batch-size=3",
            "--zo_eps",
            "5e-3",
            "--verbalizer",
            "yes",
            "good",
            "no",
            "bad",
        )
    )
    assert said.code == 0, said.err
    saved = yaml.safe_load((tmp_path / "out/config.yaml").read_text(encoding="utf-8"))
    assert (saved["learning_rate"], saved["per_device_train_batch_size"], saved["mu"]) == (1e-2, 3, 5e-3)
    assert saved["verbalizer"] == {"yes": "good", "no": "bad"}
    assert zotune(*short("--zo-eps=7e-3", "--overwrite-output-dir")).code == 0
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text(encoding="utf-8"))["mu"] == 7e-3


def test_options_override_the_recipe_and_numbers_mean_what_they_say(zotune, tmp_path, rows_file):
    """YAML reads 1e-6 as text; here it is a number, and zo_eps another word for mu."""
    recipe = tmp_path / "my.yaml"
    recipe.write_text(
        f"model: random:opt-tiny\ntrain_file: {rows_file}\nlearning_rate: 1e-6\nzo_eps: 2e-3\n"
        "max_steps: 7\nnum_dev: 0\n",
        encoding="utf-8",
    )
    assert zotune("train", recipe, "--max-steps", 1, "--output-dir", tmp_path / "out").code == 0
    saved = yaml.safe_load((tmp_path / "out/config.yaml").read_text(encoding="utf-8"))
    assert (saved["learning_rate"], saved["mu"], saved["max_steps"], saved["num_dev"]) == (1e-6, 2e-3, 1, 0)
    assert saved["train_file"] == str(rows_file)


# Usage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], r"no command 'trian'. Did you mean 'train'\?"),
        (["train", "--task", "sst2", "--learning-rat", "1e-3"], r"--learning-rate"),
        (["train", "--task", "sst2", "--method", "zo_sdg"], r"zo_sdg.*zo_sgd"),
        (["train", "--task", "sst2", "--learning-rate", "fast"], r"learning_rate is 'fast'"),
        (["train", "--task", "sst2", "--learning-rate", "-1"], r"learning_rate.*greater than or equal to 0"),
        (["train", "--task", "sst2", "--mu", "0"], r"mu.*above 0"),
        (["train"], r"give either a task .* or files of your own"),
        (["train", "--task", "sst2", "--train-file", "x.jsonl"], r"give either a task"),
        (["train", "--task", "sst2", "--gradient-checkpointing"], r"gradient_checkpointing has no effect on zo_sgd"),
        (
            ["train", "--task", "sst2", "--tuning", "lora", "--tuned-parameters", "x"],
            "tuned_parameters needs tuning: full",
        ),
        (["train", "--task", "sst2", "--lora-target-modules", "x"], r"lora_target_modules needs tuning: lora"),
        (["train", "--task", "sts2", "--model", "random:opt-tiny"], r"no task 'sts2'. Did you mean 'sst2'\?"),
        (
            ["train", "--task", "sst2", "--model", "random:opt-tny"],
            r"no architecture 'opt-tny'. Did you mean 'opt-tiny'\?",
        ),
        (["train", "--train-file", "no.jsonl", "--model", "random:opt-tiny"], r"there is no file 'no.jsonl'"),
        (["train", "sst2-smolm2"], r"no recipe file 'sst2-smolm2'.*Did you mean 'sst2-smollm2'\?"),
        (["eval", "--task", "sst2", "--model", "random:opt-tiny", "--max-steps", "3"], r"--max-steps"),
        (["models", "--all"], r"zotune models takes no option but --json, got '--all'"),
    ],
)
def test_bad_usage_exits_with_2_and_names_the_way(zotune, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = zotune(*arguments)
    assert (said.code, said.out) == (2, "")
    # Boxes may break lines anywhere.
    assert re.search(message, re.sub(r"[\s│]+", " ", said.err))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: sst2\nlerning_rate: 1e-6\n", r"my.yaml: unknown key 'lerning_rate'. Did you mean 'learning_rate'\?"),
        ("task: sst2\nlerning-rate: 1e-6\n", r"unknown key 'lerning_rate'. Did you mean 'learning_rate'\?"),
        ("task: sst2\nmethod: zo_sdg\n", r"method is 'zo_sdg'. Did you mean 'zo_sgd'\?"),
        ("task: sst2\nmax_steps: many\n", r"my.yaml: max_steps is 'many'; it must be a whole number"),
        ("task: sst2\nmu: 1e-3\nzo_eps: 1e-2\n", r"my.yaml: .*zo_eps"),
        ("task: [sst2\n", r"my.yaml is not valid YAML"),
        ("- task\n", r"my.yaml must hold `key: value` lines"),
    ],
)
def test_bad_recipes_are_named_by_file_and_key(zotune, tmp_path, text, message):
    (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
    said = zotune("train", tmp_path / "my.yaml")
    assert (said.code, said.out) == (2, "")
    assert re.search(message, said.err)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--dtype", "bfloat16", "--rounding", "nearest", "--learning-rate", "1e-12"],
            r"cannot work with rounding to nearest.*rounding: stochastic",
        ),
        (
            ["--dtype", "bfloat16", "--mu", "1e-12"],
            r"mu is 1e-12, too small for weights in bfloat16.*Use mu of at least",
        ),
        (["--tuned-parameters", "nothing"], r"nothing would be tuned"),
        (
            ["--template", "{text}" + 5000 * "x"],
            r"rows.jsonl, line \d+ has \d+ tokens, but the model reads at most (\d+)\..*--max-length \1",
        ),
        (
            ["--verbalizer", "yes", "Yes", "nope", "No"],
            r"line 2: the label 'no' is not in the verbalizer. Did you mean",
        ),
        (["--text-column", "txt"], r"rows.jsonl: there is no column 'txt'. Did you mean 'text'"),
        (["--num-train", "100"], r"has 11 rows, too few for 100 to train on and 3 held out"),
    ],
)
def test_runs_that_cannot_work_are_refused_before_they_start(zotune, short, tmp_path, more, message):
    said = zotune(*short(*more))
    assert (said.code, said.out) == (2, "")
    assert re.search(message, said.err)
    assert not (tmp_path / "out/model.safetensors").exists()
    # Nothing is in the way of the corrected command.
    assert zotune(*short()).code == 0


def test_broken_rows_are_named_by_line(zotune, short, rows_file):
    with rows_file.open("a", encoding="utf-8") as file:
        file.write('{"text": "unfinished\n')
    said = zotune(*short())
    assert said.code == 2
    assert re.search(r"rows.jsonl, line 12: malformed JSON", said.err)


def test_evaluating_no_rows_is_refused(zotune, rows_file):
    said = zotune("eval", "--model", "random:opt-tiny", "--train-file", rows_file, "--num-dev", 0)
    assert said.code == 2
    assert "there is no row to evaluate on" in said.err


def test_a_second_signal_says_how_to_go_on(zotune, short, monkeypatch):
    real = Run._run_step

    def interrupted(self, *args):
        real(self, *args)
        if self.counters.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_run_step", interrupted)
        said = zotune(*short())
    assert (said.code, said.out) == (130, "")
    assert "stopping after this step (a second signal, such as Ctrl-C, stops at once)" in said.err
    assert said.err.endswith("zotune: interrupted after step 1; the same command with --resume goes on\n")
    said = zotune(*short("--resume"))
    assert said.code == 0
    assert "resumed at step 1" in said.err


def test_the_metric_is_named_and_a_log_loss_is_shown_once(zotune, tmp_path):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} is", "completion": " odd"}) + "\n" for i in range(6)))
    plain = ["--model", "random:llama-tiny", "--device", "cpu", "--eval-file", rows, "--batch-size", 2]
    said = zotune("eval", *plain)
    assert re.fullmatch(r"log-loss [\d.]+ nats a token \(.*, n = 6\), perplexity [\d.]+, [\d.]+ s\n", said.out)
    said = zotune("eval", *plain, "--exact-match", "--max-new-tokens", 8)
    assert said.out.startswith("mean F1 of the answers' words (as in SQuAD) 0.0 % (")
    assert re.search(r"exact match 0.0 %, loss [\d.]+, [\d.]+ s\n$", said.out)


def test_an_evaluation_on_the_rows_of_the_training_is_named(zotune, short, tmp_path, rows_file):
    assert zotune(*short()).code == 0
    said = zotune("eval", "--model", tmp_path / "out", "--eval-file", rows_file)
    assert f"the model was tuned on rows of {rows_file}" in said.err
    remedy = f"--train-file {rows_file} --num-dev 3"
    assert f"{remedy} reads the rows that were held out" in said.err
    said = zotune("eval", "--model", tmp_path / "out", *remedy.split())
    assert "n = 3" in said.out
    assert "tuned on" not in said.err
    assert zotune(*short("--num-dev", 0, out="all")).code == 0
    said = zotune("eval", "--model", tmp_path / "all", "--eval-file", rows_file)
    assert "none of its rows was held out, so give another file" in said.err


# Processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["train"], ["eval"]])
def test_help_comes_at_once_and_loads_no_heavy_library(start, arguments):
    script = f"""
import sys, time
began = time.perf_counter()
from zotune.cli.main import run
try:
    code = run({[*arguments, "--help"]!r})
except SystemExit as leaving:
    code = leaving.code
heavy = {{"torch", "transformers", "peft", "datasets"}}
print("SECONDS", time.perf_counter() - began, "HEAVY", sorted(heavy & set(sys.modules)))
sys.exit(code)
"""
    out, err = (process := start("-c", script)).communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "usage: zotune" in out
    seconds, heavy = re.search(r"SECONDS (\S+) HEAVY (.*)", out).groups()
    assert heavy == "[]"
    # A busy machine may take longer than the second it takes otherwise.
    assert float(seconds) < 3


# Tables and documents --------------------------------------------------------------------------------------


def test_method_names_are_those_of_the_tables(zotune):
    assert set(MethodName.__args__) == {*METHODS, *FIRST_ORDER}
    assert set(json.loads(zotune("methods", "--json").out)) == set(MethodName.__args__)


@pytest.mark.parametrize("recipe", sorted(p.stem for p in RECIPES.glob("*.yaml")))
def test_shipped_recipes_are_valid(recipe):
    path = find_recipe(recipe)
    assert path.parent == RECIPES
    config = validate(TrainConfig, read_recipe(path), recipe)
    # Its name says its content: task first, then the model; of one for rows of any task the model, then what is tuned.
    first, second, *_ = recipe.split("-")
    assert (config.task == first and second in config.model) or (first in config.model and config.tuning == second)


def documented_commands():
    """The lines of README's code blocks that begin with zotune, joined where they go on."""
    text = README.read_text(encoding="utf-8") if README.is_file() else ""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        line.partition("  #")[0]
        for line in lines
        if line.startswith("zotune ") and not re.search(r"…|<|\bCOMMAND\b", line)
    ]


@pytest.mark.parametrize("line", documented_commands())
def test_documented_commands_parse(line, tmp_path, monkeypatch):
    import shlex

    monkeypatch.chdir(tmp_path)
    _, command, *arguments = shlex.split(line)
    assert command in cli._VERBS
    arguments = [a for a in arguments if a != "--json"]
    if command in ("train", "eval"):
        named = command == "train" and arguments and not arguments[0].startswith("-")
        # A recipe of the reader's own has a path; a shipped one must exist.
        recipe = {} if not named or arguments[0].endswith(".yaml") else read_recipe(find_recipe(arguments[0]))
        schema = TrainConfig if command == "train" else EvalConfig
        if named and not recipe:
            recipe = {"task": "sst2"}
        parse(schema, recipe, "README", arguments[1:] if named else arguments, f"zotune {command}")


def test_files_of_ones_own_take_the_place_of_a_recipes_task(zotune, short, tmp_path):
    (tmp_path / "recipe.yaml").write_text("task: sst2\nmu: 0.02\n", encoding="utf-8")
    verb, *options = short()
    assert zotune(verb, tmp_path / "recipe.yaml", *options).code == 0
    resolved = yaml.safe_load((tmp_path / "out/config.yaml").read_text(encoding="utf-8"))
    assert (resolved["task"], resolved["mu"]) == (None, 0.02)
    said = zotune(verb, tmp_path / "recipe.yaml", *options, "--task", "sst2", "--overwrite-output-dir")
    assert said.code == 2
    assert "both were given" in said.err
