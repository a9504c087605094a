"""`zotune merge`: make one whole model of an adapter and its base model."""

from __future__ import annotations

from pathlib import Path

from zotune.cli.after_training.arguments import parse_folder
from zotune.cli.help import HelpPage, help_text
from zotune.cli.options import complete, is_help
from zotune.cli.output import print_json, print_text
from zotune.llm.config.folders import MergeConfig

_PAGE = HelpPage(
    usage="zotune merge RUN [--OPTION VALUE ...]",
    description="Make one whole model of an adapter and its base model: a folder that loads with plain transformers, "
    "vLLM and others. RUN is the folder of a run, of any method, or of an adapter of peft. A quantised base is "
    "dequantised.",
    examples=("zotune merge runs/latest", "zotune merge runs/latest --output-dir merged --dtype bfloat16"),
)
_SEVERAL = " To combine several runs: zotune ledger merge."


def run(args: list[str], as_json: bool) -> int:
    """Merge and return the exit code."""
    if is_help(args):
        print_text(help_text(_PAGE, MergeConfig, complete(MergeConfig, {}, "defaults")))
        return 0
    config = parse_folder(MergeConfig, args, "zotune merge", _SEVERAL)
    from zotune.llm.checkpoints.safetensors_shards import MAX_SHARD_SIZE, check_shard_size
    from zotune.llm.output.locked_folder import new_folder, tidy
    from zotune.llm.sharing.whole_model import whole_model

    size = MAX_SHARD_SIZE if config.max_shard_size is None else check_shard_size(config.max_shard_size)
    output = config.output_dir or Path(f"{config.model.rstrip('/')}-merged")
    tidy(Path(config.model))
    with new_folder(output) as folder:
        model = whole_model(config)
        with folder.staged() as staging:
            model.write(staging, size)
    if as_json:
        print_json({"output_dir": str(output), "model": config.model, "base_model": model.base})
    else:
        print_text(f"merged into {model.base}; saved in {output}")
    return 0
