"""The manifest of an output folder, `zotune-files.json`: the files that zotune wrote there, and nothing else's.

Only a file that is in the manifest, with the content that it was written with, is replaced or deleted. Everything else
belongs to the user: files that were there before, files that were added, and files that were changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from zotune.errors import UsageError
from zotune.llm.config.run import read_recipe
from zotune.system.bounds import read_json

# No number of a result depends on this module.
COUNTS_FOR_RESULTS = "never"

FILE = "zotune-files.json"
CONFIG, LEDGER = "config.yaml", "ledger.zol"
_ABOUT = "Files that zotune wrote into this folder; it replaces and deletes no others."
# A larger file is known by blocks of it: any training changes all of them.
_WHOLE, _BLOCK, _NUM_BLOCKS = 2**20, 4096, 256

# What a run leaves at least, besides its configuration.
PROOF = ("metrics.jsonl", LEDGER, "results.json", "checkpoint.safetensors")
# Patterns of the names that a run may write. Earlier versions of zotune wrote no manifest.
RUN_PATTERNS = (
    *(
        CONFIG,
        "metrics.jsonl",
        "search.json",
        "results.json",
        "README.md",
        "report.html",
        "*.zol",
        "merge.json",
        "checkpoint-*",
    ),
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "config.json", "generation_config.json"),
    *("adapter_config.json", "base_model.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.jinja", "additional_chat_templates", "trainer_state.json", "runs"),
)


@dataclass(frozen=True)
class Manifest:
    """What zotune wrote into a folder.

    Attributes:
        files: the digest of each file or folder by name; None for one that grows.
        replaced: folders with the files of earlier runs, which stay until a new model is saved.
    """

    files: Mapping[str, str | None] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()

    def owns(self, path: Path) -> bool:
        """Whether zotune wrote a file or folder, and nobody has changed it since."""
        if path.name not in self.files or path.is_symlink() or not path.exists():
            return False
        written = self.files[path.name]
        return written is None or written == digest_of(path)

    def present(self, folder: Path) -> list[str]:
        """Return the names of what is in a folder as zotune wrote it."""
        return [name for name in self.files if self.owns(folder / name)]

    def foreign(self, folder: Path) -> list[str]:
        """Return the sorted names of what else is in a folder; hidden ones, which zotune never writes, do not count."""
        own = {FILE} if read_manifest(folder) is not None else set()
        names = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
        return sorted(name for name in names if name not in own and not self.owns(folder / name))

    def with_files(self, files: Mapping[str, str | None], without: Collection[str] = ()) -> Manifest:
        """Return the manifest with more files and without others."""
        kept = {name: digest for name, digest in self.files.items() if name not in without}
        return Manifest({**kept, **files}, self.replaced)

    def to_text(self) -> str:
        """Return the content of the file."""
        value = {"about": _ABOUT, "files": dict(sorted(self.files.items())), "replaced": self.replaced}
        return json.dumps(value, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest in a folder; None if there is none, or it is damaged."""
    try:
        value = read_json(folder / FILE)
        files, replaced = value["files"], value["replaced"]
        is_valid = all(_is_plain(name) for name in [*files, *replaced])
        is_valid = is_valid and all(digest is None or isinstance(digest, str) for digest in files.values())
        return Manifest(dict(files), tuple(replaced)) if is_valid else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def manifest_of(folder: Path) -> Manifest:
    """Return the manifest of a folder; for a run of an earlier version, one of the names that it wrote."""
    manifest = read_manifest(folder)
    return Manifest(dict.fromkeys(_names_of_earlier_run(folder))) if manifest is None else manifest


def _names_of_earlier_run(folder: Path) -> list[str]:
    """Return the names in a folder without a manifest that a run of an earlier version wrote."""
    present = [name for name in PROOF if (folder / name).is_file()]
    if present and is_written_config(folder / CONFIG):
        return sorted({path.name for pattern in RUN_PATTERNS for path in folder.glob(pattern)})
    # With other options beside it, a ledger says only of the files that no one else writes that they are its run's.
    return present if LEDGER in present and _is_ledger(folder / LEDGER) else []


def _is_ledger(path: Path) -> bool:
    # Imported here because it imports torch, which few readers of a manifest need.
    from zotune.ledger.format import MAGIC

    with suppress(OSError), path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
    return False


def is_written_config(path: Path) -> bool:
    """Whether zotune wrote a file of options, and nobody changed it: a recipe has comments, or leaves options out."""
    try:
        values = read_recipe(path)
        text = yaml.safe_dump(values, sort_keys=False)
        return "output_dir" in values and text == path.read_text(encoding="utf-8")
    except (OSError, UsageError, ValueError, yaml.YAMLError):
        return False


def digest_of(path: Path) -> str:
    """Return a digest of a file's content, from blocks of it if it is large; of a folder, of all files in it."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(path):
        digest.update(part)
    return digest.hexdigest()


def _parts(path: Path) -> Iterable[bytes]:
    if path.is_dir():
        for inner in sorted(path.rglob("*")):
            if inner.is_symlink() or not inner.is_dir():
                content = os.readlink(inner) if inner.is_symlink() else digest_of(inner)
                yield f"{inner.relative_to(path)}\n{content}\n".encode("utf-8", "surrogateescape")
        return
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        yield f"{size}\n".encode()
        if size <= _WHOLE:
            yield file.read()
            return
        for i in range(_NUM_BLOCKS):
            file.seek(i * (size - _BLOCK) // (_NUM_BLOCKS - 1))
            yield file.read(_BLOCK)


def _is_plain(name: object) -> bool:
    """Whether a name leads nowhere but into its folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
