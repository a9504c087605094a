"""Nothing tuned is lost on saving: each tuned parameter is one of the tensors that are written."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zotune.errors import UsageError, listed
from zotune.llm.checkpoints.adapter_merge import is_adapter


def tuned_groups(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the names of each tuned parameter; a tied one has several.

    >>> tuned_groups(nn.Linear(2, 1))
    [('weight',), ('bias',)]
    """
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.requires_grad:
            names.setdefault(id(p), []).append(name)
    return [tuple(group) for group in names.values()]


def check_saved(model: Any, name: str) -> None:
    """Check that saving a model writes each of its tuned parameters.

    Raises:
        UsageError: it would not; the message names them.
    """
    groups = tuned_groups(model)
    if is_adapter(model) and model.active_peft_config.is_prompt_learning:
        lost = [n for n, *_ in groups if not n.startswith("prompt_encoder.") and ".modules_to_save." not in n]
    elif is_adapter(model):
        state = _adapter_state(model)
        storages = {_storage(value) for value in state.values()}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        lost = [
            group[0]
            for group in groups
            if _storage(parameters[group[0]]) not in storages and not _saved_names(model, group) & state.keys()
        ]
    else:
        ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        lost = [group[0] for group in groups if ignored.issuperset(group)]
    if lost:
        raise UsageError(
            f"{listed(lost)} of {name} would be tuned but not saved. Tune other parameters, or another adapter."
        )


def _adapter_state(model: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)  # type: ignore[no-any-return]


def _saved_names(model: Any, group: tuple[str, ...]) -> set[str]:
    """Return the names under which peft saves a parameter: without the name of the adapter."""
    return {name.replace(f".{model.active_adapter}", "") for name in group}


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
