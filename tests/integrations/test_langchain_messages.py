"""LangChain messages to neutral ones and answers back: nothing that the model should read is lost or made up."""

import json

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.tool import invalid_tool_call, tool_call

from kv_retract.errors import MessageError
from kv_retract.integrations.langchain.messages import split_calls, to_ai_message, to_messages, usage
from kv_retract.integrations.langchain.records import from_state, to_state
from kv_retract.integrations.langchain.tools import normalize_choice, schema_of, to_openai_tools
from kv_retract.types import (
    Guarantee,
    Message,
    RetractionPlan,
    RetractionRecord,
    Scope,
    SpanRef,
    Status,
    StepResult,
    ToolCall,
)


def answer(**fields):
    message = Message("assistant", fields.pop("content", ""), tool_calls=tuple(fields.pop("calls", ())))
    values = {
        "token_ids": (1, 2),
        "finish_reason": "stop",
        "num_prompt_tokens": 10,
        "num_cached_tokens": 7,
        "num_completion_tokens": 2,
        "plan": RetractionPlan(thread_id="t"),
    }
    return StepResult(message=message, **{**values, **fields})


# -- to neutral messages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (SystemMessage("s"), Message("system", "s")),
        (HumanMessage("h", name="ann"), Message("user", "h", name="ann")),
        (AIMessage("a", id="7"), Message("assistant", "a")),
        (AIMessageChunk("a"), Message("assistant", "a")),
        (ToolMessage("r", tool_call_id="c", name="f"), Message("tool", "r", tool_call_id="c", name="f")),
        (FunctionMessage("r", name="f"), Message("tool", "r", name="f")),
        (ChatMessage("d", role="developer"), Message("system", "d")),
        (ChatMessage("u", role="human"), Message("user", "u")),
        (ChatMessage("a", role="ai"), Message("assistant", "a")),
        (ChatMessage("t", role="tool"), Message("tool", "t")),
        (HumanMessage(""), Message("user", "")),
        (HumanMessage([]), Message("user", "")),
    ],
)
def test_roles(message, expected):
    assert to_messages([message]) == [expected]


def test_the_digest_does_not_depend_on_ids_and_metadata_of_langchain():
    """The windows of retractions are made of digests: a message must keep its own through a checkpoint."""
    first = AIMessage("a", id="1", response_metadata={"x": 1}, tool_calls=[tool_call(name="f", args={"b": 1}, id="c")])
    again = AIMessage.model_validate_json(first.model_dump_json()).model_copy(update={"id": "2"})
    assert to_messages([first])[0].digest() == to_messages([again])[0].digest()
    assert to_messages([first])[0].digest() != to_messages([first.model_copy(update={"content": "b"})])[0].digest()


def test_text_blocks_are_joined():
    blocks = ["one ", {"type": "text", "text": "two "}, {"type": "text", "text": "three"}]
    assert to_messages([HumanMessage(blocks)])[0].content == "one two three"
    assert to_messages([ToolMessage(blocks, tool_call_id="c")])[0].content == "one two three"


def test_blocks_that_repeat_tool_calls_are_left_out_of_answers_only():
    call = tool_call(name="f", args={}, id="c")
    for kind in ("tool_use", "tool_call", "function_call"):
        block = {"type": kind, "name": "f", "input": {}, "id": "c"}
        message = AIMessage([{"type": "text", "text": "Let me look."}, block], tool_calls=[call])
        assert to_messages([message]) == [
            Message("assistant", "Let me look.", tool_calls=(ToolCall("c", "f", "{}"),)),
        ]
        with pytest.raises(MessageError, match=f"message 0 .*'{kind}' is not text"):
            to_messages([HumanMessage([block])])


def test_reasoning_blocks_are_kept_apart():
    message = AIMessage(
        [
            {"type": "thinking", "thinking": "They ask for tea. ", "signature": "x"},
            {"type": "reasoning", "reasoning": "It costs 12."},
            {"type": "reasoning", "id": "rs_1"},
            {"type": "text", "text": "Tea costs 12 EUR."},
        ]
    )
    assert to_messages([message]) == [
        Message("assistant", "Tea costs 12 EUR.", reasoning="They ask for tea. It costs 12.")
    ]
    with pytest.raises(MessageError, match="'thinking' is not text"):
        to_messages([HumanMessage([{"type": "thinking", "thinking": "mine"}])])


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}},
        {"type": "image", "base64": "AAAA", "mime_type": "image/png"},
        {"type": "input_audio", "input_audio": {"data": "AAAA"}},
        {"type": "file", "file_id": "f1"},
    ],
)
@pytest.mark.parametrize("kind", [HumanMessage, AIMessage, lambda c: ToolMessage(c, tool_call_id="c")])
def test_what_is_not_text_is_refused_and_named(block, kind):
    message = kind([{"type": "text", "text": "Look:"}, block])
    with pytest.raises(MessageError, match=f"message 1 .*'{block['type']}' is not text.*describe images, audio and"):
        to_messages([SystemMessage("s"), message])


