"""Every option of a run's length, schedule, evaluations, logs and checkpoints answers a bad value in words."""

import re

import pytest

from zotune.llm.config.data import DataOptions
from zotune.llm.config.method import MethodOptions
from zotune.llm.config.output import OutputOptions
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.schedule import ScheduleOptions
from zotune.llm.config.selection import SelectionOptions
from zotune.llm.config.step import StepOptions

# An option, a value (several arguments, if a list), and what the answer says beside the option and the value.
BAD = {
    "learning_rate": ("fast", "a number of at least 0, as 1e-3, or auto"),
    "lr_scheduler_type": ("cosin", "Did you mean 'cosine'"),
    "mu": ("0", "a number above 0"),
    "only_layer": ("last", "dominant"),
    "max_steps": ("many", "a whole number of at least 1"),
    "num_train_epochs": ("0", "a number above 0"),
    "warmup_steps": ("-1", "a number of at least 0"),
    "warmup_ratio": ("1.5", "below 1"),
    "lr_scheduler_kwargs": ("0.5", "it must be a mapping"),
    "eval_strategy": ("step", "Did you mean 'steps'"),
    "eval_steps": ("1.5", "a whole number of at least 1, or a number above 0 and below 1"),
    "load_best_model_at_end": ("perhaps", "true or false"),
    "metric_for_best_model": ("rouge", "There is: loss, metric"),
    "early_stopping_patience": ("0", "a whole number of at least 1"),
    "output_dir": ("a\0b", "a NUL character"),
    "overwrite_output_dir": ("perhaps", "true or false"),
    "save_strategy": ("epochs", "Did you mean 'epoch'"),
    "save_steps": ("0", "a whole number of at least 1, or a number above 0"),
    "save_total_limit": ("0", "a whole number of at least 1"),
    "logging_strategy": ("step", "Did you mean 'steps'"),
    "logging_steps": ("-0.5", "a whole number of at least 1, or a number above 0"),
    "report_to": ("wandbb", "Did you mean 'wandb'"),
    "run_name": ("a\0b", "a NUL character"),
    "push_to_hub": ("perhaps", "true or false"),
    "hub_model_id": ("a/b/c", "a repository is ORG/NAME or NAME"),
    "hub_private_repo": ("perhaps", "true or false"),
    "parallel": ("query=0", "a mesh is query=Q,data=D"),
    "shard": ("fsdp2", "Did you mean 'fsdp'"),
    "check_ranks": ("-1", "at least 0"),
    "timeout": ("0", "above 0"),
    "resume": ("perhaps", "true or false"),
    "resume_from_checkpoint": ("no/checkpoint-3", "is no folder checkpoint-N of a run"),
}
# Of other groups of options.
ELSEWHERE = {
    *DataOptions.model_fields,
    *StepOptions.model_fields,
    *("reuse_activations", "reuse_memory", "reuse_file", "reuse_folder"),
}


def test_no_option_is_left_out():
    own = (ScheduleOptions.model_fields.keys() - MethodOptions.model_fields.keys()) | {
        "learning_rate",
        "mu",
        "only_layer",
    }
    own |= {"lr_scheduler_type", *SelectionOptions.model_fields, *OutputOptions.model_fields}
    assert own | (TrainConfig.model_fields.keys() - ELSEWHERE) == BAD.keys()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_named_with_what_is_allowed(zotune, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    value, answer = BAD[name]
    said = zotune("train", "--task", "sst2", "--model", "random:opt-tiny", f"--{name.replace('_', '-')}", value)
    assert (said.code, said.out) == (2, "")
    assert re.match(rf"zotune: (command line: )?{name}\b", said.err)
    assert value.replace("\0", "\\x00") in said.err
    assert answer in said.err
    assert not re.search("Input should|pydantic|Traceback", said.err)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", sorted(TrainConfig.model_fields))
def test_an_option_without_its_value_says_what_it_takes(zotune, name):
    said = zotune("train", "--task", "sst2", f"--{name.replace('_', '-')}", "--mu", "0")
    assert (said.code, said.out) == (2, "")
    is_switch = TrainConfig.model_fields[name].annotation is bool
    assert ("mu is '0'" in said.err) == is_switch
    assert is_switch or re.match(rf"zotune: --{name.replace('_', '-')} (needs a value|takes pairs)", said.err)
