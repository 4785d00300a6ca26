"""Messages and places in them as the tokens that SGLang makes of them, so that a span is found again on arrival."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kv_retract.cache.base import IntArray
from kv_retract.errors import MessageError
from kv_retract.ledger.encode import encode
from kv_retract.ledger.messages import message_from_openai, text_of
from kv_retract.ledger.render import Renderer
from kv_retract.types import Message, SpanRef

from . import api


class Rendering:
    """Renders messages as the server does.

    Args:
        manager: SGLang's tokenizer manager.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._renderer: Renderer | None = None

    def of(self, request: api.RetractRequest) -> api.RetractRequest:
        """Return a request with tokens and intervals in place of messages and characters.

        Raises:
            ValidationError, ValueError: SGLang refuses the messages.
            MessageError: it writes them in a way that the spans cannot be found in.
            SpanError: a span is not in the messages.
        """
        assert request.messages is not None
        served = _Served(request.messages, request.tools) if _chat() is not None else None
        messages = served.messages if served else [message_from_openai(message) for message in request.messages]
        tools = served.tools if served else request.tools
        self._renderer = self._renderer or Renderer(
            self._manager.tokenizer, template_kwargs=getattr(_chat(), "default_chat_template_kwargs", None)
        )
        rendering = self._renderer.render(messages, tools=tools, add_generation_prompt=False)
        # SGLang reads the names of special tokens as such, also where they come from a message.
        rendering = replace(rendering, encoding=encode(self._manager.tokenizer, [(rendering.text, False)]))
        spans = []
        for span in request.spans:
            assert isinstance(span, api.MessageSpan), "the model has checked it"
            start, end = rendering.interval(SpanRef(span.message, start=span.start, end=span.end))
            spans.append(api.Interval(start=start, end=end))
        ids = served.common(rendering.ids, max(span.end for span in spans)) if served else rendering.ids
        return request.model_copy(update={"messages": None, "tools": None, "token_ids": ids.tolist(), "spans": spans})


class _Served:
    """Messages and tools as `/v1/chat/completions` hands them to the chat template, and the tokens it makes of them.

    Args:
        messages: as a client sends them.
        tools: as a client sends them.

    Raises:
        ValidationError, ValueError: SGLang refuses them.
    """

    def __init__(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> None:
        from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

        chat = _chat()
        asked = ChatCompletionRequest(model="", messages=list(messages), tools=list(tools) if tools else None)
        self.tools = [tool.model_dump() for tool in asked.tools] if asked.tools else None
        joins = chat.template_manager.jinja_template_content_format == "string"
        self.messages = [_as_templated(message.model_dump(), joins=joins) for message in asked.messages]
        self._ids = chat._process_messages(asked, chat.tokenizer_manager.model_config.is_multimodal).prompt_ids

    def common(self, ids: IntArray, end: int) -> IntArray:
        """Return the tokens that a rendering has in common with the server's own; raises MessageError before `end`."""
        length = min(len(ids), len(self._ids))
        differ = np.flatnonzero(ids[:length] != np.array(self._ids[:length]))
        same = int(differ[0]) if len(differ) else length
        if same < end:
            raise MessageError(
                f"the server writes these messages in a way that their spans cannot be found in, from token {same} on; "
                "send token_ids (POST /v1/tokenize tells those of messages and tools) and spans in tokens"
            )
        return ids[:same]


def _as_templated(message: Mapping[str, Any], *, joins: bool) -> Message:
    """Return a message with the role and the text that a template gets; `joins`: text blocks with spaces between."""
    content, role = message.get("content"), message["role"]
    if isinstance(content, list) and (joins or role == "tool"):
        content = " ".join(text_of([block]) for block in content)
    return replace(message_from_openai({**message, "content": content}), role=role)


def _chat() -> Any:
    """Return what answers `/v1/chat/completions`; None in process, where callers render messages themselves."""
    server = sys.modules.get("sglang.srt.entrypoints.http_server")
    return getattr(getattr(getattr(server, "app", None), "state", None), "openai_serving_chat", None)
