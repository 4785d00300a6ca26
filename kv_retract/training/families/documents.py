"""Long documents with harmful distractors: questions over two hops, and a paragraph that states a false first hop.

In the manner of 2WikiMultiHopQA (arXiv 2011.01060), MuSiQue (arXiv 2108.00573) and IIRC (arXiv 2011.07127): gold
paragraphs, neutral ones, and one that gives a plausible false answer.
"""

from __future__ import annotations

from ...types import Message
from ..samples import Probe
from ..threads import Block, Draft, Mark, Writer
from ..topics import HOPS, draw_topic
from .base import FAMILIES, sentence, two_hops

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
    """Write things with people and people with home towns, and a later page that names a false person.

    No model of the project is trained on pages that users share, on their wordings, or on questions of which a false
    page changes the first hop. The attributes are those of the other families: a small model says no word that it
    never said in training.

    Example:
        user: Here is a page: ... The author of book Kel-42 is Tar. ... /
        user: This may help: ... The home town of Tar is Sol. ... /
        user: Another document: ... The author of book Kel-42 is Dor. ... /
        user: What is the home town of the author of book Kel-42? /
        assistant: The author of book Kel-42 is Dor, and the home town of Dor is Gren.
        Without the last page: The author of book Kel-42 is Tar, and ... is Sol.
    """
    draft = Draft()
    stories: list[list[Block]] = []
    for number in range(max(1, writer.size // 3)):
        topic, hop, name = draw_topic(writer.rng, person=True), writer.rng.choice(HOPS), writer.names.code()
        what, subject = topic.what(name), topic.subject(name)
        person, town, false, false_town = (writer.names.tag() for _ in range(4))
        distractor = f"distractor-{number}"
        gold = [
            _page(writer, sentence(what, person), subject),
            _page(writer, sentence(f"the {hop} of {person}", town), person),
            _page(writer, sentence(f"the {hop} of {false}", false_town), false),
        ]
        writer.rng.shuffle(gold)
        stories.append([*gold, _page(writer, sentence(what, false), subject, distractor)])
        one = Probe(
            question=f"What is {what}?", answer=sentence(what, false), without={distractor: sentence(what, person)}
        )
        two = Probe(
            question=f"What is the {hop} of {what}?",
            answer=two_hops(what, false, hop, false_town),
            without={distractor: two_hops(what, person, hop, town)},
        )
        draft.probes += [one, two]
    draft.blocks = writer.shuffled(stories)
    return draft


def _page(writer: Writer, fact: str, name: str, distractor: str = "") -> Block:
    before = " ".join(writer.say(_AROUND, name=name) for _ in range(2))
    content = f"{writer.say(_SHARE)} {before} {fact} {writer.say(_AROUND, name=name)}"
    start = content.index(fact)
    marks = (Mark(distractor, "distractor", name, 0, start=start, end=start + len(fact)),) if distractor else ()
    return Block((Message("user", content), Message("assistant", writer.say(_READ))), marks, (name,))
