"""Tool errors and retries: what came of a booking is what its newest attempt says."""

from __future__ import annotations

import json

from ..samples import UNKNOWN, Probe
from ..threads import RESULT, Block, Draft, Mark, Writer, function_tool
from .base import FAMILIES

_TRY = ("Please book {name}.", "Book {name} for me.", "I want to book {name}.", "Go ahead with {name}.", "Try {name}.")
_ASK = (
    "What came of {name}?",
    "How did {name} go?",
    "Tell me about {name}.",
    "And {name}?",
    "Any news of {name}?",
    "Did {name} work?",
    "Where do we stand with {name}?",
    "What about {name}?",
)
_HEARD = ("I have an answer.", "The tool has answered.", "That was answered.", "I have the outcome.", "It is done.")


@FAMILIES.register("errors")
def errors(writer: Writer) -> Draft:
    """Write bookings that fail once or twice and then go through, or do not.

    Example:
        tool: Error: The state of the booking Kel-42 is error Mar. / ... /
        tool: {"result": "The state of the booking Kel-42 is confirmed Sol."} / user: What came of the booking Kel-42? /
        assistant: The state of the booking Kel-42 is confirmed Sol. Without the second result: The state of the
        booking Kel-42 is error Mar.
    """
    draft = Draft(tools=[function_tool("book", "booking", "whether a booking works")])
    stories: list[list[Block]] = []
    for number in range(max(1, writer.size // 2)):
        name = f"booking {writer.names.code()}"
        attempts = writer.rng.choice((1, 2, 2))
        story, said = [], [UNKNOWN]
        for attempt in range(attempts):
            code = writer.names.tag()
            fails = attempt < attempts - 1 or writer.rng.random() < 0.4
            said.append(f"The state of the {name} is {'error' if fails else 'confirmed'} {code}.")
            result = f"Error: {said[-1]}" if fails else json.dumps({"result": said[-1]})
            story.append(_attempt(writer, name, result, f"attempt-{number}-{attempt}", "error" if fails else "update"))
        last = f"attempt-{number}-{attempts - 1}"
        question = writer.say(_ASK, name=f"the {name}")
        draft.probes.append(Probe(question=question, answer=said[-1], without={last: said[-2]}))
        stories.append(story)
    draft.blocks = writer.shuffled(stories)
    return draft


def _attempt(writer: Writer, name: str, result: str, span: str, kind: str) -> Block:
    request, arguments = writer.say(_TRY, name=f"the {name}"), {"booking": name.split()[-1]}
    messages = writer.exchange(request, "book", arguments, result, writer.say(_HEARD))
    return Block(messages, (Mark(span, kind, name, RESULT),), (f"the {name}",))
