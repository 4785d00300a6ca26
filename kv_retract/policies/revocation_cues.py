"""How people say, in English, that an earlier statement of theirs does not hold any more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple


class Form(StrEnum):
    """How a cue tells what it takes back."""

    ABOUT = "about"
    """It names the topic: "forget my seat preference"."""
    PREVIOUS = "previous"
    """It points at what was said last: "scratch that"."""
    WRONG = "wrong"
    """It repeats the wrong words: "12 May, not 21"."""
    SUBJECT = "subject"
    """It says something else of the same subject: "actually, my hotel is the Astoria"."""
    VALUE = "value"
    """It gives another value, for a pronoun or for nothing: "make it aisle"."""
    WISH = "wish"
    """It wishes something else: "actually, I'd like an aisle seat"."""


class Cue(NamedTuple):
    """What one sentence takes back."""

    form: Form
    text: str = ""
    """Topic, wrong words, subject, value or wish; empty for PREVIOUS."""
    pronoun: bool = False
    """Whether the value is for "it" or "that"."""


_NOT = r"(?:do|does|did|is|are|am|was|were|wo|ca|would|could|should|have|has)(?:n['’]?t| not)|['’](?:m|re) not|can ?not"
# A cue may stand at the beginning of a clause, or behind words that lead to it, but not behind "don't" or "if".
_START = (
    r"(?:^|[,;:.!–—-] *|\b(?:please|just|ok|okay|so|oh|well|and|but|wait|sorry|actually|hmm|then|now|also|let['’]?s"
    r"|you can|you may|you should|(?:can|could|would|will) you|(?:want|like|need) you to|please do),? +)(?:please +"
    r"|just +)?"
)
_VERB = (
    r"(?:forget|disregard|ignore|scratch|strike|drop|delete|remove|never ?mind|discard|cancel|undo|retract|erase"
    r"|withdraw|take back)(?: about)?"
)
_SOFT_VERB = r"(?:forget|disregard|scratch|never ?mind)(?: about)?"
_SAID = (
    r"(?:what(?:ever)?|everything|anything|all|the (?:part|bit|thing))(?: that)? I(?:['’](?:ve|d)| have"
    r"| had)?(?: just)?"
    r" (?:said|told|wrote|asked|mention(?:ed)?|requested|stated)(?: you)?(?: for)?"
    r"(?: earlier| before| above| previously)?"
)
_NOUN = (
    r"(?:preferences?|requests?|wish(?:es)?|instructions?|messages?|comments?|remarks?|statements?|requirements?"
    r"|choices?)"
)
_TOPIC = r"(?P<topic>[^,;:!?–—]+)"
_LATER = r"(?:any ?more|any longer|no longer|after all)"

_ABOUT = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"{_START}{_VERB} {_SAID} (?:about|on|regarding|concerning|to) {_TOPIC}",
        rf"{_START}{_VERB} my (?P<topic>(?:(?!{_NOUN})[\w'’-]+ ){{0,4}}{_NOUN}"
        r"(?: (?:for|about|on|to|of|that) [^,;:!?–—]+)?)",
        rf"{_START}(?:{_VERB}) (?P<topic>my (?:preferred|favou?rite) [^,;:!?–—]+)",
        rf"{_START}{_SOFT_VERB} (?P<topic>(?:the|my|our|that|those|this|any)(?! (?:last|previous)\b) \w[^,;:!?–—]*)",
        rf"\bI(?:['’]ve| have)?(?: just)? changed my mind (?:about|on|regarding|concerning) {_TOPIC}",
        rf"\b(?:I|we)(?:['’](?:m|re|ve)| am| are| have)? no longer {_TOPIC}",
        rf"\b(?:I|we)(?: really| also)? ?(?:{_NOT}) (?P<topic>[^,;:!?–—]+?) {_LATER}",
        rf"\b(?P<topic>(?:my|our) [^,;:!?–—]+?) (?:(?:is|are) no longer\b|no longer matters?\b"
        rf"|(?:{_NOT})\b[^,;:!?–—]*? (?:matter\b|{_LATER}))",
        r"\bthe (?P<topic>[^,;:!?–—]+?) (?:(?:is|are) no longer|(?:is|are)(?:n['’]?t| not)) "
        r"(?:needed|necessary|required|important|relevant)",
        rf"\bthere (?:is|are) (?:no(?: longer)?|not) (?P<topic>[^,;:!?–—]+?) {_LATER}",
        rf"\bI (?:was (?:wrong|mistaken) about|made a mistake (?:about|with|in)|got (?=.* wrong\b)"
        rf"|gave (?:you )?the wrong) {_TOPIC}",
    )
)
_PREVIOUS = re.compile(
    rf"{_START}(?:scratch|strike|disregard|ignore|forget|never ?mind)(?: about)? (?:that|this)"
    r"(?= *(?:$|[.,;:!–—-]|and\b|please\b|last\b|one\b|part\b|bit\b|for now\b))"
    rf"|{_START}{_VERB} (?:{_SAID}|my (?:last|previous) (?:{_NOUN}|sentence))[ .!]*$"
    r"|\bI take (?:that|it) back\b|\bI misspoke\b",
    re.IGNORECASE,
)
_INTRO = re.compile(
    r"^(?:(?:oh|ah|hmm|well|ok|okay|and|but|no)\b[, ]*)*(?:actually|sorry|oops|no,? wait|wait|hold on|correction"
    r"|change of plans?|on second thoughts?|from now on|let me correct (?:that|myself)|my (?:mistake|bad)"
    r"|I misspoke|I was wrong|instead"
    r"|I(?:['’]ve| have)?(?: just)? changed my mind|(?:scratch|strike|forget|never ?mind|make)(?: (?:that|this|it))"
    r"(?: another one)?|never ?mind)\b[ ,.:;!–—-]*",
    re.IGNORECASE,
)
_MARKED = re.compile(
    r"\b(?:sorry|oops|meant|mean|correction|actually|mistake|misspoke|wrong|make (?:it|that)"
    r"|should (?:be|have been))\b|^no\b",
    re.IGNORECASE,
)
_NEGATED = re.compile(
    r"(?:[,;–—-] *|(?<=\d) )(?:and )?not(?: for| on| at| to)? (?P<wrong>[^,;:!?–—]+?)[ .!]*$", re.IGNORECASE
)
_NOT_BUT = re.compile(r"\bnot (?P<wrong>[^,;:!?–—]+?),? but\b", re.IGNORECASE)
_INSTEAD_OF = re.compile(
    r"^(?:[\w'’]+,? ){0,4}?(?:I['’]d|I would|make|let['’]?s|use|book|prefer|want|take|choose|send)\b.*?"
    r"\b(?:instead of|rather than) (?P<wrong>[^,;:!?–—]+?)[ .!]*$",
    re.IGNORECASE,
)
_SAID_BUT_MEANT = re.compile(r"\bI (?:said|wrote) (?P<wrong>[^,;:!?–—]+?),? (?:but|when) I mean[t]?\b", re.IGNORECASE)
_SUBJECT = re.compile(
    r"^(?:that )?(?P<subject>(?:my|our|the) (?:(?!is\b|are\b)[\w'’-]+ ){0,4}?(?!is\b|are\b)[\w'’-]+) "
    r"(?:is|are|should be|will be|has changed)\b(?! (?:not|no)\b)",
    re.IGNORECASE,
)
_SUBJECT_NOW = re.compile(
    r"\b(?P<subject>(?:my|our) (?:[\w'’-]+ ){0,3}?[\w'’-]+) (?:(?:is|are) (?:now|actually)|has changed)\b",
    re.IGNORECASE,
)
_MAKE_IT = re.compile(
    r"^(?:please |can you |could you |let['’]?s |we |just )*(?:make|change|switch|set) (?:it|that|this|them)"
    r"(?: to)? (?P<value>[^,;!?]+)",
    re.IGNORECASE,
)
_GO_WITH = re.compile(
    r"^(?:let['’]?s|we['’]ll|I['’]ll) (?:go (?:with|for)|do|have|take) (?P<value>[^,;!?]+)", re.IGNORECASE
)
_WISH = re.compile(
    r"^(?:I|we)(?:['’]d| would| do|['’]ll)?(?: rather| now| only)*(?: prefer| like| want| need| have| take| meant?"
    r"| sit| fly"
    r"| stay)+ (?:to )?(?P<wish>[^,;!?]+)"
    r"|^(?:please )?(?:write|use|book|send|play|order|reserve|put|call|schedule) (?P<order>[^,;!?]+)",
    re.IGNORECASE,
)
_FRAGMENT_WORDS = 5

_TRIGGERS = (
    "forget", "disregard", "ignore", "scratch", "strike", "drop", "delete", "remove", "mind", "discard", "cancel",
    "undo", "retract", "erase", "withdraw", "back", "longer", "anymore", "any more", "after all", "matter", "wrong",
    "mistake", "needed", "necessary", "required", "important", "relevant", "misspoke", "actually", "sorry", "oops",
    "wait", "hold on", "correct", "change", "thought", "from now on", "my bad", "instead", "rather", "not", "mean",
    "make", "is now", "are now", "switch",
)  # fmt: skip
# Every cue has one of them. Plain look-ups are several times faster than one expression of them all.

_QUOTED = re.compile(r"\"[^\"\n]{1,300}\"|“[^”\n]{1,300}”|«[^»\n]{1,300}»|`[^`\n]{1,300}`|^[ \t]*>.*$", re.MULTILINE)
_BLOCKED = re.compile(rf"\b(?:{_NOT}|don['’]?t|never|not|if|unless|whether|did|when)\b[^,;:.!?]*$", re.IGNORECASE)
_GOODBYE = re.compile(r"\b(?:bye|goodbye|thanks|thank you|that['’]s all|that is all|good night)\b|###", re.IGNORECASE)
_ASKS = re.compile(r"\b(?:can|could|would|will) (?:you|we|I)\b", re.IGNORECASE)


def hide_quotes(text: str) -> str:
    """Return a text of the same length with what it quotes left blank: quoted cues are somebody else's."""
    return _QUOTED.sub(lambda match: " " * len(match[0]), text)


