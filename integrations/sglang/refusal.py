"""Why the server does not do what it was asked for."""

from __future__ import annotations

from kv_retract.errors import KVRetractError

STATUS = {"bad_request": 400, "no_room": 503, "failed": 500}
"""HTTP status by reason; 409 for all others (`api.Reason`)."""


class Refused(KVRetractError):
    """Something was refused, and nothing has changed.

    Args:
        reason: one of `api.Reason`.
        message: says what was expected, what was found, and the remedy.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
