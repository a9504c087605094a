"""A shape of rows: the columns of a row, and the function from a row to what it means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zotune.llm.config.data import DataOptions
from zotune.llm.data.readers.located import LocatedRow
from zotune.llm.rows.cells import column_of
from zotune.llm.rows.records import Record
from zotune.llm.rows.templates import template_columns

# A row and the options → the meaning of the row. Errors name the row's place.
ToRecord = Callable[[LocatedRow, DataOptions], Record]


@dataclass(frozen=True)
class Shape:
    """A shape of rows.

    Attributes:
        description: the content of a row.
        template: the default prompt template; None if the prompt is made in another way.
        roles: columns that a row must have beside those in the template.
        to_record: the function from a row to its meaning.
        uses: options that this shape uses and others do not.
        optional: columns that are read where a row has them.
    """

    description: str
    template: str | None
    roles: tuple[str, ...]
    to_record: ToRecord
    uses: frozenset[str]
    optional: tuple[str, ...] = ()

    def columns(self, options: DataOptions) -> tuple[str, ...]:
        """Return the columns that a row must have."""
        return _named(self.roles_needed(options), options)

    def roles_needed(self, options: DataOptions) -> tuple[str, ...]:
        """Return the roles of the columns that a row must have."""
        template = None if self.template is None else options.template or self.template
        return (*_roles_in(template), *self.roles)

    def columns_read(self, options: DataOptions) -> tuple[str, ...]:
        """Return the columns that are read where a row has them."""
        return _named([*_roles_in(options.template or self.template), *self.roles, *self.optional], options)


def _roles_in(template: str | None) -> tuple[str, ...]:
    return () if template is None else template_columns(template)


def _named(roles: Sequence[str], options: DataOptions) -> tuple[str, ...]:
    return tuple(dict.fromkeys(column_of(role, options) for role in roles))
