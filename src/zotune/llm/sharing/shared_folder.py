"""The files of a run's folder as they go to other machines: the model and its record, with no place of this machine.

A list of names says what goes; everything else in the folder stays, whatever it is: data, logs, checkpoints, secrets.
Weights are linked and not copied. Text is rewritten: each path becomes its last part, except in what the
model reads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from zotune.errors import UsageError
from zotune.ledger import read
from zotune.ledger.files import with_about
from zotune.llm.checkpoints.adapter_folder import base_of_adapter
from zotune.llm.checkpoints.adapter_source import is_adapter_folder
from zotune.llm.checkpoints.companions import NAMES as COMPANIONS
from zotune.llm.checkpoints.hub_names import HUB_IDS, hub_id
from zotune.llm.config.run import read_recipe
from zotune.llm.output.manifest import CONFIG, LEDGER
from zotune.llm.output.model_card import front_matter
from zotune.llm.quantized.gguf_output import tuned_base_model
from zotune.llm.sharing.local_paths import check_no_path, text_without_paths, without_paths
from zotune.system.bounds import JSON_BYTES, read_bytes, read_json

# No number of a result depends on this module.
COUNTS_FOR_RESULTS = "never"

CARD, ADAPTER = "README.md", "adapter_config.json"
_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "tuned_model.safetensors")
_JSON = (
    *("config.json", "generation_config.json", ADAPTER, "base_model.json", "*.safetensors.index.json"),
    *("tokenizer_config.json", *COMPANIONS, "results.json", "search.json"),
)
# The tokens of a tokenizer are data of the model: a vocabulary may hold the text of any path.
_VERBATIM = (
    *("tokenizer.json", "tokenizer.model", "vocab.*", "merges.txt", "*.jinja"),
    *("special_tokens_map.json", "added_tokens.json"),
)
_LINES = ("metrics.jsonl",)


def check_is_model(folder: Path) -> None:
    """Check that a folder holds a model.

    Raises:
        UsageError: it holds none.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {str(folder)!r}; give the folder of a run or of a model.")
    if not _of(folder, _WEIGHTS):
        again = " Its run has not ended: zotune train … --resume." if (folder / CONFIG).is_file() else ""
        raise UsageError(
            f"{folder} holds no weights of a model or of an adapter (model.safetensors, adapter_model.safetensors)."
            f"{again}"
        )


