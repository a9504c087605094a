"""What a Trainer writes into a model card, where it speaks of the optimizer that it would have used."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import zotune
from zotune.system.atomic_write import atomic_write

TAGS = ("zotune", "zeroth-order")
"""The tags of a model that was tuned by forward passes."""

_OPTIMIZER = re.compile(r"^- optimizer: .*(\n(?!- |\n).*)*", re.MULTILINE)


def with_tags(tags: str | Iterable[str] | None) -> list[str]:
    """Return the tags of a card, ours among them.

    >>> with_tags("mine"), with_tags(None)
    (['mine', 'zotune', 'zeroth-order'], ['zotune', 'zeroth-order'])
    """
    given = [tags] if isinstance(tags, str) else list(tags or ())
    return [*given, *(tag for tag in TAGS if tag not in given)]


def name_the_optimizer(card: Path, method: str) -> None:
    """Name the method in a card in place of the optimizer of back-propagation that the Trainer's arguments name."""
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    line = f"- optimizer: {method} of zotune {zotune.__version__}, by forward passes alone"
    named = _OPTIMIZER.sub(lambda _: line, text)
    if named != text:
        with atomic_write(card) as temporary:
            temporary.write_text(named, encoding="utf-8")
