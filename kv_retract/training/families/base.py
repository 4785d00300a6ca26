"""The contract of a task family, and what several of them share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from ...registry import Registry
from ..samples import UNKNOWN, Probe
from ..templates import ANSWER, PAGE, QUESTION
from ..threads import RESULT, Block, Draft, Mark, Writer
from ..topics import Topic

FAMILIES: Registry[Draft] = Registry("task family", "kv_retract.task_families")
"""Factories that take `writer` and return a draft."""
HELD_OUT: Final = "documents"
"""The family that no model of this project is trained on."""
PAGES: Final = 0.3
"""Share of the facts that are told inside of a page."""


def sentence(what: str, value: str) -> str:
    """Return the answer that states a fact."""
    return ANSWER.format(What=what[0].upper() + what[1:], value=value)


def two_hops(what: str, person: str, hop: str, value: str | None) -> str:
    """Return the answer that states a fact and one about its value; None stands for a second one that nobody knows."""
    second = f"the {hop} of {person}"
    return f"{sentence(what, person)[:-1]}, and " + (f"{second} is {value}." if value else f"I do not know {second}.")


def in_page(writer: Writer, fact: str, subject: str) -> tuple[str, int]:
    """Return a page of some sentences of which one is the fact, and the character at which the fact begins."""

    def around(most: int) -> list[str]:
        return [writer.say(PAGE, subject=subject) for _ in range(writer.rng.randint(0, most))]

    before = " ".join([writer.say(PAGE, subject=subject), *around(1)]) + " "
    return before + " ".join([fact, *around(2)]), len(before)


def result_of(writer: Writer, what: str, value: str, subject: str) -> str:
    """Return a tool's JSON result that states a fact, in one of the forms that tools use."""
    fact = sentence(what, value)
    forms = ({"result": fact}, {"status": "ok", "message": fact}, {"answer": fact, "source": "records"})
    if writer.rng.random() < PAGES:
        return json.dumps({"page": in_page(writer, fact, subject)[0]})
    return json.dumps(writer.rng.choice(forms))


def lookup_block(
    writer: Writer, what: str, tool: str, arguments: Mapping[str, str], *, value: str, subject: str, mark: Mark
) -> Block:
    """Return the turns in which a value is looked up; `mark` is on the result."""
    messages = writer.look_up(what, tool, arguments, result_of(writer, what, value, subject))
    return Block(messages, (mark,), (subject,))


def fact_block(writer: Writer, topic: Topic, name: str, value: str, span_id: str, kind: str) -> Block:
    """Return the turns in which a fact is looked up; its result is retractable."""
    subject = topic.subject(name)
    return lookup_block(
        writer, topic.what(name), topic.tool, {topic.entity: name}, value=value, subject=subject,
        mark=Mark(span_id, kind, subject, RESULT),
    )  # fmt: skip


def probe(writer: Writer, what: str, value: str | None, without: Mapping[str, str | None]) -> Probe:
    """Return a question for a fact; None stands for a value that nobody knows."""
    return Probe(
        question=writer.say(QUESTION, what=what),
        answer=UNKNOWN if value is None else sentence(what, value),
        without={span: UNKNOWN if v is None else sentence(what, v) for span, v in without.items()},
    )
