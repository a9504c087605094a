"""A folder from somebody else runs no code: its Python, its kernels and what its files name are refused in words."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from zotune.errors import UsageError
from zotune.llm.checkpoints.adapter_config import check_adapter_config, check_pattern
from zotune.llm.checkpoints.adapter_folder import read_adapter_folder
from zotune.llm.checkpoints.no_code import check_metadata, read_config
from zotune.llm.config.run import EvalConfig, inherited_options, read_recipe
from zotune.llm.config.schema import check_file
from zotune.llm.config.step import ModelOptions
from zotune.llm.ledger.rebuild import config_of, find_ledger
from zotune.llm.models.load import load
from zotune.llm.training.train import train

SOURCE = Path(__file__).parents[3] / "src"


@pytest.fixture
def model(tiny, tmp_path):
    """A folder with a tiny model; `edit` changes a JSON file of it."""
    folder = tmp_path / "model"
    lm = tiny("llama")
    lm.module.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def edit(path, **values):
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


def plant(folder, *names):
    """Python files that leave a note when they run."""
    for name in names:
        (folder / f"{name}.py").write_text(
            f"open({str(folder / 'ran')!r}, 'a').write('{name}')\ndef run(b): return b\n"
        )


@pytest.fixture
def evil(model, rows_file, monkeypatch):
    """The folder of a model that somebody else made, with code in every place that libraries or zotune know."""
    plant(model, "modeling", "evil", "configuration")
    code = {
        "AutoConfig": "configuration.C",
        "AutoModelForCausalLM": "modeling.M",
        "AutoTokenizer": ["modeling.T", None],
    }
    edit(model / "config.json", auto_map=code)
    edit(model / "tokenizer_config.json", auto_map=code)
    (model / "custom_generate").mkdir()
    plant(model / "custom_generate", "generate")
    (model / "config.yaml").write_text(f"train_file: {rows_file}\nobjective: evil:run\n")
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("it asked at the terminal"))
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.chdir(model)
    return model


def ran(folder):
    return [path for path in (folder / "ran", folder / "custom_generate" / "ran") if path.exists()] + [
        name for name in ("evil", "modeling", "configuration") if name in sys.modules
    ]


def test_no_command_runs_code_of_a_folder(evil, zotune, rows_file, tmp_path):
    train = ("train", "--model", evil, "--train-file", rows_file, "--max-steps", 1, "--num-dev", 2, "--device", "cpu")
    commands = [
        ("eval", "--model", evil, "--eval-file", rows_file),
        ("eval", "--model", evil, "--eval-file", rows_file, "--objective", "accuracy"),
        ("plan", "--model", evil, "--method", "zo_sgd"),
        (*train, "--output-dir", tmp_path / "out", "--dry-run"),
        (*train, "--output-dir", tmp_path / "out"),
        ("ledger", "replay", tmp_path / "out", "--output-dir", tmp_path / "again"),
        ("ledger", "verify", tmp_path / "out"),
    ]
    codes = [zotune(*command).code for command in commands]
    assert ran(evil) == []
    assert codes == [2, 0, 0, 0, 0, 0, 0]


def test_a_model_that_needs_its_code_is_refused_in_words(evil, zotune, rows_file):
    edit(evil / "config.json", model_type="their_own", architectures=["Theirs"])
    said = zotune("eval", "--model", evil, "--eval-file", rows_file, "--objective", "accuracy")
    assert said.code == 2
    assert "runs no code of a model unasked" in said.err
    assert ran(evil) == []


TRUST = "trust_remote_code"


def test_no_file_lets_code_run(evil, zotune, rows_file, tmp_path):
    """Each file that a command reads options from says so; the command line does not."""
    edit(evil / "config.json", model_type="their_own", architectures=["Theirs"])
    recipe = tmp_path / "theirs.yaml"
    recipe.write_text(f"model: {evil}\ntrain_file: {rows_file}\ntrust-remote-code: true\nmax_steps: 1\n")
    said = zotune("train", recipe, "--device", "cpu")
    assert (said.code, "which no file may set" in said.err) == (2, True)
    (evil / "config.yaml").write_text(f"train_file: {rows_file}\ntemplate: '{{text}}'\n{TRUST}: true\n")
    said = zotune("eval", "--model", evil, "--eval-file", rows_file)
    assert (said.code, "config.yaml sets trust_remote_code" in said.err) == (2, True)
    for values in ({TRUST: True}, {TRUST: "yes"}, {"trust-remote-code": 1}):
        with pytest.raises(UsageError, match="no file may set"):
            check_file(values, "a file")
    check_file({TRUST: False}, "a file")
    assert ran(evil) == []


def test_a_ledger_and_a_recipe_do_not_pass_the_leave_on(config, rows_file, tmp_path):
    out = train(config(model="random:llama-tiny", trust_remote_code=True, max_steps=1)).output_dir
    assert TRUST not in read_recipe(out / "config.yaml")
    ledger = find_ledger(out)
    assert TRUST not in ledger.header.about["config"]
    ledger.header.about["config"][TRUST] = True
    assert config_of(ledger).trust_remote_code is False


MODEL = """
from transformers import LlamaForCausalLM
with open({place!r}, 'a') as file:
    file.write('ran')
