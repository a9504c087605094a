"""`zotune.llm` offers its public names as functions and classes, and loads no heavy library before their first use."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import zotune.llm


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, zotune.llm; print({'torch', 'transformers', 'pydantic'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_public_names_are_functions_and_classes():
    from zotune.llm import EvalConfig, LanguageModel, Result, TrainConfig, evaluate, load, train

    assert all(inspect.isclass(c) for c in (EvalConfig, LanguageModel, Result, TrainConfig))
    assert all(inspect.isfunction(f) for f in (evaluate, load, train))
    assert [f.__name__ for f in (evaluate, load, train)] == ["evaluate", "load", "train"]


def test_the_functions_stay_functions_when_all_modules_are_imported():
    import zotune.llm.models.load
    import zotune.llm.training.evaluation
    import zotune.llm.training.train

    assert callable(zotune.llm.train) and callable(zotune.llm.load) and callable(zotune.llm.evaluate)


def test_no_module_has_the_name_of_a_public_function():
    folder = Path(zotune.llm.__file__).parent
    assert not {p.stem for p in folder.iterdir()} & {*zotune.llm.__all__}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        zotune.llm.trian  # noqa: B018


def test_all_names_are_listed():
    assert dir(zotune.llm) == zotune.llm.__all__
