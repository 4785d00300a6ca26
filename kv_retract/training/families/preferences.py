"""Preferences of the user: stated, changed, withdrawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from ...types import Message
from ..samples import UNKNOWN, Probe
from ..templates import QUESTION
from ..threads import Block, Draft, Mark, Writer
from .base import FAMILIES, sentence

THINGS: Final = (
    "hotel", "airline", "restaurant", "dentist", "garage", "tailor", "baker", "bank", "hairdresser", "grocer",
)  # fmt: skip
_STATE = (
    "My preferred {thing} is {value}.",
    "For the future: my preferred {thing} is {value}.",
    "Please note that my preferred {thing} is {value}.",
    "By the way, my preferred {thing} is {value}.",
    "I like to say it once: my preferred {thing} is {value}.",
    "Remember that my preferred {thing} is {value}.",
    "You should know that my preferred {thing} is {value}.",
)
_CHANGE = (
    "I changed my mind: my preferred {thing} is {value}.",
    "Actually, my preferred {thing} is {value}.",
    "No, wait, my preferred {thing} is {value}.",
    "From now on my preferred {thing} is {value}.",
    "Sorry, my preferred {thing} is {value}.",
    "Make that another one, my preferred {thing} is {value}.",
    "Let me correct that, my preferred {thing} is {value}.",
)
_WITHDRAW = (
    "Forget my preferred {thing}.",
    "I no longer have a preferred {thing}.",
    "Please drop my preferred {thing}.",
    "My preferred {thing} does not matter any more.",
    "There is no preferred {thing} of mine any longer.",
    "Strike my preferred {thing}.",
    "Delete what I said about my preferred {thing}.",
)
_OK = ("Understood.", "I will remember that.", "All right.", "Noted, thank you.", "Of course.")


@FAMILIES.register("preferences")
def preferences(writer: Writer) -> Draft:
    """Write preferences; some are changed and some withdrawn later.

    Example:
        user: My preferred hotel is Kel. / ... / user: Actually, my preferred hotel is Tal. / ... /
        user: What is my preferred hotel? / assistant: Your preferred hotel is Tal. Without the second statement:
        Your preferred hotel is Kel.
    """
    draft = Draft()
    stories: list[list[Block]] = []
    for number, thing in enumerate(writer.rng.sample(THINGS, min(len(THINGS), max(1, writer.size // 2)))):
        value, first, later = writer.names.tag(), f"stated-{number}", f"later-{number}"
        story, end = [_turn(writer, _STATE, thing, value, first, "preference")], writer.rng.random()
        if end < 0.4:
            new = writer.names.tag()
            story.append(_turn(writer, _CHANGE, thing, new, later, "preference"))
            draft.probes.append(_probe(writer, thing, new, {later: value}))
        elif end < 0.6:
            story.append(_turn(writer, _WITHDRAW, thing, "", later, "withdrawal"))
            draft.probes.append(_probe(writer, thing, None, {later: value}))
        else:
            draft.probes.append(_probe(writer, thing, value, {first: None}))
        stories.append(story)
    draft.blocks = writer.shuffled(stories)
    return draft


def _turn(writer: Writer, wordings: Sequence[str], thing: str, value: str, span: str, kind: str) -> Block:
    subject = f"preferred {thing}"
    messages = (
        Message("user", writer.say(wordings, thing=thing, value=value)),
        Message("assistant", writer.say(_OK)),
    )
    return Block(messages, (Mark(span, kind, subject, 0),), (f"my {subject}",))


def _probe(writer: Writer, thing: str, value: str | None, without: Mapping[str, str | None]) -> Probe:
    def answer(known: str | None) -> str:
        return UNKNOWN if known is None else sentence(f"your preferred {thing}", known)

    question = writer.say(QUESTION, what=f"my preferred {thing}")
    return Probe(question=question, answer=answer(value), without={span: answer(v) for span, v in without.items()})
