"""The benchmark of a whole step, on a small scale: stages add up, and what was wrapped is whole again."""

import time

import pytest
from rich.console import Console

from kv_retract.cache.manager import CacheManager
from kv_retract.errors import KVRetractError
from kv_retract.evals.bench import BenchSettingError
from kv_retract.evals.bench_console import print_step
from kv_retract.evals.results import dump
from kv_retract.evals.stages import REST, Stages
from kv_retract.evals.step import MODEL, STAGES, StepBench, bench_step
from kv_retract.session import KVRetractSession

SMALL = {"contexts": (1024, 2048), "overhead_context": 1024, "repeats": 2, "answer": 4, "model": "random"}


@pytest.fixture(scope="module")
def found():
    ticks, wrapped = [], [KVRetractSession._offer, CacheManager.match]
    document = bench_step(StepBench(**SMALL), progress=lambda *step: ticks.append(step))
    assert ticks == [(n, 8) for n in range(1, 9)]
    assert wrapped == [KVRetractSession._offer, CacheManager.match]
    return document


def test_every_length_has_all_stages(found):
    for row, context in zip(found["rows"], SMALL["contexts"], strict=True):
        assert 0.9 * context < row["tokens"] < context + 512 and row["n"] == 2
        assert set(row["stages_ms"]) == set(row["shares"]) == {MODEL, REST, *STAGES}
        assert all(ms > 0 for ms in row["stages_ms"].values()), "every stage was found"
        assert row["step_ms"] > row["not_model_ms"] > 0 and 0 < row["not_model_share"] < 1
        assert row["not_model_share"] == pytest.approx(1 - row["shares"][MODEL], abs=0.05)
    assert 1.5 < found["growth"]["tokens"] < 2.5 and found["growth"]["not_model_ms"] > 0


def test_the_overhead_is_that_of_detectors_and_of_none(found):
    with_, without = found["overhead"]["all detectors"], found["overhead"]["no detectors"]
    assert len(with_["policies"]) == 8 and not without["policies"]
    for cost in (with_, without):
        assert cost["n"] == 4 and cost["bound_ms"] == pytest.approx(2 + cost["bare_ms"] / 100)
        assert cost["within"] == (cost["overhead_ms"] < cost["bound_ms"])


def test_the_document_is_printed_and_is_json(found):
    dump(found)
    console = Console(width=160, record=True)
    print_step(found, console)
    text = console.export_text()
    assert "tokenisation" in text and "all but the model" in text and "A session with no detectors adds" in text


def test_threads_that_do_not_fit_are_refused():
    with pytest.raises(BenchSettingError, match="positions"):
        bench_step(StepBench(contexts=(100_000,), model="random"))


def test_an_unknown_model_is_refused():
    with pytest.raises(KVRetractError, match="nothing"):
        bench_step(StepBench(**{**SMALL, "model": "nothing"}))


class Work:
    def outer(self):
        time.sleep(0.01)
        self.inner()
        self.inner()

    def inner(self):
        time.sleep(0.02)

    def failing(self):
        raise KeyError


def test_stages_are_exclusive_and_add_up():
    torch = pytest.importorskip("torch")
    model, work, stages = torch.nn.Identity(), Work(), Stages(time.perf_counter)
    targets = {"outer": [(Work, "outer")], "inner": [(Work, "inner")], "failing": [(Work, "failing")]}
    started = time.perf_counter()
    with stages.watching(targets, model, "model"), stages.measuring() as seconds:
        work.outer()
        model(torch.zeros(1))
        with pytest.raises(KeyError):
            work.failing()
        time.sleep(0.005)
    whole = time.perf_counter() - started
    assert set(seconds) == {"outer", "inner", "failing", "model", REST}
    assert 0.01 <= seconds["outer"] and 0.04 <= seconds["inner"] and 0.005 <= seconds[REST]
    assert seconds["outer"] < seconds["inner"] and sum(seconds.values()) <= whole
    assert not model._forward_hooks and not model._forward_pre_hooks and Work.inner.__name__ == "inner"
    work.outer()
    assert sum(seconds.values()) <= whole, "what comes later is not measured"


def test_two_stages_may_be_measured_one_after_the_other():
    stages = Stages(time.perf_counter)
    for _ in range(2):
        with stages.measuring() as seconds:
            stages.enter("a")
            stages.leave()
            stages.leave()
        assert set(seconds) == {"a", REST}
