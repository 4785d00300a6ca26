"""Errors that callers may meet. Each says what was expected, what came, what to do; the CLI exits with 2 on them."""

from __future__ import annotations


class KVRetractError(Exception):
    """Base of all errors that kv-retract raises on purpose."""


class UnknownNameError(KVRetractError, KeyError):
    """A registry does not know the name."""

    def __str__(self) -> str:
        """Return the message itself; KeyError would quote it."""
        return str(self.args[0]) if self.args else ""


class DuplicateNameError(KVRetractError, ValueError):
    """A registry already holds the name."""


class PluginError(KVRetractError, ImportError):
    """A part that another distribution registers by entry point cannot be imported."""


class DeviceError(KVRetractError, ValueError):
    """The device is unknown to torch, or not there."""


class MessageError(KVRetractError, ValueError):
    """A message is not in a form that can be rendered."""


class SpanError(KVRetractError, ValueError):
    """A span lies outside of the thread or cannot be located in it."""


class ColdTombstoneError(SpanError):
    """A key holds a tombstone that is not cached, or not any more: its span must be left out before a prefill."""


class UnsupportedModelError(KVRetractError, NotImplementedError):
    """The model has a mechanism that cannot be edited correctly."""


class UnsupportedError(KVRetractError, NotImplementedError):
    """The engine cannot do what was asked of it, though another engine can."""


class EraserMismatchError(KVRetractError, ValueError):
    """A learned eraser is missing, damaged, or belongs to another model."""


class LandmarkMismatchError(KVRetractError, ValueError):
    """Trained landmarks are missing, damaged, or belong to another model."""


class PoolExhaustedError(KVRetractError, MemoryError):
    """The KV pool cannot hold the thread, even after eviction."""


class CacheIntegrityError(KVRetractError, AssertionError):
    """A conservation law of the cache is broken: a slot is lost, shared twice or leaked."""


class ThreadBusyError(KVRetractError, RuntimeError):
    """The thread is decoding; it cannot be edited now."""


class ServerError(KVRetractError, ConnectionError):
    """A server cannot be reached, refuses a request, or fails at it."""


class LedgerError(KVRetractError, ValueError):
    """A ledger file is corrupt, unreadable or of another version."""


class AuditError(KVRetractError, ValueError):
    """An audit log was changed, is corrupt or of another version, or cannot be read or written."""


class WindowFileError(KVRetractError, ValueError):
    """A window file was made for another model or other sizes, is in use, or cannot be read or written."""


class TraceError(KVRetractError, ValueError):
    """A trace, or one line of it, cannot be read."""


class PolicyError(KVRetractError, RuntimeError):
    """A policy failed or proposed something malformed."""


class OutputExistsError(KVRetractError, FileExistsError):
    """An output folder is there already; results are never overwritten."""


class ConstraintError(KVRetractError, ValueError):
    """An answer cannot be constrained as asked: the schema or the tool choice cannot be turned into a grammar."""
