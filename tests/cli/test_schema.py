"""Editors check recipes by `zotune schema`: it has every key, and takes and refuses what the reader does."""

import json

import pytest
import yaml

from zotune.cli.schema import json_schema
from zotune.llm.config.run import RECIPES, TrainConfig

TYPES = {
    **{"string": str, "boolean": bool, "object": dict, "array": list, "null": type(None)},
    **{"integer": int, "number": (int, float)},
}


def fits(value, schema):
    """Whether a value fits a schema, by the keywords that ours has (as the standard defines them)."""
    if "anyOf" in schema and not any(fits(value, part) for part in schema["anyOf"]):
        return False
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    limits = {
        "minimum": lambda limit: not is_number or value >= limit,
        "exclusiveMinimum": lambda limit: not is_number or value > limit,
        "maximum": lambda limit: not is_number or value <= limit,
        "exclusiveMaximum": lambda limit: not is_number or value < limit,
        "enum": lambda values: value in values,
        "const": lambda only: value == only,
        "type": lambda kind: isinstance(value, TYPES[kind]) and (is_number or kind not in ("integer", "number")),
        "items": lambda part: not isinstance(value, list) or all(fits(v, part) for v in value),
        "properties": lambda parts: all(fits(v, parts[k]) for k, v in value.items() if k in parts),
        "additionalProperties": lambda part: part is not False or value.keys() <= schema["properties"].keys(),
    }
    return all(check(schema[name]) for name, check in limits.items() if name in schema)


def test_every_option_is_in_the_schema_with_its_words(zotune):
    printed = json.loads(zotune("schema").out)
    assert printed == json.loads(zotune("schema", "train", "--json").out) == json_schema("train")
    assert printed["properties"].keys() == TrainConfig.model_fields.keys()
    for name, key in printed["properties"].items():
        assert key["description"] == TrainConfig.model_fields[name].description


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_fit_the_schema(path):
    # Editors read YAML 1.2, where 1e-2 is a number; PyYAML reads a text.
    recipe = {k: float(v) if k in ("learning_rate", "mu") else v for k, v in yaml.safe_load(path.read_text()).items()}
    assert fits(recipe, json_schema("train"))


@pytest.mark.parametrize(
    ("recipe", "is_right"),
    [
        ({"task": "sst2", "learning_rate": 1e-3}, True),
        ({"peft_config": {"r": 4}}, True),
        ({"lora_target_modules": ["q_proj"], "columns": {"prompt": "question"}}, True),
        ({"lerning_rate": 1e-3}, False),
        ({"max_steps": 0}, False),
        ({"method": "zo_sdg"}, False),
        ({"peft_config": 3}, False),
    ],
)
def test_the_schema_takes_what_the_reader_takes(recipe, is_right):
    assert fits(recipe, json_schema("train")) is is_right


@pytest.mark.parametrize(
    ("args", "named"), [(["tune"], "'tune'"), (["train", "eval"], "'eval'"), (["trian"], "'train'")]
)
def test_an_unknown_command_is_refused(zotune, args, named):
    said = zotune("schema", *args)
    assert (said.code, said.out) == (2, "")
    assert named in said.err


def test_schema_has_help(zotune):
    assert zotune("schema", "--help").out.startswith("usage: zotune schema [train|eval|plan]\n")
