"""The client's half: an engine whose model and cache are in an SGLang server with the plugin of kv-retract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np

from kv_retract.cache.base import IntArray, ThreadKey
from kv_retract.cache.keys import is_tombstone
from kv_retract.engine.base import (
    Engine,
    GeneratedToken,
    LogitsProcessor,
    ModelSpec,
    SupportsErase,
    check_edit,
    end_of_edit,
)
from kv_retract.erasers import ErratumEraser, KVEraserEraser, NoneEraser
from kv_retract.errors import (
    ConstraintError,
    EraserMismatchError,
    KVRetractError,
    PoolExhaustedError,
    ServerError,
    ThreadBusyError,
    UnsupportedError,
    UnsupportedModelError,
)
from kv_retract.ledger.render import Renderer
from kv_retract.reference import MODEL_DIR
from kv_retract.session import KVRetractSession
from kv_retract.types import EraseResult, Interval, SamplingParams

from . import api
from .client import Client
from .decoding import request_for, tokens_of
from .refusal import Refused

TIMEOUT_S = 600.0
PURGE_WAIT_S = 60.0
"""How long a guarantee of deletion waits for requests that hold what is to be forgotten."""

_ERRORS: dict[str, type[KVRetractError]] = {
    "busy": ThreadBusyError,
    "no_room": PoolExhaustedError,
    "eraser_mismatch": EraserMismatchError,
    "unsupported": UnsupportedError,
}
"""By `api.Reason`; ServerError for all others."""


class SGLangEngine(Engine):
    """Runs threads on a server that `kv-retract serve` started. Use it as a context manager, or close it.

    What differs from the embedded engine: it takes no logits processor; the only erasers are `kveraser` with the
    weights that the server was started with, `recompute`, `erratum` and `none`; an exact edit leaves the prefill to the
    next request; the served model's own end tokens end an answer, asked for or not; log-probabilities are those after
    the temperature; a seed counts only where the server runs with `--enable-deterministic-inference`. A namespace is
    edited between its requests: while one runs, an edit waits for it, for some seconds.

    Args:
        url: of the server.
        api_key: the server's `--api-key`, or its `--admin-api-key` where it has one.
        timeout: seconds that the server may be silent, as it is during a long prefill.
        transport: of httpx, for tests.

    Raises:
        ServerError: there is no such server.
    """

    constrains = False

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._client = Client(url, api_key=api_key, timeout=timeout, transport=transport)
        try:
            status = self._status()
        except BaseException:
            self.close()
            raise
        self.spec = ModelSpec(
            name=status.model,
            num_layers=status.num_layers,
            num_kv_heads=status.num_kv_heads,
            head_dim=status.head_dim,
            vocab_size=status.vocab_size,
            max_positions=status.max_positions,
            dtype=status.dtype,
            device=status.device,
        )

    def close(self) -> None:
        """Close the connections. The server keeps what is cached."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cached(self, key: ThreadKey) -> int:
        """Return how many leading entries are cached.

        Tombstones that SGLang would read as text are not, and nothing from a gap in the positions on: SGLang counts
        them by place, so what another engine's `shift` edited is left out and prefilled anew.

        Raises:
            ServerError: the server cannot be reached, or fails.
        """
        if not len(key):
            return 0
        if len(gaps := _gaps(key)):
            key = key.cut(int(gaps[0]))
        num_cached, tail = self._match(key), max(0, len(key) - api.TAIL)
        return min(num_cached, tail) if np.any(is_tombstone(key.ids[tail:])) else num_cached

    def generate(
        self, key: ThreadKey, sampling: SamplingParams, *, logits_processor: LogitsProcessor | None = None
    ) -> Iterator[GeneratedToken]:
        """Prefill and decode; closing the iterator closes the connection, and the server aborts the request.

        Raises as the contract says, and also:

            UnsupportedError: the key has a gap in its positions.
            ServerError: the server cannot be reached, or fails.
            PoolExhaustedError: also half-way, where the server needs the thread's room for others.
        """
        if logits_processor is not None:
            raise ConstraintError(
                "an SGLang server cannot keep an answer in a form that this process enforces token by token; let the "
                "model decide (tool_choice 'auto', without strict, response_format or structured output), or use the "
                "embedded engine (KVRetractSession.from_pretrained)"
            )
        _check_places(key)
        told = 0
        with closing(self._client.events("/generate", request_for(key, sampling, self.spec))) as events:
            for event in events:
                for token in tokens_of(event, told, sampling, self._client.url):
                    told += 1
                    yield token
                if "meta_info" in event and event["meta_info"]["finish_reason"]:
                    return
        raise ServerError(f"{self._client.url} ended the answer after {told} tokens without a reason; see its log")

    def erase(
        self, key: ThreadKey, spans: Sequence[Interval], eraser: SupportsErase, new_key: ThreadKey
    ) -> EraseResult:
        """Edit and commit under the new key, in the server; after an exact edit the next request prefills.

        Raises:
            SpanError, ValueError: see `check_edit`.
            UnsupportedError, EraserMismatchError: see `check_eraser`.
            ThreadBusyError: a request of the namespace runs or waits.
            PoolExhaustedError: running requests hold all the room.
            ServerError: the server cannot be reached, or fails.
        """
        check_edit(key, spans, eraser, new_key)
        kind = self.check_eraser(eraser)
        _check_places(new_key)
        num_cached = self._match(key)
        cached = end_of_edit(num_cached, spans)
        whole = [(start, end) for start, end in spans if end <= cached]
        if not whole:
            return self._forgotten(key, cached, eraser)
        if kind == "recompute":
            return self._forgotten(key, whole[0][0], eraser, tokens_erased=sum(end - start for start, end in whole))
        if cached < num_cached:
            self.drop(key, cached)
        try:
            edited = self._edit(key.cut(cached), whole, kind, new_key.cut(cached))
        except Refused as refused:
            if refused.reason != "not_cached":
                raise self._error(refused) from refused
            return self._forgotten(key, whole[0][0], eraser)
        return EraseResult(eraser_id=eraser.eraser_id, **edited.model_dump())

    def check_eraser(self, eraser: SupportsErase) -> api.Eraser:
        """Return what the server calls an eraser.

        Raises:
            UnsupportedError: a server cannot run it.
            EraserMismatchError: the server was started with another learned eraser, or with none.
        """
        if eraser.exact:
            return "recompute"
        if isinstance(eraser, NoneEraser | ErratumEraser):
            return "none"
        if not isinstance(eraser, KVEraserEraser):
            raise UnsupportedError(
                f"the eraser {eraser.eraser_id!r} cannot run in an SGLang server; expected kveraser (with the weights "
                "that the server was started with), recompute, erratum or none; pass one of them to the session"
            )
        served = self._status().eraser_id
        if eraser.eraser_id != served:
            raise EraserMismatchError(
                f"expected the eraser that {self._client.url} was started with, {served or 'none'!r}, got "
                f"{eraser.eraser_id!r}; start the server with --eraser and the folder of this one, pass the server's "
                "(KVEraserEraser(path=...)), or pass eraser='recompute'"
            )
        return "kveraser"

    def drop(self, key: ThreadKey, start: int) -> int:
        """Forget the exclusive tail; raises ThreadBusyError or ServerError."""
        return self._drop(key, start, branches=False)

    def purge(self, key: ThreadKey, start: int) -> int:
        """Forget the tail and its branches; raises ThreadBusyError or ServerError."""
        return self._drop(key, start, branches=True, wait_s=PURGE_WAIT_S)

    def _status(self) -> api.StatusAnswer:
        try:
            return self._client.ask("status", api.StatusRequest(), api.StatusAnswer)
        except Refused as refused:
            raise self._error(refused) from refused

    def _match(self, key: ThreadKey) -> int:
        request = api.MatchRequest(token_ids=key.ids.tolist(), extra_key=key.extra_key or None)
        try:
            return self._client.ask("match", request, api.MatchAnswer).num_cached
        except Refused as refused:
            raise self._error(refused) from refused

    def _edit(self, key: ThreadKey, spans: Sequence[Interval], kind: api.Eraser, new_key: ThreadKey) -> api.EditAnswer:
        request = api.EditRequest(
            token_ids=key.ids.tolist(),
            new_token_ids=new_key.ids.tolist(),
            spans=[api.Interval(start=start, end=end) for start, end in spans],
            eraser=kind,
            extra_key=key.extra_key or None,
        )
        return self._client.ask("edit", request, api.EditAnswer)

    def _drop(self, key: ThreadKey, start: int, *, branches: bool, wait_s: float = 5.0) -> int:
        request = api.DropRequest(
            token_ids=key.ids.tolist(),
            start=start,
            branches=branches,
            extra_key=key.extra_key or None,
            wait_s=wait_s,
        )
        try:
            return self._client.ask("drop", request, api.DropAnswer).slots_freed
        except Refused as refused:
            if refused.reason == "not_cached":
                return 0
            raise self._error(refused) from refused

    def _forgotten(self, key: ThreadKey, start: int, eraser: SupportsErase, tokens_erased: int = 0) -> EraseResult:
        """Forget a path from `start` on, and leave the rest to the next prefill, without the spans."""
        freed = self.drop(key, start)
        return EraseResult(eraser_id=eraser.eraser_id, tokens_erased=tokens_erased, slots_freed=freed, exact=True)

    def _error(self, refused: Refused) -> KVRetractError:
        kind = _ERRORS.get(refused.reason, ServerError)
        return kind(f"{self._client.url} refuses ({refused.reason}): {refused}")


