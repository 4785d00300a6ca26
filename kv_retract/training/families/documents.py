"""Long documents with harmful distractors: questions over two hops, and a paragraph that states a false first hop.

In the manner of 2WikiMultiHopQA (arXiv 2011.01060), MuSiQue (arXiv 2108.00573) and IIRC (arXiv 2011.07127): gold
paragraphs, neutral ones, and one that gives a plausible false answer.
"""

from __future__ import annotations

from ...types import Message
from ..samples import Probe
from ..threads import Block, Draft, Mark, Writer
from .base import FAMILIES, sentence

_SHARE = ("Please read this:", "Here is a page:", "This may help:", "I found this text:", "Another document:")
_READ = ("I have read it.", "Thank you, read.", "I have gone through it.", "Read.", "I know that page now.")
_AROUND = (
    "{name} has been described in several books.",
    "There is little else in print on {name}.",
    "Later editions treat {name} only in passing.",
    "Many readers have asked about {name} over the years.",
    "The archive keeps a folder on {name}.",
)


@FAMILIES.register("documents")
def documents(writer: Writer) -> Draft:
    """Write films with directors and directors with places of birth, and a later page with a false director.

    Example:
        user: Here is a page: ... The director of film Kel-42 is Tar. ... /
        user: This may help: ... The place of birth of Tar is Sol. ... /
        user: Another document: ... The director of film Kel-42 is Dor. ... /
        user: What is the place of birth of the director of film Kel-42? /
        assistant: The director of film Kel-42 is Dor, and the place of birth of Dor is Gren.
        Without the last page: The director of film Kel-42 is Tar, and ... is Sol.
    """
    draft = Draft()
    stories: list[list[Block]] = []
    for number in range(max(1, writer.size // 3)):
        film, place, false_place = writer.names.code(), writer.names.tag(), writer.names.tag()
        director, false = writer.names.tag(), writer.names.tag()
        what = f"the director of film {film}"
        birth, distractor = "the place of birth of {}", f"distractor-{number}"
        gold = [
            _page(writer, sentence(what, director), f"film {film}"),
            _page(writer, sentence(birth.format(director), place), director),
            _page(writer, sentence(birth.format(false), false_place), false),
        ]
        writer.rng.shuffle(gold)
        stories.append([*gold, _page(writer, sentence(what, false), f"film {film}", distractor)])
        one = Probe(
            question=f"What is {what}?", answer=sentence(what, false), without={distractor: sentence(what, director)}
        )
        two = Probe(
            question=f"What is the place of birth of {what}?",
            answer=_both(what, false, false_place),
            without={distractor: _both(what, director, place)},
        )
        draft.probes += [one, two]
    draft.blocks = writer.shuffled(stories)
    return draft


def _both(what: str, director: str, place: str) -> str:
    return sentence(what, director)[:-1] + f", and the place of birth of {director} is {place}."


def _page(writer: Writer, fact: str, name: str, distractor: str = "") -> Block:
    before = " ".join(writer.say(_AROUND, name=name) for _ in range(2))
    content = f"{writer.say(_SHARE)} {before} {fact} {writer.say(_AROUND, name=name)}"
    start = content.index(fact)
    marks = (Mark(distractor, "distractor", name, 0, start=start, end=start + len(fact)),) if distractor else ()
    return Block((Message("user", content), Message("assistant", writer.say(_READ))), marks, (name,))
