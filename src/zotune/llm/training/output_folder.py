"""A run's folder: model, tokenizer, resolved config, metrics as they come, results, and a model card."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

import zotune
from zotune.errors import RunError, UsageError
from zotune.ledger import LedgerError, read
from zotune.llm.config.run import TrainConfig, read_recipe, write_yaml
from zotune.llm.config.schema import validate
from zotune.llm.models.builtin import BUILT_IN
from zotune.llm.models.load import LanguageModel
from zotune.llm.models.safetensors_shards import MAX_SHARD_SIZE
from zotune.llm.quantized.gguf_output import write_tuned
from zotune.llm.quantized.layers import has_packed_layers
from zotune.llm.quantized.scales import save_pretrained
from zotune.llm.scoring.accuracy import Measured
from zotune.llm.training.metrics_log import MetricsLog, plain

# What a run writes, by pattern; the first four may be all that is left of one that failed.
_WORTH_KEEPING = ("metrics.jsonl", "results.json", "README.md", "*.safetensors", "ledger.zol")
_WRITTEN = (
    *_WORTH_KEEPING,
    "report.html",
    "config.yaml",
    "config.json",
    "adapter_config.json",
    "*.safetensors.index.json",
)
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# Where a model is written before it is whole.
_ASIDE = ".saving"


class OutputFolder:
    """The folder of one run. Made at the start, so that a run that fails leaves its metrics; locked until `close`.

    Attributes:
        path: where it is.
        is_resumed: whether it holds a run that is to go on.
        before: that run's options.
        metrics: its metrics.jsonl.
    """

    def __init__(self, config: TrainConfig) -> None:
        """Make the folder, or find the run that is to go on; see `begin`.

        Raises:
            UsageError: it holds a run already, cannot be made, or another process writes it.
        """
        self.path = config.output_dir
        self._check_free(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UsageError(f"the output folder {str(self.path)!r} cannot be written: {error.strerror}.") from None
        try:
            self._begin(config)
        except BaseException:
            self.close()
            raise

    def _check_free(self, config: TrainConfig) -> None:
        self.is_resumed = config.resume and (self.path / "config.yaml").is_file()
        found = [p.name for pattern in _WORTH_KEEPING for p in self.path.glob(pattern) if _is_worth_keeping(p)]
        if found and not config.overwrite_output_dir and not self.is_resumed:
            raise UsageError(
                f"{self.path} holds an earlier run or other files ({found[0]}); "
                "choose another --output-dir, go on with it (--resume), or give --overwrite-output-dir to replace it."
            )

    def _begin(self, config: TrainConfig) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another run is writing to {str(self.path)!r}; wait for its end, or choose another --output-dir."
            ) from None
        recipe = self.path / "config.yaml"
        self.before = validate(TrainConfig, read_recipe(recipe), str(recipe)) if self.is_resumed else config
        try:
            shutil.rmtree(self.path / _ASIDE, ignore_errors=True)
            # An adapter of an earlier run, left beside new weights, would be loaded in their place.
            for path in [p for pattern in _WRITTEN for p in self.path.glob(pattern) if not self.is_resumed]:
                path.unlink()
            if not self.is_resumed:
                write_yaml(recipe, config.model_copy(update={"resume": False}))
            (self.path / "metrics.jsonl").touch()
        except OSError as error:
            raise UsageError(f"the output folder {str(self.path)!r} cannot be written: {error.strerror}.") from None
        self.metrics = MetricsLog(self.path / "metrics.jsonl")

    def close(self) -> None:
        """Let others write to the folder."""
        os.close(self._lock)

    def check_room(self, lm: LanguageModel) -> None:
        """Refuse to start what could not be saved."""
        tuned = [p for p in lm.module.parameters() if p.requires_grad]
        only_tuned = hasattr(lm.module, "peft_config") or has_packed_layers(lm.module)
        saved = tuned if only_tuned else list(lm.module.parameters())
        needed = sum(p.numel() * p.element_size() for p in saved)
        free = shutil.disk_usage(self.path).free
        if free < 1.05 * needed:
            raise UsageError(
                f"{str(self.path)!r} has {free / 1e6:.0f} MB free, but the tuned model takes {needed / 1e6:.0f} MB. "
                "Make room, choose another --output-dir, or tune an adapter (--tuning lora)."
            )

    def save_model(self, lm: LanguageModel) -> None:
        """Write what transformers or peft load as it is: weights or adapter, config, tokenizer.

        The files are written aside first; what was there before stays until they are whole.
        """
        try:
            save_whole(lm, self.path)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise RunError(
                f"the tuned model could not be saved to {self.path}: {error}. "
                "Metrics up to the last step are in metrics.jsonl."
            ) from None

    def finish(self, results: dict[str, Any], config: TrainConfig, lm: LanguageModel, test: Measured | None) -> None:
        """Write results.json and the model card, which shows what was found on the evaluation rows."""
        write_json(self.path / "results.json", results)
        (self.path / "README.md").write_text(_card(results, config, lm, test), encoding="utf-8")


def _is_worth_keeping(path: Path) -> bool:
    """Not an empty file, nor a ledger without a step."""
    if path.name != "ledger.zol":
        return path.stat().st_size > 0
    try:
        return len(read(path)) > 0
    except LedgerError:
        return True


def save_whole(lm: LanguageModel, folder: Path) -> None:
    """Write weights or adapter, config and tokenizer aside, and put them in place once they are whole."""
    with saving(folder) as aside:
        write_whole(lm, aside)


def write_whole(lm: LanguageModel, folder: Path, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Write weights or adapter, config and tokenizer."""
    if not hasattr(lm.module, "peft_config") and has_packed_layers(lm.module):
        write_tuned(lm.module, folder)
        return
    # peft asks the Hub for the base model's vocabulary when it saves an adapter, unless told not to look.
    is_adapter = hasattr(lm.module, "peft_config")
    extra: dict[str, Any] = {"save_embedding_layers": False} if is_adapter else {"max_shard_size": max_shard_size}
    save_pretrained(lm.module, str(folder), **extra)
    lm.tokenizer.save_pretrained(str(folder))