def connect(
    url: str,
    tokenizer: str | Path = "reference",
    *,
    api_key: str | None = None,
    timeout: float = TIMEOUT_S,
    transport: httpx.BaseTransport | None = None,
    **session: Any,
) -> KVRetractSession:
    """Open a session whose threads live in a server.

    Args:
        url: of the server.
        tokenizer: directory of the served model's tokenizer, or `reference` for the bundled model's.
        api_key: see `SGLangEngine`.
        timeout: see `SGLangEngine`.
        transport: see `SGLangEngine`.
        **session: see `KVRetractSession`; the eraser is `kveraser` unless another is named.

    Raises:
        ServerError: there is no such server.
        UnsupportedModelError: there is no tokenizer in the directory.
        UnsupportedError: a server cannot run the eraser.
        EraserMismatchError: the server has another eraser of that name, or none.
    """
    renderer = Renderer(_load_tokenizer(tokenizer))
    engine = SGLangEngine(url, api_key=api_key, timeout=timeout, transport=transport)
    try:
        opened = KVRetractSession(engine, renderer, **{"eraser": "kveraser", **session})
        engine.check_eraser(opened.eraser)
    except BaseException:
        engine.close()
        raise
    return opened


def _load_tokenizer(tokenizer: str | Path) -> Any:
    from transformers import AutoTokenizer

    folder = MODEL_DIR if tokenizer == "reference" else Path(tokenizer).expanduser()
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(
            f"expected the directory of the served model's tokenizer, got {str(tokenizer)!r}: {error}"
        ) from error


def _gaps(key: ThreadKey) -> IntArray:
    """Return the entries that do not stand at the position of their place."""
    return np.flatnonzero(key.positions != np.arange(len(key)))


def _check_places(key: ThreadKey) -> None:
    wrong = _gaps(key)
    if len(wrong):
        raise UnsupportedError(
            f"entry {wrong[0]} of the key stands at position {key.positions[wrong[0]]}, but SGLang counts positions by "
            "place: an eraser that closes gaps (shift) cannot be used there"
        )
