"""Devices by name, and whether they can be used here."""

from __future__ import annotations

import torch

from zotune.errors import UsageError


def find_device(name: str) -> torch.device:
    """Return a device by name; `auto` is a GPU if there is one.

    Raises:
        UsageError: the device cannot be used here.

    >>> find_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable(name, f"the device {name!r}")


def usable(place: int | str, called: str) -> torch.device:
    """Return a device by its name, or by the number of a GPU.

    Args:
        place: the name or the number.
        called: what an error calls it.

    Raises:
        UsageError: the device cannot be used here.
    """
    try:
        device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"{called} cannot be used here: {str(error).splitlines()[0]}") from None
    return device
