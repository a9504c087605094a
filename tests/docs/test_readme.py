"""README and docs tell the truth: their examples and commands run, their tables come from files."""

import importlib.util
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

import zotune as zo
from zotune.methods.paper import METHODS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def relative(path):
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


HUB_NAME = '"HuggingFaceTB/SmolLM2-135M-Instruct"'
MODELS = ["random:llama-tiny", pytest.param("smollm2-135m", marks=pytest.mark.slow)]


@pytest.mark.parametrize("model", MODELS)
def test_the_python_example_of_the_readme_runs_and_is_short(model, tmp_path):
    """With a tiny model, and with the built-in one, in place of the one on the Hub, which is the built-in one."""
    from zotune.llm.config.step import ModelOptions
    from zotune.llm.models.builtin import fetch
    from zotune.llm.models.load import load

    (example,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    names = {}
    assert HUB_NAME in example
    if model == "smollm2-135m":
        folder = fetch(model)
    else:
        folder, lm = tmp_path, load(ModelOptions(model=model, device="cpu"))
        lm.module.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
    exec(compile(example.replace(HUB_NAME, repr(str(folder))), "README.md", "exec"), names)
    assert 0 < names["loss"] < 10
    assert names["optimizer"].num_steps == 5


@pytest.mark.parametrize("model", MODELS)
def test_the_commands_of_the_readme_run(zotune, monkeypatch, tmp_path, model):
    (install, commands) = blocks(ROOT / "README.md", "sh")
    assert install.startswith("pip install 'zotune[llm]'")
    monkeypatch.chdir(ROOT)
    train, evaluate = (shlex.split(line)[1:] for line in commands.splitlines())
    assert "runs/mine" in train
    assert "runs/mine" in evaluate
    out = str(tmp_path / "mine")
    train, evaluate = ([out if word == "runs/mine" else word for word in words] for words in (train, evaluate))
    assert zotune(*train, "--max-steps", "2", "--model", model).code == 0
    assert "accuracy" in zotune(*evaluate).out


def test_the_readme_fits_one_page():
    assert len((ROOT / "README.md").read_bytes()) <= 8192


# A plan of a 13 B model passes through 40 layers.
SLOW = ("docs/benchmark/plan.md",)
RUN = [
    pytest.param(page, marks=pytest.mark.slow if relative(page) in SLOW else (), id=relative(page))
    for page in PAGES[1:]
]


@pytest.mark.parametrize("page", RUN)
def test_the_examples_of_a_page_run_in_order(page, capsys, monkeypatch, tmp_path):
    # Examples read files of this checkout, and some write a folder beside them.
    for entry in ROOT.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, example in enumerate(blocks(page, "python")):
        exec(compile(example, f"{page.name}, example {number + 1}", "exec"), names)


def test_each_method_has_a_section_and_a_row_and_nothing_else_has():
    page = (ROOT / "docs" / "reference" / "methods.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^## `(\w+)`", page, re.M))
    assert documented == set(zo.METHODS)
    assert set(method_table()) == set(METHODS)


def method_table():
    """The README's methods of the paper: forward passes a step (a function of q) and bytes of state a tuned number."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d?)q(?: dual)?(?: \+ (\d))? \| (\d+) \|$", readme, re.M)
    return {name: (int(each or 1), int(more or 0), int(size)) for name, each, more, size in rows}


@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_costs_what_the_readme_says(name, q):
    each, more, size = method_table()[name]
    model = torch.nn.Linear(3, 5).bfloat16()
    x = torch.ones(2, 3).bfloat16()
    optimizer = zo.METHODS[name](model, lr=1e-3, num_queries=q)
    # The first step may take a few passes more to see that all is well.
    optimizer.step(lambda: model(x).float().square().mean())
    before = optimizer.num_forwards
    optimizer.step(lambda: model(x).float().square().mean())
    assert optimizer.num_forwards - before == each * q + more
    kept = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert sum(v.nbytes for v in kept) == size * (3 * 5 + 5)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / unquote(target)).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("quickstart", "README.md"),
        ("step_in_short", "README.md"),
        ("step", "docs/benchmark/speed.md"),
        ("goals", "docs/benchmark/speed.md"),
        ("other_goals", "docs/benchmark/speed.md"),
        ("peers", "docs/benchmark/speed.md"),
        ("growth", "docs/benchmark/speed.md"),
        ("forward_gradient", "docs/benchmark/speed.md"),
        ("methods", "docs/reference/methods.md"),
        ("memory", "docs/benchmark/speed.md"),
        ("experiments", "docs/benchmark/running.md"),
        ("zero_shot", "docs/howto/evaluate.md"),
        ("reward", "docs/howto/rewards.md"),
    ],
)
def test_every_table_of_results_comes_from_a_file(name, page):
    assert benchmark("readme_tables").TABLES[name]() in (ROOT / page).read_text(encoding="utf-8")


def test_the_page_of_results_is_that_of_the_results():
    page = (ROOT / "docs" / "benchmark" / "results.md").read_text(encoding="utf-8")
    stale = re.search(r"\*\*(\d+) of \d+ results are stale", page)
    # Which results are stale depends on the installed libraries too, so the page says how many were when it was made.
    assert benchmark("results_page").results_page(int(stale[1]) if stale else 0) == page


def benchmark(name):
    """A module of the folder of benchmarks, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
