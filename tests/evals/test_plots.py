import base64
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from kv_retract.evals.metrics import metric_rows
from kv_retract.evals.plots import cost_plot, divergence_plot, loss_plot

ARMS = ["none", "mask", "shift"]


def picture(uri):
    kind, _, data = uri.partition(",")
    assert kind == "data:image/svg+xml;base64"
    text = base64.b64decode(data).decode()
    ET.fromstring(text)
    return text


def dots(text, color):
    """Markers of a color, as the picture places them."""
    return re.findall(rf'<use [^>]*style="fill: {color}[^>]*/>', text)


@pytest.fixture(scope="module")
def samples(sample_run):
    return sample_run[1].samples


def test_a_dot_per_step_and_a_mean(samples):
    text = picture(divergence_plot(samples, metric_rows(samples, ARMS, []), ARMS))
    for color in ("#0072b2", "#d55e00", "#009e73"):
        assert len([d for d in dots(text, color) if "fill-opacity" in d]) == 3
    without_means = picture(divergence_plot(samples, [], ARMS))
    assert text.count("<use") > without_means.count("<use")


def test_what_is_infinite_or_not_scored_is_left_out(samples):
    broken = [replace(s, kl=kl) for s, kl in zip(samples, [math.inf, None] * len(samples), strict=False)]
    text = picture(divergence_plot(broken, metric_rows(broken, ARMS, []), ARMS))
    assert not [d for color in ("#0072b2", "#d55e00", "#009e73") for d in dots(text, color)]


def test_costs_of_all_arms(samples):
    text = picture(cost_plot(samples, [*ARMS, "recompute"]))
    assert [len(dots(text, color)) for color in ("#0072b2", "#d55e00", "#009e73", "#cc79a7")] == [4] * 4, (
        "three steps and the legend"
    )


def test_edits_without_a_time_are_left_out(samples):
    text = picture(cost_plot([replace(s, edit_ms=None) for s in samples], ARMS))
    assert not dots(text, "#0072b2")


def test_the_same_numbers_give_the_same_file(samples):
    rows = metric_rows(samples, ARMS, [])
    assert divergence_plot(samples, rows, ARMS) == divergence_plot(samples, rows, ARMS)
    assert cost_plot(samples, ARMS) == cost_plot(samples, ARMS) != cost_plot(samples[:4], ARMS)


def test_the_log_of_a_training_run():
    losses = [{"step": 20 * i, "answer": 5 / i, "text": 6 / i, "right": 0.5} for i in range(1, 6)]
    validation = {"step": 100, "clean": {"facts": 1.0, "errors": 0.5}, "notes": {"facts": 0.2}, "test": {}}
    text, without = (loss_plot(entries).decode() for entries in ([*losses, validation], losses))
    for page in (text, without, loss_plot([]).decode()):
        ET.fromstring(page)
    assert all(f"stroke: {color}" in text for color in ("#0072b2", "#d55e00")), "two losses"
    assert "#009e73" in text and "#cc79a7" in text and "#009e73" not in without, (
        "two validations; that of no probes is left out"
    )
    assert loss_plot([*losses, validation]) == loss_plot([*losses, validation])
