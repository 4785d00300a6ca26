"""The server's ledger of span retractions, and how a server is started: nothing here needs SGLang."""

import json
import sqlite3
from dataclasses import replace

import numpy as np
import pytest

from kv_retract.cache.keys import is_tombstone
from kv_retract.errors import EraserMismatchError, LedgerError
from kv_retract.integrations.sglang.config import VARIABLE, PluginConfig, PluginConfigError
from kv_retract.integrations.sglang.records import (
    SpanLedger,
    SpanRecord,
    digests,
    entry_of,
    key_of,
    new_records,
    standing,
)
from kv_retract.integrations.sglang.refusal import Refused
from kv_retract.integrations.sglang.serve import ServeError, Server
from kv_retract.reference import MODEL_DIR

IDS = np.arange(100, 200)
TEMPLATE = SpanRecord(
    retraction_id="", extra_key="t", start=0, end=0, digest="", state="steered", eraser="kveraser", eraser_id="e",
    shared=False,
)  # fmt: skip


def records(*spans, known=(), ids=IDS, **changes):
    return new_records(ids, spans, known, replace(TEMPLATE, **changes))


def test_a_span_is_found_by_everything_up_to_its_end():
    made = records((10, 20), (50, 51))
    assert standing(made, IDS) == made == standing(made[::-1], np.append(IDS, [7, 7]))
    assert standing(made, IDS[:30]) == made[:1], "shorter threads hold what ends in them"
    other = IDS.copy()
    other[40] = 0
    assert standing(made, other) == made[:1], "a change before a span makes it another one"
    other[0] = 0
    assert standing(made, other) == []
    assert standing([replace(made[0], state="revoked")], IDS) == []


def test_digests_are_those_of_prefixes():
    ends = [1, 37, 100]
    found = digests(IDS, [*ends, 37, 101])
    assert list(found) == ends
    assert all(found[end] == digests(IDS[:end], [end])[end] for end in ends)
    assert len(set(found.values())) == 3


def test_a_span_that_stands_is_returned_and_overlaps_are_refused():
    (first,) = records((10, 20))
    assert records((10, 20), known=[first]) == [first]
    with pytest.raises(Refused, match=r"\[15, 25\) overlaps \[10, 20\)") as refused:
        records((15, 25), known=[first])
    assert refused.value.reason == "overlaps"
    with pytest.raises(Refused, match=r"\[30, 40\)"):
        records((30, 40), (35, 36))
    with pytest.raises(Refused, match="outside of a thread of 100 tokens"):
        records((90, 101))
    ids = {r.retraction_id for r in [*records((10, 20)), *records((10, 21)), *records((10, 20), extra_key="u")]}
    assert len(ids) == 3


def test_keys_and_entries():
    made = records((10, 20), (50, 60))
    key = key_of(IDS, made)
    assert len(key) == 100 and np.flatnonzero(is_tombstone(key.ids)).tolist() == [*range(10, 20), *range(50, 60)]
    assert key.extra_key == "t" and np.array_equal(key.positions, np.arange(100))
    left = key_of(IDS, made, {made[0].retraction_id})
    assert len(left) == 90 and is_tombstone(left.ids[40:50]).all() and np.array_equal(left.positions, np.arange(90))
    exact = [made[0], replace(made[1], state="exact")]
    assert np.array_equal(
        key_of(IDS, exact, {made[0].retraction_id}).ids, np.delete(IDS, [*range(10, 20), *range(50, 60)])
    )
    for token, entry in ((10, 10), (20, 10), (50, 40), (100, 90)):
        assert entry_of(token, made, {made[0].retraction_id}) == entry
    assert entry_of(100, exact, {made[0].retraction_id}) == 80


def test_tombstones_of_shared_edits_are_the_same_in_every_thread():
    def tombstones(**changes):
        return key_of(IDS, records((10, 20), **changes)).ids[10:20].tolist()

    assert tombstones(extra_key="a", shared=True) == tombstones(extra_key="b", shared=True)
    assert tombstones(extra_key="a") != tombstones(extra_key="b")


def test_the_file_holds_what_was_put(tmp_path):
    path = str(tmp_path / "spans.sqlite")
    ledger, made = SpanLedger(path), records((10, 20), (50, 60), reason="wrong")
    ledger.put(made)
    ledger.set_state(made[:1], "exact")
    ledger.close()
    again = SpanLedger(path)
    assert again.records("t") == [replace(made[0], state="exact"), made[1]] and again.threads() == 1
    assert again.records("u") == again.records(None) == []
    again.close()


def test_changes_are_numbered_also_over_a_restart(tmp_path):
    path = str(tmp_path / "spans.sqlite")
    ledger, made = SpanLedger(path), records((10, 20), (50, 60))
    ledger.put(made)
    assert ledger.sequence == 2 and ledger.changes() == made and ledger.changes(1) == made[1:]
    ledger.set_state(made[:1], "exact")
    (changed,) = ledger.changes(2)
    assert changed == replace(made[0], state="exact") and ledger.changes(3) == []
    ledger.close()
    again = SpanLedger(path)
    assert (again.ledger_id, again.sequence) == (ledger.ledger_id, 3) and again.changes(2) == [changed]
    assert SpanLedger().ledger_id != SpanLedger().ledger_id
    again.close()


