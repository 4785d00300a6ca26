"""A thread's own clock: its messages carry no time, but its answers can be counted."""

from __future__ import annotations

from collections.abc import Sequence

from ..types import Message


def answers_after(messages: Sequence[Message]) -> list[int]:
    """Return for every message how many assistant messages follow it: the steps since."""
    after = [0] * len(messages)
    answers = 0
    for index in range(len(messages) - 1, -1, -1):
        after[index] = answers
        answers += messages[index].role == "assistant"
    return after
