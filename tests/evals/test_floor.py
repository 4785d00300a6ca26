"""What an edit costs at least: by hand, for a model whose sizes are known."""

import pytest

from kv_retract.engine.models import load_model
from kv_retract.erasers import ERASERS
from kv_retract.evals.floor import Limits, Work, edit_work, measure_limits

CONTEXT, SPAN, START = 1000, 50, 100
LAYERS, HEADS, KV_HEADS, DIM, WIDTH = 4, 4, 2, 32, 128
LAYER = (
    WIDTH * DIM * (HEADS + 2 * KV_HEADS) + DIM * (HEADS + 2 * KV_HEADS)  # projections and their biases
    + WIDTH * DIM * HEADS + 3 * WIDTH * 3 * WIDTH + 2 * WIDTH
)  # fmt: skip
LAST = 2 * (WIDTH + 1) * DIM * KV_HEADS + WIDTH
WEIGHTS = (LAYERS - 1) * LAYER + LAST + WIDTH
TOKEN_BYTES = 2 * LAYERS * KV_HEADS * DIM * 4


@pytest.fixture(scope="module")
def model():
    return load_model("random").model


def work(model, name, **parameters):
    return edit_work(ERASERS.create(name, **parameters), model, context=CONTEXT, span=SPAN, start=START)


def test_the_least_time_is_the_slower_of_memory_and_arithmetic():
    limits = Limits(bytes_per_s=1e9, flops_per_s=1e12)
    assert Work(bytes=2e6, flops=1e9).floor_ms(limits) == pytest.approx(2)
    assert Work(bytes=1e6, flops=3e9).floor_ms(limits) == pytest.approx(3)
    assert Work().floor_ms(limits) == 0


def test_hiding_costs_nothing(model):
    assert work(model, "mask") == Work()


def test_a_shift_reads_and_writes_the_keys_behind_the_span(model):
    assert work(model, "shift") == Work(bytes=(CONTEXT - START - SPAN) * TOKEN_BYTES)


def test_full_recomputation_runs_what_follows_through_the_model(model):
    suffix = CONTEXT - START - SPAN
    attention = 4 * (START + suffix / 2) * (LAYERS - 1) * HEADS * DIM
    found = work(model, "recompute")
    assert found.flops == suffix * (2 * WEIGHTS + attention)
    assert found.bytes == 4 * WEIGHTS + (START + suffix) * TOKEN_BYTES


def test_the_map_reads_its_weights_and_no_model(model, make_eraser):
    eraser = ERASERS.create("kveraser", path=str(make_eraser("kv_map")))
    found = edit_work(eraser, model, context=CONTEXT, span=SPAN, start=START)
    assert found.flops == 2 * eraser.num_parameters * SPAN > 0
    assert found.bytes == 4 * eraser.num_parameters + 2 * SPAN * TOKEN_BYTES
    assert found == edit_work(eraser, model, context=30 * CONTEXT, span=SPAN, start=START), "whatever the thread is"


def test_adapters_run_the_span_through_the_model(model, make_eraser):
    found = work(model, "kveraser", path=str(make_eraser("blind")))
    assert found.flops == SPAN * (2 * WEIGHTS + 4 * (START + SPAN / 2) * (LAYERS - 1) * HEADS * DIM)


def test_limits_are_measured(model):
    limits = measure_limits("cpu", model.dtype)
    assert 1e8 < limits.bytes_per_s < 1e13 and 1e8 < limits.flops_per_s < 1e15
