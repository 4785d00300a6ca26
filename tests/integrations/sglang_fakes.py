"""Servers that are none, for tests of the client: one gives canned answers, one has the embedded engine behind it."""

import json

import httpx
import numpy as np

from kv_retract.cache.base import ThreadKey
from kv_retract.cache.keys import KeyEdit, build_key
from kv_retract.erasers import KVEraserEraser
from kv_retract.errors import (
    ColdTombstoneError,
)
from kv_retract.integrations.sglang import SGLangEngine, api
from kv_retract.types import SamplingParams

URL = "http://sglang.test:30000"
KVERASER = KVEraserEraser()
STATUS = dict(
    model="served", vocab_size=100, max_positions=64, num_layers=2, num_kv_heads=1, head_dim=8, dtype="bfloat16",
    device="cuda", eraser_id=KVERASER.eraser_id, suffix_free=True, threads=0,
)  # fmt: skip
COLD = f"{api.COLD}: 3 of the prompt are not cached"


class Events(httpx.SyncByteStream):
    """Server-sent events, which know whether the client went away."""

    def __init__(self, events):
        self.events, self.closed = iter(events), False

    def __iter__(self):
        for event in self.events:
            yield b"data: " + json.dumps(event).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    def close(self):
        self.closed = True
        if hasattr(self.events, "close"):
            self.events.close()


class CannedServer:
    """A fake: answers to each path what it was told to, and keeps what it was asked."""

    def __init__(self, **answers):
        self.answers = {"status": STATUS, "match": {"num_cached": 0}, "drop": {"slots_freed": 0}, **answers}
        self.asked = []

    def __call__(self, request):
        name = request.url.path.rpartition("/")[2]
        self.asked.append((name, json.loads(request.content)))
        answer = self.answers[name]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, tuple):
            return httpx.Response(answer[0], json=answer[1])
        return httpx.Response(200, stream=answer) if isinstance(answer, Events) else httpx.Response(200, json=answer)

    @property
    def changes(self):
        return [(name, body) for name, body in self.asked if name not in ("status", "match")]

    def engine(self, **options):
        return SGLangEngine(URL, transport=httpx.MockTransport(self), **options)


class EmbeddedServer:
    """A fake: the embedded engine behind the routes of a server, with its refusals of cold tombstones."""

    def __init__(self, inner):
        self.inner, self.edits = inner, []

    def __call__(self, request):
        name, body = request.url.path.rpartition("/")[2], json.loads(request.content)
        if name == "generate":
            return httpx.Response(200, stream=Events(self.generate(body)))
        return httpx.Response(200, json=getattr(self, name)(body))

    def key(self, ids, body):
        return ThreadKey(np.array(ids, dtype=np.int64), np.arange(len(ids)), body["extra_key"] or "")

    def status(self, body):
        spec = {name: getattr(self.inner.spec, name) for name in STATUS if hasattr(self.inner.spec, name)}
        return STATUS | spec | {"model": self.inner.spec.name}

    def match(self, body):
        return {"num_cached": self.inner.cached(self.key(body["token_ids"], body))}

    def edit(self, body):
        self.edits.append(body)
        old, new = self.key(body["token_ids"], body), self.key(body["new_token_ids"], body)
        done = self.inner.erase(old, [(s["start"], s["end"]) for s in body["spans"]], KVERASER, new)
        names = api.EditAnswer.model_fields.keys()
        return {name: getattr(done, name) for name in names}

    def drop(self, body):
        drop = self.inner.purge if body["branches"] else self.inner.drop
        return {"slots_freed": drop(self.key(body["token_ids"], body), body["start"])}

    def generate(self, body):
        key, params, ids, logprobs = self.key(body["input_ids"], body), body["sampling_params"], [], []
        sampling = SamplingParams(
            max_tokens=params["max_new_tokens"], stop_token_ids=tuple(params["stop_token_ids"]), logprobs=True
        )
        try:
            for token in self.inner.generate(key, sampling):
                ids.append(token.id)
                logprobs.append((token.logprob, token.id, None))
                finish = token.finish_reason and {"type": token.finish_reason, "matched": token.id}
                yield event(ids, finish, cached=token.num_cached_tokens, logprobs=logprobs)
        except ColdTombstoneError:
            yield event([], {"type": "abort", "status_code": 400, "message": COLD})


def event(ids, finish=None, *, total=None, cached=7, logprobs=None):
    meta = {"finish_reason": finish, "completion_tokens": len(ids) if total is None else total, "cached_tokens": cached}
    return {
        "text": "",
        "output_ids": ids,
        "meta_info": meta | ({"output_token_logprobs": logprobs} if logprobs else {}),
    }


def stopped_by(id):
    return {"type": "stop", "matched": id}


def key_of(length, *, extra_key="", edits=()):
    return build_key(np.arange(length), edits, extra_key=extra_key)


def keys(length, *spans, exact=False, closes_gap=False):
    edits = [KeyEdit(start=a, end=b, exact=exact, eraser_id="e", closes_gap=closes_gap) for a, b in spans]
    return key_of(length, extra_key="n"), key_of(length, extra_key="n", edits=edits)


def decode(events, sampling=None):
    server = CannedServer(generate=Events(events))
    return list(server.engine().generate(key_of(20), sampling or SamplingParams(stop_token_ids=(9,))))
