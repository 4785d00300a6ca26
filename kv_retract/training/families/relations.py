"""Two-hop relations between tool results."""

from __future__ import annotations

from ..samples import UNKNOWN, Probe
from ..templates import QUESTION
from ..threads import RESULT, Block, Draft, Mark, Writer, function_tool
from ..topics import HOPS, draw_topic, tool_name
from .base import FAMILIES, fact_block, lookup_block, sentence, two_hops


@FAMILIES.register("relations")
def relations(writer: Writer) -> Draft:
    """Write things with people and people with managers; the answer names both hops as far as they are known.

    Example:
        tool: {"result": "The owner of order Kel-42 is Tar."} / ... /
        tool: {"result": "The manager of Tar is Mol."} / ... /
        user: What is the manager of the owner of order Kel-42? / assistant: The owner of order Kel-42 is Tar,
        and the manager of Tar is Mol. Without the second result: The owner of order Kel-42 is Tar, and I do not
        know the manager of Tar. Without the first: I do not know.
    """
    draft = Draft()
    chains: list[list[Block]] = []
    tools: dict[str, str] = {}
    for number in range(max(1, writer.size // 2)):
        topic, hop = draw_topic(writer.rng, person=True), writer.rng.choice(HOPS)
        name, person, value = writer.names.code(), writer.names.tag(), writer.names.tag()
        what, second_what = topic.what(name), f"the {hop} of {person}"
        first, second = f"person-{number}", f"hop-{number}"
        known, half = sentence(what, person), two_hops(what, person, hop, None)
        tools |= {topic.attribute: topic.entity, hop: "person"}
        blocks = [fact_block(writer, topic, name, person, first, "tool_result")]
        told = writer.rng.random() < 0.8
        if told:
            mark = Mark(second, "tool_result", person, RESULT)
            arguments = {"person": person}
            blocks.append(
                lookup_block(writer, second_what, tool_name(hop), arguments, value=value, subject=person, mark=mark)
            )
        writer.rng.shuffle(blocks)
        chains.append(blocks)
        draft.probes += [
            Probe(
                question=writer.say(QUESTION, what=f"the {hop} of {what}"),
                answer=two_hops(what, person, hop, value) if told else half,
                without={first: UNKNOWN} | ({second: half} if told else {}),
            ),
            Probe(question=writer.say(QUESTION, what=what), answer=known, without={first: UNKNOWN}),
        ]  # fmt: skip
    draft.blocks = writer.shuffled(chains)
    draft.tools = [function_tool(tool_name(a), entity, f"the {a}") for a, entity in tools.items()][:2]
    return draft
