"""The client of an SGLang server, against a fake one with canned answers; `test_sglang_sessions` has one that runs.

That SGLang itself answers as the fakes do is shown where SGLang runs.
"""

from contextlib import closing
from functools import partial

import httpx
import pytest

from kv_retract.engine.base import Engine, GeneratedToken, LocalEngine
from kv_retract.erasers import ERASERS
from kv_retract.errors import (
    ColdTombstoneError,
    ConstraintError,
    EraserMismatchError,
    PoolExhaustedError,
    ServerError,
    SpanError,
    ThreadBusyError,
    UnsupportedError,
)
from kv_retract.integrations.sglang import SGLangEngine
from kv_retract.types import EraseResult, SamplingParams

from .sglang_fakes import COLD, KVERASER, STATUS, URL, CannedServer, Events, decode, event, key_of, keys, stopped_by

# -- the server -----------------------------------------------------------------------------------------------------


def test_the_model_is_that_of_the_server():
    server = CannedServer()
    with server.engine() as served:
        assert isinstance(served, Engine) and not isinstance(served, LocalEngine)
        assert (served.spec.name, served.spec.max_positions, served.spec.dtype) == ("served", 64, "bfloat16")
    with pytest.raises(RuntimeError, match="client has been closed"):
        served.cached(key_of(20))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx.ConnectError("refused"), f"cannot reach a server at {URL}: refused; start one with `kv-retract serve`"),
        (httpx.ReadTimeout("slow"), r"silent for too long \(ReadTimeout\)"),
        ((404, {"detail": "Not Found"}), "does not know /kv_retract/status.*without the plugin.*kv-retract serve"),
        ((401, {"error": "Unauthorized"}), r"refuses the key \(HTTP 401\); pass api_key"),
        ((500, {"error": {"message": "a bug"}}), r"failed \(HTTP 500\): a bug"),
        ((500, ["?"]), r"failed \(HTTP 500\): \['\?'\]"),
        (STATUS | {"new": 1}, "install the same version"),
        ((500, {"error": "failed", "message": "a bug"}), r"refuses \(failed\): a bug"),
    ],
)
def test_a_server_that_cannot_be_used_is_named_with_the_remedy(answer, message):
    with pytest.raises(ServerError, match=message) as caught:
        CannedServer(status=answer).engine()
    assert URL in str(caught.value)


def test_a_malformed_url_is_refused():
    with pytest.raises(ServerError, match="expected a URL such as http://localhost:30000, got 'http://a:port'"):
        SGLangEngine("http://a:port")
    with pytest.raises(ServerError, match="cannot reach a server at localhost:30000: .*protocol.*correct the URL"):
        SGLangEngine("localhost:30000")


def test_the_key_is_sent_with_every_request():
    seen = []

    def answer(request):
        seen.append(request.headers.get("Authorization"))
        return httpx.Response(200, json=STATUS)

    SGLangEngine(URL, api_key="secret", transport=httpx.MockTransport(answer))
    SGLangEngine(URL, transport=httpx.MockTransport(answer))
    assert seen == ["Bearer secret", None]


# -- what is cached -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("span", "cached", "expected"),
    [((5, 9), 20, 20), ((5, 9), 13, 13), ((8, 12), 20, 20), ((9, 13), 20, 12), ((9, 13), 11, 11), ((15, 20), 20, 12)],
)
def test_tombstones_that_sglang_would_read_as_text_are_not_cached(span, cached, expected):
    server = CannedServer(match={"num_cached": cached})
    _, new = keys(20, span)
    assert server.engine().cached(new) == expected
    assert server.asked[-1] == ("match", {"token_ids": new.ids.tolist(), "extra_key": "n"})
    assert server.engine().cached(key_of(20)) == cached and server.asked[-1][1]["extra_key"] is None


def test_a_short_or_empty_key_is_no_exception():
    served = CannedServer(match={"num_cached": 4}).engine()
    assert served.cached(key_of(0)) == 0
    assert served.cached(keys(4, (1, 2))[1]) == 0


def test_positions_other_than_places_are_not_cached_and_never_sent():
    """What another engine's `shift` edited: a session leaves the span out, since its tombstones are not cached."""
    _, new = keys(30, (5, 9), closes_gap=True)
    server = CannedServer(match={"num_cached": 5})
    served = server.engine()
    assert served.cached(new) == 5
    assert server.asked[-1] == ("match", {"token_ids": new.ids[:5].tolist(), "extra_key": "n"})
    with pytest.raises(UnsupportedError, match=r"entry 5 .* position 4, .*\(shift\)"):
        next(served.generate(new, SamplingParams()))