class Theirs(LlamaForCausalLM):
    config_class = None
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out
from .configuration import TheirConfig
Theirs.config_class = TheirConfig
"""
CONFIGURATION = """
from transformers import LlamaConfig
class TheirConfig(LlamaConfig):
    model_type = 'their_own'
"""


def test_code_runs_when_the_command_line_says_so(model, tiny, zotune, rows_file, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("sys.modules", {**sys.modules})
    (model / "modeling.py").write_text(MODEL.format(place=str(model / "ran")))
    (model / "configuration.py").write_text(CONFIGURATION)
    code = {"AutoConfig": "configuration.TheirConfig", "AutoModelForCausalLM": "modeling.Theirs"}
    edit(model / "config.json", model_type="their_own", architectures=["Theirs"], auto_map=code)
    command = ("train", "--model", model, "--train-file", rows_file, "--max-steps", 1)
    command = (*command, "--num-dev", 2, "--device", "cpu", "--output-dir", tmp_path / "out")
    for dry in ((), ("--dry-run",)):
        said = zotune(*command, *dry)
        assert (said.code, "--trust-remote-code" in said.err) == (2, True)
    assert not (model / "ran").exists()
    for dry in (("--dry-run",), ()):
        assert zotune(*command, "--trust-remote-code", *dry).code == 0
    assert (model / "ran").exists()
    plain = tiny("llama").module
    found = load(ModelOptions(model=str(model), device="cpu", trust_remote_code=True)).module
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, 2 * plain(ids).logits)
    said = zotune("eval", "--model", tmp_path / "out", "--eval-file", rows_file, "--device", "cpu")
    assert said.code == 2
    assert zotune("eval", "--model", tmp_path / "out", "--eval-file", rows_file, "--trust-remote-code").code == 0


def test_an_inherited_function_is_named_and_not_imported(evil):
    config = EvalConfig(model=str(evil), eval_file="rows.jsonl")
    with pytest.raises(UsageError, match=r"names the objective 'evil:run'.*--objective"):
        inherited_options(config, evil)
    options, _ = inherited_options(config.model_copy(update={"objective": "f1"}), evil)
    assert "objective" not in options
    # What is inherited is data from a list of keys, whatever else the file says.
    (evil / "config.yaml").write_text(
        "train_file: a\ntemplate: '{text}'\npredictions: /etc/x\noutput_dir: /y\nmodel: z\n"
    )
    assert inherited_options(config, evil)[0] == {"template": "{text}"}
    assert ran(evil) == []


@pytest.mark.parametrize("value", ["evil/kernel", "kernels-community/flash-attn@main:x", "flash_attention_2"])
@pytest.mark.parametrize("key", ["attn_implementation", "experts_implementation"])
def test_a_configuration_names_no_kernels(model, key, value):
    edit(model / "config.json", **{key: value})
    with pytest.raises(UsageError, match=f"sets {key}"):
        read_config(model)
    edit(model / "config.json", **{key: "eager"})
    assert read_config(model).model_type == "llama"


def test_a_configuration_of_endless_layers_is_refused(model):
    edit(model / "config.json", num_hidden_layers=10**9)
    with pytest.raises(UsageError, match="ZOTUNE_MAX_LAYERS"):
        read_config(model)


@pytest.mark.parametrize("name", ["config", "adapter_config", "model.safetensors.index", "added_tokens", "tokenizer"])
def test_a_file_of_endless_values_is_refused_before_libraries_read_it(tmp_path, name):
    model = tmp_path
    (model / f"{name}.json").write_text("[" + "[]," * 5_000_000 + "[]]")
    with pytest.raises(UsageError, match="ZOTUNE_MAX_JSON_VALUES"):
        check_metadata(model)


@pytest.mark.parametrize(
    "values",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "evil"},
        {"megatron_core": "evil"},
        {"peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init_state_dict_path": "/etc/weights.pt"},
        {"peft_type": "SHADOW", "shadow_model": "somebody/else"},
        {"peft_type": "XLORA", "adapters": {"a": "somebody/else"}},
        {"tokenizer_name_or_path": "somebody/else", "tokenizer_kwargs": {"trust_remote_code": True}},
        {"corda_config": {"cache_file": "/tmp/pickle.pt"}},
        {"r": 10**9},
        {"target_modules": "(a+)+$"},
        {"rank_pattern": {"(x*)*y": 4}},
        {"alora_invocation_tokens": "q"},
        {"alora_invocation_tokens": [1, "q"]},
    ],
)
def test_an_adapter_names_nothing_elsewhere(values):
    with pytest.raises(UsageError):
        check_adapter_config({"peft_type": "LORA", "base_model_name_or_path": "base", **values}, "the adapter", "base")


def test_the_folder_of_an_adapter_is_checked(tmp_path):
    edit(tmp_path / "adapter_config.json", peft_type="LORA", base_model_name_or_path="gpt2", megatron_core="evil")
    with pytest.raises(UsageError, match="names code, files or a model elsewhere"):
        read_adapter_folder(tmp_path)


def test_adapters_of_every_scheme_pass(tiny):
    """The configurations that peft itself writes, with their defaults and with a tokenizer of the base."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    for kind in ("LORA", "PREFIX_TUNING", "IA3", "VERA", "LOHA", "OFT", "BOFT", "FOURIERFT"):
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](base_model_name_or_path="base")
        check_adapter_config(config.to_dict(), "the adapter", "base")
    check_adapter_config({"tokenizer_name_or_path": "base", "target_modules": ["q_proj"]}, "the adapter", "base")


