"""Every option has a group in `--help`, and the options that most people set come first."""

from __future__ import annotations

import pytest

from zotune.llm.config.run import EvalConfig, TrainConfig
from zotune.llm.config.schema import _OPTIONS, GROUPS, group_of, options_by_group


@pytest.mark.parametrize("schema", [TrainConfig, EvalConfig])
def test_every_option_has_one_group(schema):
    assert {group_of(schema, name) for name in schema.model_fields} <= set(GROUPS)
    listed = [name for names in options_by_group(schema).values() for name in names]
    assert sorted(listed) == sorted(schema.model_fields)


def test_the_table_names_only_options_that_exist_and_each_once():
    named = [name for names in _OPTIONS.values() for name in names]
    assert len(named) == len(set(named))
    assert set(named) == {*TrainConfig.model_fields, *EvalConfig.model_fields}
    assert tuple(_OPTIONS) == GROUPS


def test_each_group_begins_with_the_option_that_most_people_set():
    first = {group: names[0] for group, names in options_by_group(TrainConfig).items()}
    assert first == {
        "Model": "model",
        "Data": "task",
        "Tuning": "tuning",
        "Method": "method",
        "Run": "max_steps",
        "Evaluation": "eval_steps",
        "Output": "output_dir",
    }


@pytest.mark.parametrize("schema", [TrainConfig, EvalConfig])
def test_every_option_has_a_help_text_of_whole_sentences(schema):
    for name, field in schema.model_fields.items():
        text = field.description or ""
        assert text[:1].isupper() and text.endswith("."), name
