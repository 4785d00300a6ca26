"""Sessions whose threads live in a server: they heal and undo there as on the embedded engine."""

import pytest

from kv_retract import Healing, KVRetractSession, Message, Planner, Retraction, SamplingParams, SpanRef, Status
from kv_retract.engine.hf import HFEngine
from kv_retract.events import Healed, Observer
from kv_retract.integrations.sglang.engine import connect

pytestmark = [pytest.mark.sglang, pytest.mark.enable_socket]
SHORT = SamplingParams(max_tokens=8)


class Heals(Observer):
    """Keeps what the healer did."""

    def __init__(self):
        self.healed = []

    def on_event(self, event):
        if isinstance(event, Healed):
            self.healed.append(event)


def conversation(name):
    messages = [Message("system", f"You are a careful assistant of {name}. Answer in one short sentence.")]
    for i in range(1, 18):
        role = "user" if i % 2 else "assistant"
        messages.append(Message(role, f"The owner of boat {i} is {('Kel', 'Tal', 'Bral')[i % 3]}, as was said. {name}"))
    return messages


def test_a_thread_is_healed_through_the_api(server, loaded, request):
    name, heals = request.node.name, Heals()
    session = connect(
        server.url, extra_key=name, planner=Planner(exact_suffix=0), observers=[heals],
        healing=Healing(background=False, chunk_tokens=128),
    )  # fmt: skip
    with session, session.engine:
        messages = conversation(name)
        session.step("t", messages, sampling=SHORT)
        messages = [*messages, Message("assistant", "All right."), Message("user", "Who owns boat 4?")]
        session.retract("t", messages, proposals=[Retraction(span=SpanRef(4), policy="explicit", reason="wrong")])
        steered = session.step("t", messages, sampling=SHORT)
        assert session.history("t")[0].status is Status.STEERED and session.healer.pending() == 1
        first = session.healer.run(max_tokens=64)
        assert 0 < first and session.history("t")[0].status is Status.STEERED
        rest = session.healer.run()
        assert session.history("t")[0].status is Status.EXACT
        [healed] = heals.healed
        assert healed.tokens == first + rest and healed.divergence is None
        asked = [*messages, steered.message, Message("user", "And boat 5?")]
        after = session.step("t", asked, sampling=SHORT)
        assert after.num_cached_tokens > after.num_prompt_tokens - 60, "the heal prefilled what the step reads"
        twin = KVRetractSession(HFEngine(loaded.model, max_tokens=16_384, name="reference"), session.renderer)
        twin.restore("t", session.history("t"))
        assert twin.step("t", asked, sampling=SHORT).token_ids == after.token_ids
        session.undo("t", session.history("t")[0].retraction_id)
        twin.undo("t", session.history("t")[0].retraction_id)
        assert session.step("t", asked, sampling=SHORT).token_ids == twin.step("t", asked, sampling=SHORT).token_ids
    server.assert_alive()
