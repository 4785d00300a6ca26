"""Many retractions in one thread: which edits are made in which mode, and what is counted after them."""

import json
from itertools import product

import pytest

from kv_retract.errors import EraserMismatchError, OutputExistsError, UnknownNameError
from kv_retract.evals import repeated as module
from kv_retract.evals.asking import THREAD, AskedThread
from kv_retract.evals.repeated import COLUMNS, MODES, RepeatedEval, RepeatedSample, eval_repeated, repeated_rows
from kv_retract.evals.specs import Spec
from kv_retract.evals.stats import standard_error
from kv_retract.training.samples import UNKNOWN
from kv_retract.types import Guarantee, Status

EDITS = (1, 3)
SURVIVORS = 4
VALUES = ("affected_accuracy", "leak", "unaffected_accuracy", "kl", "top1", "edit_ms")


def in_small(patch, thread, ahead):
    """Use a class for the threads, fewer facts in them, and a shorter continuation."""
    for name, value in (("AskedThread", thread), ("AHEAD", ahead)):
        patch.setattr(module, name, value)
    for name in ("SURVIVORS", "MOST_ASKED"):
        patch.setattr(module, name, SURVIVORS)


class Watched(AskedThread):
    """The real thread; writes down what is done to it, in `log`."""

    log = []

    def __init__(self, sample, eraser, engine, renderer, name):
        super().__init__(sample, eraser, engine, renderer, name)
        self.calls = []
        Watched.log.append(self)
        self.name, self.eraser, self.closed = name, eraser, False

    def prefill(self):
        length = super().prefill()
        self.calls.append(("prefill", length))
        return length

    def retract(self, span_ids, guarantee=Guarantee.STEERED):
        plan, erased = super().retract(span_ids, guarantee)
        self.calls.append(("retract", tuple(span_ids), guarantee, plan, erased))
        return plan, erased

    def close(self):
        self.history = self._session.history(THREAD)
        super().close()
        self.closed = True

    @property
    def edits(self):
        return [call for call in self.calls if call[0] == "retract"]


@pytest.fixture(scope="module")
def found(make_eraser, tmp_path_factory):
    """One thread per number of edits under three arms, with a short continuation: folder, metrics, threads."""
    out, ticks = tmp_path_factory.mktemp("repeated") / "out", []
    learned = Spec("kveraser", {"path": str(make_eraser("kv_map"))})
    with pytest.MonkeyPatch.context() as patch:
        in_small(patch, Watched, 16)
        Watched.log.clear()
        metrics = eval_repeated(
            RepeatedEval(out=out, model="random", edits=EDITS, n=1, arms=(Spec("mask"), learned, Spec("recompute"))),
            progress=lambda done, total: ticks.append((done, total)),
        )
    return out, metrics, list(Watched.log), ticks


def arms_of(metrics):
    return metrics["config"]["arms"]


# -- what is done ---------------------------------------------------------------------------------------------------


def test_every_arm_does_every_mode_on_the_same_thread(found):
    _, metrics, threads, _ = found
    assert arms_of(metrics)[::2] == ["recompute", arms_of(metrics)[2]] and len(arms_of(metrics)) == 3
    assert [t.name for t in threads] == [f"{arm} {mode}" for _, arm, mode in product(EDITS, arms_of(metrics), MODES)]
    for edits, some in ((1, threads[:9]), (3, threads[9:])):
        assert len({t.sample.sample_id for t in some}) == 1
        assert len(some[0].sample.spans) == edits + SURVIVORS + 1
        taken = [sorted(span for call in t.edits for span in call[1] if call[2] is Guarantee.STEERED) for t in some]
        assert taken == [taken[0]] * 9 and len(set(taken[0])) == edits
    assert all(thread.closed for thread in threads)


def test_edits_in_turn_and_at_once(found):
    for thread in found[2]:
        steered = [call[1] for call in thread.edits if call[2] is Guarantee.STEERED]
        edits = sum(map(len, steered))
        assert [len(spans) for spans in steered] == ([edits] if "at once" in thread.name else [1] * edits)
        for _, spans, _, plan, erased in thread.edits:
            assert len(plan.spans) == len(spans) and erased.tokens_erased == sum(s.end - s.start for s in plan.spans)


def test_after_healing_a_fact_is_really_gone_first(found):
    """An exact retraction, of a fact that is not counted, then a prefill of what is left; then the steered ones."""
    for thread in found[2]:
        exact = [call for call in thread.edits if call[2] is Guarantee.EXACT]
        if "after healing" not in thread.name:
            assert not exact and [call[0] for call in thread.calls][:2] == ["prefill", "retract"]
            continue
        assert [call[0] for call in thread.calls][:4] == ["prefill", "retract", "prefill", "retract"]
        ((_, (healed,), _, plan, erased),) = exact
        assert thread.calls[1] is exact[0] and erased.exact and plan.spans[0].exact
        (span,) = plan.spans
        assert thread.calls[2][1] == thread.calls[0][1] - (span.end - span.start), "its tokens left the thread"
        assert all(healed not in call[1] for call in thread.edits[1:])
        statuses = {record.span: record.status for record in thread.history}
        wanted = Status.EXACT if thread.eraser.exact else Status.STEERED
        assert statuses.pop(thread.sample.span(healed).ref) is Status.EXACT and set(statuses.values()) == {wanted}


# -- figures --------------------------------------------------------------------------------------------------------