@contextmanager
def saving(folder: Path) -> Iterator[Path]:
    """A folder to write a model to; when the context is left without an error, its files are put into `folder`.

    A model's files that were there before go: weights cut into files would otherwise stand beside whole ones.
    """
    aside, is_new = folder / _ASIDE, not folder.exists()
    aside.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        new = {file.name for file in aside.iterdir()}
        for file in aside.iterdir():
            file.replace(folder / file.name)
        for old in [old for pattern in _WEIGHTS for old in folder.glob(pattern) if old.name not in new]:
            old.unlink()
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # it is not empty: what was written is whole
                folder.rmdir()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(plain(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    aside.replace(path)


def environment() -> dict[str, str]:
    """Versions and machine, as every result records them."""
    libraries = ("transformers", "peft", "numba")
    return {
        "zotune": zotune.__version__,
        "torch": torch.__version__,
        **{name: version(name) for name in libraries},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _card(results: dict[str, Any], config: TrainConfig, lm: LanguageModel, test: Measured | None) -> str:
    """The model card: what this is, how it was made, how well it does, how to load it."""
    metric, found = "accuracy", "not evaluated"
    if test is not None:
        metric, found = f"{test.metric} (95 % interval)", str(test)
    best = "" if results["best_step"] is None else f"\n| best step | {results['best_step']} |"
    return f"""---
library_name: {"peft" if config.is_adapter else "transformers"}
tags: [zotune, zeroth-order]
---

# {config.model}, tuned on {config.task or config.train_file}

Made by zotune {zotune.__version__} with `{config.method}`, tuning: {config.tuning}
({results["num_tuned"]:,} numbers tuned).

| | |
|---|---|
| {metric} | {found} |
| steps, forward passes | {results["num_steps"]}, {results["num_forwards"]} |{best}
| objective | {config.objective or "the task's own"} |
| learning rate, μ, queries | {config.learning_rate}, {config.mu}, {config.num_queries} |
| seed | {config.seed} |
| training time | {results["seconds"]:.0f} s |
| peak memory | {results["peak_memory"] / 2**20:.0f} MiB |

```python
{_loading(config, lm)}
```

`config.yaml` holds every option; `zotune train config.yaml` runs it again.
"""


def _loading(config: TrainConfig, lm: LanguageModel) -> str:
    """The lines of Python that load what was saved, on any machine."""
    kind = "SequenceClassification" if lm.classifies else "MaskedLM" if lm.masked else "CausalLM"
    auto = f"AutoModelFor{kind}"
    if not config.is_adapter and has_packed_layers(lm.module):
        # The base is its file, and what was tuned lies beside this card.
        lines = "from zotune.llm.config.run import ModelOptions\nfrom zotune.llm.models.load import load"
        return f"{lines}\n\nmodel = load(ModelOptions(model=FOLDER)).module"
    if config.is_adapter and lm.classifies:
        # The base knows nothing of the labels; the head is saved with the adapter.
        loader = f"AutoPeft{auto[4:]}"
        labels = f"num_labels={lm.config.num_labels}"
        return f"from peft import {loader}\n\nmodel = {loader}.from_pretrained(FOLDER, {labels})"
    if not config.is_adapter:
        return f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained(FOLDER)"
    if config.model in BUILT_IN:
        terms = ", accept_terms=True" if BUILT_IN[config.model].terms else ""
        base = f"{auto}.from_pretrained(fetch({config.model!r}{terms}))"
        imports = f"from transformers import {auto}\nfrom zotune.llm.models.builtin import fetch"
    elif config.model.startswith("random:"):
        base = f"load(ModelOptions(model={config.model!r})).module"
        imports = "from zotune.llm.config.run import ModelOptions\nfrom zotune.llm.models.load import load"
    else:
        base, imports = f"{auto}.from_pretrained({config.model!r})", f"from transformers import {auto}"
    return f"from peft import PeftModel\n{imports}\n\nmodel = PeftModel.from_pretrained({base}, FOLDER)"
