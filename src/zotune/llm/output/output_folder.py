"""The output folder of a run: model, tokenizer, resolved config, metrics, results and model card."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from zotune.errors import RunError, UsageError
from zotune.ledger import LedgerError, read
from zotune.llm.checkpoints.adapter_merge import is_adapter
from zotune.llm.checkpoints.fingerprint import FILE as FINGERPRINT
from zotune.llm.config.run import TrainConfig, read_recipe, write_yaml
from zotune.llm.config.schema import validate
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.output.json_files import write_json
from zotune.llm.output.metrics_log import MetricsLog
from zotune.llm.output.model_card import model_card
from zotune.llm.output.model_files import save_model_files
from zotune.llm.output.staging import STAGING
from zotune.llm.quantized.layers import has_packed_layers
from zotune.llm.scoring.accuracy import Evaluation

# Patterns of the files that a run writes; a failed run may leave only the first ones.
_VALUABLE_FILES = ("metrics.jsonl", "results.json", "README.md", "*.safetensors", "ledger.zol")
_RUN_FILES = (
    *_VALUABLE_FILES,
    "report.html",
    "config.yaml",
    "config.json",
    "adapter_config.json",
    FINGERPRINT,
    "*.safetensors.index.json",
)


class OutputFolder:
    """The folder of one run, created at its start, so that a failed run leaves its metrics, and locked until `close`.

    Attributes:
        path: path of the folder.
        is_resumed: whether it holds a run to resume.
        before: options of that run.
        metrics: its metrics.jsonl.
    """

    def __init__(self, config: TrainConfig) -> None:
        """Create the folder, or open that of a run to resume.

        Raises:
            UsageError: the folder holds another run, cannot be created, or is in use by another process.
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
        files = [p.name for pattern in _VALUABLE_FILES for p in self.path.glob(pattern) if _is_valuable(p)]
        if files and not config.overwrite_output_dir and not self.is_resumed:
            raise UsageError(
                f"{self.path} holds an earlier run or other files ({files[0]}); "
                "choose another --output-dir, resume it (--resume), or give --overwrite-output-dir to replace it."
            )

    def _begin(self, config: TrainConfig) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another run is writing to {str(self.path)!r}; wait until it ends, or choose another --output-dir."
            ) from None
        recipe = self.path / "config.yaml"
        self.before = validate(TrainConfig, read_recipe(recipe), str(recipe)) if self.is_resumed else config
        try:
            shutil.rmtree(self.path / STAGING, ignore_errors=True)
            # An adapter of an earlier run would be loaded in place of new weights beside it.
            for path in [p for pattern in _RUN_FILES for p in self.path.glob(pattern) if not self.is_resumed]:
                path.unlink()
            if not self.is_resumed:
                write_yaml(recipe, config.model_copy(update={"resume": False}))
            (self.path / "metrics.jsonl").touch()
        except OSError as error:
            raise UsageError(f"the output folder {str(self.path)!r} cannot be written: {error.strerror}.") from None
        self.metrics = MetricsLog(self.path / "metrics.jsonl")

    def close(self) -> None:
        """Release the lock of the folder."""
        os.close(self._lock)

    def check_free_space(self, lm: LanguageModel) -> None:
        """Check that the disk has room for the tuned model.

        Raises:
            UsageError: it has not.
        """
        tuned = [p for p in lm.module.parameters() if p.requires_grad]
        only_tuned = is_adapter(lm.module) or has_packed_layers(lm.module)
        saved = tuned if only_tuned else list(lm.module.parameters())
        needed = sum(p.numel() * p.element_size() for p in saved)
        free = shutil.disk_usage(self.path).free
        if free < 1.05 * needed:
            raise UsageError(
                f"{str(self.path)!r} has {free / 1e6:.0f} MB free, but the tuned model takes {needed / 1e6:.0f} MB. "
                "Make room, choose another --output-dir, or tune an adapter (--tuning lora)."
            )

    def save_model(self, lm: LanguageModel) -> None:
        """Write weights or adapter, config and tokenizer, for transformers or peft to load.

        Earlier files are replaced only after all new ones are complete.

        Raises:
            RunError: the files cannot be written.
        """
        try:
            save_model_files(lm, self.path)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise RunError(
                f"the tuned model could not be saved to {self.path}: {error}. "
                "Metrics up to the last step are in metrics.jsonl."
            ) from None

    def finish(self, results: dict[str, Any], config: TrainConfig, lm: LanguageModel, test: Evaluation | None) -> None:
        """Write results.json and the model card, which shows the result on the evaluation rows."""
        write_json(self.path / "results.json", results)
        (self.path / "README.md").write_text(model_card(results, config, lm, test), encoding="utf-8")


def _is_valuable(path: Path) -> bool:
    """Whether a file is neither empty nor a ledger without steps."""
    if path.name != "ledger.zol":
        return path.stat().st_size > 0
    try:
        return len(read(path)) > 0
    except LedgerError:
        return True