# -- decoding -------------------------------------------------------------------------------------------------------


def test_a_request_says_what_sglang_understands():
    server = CannedServer(generate=Events([event([1], stopped_by(1))]))
    sampling = SamplingParams(
        max_tokens=5, temperature=0.5, top_p=0.9, top_k=3, seed=7, stop=("x",), stop_token_ids=(1, 2), logprobs=True
    )
    list(server.engine().generate(key_of(3, extra_key="n"), sampling))
    params = {"max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop_token_ids": [1, 2]}
    assert server.asked[-1] == (
        "generate",
        {
            "input_ids": [0, 1, 2], "extra_key": "n", "sampling_params": params | {"sampling_seed": 7},
            "return_logprob": True, "stream": True,
        },
    )  # fmt: skip
    server.answers["generate"] = Events([event([1], stopped_by(1))])
    list(server.engine().generate(key_of(60), SamplingParams()))
    (_, body) = server.asked[-1]
    assert body["extra_key"] is None and body["return_logprob"] is False
    greedy = {"max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0, "top_k": -1, "stop_token_ids": []}
    assert body["sampling_params"] == greedy, "no more tokens than the model has positions"


@pytest.mark.parametrize(
    ("length", "max_tokens", "message"),
    [
        (0, 1, "empty key"),
        (64, 1, "needs 64 positions and one to answer, but 'served'.* 64"),
        (9, 0, "at least 1, got 0"),
    ],
)
def test_what_cannot_run_is_refused_here(length, max_tokens, message):
    server = CannedServer()
    with pytest.raises(ValueError, match=message):
        next(server.engine().generate(key_of(length), SamplingParams(max_tokens=max_tokens)))
    assert server.changes == []


FIRST, REST, END = [(-0.5, 5, None)], [(-0.25, 6, None), (-1.0, 5, None)], [(-2.0, 9, None)]


@pytest.mark.parametrize(
    "events",
    [
        pytest.param(
            [
                event([5], logprobs=FIRST),
                event([5, 6, 5], logprobs=FIRST + REST),
                event([5, 6, 5], logprobs=FIRST + REST),
                event([5, 6, 5, 9], stopped_by(9), logprobs=FIRST + REST + END),
            ],
            id="cumulative",
        ),
        pytest.param(
            [
                event([5], total=1, logprobs=FIRST),
                event([6, 5], total=3, logprobs=REST),
                event([], total=3),
                event([9], stopped_by(9), total=4, logprobs=END),
            ],
            id="incremental",
        ),
        pytest.param([event([5, 6, 5, 9], stopped_by(9), logprobs=FIRST + REST + END)], id="at once"),
    ],
)
@pytest.mark.parametrize("logprobs", [True, False])
def test_every_form_of_streaming_gives_the_same_tokens(events, logprobs):
    told = decode(events, SamplingParams(stop_token_ids=(9,), logprobs=logprobs))
    assert [token.id for token in told] == [5, 6, 5, 9]
    assert [token.logprob for token in told] == ([-0.5, -0.25, -1.0, -2.0] if logprobs else [None] * 4)
    assert [token.finish_reason for token in told] == [None, None, None, "stop"]
    assert {token.num_cached_tokens for token in told} == {7}


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        pytest.param([event([5, 6], {"type": "length", "length": 2})], [(5, None), (6, "length")], id="length"),
        pytest.param([event([5, 9], {"type": "length"})], [(5, None), (9, "stop")], id="end token in the last place"),
        pytest.param([event([5]), event([5], stopped_by(9))], [(5, None), (9, "stop")], id="end token left out"),
        pytest.param([event([], stopped_by(9))], [(9, "stop")], id="nothing but an end token, left out"),
        pytest.param([event([5, 3], stopped_by(3))], [(5, None), (3, "stop")], id="the model's own end token"),
    ],
)
def test_an_answer_ends_as_that_of_the_embedded_engine(events, expected):
    assert [(token.id, token.finish_reason) for token in decode(events)] == expected


