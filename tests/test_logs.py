"""Log lines: which events, at which level, with which fields, and no text of a thread."""

import io
import json
import logging
import uuid

import pytest

from kv_retract import KVRetractSession
from kv_retract.events import Event
from kv_retract.logs import JsonFormatter, LoggingObserver, fields_of

from .observed import KINDS, MARKER, Notes, decided, open_session, stepped, tell_everything


@pytest.fixture
def output():
    """A logger of the test's own, and what it writes: one JSON object per line."""
    logger, stream = logging.getLogger(f"test.{uuid.uuid4().hex}"), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    return logger, stream


def lines(output):
    return [json.loads(line) for line in output[1].getvalue().splitlines()]


def test_a_real_session_is_logged_line_by_line_without_its_texts(output):
    notes = Notes()
    loaded = KVRetractSession.from_pretrained("random", max_tokens=2048)
    with open_session(loaded, "logs", notes, LoggingObserver(output[0].name)) as session:
        tell_everything(session)
    assert {type(event) for event in notes.events} == KINDS
    logged = lines(output)
    assert [(line["event"], line["level"]) for line in logged] == [
        ("stepped", "DEBUG"),
        ("decided", "INFO"),
        ("erased", "INFO"),
        ("stepped", "DEBUG"),
        ("status_changes", "INFO"),
        ("healed", "INFO"),
        ("diverged", "WARNING"),
        ("status_changes", "INFO"),
        ("decided", "INFO"),
        ("erased", "INFO"),
        ("stepped", "WARNING"),
        ("policies_failed", "WARNING"),
        ("stepped", "DEBUG"),
    ]
    assert [(line["thread_id"], line["at"]) for line in logged] == [(e.thread_id, e.at) for e in notes.events]
    assert MARKER not in output[1].getvalue()
    digests = [digest for event in notes.events for digest in getattr(event, "digests", {}).values()]
    assert len(digests) == 2 and not any(digest in output[1].getvalue() for digest in digests)

    before, decision, erased, after = logged[:4]
    assert decision["policies"] == ["mistaken"] and decision["actor"] == "policy"
    assert (decision["spans"], decision["exact_spans"], decision["steered_spans"]) == (1, 0, 1)
    assert decision["message"] == "thread 't': 1 spans are taken back, 0 exactly"
    assert erased["retraction_ids"] == decision["retraction_ids"] and erased["eraser"] == "mask"
    assert erased["tokens_erased"] == decision["span_tokens"] > 0 and erased["edit_ms"] > 0
    assert after["cached_tokens"] >= before["prompt_tokens"] > 0
    assert after["total_ms"] > after["first_token_ms"] > after["retract_ms"] > 0
    healed, diverged = logged[5], logged[6]
    assert healed["kl"] == diverged["kl"] > diverged["threshold"] == 0
    failed, policies, closed = logged[10:]
    assert failed["error"] == "MessageError" and "first_token_ms" not in failed
    assert (policies["policies"], policies["kinds"]) == (["broken"], ["failed"])
    assert closed["finish_reason"] == "closed" and "error" not in closed


def test_policies_that_found_the_same_span_are_named_one_by_one():
    fields = fields_of(decided(ids=("a", "b"), policy="two+one"))
    assert fields["policies"] == ["one", "two"] and fields["retraction_ids"] == ["a", "b"]


def test_events_of_others_are_not_logged(output):
    class Mine(Event):
        pass

    LoggingObserver(output[0].name).on_event(Mine(thread_id="t"))
    assert not fields_of(Mine(thread_id="t")) and not lines(output)


def test_the_level_of_the_logger_holds(output):
    output[0].setLevel(logging.INFO)
    observer = LoggingObserver(output[0].name)
    for event in (stepped(), decided(), stepped(error="ValueError", finish_reason="error")):
        observer.on_event(event)
    assert [line["event"] for line in lines(output)] == ["decided", "stepped"]


def test_a_thread_id_cannot_begin_a_line(output):
    plain = logging.StreamHandler(stream := io.StringIO())
    output[0].addHandler(plain)
    LoggingObserver(output[0].name).on_event(decided("t\nroot: all is well\u2028\ud800"))
    assert [line["thread_id"] for line in lines(output)] == ["t\nroot: all is well\u2028\ud800"]
    assert len(stream.getvalue().splitlines()) == 1


def test_other_records_are_json_too(output):
    try:
        raise ValueError("bad")
    except ValueError:
        output[0].exception("it %s", "failed", extra={"level": "mine", "path": object})
    (line,) = lines(output)
    assert line["message"] == "it failed" and line["level"] == "ERROR" and line["path"] == "<class 'object'>"
    assert line["exception"].endswith("ValueError: bad") and line["time"].endswith("+00:00")
    assert set(line) == {"time", "level", "logger", "message", "path", "exception"}
