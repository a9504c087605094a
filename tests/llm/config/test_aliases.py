"""Names of other tools' options mean the same here, or are answered with ours; none is unknown, none is taken twice."""

from __future__ import annotations

import ast
import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from zotune.errors import UsageError
from zotune.llm.config.aliases import alias_table, meaning_of, resolve_aliases
from zotune.llm.config.run import EvalConfig, TrainConfig
from zotune.llm.config.schema import validate

OURS = TrainConfig.model_fields

# The fields of TRL 1.x beside those of transformers: SFTConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig.
TRL = """
model_init_kwargs chat_template_path dataset_text_field dataset_kwargs dataset_num_proc eos_token max_length
truncation_mode shuffle_dataset packing packing_strategy padding_free pad_to_multiple_of eval_packing
completion_only_loss assistant_only_loss loss_type activation_offloading pad_token model_name_or_path model_revision
dtype trust_remote_code attn_implementation use_peft lora_r lora_alpha lora_dropout lora_target_modules
lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora load_in_8bit load_in_4bit
bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage dataset_name dataset_config dataset_train_split
dataset_test_split dataset_streaming gradient_checkpointing_use_reentrant ignore_bias_buffers datasets streaming
test_split_size torch_dtype
""".split()  # noqa: SIM905

# Recipes as the tools' own examples write them, key by key, as YAML reads them.
LLAMA_FACTORY = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "trust_remote_code": True,
    **{"stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"},
    **{"dataset": "identity,alpaca_en_demo", "cutoff_len": 2048, "max_samples": 1000},
    **{"overwrite_cache": True, "preprocessing_num_workers": 16, "output_dir": "saves/llama3-8b/lora/sft"},
    **{"logging_steps": 10, "save_steps": 500, "plot_loss": True, "overwrite_output_dir": True},
    **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": 1.0e-4},
    **{"lr_scheduler_type": "cosine", "bf16": True, "ddp_timeout": 180000000},
}
AXOLOTL = {
    **{"base_model": "NousResearch/Llama-3.2-1B", "load_in_8bit": False, "load_in_4bit": True, "strict": False},
    "datasets": [{"path": "teknium/GPT4-LLM-Cleaned", "type": "chat_template"}],
    **{"dataset_prepared_path": None, "val_set_size": 100, "output_dir": "./outputs/qlora-out", "adapter": "qlora"},
    **{"lora_model_dir": None, "sequence_len": 2048, "sample_packing": False, "lora_r": 32, "lora_alpha": 16},
    **{"lora_dropout": 0, "lora_target_linear": True, "wandb_project": None, "gradient_accumulation_steps": 4},
    **{"micro_batch_size": 2, "lr_scheduler": "cosine", "learning_rate": 0.0002, "bf16": "auto", "tf32": False},
    **{"gradient_checkpointing": False, "flash_attention": False, "weight_decay": 0.0, "deepspeed": None, "fsdp": None},
}


