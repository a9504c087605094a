"""The ledger: a fine-tune as kilobytes; weights are a function of (base model, ledger).

Its format is specified in docs/reference/ledger-format.md.

Read `format` and `free_layout` (bytes), then `files` (reading and appending), `replay` (a whole run again) and `stream`
(one tensor at a time).
"""

from zotune.ledger.files import Ledger as Ledger
from zotune.ledger.files import LedgerWriter as LedgerWriter
from zotune.ledger.files import read as read
from zotune.ledger.format import Header as Header
from zotune.ledger.format import Layout as Layout
from zotune.ledger.format import LedgerError as LedgerError
from zotune.ledger.free_layout import FreeLayout as FreeLayout
from zotune.optim.record import StepRecord as StepRecord
