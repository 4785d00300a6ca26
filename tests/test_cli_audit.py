"""The commands `kv-retract audit verify` and `kv-retract audit show`."""

import json

import pytest

from kv_retract.audit import AuditLog, read, verify
from kv_retract.events import Decided, Diverged, Erased, Healed, PoliciesFailed, StatusChanges
from kv_retract.policies.asking import PolicyFailure
from kv_retract.types import (
    Divergence,
    EraseResult,
    Guarantee,
    PlannedSpan,
    RetractionPlan,
    RetractionRecord,
    Scope,
    SpanRef,
    Status,
)


def planned(id, policy):
    record = RetractionRecord(
        retraction_id=id, span=SpanRef(3), window_size=1, window_digest="d", policy=policy, reason=f"[b]{policy} says",
        guarantee=Guarantee.STEERED, scope=Scope.BRANCH, status=Status.STEERED, eraser_id="mask",
    )  # fmt: skip
    return PlannedSpan(record=record, start=0, end=4, exact=False)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "log"
    log = AuditLog(path)
    plan = RetractionPlan(thread_id="t", spans=(planned("aa", "expired"), planned("bb", "repeated")))
    log.on_event(Decided(thread_id="t", actor="ann", plan=plan, digests={"aa": "1", "bb": "2"}))
    cost = EraseResult(eraser_id="mask", tokens_erased=8, tokens_moved=3, edit_ms=1.25)
    log.on_event(Erased(thread_id="t", retraction_ids=("aa", "bb"), result=cost))
    near, far = Divergence(kl=0.012, top1=0.75, positions=4), Divergence(kl=float("inf"), top1=0.0, positions=4)
    log.on_event(
        StatusChanges(
            thread_id="t",
            actor="healer",
            retraction_id="aa",
            before=Status.STEERED,
            after=Status.EXACT,
            why="healed",
            divergence=near,
        )  # fmt: skip
    )
    log.on_event(Healed(thread_id="t", retraction_ids=("aa",), tokens=40, waited_s=2.5, divergence=near))
    log.on_event(Diverged(thread_id="t", retraction_ids=("aa",), divergence=far, threshold=0.1))
    failure = PolicyFailure(policy="slow", kind="late", message="m")
    log.on_event(PoliciesFailed(thread_id="[red]\x1bz", failures=(failure,)))
    return path


def test_a_whole_log_is_told_with_its_head(kv_retract, path):
    code, out, err = kv_retract("audit", "verify", path)
    found = verify(path)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "entries: 6", f"first:   {found.first_at}", f"last:    {found.last_at}", f"head:    {found.head}"
    ]  # fmt: skip
    assert kv_retract("audit", "verify", path, "--head", found.head) == (0, out, "")
    code, out, _ = kv_retract("audit", "verify", path, "--json")
    assert code == 0 and json.loads(out) == {
        "entries": 6, "head": found.head, "first_at": found.first_at, "last_at": found.last_at, "torn_bytes": 0,
        "clock_steps": 0,
    }  # fmt: skip


def test_an_unfinished_line_is_told_and_is_no_failure(kv_retract, path):
    path.write_bytes(path.read_bytes()[:-10])
    code, out, _ = kv_retract("audit", "verify", path)
    assert code == 0 and "entries: 5\n" in out
    assert f"unfinished ({verify(path).torn_bytes} bytes)" in out and "no sign of tampering" in out
    AuditLog(path).on_event(Diverged(thread_id="t", retraction_ids=(), threshold=0.1,
                                     divergence=Divergence(kl=1.0, top1=0.5, positions=1)))  # fmt: skip
    assert "unfinished" not in kv_retract("audit", "verify", path)[1]
    assert "recovered" in kv_retract("audit", "show", path)[1]


def test_a_clock_step_is_told(kv_retract, path):
    AuditLog(path).on_event(Healed(thread_id="t", at="2001", retraction_ids=(), tokens=0, waited_s=0, divergence=None))
    code, out, _ = kv_retract("audit", "verify", path)
    assert code == 0 and "1 with an earlier time" in out


@pytest.mark.parametrize("command", ["verify", "show"])
def test_a_changed_log_fails_in_one_line(kv_retract, path, command):
    path.write_bytes(path.read_bytes().replace(b'"ann"', b'"bob"'))
    code, out, err = kv_retract("audit", command, path)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and "line 2: the entry was changed" in err and len(err.splitlines()) == 1


def test_other_failures_exit_with_2(kv_retract, path, tmp_path):
    for arguments, told in (
        (["verify", tmp_path / "none"], "No such file"),
        (["verify", tmp_path], "no regular file"),
        (["verify", path, "--head", "0" * 64], "cut from its end"),
        (["verify", path, "--head", "1"], "64 hexadecimal digits"),
        (["show", tmp_path / "none"], "No such file"),
        (["show"], "FILE"),
    ):
        code, out, err = kv_retract("audit", *arguments)
        assert (code, out) == (2, "") and told in err and len(err.splitlines()) == 1, err


def test_entries_are_shown_a_line_per_span(kv_retract, path):
    code, out, err = kv_retract("audit", "show", path)
    assert (code, err) == (0, "")
    for column in ("when", "who", "thread", "what", "policy", "reason", "guarantee", "status", "cost", "divergence"):
        assert column in out.splitlines()[1]
    (first,) = (line for line in out.splitlines() if "decided" in line and "expired" in line)
    assert "ann" in first and "steered" in first and "[b]" in first, "what looks like markup is text"
    assert "repeated" in out and "8 erased" in out and "steered to" in out and "0.012" in out and "KL inf" in out
    assert "policy late" in out and "slow" in out
    assert "\x1b" not in out and "[red]" in out


def test_one_thread_is_shown(kv_retract, path):
    _, out, _ = kv_retract("audit", "show", path, "--thread", "t")
    assert "ann" in out and "slow" not in out
    code, out, err = kv_retract("audit", "show", path, "--thread", "t", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == [entry for entry in read(path) if entry["thread_id"] == "t"]
    assert len(json.loads(out)) == 5
    assert json.loads(kv_retract("audit", "show", path, "--thread", "none", "--json")[1]) == []
