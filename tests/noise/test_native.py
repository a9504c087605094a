"""The C kernels serve where they are installed and right; else torch operations do, to the same bits."""

import importlib.util
import json
import logging
import platform
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hatchling.builders.wheel import WheelBuilder

from zotune.noise import GAUSSIAN, RADEMACHER, native, spec
from zotune.noise.back_ends import CAPABILITIES, EAGER, NATIVE

ROOT = Path(__file__).parents[2]
BUILD = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
hatch_build = importlib.util.module_from_spec(BUILD)
BUILD.loader.exec_module(hatch_build)

needs_compiler = pytest.mark.skipif(hatch_build.compiler() is None, reason="there is no C compiler here")
WIDTHS = {"DEFAULT": "baseline", "AVX2": "avx2", "AVX512": "avx512"}

STEPS = """
import hashlib, json, torch, zotune
from zotune import noise

torch.set_num_threads(1)
digest = hashlib.blake2b(digest_size=16)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for make, sampler in ((zotune.zo_sgd, zotune.gaussian), (zotune.zo_adam, zotune.rademacher)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(50, 30), torch.nn.Linear(30, 200)).to(dtype)
        optimizer = make(model, lr=1e-2, num_queries=2, sampler=sampler)
        for _ in range(2):
            optimizer.step(lambda: model(torch.arange(20)).float().square().mean())
        for p in model.parameters():
            digest.update(p.detach().view(torch.uint8).numpy().tobytes())
print(json.dumps([noise.back_end(torch.device("cpu")).name, zotune.__file__, digest.hexdigest()]))
"""


def bare(tmp_path, **more):
    """An environment's variables; no program is on its PATH."""
    empty = tmp_path / "empty"
    empty.mkdir(exist_ok=True)
    return {"PATH": str(empty), "HOME": str(tmp_path), "ZOTUNE_CACHE": str(tmp_path / "cache"), **more}


