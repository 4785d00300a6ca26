"""A person decides: the agent stops before a tool result is taken back, and goes on with the answer.

The bundled model knows no fares, so its answers mean little; question, decision and edit are real.
"""

from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from kv_retract import KVRetractSession, SupersededToolResult
from kv_retract.integrations.langchain import ChatKVRetract, KVRetractApprovalMiddleware
from kv_retract.policies import RequireApproval


@tool
def get_fare(city: str) -> str:
    """Look up a fare."""
    return f"A flight to {city} costs 4400 NOK."


def looked_up(call_id: str, fare: str) -> list[AnyMessage]:
    """A call that the agent made earlier, and its result."""
    call = {"name": "get_fare", "args": {"city": "Oslo"}, "id": call_id}
    return [AIMessage("", tool_calls=[call]), ToolMessage(fare, tool_call_id=call_id, name="get_fare")]


THREAD = [
    HumanMessage("What is a flight to Oslo?"),
    *looked_up("a", "A flight to Oslo costs 3900 NOK."),
    HumanMessage("Has it changed?"),
    *looked_up("b", "A flight to Oslo costs 4400 NOK."),
    HumanMessage("So what is it?"),
]


def main() -> None:
    """Run until the question, answer it, go on."""
    session = KVRetractSession.from_pretrained(policies=[RequireApproval(policy=SupersededToolResult())])
    agent = create_agent(
        ChatKVRetract(session=session, max_tokens=16),
        tools=[get_fare],
        middleware=[KVRetractApprovalMiddleware(session)],
        checkpointer=InMemorySaver(),
    )
    config = {"configurable": {"thread_id": "trip-42"}}
    [stopped] = agent.invoke({"messages": THREAD}, config)["__interrupt__"]
    for proposal in stopped.value["proposals"]:
        place = proposal["place"]
        print(f"asked: may {proposal['policy']} take back message {place['message']}? {proposal['reason']}")
    print("taken back before the answer:", len(session.history("trip-42")))

    approved = [proposal["id"] for proposal in stopped.value["proposals"]]
    agent.invoke(Command(resume={"approved": approved, "actor": "ada"}), config)
    for record in session.history("trip-42"):
        print(f"taken back after it: {record.policy}, message {record.span.message}, {record.status}")


if __name__ == "__main__":
    main()
