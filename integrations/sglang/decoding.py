"""A request to SGLang's `/generate`, and the tokens in the events that it answers with."""

from __future__ import annotations

from typing import Any

from kv_retract.cache.base import ThreadKey
from kv_retract.engine.base import GeneratedToken, ModelSpec
from kv_retract.errors import ServerError
from kv_retract.types import SamplingParams

from .client import failure


def request_for(key: ThreadKey, sampling: SamplingParams, spec: ModelSpec) -> dict[str, Any]:
    """Return the body of a request that streams.

    `SamplingParams.stop` is not sent: strings are the caller's to apply.

    Raises:
        ValueError: the key is empty or leaves no room for a token, or no token is asked for.
    """
    room = spec.max_positions - len(key)
    if not len(key):
        raise ValueError("cannot decode from an empty key")
    if room < 1:
        raise ValueError(
            f"the thread needs {len(key)} positions and one to answer, but {spec.name!r} is served with "
            f"{spec.max_positions}; shorten the thread"
        )
    if sampling.max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {sampling.max_tokens}")
    params: dict[str, Any] = {
        "max_new_tokens": min(sampling.max_tokens, room),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "stop_token_ids": list(sampling.stop_token_ids),
    }
    if sampling.seed is not None:
        params["sampling_seed"] = sampling.seed
    return {
        "input_ids": key.ids.tolist(),
        "extra_key": key.extra_key or None,
        "sampling_params": params,
        "return_logprob": sampling.logprobs,
        "stream": True,
    }


def tokens_of(event: dict[str, Any], told: int, sampling: SamplingParams, url: str) -> list[GeneratedToken]:
    """Return the tokens of an event that earlier ones did not bring; the last of an answer has a finish reason.

    Args:
        event: with all tokens of the answer so far, or (`--incremental-streaming-output`) with the new ones.
        told: how many came before.
        sampling: as asked for.
        url: of the server, for messages.

    Raises:
        KVRetractError, ValueError: the server gave up; see `client.failure`.
    """
    if error := event.get("error"):
        raise failure(url, str(error["message"]), error.get("code"), begun=told > 0)
    meta = event["meta_info"]
    reason, matched = _finish(meta["finish_reason"] or {}, url, begun=told > 0)
    ids, logprobs = event["output_ids"], meta.get("output_token_logprobs") or []
    if len(ids) > meta["completion_tokens"] - told:
        ids, logprobs = ids[told:], logprobs[told:]
    if matched is not None and (not ids or ids[-1] != matched):
        ids = [*ids, matched]  # a frontend that leaves the end token out
    if ids and reason and ids[-1] in sampling.stop_token_ids:
        reason = "stop"  # SGLang says `length` of an end token in the last place
    return [
        GeneratedToken(
            id=id,
            logprob=float(logprobs[n][0]) if sampling.logprobs and n < len(logprobs) else None,
            num_cached_tokens=meta["cached_tokens"],
            finish_reason=reason if n == len(ids) - 1 else None,
        )
        for n, id in enumerate(ids)
    ]


def _finish(finish: dict[str, Any], url: str, *, begun: bool) -> tuple[str | None, int | None]:
    """Return why an answer ended, and the end token; None and None: it goes on."""
    kind, matched = finish.get("type"), finish.get("matched")
    if kind == "abort":
        raise failure(url, str(finish.get("message")), finish.get("status_code"), begun=begun)
    if kind == "stop" and not isinstance(matched, int):
        raise ServerError(f"{url} stopped the answer, and not at an end token: {matched}")
    return kind, matched
