"""A mistaken argument is answered by what was probably meant, without its value, without a box."""

import json

import pytest

from zotune.cli.mistaken import unknown_option
from zotune.llm.config.aliases import alias_table
from zotune.llm.config.run import TrainConfig


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "a", "label": 1}], indent=1))
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "recipe.json").write_text(json.dumps({"task": "sst2", "lerning_rate": 1}, indent=1))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").write_text("{}")
    return tmp_path


TRAIN = [
    (["--lerning-rate", "1e-3"], "`zotune train` has no option --lerning-rate. Did you mean --learning-rate?"),
    (["--batch-siz", "8"], "`zotune train` has no option --batch-siz. Did you mean --batch-size?"),
    (["-lr", "1e-3"], "`zotune train` has no option -lr. Did you mean --lr?"),
    (["--no-mu"], "`zotune train` has no option --no-mu. "),
    (["--baselines"], "`zotune train` has no option --baselines; `zotune eval` has it."),
    (["--qqqq", "3"], "`zotune train` has no option --qqqq. `zotune train --help` lists the options."),
    (["--mu", "1e-3", "1e-2"], "--mu takes one value, got 1e-3, 1e-2."),
    (["--mu", "1e-3", "my.yaml"], "The recipe comes first: zotune train my.yaml"),
    (["--verbalizer", "good"], "--verbalizer takes pairs of a name and a value, got 'good'."),
    (["--no-resume", "yes"], "--no-resume is a switch and takes no value, got 'yes'."),
    (["--resume", "perhaps"], "resume is 'perhaps'; it must be true or false."),
    (["alpaca.jsonl"], "'alpaca.jsonl' is a file of rows: zotune train --train-file alpaca.jsonl"),
    (["my.csv", "--mu", "1"], "'my.csv' is a file of rows: zotune train --train-file my.csv"),
    (["rows.json"], "'rows.json' is a file of rows: zotune train --train-file rows.json"),
    (["lines.json"], "'lines.json' is a file of rows: zotune train --train-file lines.json"),
    (["recipe.json"], "recipe.json: unknown key 'lerning_rate'. Did you mean 'learning_rate'?"),
    (["hub:org/rows"], "'hub:org/rows' is a data set of the Hub: zotune train --train-file hub:org/rows"),
    (["sst2"], "'sst2' is a task: zotune train --task sst2"),
    (["smollm2-135m"], "'smollm2-135m' is a model: zotune train --model smollm2-135m"),
    (["folder"], "'folder' is a model: zotune train --model folder"),
    (["nothing"], "there is no recipe file 'nothing', and no shipped recipe of that name."),
]


@pytest.mark.parametrize(("arguments", "answer"), TRAIN)
def test_the_answer_names_what_was_meant(zotune, here, arguments, answer):
    said = zotune("train", *arguments)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("zotune: ")
    assert answer in said.err
    assert not {"│", "╭"} & set(said.err)
    assert arguments[-1] in answer or arguments[-1] not in said.err


def test_each_unknown_option_has_a_line(zotune):
    said = zotune("train", "--task", "sst2", "--lerning-rate", "1e-3", "--sead", "3")
    assert said.err.splitlines() == [
        "zotune: `zotune train` has no option --lerning-rate. Did you mean --learning-rate?",
        "`zotune train` has no option --sead. Did you mean --seed?",
    ]


def test_other_commands_say_where_an_argument_goes(zotune, here):
    assert "zotune eval --eval-file my.csv" in zotune("eval", "my.csv").err
    assert "zotune tune --train-file my.csv" in zotune("tune", "my.csv", "--mu", "1", "2").err
    assert "takes no argument 'my.csv' here" in zotune("plan", "my.csv").err
    assert "`zotune eval` has no option --max-steps; `zotune train` has it." in zotune("eval", "--max-steps", "3").err


def test_a_letter_too_few_is_understood():
    names = {*TrainConfig.model_fields, *alias_table().same}
    known = {*TrainConfig.model_fields, *alias_table().names}
    for name in {name for name in names if len(name) > 3 and name[:-1] not in known}:
        answer = unknown_option(f"--{name[:-1].replace('_', '-')}", TrainConfig, "zotune train")
        meant = [f"Did you mean --{n.replace('_', '-')}?" for n in known if n.startswith(name[:-1])]
        assert any(text in answer for text in meant), answer
