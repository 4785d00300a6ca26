"""Facts from tool results, looked up later."""

from __future__ import annotations

from ..threads import Draft, Writer, function_tool
from ..topics import draw_topic
from .base import FAMILIES, fact_block, probe


@FAMILIES.register("facts")
def facts(writer: Writer) -> Draft:
    """Write independent facts, each from a tool result that may be taken back.

    Example:
        user: Please look up the owner of order Kel-42. / assistant: get_owner(order="Kel-42") /
        tool: {"result": "The owner of order Kel-42 is Tal."} / ... / user: What is the owner of order Kel-42? /
        assistant: The owner of order Kel-42 is Tal. Without the result: I do not know.
    """
    draft, used = Draft(), []
    for number in range(writer.size):
        topic, name = draw_topic(writer.rng), writer.names.code()
        value, span = writer.names.tag(), f"fact-{number}"
        draft.blocks.append(fact_block(writer, topic, name, value, span, "tool_result"))
        draft.probes.append(probe(writer, topic.what(name), value, {span: None}))
        used.append(topic)
    stranger = draw_topic(writer.rng)
    draft.probes.append(probe(writer, stranger.what(writer.names.code()), None, {}))
    draft.tools = [function_tool(t.tool, t.entity, f"the {t.attribute}") for t in used[:2]]
    return draft