@pytest.mark.parametrize(
    ("last", "error", "message"),
    [
        (event([5, 0], {"type": "stop", "matched": "NaN happened"}), ServerError, "not at an end token: NaN happened"),
        (event([5], {"type": "abort", "message": "Aborted", "status_code": None}), ServerError, "failed: Aborted"),
        (
            event([5], {"type": "abort", "message": "The request queue is full.", "status_code": 503}),
            ServerError,
            r"\(HTTP 503\): The request queue is full",
        ),
        (
            event([5], {"type": "abort", "message": "Out of memory even after ...", "status_code": 500}),
            PoolExhaustedError,
            "Out of memory even after .*; shorten the thread",
        ),
        ({"error": {"message": "exceeds the maximum allowed length (9 tokens)", "code": 400}}, PoolExhaustedError, "9"),
        ({"error": {"message": "top_p must be in (0, 1]", "code": 400}}, ValueError, "refuses the request: top_p must"),
        (event([5, 6]), ServerError, "ended the answer after 2 tokens without a reason"),
    ],
)
def test_a_server_that_gives_up_is_an_error(last, error, message):
    with pytest.raises(error, match=message):
        decode([event([5]), last])


COLD_FORMS = [
    pytest.param((400, {"error": {"message": COLD}}), id="HTTP 400"),
    pytest.param([{"error": {"message": COLD, "code": 400}}], id="an event"),
    pytest.param([event([], {"type": "abort", "message": COLD, "status_code": 400})], id="an abort"),
]


@pytest.mark.parametrize("answer", COLD_FORMS)
def test_tombstones_that_are_not_cached_are_told_as_such(answer):
    server = CannedServer(generate=Events(answer) if isinstance(answer, list) else answer)
    with pytest.raises(ColdTombstoneError, match="3 of the prompt are not cached"):
        next(server.engine().generate(key_of(20), SamplingParams()))


@pytest.mark.parametrize("answer", COLD_FORMS[1:])
def test_tombstones_lost_half_way_do_not_make_a_session_answer_twice(answer):
    with pytest.raises(PoolExhaustedError, match="interrupt the answer for lack of room.*ask again"):
        decode([event([5]), *answer])


def test_leaving_an_answer_closes_the_connection():
    events = Events([event([5]), event([5, 6]), event([5, 6, 7])])
    tokens = CannedServer(generate=events).engine().generate(key_of(20), SamplingParams())
    with closing(tokens):
        assert next(tokens) == GeneratedToken(id=5, num_cached_tokens=7)
        assert not events.closed
    assert events.closed


def test_a_connection_that_breaks_is_named():
    def broken():
        yield event([5])
        raise httpx.ReadError("reset by peer")

    with pytest.raises(ServerError, match=f"cannot reach a server at {URL}: reset by peer"):
        decode(broken())


def test_a_logits_processor_is_refused_before_anything_is_sent():
    server = CannedServer()
    tokens = server.engine().generate(key_of(20), SamplingParams(), logits_processor=lambda ids, logits: logits)
    with pytest.raises(ConstraintError, match="tool_choice 'auto'.*KVRetractSession.from_pretrained"):
        next(tokens)
    assert server.changes == []


# -- edits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("kveraser", "kveraser"), ("none", "none"), ("erratum", "none")])
def test_an_edit_is_sent_as_far_as_it_is_cached(name, kind):
    answer = dict(tokens_erased=8, tokens_recomputed=1, tokens_moved=2, slots_copied=3, slots_freed=4, edit_ms=0.5)
    server = CannedServer(match={"num_cached": 30}, edit=answer)
    old, new = keys(40, (4, 8), (20, 24), (32, 36))
    eraser = ERASERS.create(name)
    result = server.engine().erase(old, [(4, 8), (20, 24), (32, 36)], eraser, new)
    assert result == EraseResult(eraser_id=eraser.eraser_id, **answer)
    (sent,) = server.changes
    assert sent == (
        "edit",
        {
            "token_ids": old.ids[:30].tolist(), "new_token_ids": new.ids[:30].tolist(), "extra_key": "n",
            "spans": [{"start": 4, "end": 8}, {"start": 20, "end": 24}], "eraser": kind, "wait_s": 5.0,
        },
    )  # fmt: skip


def dropped(key, start, *, branches=False):
    """A deletion waits longer than an edit."""
    body = {"token_ids": key.ids.tolist(), "start": start, "branches": branches, "extra_key": "n"}
    return ("drop", body | {"wait_s": 60.0 if branches else 5.0})


def test_a_span_that_eviction_has_cut_goes_as_a_whole():
    old, new = keys(40, (4, 8), (20, 24))
    server = CannedServer(match={"num_cached": 22}, edit={"tokens_erased": 4})
    assert server.engine().erase(old, [(4, 8), (20, 24)], KVERASER, new).tokens_erased == 4
    assert [name for name, _ in server.changes] == ["drop", "edit"]
    assert server.changes[0] == dropped(old, 20) and len(server.changes[1][1]["token_ids"]) == 20


