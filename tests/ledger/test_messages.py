"""Messages to and from OpenAI chat dictionaries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_retract.errors import MessageError
from kv_retract.ledger.messages import message_from_openai, message_to_openai
from kv_retract.types import Message, ToolCall

texts = st.text(max_size=20)
messages = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=texts,
    tool_calls=st.lists(st.builds(ToolCall, texts, texts, texts), max_size=2).map(tuple),
    tool_call_id=st.none() | texts,
    name=st.none() | texts,
    reasoning=texts,
)


@given(messages)
def test_there_and_back(message):
    assert message_from_openai(message_to_openai(message)) == message


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ("a", "a"),
        ([], ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        (["a", {"text": "b"}], "ab"),
    ],
)
def test_content_is_text_or_blocks_of_text(content, text):
    assert message_from_openai({"role": "user", "content": content}).content == text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"role": "robot", "content": ""}, "unknown role 'robot'; expected one of system, user, assistant, tool"),
        ({"content": ""}, "unknown role None"),
        ({"role": ["user"], "content": ""}, r"unknown role \['user'\]"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "'image_url' is not text"),
        ({"role": "user", "content": [3]}, "'int' is not text"),
        ({"role": "user", "content": {"a": 1}}, "got dict"),
        ({"role": "assistant", "tool_calls": [{"id": "c"}]}, "function.name"),
        ({"role": "assistant", "tool_calls": "x"}, "tool_calls must be a list, got str"),
        ({"role": "tool", "tool_call_id": 3}, "tool_call_id must be text, got int"),
        ("hello", "got str"),
    ],
)
def test_what_is_no_text_message_is_named(data, says):
    with pytest.raises(MessageError, match=says):
        message_from_openai(data)


def test_other_names_of_roles_and_arguments_as_objects():
    assert message_from_openai({"role": "developer", "content": "a"}).role == "system"
    call = {"id": "c", "function": {"name": "f", "arguments": {"city": "Zürich"}}}
    message = message_from_openai({"role": "assistant", "content": None, "tool_calls": [call]})
    assert message.tool_calls == (ToolCall("c", "f", '{"city": "Zürich"}'),)
