"""`zotune push`: upload a model to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from zotune.cli.after_training.arguments import parse_folder
from zotune.cli.help import HelpPage, help_text
from zotune.cli.options import complete, is_help
from zotune.cli.output import print_json, print_text
from zotune.llm.config.folders import PushConfig

_PAGE = HelpPage(
    usage="zotune push RUN [--OPTION VALUE ...]",
    description="Upload a model to the Hugging Face Hub. RUN is the folder of a run or of a model. Weights, "
    "configuration, tokenizer, model card and the record of the run are sent, with no path of this machine in them, "
    "and nothing else that is in the folder. The token is that of `hf auth login`, or HF_TOKEN.",
    examples=(
        "zotune push runs/latest --hub-model-id me/my-model",
        "zotune push runs/latest --hub-model-id me/my-model --hub-private-repo",
    ),
)


def run(args: list[str], as_json: bool) -> int:
    """Upload and return the exit code."""
    if is_help(args):
        print_text(help_text(_PAGE, PushConfig, complete(PushConfig, {}, "defaults")))
        return 0
    config = parse_folder(PushConfig, args, "zotune push")
    from zotune.llm.output.locked_folder import LockedFolder
    from zotune.llm.sharing.hub import upload
    from zotune.llm.sharing.shared_folder import check_is_model

    folder = Path(config.model)
    check_is_model(folder)
    # Nobody writes there during the upload.
    with LockedFolder(folder):
        address = upload(folder, config.hub_model_id, private=config.hub_private_repo, base=config.base_model)
    if as_json:
        print_json({"url": address})
    else:
        print_text(f"uploaded to {address}")
    return 0