@pytest.mark.parametrize("pattern", [r"(a+)+", r"(a*)*b", r"((x{2,})y?)*", r"(?:\w+\s?)+$", r"(?=(a+))(b(c+)*)+"])
def test_patterns_of_exponential_time_are_refused(pattern):
    re.compile(pattern)
    with pytest.raises(UsageError, match="repeats"):
        check_pattern(pattern, "the pattern")


@pytest.mark.parametrize(
    "pattern", [r".*(q|v)_proj$", r"^(?!.*lm_head).*mlp\..*", r"layers\.(1[0-9]|2)\.", "norm", "("]
)
def test_patterns_of_names_pass(pattern):
    check_pattern(pattern, "the pattern")


def test_transformers_is_never_left_to_ask():
    """Each call that could meet a model's code says that none runs."""
    call = re.compile(r"(?:Auto\w+|auto_class)\.from_(?:pretrained|config)\((?:[^()]|\([^()]*\))*\)")
    calls = {
        (path.relative_to(SOURCE).as_posix(), found[0])
        for path in SOURCE.rglob("*.py")
        for found in call.finditer(path.read_text(encoding="utf-8"))
        if not any(part in found[0] for part in ('f"', "{auto}", "FOLDER", "…"))  # texts that show a call
    }
    without = [place for place in calls if "NO_CODE" not in place[1] and "trust_remote_code=False" not in place[1]]
    assert len(calls) >= 8
    assert {path for path, _ in without} == {"zotune/llm/checkpoints/pretrained.py"}  # its options hold NO_CODE
