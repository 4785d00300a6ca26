"""HTTP to a server with the plugin: operations on its cache, and decoding as it streams."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from kv_retract.errors import ColdTombstoneError, PoolExhaustedError, ServerError

from .api import COLD, Refusal
from .refusal import Refused

_NO_ROOM = ("out of memory", "maximum allowed length")
"""In SGLang's messages where a request does not fit into the pool, in lower case."""
_CONNECT_S = 10.0

Answer = TypeVar("Answer", bound=BaseModel)


class Client:
    """Talks to one server; safe to call from several Python threads.

    Args:
        url: of the server, without a path.
        api_key: the server's, where it has one.
        timeout: seconds that the server may be silent.
        transport: of httpx; for tests.

    Raises:
        ServerError: the URL is malformed.
    """

    def __init__(self, url: str, *, api_key: str | None, timeout: float, transport: httpx.BaseTransport | None) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        wait = httpx.Timeout(timeout, connect=min(timeout, _CONNECT_S))
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=wait, transport=transport)
        except httpx.InvalidURL as error:
            raise ServerError(f"expected a URL such as http://localhost:30000, got {url!r}: {error}") from error

    def close(self) -> None:
        """Close the connections; open streams end with an error."""
        self._http.close()

    def ask(self, operation: str, body: BaseModel, answer: type[Answer]) -> Answer:
        """Run an operation of the plugin.

        Raises:
            Refused: the plugin does not do it.
            ServerError: anything else went wrong.
        """
        with self._reaching():
            response = self._http.post(f"/kv_retract/{operation}", json=body.model_dump())
        if response.status_code != 200:
            raise self._refusal(response)
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            raise ServerError(
                f"the answer of {self.url} to {operation!r} is none that this client knows: {error}; install the same "
                "version of kv-retract on both sides"
            ) from error

    def events(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Post a request and yield the JSON of its server-sent events. Closing the generator closes the connection.

        Raises:
            KVRetractError, ValueError: see `failure`.
        """
        with self._reaching(), self._http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                response.read()
                raise self._failed(response)
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if data != line.strip():
                    yield json.loads(data)

    @contextmanager
    def _reaching(self) -> Generator[None, None, None]:
        """Say which server a failure of the connection is about, and what to do."""
        try:
            yield
        except httpx.TimeoutException as error:
            raise ServerError(
                f"{self.url} was silent for too long ({type(error).__name__}); is it overloaded? Else pass a longer "
                "timeout"
            ) from error
        except httpx.TransportError as error:
            raise ServerError(
                f"cannot reach a server at {self.url}: {error}; start one with `kv-retract serve`, or correct the URL"
            ) from error

    def _refusal(self, response: httpx.Response) -> Exception:
        try:
            refusal = Refusal.model_validate_json(response.content)
        except ValidationError:
            return self._failed(response)
        return Refused(refusal.error, refusal.message)

    def _failed(self, response: httpx.Response) -> Exception:
        status = response.status_code
        if status in (401, 403):
            return ServerError(f"{self.url} refuses the key (HTTP {status}); pass api_key")
        if status == 404:
            return ServerError(
                f"{self.url} does not know {response.request.url.path}: it runs without the plugin of kv-retract; "
                "start it with `kv-retract serve`"
            )
        return failure(self.url, _message(response), status)


def failure(url: str, message: str, code: int | None, *, begun: bool = False) -> Exception:
    """Return the error for a decoding that the server gave up.

    Args:
        url: of the server.
        message: the server's.
        code: HTTP status, also of a stream that had begun with 200.
        begun: whether tokens of the answer came before.

    Returns:
        ColdTombstoneError: a tombstone would have to be prefilled.
        PoolExhaustedError: the thread does not fit, or the server needed its room for others half-way.
        ValueError: the server calls the request wrong.
        ServerError: anything else.
    """
    if COLD in message and begun:
        return PoolExhaustedError(
            f"{url} had to interrupt the answer for lack of room, and an erased span of the thread is no longer "
            "cached; ask again: the span is then left out"
        )
    if COLD in message:
        return ColdTombstoneError(message)
    if any(sign in message.lower() for sign in _NO_ROOM):
        return PoolExhaustedError(f"{url}: {message}; shorten the thread, or start the server with more memory")
    if code == 400:
        return ValueError(f"{url} refuses the request: {message}")
    return ServerError(f"{url} failed{f' (HTTP {code})' if code else ''}: {message}")


def _message(response: httpx.Response) -> str:
    """Return the message in an answer of SGLang, of FastAPI, or of something between."""
    try:
        body = response.json()
    except ValueError:
        return response.text.strip()[:500] or response.reason_phrase
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)