def test_tool_calls_keep_their_order_and_malformed_ones_their_text():
    message = AIMessage(
        "",
        tool_calls=[tool_call(name="f", args={"city": "Zürich"}, id="a"), tool_call(name="g", args={}, id=None)],
        invalid_tool_calls=[invalid_tool_call(name="h", args="{not json", id="b", error="x")],
    )
    assert to_messages([message])[0].tool_calls == (
        ToolCall("a", "f", '{"city": "Zürich"}'),
        ToolCall("", "g", "{}"),
        ToolCall("b", "h", "{not json"),
    )


def test_unknown_roles_and_messages_are_refused():
    with pytest.raises(MessageError, match="message 0 has the unknown role 'critic'; expected one of system, user,"):
        to_messages([ChatMessage("x", role="critic")])
    with pytest.raises(MessageError, match="message 1 is a RemoveMessage, which no chat template can render"):
        to_messages([HumanMessage("x"), RemoveMessage(id="1")])


# -- answers back ---------------------------------------------------------------------------------------------------


def test_an_answer_becomes_a_message_with_usage_and_retractions():
    message = to_ai_message(answer(content="Hello.", retraction_ids=("r1", "r2")), model_name="m")
    assert message.text == "Hello." and message.tool_calls == []
    assert message.usage_metadata == {
        "input_tokens": 10,
        "output_tokens": 2,
        "total_tokens": 12,
        "input_token_details": {"cache_read": 7},
    }
    assert message.response_metadata == {
        "model_provider": "kv_retract",
        "model_name": "m",
        "finish_reason": "stop",
        "retractions": ["r1", "r2"],
    }
    assert message.usage_metadata == usage(answer())


def test_calls_whose_arguments_are_no_object_are_invalid_and_say_why():
    calls = [ToolCall("a", "f", '{"x": 1}'), ToolCall("b", "g", "{oops"), ToolCall("c", "h", "[1]")]
    valid, invalid = split_calls(calls)
    assert valid == [{"name": "f", "args": {"x": 1}, "id": "a", "type": "tool_call"}]
    assert [(c["id"], c["args"]) for c in invalid] == [("b", "{oops"), ("c", "[1]")]
    assert "Expecting property name" in invalid[0]["error"] and invalid[1]["error"].endswith("not a JSON object")


@pytest.mark.parametrize("arguments", ['{"x": 1, "y": "ü"}', "{oops", "[1]", ""])
def test_an_answer_that_comes_back_in_the_next_turn_is_the_same_message(arguments):
    result = answer(content="I look.", calls=[ToolCall("a", "f", arguments)])
    assert to_messages([to_ai_message(result, model_name="m")]) == [result.message]


# -- tools, choices, formats ----------------------------------------------------------------------------------------

NAMED = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("f", "g")]


@pytest.mark.parametrize(
    ("choice", "mode"),
    [
        (None, "auto"),
        (False, "auto"),
        (True, "required"),
        ("any", "required"),
        ("required", "required"),
        ("none", "none"),
        ("g", "g"),
        ({"type": "function", "function": {"name": "g"}}, "g"),
        ({"type": "tool", "name": "g"}, "g"),
        ({"type": "any"}, "required"),
    ],
)
def test_choices(choice, mode):
    assert normalize_choice(choice, NAMED) == mode


@pytest.mark.parametrize(
    "choice",
    ["h", {"type": "function", "function": {"name": "h"}}, {"type": "function"}, {"function": "g"}, {}, [], 1],
)
def test_choices_that_name_no_tool(choice):
    with pytest.raises(ValueError, match=r"expected tool_choice auto, any, .*\(f, g\), got"):
        normalize_choice(choice, NAMED)


def test_true_is_the_only_tool():
    assert normalize_choice(True, NAMED[:1]) == "f"
    with pytest.raises(ValueError, match="no tool is bound"):
        normalize_choice(True, [])


def test_tools_of_every_form():
    def f(x: int) -> int:
        """Double it."""
        return 2 * x

    schema = {"title": "g", "description": "d", "type": "object", "properties": {"x": {"type": "integer"}}}
    tools = to_openai_tools([f, schema, NAMED[0]])
    assert [t["function"]["name"] for t in tools] == ["f", "g", "f"] and {t["type"] for t in tools} == {"function"}
    assert tools[0]["function"]["parameters"]["properties"] == {"x": {"type": "integer"}}


def test_response_formats():
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    assert schema_of(None) is None and schema_of({"type": "text"}) is None
    assert schema_of({"type": "json_object"}) == {"type": "object"}
    assert schema_of({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}) == schema
    for wrong in ({"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": "x"}}):
        with pytest.raises(ValueError, match="expected response_format text, json_object, or json_schema"):
            schema_of(wrong)


# -- records --------------------------------------------------------------------------------------------------------


def test_records_go_through_the_state_unchanged_as_plain_json():
    record = RetractionRecord(
        retraction_id="r",
        span=SpanRef(2, "tool_call", 1, 3, 9),
        window_size=4,
        window_digest="d",
        policy="p",
        reason="newer",
        guarantee=Guarantee.EXACT,
        scope=Scope.THREAD,
        status=Status.REVOKED,
        eraser_id="mask",
        notice="n",
    )
    state = to_state([record])
    assert from_state(json.loads(json.dumps(state))) == [record]
    assert type(state[0]["status"]) is str and type(state[0]["span"]) is dict, "a checkpointer may refuse subclasses"
    assert from_state(None) == []
