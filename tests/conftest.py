"""What several test files share: tiny models of each family, the built-in model, rows, the command line.

Each test has tiny models of its own, for tests change them: copies of those that are made once; the built-in model is
fetched once, by the package's own code, into the user's cache.
"""

import copy
import gc
import json
import os
import resource
import subprocess
import sys
import zlib
from collections import Counter
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

# Triton's kernels run in its interpreter, on CPU tensors, unless `make test-gpu` says otherwise. Whatever imports
# Triton first settles it, and torch may.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from zotune.noise import back_ends, native

# What is imported and collected lives as long as the process: a fifth of collecting was looking for garbage in it.
gc.disable()

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src"

# An odd number of rows of different lengths; two labels.
TEXTS = (
    "a gorgeous film",
    "dull",
    "it never quite comes alive , and then it ends",
    "fine acting",
    "one long yawn of a story",
    "warm and funny",
    "the plot is a mess that no actor could save",
    "see it twice",
    "bad",
    "a small wonder",
    "nothing works here",
)
ROWS = tuple({"text": text, "label": "yes" if i % 2 == 0 else "no"} for i, text in enumerate(TEXTS))


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` chooses
def pytest_collection_modifyitems(items):
    """Mark as slow the cases of a matrix of parameters that others stand for.

    A test with two parameters or more runs in `make test` on so many cases that each value of each parameter occurs
    (each-choice coverage), a test marked `sample(n)` on n of its cases; `make test-slow` runs the others. Which cases
    these are depends on their names alone, so that every process chooses the same. A case that is slow by its own
    mark stands for no other.
    """
    covered, sampled = {}, Counter()
    for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode())):
        if item.get_closest_marker("slow"):
            continue
        test = item.nodeid.partition("[")[0]
        if sample := item.get_closest_marker("sample"):
            sampled[test] += 1
            if sampled[test] > sample.args[0]:
                item.add_marker(pytest.mark.slow)
        elif not _brings_a_value(item, covered.setdefault(test, set())):
            item.add_marker(pytest.mark.slow)


def _brings_a_value(item, covered):
    """Return whether a case has a parameter's value that is not covered yet; it is then."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    new = {(name, repr(value)) for name, value in params.items()} - covered
    covered |= new
    return len(params) < 2 or bool(new) or item.path.name == "test_frozen.py"


def pytest_collection_finish():
    """From here on garbage is collected, seldom, and never looked for in modules and tests."""
    gc.freeze()
    if "many_processes" in sys.modules:
        sys.modules["many_processes"].server()
    gc.set_threshold(5_000, 10, 10)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    """At most two threads, unless the environment says otherwise; the tensors here are small."""
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """One thread, whatever the environment says: sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["llama", "opt", "mistral", "qwen3", "gemma3", "roberta"])
def family(request):
    return request.param


@pytest.fixture(params=["llama", "opt", "mistral", "qwen3", "gemma3"])
def causal_family(request):
    return request.param


@cache
def _made(family, dtype):
    """A tiny model that nothing but a copy is made of: a copy takes a third of the time."""
    from zotune.llm.config.step import ModelOptions
    from zotune.llm.models.load import load

    return load(ModelOptions(model=f"random:{family}-tiny", dtype=dtype, device="cpu"))


@pytest.fixture
def tiny():
    """A function: family and precision to a tiny model with random weights."""
    from zotune.llm.models.load import quiet_libraries

    def make(family, dtype="float32"):
        quiet_libraries()  # as loading does; pytest forgets it after each test
        return copy.deepcopy(_made(family, dtype))

    return make


@pytest.fixture(scope="session")
def smollm2():
    """The built-in model. Session-wide: tests read it and leave it as it is."""
    from zotune.llm.config.step import ModelOptions
    from zotune.llm.models.load import load

    lm = load(ModelOptions(model="smollm2-135m", device="cpu"))
    for p in lm.module.parameters():
        p.requires_grad_(False)
    return lm


@pytest.fixture
def rows_file(tmp_path):
    """A user's file of eleven rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def config(rows_file, tmp_path):
    """A function: options of a short run on the rows file to its validated config."""
    from zotune.llm.config.run import TrainConfig

    def make(**options):
        plain = {
            "model": "random:llama-tiny",
            "device": "cpu",
            "train_file": rows_file,
            "output_dir": tmp_path / "out",
            "num_dev": 3,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
        }
        return TrainConfig.model_validate({**plain, **options})

    return make


@pytest.fixture
def short(rows_file, tmp_path):
    """A function: arguments of a short run on the rows file."""

    def arguments(*more, model="random:llama-tiny", out="out"):
        plain = ["train", "--model", model, "--train-file", rows_file, "--output-dir", tmp_path / out]
        return [*plain, "--max-steps", 2, "--num-dev", 3, "--device", "cpu", *more]

    return arguments


@pytest.fixture
def zotune(capsys):
    """A function: run the command line in this process; its exit code, stdout and stderr."""
    from zotune.cli.main import run

    def call(*args):
        capsys.readouterr()
        try:
            code = run([str(arg) for arg in args])
        except SystemExit as leaving:
            code = leaving.code
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)

    return call


@pytest.fixture
def start():
    """A function: start a Python process that finds this source tree; it is ended with the test."""
    started = []

    def begin(*args, **environment):
        path = os.pathsep.join([str(SOURCE), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [sys.executable, *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.fixture
def plain_score():
    """A function: a candidate's score by its definition, one unpadded sequence in full, token by token, in float64."""

    @torch.no_grad()
    def score(lm, prompt, candidate):
        alone, both = (lm.tokenizer(text)["input_ids"] for text in (prompt, prompt + candidate))
        assert both[: len(alone)] == alone
        logits = lm.module(torch.tensor([both]), use_cache=False).logits[0].double()
        terms = [
            float(logits[i - 1, both[i]]) - float(logits[i - 1].exp().sum().log()) for i in range(len(alone), len(both))
        ]
        return sum(terms) / len(terms)

    return score


@pytest.fixture(params=[back_ends.NATIVE, back_ends.EAGER], ids=lambda back_end: back_end.name, scope="module")
def kernels(request):
    """Run a module's tests with the C kernels, then with torch operations."""
    if request.param is back_ends.NATIVE and native.library() is None:
        pytest.skip("this installation has no C kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(back_ends, "cpu", lambda: request.param)
        yield request.param


@pytest.fixture
def little_memory():
    """A context: within it the process may take so many bytes more; what would take more is a MemoryError."""

    @contextmanager
    def limit(num_bytes):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    return limit
