"""Two-hop relations between tool results."""

from __future__ import annotations

from ..samples import UNKNOWN, Probe
from ..threads import Block, Draft, Mark, Writer, function_tool
from .base import FAMILIES, result_of, sentence


@FAMILIES.register("relations")
def relations(writer: Writer) -> Draft:
    """Write orders with owners and owners with managers; the answer names both hops.

    Example:
        tool: {"result": "The owner of order Kel-42 is Tar."} / ... /
        tool: {"result": "The manager of Tar is Mol."} / ... /
        user: Who is the manager of the owner of order Kel-42? / assistant: The owner of order Kel-42 is Tar,
        and the manager of Tar is Mol. Without either result: I do not know.
    """
    draft = Draft()
    chains: list[list[Block]] = []
    for number in range(max(1, writer.size // 2)):
        order, owner, manager = writer.names.code(), writer.names.tag(), writer.names.tag()
        first, second, subject = f"owner-{number}", f"manager-{number}", f"order {order}"
        blocks = [
            Block(
                writer.look_up(
                    f"the owner of {subject}", "get_owner", {"order": order},
                    result_of(writer, f"the owner of {subject}", owner),
                ),
                (Mark(first, "tool_result", subject, 2),), (subject,),
            ),
            Block(
                writer.look_up(
                    f"the manager of {owner}", "get_manager", {"person": owner},
                    result_of(writer, f"the manager of {owner}", manager),
                ),
                (Mark(second, "tool_result", owner, 2),), (owner,),
            ),
        ]  # fmt: skip
        if writer.rng.random() < 0.5:
            blocks.reverse()
        chains.append(blocks)
        both = sentence(f"the owner of {subject}", owner)[:-1] + f", and the manager of {owner} is {manager}."
        draft.probes += [
            Probe(
                question=f"Who is the manager of the owner of {subject}?", answer=both,
                without={first: UNKNOWN, second: UNKNOWN},
            ),
            Probe(
                question=f"What is the owner of {subject}?", answer=sentence(f"the owner of {subject}", owner),
                without={first: UNKNOWN},
            ),
        ]  # fmt: skip
    draft.blocks = writer.shuffled(chains)
    draft.tools = [
        function_tool("get_owner", "order", "the owner"),
        function_tool("get_manager", "person", "a manager"),
    ]
    return draft
