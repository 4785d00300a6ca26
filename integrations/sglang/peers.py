"""Other replicas of a server: they are told what this one took back, and asked for what it missed.

`Spread` tells them at once, in the frontend's process. `Peers` asks them, in the scheduler's: when it starts, before it
serves anything, and every few seconds after that. What it learns waits for the scheduler, which takes it over before
it looks at the next request.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import httpx
from pydantic import ValidationError

from . import api
from .records import SpanRecord

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0
"""Of a question, and of finding a peer; a start waits as long for each one that is there and says nothing."""
EDIT_S = 60.0
"""How long a peer may take for an edit, beside the time that it waits for the thread."""


class Spread:
    """Sends what was done here on to the other replicas.

    Args:
        urls: of them, without a path.
        api_key: which they expect; empty: none.
        transport: of httpx; for tests.
    """

    def __init__(
        self, urls: Sequence[str], *, api_key: str = "", transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._urls = [url.rstrip("/") for url in urls]
        self._options = {"headers": _headers(api_key), "transport": transport}

    async def send(self, operation: str, request: api.RetractRequest | api.ChangeRequest) -> api.Replicas:
        """Let all of them do what a request asks for; one that does not is told, with the reason."""
        body = request.model_copy(update={"spread": False}).model_dump()
        timeout = httpx.Timeout(request.wait_s + EDIT_S, connect=TIMEOUT_S)
        async with httpx.AsyncClient(timeout=timeout, **self._options) as http:
            wrong = await asyncio.gather(
                *(self._tell(http, f"{url}/kv_retract/{operation}", body) for url in self._urls)
            )
        told = dict(zip(self._urls, wrong, strict=True))
        return api.Replicas(
            confirmed=[url for url, error in told.items() if not error],
            missed={url: error for url, error in told.items() if error},
        )

    async def _tell(self, http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> str:
        """Return what went wrong; empty: nothing."""
        try:
            response = await http.post(url, json=body)
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}"
        if response.status_code == 200:
            return ""
        try:
            refusal = api.Refusal.model_validate_json(response.content)
        except ValidationError:
            return f"HTTP {response.status_code}"
        return f"{refusal.error}: {refusal.message}"


@dataclass(slots=True)
class _Peer:
    """How far a peer's ledger is known."""

    url: str
    ledger_id: str = ""
    sequence: int = 0
    is_silent: bool = False


class Peers:
    """Pulls the changes of other replicas' ledgers.

    Args:
        urls: of them, without a path.
        api_key: which they expect; empty: none.
        transport: of httpx; for tests.
    """

    def __init__(self, urls: Sequence[str], *, api_key: str = "", transport: httpx.BaseTransport | None = None) -> None:
        self._http = httpx.Client(headers=_headers(api_key), timeout=TIMEOUT_S, transport=transport)
        self._peers = [_Peer(url.rstrip("/")) for url in urls]
        self._found: SimpleQueue[list[SpanRecord]] = SimpleQueue()

    def pull(self) -> None:
        """Ask every peer once; one that does not answer is asked again the next time."""
        for peer in self._peers:
            try:
                body = api.ChangesRequest(ledger_id=peer.ledger_id, after=peer.sequence).model_dump()
                response = self._http.post(f"{peer.url}/kv_retract/changes", json=body)
                response.raise_for_status()
                told = api.ChangesAnswer.model_validate_json(response.content)
                records = [SpanRecord(**record) for record in told.records]
            except (httpx.HTTPError, ValidationError, TypeError) as error:
                if not peer.is_silent:
                    log.warning("kv_retract: cannot ask %s what it took back: %s; trying again", peer.url, error)
                peer.is_silent = True
                continue
            if records:
                self._found.put(records)
            peer.ledger_id, peer.sequence, peer.is_silent = told.ledger_id, told.sequence, False

    def watch(self, seconds: float) -> None:
        """Pull every few seconds for as long as the process lives, in a thread of its own."""

        def run() -> None:
            while not stopped.wait(seconds):
                self.pull()

        stopped = threading.Event()
        threading.Thread(target=run, name="kv_retract peers", daemon=True).start()

    def take(self) -> list[SpanRecord]:
        """Return what was found since the last call."""
        records: list[SpanRecord] = []
        while True:
            try:
                records += self._found.get_nowait()
            except Empty:
                return records


def key_of(server_args: Any) -> str:
    """Return the key that the plugin's routes take, as SGLang's arguments tell it; empty: none."""
    return server_args.admin_api_key or server_args.api_key or ""


def _headers(api_key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}
