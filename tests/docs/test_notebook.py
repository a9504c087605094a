"""The notebook runs from the first cell to the last as a user runs it, and the model learns in it."""

import json
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = json.loads((ROOT / "examples/notebook.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def main_module(monkeypatch):
    """The namespace of a notebook: functions that are defined in it are found in `__main__`."""
    import sys
    import types

    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    return vars(module)


def test_the_notebook_does_it_in_ten_cells_and_keeps_no_output():
    assert len(CODE) == 10
    assert all(cell["outputs"] == [] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")
    assert (NOTEBOOK["nbformat"], len({cell["id"] for cell in NOTEBOOK["cells"]})) == (4, len(NOTEBOOK["cells"]))


def test_the_notebook_runs_and_the_model_learns(main_module, tmp_path, monkeypatch, capsys):
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    for number, code in enumerate(CODE, start=1):
        for _ in range(2):  # each cell may be run again
            exec(compile(code, f"cell {number}", "exec"), main_module)
    # Only the folder that is asked for is written.
    assert [*here.iterdir()] == []
    assert main_module["folder"].is_relative_to(temporary)
    assert main_module["before"].accuracy < 0.6 < main_module["score"].accuracy
    assert main_module["score"].loss < main_module["before"].loss - 0.03
    assert "trainable params" in capsys.readouterr().out


def test_the_readme_tunes_a_loaded_model(main_module):
    """Its lines, on a tiny model and rows."""
    from zotune.llm import load

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"(?:^ {4}.*\n|^\n)+", text[text.index("    from zotune.llm import") :], re.M)[:1]
    model, tokenizer = load("random:llama-tiny", device="cpu")
    rows = [{"text": t, "label": label} for t, label in (("fine", "good"), ("dull", "bad"))] * 2
    main_module.update(model=model, tokenizer=tokenizer, rows=rows, eval_rows=rows)
    exec(textwrap.dedent(block).replace("max_steps=500", "max_steps=1"), main_module)
    assert main_module["result"].num_steps == 1
