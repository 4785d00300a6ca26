"""Span retractions in a running SGLang server: its cache, its answers, its guards."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kv_retract.cache.keys import KeyEdit, build_key
from kv_retract.erasers import ERASERS

from .expected import ASK, SPAN, answer, assert_same, embedded
from .servers import VENV, serving

pytestmark = [pytest.mark.sglang, pytest.mark.enable_socket]


def test_ordinary_answers_are_those_of_transformers(server, engine, thread):
    ids, name = thread
    assert_same(server.generate(ids, name), answer(engine, build_key(ids, ())))


@pytest.mark.parametrize("spans", [[SPAN], [(0, 12), SPAN, (80, 81), (200, 330)]], ids=["one", "several"])
def test_the_next_step_runs_on_the_edited_cache(server, engine, thread, spans):
    ids, name = thread
    ids, ask = ids[:380], ids[ASK]
    server.generate(ids, name, n=1)
    told = server.retract(ids, spans, name, reason="wrong")
    assert told["edit"]["tokens_erased"] == sum(b - a for a, b in spans)
    assert [r["state"] for r in told["retractions"]] == ["steered"] * len(spans)
    after = server.generate(np.concatenate([ids, ask]), name)
    assert (after["cached"], after["prompt"]) == (380, 400), "all but the new turn comes from the cache"
    assert_same(after, embedded(engine, ids, spans, "kveraser", ask))
    assert server.matched(ids, name) == spans[0][0], "the original text matches up to the span only"
    server.assert_alive()


def test_another_namespace_is_untouched(server, thread):
    ids, name = thread
    before = server.generate(ids, f"{name}/other")
    server.generate(ids, name)
    server.retract(ids, [SPAN], name)
    after = server.generate(ids, f"{name}/other")
    assert after["ids"] == before["ids"] and after["cached"] == 399


def test_recompute_leaves_the_span_out(server, engine, thread):
    ids, name = thread
    server.generate(ids[:380], name)
    told = server.retract(ids[:380], [SPAN], name, guarantee="exact")
    assert told["retractions"][0]["state"] == "exact" and told["edit"]["slots_freed"] >= 320
    after = server.generate(ids, name)
    assert (after["cached"], after["prompt"]) == (60, 380)
    assert_same(after, answer(engine, build_key(np.delete(ids, np.arange(*SPAN)), ())))


def test_it_is_idempotent_and_overlaps_are_refused(server, thread):
    ids, name = thread
    server.generate(ids, name)
    first = server.retract(ids, [SPAN], name)
    again = server.retract(ids, [SPAN], name)
    assert first["retractions"] == again["retractions"] and again["edit"]["tokens_erased"] == 0
    refused = server.retract(ids, [(70, 90)], name, status=409)
    assert refused["error"] == "overlaps" and "[60, 80)" in refused["message"]
    assert server.states(name) == ["steered"]


def test_after_a_flush_the_thread_is_exact(server, engine, thread):
    """The tombstones are gone: the span is left out, and never prefilled again."""
    ids, name = thread
    server.generate(ids[:380], name)
    server.retract(ids[:380], [SPAN], name)
    server.flush()
    after = server.generate(ids, name)
    assert (after["cached"], after["prompt"]) == (0, 380) and server.states(name) == ["exact"]
    assert_same(after, answer(engine, build_key(np.delete(ids, np.arange(*SPAN)), ())))


def test_undo_reads_the_original_again(server, thread):
    ids, name = thread
    before = server.generate(ids, name)
    made = server.retract(ids, [SPAN], name)["retractions"][0]["retraction_id"]
    server.post("/kv_retract/undo", {"extra_key": name, "retraction_ids": [made]})
    after = server.generate(ids, name)
    assert after["ids"] == before["ids"] and after["cached"] == 60 and server.states(name) == ["revoked"]
    unknown = server.post("/kv_retract/undo", {"extra_key": name, "retraction_ids": ["no"]}, status=409)
    assert unknown["error"] == "unknown_retraction"


def test_heal_makes_it_exact(server, engine, thread):
    ids, name = thread
    server.generate(ids[:380], name)
    server.retract(ids[:380], [SPAN], name)
    assert server.post("/kv_retract/heal", {"extra_key": name})["retractions"][0]["state"] == "exact"
    after = server.generate(ids, name)
    assert_same(after, answer(engine, build_key(np.delete(ids, np.arange(*SPAN)), ())))


def test_a_stronger_guarantee_forgets_the_steered_path(server, engine, thread):
    ids, name = thread
    server.generate(ids[:380], name)
    server.retract(ids[:380], [SPAN], name)
    assert server.generate(ids, name)["cached"] == 380
    told = server.retract(ids[:380], [SPAN], name, guarantee="exact")
    assert told["retractions"][0]["state"] == "exact" and server.states(name) == ["exact"]
    assert told["edit"]["slots_freed"] >= 340, "what follows the span and what was answered"
    after = server.generate(ids, name)
    assert (after["cached"], after["prompt"]) == (60, 380)
    assert_same(after, answer(engine, build_key(np.delete(ids, np.arange(*SPAN)), ())))
    server.assert_alive()


def test_nothing_cached_is_exact_from_the_start(server, thread):
    ids, name = thread
    told = server.retract(ids[:200], [SPAN], name)
    assert told["retractions"][0]["state"] == "exact"
    assert server.generate(ids, name)["prompt"] == 380


def test_cold_tombstones_are_refused(server, thread):
    ids, name = thread
    server.generate(ids, name)
    dead = ids.copy()
    dead[slice(*SPAN)] = -np.arange(1, 21)
    refused = server.generate(dead, name, status=400)
    assert "kv_retract: cold tombstones: 20" in refused["error"]["message"]
    server.assert_alive()


def test_a_running_request_is_waited_for(server, thread):
    """The operation is parked until the thread's request ends, or refused once its time is over."""
    ids, name = thread
    body = {
        "input_ids": ids.tolist(), "extra_key": name, "stream": True,
        "sampling_params": {"max_new_tokens": 1500, "temperature": 0, "ignore_eos": True},
    }  # fmt: skip
    with server.http.stream("POST", "/generate", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        refused = server.retract(ids, [SPAN], name, wait_s=0.2, status=409)
        assert refused["error"] == "busy" and server.states(name) == []
    told = server.retract(ids, [SPAN], name, wait_s=30)
    assert told["retractions"][0]["state"] == "steered"
    server.assert_alive()


def test_a_thread_with_a_fork(server, engine, thread):
    """Two continuations behind the span: the one that is edited answers, the other one rebuilds from the span on."""
    ids, name = thread
    fork = np.concatenate([ids[:150], ids[300:]])
    server.generate(ids[:380], name)
    server.generate(fork, name)
    server.retract(ids[:380], [SPAN], name)
    assert server.generate(ids, name)["cached"] == 380
    after = server.generate(fork, name)
    assert after["cached"] == 150, "the part in common was steered for both"
    assert_same(after, embedded(engine, fork[:150], [SPAN], "kveraser", fork[150:]))


def test_an_edit_beside_a_running_thread_copies(server, engine, thread):
    """Two threads of one namespace share a document; one is edited while the other one answers from it."""
    ids, name = thread
    own, other = ids[:380], np.concatenate([ids[:150], ids[::-1][:60]])
    server.generate(own, name)
    before = server.generate(other, name, n=300)
    edits = [KeyEdit(start=60, end=80, exact=False, eraser_id="e", retraction_id="r")]
    new = build_key(own, edits).ids
    body = {
        "input_ids": other.tolist(), "extra_key": name, "stream": True,
        "sampling_params": {"max_new_tokens": 300, "temperature": 0, "ignore_eos": True},
    }  # fmt: skip
    with server.http.stream("POST", "/generate", json=body) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("data: {"))
        next(lines)
        edit = {
            "token_ids": own.tolist(), "new_token_ids": new.tolist(), "spans": [{"start": 60, "end": 80}],
            "extra_key": name, "wait_s": 0,
        }  # fmt: skip
        told = server.post("/kv_retract/edit", edit)
        assert told["slots_copied"] == 300 and told["slots_freed"] == 0
        *_, last = lines
    assert json.loads(last.removeprefix("data: "))["output_ids"] == before["ids"]
    assert server.matched(new, name) == 380 and server.matched(own, name) == 380
    after = server.generate(np.concatenate([new, ids[ASK]]), name)
    assert after["cached"] == 380
    assert_same(after, embedded(engine, own, [SPAN], "kveraser", ids[ASK]))
    server.assert_alive()


