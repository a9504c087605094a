"""The C kernels are used where they can be built and are right, and never otherwise."""

import platform
import subprocess
import sys

import pytest

from zotune.noise import native

SAYS_WHICH = "import zotune.noise as n; print(n._cpu().__name__.rpartition('.')[2])"


def which(tmp_path, **environment):
    """The kernels that a fresh process with this environment uses."""
    command = [sys.executable, "-c", SAYS_WHICH]
    variables = {"PATH": "/usr/bin:/bin", "ZOTUNE_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path), **environment}
    variables["PYTHONPATH"] = ":".join(sys.path)
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler here")
def test_a_compiler_gives_the_c_kernels_and_the_library_is_kept(tmp_path):
    assert which(tmp_path) == "native"
    (kept,) = (tmp_path / "cache" / "native").glob("*.so")
    made = kept.stat().st_mtime_ns
    assert which(tmp_path) == "native"
    assert kept.stat().st_mtime_ns == made


@pytest.mark.parametrize("environment", [{"CC": "no-such-compiler"}, {"CC": "false"}, {"ZOTUNE_NATIVE": "0"}], ids=str)
def test_without_a_working_compiler_numba_is_used(tmp_path, environment):
    assert which(tmp_path, **environment) == "cpu"


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler here")
@pytest.mark.parametrize(
    ("right", "wrong"), [("0x9E3779B9u", "0x9E3779B8u"), ("1.0 / 7", "1.0 / 6"), (">= 0x7F800000u", ">= 0x00800000u")]
)
def test_a_library_that_differs_from_the_specification_is_not_used(tmp_path, monkeypatch, right, wrong):
    source = tmp_path / "native.c"
    text = native._SOURCE.read_text(encoding="utf-8")
    assert right in text
    source.write_text(text.replace(right, wrong), encoding="utf-8")
    monkeypatch.setattr(native, "_SOURCE", source)
    monkeypatch.setenv("ZOTUNE_CACHE", str(tmp_path / "cache"))
    assert native.library.__wrapped__() is None


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler here")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these are vectors of x86")
@pytest.mark.parametrize("vectors", [("-mavx2", "-mf16c"), ("-mavx2",), ()], ids=["256 bits", "no float16", "none"])
def test_narrower_vectors_make_the_same_bits(tmp_path, monkeypatch, vectors):
    flags = [flag for flag in native._FLAGS if flag != "-march=native"]
    monkeypatch.setattr(native, "_FLAGS", (*flags, *vectors))
    monkeypatch.setenv("ZOTUNE_CACHE", str(tmp_path / "cache"))
    assert native.library.__wrapped__() is not None
