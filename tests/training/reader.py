"""A reader of traces that knows the wordings, and nothing else of their writers: it answers from the text alone."""

import json
import re
from itertools import chain

from kv_retract.training.families import errors, injections, preferences
from kv_retract.training.samples import UNKNOWN
from kv_retract.training.templates import QUESTION

NAME = r"[A-Z][a-z]+(?:-\d\d)?"
"""A word, a tag, or a code."""
FACT = re.compile(rf"The ((?:\w+ )+of (?:[a-z]+ )*{NAME}) is ((?:error |confirmed )?{NAME})\.")


def pattern(wording, **values):
    """Return a regular expression for a wording, with a group per placeholder."""
    parts = re.split(r"\{(\w+)\}", wording)
    return "".join(f"(?P<{p}>{values.get(p, NAME)})" if i % 2 else re.escape(p) for i, p in enumerate(parts))


def any_of(wordings, **values):
    """Return a function that matches a text as one of several wordings: their placeholders, or None."""
    compiled = [re.compile(pattern(wording, **values)) for wording in wordings]
    return lambda text: next((m.groupdict() for c in compiled if (m := c.fullmatch(text))), None)


_WHAT = r"(?:the|my) .+"
_lie = any_of((*injections._EVERYTHING, *injections._ONE), what=_WHAT)
_stated = any_of((*preferences._STATE, *preferences._CHANGE), thing=r"[a-z]+")
_withdrawn = any_of(preferences._WITHDRAW, thing=r"[a-z]+")
_outcome = any_of(errors._ASK, name=f"the booking {NAME}")
_simple = any_of(QUESTION, what=_WHAT)


class Reader:
    """Knows what a trace tells at its end: the newest reading of everything."""

    def __init__(self, messages):
        self.facts, self.preferred, self.lies = {}, {}, {}
        for message in messages:
            if message.role == "tool":
                self._result(message.content)
            elif message.role == "user":
                self._statement(message.content)

    def answer(self, question):
        """Return the right answer, in the form in which the corpus gives it."""
        if asked := _outcome(question):
            what = f"the state of {asked['name']}"
            return self._say(what, self.facts.get(what))
        what = (_simple(question) or re.fullmatch(r"Who is (?P<what>.*)\?", question))["what"]
        if what.startswith("my preferred "):
            thing = what.removeprefix("my preferred ")
            return self._say(f"your preferred {thing}", self.preferred.get(thing))
        if hops := re.fullmatch(r"the ([a-z ]+) of (the .*)", what):
            if (middle := self.facts.get(hops[2])) is None:
                return UNKNOWN
            second = f"the {hops[1]} of {middle}"
            known = f"{second} is {self.facts[second]}" if second in self.facts else f"I do not know {second}"
            return f"{self._say(hops[2], middle)[:-1]}, and {known}."
        return self._say(what, self.lies.get(what, self.lies.get("everything", self.facts.get(what))))

    def _say(self, what, value):
        return UNKNOWN if value is None else f"{what[0].upper()}{what[1:]} is {value}."

    def _result(self, content):
        first, _, rest = content.partition("\n")
        if first.startswith("{"):
            for value in json.loads(first).values():
                self._statement(str(value))
        else:
            self._statement(first)
        if lie := _lie(rest):
            self.lies[lie.get("what", "everything")] = lie["value"]

    def _statement(self, text):
        for what, value in FACT.findall(text):
            self.facts[f"the {what}"] = value
        if said := _stated(text):
            self.preferred[said["thing"]] = said["value"]
        elif dropped := _withdrawn(text):
            self.preferred.pop(dropped["thing"], None)


def texts(messages):
    """Return every text of a thread that a model reads."""
    return list(chain.from_iterable((m.content, *(c.arguments for c in m.tool_calls)) for m in messages))
