"""Damaged and crafted files of each kind, and the command that reads them: a function of the number alone."""

import json
import os
import shutil
from contextlib import contextmanager
from functools import cache

import gguf
import numpy as np
import pyarrow
import pyarrow.parquet
import yaml
from pytest import MonkeyPatch
from tokenizers.pre_tokenizers import ByteLevel

import zotune.cli.eval
import zotune.cli.train
from faults.commands import COMMANDS, Command, prepare
from faults.mutations import PIECES, TEXT, odd, of_bytes, of_json, of_ledger, of_lines, of_safetensors
from zotune.llm.config.run import RECIPES, TrainConfig
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.load import load
from zotune.llm.training import evaluation

EVAL = ("eval", "--model", "case", "--eval-file", "rows.jsonl", "--num-eval", 2, "--device", "cpu")
NEEDS = {
    **dict.fromkeys(("ledger", "replayed ledger", "adapter", "page", "resumed", "saved"), ("run",)),
    **dict.fromkeys(("config", "index"), ("whole",)),
}
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors")
MODEL_FILES += ("config.yaml", "results.json")
ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "base_model.json",
    "config.yaml",
)
RUN_FILES = ("metrics.jsonl", "metrics.jsonl", "results.json", "config.yaml", "ledger.zol")


def ledger(here, chance):
    (here / "f.zol").write_bytes(of_ledger((here / "run/ledger.zol").read_bytes(), chance))
    return "ledger", "show", "f.zol", *(["--json"] if chance.random() < 0.2 else [])


def replayed_ledger(here, chance):
    (here / "f.zol").write_bytes(of_ledger((here / "run/ledger.zol").read_bytes(), chance))
    return "ledger", "verify", "f.zol"


SOUND = [path.read_bytes() for path in sorted(RECIPES.glob("*.yaml"))]
MARKS = (*PIECES, b": ", b"&a ", b"*a", b"- ", b"\t", b"!!python/name:os.system ", b"<<: ", b"---\n", b"'")
WORDS = (
    "auto",
    "float32",
    "zo_sgd",
    "fo_adam",
    "none",
    "layer",
    "1e-3",
    "yes",
    "~",
    "lora",
    "rows.jsonl",
    "sst2",
    1,
    0.1,
)


def recipe(here, chance):
    if chance.random() < 0.4:
        content = of_bytes(chance.choice(SOUND), chance)
        at = chance.randrange(len(content) + 1)
        content = content[:at] + chance.choice([b"", chance.choice(MARKS)]) + content[at:]
    else:
        values = {"model": "random:llama-tiny", "train_file": "rows.jsonl", "output_dir": "out"}
        for _ in range(chance.choice([1, 2, 4])):
            key = chance.choice(list(TrainConfig.model_fields)) if chance.random() < 0.9 else chance.choice(TEXT)
            values[key] = odd(chance) if chance.random() < 0.6 else chance.choice(WORDS)
        try:
            content = yaml.safe_dump(values, allow_unicode=True).encode("utf-8", errors="surrogatepass")
        except RecursionError:
            content = json.dumps(values).encode()
    (here / "f.yaml").write_bytes(content)
    return "train", "f.yaml", "--dry-run"


CHAT = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
ROWS = (
    b'{"text": "good", "label": "yes"}\n{"text": "bad", "label": "no"}\n',
    b'{"prompt": "one", "completion": " two"}\n{"prompt": "b", "completion": "c"}\n',
    CHAT * 2,
    b'{"prompt": "p", "choices": ["a", "b"], "label": 1}\n{"prompt": "q", "choices": ["c", "d"], "label": 0}\n',
)
TABLES = (b"text,label\ngood,yes\nbad,no\n", b'prompt,completion\n"a, b"," c"\nd,e\n')


def rows(here, chance):
    kind = chance.choice(["jsonl"] * 6 + ["json", "csv", "tsv", "parquet", "jsonl.gz"])
    if kind == "parquet":
        content = of_bytes(_parquet(here), chance)
    elif kind in ("csv", "tsv"):
        content = of_bytes(chance.choice(TABLES), chance).replace(b",", b"\t" if kind == "tsv" else b",")
    elif kind == "json":
        content = of_json(b"[" + chance.choice(ROWS).strip().replace(b"}\n{", b"},{") + b"]", chance)
    else:
        content = of_lines(chance.choice(ROWS), chance)
    (here / f"f.{kind}").write_bytes(content)
    return "eval", "--model", "random:llama-tiny", "--eval-file", f"f.{kind}", "--num-eval", 2, "--device", "cpu"


@cache
def _parquet(here):
    path = here.parent / "sound.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["good", "bad"] * 20, "label": ["yes", "no"] * 20}), path)
    return path.read_bytes()


def _case(here, source, name, change, chance):
    """A folder with the files of another one, one of them changed."""
    case = here / "case"
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir()
    for path in (here / source).iterdir():
        if path.name != name:
            os.link(path, case / path.name)
    original = here / source / name
    (case / name).write_bytes(change(original.read_bytes() if original.is_file() else b"{}", chance))
    return case


