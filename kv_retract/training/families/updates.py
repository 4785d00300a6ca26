"""Updates and contradictions: a later reading replaces an earlier one."""

from __future__ import annotations

from ..threads import Block, Draft, Writer, function_tool
from ..topics import draw_topic
from .base import FAMILIES, fact_block, probe


@FAMILIES.register("updates")
def updates(writer: Writer) -> Draft:
    """Write facts of which some are read again with another value; the newest reading counts.

    Example:
        tool: {"result": "The gate of flight Kel-42 is Mar."} / ... /
        tool: {"result": "The gate of flight Kel-42 is Sol."} /
        user: What is the gate of flight Kel-42? / assistant: The gate of flight Kel-42 is Sol. Without the
        second reading: The gate of flight Kel-42 is Mar.
    """
    draft = Draft()
    readings: list[list[Block]] = []
    for number in range(max(1, writer.size // 2)):
        topic, name = draw_topic(writer.rng), writer.names.code()
        old, new = writer.names.tag(), writer.names.tag()
        first, second = f"reading-{number}-1", f"reading-{number}-2"
        blocks = [fact_block(writer, topic, name, old, first, "tool_result")]
        if writer.rng.random() < 0.75:
            blocks.append(fact_block(writer, topic, name, new, second, "update"))
            draft.probes.append(probe(writer, topic.what(name), new, {second: old}))
        else:
            draft.probes.append(probe(writer, topic.what(name), old, {first: None}))
        readings.append(blocks)
        draft.tools = [function_tool(topic.tool, topic.entity, f"the {topic.attribute}")]
    draft.blocks = writer.shuffled(readings)
    return draft
