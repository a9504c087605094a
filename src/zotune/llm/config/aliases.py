"""Names of options in other tools: accepted where they mean the same, else answered with ours.

The table is `aliases.toml`; recipes, the command line, Python and the page "Coming from …" read it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from zotune.errors import UsageError
from zotune.messages import say

TABLE = Path(__file__).with_name("aliases.toml")
_OFF = frozenset({"", "false", "none", "no", "off", "null", "disabled", "0", "0.0", "[]", "{}", "()"})
_FILES = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".tsv", ".txt", ".md")


@dataclass(frozen=True)
class AliasTable:
    """The names of other tools, by what zotune makes of them.

    Attributes:
        same: name → our name of the same option.
        instead: our name → the name that takes its place where a command has no such option.
        values: name → value as text → our options, or an answer; "*" stands for other values.
        values_of_ours: the same for values of our own names.
        converted: name → name of a function of the value.
        ignored: names that cannot change a result.
        answers: name → what to do instead.
        tools: tool → its names, in the order of the page.
    """

    same: Mapping[str, str]
    instead: Mapping[str, str]
    values: Mapping[str, Mapping[str, Mapping[str, Any] | str]]
    values_of_ours: Mapping[str, Mapping[str, Mapping[str, Any]]]
    converted: Mapping[str, str]
    ignored: frozenset[str]
    answers: Mapping[str, str]
    tools: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        """All names of the table that are not our own."""
        return frozenset({*self.same, *self.values, *self.converted, *self.ignored, *self.answers})


@cache
def alias_table() -> AliasTable:
    """Return the table of `aliases.toml`."""
    data = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return AliasTable(
        same=data["same"],
        instead=data["instead"],
        values=data["values"],
        values_of_ours=data["values_of_ours"],
        converted=data["converted"],
        ignored=frozenset(data["ignored"]["names"]),
        answers={name: row["text"] for row in data["answers"] for name in row["names"]},
        tools={row["name"]: tuple(row["names"]) for row in data["tools"]},
    )


class Meaning(NamedTuple):
    """What one key and its value mean here: options of ours, or an answer in place of them."""

    options: Mapping[str, Any]
    answer: str = ""
    is_ignored: bool = False


def meaning_of(name: str, value: Any, known: Collection[str]) -> Meaning:
    """Return what a name with `_` for `-` and its value mean; a name that nobody has stays as it is.

    >>> meaning_of("bf16", True, ()).options, meaning_of("lr", 1e-3, ("learning_rate",)).options
    ({'dtype': 'bfloat16'}, {'learning_rate': 0.001})
    >>> meaning_of("config", "my.yaml", ()).answer
    'the recipe is the first argument: zotune train RECIPE.yaml --OPTION VALUE'
    """
    table, text = alias_table(), _as_text(value)
    if name in known:
        return Meaning(table.values_of_ours.get(name, {}).get(text, {name: value}))
    if name in table.same:
        ours = table.same[name]
        instead = table.instead.get(ours, ours)
        return meaning_of(instead if instead in known and ours not in known else ours, value, known)
    if name in table.converted and value not in (None, ""):
        return CONVERTERS[table.converted[name]](value)
    return _without_counterpart(table, name, text) if name in table.names else Meaning({name: value})


def _without_counterpart(table: AliasTable, name: str, text: str) -> Meaning:
    """Return the meaning of a name that has none of its own here: some of its values may mean the same."""
    by_value = table.values.get(name, {})
    others = by_value.get("*", f"{text!r} means nothing here; give one of: {', '.join(by_value)}")
    if name in table.ignored or text in by_value or text in _OFF:
        chosen = by_value.get(text, {})
    else:
        chosen = table.answers.get(name, others)
    return Meaning({}, chosen) if isinstance(chosen, str) else Meaning(chosen, is_ignored=name in table.ignored)


def resolve_aliases(values: Mapping[str, Any], known: Collection[str], source: str = "") -> dict[str, Any]:
    """Return options under our own names.

    Args:
        values: options by name, of zotune or of another tool, with `_` or `-`.
        known: our names, which keep their values.
        source: where the values are from, for messages.

    Raises:
        UsageError: an option has no counterpart here, or two names give one option different values; the message has a
            line for each key.

    >>> resolve_aliases({"lr": 1e-3, "lora-rank": 4, "max_steps": 10}, ("learning_rate", "lora_r", "max_steps"))
    {'learning_rate': 0.001, 'lora_r': 4, 'max_steps': 10}
    """
    prefix = f"{source}: " if source else ""
    found: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    wrong, ignored = [], []
    for key, value in values.items():
        name = key.replace("-", "_") if isinstance(key, str) else key
        options, answer, is_ignored = meaning_of(name, value, known)
        if answer:
            wrong.append(f"{prefix}{key}: {answer}.")
        ignored += [str(key)] * is_ignored
        for option, meant in options.items():
            if option in found and found[option] != meant:
                wrong.append(f"{prefix}{given_as[option]} and {key} both set {option}; keep one of them.")
            found[option] = meant
            given_as.setdefault(option, str(key))
    if wrong:
        raise UsageError("\n".join(wrong))
    if ignored:
        say(f"{prefix}left out, because zotune needs no such setting: {', '.join(ignored)}")
    return found


def is_alias(name: str, value: Any, known: Collection[str]) -> bool:
    """Return whether the table gives a name and its value another meaning than our options' own."""
    if name in known:
        return _as_text(value) in alias_table().values_of_ours.get(name, {})
    return name in alias_table().names


