"""Forward passes that end partway: which modules one has entered, what one of them gave out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class _Reached(Exception):  # noqa: N818 - not an error: it ends a forward pass that has done its work
    pass


def entered(model: nn.Module, until: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The modules that a forward pass of a language model enters, in order, up to the first that `until` holds for.

    The order of registration does not tell: OPT registers its final norm before its layers.
    """
    found: list[nn.Module] = []

    def note(module: nn.Module, args: Any) -> None:
        found.append(module)
        if until(module):
            raise _Reached

    handles = [m.register_forward_pre_hook(note) for m in model.modules()]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def output_of(module: nn.Module, run: Callable[[], object]) -> Any:
    """What `module` gives out when `run` runs the model; what would come after it is not computed."""
    caught: list[Any] = []

    def catch(module: nn.Module, args: Any, output: Any) -> None:
        caught.append(output)
        raise _Reached

    handle = module.register_forward_hook(catch)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught.pop()
