"""The contract of a task family, and what several of them share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ...registry import Registry
from ..samples import UNKNOWN, Probe
from ..templates import ANSWER, QUESTION
from ..threads import Block, Draft, Mark, Writer

FAMILIES: Registry[Draft] = Registry("task family", "kv_retract.task_families")
"""Factories that take `writer` and return a draft."""
HELD_OUT: Final = "documents"
"""The family that no model of this project is trained on."""


@dataclass(frozen=True, slots=True)
class Topic:
    """One kind of fact: `the owner of order Kel-42`."""

    attribute: str
    entity: str
    tool: str
    value: str
    """Which method of `Names` draws the values."""

    def subject(self, name: str) -> str:
        """Return what a fact is about."""
        return f"{self.entity} {name}"

    def what(self, name: str) -> str:
        """Return the fact's name."""
        return f"the {self.attribute} of {self.subject(name)}"


TOPICS: Final = (
    Topic("owner", "order", "get_owner", "tag"),
    Topic("gate", "flight", "get_gate", "tag"),
    Topic("driver", "truck", "get_driver", "tag"),
    Topic("address", "office", "get_address", "tag"),
    Topic("password", "room", "get_password", "tag"),
    Topic("supplier", "part", "get_supplier", "tag"),
    Topic("doctor", "patient", "get_doctor", "tag"),
    Topic("shelf", "book", "get_shelf", "tag"),
)


def draw(writer: Writer, topic: Topic) -> str:
    """Return a new value for a fact."""
    value: str = getattr(writer.names, topic.value)()
    return value


def sentence(what: str, value: str) -> str:
    """Return the answer that states a fact."""
    return ANSWER.format(What=what[0].upper() + what[1:], value=value)


def result_of(writer: Writer, what: str, value: str) -> str:
    """Return a tool's JSON result that states a fact, in one of the forms that tools use."""
    fact = sentence(what, value)
    forms = ({"result": fact}, {"status": "ok", "message": fact}, {"answer": fact, "source": "records"})
    return json.dumps(writer.rng.choice(forms))


def fact_block(writer: Writer, topic: Topic, name: str, value: str, span_id: str, kind: str) -> Block:
    """Return the turns in which a fact is looked up; its result is retractable."""
    messages = writer.look_up(
        topic.what(name), topic.tool, {topic.entity: name}, result_of(writer, topic.what(name), value)
    )
    subject = topic.subject(name)
    return Block(messages, (Mark(span_id, kind, subject, 2),), (subject,))


def probe(writer: Writer, what: str, value: str | None, without: Mapping[str, str | None]) -> Probe:
    """Return a question for a fact; None stands for a value that nobody knows."""
    return Probe(
        question=writer.say(QUESTION, what=what),
        answer=UNKNOWN if value is None else sentence(what, value),
        without={span: UNKNOWN if v is None else sentence(what, v) for span, v in without.items()},
    )
