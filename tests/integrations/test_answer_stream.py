"""Pieces of an answer to chunks, and generators that run in worker threads."""

import asyncio
import threading
from functools import reduce
from operator import add

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_retract.integrations.langchain.messages import to_ai_message
from kv_retract.integrations.langchain.streaming import AnswerStream, in_thread
from kv_retract.ledger.tool_calls import HermesToolCalls, Llama3JsonToolCalls, MistralToolCalls
from kv_retract.types import Message, RetractionPlan, StepDelta, StepResult

CALLS = {
    HermesToolCalls: '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
    Llama3JsonToolCalls: '{"name": "f", "parameters": {"a": 1}}',
    MistralToolCalls: '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]',
}


def finished(text, syntax):
    content, calls = syntax.parse(text)
    return StepResult(
        message=Message("assistant", content, tool_calls=calls),
        token_ids=(),
        finish_reason="tool_calls" if calls else "stop",
        num_prompt_tokens=3,
        num_cached_tokens=2,
        num_completion_tokens=1,
        plan=RetractionPlan(thread_id="t"),
    )


def streamed(pieces, syntax):
    """Return the chunks of an answer that is decoded in these pieces, and the message it ends as."""
    result = finished("".join(pieces), syntax)
    answer = AnswerStream(syntax, model_name="m")
    deltas = [*(StepDelta(text=piece) for piece in pieces), StepDelta(text="", result=result)]
    return [c.message for c in map(answer.push, deltas) if c is not None], to_ai_message(result, model_name="m")


PIECES = st.lists(
    st.sampled_from(["a", "b ", " ", "\n", "<", "<tool", "_call>", "</tool_call>", *CALLS.values(), '{"name":', "{"]),
    max_size=8,
)


@given(pieces=PIECES, by_character=st.booleans())
def test_joined_chunks_are_the_message(pieces, by_character):
    text = "".join(pieces).lstrip()
    pieces = list(text) if by_character else [text[i : i + 5] for i in range(0, len(text), 5)]
    for syntax in (HermesToolCalls(), MistralToolCalls()):
        chunks, message = streamed(pieces, syntax)
        whole = reduce(add, chunks)
        assert whole.content == message.content
        assert whole.tool_calls == message.tool_calls
        assert (whole.usage_metadata, whole.response_metadata) == (message.usage_metadata, message.response_metadata)


@pytest.mark.parametrize("syntax", CALLS)
def test_a_call_never_shows_up_as_content(syntax):
    text = f"Let me look.\n{CALLS[syntax]}"
    chunks, message = streamed(list(text), syntax())
    assert "".join(c.content for c in chunks[:-1]) == "Let me look."
    assert chunks[-1].content == "" and chunks[-1].chunk_position == "last"
    assert [(c["name"], c["args"]) for c in message.tool_calls] == [("f", {"a": 1})]
    assert reduce(add, chunks).tool_calls == message.tool_calls


def test_nor_does_a_mark_before_it():
    chunks, message = streamed(list('<|python_tag|>{"name": "f", "parameters": {}}'), Llama3JsonToolCalls())
    assert len(message.tool_calls) == 1
    assert [c.content for c in chunks] == [""]


def test_white_space_at_the_beginning_of_a_text_before_a_call_is_out_already():
    chunks, message = streamed(["  a", "\n", CALLS[HermesToolCalls], "b"], HermesToolCalls())
    assert message.content == "a\nb"
    assert [c.content for c in chunks] == ["  a", "\nb"]


def test_what_only_looks_like_a_call_is_shown_once_that_is_certain():
    chunks, _ = streamed(["Use a ", "<tool", "box> ", "please", " <tool_call> x"], HermesToolCalls())
    assert [c.content for c in chunks] == ["Use a", " <toolbox>", " please", " <tool_call> x"]


def test_calls_with_malformed_arguments_join_to_invalid_ones():
    text = '<tool_call>\n{"name": "f", "arguments": "no json"}\n</tool_call>'
    chunks, message = streamed([text], HermesToolCalls())
    (call,) = message.invalid_tool_calls
    assert (call["name"], call["args"]) == ("f", "no json") and message.tool_calls == []
    whole = reduce(add, chunks)
    assert [(c["name"], c["args"], c["id"]) for c in whole.invalid_tool_calls] == [("f", "no json", call["id"])]


async def test_pieces_come_from_other_threads_and_errors_surface():
    def pieces():
        yield threading.get_ident()
        yield 2
        raise KeyError("oops")

    got = []
    with pytest.raises(KeyError, match="oops"):
        async for piece in in_thread(pieces()):
            got.append(piece)
    assert got[0] != threading.get_ident() and got[1:] == [2]


async def test_a_cancelled_iteration_closes_the_generator_behind_its_piece():
    working, go_on, events = threading.Event(), threading.Event(), []

    def pieces():
        try:
            working.set()
            events.append(go_on.wait(timeout=10))
            yield 1
            events.append("went on")
        finally:
            events.append("closed")

    async def consume():
        async for _ in in_thread(pieces()):
            pass

    task = asyncio.create_task(consume())
    await asyncio.to_thread(working.wait)
    task.cancel()
    await asyncio.sleep(0.02)
    assert not task.done(), "a generator cannot be closed while it runs"
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert events == [True, "closed"]
