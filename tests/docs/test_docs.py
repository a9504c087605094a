"""The docs site speaks of the code that is there: names, files, options. `make docs` builds it and checks its links."""

import re
import shlex
import sys
from pathlib import Path

import pytest

import zotune as zo
import zotune.llm
from zotune.cli.bench import _parser as bench_parser
from zotune.cli.ledger import _parser as ledger_parser
from zotune.cli.plan import PlanConfig
from zotune.llm.config.aliases import alias_table
from zotune.llm.config.folders import ExportConfig, MergeConfig, PushConfig
from zotune.llm.config.generate import ChatConfig, GenerateConfig
from zotune.llm.config.run import EvalConfig, TrainConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_ext"))
import tables  # noqa: E402
from alias_text import meaning_text  # noqa: E402

PAGES = sorted(DOCS.rglob("*.md"))
SCHEMAS = {
    **{"train": TrainConfig, "tune": TrainConfig, "eval": EvalConfig, "plan": PlanConfig},
    **{
        "generate": GenerateConfig,
        "chat": ChatConfig,
        "merge": MergeConfig,
        "export": ExportConfig,
        "push": PushConfig,
    },
}
PARSERS = {"ledger": ledger_parser, "bench": bench_parser}


def text_of(path):
    return path.read_text(encoding="utf-8")


def name_of(page):
    return str(page.relative_to(DOCS))


def commands():
    """Each `zotune …` line of the shell blocks, with its page."""
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", text_of(page), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.split(" #")[0])
                if words[:1] == ["zotune"] and words[1] in (*SCHEMAS, *PARSERS):
                    yield pytest.param(words[1], words[2:], id=f"{name_of(page)}: {' '.join(words[:4])}")


def test_every_public_name_has_an_entry_in_the_api_reference():
    written = "".join(map(text_of, (DOCS / "reference" / "api").glob("*.md")))
    named = set(re.findall(r"^\.\. \w[\w:]*:: zotune\.(\w+)(?!\.)\b", written, re.M))
    assert set(zo.__all__) - {"__version__"} <= named
    named = set(re.findall(r"^\.\. \w[\w:]*:: zotune\.llm\.(\w+)(?!\.)\b", written, re.M))
    assert set(zotune.llm.__all__) <= named


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_files_that_a_page_names_exist(page):
    named = re.findall(r"`((?:[\w-]+/)+[\w.-]+\.(?:py|c|toml|yaml|json|md))`", text_of(page))
    roots = (ROOT, ROOT / "src", ROOT / "src" / "zotune", ROOT / "src" / "zotune" / "estimate")
    named = [name for name in named if not re.search(r"\b[A-Z]{2,}\b|^runs/", name)]  # NAME stands for a name
    assert [name for name in named if not any((root / name).exists() for root in roots)] == []


@pytest.mark.parametrize(("verb", "arguments"), list(commands()))
def test_the_commands_of_the_pages_have_options_that_exist(verb, arguments):
    if verb in PARSERS:
        PARSERS[verb]().parse_args([a for a in arguments if a != "--json"])
        return
    known = {*SCHEMAS[verb].model_fields, "dry_run", "json", "num_trials", *alias_table().names}
    given = [a.split("=")[0].removeprefix("--").replace("-", "_") for a in arguments if a.startswith("--")]
    assert [name for name in given if name.removeprefix("no_") not in known] == []


@pytest.mark.parametrize("tool", alias_table().tools)
def test_each_option_in_the_table_of_another_tool_is_accepted_or_answered(tool):
    assert f"<!-- table: aliases {tool} -->\n" in text_of(DOCS / "coming-from.md")
    names = alias_table().tools[tool]
    assert len(names) == len(set(names)) > 30
    assert [name for name in names if name not in TrainConfig.model_fields and name not in alias_table().names] == []


def test_the_tables_of_other_tools_name_options_that_exist():
    rows = {name: meaning_text(name) for names in alias_table().tools.values() for name in names}
    options = {option for cell in rows.values() for option in re.findall(r"`(\w+)(?:: [^`]*)`", cell)}
    assert options - TrainConfig.model_fields.keys() == set()
    assert rows["lr"] == "`learning_rate`" and rows["learning_rate"] == "the same"
    assert rows["base_model"] == rows["model_name_or_path"] == "`model`"


def test_the_tables_of_the_pages_are_those_of_the_program():
    """`python docs/_ext/tables.py` writes them anew."""
    with_tables = [page for page in PAGES if "<!-- table: " in text_of(page)]
    assert len(with_tables) > 3
    assert [name_of(page) for page in with_tables if tables.with_tables(text_of(page)) != text_of(page)] == []
    # Read as a file, no page has a placeholder of the site where a table should be.
    assert [name_of(page) for page in PAGES if re.search(r"\{zotune-(list|aliases)\}", text_of(page))] == []
    short = "a\n<!-- table: list methods -->\nold\n<!-- end of table -->\nb"
    assert "| `zo_sgd` |" in tables.with_tables(short) and "old" not in tables.with_tables(short)


def test_no_folder_of_pages_is_longer_than_a_screen():
    folders = {page.parent for page in PAGES}
    assert {folder.name: n for folder in folders if (n := len(list(folder.glob("*.md")))) > 15} == {}
