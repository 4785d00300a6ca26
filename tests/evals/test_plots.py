import base64
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from kv_retract.evals.metrics import metric_rows
from kv_retract.evals.plots import cost_plot, divergence_plot, latency_plot, loss_plot, repeated_plot

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

    def plot(entries):
        what = {"answer": "loss of answers", "text": "loss of the text"}
        return loss_plot(entries, losses=what, shares=("clean", "notes", "test"), share="right").decode()

    text, without = plot([*losses, validation]), plot(losses)
    for page in (text, without, plot([])):
        ET.fromstring(page)
    assert all(f"stroke: {color}" in text for color in ("#0072b2", "#d55e00")), "two losses"
    assert "#009e73" in text and "#cc79a7" in text and "#009e73" not in without, (
        "two validations; that of no probes is left out"
    )
    assert plot([*losses, validation]) == text


# -- repeated edits -------------------------------------------------------------------------------------------------

COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]


def repeated(arm, *edits, mode="in turn", told=1.0, leak=0.0):
    return [{"arm": arm, "mode": mode, "edits": n, "unaffected_accuracy": told, "leak": leak} for n in edits]


def places(text, color):
    return [tuple(float(re.search(rf'{axis}="([-\d.]+)"', dot)[1]) for axis in "xy") for dot in dots(text, color)]


def test_what_is_left_after_many_edits():
    rows = [
        *repeated("mask", 16, 1, 4),
        *repeated("none", 1, 4, told=0.5, leak=0.75),
        *repeated("mask", 2, mode="at once"),
    ]
    text = repeated_plot(rows).decode()
    ET.fromstring(text)
    told, leak, (_, label) = (places(text, COLORS[0])[part] for part in (slice(3), slice(3, 6), 6))
    assert len(places(text, COLORS[0])) == 7 and len(places(text, COLORS[1])) == 5, "two lines and the legend"
    assert [x for x, _ in told] == sorted(x for x, _ in told) == [x for x, _ in leak], "by the number of edits"
    assert told[1][0] - told[0][0] == pytest.approx(told[2][0] - told[1][0], abs=1e-3), "1, 4 and 16 are as far apart"
    (top,), (bottom,) = ({y for _, y in line} for line in (told, leak))
    assert label < top < bottom
    half, most = places(text, COLORS[1])[0][1], places(text, COLORS[1])[2][1]
    assert half == pytest.approx((top + bottom) / 2, abs=1e-3)
    assert most == pytest.approx(top + (bottom - top) / 4, abs=1e-3)
    assert repeated_plot(rows).decode() == text and not places(text, COLORS[2])


@pytest.mark.filterwarnings("ignore:No artists with labels")
def test_repeated_edits_in_other_modes_only():
    ET.fromstring(repeated_plot(repeated("mask", 1, mode="at once")).decode())


def test_more_arms_than_colors():
    """The results of a long measurement must not be lost over their picture."""
    text = repeated_plot([row for number in range(9) for row in repeated(f"arm {number}", 1, 4)]).decode()
    assert [len(places(text, color)) for color in COLORS] == [10, 10, 5, 5, 5, 5]


def test_growth_of_edits_beside_the_papers():
    rows = [
        {"context": context, "depth": depth, "arm": arm, "edit_ms": ms}
        for arm, growth in (("recompute", 8), ('kveraser:variant="kv_map"', 1))
        for depth, scale in ((0.1, 3), (0.5, 1))
        for context, ms in ((8192, growth * 5.0 * scale), (1024, 5.0))
    ]
    text = latency_plot({"rows": rows, "span": 128}).decode()
    ET.fromstring(text)
    recompute, mapped = (places(text, color) for color in COLORS[:2])
    assert len(recompute) == len(mapped) == 3, "two lengths and the legend"
    assert recompute[0] == mapped[0] and mapped[1][1] == mapped[0][1], "both begin at 1, and one stays there"
    assert recompute[1][1] < recompute[0][1], "and the other grows"
    assert latency_plot({"rows": rows, "span": 128}).decode() == text
