"""A replay from files to a results folder, on real and on hand-written traces."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from kv_retract.errors import OutputExistsError, UnknownNameError, UnsupportedModelError
from kv_retract.evals import replay as module
from kv_retract.evals.metrics import COLUMNS
from kv_retract.evals.replay import NothingReplayedError, replay
from kv_retract.evals.specs import SpecError
from kv_retract.policies import POLICIES, RetractionPolicy
from kv_retract.types import Retraction, SpanRef

SAMPLE = Path(__file__).parents[2] / "examples" / "data" / "tau_bench_airline_sample.jsonl"
FILES = ["config.json", "metrics.json", "report.html", "samples.jsonl"]
TIMES = ("edit_ms", "next_step_ms")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def lines(path, *values):
    path.write_text("\n".join(v if isinstance(v, str) else json.dumps(v) for v in values), encoding="utf-8")
    return path


def of(result, arm):
    return [sample for sample in result.samples if sample.arm == arm]


# -- the results folder ---------------------------------------------------------------------------------------------


def test_the_results_folder(sample_run):
    out, result = sample_run
    assert names(out) == FILES and names(out.parent) == [out.name]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(result.metrics())), "what is returned is what is written"
    assert set(metrics) == {"config", "rows", "counts", "problems"}
    assert all(set(row) == {"arm", "policy", *COLUMNS} for row in metrics["rows"])
    assert set(COLUMNS) >= {
        "n", "kl_mean", "kl_se", "top1", "tokens_erased", "tokens_recomputed", "edit_ms_median",
        "next_step_ms_median", "cached_tokens",
    }  # fmt: skip
    assert json.loads((out / "config.json").read_text()) == metrics["config"]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert samples == json.loads(json.dumps([asdict(sample) for sample in result.samples]))


def test_the_configuration_tells_the_run_again(sample_run):
    config = sample_run[1].config
    assert config["paths"] == [SAMPLE.name], "names only: folders are private"
    assert list(config["arms"]) == ["none", "mask", "shift", "recompute"] and config["reference"] == "recompute"
    assert config["policies"] == [{"name": name, "parameters": {}} for name in ("tool_error", "superseded")]
    assert (config["limit"], config["seed"], config["score_tokens"], config["dtype"]) == (2, 0, 8, "float32")
    assert config["random_weights"] is True and config["quality_note"]
    assert config["columns"] == COLUMNS and config["versions"]["torch"] and config["machine"]["threads"] >= 1
    assert config["seconds"] > 0 and config["pool_tokens"] == 4 * module.POOL_TOKENS_PER_ARM


def test_counts_of_the_sample(sample_run):
    result = sample_run[1]
    # By the table in examples/data/README.md: lines 1 and 2 hold three failed calls and two stale reads.
    assert result.spans_by_policy() == {"tool_error": 3, "superseded": 2}
    assert [(s.trace_id, s.excerpt.message) for s in result.retracted] == [
        ("task-26-trial-0", 7), ("task-26-trial-0", 19), ("task-26-trial-0", 23),
        ("task-32-trial-0", 21), ("task-32-trial-0", 25),
    ]  # fmt: skip
    recorded = [json.loads(line)["traj"] for line in SAMPLE.read_text().splitlines()[:2]]
    steps = sum(m["role"] == "assistant" for traj in recorded for m in traj[1:])
    assert result.counts == {
        "traces": 2, "steps": steps, "retractions": 5, "without_retraction": 0, "too_long": 0, "unreadable": 0
    }  # fmt: skip
    assert result.problems == []


# -- what the samples say -------------------------------------------------------------------------------------------


def test_recompute_does_not_diverge_from_itself(sample_run):
    samples = of(sample_run[1], "recompute")
    assert [(s.kl, s.top1) for s in samples] == [(0.0, 1.0)] * 3
    assert all(0 < s.tokens_recomputed <= s.suffix_tokens for s in samples)


def test_the_cheap_arms_do_not_recompute_and_do_diverge(sample_run):
    for arm in ("none", "mask", "shift"):
        for sample, exact in zip(of(sample_run[1], arm), of(sample_run[1], "recompute"), strict=True):
            assert sample.tokens_recomputed == 0 and sample.kl > 0 and sample.own_edit
            assert (sample.step, sample.tokens_erased) == (exact.step, exact.tokens_erased)
            assert sample.cached_tokens > exact.cached_tokens, "the spans' tombstones are entries too"
    assert {s.tokens_moved for s in of(sample_run[1], "none")} == {0}
    assert [s.tokens_moved for s in of(sample_run[1], "shift")] > [0, 0, 0]


def test_every_arm_sees_the_same_steps_and_served_the_old_part_from_its_cache(sample_run):
    for sample in sample_run[1].samples:
        assert sample.tokens_scored == 8 and sample.edit_ms > 0 and sample.next_step_ms > 0
        erased = 0 if sample.arm != "recompute" else sample.tokens_erased
        assert sample.cached_tokens + sample.prefilled_tokens <= sample.context_tokens - erased
        assert sample.cached_tokens > 0.75 * sample.context_tokens


def test_the_rows_are_made_of_the_samples(sample_run):
    result = sample_run[1]
    for row in result.rows:
        own = [s for s in of(result, row["arm"]) if row["policy"] in ("all", *s.policies)]
        assert row["n"] == len(own) > 0 and row["n_not_own"] == 0
        assert row["kl_mean"] == pytest.approx(sum(s.kl for s in own) / len(own))
        assert row["tokens_erased"] == pytest.approx(sum(s.tokens_erased for s in own) / len(own))
    assert [row["kl_se"] is None for row in result.rows if row["arm"] == "mask"] == [False, False, True], (
        "superseded was found in one trace only"
    )


def without_times(samples):
    return [replace(sample, **dict.fromkeys(TIMES, 0)) for sample in samples]


def test_the_same_seed_gives_the_same_samples(sample_run, make_settings, tmp_path):
    first = [s for s in sample_run[1].samples if s.source.endswith(":1") and s.arm in ("none", "recompute")]
    again = replay(make_settings(SAMPLE, out=tmp_path / "out", arms=("none",), limit=1))
    assert len(first) == 4 and without_times(again.samples) == without_times(first)


def test_another_seed_draws_another_model(make_settings, chat, tmp_path):
    path = lines(tmp_path / "t.jsonl", chat())
    runs = [replay(make_settings(path, out=tmp_path / str(i), seed=seed)) for i, seed in enumerate((0, 1, 0))]
    zero, one, again = (without_times(run.samples) for run in runs)
    assert zero == again and len(zero) == 3 and [s.kl for s in zero] != [s.kl for s in one]


# -- formats and what cannot be read --------------------------------------------------------------------------------

SWE = {
    "instance_id": "swe-1",
    "history": [
        {"role": "system", "content": "You fix code."},
        {"role": "user", "content": "Fix a.py."},
        *(
            entry
            for action, seen in [
                ("open b.py", "Error: no such file"),
                ("open a.py", "(Open file: a.py)\n1:x"),
                ("ls", "a.py"),
            ]
            for entry in (
                {"role": "assistant", "content": "", "thought": f"I try {action}.", "action": action},
                {"role": "user", "content": seen},
            )
        ),
    ],
}
REACT = """Question: Who made it?
Thought 1: I search.
Action 1: Search[Nik Park]
Observation 1: Error: no such page
Thought 2: With another spelling.
Action 2: Search[Nick Park]
Observation 2: A film maker.
Thought 3: Done.
Action 3: Finish[Nick Park]
Observation 3: Answer is CORRECT
"""


def snapshots(messages, thread="graph-1"):
    """Newest first, as `get_state_history` gives them; each holds all messages so far."""
    found = []
    for count in range(len(messages), 0, -1):
        ids = {"thread_id": thread, "checkpoint_ns": "", "checkpoint_id": f"{count:04}"}
        parent = {"configurable": {**ids, "checkpoint_id": f"{count - 1:04}"}} if count > 1 else None
        found.append(
            {"values": {"messages": messages[:count]}, "config": {"configurable": ids}, "parent_config": parent}
        )
    return found


def test_a_folder_of_many_formats(make_settings, chat, tmp_path):
    place = tmp_path / "traces"
    place.mkdir()
    lines(place / "chat.jsonl", {"id": "chat-1", "messages": chat()})
    lines(place / "graph.json", snapshots(chat()))
    lines(place / "swe.traj", SWE)
    lines(place / "log.txt", REACT)
    lines(place / "other.json", {"unrelated": 1})
    result = replay(make_settings(place, SAMPLE.parent / "missing.jsonl", out=tmp_path / "out"))
    assert [s.trace_id for s in result.retracted] == ["chat-1", "graph-1", "log-0", "swe-1"]
    assert {s.policy for s in result.retracted} == {"tool_error"}
    assert [s.excerpt.text[:5] for s in result.retracted] == ["Error"] * 4
    assert {s.trace_id for s in result.samples if s.own_edit} == {"chat-1", "graph-1", "log-0", "swe-1"}
    assert (result.counts["traces"], result.counts["unreadable"]) == (4, 2)
    assert [Path(p["source"]).name for p in result.problems] == ["other.json", "missing.jsonl"]
    assert result.config["paths"] == ["traces", "missing.jsonl"]


def test_what_cannot_be_read_or_walked_is_told_and_the_rest_goes_on(make_settings, chat, tmp_path):
    path = tmp_path / "t.jsonl"
    good, long = chat(), chat(user="very " * 400 + "long")
    silent = [{"role": "user", "content": "Anybody?"}]
    surrogate = chat(error="Error \ud800")
    values = [good, '{"messages": [', long, {"unknown": 1}, silent, surrogate, {"id": "last", "messages": good}]
    encoded = [(v if isinstance(v, str) else json.dumps(v)).encode() for v in values]
    path.write_bytes(b"\n".join([*encoded, b"\xff\xfe", b""]))
    result = replay(make_settings(path, out=tmp_path / "out", max_context=300))
    assert [(p["source"].rpartition(":")[2], p["message"].split(":")[0].split(",")[0]) for p in result.problems] == [
        ("2", "expected JSON"),
        ("3", "cut at message 2"),
        ("4", "expected chat messages (a list"),
        ("5", "no assistant message after the first message"),
        ("6", "step 1"),
        ("8", "expected UTF-8"),
    ]
    assert "--max-context" in result.problems[1]["message"] and "lone surrogate" in result.problems[4]["message"]
    assert result.counts["unreadable"] == 3 and result.counts["too_long"] == 1
    assert [s.trace_id for s in result.retracted] == ["t-1", "last"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["problems"] == result.problems


def test_a_context_that_grows_too_long_keeps_what_was_measured_before(make_settings, chat, tmp_path):
    thread = [*chat(), {"role": "user", "content": "more " * 300}, {"role": "assistant", "content": "No."}]
    result = replay(make_settings(lines(tmp_path / "t.jsonl", thread), out=tmp_path / "out", max_context=300))
    assert result.counts["too_long"] == result.counts["traces"] == 1 and result.counts["steps"] == 4
    assert len(of(result, "mask")) == 1 and result.problems[0]["message"].startswith("cut at message 10")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "got an empty file"),
        ("[]", "unknown format|expected"),
        ('{"messages": []}', "none of the traces could be replayed .1 problems.; the first problem"),
        ('[{"role": "user", "content": "Anybody?"}]', "so there is no step to replay"),
    ],
)
def test_nothing_to_replay(make_settings, tmp_path, content, told):
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(NothingReplayedError, match=told):
        replay(make_settings(tmp_path / "t.jsonl", out=tmp_path / "out"))
    assert names(tmp_path) == ["t.jsonl"]


def test_a_thread_without_finds_is_counted_and_reported(make_settings, tmp_path):
    thread = [{"role": r, "content": r} for r in ("user", "assistant", "user", "assistant")]
    result = replay(make_settings(lines(tmp_path / "t.jsonl", thread), out=tmp_path / "out"))
    assert result.counts["without_retraction"] == 1 and result.samples == [] and result.counts["steps"] == 2
    assert {row["n"] for row in result.rows} == {0}
    assert "the policies found no span" in (tmp_path / "out" / "report.html").read_text()


def test_a_recompute_only_run_needs_no_other_arm(make_settings, chat, tmp_path):
    result = replay(make_settings(lines(tmp_path / "t.jsonl", chat()), out=tmp_path / "out", arms=("recompute",)))
    assert [s.arm for s in result.samples] == ["recompute"] and names(tmp_path / "out") == FILES


# -- failures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def policy():
    """Register a policy that does what the test says."""

    @dataclass(kw_only=True)
    class Local(RetractionPolicy):
        name = "local"

        def propose(self, ctx):
            return Local.act(ctx)

    POLICIES.register("local")(Local)
    yield Local
    del POLICIES._factories["local"]


def test_a_policy_that_fails_is_a_problem_of_that_trace(policy, make_settings, chat, tmp_path):
    def act(ctx):
        if ctx.thread_id == "bad" and len(ctx.messages) > 7:
            raise LookupError("nothing here")
        return [Retraction(span=SpanRef(99 if ctx.thread_id == "far" else 3), policy="local", reason="r")]

    policy.act = act
    path = lines(tmp_path / "t.jsonl", *({"id": id, "messages": chat()} for id in ("bad", "far", "good")))
    result = replay(make_settings(path, out=tmp_path / "out", policies=("local",)))
    (problem,) = result.problems
    assert problem["source"].endswith(":1") and "step 4: policy 'local' failed on thread 'bad'" in problem["message"]
    assert "LookupError: nothing here" in problem["message"]
    assert [s.trace_id for s in result.retracted] == ["bad", "good"], "what came before the failure stays"
    assert result.counts["traces"] == 3 and result.counts["without_retraction"] == 1


def test_an_eraser_that_fails_is_a_problem_of_that_trace(make_settings, chat, tmp_path):
    path = lines(tmp_path / "t.jsonl", chat())
    result = replay(make_settings(path, out=tmp_path / "out", arms=("selective:layer=99",)))
    (problem,) = result.problems
    assert "eraser 'selective:layer=99' failed: ValueError: layer must be in [0, 4)" in problem["message"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_in_the_middle_leaves_no_folder(make_settings, chat, tmp_path, error):
    def progress(done, total):
        assert (done, total) == (1, 2)
        assert len(names(tmp_path / "runs")) == 1, "the draft is there while the work goes on"
        raise error

    path = lines(tmp_path / "t.jsonl", chat(), chat())
    with pytest.raises(error):
        replay(make_settings(path, out=tmp_path / "runs" / "out"), progress=progress)
    assert names(tmp_path / "runs") == []


def test_an_exception_while_writing_leaves_no_folder(make_settings, chat, tmp_path, monkeypatch):
    monkeypatch.setattr("kv_retract.evals.report.report_html", lambda result: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replay(make_settings(lines(tmp_path / "t.jsonl", chat()), out=tmp_path / "runs" / "out"))
    assert names(tmp_path / "runs") == []


def test_results_are_never_overwritten(sample_run, make_settings, tmp_path):
    out = sample_run[0]
    before = {name: (out / name).read_bytes() for name in FILES}
    with pytest.raises(OutputExistsError, match="never overwritten"):
        replay(make_settings(tmp_path / "not even read", out=out))
    assert {name: (out / name).read_bytes() for name in names(out)} == before


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({"policies": ("nope",)}, UnknownNameError, "unknown policy 'nope'"),
        ({"arms": ("nope",)}, UnknownNameError, "unknown eraser 'nope'"),
        ({"arms": ("recompute:x=1",)}, SpecError, "recompute:x=1"),
        ({"model": "nope"}, UnknownNameError, "expected a registered model .* got 'nope'"),
        ({"model": "."}, UnsupportedModelError, "expected a causal language model"),
        ({"pool_tokens": 40}, NothingReplayedError, "a pool of 40 tokens is too small for 3 arms.*--pool-tokens"),
    ],
)
def test_settings_that_cannot_be(make_settings, tmp_path, monkeypatch, settings, error, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=told):
        replay(make_settings(SAMPLE, out=tmp_path / "out", **settings))
    assert names(tmp_path) == []
