"""Flags that people know from other tools reach our options, or are answered in one line with exit code 2."""

import re

import pytest
import yaml

from zotune.cli.options import parse, split_aliases
from zotune.llm.config.aliases import alias_table
from zotune.llm.config.run import EvalConfig, TrainConfig
from zotune.plan.options import PlanConfig


def parsed(*args, schema=TrainConfig, recipe=None):
    return parse(schema, recipe or {}, "my.yaml", [*map(str, args)], "zotune train")


def test_flags_of_other_tools_are_ours_by_another_name():
    config = parsed(
        *("--task", "sst2", "--model-name-or-path", "random:opt-tiny", "--bf16", "--lr", "2e-4", "--batch_size=4"),
        *("--use-peft", "--lora-rank", 3, "--lora_target", "q_proj", "v_proj", "--zo_eps", "2e-2", "--max-steps", 7),
    )
    assert (config.model, config.dtype, config.learning_rate, config.mu) == ("random:opt-tiny", "bfloat16", 2e-4, 2e-2)
    assert (config.per_device_train_batch_size, config.max_steps, config.lora_r) == (4, 7, 3)
    assert (config.tuning, config.lora_target_modules) == ("lora", ("q_proj", "v_proj"))


def test_a_flag_overrides_a_recipe_whatever_their_names():
    recipe = {"task": "sst2", "lr": 1e-2, "micro_batch_size": 2}
    assert parsed("--learning-rate", "1e-5", recipe=recipe).learning_rate == 1e-5
    assert parsed("--lr", "1e-5", recipe={"task": "sst2", "learning_rate": 1e-2}).learning_rate == 1e-5
    assert parsed("--lr=1e-5", recipe=recipe).per_device_train_batch_size == 2


def test_files_by_another_name_replace_the_recipes_task():
    config = parsed("--dataset-name", "org/rows", recipe={"task": "sst2"})
    assert (config.task, config.named_files) == (None, "hub:org/rows")


def test_flags_without_a_value_and_with_no_switch_features():
    assert split_aliases(["--bf16", "--no-hub-always-push", "--seed", "3"], ("seed",)) == (
        ["--seed", "3"],
        {"bf16": True, "hub_always_push": False},
    )
    assert parsed("--task", "sst2", "--no-hub-always-push", "--fp16", "false").dtype == "auto"
    hub = parsed("--task", "sst2", "--push-to-hub", "--hub-model-id", "me/mine", "--hub-private")
    assert (hub.push_to_hub, hub.hub_model_id, hub.hub_private_repo) == (True, "me/mine", True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--hub-strategy", "every_save"], "hub_strategy: the model is uploaded once, when the run has ended"),
        (["--model-code-revision", "v2"], "model_code_revision: the code of a model"),
        (["--config", "my.yaml"], "the recipe is the first argument"),
        (["--lr", "1", "--learning-rate", "2"], "--lr and --learning-rate both set learning_rate; give one"),
        (["--lr", "fast"], "command line: learning_rate is 'fast'"),
        (["--lr", "-1"], "learning_rate is '-1'"),
        (["--lora-rank", "0"], "lora_r is '0'"),
        (["--bf16", "perhaps"], "bf16: 'perhaps' means nothing here; give one of: true, auto"),
        (["--dtype", "bf15"], "bf15"),
        (["--template", "llama3"], "template is 'llama3': it names no column"),
    ],
)
def test_a_flag_that_cannot_be_taken_is_answered_with_exit_code_2(zotune, args, message):
    said = zotune("train", "--task", "sst2", "--model", "random:opt-tiny", *args)
    assert (said.code, said.out) == (2, "")
    assert message in re.sub(r"[\s│]+", " ", said.err)
    assert "Traceback" not in said.err


def test_a_recipe_of_another_tool_is_answered_key_by_key(zotune, tmp_path):
    path = tmp_path / "llama.yaml"
    path.write_text(
        yaml.safe_dump({"stage": "sft", "deepspeed": "z3.json", "hub_strategy": "end", "lora_dropout": 0.1})
    )
    said = zotune("train", path)
    assert said.code == 2
    assert sorted(re.findall(r"llama\.yaml: (\w+): ", said.err)) == ["deepspeed", "hub_strategy", "lora_dropout"]


def test_other_commands_take_the_same_names():
    assert parsed("--batch-size", 8, schema=PlanConfig).per_device_train_batch_size == 8
    assert parsed("--task", "sst2", "--base-model", "m", "--dtype", "bf16", schema=EvalConfig).dtype == "bfloat16"


def test_an_option_that_a_command_lacks_is_named_by_both_names(zotune):
    said = zotune("eval", "--task", "sst2", "--lr", "1e-3")
    assert (said.code, said.out) == (2, "")
    assert "--lr is --learning-rate here, an option that `zotune eval` does not have." in said.err


def test_no_name_of_the_table_is_an_unknown_flag():
    # Each is taken out of the arguments, before it would be called unknown.
    for name in alias_table().names:
        assert split_aliases([f"--{name.replace('_', '-')}", "x"], TrainConfig.model_fields)[0] == []
