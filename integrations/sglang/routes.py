"""`POST /kv_retract/...` beside SGLang's own routes, and the same calls in process."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

import numpy as np
from pydantic import BaseModel, ValidationError
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.utils.auth import AuthLevel, auth_level
from sglang.utils import TypeBasedDispatcher

from kv_retract.errors import KVRetractError, MessageError
from kv_retract.ledger.encode import IntArray, encode
from kv_retract.ledger.messages import message_from_openai, text_of
from kv_retract.ledger.render import Renderer
from kv_retract.types import Message, SpanRef

from . import api
from .hooks import SpanReply, SpanRequest
from .metrics import SpanMetrics
from .refusal import STATUS
from .service import BODIES

_COMMUNICATORS = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.init_communicators"


def register() -> None:
    """Register the hook that adds the routes."""
    HookRegistry.register(_COMMUNICATORS, _add_routes, HookType.AFTER)


class SpanClient:
    """Sends operations to the scheduler; `engine.tokenizer_manager.kv_retract` of an `sglang.Engine`.

    Args:
        manager: SGLang's tokenizer manager.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._waiting: dict[str, asyncio.Future[SpanReply]] = {}
        manager._result_dispatcher += TypeBasedDispatcher([(SpanReply, self._receive)])
        self._renderer: Renderer | None = None
        self._metrics = SpanMetrics() if manager.enable_metrics else None

    async def call(self, operation: str, body: dict[str, Any]) -> tuple[int, str]:
        """Run an operation; return an HTTP status and the JSON of its answer or `api.Refusal`."""
        done = self._metrics.started(operation) if self._metrics else None
        status, text = await self._call(operation, body)
        if done is not None:
            done(status == 200, text)
        return status, text

    async def _call(self, operation: str, body: dict[str, Any]) -> tuple[int, str]:
        try:
            request = BODIES[operation].model_validate(body)
            if isinstance(request, api.RetractRequest) and request.messages is not None:
                request = self._rendered(request)
        except ValidationError as error:
            return 400, _bad_request("; ".join(_told(wrong) for wrong in error.errors()))
        except (KVRetractError, ValueError) as error:  # SGLang refuses messages with a ValueError
            return 400, _bad_request(str(error))
        self._manager.auto_create_handle_loop()
        reply = await self._ask(operation, request)
        return 200 if reply.ok else STATUS.get(json.loads(reply.body)["error"], 409), reply.body

    async def _ask(self, operation: str, request: BaseModel) -> SpanReply:
        ticket = uuid4().hex
        self._waiting[ticket] = asyncio.get_running_loop().create_future()
        try:
            self._manager._dispatch_to_scheduler(
                SpanRequest(
                    ticket=ticket, operation=operation, body=request.model_dump_json(),
                    wait_s=getattr(request, "wait_s", 0.0),
                )
            )  # fmt: skip
            return await self._waiting[ticket]
        finally:
            del self._waiting[ticket]

    def _receive(self, reply: SpanReply) -> None:
        future = self._waiting.get(reply.ticket)
        if future is not None and not future.done():
            future.set_result(reply)

    def _rendered(self, request: api.RetractRequest) -> BaseModel:
        """Turn messages and characters into the tokens that the server makes of them.

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


def _bad_request(message: str) -> str:
    return api.Refusal(error="bad_request", message=message).model_dump_json()


def _told(wrong: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors without the value, which may be a thread's text."""
    where = ".".join(map(str, wrong["loc"]))
    return f"{where}: {wrong['msg']}" if where else str(wrong["msg"])


def _add_routes(result: Any, manager: Any) -> None:
    manager.kv_retract = SpanClient(manager)
    server = sys.modules.get("sglang.srt.entrypoints.http_server")
    if server is None or not hasattr(server, "app"):
        return
    for operation in BODIES:
        server.app.add_api_route(
            f"/kv_retract/{operation}", _route(manager.kv_retract, operation), methods=["POST"], response_model=None
        )


def _route(client: SpanClient, operation: str) -> Any:
    from fastapi import Request, Response

    async def route(request: Request) -> Response:
        try:
            body = await request.json()
        except ValueError as error:
            return Response(
                _bad_request(f"expected a JSON object: {error}"), status_code=400, media_type="application/json"
            )
        status, text = await client.call(operation, body)
        return Response(text, status_code=status, media_type="application/json")

    route.__annotations__ = {"request": Request, "return": Response}  # FastAPI cannot resolve names of this scope
    return auth_level(AuthLevel.ADMIN_OPTIONAL)(route)
