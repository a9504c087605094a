"""The command line keeps its flags: those that a user's scripts may hold, with their defaults and choices.

`flags.json` holds them as they were before the options were grouped in `--help`. New flags and choices may be added.
"""

import argparse
import json
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from zotune.cli.arguments import read_arguments
from zotune.cli.bench import _parser as bench_parser
from zotune.cli.ledger import _parser as ledger_parser
from zotune.llm.config.run import EvalConfig, TrainConfig
from zotune.plan.options import PlanConfig

FROZEN = json.loads((Path(__file__).parent / "flags.json").read_text(encoding="utf-8"))
SCHEMAS = {"train": TrainConfig, "eval": EvalConfig, "plan": PlanConfig}
PAIRS = ("--columns", "--verbalizer")
PARSERS = {"bench": bench_parser, "ledger": ledger_parser}


def choices_of(annotation):
    """The values of a Literal, also within a union with None."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in choices_of(part)]


def plain(value):
    """As JSON holds it."""
    return json.loads(json.dumps(value, default=str))


@pytest.mark.parametrize("verb", SCHEMAS)
def test_no_option_of_a_schema_is_lost_or_has_another_default(verb):
    schema = SCHEMAS[verb]
    flags = {}
    for name, info in schema.model_fields.items():
        flag = "--" + name.replace("_", "-")
        depends_on_others = info.default_factory_takes_validated_data
        default = None if depends_on_others else info.get_default(call_default_factory=True)
        spellings = [flag, f"--no-{flag[2:]}"] if info.annotation is bool else [flag]
        flags[flag] = {"spellings": spellings, "default": plain(default), "choices": choices_of(info.annotation)}
    for flag, frozen in FROZEN[verb].items():
        for spelling in frozen["spellings"]:
            switch = flags[flag]["spellings"] != [flag]
            given = [spelling] if switch else [spelling, "a", "b"] if flag in PAIRS else [spelling, "a"]
            read = read_arguments(schema, given, f"zotune {verb}")
            assert [*read] == [flag[2:].replace("-", "_")]
            assert not switch or [*read.values()] == [spelling == flag]
        known = [choice for choice in flags[flag]["choices"] if choice in frozen["choices"]]
        assert {**flags[flag], "choices": known} == frozen


@pytest.mark.parametrize("verb", PARSERS)
def test_no_argument_of_a_command_is_lost_or_has_another_default(verb):
    commands = PARSERS[verb]().commands
    for name, frozen in FROZEN[verb].items():
        actions = {a.option_strings[0] if a.option_strings else a.dest: a for a in commands[name]._actions}
        for argument, expected in frozen.items():
            action = actions[argument]
            found = {
                "spellings": list(action.option_strings),
                "default": plain(action.default),
                "choices": list(action.choices or []),
                "nargs": action.nargs,
                "required": action.required,
            }
            assert {key: found[key] for key in expected} == expected, (name, argument)


def test_arguments_of_commands_are_in_the_order_that_scripts_use():
    merge = ledger_parser().commands["merge"].parse_args(["a", "b", "c", "--output-dir", "d"])
    assert isinstance(merge, argparse.Namespace)
    assert ([str(merge.path)], [str(path) for path in merge.others]) == (["a"], ["b", "c"])
