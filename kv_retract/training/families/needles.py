"""Needles: single sentences at any depth of a long thread."""

from __future__ import annotations

from ...types import Message
from ..threads import Block, Draft, Mark, Writer
from ..topics import draw_topic
from .base import FAMILIES, PAGES, in_page, probe, sentence

_OPEN = ("For later:", "Just so you know.", "Before I forget it.", "One thing.", "Remember this.")
_OK = ("I will keep that.", "Understood.", "All right.", "Kept.", "Very well.")


@FAMILIES.register("needles")
def needles(writer: Writer) -> Draft:
    """Write a few facts that the user states among other things.

    Example:
        user: For later: The password of room Kel-42 is Mar. / ... /
        user: What is the password of room Kel-42? / assistant: The password of room Kel-42 is Mar. Without the
        sentence: I do not know.
    """
    draft = Draft()
    for number in range(max(1, writer.size // 2)):
        topic, name = draw_topic(writer.rng), writer.names.code()
        value, subject = writer.names.tag(), topic.subject(name)
        opening, fact = writer.say(_OPEN), sentence(topic.what(name), value)
        page, at = in_page(writer, fact, subject) if writer.rng.random() < PAGES else (fact, 0)
        start = len(opening) + at  # the space before the fact belongs to it
        mark = Mark(f"needle-{number}", "needle", subject, 0, start=start, end=start + 1 + len(fact))
        messages = Message("user", f"{opening} {page}"), Message("assistant", writer.say(_OK))
        draft.blocks.append(Block(messages, (mark,), (subject,)))
        draft.probes.append(probe(writer, topic.what(name), value, {mark.span_id: None}))
    return draft
