"""Filler that reads like a thread: small talk and small errands about things that no probe asks for."""

from __future__ import annotations

import json
from typing import Final

from ..types import Message
from .threads import Block, Writer

_TALK: Final = (
    (("How is the weather in {a}?", "What is it like in {a} today?"), ("I cannot see the weather.", "I do not know.")),
    (("Thank you, that helps.", "Great, thanks."), ("You are welcome.", "Any time.")),
    (("My colleague {a} says hello.", "{a} sends regards."), ("That is kind.", "Please greet them from me.")),
    (("The meeting with {a} is over.", "I am back from {a}."), ("Good to hear.", "How was it?")),
    (("It was {n} minutes of waiting again.", "The queue took {n} minutes."), ("I am sorry.", "That is long.")),
    (("I am writing this on the train to {a}.", "The train to {a} is late."), ("Have a good trip.", "Safe travels.")),
    (("Can you speak more plainly?", "Please keep it short."), ("Sure.", "I will.")),
    (("{a} and {b} are both closed on Monday.", "On Monday {a} and {b} are closed."), ("Good to know.", "I see.")),
)


def filler(writer: Writer) -> Block:
    """Return one block of filler: a turn of small talk, or an errand with a tool."""
    if writer.rng.random() < 0.25:
        return _errand(writer)
    asks, replies = writer.rng.choice(_TALK)
    values = {"a": writer.names.word(), "b": writer.names.word(), "n": str(writer.rng.randrange(10, 100))}
    return Block(
        (
            Message("user", writer.rng.choice(asks).format(**values)),
            Message("assistant", writer.rng.choice(replies)),
        )
    )


def _errand(writer: Writer) -> Block:
    city, degrees = writer.names.word(), writer.rng.randrange(-20, 40)
    sky = writer.rng.choice(("clear", "cloudy", "rain", "snow", "fog"))
    result, reply = json.dumps({"sky": sky, "degrees": degrees}), f"It is {degrees} degrees there, {sky}."
    return Block(writer.exchange(f"What is the weather in {city}?", "get_weather", {"city": city}, result, reply))