def training_arguments():
    """The fields of transformers' TrainingArguments, read from its source, for an import takes seconds."""
    folder = Path(importlib.util.find_spec("transformers").submodule_search_locations[0])
    tree = ast.parse((folder / "training_args.py").read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    return [node.target.id for node in found.body if isinstance(node, ast.AnnAssign)]


def is_settled(name):
    """Whether a name is ours or the table says something about it."""
    return name in OURS or name in alias_table().names


def test_every_training_argument_of_transformers_and_trl_is_accepted_or_answered():
    names = training_arguments() + TRL
    assert len(names) > 150
    assert [name for name in names if not is_settled(name)] == []


@pytest.mark.parametrize("recipe", [LLAMA_FACTORY, AXOLOTL], ids=["llama-factory", "axolotl"])
def test_every_key_of_another_tools_recipe_is_accepted_or_answered(recipe):
    assert [name for name in recipe if not is_settled(name)] == []


def test_the_table_is_about_each_name_once_and_leads_to_options_that_exist():
    table = alias_table()
    parts = (table.same, table.values, table.converted, table.ignored, table.answers)
    assert [name for name, n in Counter(name for part in parts for name in part).items() if n > 1] == []
    # A name of ours needs no row; a row would be dead.
    assert table.names & OURS.keys() == set()
    assert [name for name in table.same.values() if not is_settled(name)] == []
    rows = [*table.values.values(), *table.values_of_ours.values()]
    options = {o for row in rows for meaning in row.values() if not isinstance(meaning, str) for o in meaning}
    assert options - OURS.keys() == set()
    assert table.values_of_ours.keys() - OURS.keys() == set()


def test_every_value_of_the_table_is_one_that_the_option_takes():
    table = alias_table()
    for rows in (table.values, table.values_of_ours):
        for name, row in rows.items():
            for meaning in row.values():
                if not isinstance(meaning, str):
                    validate(TrainConfig, dict(meaning), name, partial=True)


def test_every_answer_is_one_line_that_names_what_to_do():
    table = alias_table()
    answers = [*table.answers.values()]
    answers += [m for row in table.values.values() for m in row.values() if isinstance(m, str)]
    assert [a for a in answers if "\n" in a or len(a) > 200 or a.endswith(".")] == []
    with pytest.raises(UsageError) as raised:
        resolve_aliases(dict.fromkeys(table.answers, "x"), OURS, "my.yaml")
    lines = str(raised.value).splitlines()
    assert len(lines) == len(table.answers)
    assert all(line.startswith(f"my.yaml: {name}: ") for line, name in zip(lines, table.answers, strict=True))


def test_another_tools_recipe_becomes_ours(capsys):
    recipe = {k: v for k, v in LLAMA_FACTORY.items() if k not in ("trust_remote_code", "dataset")}
    config = validate(TrainConfig, {**recipe, "dataset": "data/mine.jsonl"}, "llama.yaml")
    assert (config.model, config.tuning, config.lora_r, config.dtype) == (
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "lora",
        8,
        "bfloat16",
    )
    assert (config.max_length, config.num_train, config.named_files) == (2048, 1000, "data/mine.jsonl")
    assert config.lora_target_modules == ("all-linear",)
    assert "overwrite_cache, preprocessing_num_workers, plot_loss, ddp_timeout" in capsys.readouterr().err

    config = validate(TrainConfig, AXOLOTL, "axolotl.yml")
    assert (config.model, config.quantization, config.num_dev) == ("NousResearch/Llama-3.2-1B", "bnb-nf4", 100)
    assert (config.named_files, config.data_format) == ("hub:teknium/GPT4-LLM-Cleaned", "chat")
    assert (config.per_device_train_batch_size, config.lr_scheduler_type) == (2, "cosine")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"lr": 1e-3}, {"learning_rate": 1e-3}),
        ({"learning-rate": 1e-3}, {"learning_rate": 1e-3}),
        ({"zo_eps": "1e-2"}, {"mu": "1e-2"}),
        ({"torch_dtype": "fp16"}, {"dtype": "float16"}),
        ({"bf16": "True"}, {"dtype": "bfloat16"}),
        ({"bf16": False, "fp16": None, "hub_always_push": "false", "lora_dropout": 0.0}, {}),
        ({"bf16": True, "dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"max_steps": -1}, {}),
        ({"lora_target": "q_proj, v_proj"}, {"lora_target_modules": ["q_proj", "v_proj"]}),
        ({"dataset_name": "trl-lib/Capybara"}, {"train_file": "hub:trl-lib/Capybara"}),
        ({"dataset": "a.jsonl, b.csv"}, {"train_file": ["a.jsonl", "b.csv"]}),
        (
            {"datasets": [{"path": "a/b", "type": "completion"}, {"path": "c.txt", "type": "completion"}]},
            {"train_file": ["hub:a/b", "c.txt"], "data_format": "text"},
        ),
        ({"sample_packing": True, "dataset_text_field": "content"}, {"packing": True, "text_column": "content"}),
        (
            {"chat_template_path": "chat.jinja", "default_system_message": "Be brief."},
            {"chat_template": "chat.jinja", "system_prompt": "Be brief."},
        ),
        ({"chat_template": "tokenizer_default", "packing_strategy": "wrapped"}, {}),
        ({"excess_length_strategy": "raise"}, {"long_rows": "error"}),
        ({"dataset_streaming": True, "interleave_probs": [2, 1]}, {"streaming": True, "train_file_weights": [2, 1]}),
        ({"metric_for_best_model": "eval_loss"}, {"metric_for_best_model": "loss"}),
        ({"datasets": [{"path": "a/b", "type": "alpaca"}]}, {"train_file": "hub:a/b", "data_format": "alpaca"}),
        ({"datasets": [{"path": "a/b", "type": "sharegpt"}]}, {"train_file": "hub:a/b", "data_format": "sharegpt"}),
        ({"quantization_bit": 4}, {"quantization": "bnb-nf4"}),
        ({"task_name": "SST2", "trainer": "zo"}, {"task": "sst2", "method": "zo_sgd"}),
        ({"nonsense": 1}, {"nonsense": 1}),
    ],
)
def test_names_and_values_that_mean_the_same_are_accepted(given, expected):
    assert resolve_aliases(given, OURS) == expected


def test_a_folder_of_rows_is_one_for_the_names_of_others_too(tmp_path):
    assert resolve_aliases({"dataset_name": str(tmp_path)}, OURS) == {"train_file": str(tmp_path)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hub_strategy": "every_save"}, "hub_strategy: the model is uploaded once"),
        ({"model_code_revision": "v2"}, "that of its revision: model_revision"),
        ({"lr": 1e-3, "learning_rate": 1e-2}, "lr and learning_rate both set learning_rate; keep one"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 both set dtype"),
        ({"optim": "adamw_torch"}, "method: zo_sgd or zo_adam"),
        ({"bf16": "perhaps"}, "bf16: 'perhaps' means nothing here; give one of: true, auto"),
        ({"val_size": 0.1}, "give the number of rows"),
        ({"dataset": "identity,alpaca"}, "is no file of rows"),
        ({"datasets": [{"path": "a/b", "type": "gpteacher"}]}, "data_format: completion"),
        ({"datasets": [{"path": "a/b"}, {"path": "c/d", "type": "chat_template"}]}, "have rows of one format"),
        ({"test_datasets": [{"path": "a/b"}, {"path": "c/d"}]}, "give one file of evaluation rows"),
        ({"datasets": [3]}, "give the paths of the rows"),
        ({"dataset_name": 3}, "give a file"),
        ({"eval_packing": True}, "packing: true joins plain texts"),
    ],
)
def test_names_without_a_counterpart_are_answered(given, message):
    with pytest.raises(UsageError, match="(?s)" + message):
        resolve_aliases(given, OURS)


def test_an_option_that_another_command_has_is_named_by_its_name_here():
    with pytest.raises(UsageError, match="unknown key 'learning_rate'"):
        validate(EvalConfig, {"lr": 1e-3, "task": "sst2"}, "eval.yaml")


def test_a_meaning_is_found_through_several_names():
    assert meaning_of("epochs", 3, ("num_train_epochs",)).options == {"num_train_epochs": 3}
    # Without an option of that name a command refuses it by its name here.
    assert meaning_of("epochs", 3, ()).options == {"num_train_epochs": 3}
