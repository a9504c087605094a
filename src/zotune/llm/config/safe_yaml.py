"""YAML's safe subset: plain values, no objects of Python, and no text that expands to more than memory holds."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml

_MAX_ALIASES = 16


class _Loader(yaml.SafeLoader):
    """A loader of YAML's safe subset that refuses repeated keys, whose value would be ambiguous, and many aliases.

    Nested lists of aliases would expand to more data than memory holds.
    """

    num_aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Override the base class."""
        self.num_aliases += self.check_event(yaml.AliasEvent)
        if self.num_aliases > _MAX_ALIASES:
            raise ValueError(f"there are more than {_MAX_ALIASES} aliases; write out their content")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Override the base class."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise ValueError(f"the key {twice!r} appears twice; keep one")
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Return the plain value of a YAML text.

    Raises:
        yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError: it is no such text; the
            parser raises errors of Python for malformed numbers and dates, and for nesting that is too deep.

    >>> parse_yaml("a: [1, 0.5]")
    {'a': [1, 0.5]}
    """
    return yaml.load(text, _Loader)
