"""Short threads for the policy tests, as fixtures: test folders are no packages."""

import json
from itertools import count
from types import SimpleNamespace

import pytest

from kv_retract.policies import PolicyContext
from kv_retract.types import Message, ToolCall


@pytest.fixture
def threads():
    """Builders: user(text), call(tool, arguments, result), ctx(*parts), proposed(policy, context)."""
    number = count()

    def user(text):
        return [Message(role="user", content=text)]

    def call(tool, arguments, result, *, id=None, with_id=True):
        id = id or f"call_{next(number)}"
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        content = result if isinstance(result, str) else json.dumps(result)
        return [
            Message(role="assistant", tool_calls=(ToolCall(id, tool, text),)),
            Message(role="tool", content=content, tool_call_id=id if with_id else None, name=tool if with_id else None),
        ]

    def ctx(*parts):
        return PolicyContext(thread_id="t", messages=tuple(message for part in parts for message in part))

    def proposed(policy, context):
        return [retraction.span.message for retraction in policy.propose(context)]

    return SimpleNamespace(user=user, call=call, ctx=ctx, proposed=proposed)
