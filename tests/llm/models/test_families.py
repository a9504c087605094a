"""Every family is tuned by every scheme, and plain transformers and peft compute the loss that the run reports.

The table of docs/reference/families.md is made by the same functions.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import transformers

from model_families import CAUSAL, COMPOSITE, MASKED
from zotune.errors import UsageError
from zotune.llm.checkpoints.model_kind import kind_of

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "families.py"
KINDS = {"causal": CAUSAL, "masked": MASKED, "text and images or sound": COMPOSITE}
CELLS = json.loads((SCRIPT.parent / "results" / "families.json").read_text(encoding="utf-8"))["cells"]
STORED = {(cell["kind"], cell["family"], cell["scheme"]): cell["outcome"] for cell in CELLS}
EVERY = sorted({(kind, family) for kind, family, _ in STORED})
# One of each sort: a projection of its own, Conv1D, experts, no attention, an encoder, a model of images.
SAMPLE = {
    "gpt2": ("lora",),
    "qwen3_moe": ("prompt",),
    "mamba": ("full", "prefix"),
    "deberta_v2": ("lora",),
    "qwen2_5_vl": ("lora", "head"),
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("families_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", SAMPLE)
def test_what_is_saved_is_what_was_measured(family, script):
    kind = next(kind for kind, members in KINDS.items() if family in members)
    for cell in script.cells(kind, family, SAMPLE[family]):
        assert cell.outcome == STORED[kind, family, cell.scheme], cell


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "family"), EVERY)
def test_every_family_is_tuned_by_every_scheme_or_refused_with_a_reason(kind, family, script):
    for cell in script.cells(kind, family):
        assert cell.outcome == STORED[kind, family, cell.scheme], cell
        assert cell.outcome == "same" or cell.reason


def test_the_table_is_that_of_the_results_and_has_every_family(script):
    every = {(kind, name, scheme) for kind, members in KINDS.items() for name in members for scheme in script.SCHEMES}
    assert every <= STORED.keys()
    assert "different" not in STORED.values()
    assert script.table(script.stored()) in script.PAGE.read_text(encoding="utf-8")


def test_a_model_of_images_says_so_and_is_saved_with_its_processor(script, tmp_path, capsys):
    script.write_base(tmp_path / "base", "text and images or sound", "llava")
    (tmp_path / "base" / "preprocessor_config.json").write_text('{"size": 28}')
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in script.ROWS))
    result = script.tune(tmp_path / "base", tmp_path / "out", rows, "full", masked=False)
    assert "its text part is tuned, on text alone" in capsys.readouterr().err
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 28}'
    assert "AutoModelForImageTextToText" in (tmp_path / "out" / "README.md").read_text()
    module = result.model
    vision = {id(p) for p in module.model.vision_tower.parameters()}
    assert not [name for name, p in module.named_parameters() if p.requires_grad and id(p) in vision]


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ("T5Config", r"is an encoder-decoder \(t5\): one stack reads"),
        ("CLIPConfig", "is a model of type clip, of which transformers has no language model"),
        ("MllamaConfig", "layers in its text part that read images alone"),
    ],
)
def test_other_kinds_are_refused_with_what_they_are(config, match, tmp_path):
    settings = getattr(transformers, config)()
    with pytest.raises(UsageError, match=match) as refusal:
        kind_of(settings, "the model")
    assert "zo_sgd" in str(refusal.value)
