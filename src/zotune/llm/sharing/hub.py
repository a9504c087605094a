"""Uploading a model's folder to the Hugging Face Hub, without anything that belongs to this machine alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zotune
from zotune.errors import RunError, UsageError, reason_of
from zotune.llm.checkpoints.adapter_folder import base_of_adapter
from zotune.llm.checkpoints.adapter_source import is_adapter_folder
from zotune.llm.checkpoints.hub_names import hub_id
from zotune.llm.config.output import OutputOptions, check_repository
from zotune.llm.config.run import TrainConfig
from zotune.llm.sharing.shared_folder import base_on_hub, check_is_model, write_shared
from zotune.messages import say

# No number of a result depends on this module.
COUNTS_FOR_RESULTS = "never"


def check_upload(config: TrainConfig) -> None:
    """Check before a run that its model can be uploaded after it, if that is asked for.

    Raises:
        UsageError: there is no network or no token, or the model would be an adapter of a base that only this machine
            has.
    """
    if not config.push_to_hub:
        return
    check_access()
    repository_of(config.output_dir, config.hub_model_id)
    folder = Path(config.model)
    base = base_of_adapter(folder) if is_adapter_folder(folder) else config.model
    if (config.is_adapter or config.is_gguf) and hub_id(base) is None:
        raise UsageError(
            f"push_to_hub: what --tuning {config.tuning} tunes needs its base model {base!r}, which nobody else can "
            "load. Leave --push-to-hub out, and afterwards run zotune push OUTPUT_DIR --base-model ORG/NAME if the Hub "
            "has that model, or zotune merge OUTPUT_DIR and push what it writes."
        )


def upload_after(config: OutputOptions, folder: Path | None) -> None:
    """Upload the model of a run that has ended, if that is asked for.

    Raises:
        RunError: it could not be uploaded; the message says how to try again.
    """
    if not config.push_to_hub or folder is None:
        return
    try:
        address = upload(folder, config.hub_model_id, private=config.hub_private_repo)
    except (UsageError, RunError) as error:
        again = f"zotune push {folder}{f' --hub-model-id {config.hub_model_id}' if config.hub_model_id else ''}"
        raise RunError(
            f"the model is saved in {folder}, but it was not uploaded: {error}\nTry again: {again}"
        ) from None
    say(f"uploaded to {address}")


def check_access() -> None:
    """Check that the Hub may be asked, and that there is a token.

    Raises:
        UsageError: the Hub is switched off, or there is no token.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UsageError(
            "nothing can be uploaded while HF_HUB_OFFLINE=1 switches the Hub off: unset the variable. What a run saves "
            "can be uploaded later with zotune push."
        )
    if huggingface_hub.get_token() is None:
        raise UsageError(
            "there is no token of the Hugging Face Hub, without which nothing can be uploaded: run `hf auth login`, or "
            "set HF_TOKEN to a token that may write (huggingface.co/settings/tokens)."
        )


def repository_of(folder: Path, name: str | None) -> str:
    """Return the name of a repository, by default that of the folder.

    Raises:
        UsageError: the Hub has no repositories of this name.
    """
    try:
        return check_repository(folder.resolve().name if name is None else name)
    except ValueError as error:
        given = "" if name is not None else " It is the folder's name; give another one with --hub-model-id ORG/NAME."
        raise UsageError(f"hub_model_id: {error}.{given}") from None


def upload(folder: Path, name: str | None, *, private: bool = False, base: str | None = None) -> str:
    """Upload a model's folder, and return the address of its repository.

    Args:
        folder: the folder of a run or of a model.
        name: the repository, ORG/NAME, or NAME for one of the token's owner; None for the folder's name.
        private: whether a new repository is private.
        base: name on the Hub of the base model, if the folder names a place on this machine.

    Raises:
        UsageError: the folder holds no model, or one that nobody else could load; the Hub is switched off, there is no
            token, or it may not write there.
        RunError: the Hub could not be reached, or failed.
    """
    import huggingface_hub

    check_is_model(folder)
    base = base_on_hub(folder, base)
    repository = repository_of(folder, name)
    check_access()
    with tempfile.TemporaryDirectory(prefix="zotune-push-") as scratch:
        names = write_shared(folder, Path(scratch), base)
        say(f"uploading {', '.join(names)}")
        api = huggingface_hub.HfApi(library_name="zotune", library_version=zotune.__version__)
        with _errors_in_words(repository):
            made = api.create_repo(repository, private=private or None, exist_ok=True)
            full = str(made.repo_id)
            api.upload_folder(
                repo_id=full, folder_path=scratch, commit_message=f"Model tuned with zotune {zotune.__version__}"
            )
            return str(made)


@contextmanager
def _errors_in_words(repository: str) -> Iterator[None]:
    from huggingface_hub import errors
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    # What its library of HTTP raises without an answer; that library is not the same in all versions.
    no_answer: type[Exception] = getattr(errors, "HTTPError", OSError)
    try:
        yield
    except LocalTokenNotFoundError:
        check_access()
        raise
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UsageError(
                f"the Hub does not let this token write to {repository} (HTTP {status}). Use a token that may write "
                "there (`hf auth login`, or HF_TOKEN), or another --hub-model-id."
            ) from None
        raise RunError(f"the Hub did not take the upload to {repository}: {reason_of(error)}") from None
    except (OSError, no_answer) as error:
        raise RunError(f"the Hub could not be reached: {reason_of(error)}") from None
