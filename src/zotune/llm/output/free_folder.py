"""Whether a run may write into a folder: nothing of the user's is in its way, and nothing that it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from zotune.errors import UsageError, listed
from zotune.llm.checkpoints.adapter_folder import base_of_adapter
from zotune.llm.checkpoints.adapter_source import is_adapter_folder
from zotune.llm.config.run import TrainConfig
from zotune.llm.output.locked_folder import LockedFolder
from zotune.llm.output.manifest import RUN_PATTERNS, Manifest

# No number of a result depends on this module.
COUNTS_FOR_RESULTS = "never"


def check_free(folder: LockedFolder, valuable: Sequence[str], *, overwrites: bool) -> None:
    """Check that a new run may write into a folder.

    Without `overwrites`, nothing may be there, as in the examples of transformers. With it, an earlier run is replaced,
    the user's files stay, and one of a name that a run writes is refused.

    Raises:
        UsageError: the run may not; the message names the files.
    """
    foreign = folder.manifest.foreign(folder.path)
    if overwrites:
        in_the_way = [name for name in foreign if any(fnmatchcase(name, pattern) for pattern in RUN_PATTERNS)]
        if in_the_way:
            raise UsageError(
                f"{folder.path} holds files that zotune did not write, or that were changed since, and a run would "
                f"replace: {listed(in_the_way)}. Move them away, or choose another --output-dir."
            )
    elif valuable:
        raise UsageError(
            f"{folder.path} holds an earlier run ({listed(valuable)}); "
            "choose another --output-dir, resume it (--resume), or give --overwrite-output-dir to replace it."
        )
    elif foreign:
        raise UsageError(
            f"{folder.path} holds other files ({listed(foreign)}); choose another --output-dir, or give "
            "--overwrite-output-dir to write beside them, which replaces none of them."
        )


def check_inputs(config: TrainConfig, manifest: Manifest) -> None:
    """Check that a run does not replace the model or the rows that it reads.

    Raises:
        UsageError: it would.
    """
    output = config.output_dir.resolve()
    for path in _models(Path(config.model)):
        if path == output:
            raise UsageError(
                f"{config.output_dir} is the folder of the model {path.name}, which the run reads; choose another "
                "--output-dir."
            )
    files = [*config.train_files, *([] if config.eval_file is None else [config.eval_file])]
    for path in [*_models(Path(config.model)), *(file.resolve() for file in files)]:
        if path.is_relative_to(output) and path.relative_to(output).parts[0] in manifest.files and not config.resume:
            raise UsageError(
                f"{path} belongs to an earlier run in {config.output_dir}, which this run would replace, and this run "
                "reads it; choose another --output-dir."
            )


def _models(folder: Path) -> Iterator[Path]:
    """Yield a model's folder and those of the models that it was tuned on."""
    seen: set[Path] = set()
    while folder.is_dir() and folder.resolve() not in seen:
        seen.add(folder.resolve())
        yield folder.resolve()
        if not is_adapter_folder(folder):
            return
        folder = Path(base_of_adapter(folder))
