"""Durable retraction state: where records are kept, and to which messages they apply."""

from .base import Ledger
from .memory import MemoryLedger
from .sqlite import SqliteLedger
from .windows import applicable, record_for, standing

__all__ = ["Ledger", "MemoryLedger", "SqliteLedger", "applicable", "record_for", "standing"]
