"""`zotune schema`: the JSON Schema of recipes, by which editors complete and check the keys of a YAML file."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from zotune.cli.output import print_json, print_text
from zotune.errors import UsageError, did_you_mean
from zotune.llm.config.run import EvalConfig, TrainConfig
from zotune.plan.options import PlanConfig

_SCHEMAS: dict[str, type[BaseModel]] = {"train": TrainConfig, "eval": EvalConfig, "plan": PlanConfig}
_HELP = """usage: zotune schema [train|eval|plan]

Print the JSON Schema of the options of a command, by default of recipes of
`zotune train`. Editors complete and check YAML files by it:

Examples:
  zotune schema > zotune.schema.json

The first line of a recipe names the file:
  # yaml-language-server: $schema=zotune.schema.json"""


def run(args: list[str], as_json: bool) -> int:
    """Print the schema and return the exit code."""
    if args and args[0] in ("-h", "--help"):
        print_text(_HELP)
        return 0
    verb = args[0] if args else "train"
    if len(args) > 1 or verb not in _SCHEMAS:
        wrong = args[1] if verb in _SCHEMAS else verb
        raise UsageError(f"zotune schema takes the name of one command, got {wrong!r}.{did_you_mean(wrong, _SCHEMAS)}")
    print_json(json_schema(verb))
    return 0


def json_schema(verb: str) -> dict[str, Any]:
    """Return the JSON Schema of a command's options.

    >>> json_schema("train")["properties"]["max_steps"]["minimum"]
    1
    """
    schema = _SCHEMAS[verb].model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": f"zotune {verb}"}