def test_the_ledger_survives_a_restart(server, engine, thread, tmp_path):
    ids, name = thread
    options = ("--ledger", str(tmp_path / "spans.sqlite"))
    with serving(tmp_path, *options, "--", "--enable-metrics") as first:
        first.generate(ids[:380], name)
        first.retract(ids[:380], [SPAN], name, reason="wrong", policy="mine")
        assert first.generate(ids, name)["cached"] == 380
        metrics = first.http.get("/metrics").text
        assert 'kv_retract:operations_total{operation="retract",outcome="ok"} 1.0' in metrics
        assert "kv_retract:tokens_erased_total 20.0" in metrics and "sglang:" in metrics
    with serving(tmp_path, *options) as second:
        (kept,) = second.post("/kv_retract/status", {"extra_key": name})["retractions"]
        assert (kept["policy"], kept["reason"]) == ("mine", "wrong")
        after = second.generate(ids, name)
        assert after["prompt"] == 380 and second.states(name) == ["exact"]
    assert_same(after, answer(engine, build_key(np.delete(ids, np.arange(*SPAN)), ())))


@pytest.mark.parametrize(("variant", "adapters"), [("blind", "hooks"), ("suffix_aware", "hooks"), ("blind", "lora")])
def test_the_adapters_write_what_the_embedded_engine_writes(engine, thread, tmp_path, variant, adapters):
    ids, name = thread
    spans = [(0, 12), SPAN, (200, 330)]
    with serving(tmp_path, "--eraser", variant, "--adapters", adapters) as running:
        assert_same(running.generate(ids, f"{name}/plain"), answer(engine, build_key(ids, ())))
        running.generate(ids[:380], name)
        told = running.retract(ids[:380], spans, name)
        assert told["edit"]["tokens_recomputed"] == 162
        after = running.generate(ids, name)
        assert after["cached"] == 380
        again = running.generate(ids, f"{name}/later")
        assert_same(again, answer(engine, build_key(ids, ())))
        running.assert_alive()
    eraser = ERASERS.create("kveraser", variant=variant)
    assert_same(after, embedded(engine, ids[:380], spans, eraser, ids[ASK]))


