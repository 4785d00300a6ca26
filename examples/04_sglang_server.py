"""An agent on an SGLang server: a tool result proves wrong, is erased in the server's cache, and the answer changes.

Usage: kv-retract serve --port 30000    (in an environment with SGLang, see docs/sglang.md)
       python examples/04_sglang_server.py http://127.0.0.1:30000

The bundled model is small, but it calls the tool, reads what comes back, and answers from it.
"""

import json
import sys
from uuid import uuid4

from langchain.agents import create_agent
from langchain_core.messages import AIMessageChunk
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver

from kv_retract import Explicit, Planner
from kv_retract.integrations.langchain import ChatKVRetract, KVRetractMiddleware
from kv_retract.integrations.sglang.engine import connect

WRONG = "The gate of flight Kel-42 is Sol."
READINGS = ["The gate of flight Kel-42 is Mar.", WRONG]


@tool
def get_gate(flight: str) -> str:
    """Look up the gate."""
    return json.dumps({"result": READINGS.pop(0)})


def main(url: str) -> None:
    """Look a gate up twice, answer, learn that the second result is wrong, answer again."""
    session = connect(url, planner=Planner(exact_suffix=0))  # else so short a thread is prefilled anew, not edited
    agent = create_agent(
        ChatKVRetract(session=session, max_tokens=48),
        tools=[get_gate],
        system_prompt="You are an agent with tools. Keep your answers to one short sentence.",
        middleware=[KVRetractMiddleware(session)],
        checkpointer=InMemorySaver(),
    )
    thread = uuid4().hex

    def ask(question: str) -> None:
        pieces, usage, config = 0, {}, {"configurable": {"thread_id": thread}}
        print(f"user: {question}\nagent: ", end="")
        for chunk, _ in agent.stream({"messages": [("user", question)]}, config, stream_mode="messages"):
            if isinstance(chunk, AIMessageChunk):
                for call in chunk.tool_calls:
                    print(f"{call['name']}({call['args']}) -> ", end="")
                print(chunk.text, end="", flush=True)
                pieces, usage = pieces + bool(chunk.text), chunk.usage_metadata or usage
        cached = usage["input_token_details"]["cache_read"]
        print(f"\n  streamed in {pieces} pieces; {usage['input_tokens']} tokens in, {cached} from the server's cache")

    ask("Please look up the gate of flight Kel-42.")
    ask("Can you check the gate of flight Kel-42 for me?")
    ask("What is the gate of flight Kel-42?")
    # The second result was of another day: wherever its text stands, it is taken back before the next answer.
    session.policies = [Explicit(match=WRONG, reason="of another day")]
    ask("Now, what was the gate of flight Kel-42?")
    done = session.last_erase(thread)
    assert done is not None
    print(f"erased in {url}: {done.tokens_erased} tokens by {done.eraser_id} in {done.edit_ms:.1f} ms")
    for record in session.history(thread):
        print(f"  message {record.span.message}: {record.span_tokens} tokens, {record.status.value}, {record.reason}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.stderr.write("expected the URL of a server that `kv-retract serve` started, as http://127.0.0.1:30000\n")
        sys.exit(2)
    main(sys.argv[1])
