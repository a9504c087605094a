"""The output folder of a run: model, tokenizer, resolved config, metrics, results and model card."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from zotune.errors import RunError, UsageError
from zotune.ledger import LedgerError, read
from zotune.llm.checkpoints.adapter_merge import is_adapter
from zotune.llm.config.run import NEW_RUN, TrainConfig, read_recipe, write_yaml
from zotune.llm.config.schema import validate
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.output.free_folder import check_free, check_inputs
from zotune.llm.output.json_files import write_json
from zotune.llm.output.locked_folder import LockedFolder, not_written
from zotune.llm.output.manifest import CONFIG, LEDGER, PROOF
from zotune.llm.output.metrics_log import MetricsLog
from zotune.llm.output.model_card import model_card
from zotune.llm.output.model_files import is_write_error, old_weights, whole_state, write_model_files
from zotune.llm.quantized.layers import has_packed_layers
from zotune.llm.scoring.accuracy import Evaluation
from zotune.messages import say

METRICS, CHECKPOINT = "metrics.jsonl", "checkpoint.safetensors"
SEARCH = "search.json"
# Files that grow, or are written again and again, while a run goes on.
_GROWING = (METRICS, LEDGER, CHECKPOINT)
RUN_FILES = (CONFIG, *_GROWING)
"""The files from which a run goes on."""


class OutputFolder:
    """The folder of one run, locked until `close`. Nothing is written before `begin`.

    Attributes:
        path, scratch: path of the folder, in which there are also large copies of weights, as files without a name.
        is_resumed: whether there is a run to resume.
        source: where that is: the folder itself, or a checkpoint, whose files `begin` puts into the folder.
        before: options of that run.
        metrics: its metrics.jsonl.
    """

    def __init__(self, config: TrainConfig) -> None:
        """Make or open the folder, and check that the run may write there.

        Raises:
            UsageError: the folder holds another run or files of the user's, cannot be created, or is in use by another
                process.
        """
        self.path, self._config, self._has_begun = config.output_dir, config, False
        self.scratch = self.path
        self.source = config.resume_from_checkpoint or self.path
        self._search: dict[str, Any] | None = None
        self._folder = LockedFolder(self.path)
        try:
            check_inputs(config, self._folder.manifest)
            recipe = self.source / CONFIG
            owned = any(self._folder.manifest.owns(self.path / name) for name in (CONFIG, *PROOF))
            holds_run = owned and (self.path / CONFIG).is_file()
            is_elsewhere = not self.source.resolve().is_relative_to(self.path.resolve())
            self.is_resumed = config.resume and recipe.is_file() and (holds_run or is_elsewhere)
            if not self.is_resumed or is_elsewhere:
                valuable = [*self._valuable_files(), *self._folder.manifest.replaced]
                check_free(self._folder, valuable, overwrites=config.overwrite_output_dir)
            self.before = validate(TrainConfig, read_recipe(recipe), str(recipe)) if self.is_resumed else config
        except BaseException:
            self._folder.close()
            raise
        self.metrics = MetricsLog(self.path / METRICS)

    def begin(self) -> None:
        """Start to write: the options and an empty log. An earlier run is set aside until the new model is saved.

        Raises:
            UsageError: the folder cannot be written.
        """
        self._has_begun = True
        try:
            if self.is_resumed:
                self._folder.claim(*_GROWING)
                if self.source != self.path:
                    with self._folder.staged() as staging:
                        _copy_run(self.source, staging)
            else:
                self._folder.start_over(*_GROWING)
                self.write_config(self._config)
            (self.path / METRICS).touch()
        except OSError as error:
            raise not_written(self.path, error) from None

    def write_config(self, config: TrainConfig) -> None:
        """Write config.yaml; one that the user changed is kept under another name.

        Raises:
            OSError: it cannot be written.
        """
        with self._folder.staged() as staging:
            write_yaml(staging / CONFIG, config.model_copy(update=NEW_RUN))
            if self._search is not None:
                write_json(staging / SEARCH, self._search)

    def record_search(self, config: TrainConfig, search: dict[str, Any]) -> None:
        """Have `begin` write the options with the learning rate that a search found, and the search beside them."""
        self._config, self._search = config, search

    def close(self) -> None:
        """Release the lock of the folder; a new run without a step leaves the folder as it was before `begin`."""
        try:
            if self._has_begun and not self.is_resumed and not self._valuable_files():
                self._folder.go_back()
            elif self._has_begun and self._folder.manifest.replaced:
                places = ", ".join(self._folder.manifest.replaced)
                say(f"the earlier run is in {self.path}/{places} until a new model is saved")
        finally:
            self._folder.close()

    def _valuable_files(self) -> list[str]:
        """Return the names of the files with something in them that zotune wrote, without the options of a run."""
        names = self._folder.manifest.present(self.path)
        return [name for name in names if name not in (CONFIG, SEARCH) and _is_valuable(self.path / name)]

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
        state = whole_state(lm)
        try:
            with self._folder.staged(without=old_weights(self._folder.manifest.files), is_whole=True) as staging:
                write_model_files(lm, staging, state=state)
        except Exception as error:
            if not is_write_error(error):
                raise
            raise RunError(
                f"the tuned model could not be saved to {self.path}: {error}. "
                "Metrics up to the last step are in metrics.jsonl."
            ) from None

    def finish(self, results: dict[str, Any], config: TrainConfig, lm: LanguageModel, test: Evaluation | None) -> None:
        """Write results.json and the model card, which shows the result on the evaluation rows."""
        with self._folder.staged() as staging:
            write_json(staging / "results.json", results)
            (staging / "README.md").write_text(model_card(results, config, lm, test), encoding="utf-8")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the files and folders that zotune wrote there."""
        return tuple(self._folder.manifest.files)

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """Yield a scratch folder; when the context ends without an error, its files and folders become the run's."""
        with self._folder.staged() as staging:
            yield staging

    def claim(self, *names: str) -> None:
        """Say that the run writes files or folders of these names, which grow."""
        self._folder.claim(*names)

    def remove(self, *names: str) -> None:
        """Delete files or folders if zotune wrote them."""
        self._folder.remove(*names)


def _copy_run(source: Path, target: Path) -> None:
    """Copy the files from which a run goes on."""
    for name in RUN_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _is_valuable(path: Path) -> bool:
    """Whether a file is neither empty, nor a ledger or a checkpoint without steps."""
    if path.name == LEDGER:
        try:
            return len(read(path)) > 0
        except LedgerError:
            return True
    if path.name == CHECKPOINT:
        try:
            with safe_open(path, framework="pt") as file:
                return bool(list(file.keys()))
        except (OSError, SafetensorError):
            return True
    return path.is_dir() or path.stat().st_size > 0