def change_of(name):
    changes = {".json": of_json, ".jsonl": of_lines, ".safetensors": of_safetensors, ".zol": of_ledger}
    return changes.get("." + name.rpartition(".")[2], of_bytes)


def config(here, chance):
    name = chance.choice(MODEL_FILES)
    _case(here, "whole", name, change_of(name), chance)
    return EVAL


def index(here, chance):
    _case(here, "sharded", "model.safetensors.index.json", of_json, chance)
    return EVAL


def adapter(here, chance):
    name = chance.choice(ADAPTER_FILES)
    _case(here, "run", name, change_of(name), chance)
    return EVAL


def saved(here, chance):
    """Weights beside a ledger, damaged."""
    name = chance.choice(("adapter_model.safetensors", "results.json"))
    _case(here, "run", name, change_of(name), chance)
    return "ledger", "verify", "case"


def page(here, chance):
    name = chance.choice(RUN_FILES)
    _case(here, "run", name, change_of(name), chance)
    return "bench", "report", "--run", "case"


def resumed(here, chance):
    name = chance.choice(RUN_FILES)
    case = _case(here, "run", name, change_of(name), chance)
    for path in case.iterdir():  # a run that goes on may write into files, and these have two names
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    return *COMMANDS["more steps"].args[:-3], "--output-dir", "case", "--resume", "--max-steps", 9


def cell(here, chance):
    """Results of a benchmark, one of them damaged."""
    shutil.rmtree(here / "case", ignore_errors=True)
    shutil.copytree(here / "results", here / "case")
    path = chance.choice(sorted((here / "case").rglob("*.json")))
    path.write_bytes(of_json(path.read_bytes(), chance))
    verb = chance.choice(["status", "status", "run"])
    return "bench", verb, "small.toml", "--scale", "smoke", "--results", "case"


def table(here, chance):
    """The definition of an experiment, damaged."""
    (here / "f.toml").write_bytes(of_bytes((here / "small.toml").read_bytes(), chance))
    return "bench", "status", "f.toml", "--scale", "smoke", "--results", "case"


def gguf_file(here, chance):
    content = _gguf(here)
    if chance.random() < 0.5:  # in its header, where a change is more than another weight
        head = chance.choice([200, 2000, 8000])
        content = of_bytes(content[:head], chance) + content[head:]
    else:
        content = of_bytes(content, chance)
    (here / "f.gguf").write_bytes(content)
    return "eval", "--model", "f.gguf", "--eval-file", "rows.jsonl", "--num-eval", 2, "--device", "cpu"


@cache
def _gguf(here):
    """A small model of llama's architecture with a tokenizer of bytes."""
    path = here.parent / "sound.gguf"
    chance = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    tokens = [*sorted(ByteLevel.alphabet()), "<s>", "</s>", "ab", "cd"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1, 1])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_context_length(128)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    shapes = {"token_embd": (len(tokens), 32), "output": (len(tokens), 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in names} | {f"blk.0.{n}_norm": (32,) for n in ("attn", "ffn")}
    for name, shape in shapes.items():
        values = chance.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


KINDS = {"ledger": ledger, "replayed ledger": replayed_ledger, "recipe": recipe, "rows": rows, "config": config}
KINDS |= {"index": index, "adapter": adapter, "page": page, "resumed": resumed, "cell": cell, "table": table}
KINDS |= {"gguf": gguf_file, "saved": saved}
"""By name, a function that writes a file and returns the command line that reads it."""


def furnish(place, kind):
    """Make the folder anew with what a kind changes."""
    if kind == "cell":
        place.furnish(COMMANDS["bench"])
        assert place.run([*COMMANDS["bench"].args[:-1], "results"]).code == 0
    else:
        place.furnish(Command((), (), NEEDS.get(kind, ())))
    if kind == "index":
        args = ("ledger", "replay", "whole", "--output-dir", "sharded", "--max-shard-size", "50KB")
        assert place.run(args).code == 0
    if kind == "gguf":
        _gguf(place.here)
    if kind == "rows":
        _parquet(place.here)
        _loaded()


@cache
def _loaded():
    return load(ModelOptions(model="random:llama-tiny", device="cpu"))


def remembered(parse):
    """`parse`, which repeats its answer to equal arguments."""
    answers = {}

    def parsed(schema, recipe, source, args, prog):
        key = repr((recipe, source, args))
        if key not in answers:
            answers[key] = parse(schema, recipe, source, args, prog)
        return answers[key]

    return parsed


@contextmanager
def shortened(kind):
    """Within this context a child spares what has nothing to do with its files: no model is loaded anew, no run is
    planned, and the same arguments are parsed once.
    """
    with MonkeyPatch.context() as patch:
        prepare()
        patch.setattr(zotune.cli.eval, "parse", remembered(zotune.cli.eval.parse))
        if kind == "recipe":
            patch.setattr(zotune.cli.train, "_dry_run", lambda *_: 0)
        if kind == "rows":
            patch.setattr(evaluation, "load", lambda *_: _loaded())
        yield
