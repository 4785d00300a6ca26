"""Sessions whose threads outgrow the window: retraction in both layers, healing, undo, restarts (ACRE)."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import invariant, run_state_machine_as_test

from kv_retract import Guarantee, KVRetractSession, Message, Planner, SamplingParams, Status
from kv_retract.engine.bilayer import BiLayer, BiLayerEngine
from kv_retract.engine.hf import HFEngine
from kv_retract.engine.models import load_model
from kv_retract.engine.window_store import WindowStore
from kv_retract.healing import Healing
from kv_retract.ledger.render import Renderer
from kv_retract.testing.spy import prefilled_texts

from .test_invariants import ONE, Threads
from .watching import of_message

SMALL = {
    "window": 32, "ratio": 8, "overlap": 4, "local": 96, "sinks": 4, "queries": 24, "refill": 32,
    "landmark_positions": 16, "max_tokens": 2048,
}  # fmt: skip


class ReadableStore(WindowStore):
    """Knows which token each slot of L2 was written for, and every token that could ever have been brought back."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.token_of, self.offered = {}, []

    def _encode(self, before, slots, ids):
        super()._encode(before, slots, ids)
        self.token_of.update(zip(slots[slots != -1].tolist(), ids.tolist(), strict=True))

    def refilled(self, parts, scores, budget):
        self.offered.append([self.token_of[slot] for slot in parts.candidates.tolist()])
        return super().refilled(parts, scores, budget)


class ReadableEngine(BiLayerEngine):
    store = ReadableStore


@pytest.fixture(scope="module")
def loaded():
    return load_model("random")


def open_session(loaded, *, folder=None, engine=ReadableEngine, **kw):
    engine = engine(HFEngine(loaded.model, max_tokens=1500), BiLayer(**SMALL, folder=folder))
    return KVRetractSession(engine, Renderer(loaded.tokenizer), planner=Planner(exact_suffix=0), **kw)


def thread(n=24):
    roles = ("user", "assistant")
    return [Message("system", "You are an agent.")] + [
        Message(roles[i % 2], f"item {i} costs {i * 37} <m{i}>") for i in range(n)
    ]


def offered(session):
    """Everything that could have been brought back since the last call, as text."""
    text = " ".join(session.renderer.decode(ids) for ids in session.engine.windows.offered)
    session.engine.windows.offered.clear()
    return text


def test_steps_go_on_as_a_thread_passes_its_budget(loaded):
    session, messages = open_session(loaded), thread(4)
    for i in range(4, 20):
        result = session.step("t", messages, sampling=SamplingParams(max_tokens=3))
        assert result.message.role == "assistant"
        messages += thread(i + 1)[-1:]
        session.engine.check_integrity()
    assert session.engine.windows.manager.tokens_in_use() >= 96
    assert "<m2>" in offered(session)


@pytest.mark.parametrize("eraser", ["mask", "shift", "repair", "none", "recompute"])
def test_a_retracted_text_is_never_brought_back(loaded, eraser):
    session, messages = open_session(loaded, eraser=eraser), thread()
    session.step("t", messages, sampling=ONE)
    assert "<m3>" in offered(session)
    with prefilled_texts(session) as texts:
        [span] = session.retract("t", messages, proposals=[of_message(4)]).spans
        result = session.step("t", messages, sampling=ONE)
    assert result.retraction_ids == (span.record.retraction_id,)
    assert "<m3>" not in offered(session) and "<m3>" not in "".join(texts)
    assert session.history("t")[0].status is (Status.EXACT if eraser == "recompute" else Status.STEERED)
    # The old window may stay for nobody: no slot of L2 that anything refers to was written for the text.
    held = session.engine.windows.manager.index.held_slots()
    tokens = [session.engine.windows.token_of[slot] for slot in held[held != -1].tolist()]
    assert "<m3>" not in session.renderer.decode(tokens)
    session.engine.check_integrity()


def test_only_the_window_of_a_steered_span_is_encoded_again(loaded):
    session, messages = open_session(loaded), thread()
    session.step("t", messages, sampling=ONE)
    session.retract("t", messages, proposals=[of_message(4)])
    erased = session.last_erase("t")
    assert 0 < erased.tokens_recomputed <= 64 and not erased.exact
    warm = session.step("t", messages, sampling=ONE)
    assert warm.num_cached_tokens >= session.engine.settings.moved(len(session.key("t", messages))) * 32


def test_a_guarantee_leaves_nothing_that_read_the_text(loaded):
    session, messages = open_session(loaded), thread()
    session.step("t", messages, sampling=ONE)
    session.step("fork", [*messages, Message("user", "and now?")], sampling=ONE)
    session.retract("t", messages, proposals=[of_message(4, guarantee=Guarantee.EXACT)])
    held = session.engine.windows.manager.index.held_slots()
    tokens = [session.engine.windows.token_of[slot] for slot in held[held != -1].tolist()]
    assert "<m3>" not in session.renderer.decode(tokens)
    fresh = open_session(loaded, engine=BiLayerEngine)
    key = session.key("t", messages)
    assert np.all(key.ids >= 0)
    torch.testing.assert_close(session.engine.extend(key).logits, fresh.engine.extend(key).logits, atol=2e-4, rtol=1e-4)


