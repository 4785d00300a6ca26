"""One agent run in the terminal: a tool result arrives, is contradicted, is retracted, and the answer changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from kv_retract.erasers import ERASERS
from kv_retract.errors import EraserMismatchError
from kv_retract.ledger.render import Renderer
from kv_retract.planner import Planner
from kv_retract.policies import Explicit
from kv_retract.session import KVRetractSession
from kv_retract.training.threads import function_tool
from kv_retract.types import Message, SamplingParams, ToolCall

from .excerpts import visible
from .report import number

if TYPE_CHECKING:
    from kv_retract.engine.hf import HFEngine
    from kv_retract.engine.models import LoadedModel

ARMS = ("none", "mask", "kveraser", "recompute")
FLIGHT, FIRST, SECOND = "Kel-42", "Mar", "Sol"
QUESTION = f"What is the gate of flight {FLIGHT}?"
TOOLS = [function_tool("get_gate", "flight", "the gate")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one arm answered, before and after, and what its edit cost."""

    arm: str
    before: str
    after: str
    edit_ms: float
    tokens_recomputed: int


def story() -> list[Message]:
    """Return the thread up to the moment at which the second reading turns out wrong."""

    def reading(call: str, gate: str, said: str) -> list[Message]:
        return [
            Message("assistant", tool_calls=(ToolCall(call, "get_gate", f'{{"flight": "{FLIGHT}"}}'),)),
            Message(
                "tool", f'{{"result": "The gate of flight {FLIGHT} is {gate}."}}', tool_call_id=call, name="get_gate"
            ),
            Message("assistant", said),
        ]

    return [
        Message("system", "You are an agent with tools. Keep your answers to one short sentence."),
        Message("user", f"Please look up the gate of flight {FLIGHT}."),
        *reading("call_1", FIRST, "I have looked that up."),
        Message("user", f"Look up the gate of flight {FLIGHT}, please."),
        *reading("call_2", SECOND, "Done, I have it now."),
        Message("user", f"Keep flight {FLIGHT} in mind."),
        Message("assistant", f"Yes, flight {FLIGHT} is on my list."),
    ]


def run_story(loaded: LoadedModel, engine: HFEngine) -> list[Outcome]:
    """Play the story under every arm; the learned eraser is left out on a model that it does not belong to."""
    renderer = Renderer(loaded.tokenizer)
    outcomes = []
    for arm in ARMS:
        session = KVRetractSession(
            engine, renderer, eraser=ERASERS.create(arm), planner=Planner(exact_suffix=0), extra_key=f"story {arm}"
        )
        thread = story()
        before = _ask(session, thread)
        policy = Explicit(tool_call_ids=("call_2",), reason="the second reading came from a broken display")
        session.policies = (policy,)
        try:
            after = _ask(session, thread)
        except EraserMismatchError:
            continue
        erased = session.last_erase("story")
        assert erased is not None, "the second reading was retracted"
        outcomes.append(
            Outcome(
                arm=arm, before=before, after=after, edit_ms=erased.edit_ms, tokens_recomputed=erased.tokens_recomputed
            )
        )
    return outcomes


def tell(outcomes: Sequence[Outcome], note: str, console: Console) -> None:
    """Print the story, and the answers side by side."""
    for message in story():
        text = message.content or ", ".join(f"{c.name}({c.arguments})" for c in message.tool_calls)
        console.print(Text(f"  {message.role:>9}  ", style="dim") + Text(text))
    console.print(Text("       user  ", style="dim") + Text(QUESTION))
    console.print(Text("  assistant  ", style="dim") + Text(visible(outcomes[0].before)))
    console.print(
        f"\nThe second reading ({SECOND}) came from a broken display: it is retracted, and the question asked again.",
        highlight=False,
    )
    for outcome in outcomes:
        right, leaks = f"{FIRST}." in outcome.after, f"{SECOND}." in outcome.after
        mark = Text("right ", "green") if right else Text("leaks ", "red") if leaks else Text("other ")
        cost = f"  ({number(outcome.edit_ms)} ms, {outcome.tokens_recomputed} tokens through the model)"
        console.print(Text(f"  {outcome.arm:>9}  ") + mark + Text(visible(outcome.after)) + Text(cost, style="dim"))
    if note:
        console.print(Text(f"Note: {note}.", style="yellow"))


def _ask(session: KVRetractSession, thread: Sequence[Message]) -> str:
    asked = [*thread, Message("user", QUESTION)]
    return session.step("story", asked, tools=TOOLS, sampling=SamplingParams(max_tokens=32)).message.content.strip()
