"""Ask a thread of the corpus under one eraser, and score answers as greedy decoding would give them.

An answer is given exactly where each of its tokens, end of turn included, is the most likely one behind those before
it. So one forward pass tells what many steps of decoding would say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kv_retract.cache.base import IntArray, ThreadKey
from kv_retract.ledger.render import Renderer
from kv_retract.planner import Planner
from kv_retract.session import KVRetractSession
from kv_retract.types import Cascade, EraseResult, Guarantee, Message, Retraction, RetractionPlan

if TYPE_CHECKING:
    import torch

    from kv_retract.engine.hf import HFEngine
    from kv_retract.training.samples import CorpusSample, CorpusSpan, Probe

THREAD = "t"


def chosen_span(sample: CorpusSample, number: int, max_probes: int) -> tuple[CorpusSpan, list[Probe], list[Probe]]:
    """Return the span of a sample that its number chooses, probes that it affects, and others: `max_probes` in all.

    At least one that it affects, and at most half of them where there are others.
    """
    affecting = sorted({span_id for probe in sample.probes for span_id in probe.without})
    span = sample.span(affecting[number % len(affecting)])
    hit = [p for p in sample.probes if span.span_id in p.without][: max(1, max_probes // 2)]
    others = [p for p in sample.probes if span.span_id not in p.without]
    return span, hit, others[: max_probes - len(hit)]


class AskedThread:
    """One sample in a session of its own; nothing is recomputed but by the eraser.

    Args:
        sample: the thread.
        eraser: of the session.
        engine: may be shared; the thread has a namespace of its own.
        renderer: of the model.
        name: of the namespace, beside the sample's.
    """

    def __init__(self, sample: CorpusSample, eraser: Any, engine: HFEngine, renderer: Renderer, name: str) -> None:
        self.sample, self.engine = sample, engine
        self._renderer = renderer
        self._session = KVRetractSession(
            engine, renderer, eraser=eraser, planner=Planner(exact_suffix=0, protect_newest_user=False),
            extra_key=f"{name} {sample.sample_id}",
        )  # fmt: skip

    def prefill(self) -> int:
        """Cache the thread; return its length in tokens."""
        key = self._key(self.sample.messages, open_turn=False)
        self.engine.extend(key)
        return len(key)

    def retract(
        self,
        span_ids: Sequence[str],
        guarantee: Guarantee = Guarantee.STEERED,
        cascade: Cascade = Cascade.NONE,
    ) -> tuple[RetractionPlan, EraseResult]:
        """Retract spans together; return the plan, and what the edit did and cost."""
        proposals = [
            Retraction(
                span=self.sample.span(i).ref, policy="explicit", reason="of the corpus", guarantee=guarantee,
                cascade=cascade,
            )
            for i in span_ids
        ]  # fmt: skip
        plan = self._session.retract(THREAD, self.sample.messages, tools=self.sample.tools, proposals=proposals)
        erased = self._session.last_erase(THREAD)
        assert erased is not None and len(plan.spans) >= len(proposals), "spans are cached and the planner takes them"
        return plan, erased

    def asked(self, question: str) -> ThreadKey:
        """Return the thread with a question, up to the beginning of the answer."""
        return self._key([*self.sample.messages, Message("user", question)])

    def says(self, question: str, answer: str) -> tuple[bool, float]:
        """Return whether greedy decoding gives an answer, and its log-likelihood in nats."""
        asked = self.asked(question)
        turns = [*self.sample.messages, Message("user", question), Message("assistant", answer)]
        ids = self._key(turns, open_turn=False).ids
        assert np.array_equal(ids[: len(asked)], asked.ids), "the template only appends"
        told = ids[len(asked) :]
        ends = np.flatnonzero(np.isin(told, self._renderer.stop_token_ids))
        told = told[: ends[0] + 1] if len(ends) else told
        logs = self.log_probabilities(asked, told)
        best = logs.argmax(-1).cpu().numpy()
        picked = logs[np.arange(len(told)), told]
        return bool((best == told).all()), float(picked.sum())

    def log_probabilities(self, key: ThreadKey, ids: IntArray) -> torch.Tensor:
        """Return the log-probabilities of every token where those of `ids` would follow a key.

        Shape: (len(ids), vocab_size), float32
        """
        positions = key.next_position + np.arange(len(ids) - 1)
        longer = ThreadKey(
            np.concatenate([key.ids, ids[:-1]]), np.concatenate([key.positions, positions]), key.extra_key
        )
        return self.engine.extend(longer, num_last=len(ids)).logits.log_softmax(-1)

    def close(self) -> None:
        """Forget the thread."""
        self.engine.purge(self._key(self.sample.messages, open_turn=False), 0)

    def _key(self, messages: Sequence[Message], *, open_turn: bool = True) -> ThreadKey:
        return self._session.key(THREAD, messages, tools=self.sample.tools, add_generation_prompt=open_turn)


def divergence(expected: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """Return KL(expected || found) in nats and top-1 agreement, means over rows of log-probabilities."""
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    top1 = (expected.argmax(-1) == found.argmax(-1)).float().mean()
    return max(0.0, float(kl)), float(top1)
