"""A LangChain agent that goes on from a recorded airline thread: a policy finds the results that went stale.

The bundled model knows no airlines, so its answers mean little; what is found, edited and cached is real.
"""

from pathlib import Path

from langchain.agents import create_agent
from langchain_core.messages import convert_to_messages
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver

from kv_retract import KVRetractSession, SupersededToolResult, ToolErrorRecovered, message_to_openai
from kv_retract.integrations.langchain import ChatKVRetract, KVRetractMiddleware
from kv_retract.trace import Trace, read_traces

TRACES = Path(__file__).parent / "data" / "tau_bench_airline_sample.jsonl"


@tool
def get_reservation_details(reservation_id: str) -> str:
    """Look up a reservation."""
    return f'{{"reservation_id": "{reservation_id}", "status": "unknown"}}'


def main() -> None:
    """Feed the recorded thread in two parts and let the agent answer after each."""
    session = KVRetractSession.from_pretrained(eraser="mask", policies=[SupersededToolResult(), ToolErrorRecovered()])
    agent = create_agent(
        ChatKVRetract(session=session, max_tokens=16),
        tools=[get_reservation_details],
        middleware=[KVRetractMiddleware(session)],
        checkpointer=InMemorySaver(),
    )
    config = {"configurable": {"thread_id": "customer-26"}}
    trace = next(t for t in read_traces(TRACES) if isinstance(t, Trace))
    recorded = convert_to_messages([message_to_openai(message) for message in trace.messages])
    # The agent answers twice: in the middle of the thread, and once a failed call was repaired.
    for begin, end in ((0, 23), (23, 31)):
        state = agent.invoke({"messages": recorded[begin:end]}, config)
        answer = state["messages"][-1]
        usage = answer.usage_metadata
        print(
            f"{len(state['messages'])} messages: {usage['input_tokens']} tokens in, "
            f"{usage['input_token_details']['cache_read']} from the cache, "
            f"{len(answer.response_metadata['retractions'])} spans retracted so far"
        )
    for record in session.history("customer-26"):
        print(f"  {record.policy}: {record.span_tokens} tokens of message {record.span.message}, {record.reason}")


if __name__ == "__main__":
    main()
