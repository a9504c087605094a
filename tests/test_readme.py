"""README and docs tell the truth: their examples run, their file tree is the repository's, their commands parse."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def test_the_library_example_of_the_readme_runs_and_is_short():
    (example,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    exec(compile(example, "README.md", "exec"), {})


def test_the_file_tree_of_the_readme_lists_every_module_and_nothing_else():
    tree = re.search(r"## Files\n\n```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert tree is not None
    named = {line.split()[0] for line in tree.group(1).splitlines() if line.strip()}
    modules = {
        str(p.relative_to(ROOT)) for p in (ROOT / "src").rglob("*.py") if p.name not in ("__init__.py", "__main__.py")
    }
    missing = modules - named
    assert not missing, f"the README's file tree lacks {sorted(missing)}"
    gone = {name for name in named if not (ROOT / name).exists()}
    assert not gone, f"the README's file tree lists {sorted(gone)}, which do not exist"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("name", ["quickstart", "step", "memory"])
def test_every_table_of_the_readme_comes_from_a_result(name):
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "readme_tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.TABLES[name]() in (ROOT / "README.md").read_text(encoding="utf-8")
