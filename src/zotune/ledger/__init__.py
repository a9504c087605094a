"""The ledger: a fine-tune as kilobytes; weights are a function of (base model, ledger). Format: docs/ledger.md."""

from zotune.ledger.files import Ledger as Ledger
from zotune.ledger.files import LedgerWriter as LedgerWriter
from zotune.ledger.files import read as read
from zotune.ledger.format import Header as Header
from zotune.ledger.format import Layout as Layout
from zotune.ledger.format import LedgerError as LedgerError
from zotune.optim.record import StepRecord as StepRecord
