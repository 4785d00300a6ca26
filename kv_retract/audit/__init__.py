"""A durable record of what was taken back, by whom and why, in which a later change shows. Start with `log`."""

from .log import AuditLog
from .reading import Verified, read, verify

__all__ = ["AuditLog", "Verified", "read", "verify"]