def test_the_folder(found):
    out, metrics, _, ticks = found
    files = ["config.json", "metrics.json", "repeated.svg", "samples.jsonl"]
    assert sorted(path.name for path in out.iterdir()) == files and list(out.parent.iterdir()) == [out]
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    config = json.loads((out / "config.json").read_text())
    assert config == metrics["config"] and config["columns"] == COLUMNS and config["edits"] == list(EDITS)
    assert (config["model"], config["n"], config["split"], config["seed"]) == ("random", 1, "test", 0)
    assert ticks == [(1, 2), (2, 2)]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [(s["edits"], s["arm"], s["mode"]) for s in samples] == list(product(EDITS, arms_of(metrics), MODES))


def test_recompute_is_what_the_others_are_compared_with(found):
    for row in found[1]["rows"]:
        if row["arm"] == "recompute":
            assert (row["kl"], row["top1"]) == (0.0, 1.0)
        else:
            assert row["kl"] > 0.01 and row["top1"] < 1
        assert row["edit_ms"] > 0 and row["n"] == 1


def test_masking_in_turn_is_masking_at_once(found):
    """Hiding spans does not depend on their order; a map on KV reads no other span either."""
    for arm in arms_of(found[1])[1:]:
        kl = {(r["mode"], r["edits"]): r["kl"] for r in found[1]["rows"] if r["arm"] == arm}
        for edits in EDITS:
            assert kl["in turn", edits] == pytest.approx(kl["at once", edits], abs=1e-3)
            assert kl["in turn", edits] != pytest.approx(kl["after healing", edits], abs=1e-3)


class ScriptedThread(AskedThread):
    """Scripted, no model: the first half of the retracted facts is forgotten, one other fact is lost."""

    gone = ()

    def retract(self, span_ids, *rest):
        self.gone = (*self.gone, *span_ids)
        return super().retract(span_ids, *rest)

    def says(self, question, answer):
        probe = next(p for p in self.sample.probes if p.question == question)
        (span,) = probe.without
        asked = [p for p in self.sample.probes if not set(p.without) & set(self.gone)]
        forgotten = {*self.gone[: len(self.gone) // 2], *asked[0].without}
        return answer == (UNKNOWN if span in forgotten else probe.answer), 0.0


def test_counts_of_a_scripted_thread(monkeypatch, tmp_path):
    in_small(monkeypatch, ScriptedThread, 1)
    settings = RepeatedEval(out=tmp_path / "out", model="random", edits=(4,), n=1, arms=())
    rows = {row["mode"]: row for row in eval_repeated(settings)["rows"]}
    for mode in ("in turn", "at once"):
        found = [rows[mode][name] for name in ("affected_accuracy", "leak", "unaffected_accuracy")]
        assert found == [0.5, 0.5, 3 / 4], "two of four, and one of the four others that are asked"
    # The healed fact is first of the five that went: one of the four counted ones is forgotten with it.
    found = [rows["after healing"][name] for name in ("affected_accuracy", "leak", "unaffected_accuracy")]
    assert found == [0.25, 0.75, 3 / 4], "and the healed fact is counted nowhere"


def sample(arm="mask", mode="in turn", edits=1, **values):
    numbers = dict.fromkeys(VALUES, 0.5) | values
    return RepeatedSample(sample_id=f"s{len(values)}", arm=arm, mode=mode, edits=edits, **numbers)


def test_rows_by_hand():
    rows = repeated_rows(
        [
            sample(leak=0.0, kl=1.0), sample(edits=4), sample(leak=1.0, kl=2.0), sample("none"), sample(mode="at once"),
            sample(leak=0.5, kl=6.0),
        ]
    )  # fmt: skip
    keys = [(row["arm"], row["mode"], row["edits"], row["n"]) for row in rows]
    assert keys == [
        ("mask", "in turn", 1, 3), ("mask", "in turn", 4, 1), ("none", "in turn", 1, 1), ("mask", "at once", 1, 1)
    ]  # fmt: skip
    assert (rows[0]["leak"], rows[0]["kl"], rows[0]["top1"], rows[0]["top1_se"]) == (0.5, 3.0, 0.5, 0.0)
    assert rows[0]["kl_se"] == pytest.approx(standard_error([1.0, 2.0, 6.0])) and rows[1]["kl_se"] is None
    assert repeated_rows([]) == []


def test_every_column_is_explained(found):
    for row in found[1]["rows"]:
        assert {name.removesuffix("_se") for name in row} - {"arm"} == set(COLUMNS) - {"_se"}


# -- what cannot be measured ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"arms": (Spec("nope"),)}, UnknownNameError, "unknown eraser 'nope'"),
        ({"arms": (Spec("kveraser", {"path": "nowhere"}),)}, EraserMismatchError, "kv-retract train eraser"),
        ({}, UnknownNameError, "a registered model"),
    ],
)
def test_unknown_parts_leave_nothing_behind(tmp_path, fields, error, told):
    settings = RepeatedEval(out=tmp_path / "out", model="no-such-model", **{"arms": (), **fields})
    with pytest.raises(error, match=told):
        eval_repeated(settings, progress=lambda *_: pytest.fail("work was done"))
    assert list(tmp_path.iterdir()) == []


def test_an_eraser_of_another_model_is_refused(make_eraser, learnt_model, tmp_path, monkeypatch):
    in_small(monkeypatch, AskedThread, 1)
    arm = Spec("kveraser", {"path": str(make_eraser("blind", learnt_model))})
    with pytest.raises(EraserMismatchError, match="kv-retract train eraser --model DIR"):
        eval_repeated(RepeatedEval(out=tmp_path / "out", model="random", edits=(1,), n=1, arms=(arm,)))
    assert list(tmp_path.iterdir()) == []


def test_results_are_never_overwritten(found):
    with pytest.raises(OutputExistsError, match="never overwritten"):
        eval_repeated(RepeatedEval(out=found[0], model="random", arms=()))