def _as_text(value: Any) -> str:
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return "none" if value is None else str(value).strip().lower()


# Values that need more than a table -------------------------------------------------------------------------


def _data(option: str, value: Any) -> Meaning:
    """A file, a data set of the Hub, or for training rows several of them, also as LLaMA-Factory's `a,b`."""
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return Meaning({}, f"give a file: {option}: my.jsonl, or a data set of the Hub: {option}: hub:ORG/NAME")
    found = [_source(option, name) for name in names]
    wrong = next((answer for _, answer in found if answer), "")
    sources = [source for source, _ in found]
    if len(sources) > 1 and option != "train_file":
        return Meaning({}, f"give one file of evaluation rows: {option}: my.jsonl")
    return Meaning({}, wrong) if wrong else Meaning({option: sources[0] if len(sources) == 1 else sources})


def _source(option: str, name: str) -> tuple[str, str]:
    """Return a file or data set as our options name it, or an answer."""
    # A folder is one of save_to_disk, or refused when it is read.
    if name.startswith("hub:") or name.lower().endswith(_FILES) or Path(name).is_dir():
        return name, ""
    if name.count("/") == 1 and not Path(name).exists():
        return f"hub:{name}", ""
    return "", f"{name!r} is no file of rows; give its path, as {option}: data/NAME.jsonl, or hub:ORG/NAME"


def _data_sets(option: str, value: Any) -> Meaning:
    """An Axolotl list of data sets, each with a path."""
    entries = value if isinstance(value, list | tuple) else [value]
    if not entries or not all(isinstance(entry, dict) and "path" in entry for entry in entries):
        return Meaning({}, f"give the paths of the rows: {option}: my.jsonl or hub:ORG/NAME, or a list of them")
    found = [_data_set(option, entry) for entry in entries]
    wrong = next((one.answer for one in found if one.answer), "")
    formats = {one.options.get("data_format") for one in found}
    if not wrong and len(formats) > 1:
        wrong = (
            "all files of a run have rows of one format; make them rows of a prompt and a completion, or of messages"
        )
    if wrong:
        return Meaning({}, wrong)
    data = _data(option, [one.options[option] for one in found])
    return data if data.answer or None in formats else Meaning({**data.options, "data_format": formats.pop()})


def _data_set(option: str, given: Mapping[str, Any]) -> Meaning:
    entry = {key: part for key, part in given.items() if key not in ("ds_type", "split") or part is None}
    kind = entry.pop("type", None)
    # A completion of Axolotl's has no prompt: it is plain text.
    data_format = {"chat_template": "chat", "completion": "text", "None": None}.get(str(kind), kind)
    if data_format not in (None, "chat", "sharegpt", "alpaca", "text"):
        return Meaning(
            {},
            f"type: {kind} is a prompt of Axolotl's; write it out beside {option}, as data_format: completion, "
            "template: '{instruction} …', columns: {completion: output}",
        )
    more = [key for key in entry if key != "path"]
    if more or given.get("split") not in (None, "train"):
        return Meaning({}, f"give the data as {option}: FILE or hub:ORG/NAME:SPLIT, and its columns as columns")
    data = _data(option, entry["path"])
    return data if data.answer or data_format is None else Meaning({**data.options, "data_format": data_format})


def _rows_held_out(value: Any) -> Meaning:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if number >= 0 and number.is_integer():
        return Meaning({"num_dev": int(number)})
    return Meaning({}, "give the number of rows to hold out of training: num_dev: 100 (default: a fifth)")


def _target_modules(value: Any) -> Meaning:
    names = value.replace(",", " ").split() if isinstance(value, str) else value
    return Meaning({"lora_target_modules": ["all-linear"] if names in (["all"], ["all-linear"]) else names})


CONVERTERS: dict[str, Callable[[Any], Meaning]] = {
    "train_data": lambda value: _data("train_file", value),
    "eval_data": lambda value: _data("eval_file", value),
    "one_dataset": lambda value: _data_sets("train_file", value),
    "one_test_dataset": lambda value: _data_sets("eval_file", value),
    "rows_held_out": _rows_held_out,
    "target_modules": _target_modules,
    "task": lambda value: Meaning({"task": str(value).lower()}),
}