def test_a_healed_thread_is_what_it_would_be_without_the_text(loaded):
    session = open_session(loaded, healing=Healing(background=False, chunk_tokens=64))
    messages = thread()
    session.step("t", messages, sampling=ONE)
    session.retract("t", messages, proposals=[of_message(4)])
    session.step("t", messages, sampling=ONE)
    before = session.engine.extend(session.key("t", messages)).logits
    assert session.healer.run() > 0
    assert [r.status for r in session.history("t")] == [Status.EXACT]
    key = session.key("t", messages)
    healed = session.engine.extend(key).logits
    fresh = open_session(loaded, engine=BiLayerEngine).engine.extend(key).logits
    torch.testing.assert_close(healed, fresh, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(before, healed, atol=1e-3), "what later windows took was not healed before"
    assert "<m3>" not in offered(session)[-1:]
    session.close()
    session.engine.check_integrity()


def test_undo_reads_the_original_again(loaded):
    session, messages = open_session(loaded), thread()
    session.step("t", messages, sampling=ONE)
    [span] = session.retract("t", messages, proposals=[of_message(4)]).spans
    session.step("t", messages, sampling=ONE)
    session.undo("t", span.record.retraction_id)
    offered(session)
    session.step("t", messages, sampling=ONE)
    assert "<m3>" in offered(session)
    fresh = open_session(loaded, engine=BiLayerEngine)
    key = session.key("t", messages)
    torch.testing.assert_close(session.engine.extend(key).logits, fresh.engine.extend(key).logits, atol=2e-4, rtol=1e-4)


def test_windows_in_a_folder_survive_a_restart_with_what_was_retracted(loaded, tmp_path):
    ledger, messages = tmp_path / "ledger.sqlite", thread()
    with open_session(loaded, folder=tmp_path / "windows", ledger=ledger, engine=BiLayerEngine) as session:
        session.step("t", messages, sampling=ONE)
        session.retract("t", messages, proposals=[of_message(4)])
        expected = session.engine.extend(session.key("t", messages)).logits
        session.engine.close()
    with open_session(loaded, folder=tmp_path / "windows", ledger=ledger, engine=BiLayerEngine) as session:
        moved = session.engine.settings.moved(len(session.key("t", messages)))
        with prefilled_texts(session) as texts:
            result = session.step("t", messages, sampling=ONE)
        assert result.num_cached_tokens >= moved * 32 and "<m3>" not in "".join(texts)
        assert [r.status for r in session.history("t")] == [Status.STEERED]
        torch.testing.assert_close(
            session.engine.extend(session.key("t", messages)).logits, expected, atol=2e-4, rtol=1e-4
        )
        session.engine.check_integrity()
        session.engine.close()


def test_the_folder_is_saved_when_the_process_ends(tmp_path):
    program = (
        "from kv_retract import KVRetractSession, Message\n"
        "from kv_retract.engine.bilayer import BiLayer\n"
        f"settings = BiLayer(**{SMALL!r}, folder={str(tmp_path / 'windows')!r})\n"
        "session = KVRetractSession.from_pretrained('random', long_thread=settings)\n"
        "messages = [Message('user', f'item {i} costs {i * 37}') for i in range(24)]\n"
        "print(session.step('t', messages).num_cached_tokens)\n"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in range(2)
    ]
    first, second = (int(run.stdout) for run in runs)
    assert first == 0 and second >= 128


def test_an_unknown_way_of_keeping_long_threads_is_refused():
    with pytest.raises(ValueError, match="bilayer"):
        KVRetractSession.from_pretrained("random", long_thread="tiered")


class LongThreads(Threads):
    """As `Threads`, and nothing that was retracted in a thread is ever among what can be brought back to it."""

    def assert_clean(self, name, messages, texts):
        super().assert_clean(name, messages, [*texts, offered(self.session)])

    @invariant()
    def nothing_is_locked(self):
        assert self.shared.engine.windows.manager.index.protected_size == 0


@pytest.mark.parametrize("eraser", ["mask", "repair"])
def test_retracted_text_is_never_prefilled_nor_brought_back(loaded, eraser):
    settings_of = {**SMALL, "window": 16, "ratio": 4, "local": 48, "queries": 16, "refill": 12, "max_tokens": 512}
    engine = ReadableEngine(HFEngine(loaded.model, max_tokens=600), BiLayer(**settings_of))
    shared = KVRetractSession(engine, Renderer(loaded.tokenizer))
    machine = type("Machine", (LongThreads,), {"shared": shared, "eraser": eraser})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