def test_the_newest_decision_wins():
    (first,) = records((10, 20))
    ours, theirs = SpanLedger(), SpanLedger()
    assert ours.adopt([first]) == [first] and ours.adopt([first]) == []
    ours.set_state([first], "exact")
    assert ours.adopt([first]) == [], "a cold cache is no decision, nor is a warm one"
    theirs.put([first])
    theirs.decide([first], "revoked")
    assert ours.adopt(theirs.changes()) == [] and ours.records("t") == [replace(first, state="revoked", revision=2)]
    assert theirs.adopt([first]) == [], "what was undone later stays so"
    again = theirs.again(first)
    assert again.revision == 3 and again.state == "steered" and theirs.again(records((1, 2))[0]).revision == 1
    assert theirs.again(first, {first.retraction_id}).revision == 2, "told of by another replica: the same decision"
    theirs.put([again])
    assert ours.adopt(theirs.changes()) == [again] == ours.records("t"), "taken back anew"
    later = replace(again, revision=4)
    assert ours.adopt([later]) == [] and ours.records("t") == [later], "it stood already, so the cache has not read it"
    healed, revoked = replace(again, state="exact", revision=4), replace(again, state="revoked", revision=4)
    assert healed.wins_over(revoked) and not revoked.wins_over(healed), "of two at once, the text stays out"


def test_a_full_disk_loses_no_retraction_of_another_replica(tmp_path, monkeypatch):
    ledger, made = SpanLedger(str(tmp_path / "spans.sqlite")), records((10, 20))
    ledger.close()
    ledger._file = sqlite3.connect(":memory:")  # without the table: nothing can be written
    with pytest.raises(LedgerError, match="cannot write the ledger"):
        ledger.put(made)
    assert ledger.records("t") == []
    assert ledger.adopt(made) == made == ledger.records("t")


@pytest.mark.parametrize("content", [b"no database" * 100, None], ids=["no database", "other records"])
def test_a_file_that_is_no_ledger(tmp_path, content):
    path = tmp_path / "x.sqlite"
    if content is None:
        with sqlite3.connect(path) as file:
            file.execute("CREATE TABLE span_retractions (retraction_id TEXT PRIMARY KEY, record TEXT NOT NULL)")
            file.execute("INSERT INTO span_retractions VALUES ('a', '{}')")
    else:
        path.write_bytes(content)
    with pytest.raises(LedgerError, match=r"x\.sqlite.*name another file"):
        SpanLedger(str(path))


def test_the_configuration_travels_through_the_environment(monkeypatch):
    config = PluginConfig(ledger="l", eraser="e", peers=["http://a:1", "http://b:1"], thread_header="x-thread")
    monkeypatch.setenv(VARIABLE, config.to_environment()[VARIABLE])
    assert PluginConfig.from_environment() == config
    monkeypatch.delenv(VARIABLE)
    assert PluginConfig.from_environment() == PluginConfig()
    for wrong in ("[", '{"who": 1}'):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(PluginConfigError, match=VARIABLE):
            PluginConfig.from_environment()


def test_the_command_of_a_server():
    server = Server(port=7, extra=("--log-level", "error"))
    command = server.command(has_gpu=False)
    assert command[command.index("--model-path") + 1] == str(MODEL_DIR)
    assert command[command.index("--radix-cache-backend") + 1] == "kv_retract"
    assert command[command.index("--device") + 1] == "cpu" and command[-2:] == ["--log-level", "error"]
    gpu = Server(model=str(MODEL_DIR), max_tokens=999).command(has_gpu=True)
    assert "--device" not in gpu and gpu[gpu.index("--max-total-tokens") + 1] == "999"
    assert "--tool-call-parser" not in gpu and "--radix-cache-backend" not in Server(plain=True).command(has_gpu=False)
    with pytest.raises(ServeError, match="'nowhere'"):
        Server(model="nowhere").command(has_gpu=False)


def test_the_eraser_of_a_server(tmp_path):
    def eraser(**fields):
        return json.loads(Server(**fields).environment()[VARIABLE])["eraser"]

    assert eraser().endswith("reference/erasers/kv_map") and eraser(eraser="blind").endswith("blind")
    assert eraser(model=str(MODEL_DIR)) == ""
    with pytest.raises(EraserMismatchError, match="learned eraser"):
        eraser(eraser=str(tmp_path))


def test_the_peers_of_a_server():
    given = json.loads(Server(peers=["http://a:1"], thread_header="X-Thread").environment()[VARIABLE])
    assert given["peers"] == ["http://a:1"] and given["thread_header"] == "x-thread"
    with pytest.raises(ServeError, match="such as http://host:30000, got 'a:1'"):
        Server(peers=["http://b:1", "a:1"]).environment()


def test_how_adapters_run():
    assert json.loads(Server(eraser="blind", adapters="lora").environment()[VARIABLE])["adapters"] == "lora"
    command = Server(eraser="blind", adapters="lora").command(has_gpu=False)
    assert "--enable-lora" in command and command[command.index("--lora-target-modules") + 1] == "q_proj"
    with pytest.raises(ServeError, match="'hooks' or 'lora', got 'peft'"):
        Server(adapters="peft").environment()