def test_a_salt_reads_another_cache_and_not_the_span(server, engine, thread):
    ids, name = thread
    for salt in (None, "salt"):
        server.generate(ids[:380], name, cache_salt=salt)
    server.retract(ids[:380], [SPAN], name)
    salted = server.generate(ids, name, cache_salt="salt")
    assert salted["prompt"] == 380, "steering states are in the plain one only, so here the span is left out"
    assert_same(salted, answer(engine, build_key(np.delete(ids, np.arange(*SPAN)), ())))
    server.assert_alive()


def test_in_process(engine, thread):
    """The same calls on an `sglang.Engine`."""
    ids, _ = thread
    script = Path(__file__).with_name("in_process.py")
    command = [str(VENV / "bin" / "python"), str(script), json.dumps(ids.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")] or [done.stderr[-3000:]]
    told = json.loads(line.removeprefix("ANSWER "))
    status, body = told["retract"]
    assert status == 200 and json.loads(body)["retractions"][0]["state"] == "steered"
    wanted, _ = embedded(engine, ids[:380], [SPAN], "kveraser", ids[ASK])
    assert told["second"] == [wanted, 380]
    assert told["refused"][0] == 409 and json.loads(told["refused"][1])["error"] == "overlaps"


def test_the_python_core_does_the_same(engine, thread, tmp_path, monkeypatch):
    ids, name = thread
    monkeypatch.setenv("SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND", "python")
    with serving(tmp_path, "--", "--disable-overlap-schedule") as running:
        running.generate(ids[:380], name)
        running.retract(ids[:380], [SPAN], name)
        after = running.generate(ids, name)
        assert after["cached"] == 380
        running.assert_alive()
    assert_same(after, embedded(engine, ids[:380], [SPAN], "kveraser", ids[ASK]))