def steps(python, variables):
    """Of a process that takes some steps: its back end, where zotune lies, the digest of the weights; stderr."""
    done = subprocess.run([python, "-c", STEPS], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return *json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def eager_steps(tmp_path_factory):
    """The same of this source tree with torch operations."""
    variables = bare(tmp_path_factory.mktemp("here"), PYTHONPATH=str(ROOT / "src"), ZOTUNE_NATIVE="0")
    return steps(sys.executable, variables)


# Installation ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A source tree as it is checked out: nothing in it is compiled."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "NOTICE", ".gitignore"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


@pytest.fixture
def installed(tmp_path):
    """A function: install something into an empty environment; its Python. It reads the libraries that are here."""

    def install(what, variables):
        folder = tmp_path / "environment"
        venv.create(folder, symlinks=True)
        python = folder / "bin" / "python"
        (site,) = folder.glob("lib/python3*/site-packages")
        others = [path for path in sys.path if path.endswith("site-packages")]
        (site / "libraries.pth").write_text("\n".join(others), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--no-build-isolation", str(what)], env=variables, check=True)
        return python

    return install


@pytest.fixture
def wheel_of(tree, monkeypatch, tmp_path):
    """A function: build the wheel in this process, with a compiler or without; its path."""

    def build(command):
        monkeypatch.setenv("CC", command)
        # The hook reads its widths and flags in a module of its own, so what it starts is the place to save time at.
        run = subprocess.run
        monkeypatch.setattr(subprocess, "run", lambda words, **more: run(quickly(words), **more))
        (built,) = WheelBuilder(str(tree)).build(directory=str(tmp_path / "dist"))
        return Path(built)

    return build


def quickly(words):
    """A compiler's words without optimisation, which changes no bit and takes most of its time."""
    return ["-O0" if word == "-O3" else word for word in words]


@needs_compiler
def test_a_wheel_holds_the_kernels_of_every_width_and_is_for_a_platform(wheel_of, tmp_path, monkeypatch):
    wheel = wheel_of(shlex.join(hatch_build.compiler()))
    assert "-py3-none-" in wheel.name
    assert "linux" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    noise = tmp_path / "site" / "zotune" / "noise"
    found = {path.name.removesuffix(".so").rpartition("-")[2] for path in noise.glob("native-*.so")}
    assert found == (set(WIDTHS.values()) if platform.machine() == "x86_64" else {"baseline"})
    monkeypatch.setattr(native, "_SOURCE", noise / "native.c")
    library = native.library.__wrapped__()
    assert library is not None
    assert Path(library._name).parent == noise


def test_a_wheel_without_a_compiler_is_for_any_platform(wheel_of, capfd):
    wheel = wheel_of("no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert "no working C compiler" in "".join(capfd.readouterr())


@pytest.mark.slow
@needs_compiler
def test_an_installed_wheel_takes_a_step_with_the_c_kernels_and_needs_no_compiler(
    tree, installed, eager_steps, tmp_path
):
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(tree)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
    assert "linux" in wheel.name
    assert not [*tree.glob("src/zotune/noise/*.so")]
    variables = bare(tmp_path)
    python = installed(wheel, variables)
    back_end, file, digest, said = steps(python, variables)
    assert (back_end, said) == ("native", "")
    assert Path(file).is_relative_to(tmp_path)
    assert not (tmp_path / "cache").exists()
    assert digest == eager_steps[2]


@pytest.mark.slow
def test_a_source_tree_installs_without_a_compiler_and_takes_the_same_step(tree, installed, eager_steps, tmp_path):
    variables = bare(tmp_path)
    python = installed(tree, variables)
    back_end, file, digest, said = steps(python, variables)
    assert back_end == "eager"
    assert Path(file).is_relative_to(tmp_path)
    assert said.count("\n") == 1
    assert "without a C compiler" in said
    assert native._COST in said
    assert digest == eager_steps[2]


def test_no_library_is_loaded_from_a_folder_that_is_not_the_package(monkeypatch, tmp_path):
    """Neither from the cache, where an earlier version compiled some, nor from the current folder."""
    names = [f"native-{native.source_hash()}-{width}.so" for width in WIDTHS.values()]
    for folder in (tmp_path, tmp_path / "native"):
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).write_bytes(b"planted")
    monkeypatch.setenv("ZOTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    loaded = []
    monkeypatch.setattr(native, "_loaded", lambda path: loaded.append(path) or native.ctypes.CDLL(None))
    monkeypatch.setattr(native, "_reproduces_the_specification", lambda library: True)
    native.library.cache_clear()
    try:
        native.library()
    finally:
        native.library.cache_clear()
    assert all(path.is_absolute() and path.parent == native._SOURCE.parent for path in loaded)


def test_zotune_native_0_gives_torch_operations(monkeypatch, caplog):
    monkeypatch.setenv("ZOTUNE_NATIVE", "0")
    assert native.library.__wrapped__() is None
    assert not caplog.records


@pytest.mark.slow
def test_zotune_native_0_gives_torch_operations_without_a_word(eager_steps):
    back_end, _, _, said = eager_steps
    assert (back_end, said) == ("eager", "")


@pytest.mark.parametrize("back_end", [NATIVE, EAGER], ids=lambda back_end: back_end.name)
def test_a_back_end_has_the_functions_that_the_table_names(back_end):
    functions = CAPABILITIES[back_end.name]
    assert all(callable(getattr(back_end.kernels, function)) for function in functions)
    # Whatever the table of torch operations lacks has a substitute in the callers.
    assert all(dtypes <= functions[function] for function, dtypes in CAPABILITIES["eager"].items())


# What is loaded ----------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A copy of the C source in a folder without libraries; the package looks there."""
    copy = tmp_path / "native.c"
    shutil.copy(native._SOURCE, copy)
    monkeypatch.setattr(native, "_SOURCE", copy)
    return copy


def test_libraries_of_another_source_are_not_loaded(source, caplog):
    assert native.library.__wrapped__() is None
    assert "without a C compiler" in caplog.text
    caplog.clear()
    source.with_name("native-0123456789ab-baseline.so").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "zotune"):
        assert native.library.__wrapped__() is None
    assert "native.c is not the one" in caplog.text


def test_a_library_that_cannot_be_loaded_is_reported(source, caplog):
    source.with_name(f"native-{native.source_hash()}-baseline.so").write_bytes(b"no library")
    assert native.library.__wrapped__() is None
    assert "cannot be loaded" in caplog.text


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"), [("0x9E3779B9u", "0x9E3779B8u"), ("1.0 / 7", "1.0 / 6"), (">= 0x7F800000u", ">= 0x00800000u")]
)
def test_a_library_that_differs_from_the_specification_is_not_used(source, caplog, monkeypatch, right, wrong):
    text = source.read_text(encoding="utf-8")
    assert right in text
    source.write_text(text.replace(right, wrong), encoding="utf-8")
    monkeypatch.setattr(hatch_build, "FLAGS", quickly(hatch_build.FLAGS))
    assert len(hatch_build.compile_kernels(source, source.parent, ["baseline"])) == 1
    assert native.library.__wrapped__() is None
    assert "other bits" in caplog.text


# Widths of vectors -------------------------------------------------------------------------------------------


@pytest.fixture(params=WIDTHS)
def width(request, monkeypatch):
    """The library of each width that this processor has."""
    widths = [*WIDTHS]
    has = torch.backends.cpu.get_cpu_capability()
    if native.library() is None or widths.index(request.param) > widths.index(has if has in widths else "DEFAULT"):
        pytest.skip(f"no kernels here for {request.param}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    loaded = native.library.__wrapped__()
    assert loaded is not None
    assert loaded._name.endswith(f"-{WIDTHS[request.param]}.so")
    return loaded


@pytest.mark.parametrize("stream", [RADEMACHER, GAUSSIAN])
def test_each_width_gives_the_bits_of_the_specification(width, stream, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: width)
    made = {RADEMACHER: spec.rademacher, GAUSSIAN: spec.gaussian}[stream](2**63 + 1, 7, 77, 77 + 10_007)
    out = torch.empty(10_007)
    native.fill(out, stream, 2**63 + 1, 7, 77)
    assert np.array_equal(out.numpy().view(np.uint32), made.view(np.uint32))
    native.add(out, out, stream, [2**63 + 1], [-0.37], 7, 77, None)
    assert np.array_equal(out.numpy().view(np.uint32), (made + np.float32(-0.37) * made).view(np.uint32))


@pytest.mark.parametrize("scale", [0.0, 2.0**-11, 2.0**-12, 2.0**-25, 3 * 2.0**-26, 16.0, 1e-3, 1e-7, 30_000.0])
@pytest.mark.parametrize("stream", [RADEMACHER, GAUSSIAN])
def test_every_float16_number_is_widened_and_rounded_to_nearest_at_each_width(width, stream, scale, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: width)
    x = np.arange(65_536, dtype=np.uint32).astype(np.uint16).view(np.float16)
    u = {RADEMACHER: spec.rademacher, GAUSSIAN: spec.gaussian}[stream](3, 7, 5, 5 + 65_536)
    with np.errstate(all="ignore"):
        expected = (x.astype(np.float32) + np.float32(scale) * u).astype(np.float16)
    out = torch.from_numpy(x.copy())
    native.add(out, out, stream, [3], [scale], 7, 5, None)
    nan = np.isnan(expected)
    assert np.array_equal(nan, np.isnan(out.numpy()))
    assert np.array_equal(out.numpy().view(np.uint16)[~nan], expected.view(np.uint16)[~nan])
    assert 0 < nan.sum() < 3000
