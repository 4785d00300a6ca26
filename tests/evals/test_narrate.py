"""The narrated run: the same story under every arm, and what is said about the answers."""

from io import StringIO

import pytest
from rich.console import Console

from kv_retract.engine.hf import HFEngine
from kv_retract.engine.models import load_model
from kv_retract.evals.narrate import ARMS, FIRST, FLIGHT, SECOND, Outcome, run_story, story, tell


@pytest.fixture(scope="module")
def told():
    loaded = load_model("random")
    engine = HFEngine(loaded.model, max_tokens=4096)
    outcomes = run_story(loaded, engine)
    engine.check_integrity()
    return loaded, outcomes


def printed(outcomes, note=""):
    console = Console(width=200, record=True, file=StringIO())
    tell(outcomes, note, console)
    return console.export_text()


def outcome(arm, after):
    return Outcome(arm=arm, before=f"The gate is {SECOND}.", after=after, edit_ms=1.5, tokens_recomputed=7)


def test_the_story_has_two_readings_of_which_the_second_is_the_newer():
    contents = [m.content for m in story() if m.role == "tool"]
    assert FIRST in contents[0] and SECOND in contents[1] and len(contents) == 2
    assert not any(value in m.content for m in story() if m.role != "tool" for value in (FIRST, SECOND))


def test_every_arm_hears_the_same_and_edits_in_its_own_way(told):
    _, outcomes = told
    assert tuple(o.arm for o in outcomes) == tuple(arm for arm in ARMS if arm != "kveraser"), "no eraser of this model"
    assert len({o.before for o in outcomes}) == 1
    by_arm = {o.arm: o for o in outcomes}
    assert by_arm["none"].after == by_arm["none"].before, "the control changes nothing"
    assert by_arm["recompute"].after != by_arm["recompute"].before
    assert by_arm["none"].tokens_recomputed == by_arm["mask"].tokens_recomputed == 0
    assert by_arm["recompute"].tokens_recomputed > 20
    assert all(o.edit_ms > 0 for o in outcomes)


def test_answers_are_told_apart():
    text = printed(
        [outcome("none", f"It is {SECOND}."), outcome("mask", "No idea."), outcome("recompute", f"It is {FIRST}.")]
    )
    lines = {line.split()[0]: line for line in text.splitlines() if line.split()[:1] and line.split()[0] in ARMS}
    assert "leaks" in lines["none"] and "other" in lines["mask"] and "right" in lines["recompute"]
    assert f"flight {FLIGHT}" in text and "7 tokens through the model" in lines["none"]


def test_the_note_of_a_model_is_said_and_controls_are_shown_by_name(told):
    loaded, _ = told
    text = printed([outcome("none", "a\x1b[31mb")], loaded.quality_note)
    assert "Note: seeded random weights" in text and "U+001B" in text and "\x1b" not in text
    assert "Note" not in printed([outcome("none", "a")])
