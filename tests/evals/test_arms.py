import time
from dataclasses import dataclass

import pytest

from kv_retract.engine.hf import HFEngine
from kv_retract.engine.models import load_model
from kv_retract.erasers import MaskEraser
from kv_retract.errors import SpanError, UnknownNameError
from kv_retract.evals.arms import Arm, ArmError, clock
from kv_retract.evals.specs import Spec
from kv_retract.ledger.render import Renderer
from kv_retract.types import Message, Retraction, SpanRef

THREAD = (
    Message("system", "You help."),
    Message("assistant", "One two three."),
    Message("assistant", "Four five six."),
    Message("user", "Seven."),
)


@pytest.fixture(scope="module")
def loaded():
    return load_model("random")


@pytest.fixture(scope="module")
def renderer(loaded):
    return Renderer(loaded.tokenizer)


@pytest.fixture
def engine(loaded):
    return HFEngine(loaded.model, max_tokens=512)


def of_message(i):
    return Retraction(span=SpanRef(i), policy="explicit", reason="test")


def test_arms_on_one_engine_share_nothing(engine, renderer):
    mask, shift = (Arm(Spec(name), engine, renderer) for name in ("mask", "shift"))
    key = mask.key("t", THREAD, None)
    result, milliseconds = mask.extend(key)
    assert result.num_cached_tokens == 0 and milliseconds > 0
    assert shift.extend(shift.key("t", THREAD, None))[0].num_cached_tokens == 0
    assert mask.extend(key)[0].num_cached_tokens == len(key) - 1, "the last token is run again for its logits"


def test_short_suffixes_are_left_to_the_eraser(engine, renderer):
    arm = Arm(Spec("mask"), engine, renderer)
    arm.extend(arm.key("t", THREAD, None))
    (span,) = arm.retract("t", THREAD, None, [of_message(1)]).spans
    assert span.why_exact == "" and not span.exact
    assert (arm.key("t", THREAD, None).ids < 0).sum() == span.end - span.start


def test_forget_empties_the_cache(engine, renderer):
    arm = Arm(Spec("shift"), engine, renderer)
    for end in (2, 4):
        arm.extend(arm.key("t", THREAD[:end], None))
    arm.retract("t", THREAD, None, [of_message(1)])
    arm.extend(arm.key("t", THREAD, None), num_last=2)
    assert engine.tokens_in_use() > 0
    arm.forget()
    assert engine.tokens_in_use() == 0
    engine.check_integrity()


@dataclass(kw_only=True)
class Failing(MaskEraser):
    """Fails with what it is told."""

    error: Exception

    def erase(self, view):
        raise self.error


@pytest.mark.parametrize(
    ("error", "raised", "told"),
    [
        (IndexError("no layer 9"), ArmError, "eraser 'mask' failed: IndexError: no layer 9"),
        (SpanError("not there"), SpanError, "not there"),
        (AssertionError("a bug"), AssertionError, "a bug"),
    ],
)
def test_an_eraser_that_fails_is_named_and_the_cache_stays_whole(engine, renderer, error, raised, told):
    arm = Arm(Spec("mask"), engine, renderer)
    arm.session.eraser = Failing(error=error)
    arm.extend(arm.key("t", THREAD, None))
    with pytest.raises(raised, match=told):
        arm.retract("t", THREAD, None, [of_message(1)])
    engine.check_integrity()


def test_an_eraser_must_be_known(engine, renderer):
    with pytest.raises(UnknownNameError, match="unknown eraser 'wipe'"):
        Arm(Spec("wipe"), engine, renderer)


def test_the_clock_runs_in_seconds():
    started = clock("cpu")
    time.sleep(0.01)
    assert 0.01 <= clock("cpu") - started < 5