def _of(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Return the files of a folder whose names match patterns.

    Raises:
        UsageError: one is a link, which may lead to a file that is no part of the model.
    """
    files = (path for path in sorted(folder.iterdir()) if path.is_file())
    found = [path for path in files if any(fnmatchcase(path.name, pattern) for pattern in patterns)]
    link = next((path for path in found if path.is_symlink()), None)
    if link is not None:
        raise UsageError(f"{link} is a link to {link.resolve()}, and only files of the folder itself are uploaded.")
    return found


def base_on_hub(folder: Path, given: str | None = None) -> str | None:
    """Return the name on the Hub of the base model that the tuned tensors in a folder need; None if they need none.

    Args:
        folder: the folder of a model.
        given: the name, if the folder names a place on this machine instead.

    Raises:
        UsageError: the base has no such name, so that nobody could load what is in the folder.
    """
    is_adapter = is_adapter_folder(folder)
    base = base_of_adapter(folder) if is_adapter else tuned_base_model(folder)
    if base is None:
        if given is not None:
            raise UsageError(f"--base-model has no effect: {folder} holds whole weights, which need no base model.")
        return None
    name = base if not is_adapter and base in HUB_IDS else given or hub_id(base)
    if name is None:
        given_name = "Give the name of the same model on the Hub with --base-model ORG/NAME, or upload"
        remedy = given_name if is_adapter else "Upload"
        raise UsageError(
            f"{folder} was tuned on {base!r}, which nobody else can load. {remedy} the whole model: zotune merge "
            f"{folder}, then push what it writes."
        )
    return name


def write_shared(folder: Path, target: Path, base: str | None) -> list[str]:
    """Write the files of a model's folder as they may be shared into an empty folder; return their names.

    Args:
        folder: the folder of a model.
        target: the empty folder.
        base: name on the Hub of the base model that the folder's tensors need, or None.

    Raises:
        UsageError: a file cannot be read, or names a folder of this machine all the same.
        OSError: a file cannot be written.
    """
    for path in _of(folder, _WEIGHTS):
        (target / path.name).symlink_to(path.resolve())
    for path in _of(folder, _VERBATIM):
        shutil.copyfile(path, target / path.name)
    for path in _of(folder, _JSON):
        named = {"base_model_name_or_path": base} if path.name == ADAPTER else {}
        _write_json(target / path.name, _shared(read_json(path), named))
    for path in _of(folder, _LINES):
        lines = read_bytes(path, JSON_BYTES).decode("utf-8").splitlines()
        (target / path.name).write_text("".join(f"{text_without_paths(line)}\n" for line in lines), encoding="utf-8")
    # A run on the base itself is a run on the model of that name on the Hub.
    local = base_of_adapter(folder) if is_adapter_folder(folder) else None
    if _of(folder, (CONFIG,)):
        options = _shared_options(read_recipe(folder / CONFIG), local, base)
        (target / CONFIG).write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
    if _of(folder, (LEDGER,)):
        ledger = read(folder / LEDGER)
        about = {**ledger.header.about, "config": _shared_options(ledger.header.about.get("config"), local, base)}
        (target / LEDGER).write_bytes(with_about(ledger, without_paths(about)))
    (target / CARD).write_text(_card(folder, base), encoding="utf-8")
    check_no_path(_contents(target), folder)
    return sorted(path.name for path in target.iterdir())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _shared(values: Any, named: dict[str, Any]) -> Any:
    """Return the content of a file with some values of others' choice, and with no path."""
    return without_paths({**values, **named} if isinstance(values, dict) else values)


def _shared_options(options: Any, local: str | None, base: str | None) -> Any:
    """Return the options of a run with the base model's name on the Hub in place of its place on this machine."""
    is_base = isinstance(options, dict) and base is not None and _is_base(options.get("model"), local)
    return _shared(options, {"model": base} if is_base else {})


def _is_base(model: Any, local: str | None) -> bool:
    """Whether a run's option names the base of its adapter, which names it by its whole path."""
    if local is None or local in HUB_IDS or not isinstance(model, str):
        return False
    if Path(model).exists() and Path(local).exists():
        return Path(model).samefile(local)
    # A relative path, of a run that started in another folder than the current one.
    tail = tuple(part for part in Path(model).parts if part != "..")
    return model == local or (bool(tail) and Path(local).parts[-len(tail) :] == tail)


def _card(folder: Path, base: str | None) -> str:
    """Return the model card of a folder, or a short one if it has none; both name the base model."""
    file = folder / CARD
    text = read_bytes(file, JSON_BYTES).decode("utf-8") if _of(folder, (CARD,)) else ""
    start, _, rest = text.removeprefix("---\n").partition("\n---\n") if text.startswith("---\n") else ("", "", text)
    try:
        known: Any = without_paths(yaml.safe_load(start) or {})
    except yaml.YAMLError as error:
        raise UsageError(f"the metadata of {file} is not valid YAML: {error}") from None
    if not isinstance(known, dict):
        raise UsageError(f"the metadata of {file}, between its lines ---, must be `key: value` lines.")
    named = {} if base is None else {"base_model": base}
    library = {"library_name": "peft" if is_adapter_folder(folder) else "transformers"}
    tags = list(dict.fromkeys([*(known.get("tags") or []), "zotune"]))
    body = text_without_paths(rest).strip("\n") or "Tuned with zotune."
    return f"{front_matter({**library, **known, **named, 'tags': tags})}\n{body}\n"


def _contents(target: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the texts of shared files, and the texts in the headers of the others."""
    for path in sorted(target.iterdir()):
        if path.name == LEDGER:
            yield path.name, json.dumps(read(path).header.about, ensure_ascii=False).encode()
        elif path.suffix == ".safetensors":
            with path.open("rb") as file:
                yield path.name, file.read(min(int.from_bytes(file.read(8), "little"), JSON_BYTES.value))
        elif not any(fnmatchcase(path.name, pattern) for pattern in _VERBATIM):
            yield path.name, path.read_bytes()
