"""`zotune export`: write a model as a file for other programs."""

from __future__ import annotations

from pathlib import Path

from zotune.cli.after_training.arguments import parse_folder
from zotune.cli.help import HelpPage, help_text
from zotune.cli.options import complete, is_help
from zotune.cli.output import print_json, print_text
from zotune.errors import UsageError
from zotune.llm.config.folders import ExportConfig

_PAGE = HelpPage(
    usage="zotune export RUN --gguf [--OPTION VALUE ...]",
    description="Write a model as a GGUF file, with llama.cpp's converter. RUN is the folder of a run or of a model; "
    "an adapter is merged into its base model first.",
    examples=(
        "zotune export runs/latest --gguf --llama-cpp ~/llama.cpp",
        "zotune export runs/latest --gguf --outtype q8_0 --output-file mine.gguf",
    ),
)


def run(args: list[str], as_json: bool) -> int:
    """Export and return the exit code."""
    if is_help(args):
        print_text(help_text(_PAGE, ExportConfig, complete(ExportConfig, {}, "defaults")))
        return 0
    config = parse_folder(ExportConfig, args, "zotune export")
    if not config.gguf:
        raise UsageError(
            f"say what to write: zotune export {config.model} --gguf makes a GGUF file. A whole model for transformers "
            f"is made by zotune merge {config.model}."
        )
    from zotune.llm.output.locked_folder import tidy
    from zotune.llm.sharing.gguf import export_gguf

    tidy(Path(config.model))
    file = export_gguf(config)
    if as_json:
        print_json({"output_file": str(file), "bytes": file.stat().st_size})
    else:
        print_text(f"{file.stat().st_size / 1e6:.0f} MB in {file}")
    return 0
