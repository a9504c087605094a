"""llama.cpp's converter runs apart, on a folder without code, and its failures are said in words.

A script in its place writes down what it was given.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest

from zotune.errors import RunError, UsageError
from zotune.llm.config.folders import ExportConfig
from zotune.llm.config.run import TrainConfig
from zotune.llm.sharing.gguf import VARIABLE, export_gguf
from zotune.llm.training.train import train

CONVERTER = """
import json, os, pathlib, sys
import beside  # modules of llama.cpp lie beside its script
folder, *rest = sys.argv[1:]
options = dict(zip(rest[::2], rest[1::2]))
texts = {p.name: p.read_text() for p in pathlib.Path(folder).glob("*.json")}
seen = {
    "names": sorted(os.listdir(folder)), "texts": texts, "options": options, "environment": dict(os.environ),
    "path": sys.path, "cwd": os.getcwd(),
}
pathlib.Path(options["--outfile"]).write_text(json.dumps(seen))
"""


@pytest.fixture
def llama_cpp(tmp_path):
    """A folder with a script in place of llama.cpp's converter."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    (folder / "beside.py").write_text("")
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder of an adapter."""
    folder = tmp_path_factory.mktemp("runs") / "out"
    rows = {"task": "sst2", "num_train": 4, "num_dev": 2, "num_eval": 2, "max_steps": 1}
    options = {"model": "random:llama-tiny", "tuning": "lora", "device": "cpu", "output_dir": str(folder)}
    return train(TrainConfig.model_validate({**rows, **options, "learning_rate": 0.1})).output_dir


@pytest.fixture
def adapter(tuned, tmp_path):
    return shutil.copytree(tuned, tmp_path / "out")


def export(folder, **options):
    return export_gguf(ExportConfig(model=str(folder), gguf=True, device="cpu", **options))


def test_an_adapter_is_merged_and_converted(adapter, llama_cpp, tmp_path, monkeypatch):
    # A module in the current folder, or on Python's path, is none of the converter's.
    monkeypatch.chdir(tmp_path)
    for name in ("json.py", "evil/json.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('ran')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "evil"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    file = export(adapter.relative_to(tmp_path), llama_cpp=llama_cpp.relative_to(tmp_path), outtype="q8_0")
    assert file.resolve() == tmp_path / "out.gguf"
    seen = json.loads(file.read_text())
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= set(seen["names"])
    assert not any("adapter" in name for name in seen["names"])
    assert (seen["options"]["--outtype"], seen["options"]["--model-name"]) == ("q8_0", "out")
    assert seen["environment"]["HF_HUB_OFFLINE"] == "1"
    assert "HF_TOKEN" not in seen["environment"]
    # The script imports a module beside it, and nothing of the current folder or of the user's path.
    assert (seen["environment"]["PYTHONPATH"], seen["path"][0]) == (str(llama_cpp), str(llama_cpp))
    assert not {"", str(tmp_path), str(tmp_path / "evil"), seen["cwd"]} & set(seen["path"])
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".zotune")) == []


@pytest.mark.parametrize(("name", "default"), [("random:llama-tiny", "random:llama-tiny.gguf"), ("org/m", "m.gguf")])
def test_a_model_that_is_no_folder_is_loaded_and_converted(tiny, llama_cpp, tmp_path, monkeypatch, name, default):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if name == "org/m":  # what the Hub would send
        monkeypatch.setattr("zotune.llm.sharing.whole_model.load", lambda *_: tiny("llama"))
    file = export(name, llama_cpp=llama_cpp)
    assert file == Path(default)
    seen = json.loads(file.read_text())
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(seen["names"])
    assert seen["options"]["--model-name"] == Path(name).name
    assert [path.name for path in (tmp_path / "here").iterdir()] == [default]


def test_code_of_a_model_never_reaches_the_converter(tiny, llama_cpp, tmp_path):
    """The converter reads a folder with trust in its code, so neither code nor its name is in that folder."""
    folder = tmp_path / "model"
    lm = tiny("llama")
    lm.module.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, "auto_map": {"AutoConfig": "evil.Config"}}))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    seen = json.loads(export(folder, llama_cpp=llama_cpp).read_text())
    assert "auto_map" not in "".join(seen["texts"].values())
    assert not any(name.endswith(".py") for name in seen["names"])
    assert "model.safetensors" in seen["names"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import nothing_of_this_name", r"No module named 'nothing_of_this_name'. .* pip install nothing_of_this_name"),
        ("raise SystemExit('\\x1b[2Junknown architecture')", r"could not convert .*: \\x1b\[2Junknown architecture$"),
        ("", r"could not convert .*: exit code 0"),
    ],
)
def test_a_converter_that_fails_has_the_last_word(adapter, llama_cpp, tmp_path, script, message):
    (llama_cpp / "convert_hf_to_gguf.py").write_text(script)
    with pytest.raises(RunError, match=message):
        export(adapter, llama_cpp=llama_cpp)
    assert list(tmp_path.glob("*.gguf")) == []


def test_without_a_converter_the_message_says_how_to_get_it(adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv(VARIABLE, raising=False)
    how = r"git clone .*--llama-cpp llama.cpp.*zotune export .* --gguf.*convert_hf_to_gguf.py FOLDER --outfile"
    with pytest.raises(UsageError, match=how):
        export(adapter)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=rf"{VARIABLE}: there is no convert_hf_to_gguf.py in .*nowhere"):
        export(adapter)
    with pytest.raises(UsageError, match=r"--llama-cpp: there is no convert_hf_to_gguf.py"):
        export(adapter, llama_cpp=tmp_path)


def test_a_converter_on_the_path_is_found_but_none_in_the_current_folder(adapter, llama_cpp, tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    program = llama_cpp / "convert_hf_to_gguf.py"
    program.write_text(f"#!{sys.executable}\n{CONVERTER}")
    program.chmod(0o755)
    monkeypatch.chdir(llama_cpp)
    monkeypatch.setenv("PATH", ".")
    with pytest.raises(UsageError, match="is not installed here"):
        export(adapter)
    monkeypatch.setenv("PATH", str(llama_cpp))
    assert json.loads(export(adapter).read_text())["options"]["--outtype"] == "auto"


def test_no_file_is_replaced_and_no_other_folder_converted(adapter, llama_cpp, tmp_path):
    (tmp_path / "mine.gguf").write_text("mine")
    (tmp_path / "none").mkdir()
    for options, message in (
        ({"output_file": tmp_path / "mine.gguf"}, "exists; remove it or name another"),
        ({"output_file": tmp_path / "no/mine.gguf"}, "there is no folder"),
        ({"output_file": tmp_path / "mine.bin"}, r"ends in \.gguf"),
    ):
        with pytest.raises(UsageError, match=message):
            export(adapter, llama_cpp=llama_cpp, **options)
    with pytest.raises(UsageError, match="holds no model to convert"):
        export(tmp_path / "none", llama_cpp=llama_cpp)
    assert (tmp_path / "mine.gguf").read_text() == "mine"
