"""Help is read in a terminal: options in groups, each once, within its columns, defaults shown once."""

import json
import os
import re
import subprocess
import sys

import pytest

from zotune.cli.after_training.chat import _PAGE as CHAT_PAGE
from zotune.cli.after_training.export import _PAGE as EXPORT_PAGE
from zotune.cli.after_training.generate import _PAGE as GENERATE_PAGE
from zotune.cli.after_training.merge import _PAGE as MERGE_PAGE
from zotune.cli.after_training.push import _PAGE as PUSH_PAGE
from zotune.cli.bench import _parser as bench_parser
from zotune.cli.eval import _PAGE as EVAL_PAGE
from zotune.cli.help import help_text
from zotune.cli.ledger import _parser as ledger_parser
from zotune.cli.options import complete
from zotune.cli.plan import _PAGE as PLAN_PAGE
from zotune.cli.train import _PAGE as TRAIN_PAGE
from zotune.llm.config.folders import ExportConfig, MergeConfig, PushConfig
from zotune.llm.config.generate import ChatConfig, GenerateConfig
from zotune.llm.config.run import EvalConfig, TrainConfig
from zotune.llm.config.schema import GROUPS, group_of
from zotune.plan.options import PlanConfig

PAGES = {
    "train": (TRAIN_PAGE, TrainConfig),
    "eval": (EVAL_PAGE, EvalConfig),
    "plan": (PLAN_PAGE, PlanConfig),
    "generate": (GENERATE_PAGE, GenerateConfig),
    "chat": (CHAT_PAGE, ChatConfig),
    "merge": (MERGE_PAGE, MergeConfig),
    "export": (EXPORT_PAGE, ExportConfig),
    "push": (PUSH_PAGE, PushConfig),
}


def options(text):
    """Each flag's group, in the order of the help."""
    groups, heading = {}, ""
    for line in text.splitlines():
        if match := re.fullmatch(r"(\w+):", line):
            heading = match[1]
        elif match := re.match(r"  (--[\w-]+)", line):
            assert match[1] not in groups, f"{match[1]} is there twice"
            groups[match[1]] = heading
    return groups


@pytest.fixture(params=PAGES)
def page(request):
    return PAGES[request.param]


def test_every_option_is_in_its_group_once(page):
    parts, schema = page
    groups = options(help_text(parts, schema, complete(schema, {}, ""), width=80))
    for name in schema.model_fields:
        expected = parts.groups.get(name) or group_of(schema, name)
        assert groups.pop("--" + name.replace("_", "-")) == expected
    assert groups == {flag: group for group, flag, _ in [*parts.flags, ("Output", "--json", "")]}
    assert set(groups.values()) <= set(GROUPS)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_fit_the_terminal(page, width):
    parts, schema = page
    lines = help_text(parts, schema, complete(schema, {}, ""), width=width).splitlines()
    # A few flags with their placeholder are longer than a narrow terminal is wide, and stand on their own line.
    assert [line for line in lines if len(line) > max(width, 80)] == []
    assert max(map(len, lines)) > width - 15


def test_defaults_are_shown_once_and_are_those_of_the_recipe():
    values = complete(TrainConfig, {"task": "sst2", "mu": 0.02, "resume": False, "eval_steps": 7}, "recipe")
    text = " ".join(help_text(TRAIN_PAGE, TrainConfig, values, width=120).split())
    entries = re.split(r" (?=--[\w-]+ )", text)
    shown = {entry.split()[0]: re.findall(r"\(default: (.*?)\)", entry) for entry in entries}
    assert shown["--mu"] == ["0.02"]
    assert shown["--eval-steps"] == ["7"]
    assert shown["--max-steps"] == ["1000"]
    assert shown["--resume"] == shown["--rank"] == shown["--columns"] == []
    assert all(len(defaults) <= 1 for defaults in shown.values())
    assert "None" not in text


def test_options_that_people_set_first_are_at_the_top_of_their_groups():
    flags = list(options(help_text(TRAIN_PAGE, TrainConfig, complete(TrainConfig, {}, ""), width=80)))
    before = [("--model", "--dtype"), ("--task", "--data-source"), ("--learning-rate", "--momentum")]
    assert all(flags.index(first) < flags.index(then) for first, then in before)
    assert flags[0] == "--model"


@pytest.mark.parametrize("verb", ["models", "tasks", "methods", "env"])
def test_listings_have_help(zotune, verb):
    said = zotune(verb, "--help")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(f"usage: zotune {verb} [--json]\n")


@pytest.mark.parametrize("parser", [bench_parser, ledger_parser])
def test_commands_and_examples_are_in_the_help_of_their_verb(parser):
    text = parser().format_help()
    for name, command in parser().commands.items():
        assert f"\n  {name} " in text
        assert f"  {parser().prog} {name}" in text
        assert command.description.endswith(".")
    assert max(map(len, text.splitlines())) <= 80
    # The examples parse.
    for example in parser()._examples:
        parser().parse_args(example.replace("'", "").split()[2:])


def test_the_overview_names_every_verb_within_eighty_columns(zotune):
    from zotune.cli.main import _VERBS

    overview = zotune().out
    assert overview == zotune("--help").out
    assert all(f"\n  {verb} " in overview for verb in _VERBS)
    assert max(map(len, overview.splitlines())) <= 80


def test_a_reader_that_leaves_early_gets_no_message(start):
    process = subprocess.Popen(
        [sys.executable, "-m", "zotune", "models"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    process.stdout.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (141, b"")
    process.stderr.close()


def test_an_interrupt_is_one_line(zotune, monkeypatch):
    import zotune.cli.listings as listings

    def interrupt(args, as_json):
        raise KeyboardInterrupt

    monkeypatch.setattr(listings, "models", interrupt)
    said = zotune("models")
    assert (said.code, said.out, said.err) == (130, "", "zotune: interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], r"nothing to train on: .*\n  zotune train "),
        (["eval"], r"nothing to evaluate on: .*\n  zotune eval "),
        (["bench"], r"a command is missing: list, run, status, verify, report"),
        (["bench", "rnu"], r"no command 'zotune bench rnu'\. Did you mean 'run'\?"),
        (["bench", "run", "--dryrun"], r"`zotune bench run` has no option '--dryrun'\. Did you mean '--dry-run'\?"),
        (["ledger"], r"a command is missing: show, "),
        (["ledger", "shwo", "x"], r"no command 'zotune ledger shwo'\. Did you mean 'show'\?"),
        (["ledger", "show", "a", "b"], r"takes no argument 'b' here"),
        (["ledger", "show", "no/such/run"], r"no/such/run"),
    ],
)
def test_missing_and_misspelt_commands_are_explained(zotune, arguments, message):
    said = zotune(*arguments)
    assert (said.code, said.out) == (2, "")
    assert re.search(message, said.err)
    assert "Traceback" not in said.err


def test_listings_print_one_json_object(zotune):
    assert "smollm2-135m" in json.loads(zotune("models", "--json").out)