def may_have_cues(text: str) -> bool:
    """Whether a cheap look finds a word that some cue has."""
    lower = text.lower()
    return any(trigger in lower for trigger in _TRIGGERS)


def cues(sentence: str, following: str = "") -> Iterator[Cue]:
    """Yield the readings of a sentence as a withdrawal, the surest first; the first that can be resolved counts.

    Args:
        sentence: one sentence of a user, quotes hidden.
        following: the next sentence of the same message: it may hold the new value.
    """
    question = sentence.rstrip().endswith("?")
    if (question and not _ASKS.search(sentence)) or not may_have_cues(sentence):
        return
    yield from _wrong(sentence)
    intro = _INTRO.match(sentence)
    now = _SUBJECT_NOW.search(sentence)
    if now:
        yield Cue(Form.SUBJECT, now["subject"])
    if intro:
        rest = sentence[intro.end() :] or following
        yield from _replacement(rest, intro=True)
    yield from _replacement(sentence, intro=False)
    for pattern in _ABOUT:
        match = pattern.search(sentence)
        if match and not _BLOCKED.search(sentence, 0, match.start() + 1):
            yield Cue(Form.ABOUT, match["topic"])
    match = _PREVIOUS.search(sentence)
    if match and not _BLOCKED.search(sentence, 0, match.start() + 1) and not _GOODBYE.search(sentence + following):
        yield Cue(Form.PREVIOUS)


