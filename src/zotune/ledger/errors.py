"""The error of ledgers."""

from __future__ import annotations

from zotune.errors import UsageError


class LedgerError(UsageError):
    """The file is no ledger, is damaged, or does not belong to the model or run it is used with."""
