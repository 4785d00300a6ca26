"""What replicas tell each other, over canned transports; `tests/sglang/test_replicas.py` has real ones."""

import asyncio
import json
import time
from dataclasses import asdict

import httpx

from kv_retract.integrations.sglang import api
from kv_retract.integrations.sglang.peers import Peers, Spread
from kv_retract.integrations.sglang.records import SpanLedger, SpanRecord

A, B = "http://a.test:1", "http://b.test:1"


def record(number, **changes):
    given = dict(
        retraction_id=f"r{number}", extra_key="t", start=0, end=number, digest="d", state="steered", eraser="kveraser",
        eraser_id="e", shared=False,
    )  # fmt: skip
    return SpanRecord(**{**given, **changes})


class Replicas:
    """Fakes of other replicas: ledgers by URL, some of them down."""

    def __init__(self, **options):
        self.ledgers, self.down, self.asked = {A: SpanLedger(), B: SpanLedger()}, set(), []
        self.peers = Peers([A, f"{B}/"], transport=httpx.MockTransport(self.answer), **options)

    def answer(self, request):
        url = f"{request.url.scheme}://{request.url.host}:{request.url.port}"
        if url in self.down:
            raise httpx.ConnectError("refused")
        body = api.ChangesRequest.model_validate_json(request.content)
        self.asked.append((url, body, request.headers.get("authorization")))
        ledger = self.ledgers[url]
        after = body.after if body.ledger_id == ledger.ledger_id else 0
        told = api.ChangesAnswer(
            ledger_id=ledger.ledger_id, sequence=ledger.sequence, records=[asdict(r) for r in ledger.changes(after)]
        )
        return httpx.Response(200, text=told.model_dump_json())


def test_only_what_changed_is_told_again():
    replicas = Replicas(api_key="secret")
    replicas.ledgers[A].put([record(1), record(2)])
    replicas.peers.pull()
    assert replicas.peers.take() == [record(1), record(2)] and replicas.peers.take() == []
    replicas.peers.pull()
    assert replicas.peers.take() == []
    replicas.ledgers[A].decide([record(1)], "revoked")
    replicas.ledgers[B].put([record(3)])
    replicas.peers.pull()
    assert replicas.peers.take() == [record(1, state="revoked", revision=2), record(3)]
    assert {key for *_, key in replicas.asked} == {"Bearer secret"}


def test_a_peer_that_lost_its_ledger_is_read_from_the_beginning():
    replicas = Replicas()
    replicas.ledgers[A].put([record(1), record(2)])
    replicas.peers.pull()
    replicas.peers.take()
    replicas.ledgers[A] = SpanLedger()
    replicas.ledgers[A].put([record(5)])
    replicas.peers.pull()
    assert replicas.peers.take() == [record(5)]


def test_a_peer_that_is_away_is_told_of_once_and_asked_again(caplog):
    replicas = Replicas()
    replicas.ledgers[A].put([record(1)])
    replicas.ledgers[B].put([record(2)])
    replicas.down = {A}
    for _ in range(3):
        replicas.peers.pull()
    assert replicas.peers.take() == [record(2)] and caplog.text.count(A) == 1
    replicas.down = set()
    replicas.peers.pull()
    assert replicas.peers.take() == [record(1)]


def test_what_is_no_ledger_is_a_peer_that_is_away(caplog):
    peers = Peers([A], transport=httpx.MockTransport(lambda request: httpx.Response(200, json={"records": 1})))
    peers.pull()
    assert peers.take() == [] and A in caplog.text


def test_peers_are_watched():
    replicas = Replicas()
    replicas.peers.watch(0.01)
    replicas.ledgers[B].put([record(1)])
    end, found = time.monotonic() + 10, []
    while not found and time.monotonic() < end:
        found = replicas.peers.take()
        time.sleep(0.01)
    assert found == [record(1)]


def test_what_was_done_is_sent_on_and_who_confirmed_is_told():
    asked = []

    def answer(request):
        asked.append((request.url.host, request.url.path, json.loads(request.content)))
        if request.url.host == "b.test":
            return httpx.Response(409, json={"error": "busy", "message": "runs"})
        if request.url.host == "c.test":
            raise httpx.ConnectError("refused")
        return httpx.Response(502 if request.url.host == "d.test" else 200, text="{}")

    urls = [A, B, "http://c.test:1", "http://d.test:1"]
    spread = Spread(urls, transport=httpx.MockTransport(answer))
    request = api.RetractRequest(extra_key="t", token_ids=[1, 2, 3], spans=[api.Interval(start=0, end=1)], reason="why")
    told = asyncio.run(spread.send("retract", request))
    assert told.confirmed == [A]
    assert told.missed == {B: "busy: runs", urls[2]: "ConnectError: refused", urls[3]: "HTTP 502"}
    assert {(path, body["spread"], body["reason"]) for _, path, body in asked} == {
        ("/kv_retract/retract", False, "why")
    }
    assert api.RetractRequest.model_validate(asked[0][2]).token_ids == [1, 2, 3]
