"""`POST /kv_retract/...` beside SGLang's own routes, and the same calls in process."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from pydantic import BaseModel, ValidationError
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.utils.auth import AuthLevel, auth_level
from sglang.utils import TypeBasedDispatcher

from kv_retract.errors import KVRetractError

from . import api
from .config import PluginConfig
from .hooks import SpanReply, SpanRequest
from .metrics import SpanMetrics
from .peers import Spread, key_of
from .refusal import STATUS
from .rendering import Rendering
from .service import BODIES

_OPENAI = "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.handle_request"
_COMMUNICATORS = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.init_communicators"


def register() -> None:
    """Register the hook that adds the routes, and the one that reads a header where one names the thread."""
    HookRegistry.register(_COMMUNICATORS, _add_routes, HookType.AFTER)
    if header := PluginConfig.from_environment().thread_header:
        HookRegistry.register(_OPENAI, _naming(header), HookType.AROUND)


class SpanClient:
    """Sends operations to the scheduler; `engine.tokenizer_manager.kv_retract` of an `sglang.Engine`.

    Args:
        manager: SGLang's tokenizer manager.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._waiting: dict[str, asyncio.Future[SpanReply]] = {}
        manager._result_dispatcher += TypeBasedDispatcher([(SpanReply, self._receive)])
        self._rendering = Rendering(manager)
        self._metrics = SpanMetrics() if manager.enable_metrics else None
        peers = PluginConfig.from_environment().peers
        self._spread = Spread(peers, api_key=key_of(manager.server_args)) if peers else None

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
                request = self._rendering.of(request)
        except ValidationError as error:
            return 400, _bad_request("; ".join(_told(wrong) for wrong in error.errors()))
        except (KVRetractError, ValueError) as error:  # SGLang refuses messages with a ValueError
            return 400, _bad_request(str(error))
        self._manager.auto_create_handle_loop()
        reply = await self._ask(operation, request)
        if not reply.ok:
            return STATUS.get(json.loads(reply.body)["error"], 409), reply.body
        if (
            self._spread is None
            or not isinstance(request, api.RetractRequest | api.ChangeRequest)
            or not request.spread
        ):
            return 200, reply.body
        replicas = await self._spread.send(operation, request)
        return 200, json.dumps({**json.loads(reply.body), "replicas": replicas.model_dump()})

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


def _naming(header: str) -> Any:
    """Let a header name the thread of a request that does not: routers drop fields of a body that they do not know."""

    def name_thread(original: Any, serving: Any, request: Any, raw_request: Any) -> Any:
        name = raw_request.headers.get(header) if raw_request is not None else None
        if name and getattr(request, "extra_key", "") is None:
            request.extra_key = name
        return original(serving, request, raw_request)

    return name_thread


def _bad_request(message: str) -> str:
    return api.Refusal(error="bad_request", message=message).model_dump_json()


def _told(wrong: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors without the value, which may be a thread's text."""
    where = ".".join(map(str, wrong["loc"]))
    return f"{where}: {wrong['msg']}" if where else str(wrong["msg"])


def _add_routes(result: Any, manager: Any) -> None:
    if PluginConfig.from_environment().thread_header and _OPENAI not in HookRegistry._patched:
        raise ValueError(f"kv_retract: SGLang did not apply the hook on {_OPENAI}; is it 0.5.23?")
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
            if not isinstance(body, dict):
                raise ValueError(f"got a {type(body).__name__}")
        except ValueError as error:
            return Response(
                _bad_request(f"expected a JSON object: {error}"), status_code=400, media_type="application/json"
            )
        status, text = await client.call(operation, body)
        return Response(text, status_code=status, media_type="application/json")

    route.__annotations__ = {"request": Request, "return": Response}  # FastAPI cannot resolve names of this scope
    return auth_level(AuthLevel.ADMIN_OPTIONAL)(route)