def _wrong(sentence: str) -> Iterator[Cue]:
    short = len(sentence.split()) <= 8
    for pattern in (_NOT_BUT, _NEGATED):
        match = pattern.search(sentence)
        if match and (_MARKED.search(sentence) or (short and match.start() > 0)) and len(match["wrong"].split()) <= 5:
            yield Cue(Form.WRONG, match["wrong"])
    for pattern in (_INSTEAD_OF, _SAID_BUT_MEANT):
        match = pattern.search(sentence)
        if match and len(match["wrong"].split()) <= 6:
            yield Cue(Form.WRONG, match["wrong"])


def _replacement(text: str, *, intro: bool) -> Iterator[Cue]:
    instead = intro or re.search(r"\binstead\b", text, re.IGNORECASE) is not None
    subject = _SUBJECT.search(text) if intro else None
    if subject:
        yield Cue(Form.SUBJECT, subject["subject"])
        return
    if match := _MAKE_IT.search(text):
        yield Cue(Form.VALUE, match["value"], pronoun=True)
    elif instead and (match := _GO_WITH.search(text)):
        yield Cue(Form.VALUE, match["value"])
    elif instead and (match := _WISH.search(text)):
        yield Cue(Form.WISH, match["wish"] or match["order"])
    elif intro and 0 < len(text.split()) <= _FRAGMENT_WORDS:
        yield Cue(Form.VALUE, text)
