"""`POST /kv_retract/...` beside SGLang's own routes, and the same calls in process."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any
from uuid import uuid4

from pydantic import BaseModel, ValidationError
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.utils.auth import AuthLevel, auth_level
from sglang.utils import TypeBasedDispatcher

from kv_retract.errors import KVRetractError
from kv_retract.ledger.messages import message_from_openai
from kv_retract.ledger.render import Renderer
from kv_retract.types import SpanRef

from . import api
from .hooks import SpanReply, SpanRequest
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

    async def call(self, operation: str, body: dict[str, Any]) -> tuple[int, str]:
        """Run an operation; return an HTTP status and the JSON of its answer or `api.Refusal`."""
        try:
            request = BODIES[operation].model_validate(body)
            if isinstance(request, api.RetractRequest) and request.messages is not None:
                request = self._rendered(request)
        except (ValidationError, KVRetractError) as error:
            return 400, api.Refusal(error="bad_request", message=str(error)).model_dump_json()
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
        """Turn messages and characters into tokens, as the server's chat template writes them."""
        self._renderer = self._renderer or Renderer(self._manager.tokenizer)
        messages = [message_from_openai(message) for message in request.messages or ()]
        rendering = self._renderer.render(messages, tools=request.tools, add_generation_prompt=False)
        spans = []
        for span in request.spans:
            assert isinstance(span, api.MessageSpan), "the model has checked it"
            start, end = rendering.interval(SpanRef(span.message, start=span.start, end=span.end))
            spans.append(api.Interval(start=start, end=end))
        return request.model_copy(
            update={"messages": None, "tools": None, "token_ids": rendering.ids.tolist(), "spans": spans}
        )


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
            body = {"error": str(error)}
        status, text = await client.call(operation, body)
        return Response(text, status_code=status, media_type="application/json")

    route.__annotations__ = {"request": Request, "return": Response}  # FastAPI cannot resolve names of this scope
    return auth_level(AuthLevel.ADMIN_OPTIONAL)(route)
