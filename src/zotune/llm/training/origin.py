"""What decides the result of a run besides its steps, and how a resumed run is compared with it.

That is: the training rows and their order, the held-out rows if they choose the weights, the base model, and the
options. A ledger's header names them, and of a run without a ledger each checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from zotune.errors import UsageError
from zotune.ledger.replay import digests_of
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.schema import COMMAND_LINE_ONLY, validate
from zotune.llm.data.tokenization import Encoded
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.quantized.backends import frozen_tensors, packed_names
from zotune.model.parameters import ParameterSet
from zotune.system.libraries import library_version

# Options on which the weights do not depend, so they may differ between the parts of a run, and no ledger holds them.
FREE_OPTIONS = frozenset(
    {"output_dir", "overwrite_output_dir", "resume", "save_steps", "accept_terms", "device", "logging_steps"}
    | {"reuse_activations", "reuse_memory", "reuse_file", "reuse_folder", "logging_strategy"}
    | {*COMMAND_LINE_ONLY, "report_to", "run_name", "save_strategy", "save_total_limit", "resume_from_checkpoint"}
    | {"device_map", "offload_folder"}
    | {"push_to_hub", "hub_model_id", "hub_private_repo", "parallel", "shard", "check_ranks", "timeout"}
)

NAMES = {
    "data": "training rows",
    "held_out": "held-out rows",
    "weights": "weights of the base model",
    "frozen": "frozen weights of the base model",
    "architecture": "configuration of the base model",
}
"""What a run begins with besides its options: keys in a ledger's header or a checkpoint, and names for messages."""


def recorded_options(config: TrainConfig) -> dict[str, Any]:
    """Return the options on which the weights depend, in plain values."""
    free = FREE_OPTIONS if config.schedule_needs_end else FREE_OPTIONS | {"max_steps"}
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in free}


def origin_of(lm: LanguageModel, train: Sequence[Encoded], dev: Sequence[Encoded] | None) -> dict[str, str]:
    """Return digests of what a run begins with, of the model before the first step, apart from its tuned tensors.

    `dev` are the held-out rows if they choose the weights, else None.
    """
    return {
        "data": data_digest(train),
        **({} if dev is None else {"held_out": data_digest(dev)}),
        "frozen": frozen_digest(lm.module),
        "architecture": architecture_of(lm),
    }


def with_tuned_weights(origin: Mapping[str, str], lm: LanguageModel) -> dict[str, str]:
    """Return what a run without a ledger begins with: the tuned tensors too, which a ledger's header names one by one.

    Held-out rows that choose nothing are named as none.
    """
    tuned = {t.name: t.parameter for t in ParameterSet(lm.module)}
    weights = [origin["frozen"], combined_digest(tuned, digests_of(tuned.values()))]
    kept = {key: value for key, value in origin.items() if key != "frozen"}
    return {"held_out": data_digest(()), **kept, "weights": combined_digest(weights, ())}


def architecture_of(lm: LanguageModel) -> str:
    """Return the library that reads the base model's configuration, and a digest of that and of the saved buffers.

    The same weights compute something else under another configuration, such as another base of rotary positions.
    """
    plain = json.dumps(_lasting(lm.config.to_dict()), sort_keys=True, default=repr)
    parameters = {name for name, _ in lm.base.named_parameters(remove_duplicate=False)}
    state = {} if packed_names(lm.base) else lm.base.state_dict()
    names = sorted(state.keys() - parameters)
    digest = combined_digest([plain, *names], digests_of(state[name] for name in names))
    return f"transformers {library_version('transformers')}: {digest}"


# Entries of a configuration that say where it is from and how it was loaded; the other checks cover the dtype.
_PASSING = {"_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype"}


def _lasting(config: Any) -> Any:
    if isinstance(config, dict):
        return {str(key): _lasting(value) for key, value in config.items() if key not in _PASSING}
    return config


def check_origin(ours: Mapping[str, str], theirs: Mapping[str, Any], name: str) -> None:
    """Check that a resumed run has what it began with.

    Args:
        ours: of the resumed run.
        theirs: of the run's ledger or checkpoint; earlier versions did not name all of it.
        name: what was started with it, for messages.

    Raises:
        UsageError: something differs.
    """
    for key, what in NAMES.items():
        if key not in ours or key not in theirs or ours[key] == theirs[key]:
            continue
        # Another version of transformers may describe the same model in other words.
        if key == "architecture" and ours[key].split(":")[0] != str(theirs[key]).split(":")[0]:
            continue
        raise UsageError(
            f"{name} was started with other {what}, so the run cannot resume. Restore them, choose another "
            "--output-dir, or start again with --overwrite-output-dir."
        )


def check_options(before: Mapping[str, Any], now: TrainConfig, name: str) -> None:
    """Check that a resumed run has the options that it was started with.

    Args:
        before: options of the run at its start; those on which the weights do not depend may be missing.
        now: options of the resumed run.
        name: what holds these options, for messages.

    Raises:
        UsageError: an option differs on which the weights depend; `max_steps` may differ if the learning rates do not
            depend on it.
    """
    known = {key: value for key, value in before.items() if key not in FREE_OPTIONS}
    original = validate(TrainConfig, known, name).model_dump(mode="json")
    for key, value in recorded_options(now).items():
        if value != original[key]:
            raise UsageError(
                f"{name} is of a run with {key}: {original[key]}, so it cannot resume with {value}. Give the original "
                "value, choose another --output-dir, or start again with --overwrite-output-dir."
            )


def check_num_steps(num_steps: int, config: TrainConfig, name: str) -> None:
    """Check that a resumed run does not end before the step that it has reached.

    Raises:
        UsageError: it does.
    """
    if num_steps > config.max_steps:
        raise UsageError(
            f"{name} holds a run of {num_steps} steps, so it cannot end after {config.max_steps}. Raise --max-steps, "
            "return to an earlier step with zotune ledger undo, or choose another --output-dir."
        )


def data_digest(rows: Sequence[Encoded]) -> str:
    """Return a digest of rows in their order, and of the columns that a reward or a metric reads.

    It is that of the text of a tuple of the rows, which is not made as a whole.
    """
    digest = hashlib.blake2b(b"(", digest_size=16)
    for i, row in enumerate(rows):
        digest.update((", " * (i > 0) + repr(row)).encode())
        if row.columns:
            digest.update(repr(dict(row.columns)).encode())
    digest.update(b",)" if len(rows) == 1 else b")")
    return digest.hexdigest()


def frozen_digest(module: torch.nn.Module) -> str:
    """Return a digest of all frozen tensors; for a quantised base of its packed integers and their scales."""
    frozen = frozen_tensors(module)
    names = sorted(frozen)
    return combined_digest(names, digests_of(frozen[name] for name in names))


def combined_digest(names: Iterable[str], digests: Iterable[str]) -> str:
    """Return one digest of the names and digests of several tensors."""
    parts = [*names, *digests]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
