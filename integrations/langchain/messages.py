"""LangChain messages to neutral ones, and finished answers back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    InvalidToolCall,
    SystemMessage,
    ToolMessage,
    UsageMetadata,
)
from langchain_core.messages import ToolCall as LangChainToolCall

from kv_retract.errors import MessageError
from kv_retract.ledger.messages import text_of
from kv_retract.types import Message, Role, StepResult, ToolCall

_ROLES: dict[type[BaseMessage], Role] = {
    SystemMessage: "system",
    HumanMessage: "user",
    AIMessage: "assistant",
    ToolMessage: "tool",
    FunctionMessage: "tool",
}
CALL_BLOCKS = {"tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call"}
"""Blocks that repeat what stands in `AIMessage.tool_calls`."""
REASONING_BLOCKS = {"reasoning": "reasoning", "thinking": "thinking"}
"""Type of block to the field that holds its text."""


def to_messages(messages: Sequence[BaseMessage]) -> list[Message]:
    """Convert LangChain messages.

    Content may be text or a list of text blocks. Blocks that repeat tool calls are left out, reasoning is kept apart.

    Raises:
        MessageError: a message holds something that is not text (an image, audio, a file), or has an unknown role.
    """
    return [_to_message(message, i) for i, message in enumerate(messages)]


def to_ai_message(result: StepResult, *, model_name: str) -> AIMessage:
    """Return the answer of a step as LangChain's message, with usage and what was retracted."""
    calls, invalid = split_calls(result.message.tool_calls)
    return AIMessage(
        content=result.message.content,
        tool_calls=calls,
        invalid_tool_calls=invalid,
        usage_metadata=usage(result),
        response_metadata=metadata(result, model_name=model_name),
    )


def split_calls(calls: Sequence[ToolCall]) -> tuple[list[LangChainToolCall], list[InvalidToolCall]]:
    """Split calls into those whose arguments are a JSON object and those whose arguments are not."""
    valid: list[LangChainToolCall] = []
    invalid: list[InvalidToolCall] = []
    for call in calls:
        try:
            arguments = json.loads(call.arguments)
        except ValueError as error:
            arguments, why = None, str(error)
        else:
            why = "the arguments are not a JSON object"
        if isinstance(arguments, dict):
            valid.append(LangChainToolCall(name=call.name, args=arguments, id=call.id, type="tool_call"))
        else:
            invalid.append(
                InvalidToolCall(name=call.name, args=call.arguments, id=call.id, error=why, type="invalid_tool_call")
            )
    return valid, invalid


def usage(result: StepResult) -> UsageMetadata:
    """Return token counts; `cache_read` are prompt tokens that were not computed again."""
    return UsageMetadata(
        input_tokens=result.num_prompt_tokens,
        output_tokens=result.num_completion_tokens,
        total_tokens=result.num_prompt_tokens + result.num_completion_tokens,
        input_token_details={"cache_read": result.num_cached_tokens},
    )


def metadata(result: StepResult, *, model_name: str) -> dict[str, Any]:
    """Return `response_metadata`: model, why the answer ended, and the ids of every retraction that applied."""
    return {
        "model_provider": "kv_retract",
        "model_name": model_name,
        "finish_reason": result.finish_reason,
        "retractions": list(result.retraction_ids),
    }


def _to_message(message: BaseMessage, index: int) -> Message:
    role = _role(message, index)
    text, reasoning = _texts(message, index)
    return Message(
        role=role,
        content=text,
        tool_calls=_calls(message) if isinstance(message, AIMessage) else (),
        tool_call_id=message.tool_call_id if isinstance(message, ToolMessage) else None,
        name=message.name,
        reasoning=reasoning,
    )


def _role(message: BaseMessage, index: int) -> Role:
    if isinstance(message, ChatMessage):
        role = {"developer": "system", "human": "user", "ai": "assistant"}.get(message.role, message.role)
        if role in get_args(Role):
            return cast(Role, role)
        raise MessageError(
            f"message {index} has the unknown role {message.role!r}; expected one of {', '.join(get_args(Role))}"
        )
    for kind, known in _ROLES.items():
        if isinstance(message, kind):
            return known
    raise MessageError(
        f"message {index} is a {type(message).__name__}, which no chat template can render; expected a system, human, "
        "AI or tool message"
    )


def _texts(message: BaseMessage, index: int) -> tuple[str, str]:
    """Return text and reasoning of a message."""
    if isinstance(message.content, str):
        return message.content, ""
    text: list[Any] = []
    reasoning: list[str] = []
    for block in message.content:
        kind = block.get("type") if isinstance(block, Mapping) else "text"
        if isinstance(message, AIMessage) and kind in CALL_BLOCKS:
            continue
        if isinstance(message, AIMessage) and kind in REASONING_BLOCKS and isinstance(block, Mapping):
            reasoning.append(str(block.get(REASONING_BLOCKS[kind]) or ""))
        else:
            text.append(block)
    try:
        return text_of(text), "".join(reasoning)
    except MessageError as error:
        raise MessageError(
            f"message {index} ({message.type}): {error}; describe images, audio and files in words"
        ) from error


def _calls(message: AIMessage) -> tuple[ToolCall, ...]:
    valid = [
        ToolCall(id=call["id"] or "", name=call["name"], arguments=json.dumps(call["args"], ensure_ascii=False))
        for call in message.tool_calls
    ]
    malformed = [
        ToolCall(id=call["id"] or "", name=call["name"] or "", arguments=call["args"] or "")
        for call in message.invalid_tool_calls
    ]
    return (*valid, *malformed)
