"""Sentences in several wordings. The last fifth of each list, at least one, is only used by the `test` split."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .names import Split


def choose(rng: random.Random, split: Split, wordings: Sequence[str], **values: str) -> str:
    """Return one of the wordings of a split, with `{name}` replaced by values."""
    held_out = max(1, len(wordings) // 5)
    pool = wordings[-held_out:] if split == "test" and rng.random() < 0.5 else wordings[:-held_out]
    return rng.choice(pool).format(**values)


SYSTEM = (
    "You are a careful assistant. Answer in one short sentence.",
    "You help with records and bookings. Answer in one short sentence.",
    "Answer each question from what was said and looked up before, in one short sentence.",
    "You are an agent with tools. Keep your answers to one short sentence.",
    "Use what the tools returned. Reply in one short sentence.",
)
ASK = (
    "Please look up {what}.",
    "Can you check {what} for me?",
    "Search for {what}.",
    "Look up {what}, please.",
    "Find {what} in the records.",
    "Go and check {what}.",
    "Would you look up {what}?",
    "Could you check {what} in the records?",
)
DONE = (
    "I have looked that up.",
    "Done, I have it now.",
    "Thank you, that is on file now.",
    "Found it. What else?",
    "All right, I have checked.",
)
MENTION_USER = (
    "I will come back to {subject} later.",
    "Keep {subject} in mind.",
    "We will need {subject} again.",
    "Let us not forget {subject}.",
    "Remember {subject} for later.",
    "More on {subject} soon.",
    "About {subject} we talk afterwards.",
    "There is still {subject} to talk about.",
)
MENTION_ASSISTANT = (
    "Sure, I keep {subject} in mind.",
    "Yes, {subject} is on my list.",
    "I have not forgotten {subject}.",
    "Right, {subject} comes next.",
    "Fine, then {subject} it is.",
    "All right, {subject} stays on the list.",
    "Of course, we return to {subject}.",
    "Noted: {subject}.",
)
QUESTION = (
    "What is {what}?",
    "Tell me {what}.",
    "Which one is {what}?",
    "Do you know {what}?",
    "Can you tell me {what}?",
    "What was {what} again?",
    "Now, what was {what}?",
    "Please tell me again, what is {what}?",
)
PAGE = (
    "The file on {subject} was opened last spring.",
    "Nobody has asked about {subject} for a while.",
    "There are two copies of this page.",
    "Further remarks on {subject} are kept elsewhere.",
    "What follows was checked by hand.",
    "The clerk who wrote this has retired.",
    "Not much is known about {subject}.",
    "Some of the notes on {subject} are older.",
)
ANSWER = "{What} is {value}."