def test_what_is_not_cached_is_left_to_the_next_prefill():
    old, new = keys(40, (4, 8))
    for cached, start in ((6, 4), (2, 2)):
        server = CannedServer(match={"num_cached": cached}, drop={"slots_freed": 1})
        result = server.engine().erase(old, [(4, 8)], KVERASER, new)
        assert result == EraseResult(eraser_id=KVERASER.eraser_id, slots_freed=1, exact=True)
        assert server.changes == [dropped(old, start)]
    server = CannedServer(match={"num_cached": 40}, drop={"slots_freed": 1}, edit=(409, refusal("not_cached")))
    result = server.engine().erase(old, [(4, 8)], KVERASER, new)
    assert result == EraseResult(eraser_id=KVERASER.eraser_id, slots_freed=1, exact=True), "evicted in between"
    assert server.changes[1:] == [dropped(old, 4)]


def test_an_exact_edit_forgets_what_follows():
    old, new = keys(40, (4, 8), (20, 24), exact=True)
    server = CannedServer(match={"num_cached": 30}, drop={"slots_freed": 26})
    result = server.engine().erase(old, [(4, 8), (20, 24)], ERASERS.create("recompute"), new)
    assert result == EraseResult(eraser_id="recompute", tokens_erased=8, slots_freed=26, exact=True)
    assert server.changes == [dropped(old, 4)]


@pytest.mark.parametrize("name", ["mask", "shift", "repair", "selective"])
def test_an_eraser_that_a_server_cannot_run_is_refused(name):
    old, new = keys(40, (4, 8))
    server = CannedServer(match={"num_cached": 40})
    with pytest.raises(
        UnsupportedError, match=rf"{name}.*cannot run.*expected kveraser .*, recompute, erratum or none"
    ):
        server.engine().erase(old, [(4, 8)], ERASERS.create(name), new)
    assert server.changes == []


@pytest.mark.parametrize(("served", "said"), [("kveraser(other)", r"'kveraser\(other\)'"), ("", "'none'")])
def test_another_learned_eraser_is_refused(served, said):
    old, new = keys(40, (4, 8))
    server = CannedServer(match={"num_cached": 40}, status=STATUS | {"eraser_id": served})
    with pytest.raises(EraserMismatchError, match=rf"{said}, got .kveraser\(variant='kv_map',weights=.*--eraser"):
        server.engine().erase(old, [(4, 8)], KVERASER, new)
    assert server.changes == []


def test_keys_that_do_not_fit_the_spans_are_refused_as_everywhere():
    old, new = keys(40, (4, 8))
    served = CannedServer(match={"num_cached": 40}).engine()
    with pytest.raises(SpanError, match="no span"):
        served.erase(old, [], KVERASER, new)
    with pytest.raises(SpanError, match="retracted already"):
        served.erase(new, [(4, 8)], KVERASER, new)
    with pytest.raises(ValueError, match="keeps lengths"):
        served.erase(old, [(4, 8)], KVERASER, new.cut(39))


def refusal(reason):
    return {"error": reason, "message": "because"}


@pytest.mark.parametrize(
    ("status", "reason", "error"),
    [
        (409, "busy", ThreadBusyError),
        (503, "no_room", PoolExhaustedError),
        (409, "eraser_mismatch", EraserMismatchError),
        (409, "unsupported", UnsupportedError),
        (400, "bad_request", ServerError),
        (409, "overlaps", ServerError),
        (500, "failed", ServerError),
    ],
)
def test_refusals_are_the_errors_of_an_engine(status, reason, error):
    old, new = keys(40, (4, 8))
    refused = (status, refusal(reason))
    server = CannedServer(match={"num_cached": 40}, edit=refused, drop=refused)
    served = server.engine()
    for call in (partial(served.erase, old, [(4, 8)], KVERASER, new), partial(served.drop, old, 3)):
        with pytest.raises(error, match=rf"{URL} refuses \({reason}\): because"):
            call()
    server.answers["match"] = refused
    with pytest.raises(error, match="because"):
        served.cached(old)


def test_drop_and_purge_name_the_entry():
    old, _ = keys(40)
    server = CannedServer(drop={"slots_freed": 5})
    served = server.engine()
    assert served.drop(old, 3) == served.purge(old, 4) == 5
    assert server.changes == [dropped(old, 3), dropped(old, 4, branches=True)]
    server.answers["drop"] = (409, refusal("not_cached"))
    assert served.drop(old, 3) == 0
