"""Statements that a user took back or replaced."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ..errors import PolicyError
from ..ledger.recent import Kept, remembered
from ..ledger.sentences import Sentence, content_words, sentences
from ..types import Guarantee, Message, Retraction, SpanRef
from .base import PolicyContext, RetractionPolicy, register_policy
from .revocation_cues import Cue, Form, cues, hide_quotes, may_have_cues
from .statements import LONGEST_SENTENCE, Match, Statement, Statements, asserts
from .value_kinds import value_kinds

_PREVIOUS_SCORE = 0.7
_UNKNOWN_VALUE_SCORE = 0.5
_RESTATEMENTS = 8
"""How many assistant messages behind a statement may restate it."""


@register_policy("user_revoked")
@dataclass(kw_only=True)
class UserRevoked(RetractionPolicy):
    """Retract what a user said once the user takes it back or replaces it; English only, by rules.

    It looks for cues in user messages ("forget my seat preference", "actually, make it aisle", "12 May, not 21",
    "scratch that"), takes the topic, the wrong words or the kind of value from the cue, and proposes the newest
    earlier clause of the user that is about it. The sentence that takes back stays: it tells the new value. Nothing
    is proposed where no earlier clause fits, so most cues that are none ("actually" as a filler) find nothing.

    False positives: a cue that means something else on the same topic ("forget the hotel for a moment"); "scratch
    that" said to an action of the assistant and not to the user's own statement; a new wish beside an old one
    ("actually, I also need a seat for my son") where both hold; an earlier clause that shares the words but says more
    than what is taken back. False negatives: other languages, irony, topics named by a synonym ("forget the booze"), a
    correction inside of one sentence, a new value without any cue.
    """

    name: ClassVar[str] = "user_revoked"

    cues: Sequence[str] = ()
    """More regular expressions that find a withdrawal in one sentence, without regard to case. What is withdrawn is
    the group `topic`; without such a group it is the statement before."""
    min_score: float = 0.5
    """How well an earlier clause must fit, from 0 to 1; becomes the confidence of the proposal."""
    include_restated: bool = False
    """Whether sentences of the assistant go too that repeat all content words of the statement, before it was taken
    back."""
    guarantee: Guarantee = Guarantee.STEERED
    _readers: Kept[_Readers] = field(default_factory=lambda: Kept(_readers), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Accept the guarantee as text; raises PolicyError where a parameter is malformed."""
        self.guarantee = Guarantee(self.guarantee)
        if not 0 <= self.min_score <= 1:
            raise PolicyError(f"expected a min_score from 0 to 1, got {self.min_score!r}; 0.5 is the default")
        if isinstance(self.cues, str):
            raise PolicyError(f"expected a list of regular expressions as cues, got {self.cues!r}; put it into a list")
        self._patterns()

    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Return the withdrawn clauses, in the order in which they were taken back."""
        found: dict[SpanRef, Retraction] = {}
        for number, match in self._withdrawn(ctx.messages):
            for span in self._spans(ctx.messages, match.statement, number):
                found.setdefault(
                    span,
                    Retraction(
                        span=span,
                        policy=self.name,
                        reason=f"the user took it back or replaced it in message {number}",
                        guarantee=self.guarantee,
                        confidence=round(match.score, 2),
                    ),
                )
        return list(found.values())

    def _withdrawn(self, messages: Sequence[Message]) -> Iterator[tuple[int, Match]]:
        patterns, said = self._patterns(), Statements()
        read, cues_in = self._readers.of()
        before = _Turn(0, "")
        for number, message in enumerate(messages):
            if message.role != "user":
                continue
            text, may_have_cues = read(message.content)
            turn = _Turn(number, text)
            if not (patterns or may_have_cues):
                said.add(number, turn.text)
                before = turn
                continue
            turn.said = []
            for part, found in cues_in(turn.text):
                readings: list[Cue] = []
                if part.end - part.start <= LONGEST_SENTENCE:
                    readings = [*_added(patterns, part.of(turn.text)), *found]
                    match = self._resolved(readings, said, turn if turn.said else before, number)
                    if match:
                        yield number, match
                # What only takes back states nothing that could be taken back itself.
                states = not readings or any(cue.form not in (Form.ABOUT, Form.PREVIOUS) for cue in readings)
                turn.said.append((part, states))
                if states:
                    said.add(number, turn.text, part)
            before = turn

    def _resolved(self, readings: Sequence[Cue], said: Statements, recent: _Turn, number: int) -> Match | None:
        """Return what the first reading that finds something takes back."""
        for cue in readings:
            match = _meant(cue, said, recent, number)
            if match and match.score >= self.min_score:
                return match
        return None

    def _spans(self, messages: Sequence[Message], statement: Statement, until: int) -> Iterator[SpanRef]:
        yield _span(messages, statement.message, statement.range)
        if not self.include_restated or not statement.stems:
            return
        later = (i for i in range(statement.message + 1, until) if messages[i].role == "assistant")
        for _, number in zip(range(_RESTATEMENTS), later, strict=False):
            text = messages[number].content
            for sentence in sentences(text):
                if statement.stems <= set(content_words(sentence.of(text))):
                    yield _span(messages, number, sentence)

    def _patterns(self) -> list[re.Pattern[str]]:
        try:
            return [re.compile(cue, re.IGNORECASE) for cue in self.cues]
        except (re.error, TypeError) as error:
            raise PolicyError(f"expected regular expressions as cues, got {self.cues!r}: {error}") from error


@dataclass
class _Turn:
    """A user message, for "scratch that"."""

    number: int
    text: str
    said: list[tuple[Sentence, bool]] | None = None
    """Sentences so far, and whether each states something; None: all of the text."""

    def last(self, number: int) -> Statement | None:
        """Return the sentence before in message `number`, or the last of an earlier message that asserts something."""
        said = [(part, True) for part in sentences(self.text)] if self.said is None else self.said
        for part, states in reversed(said):
            text = part.of(self.text)[:LONGEST_SENTENCE]
            if self.number == number or asserts(text):
                return Statement(self.number, part, text, frozenset(content_words(text))) if states else None
        return None


_Readers = tuple[Callable[[str], tuple[str, bool]], Callable[[str], list[tuple[Sentence, tuple[Cue, ...]]]]]


def _readers() -> _Readers:
    return remembered(_read), remembered(_cues_in)


def _read(content: str) -> tuple[str, bool]:
    """Return a message without what it quotes, and whether some cue may be in it."""
    text = hide_quotes(content)
    return text, may_have_cues(text)


def _cues_in(text: str) -> list[tuple[Sentence, tuple[Cue, ...]]]:
    """Return the sentences of a text, each with its readings; long ones are not read."""
    parts = list(sentences(text))
    following = [*(part.of(text)[:LONGEST_SENTENCE] for part in parts[1:]), ""]
    return [
        (part, tuple(cues(part.of(text), next_)) if part.end - part.start <= LONGEST_SENTENCE else ())
        for part, next_ in zip(parts, following[: len(parts)], strict=True)
    ]


def _added(patterns: Sequence[re.Pattern[str]], sentence: str) -> Iterator[Cue]:
    for pattern in patterns:
        match = pattern.search(sentence)
        if match:
            topic = match.groupdict().get("topic")
            yield Cue(Form.ABOUT, topic) if topic else Cue(Form.PREVIOUS)


def _meant(cue: Cue, said: Statements, recent: _Turn, number: int) -> Match | None:
    if cue.form is Form.WRONG:
        return said.with_words(cue.text)
    if cue.form is Form.PREVIOUS:
        return _previous(recent, number, _PREVIOUS_SCORE)
    if cue.form is Form.WISH:
        return said.wish(cue.text)
    if cue.form is not Form.VALUE:
        return said.about(cue.text)
    match = said.with_other_value(cue.text)
    if match or not cue.pronoun or value_kinds(cue.text):
        return match
    # "Make it louder": nothing tells what "it" is but the place.
    return _previous(recent, number, _UNKNOWN_VALUE_SCORE)


def _previous(recent: _Turn, number: int, score: float) -> Match | None:
    statement = recent.last(number)
    return None if statement is None else Match(statement, score)


def _span(messages: Sequence[Message], message: int, range: Sentence) -> SpanRef:
    whole = range == (0, len(messages[message].content))
    return SpanRef(message) if whole else SpanRef(message, "content", 0, range.start, range.end)
