"""Conformance suite of engines: every answer is that of plain transformers, whatever is cached."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ..cache.base import IntArray, ThreadKey
from ..engine.base import LocalEngine
from ..errors import SpanError
from ..types import SamplingParams
from .engine_edits import EngineEdits
from .engine_fixtures import Settle, answer, key_of
from .plain import plain_answer, plain_kv, plain_logits

Ids = Callable[..., IntArray]


class EngineConformance(EngineEdits):
    """Subclass it and provide the fixture `make_engine`: a function from a transformers model to an engine for it.

    Override the fixture `page_size` where the engine caches several tokens at a time, and `model` where it runs
    another model than the tiny one. Set `caches = False` for an engine that keeps nothing between calls: tests of
    what is cached, shared, edited or read back are then skipped, and the others expect `cached` to answer 0.

    Every test gets a new engine, drops what it stored, and expects `tokens_in_use` back where it was.
    """

    # -- prefill ----------------------------------------------------------------------------------------------------

    def test_spec_describes_the_model(self, engine: LocalEngine, model: Any, ids: Ids, settle: Settle) -> None:
        """Layers, heads and vocabulary are the model's, and those of what the engine returns."""
        key, config = key_of(ids(12)), model.config
        assert (engine.spec.num_layers, engine.spec.num_kv_heads, engine.spec.vocab_size) == (
            config.num_hidden_layers, config.num_key_value_heads, config.vocab_size,
        )  # fmt: skip
        result = engine.extend(key, num_last=3)
        assert result.logits.shape == (3, config.vocab_size) and result.logits.dtype == torch.float32
        settle(key)

    def test_logits_equal_plain_transformers_with_and_without_hits(
        self, engine: LocalEngine, model: Any, page_size: int, ids: Ids, settle: Settle
    ) -> None:
        """Cold, warm, and extended; what is cached and what went through the model adds up."""
        tokens = ids(150)
        for length, num_last, cached in ((120, 5, 0), (120, 5, 115), (120, 1, 119), (150, 3, 120), (150, 150, 0)):
            result = engine.extend(key_of(tokens[:length]), num_last=num_last)
            self.assert_close(result.logits, plain_logits(model, tokens[:length], num_last=num_last))
            assert result.num_cached_tokens >= min(self.kept(cached, page_size), length - num_last)
            assert result.num_cached_tokens + result.num_prefilled_tokens == length
            assert engine.cached(key_of(tokens[:length])) == self.kept(length, page_size)
            engine.check_integrity()
        settle(key_of(tokens))

    def test_forks_share_their_prefix_and_nothing_else(
        self, engine: LocalEngine, model: Any, page_size: int, ids: Ids, settle: Settle
    ) -> None:
        """A fork is served what it shares, and both branches answer as if they were alone."""
        branches = [np.concatenate([ids(90), ids(50, seed)]) for seed in (1, 2)]
        for _ in range(2):
            for tokens in branches:
                self.assert_close(engine.extend(key_of(tokens)).logits, plain_logits(model, tokens))
        third = np.concatenate([ids(90), ids(20, 3)])
        result = engine.extend(key_of(third))
        assert result.num_cached_tokens == self.kept(90, page_size)
        self.assert_close(result.logits, plain_logits(model, third))
        settle(*(key_of(tokens) for tokens in (*branches, third)))

    def test_namespaces_share_nothing(self, engine: LocalEngine, model: Any, ids: Ids, settle: Settle) -> None:
        """The same ids under another `extra_key` are another thread."""
        mine, theirs = key_of(ids(40)), key_of(ids(40), extra_key="tenant")
        engine.extend(mine)
        assert engine.cached(theirs) == 0
        result = engine.extend(theirs)
        assert result.num_cached_tokens == 0
        self.assert_close(result.logits, plain_logits(model, theirs.ids))
        engine.drop(theirs, 0)
        self.assert_close(engine.extend(mine).logits, plain_logits(model, mine.ids))
        settle(mine, theirs)

    def test_positions_are_those_of_the_key(self, engine: LocalEngine, model: Any, ids: Ids, settle: Settle) -> None:
        """A key may leave a gap in its positions, as one with a masked span does."""
        tokens, positions = ids(60), np.arange(60)
        positions[25:] += 30
        gap = ThreadKey(tokens, positions)
        expected = plain_logits(model, tokens, positions=positions)
        assert float((expected - plain_logits(model, tokens)).abs().max()) > self.atol, "the gap must matter"
        for _ in range(2):
            self.assert_close(engine.extend(gap).logits, expected)
        settle(gap)

    def test_what_cannot_run_is_refused(self, engine: LocalEngine, model: Any, ids: Ids, settle: Settle) -> None:
        """ValueError for an empty key, too many logits, and positions past the model's; nothing is lost by it."""
        key = key_of(ids(10))
        far = ThreadKey(key.ids, key.positions + engine.spec.max_positions - 5)
        for wrong, num_last in ((key_of(ids(0)), 1), (key, 11), (key, 0), (far, 1)):
            with pytest.raises(ValueError):
                engine.extend(wrong, num_last=num_last)
            engine.check_integrity()
        self.assert_close(engine.extend(key).logits, plain_logits(model, key.ids))
        settle(key, far)

    def test_asking_what_is_cached_changes_nothing(
        self, engine: LocalEngine, page_size: int, ids: Ids, settle: Settle
    ) -> None:
        """Longer, shorter and foreign keys get the length of what they share."""
        engine.extend(key_of(ids(60)))
        in_use = engine.tokens_in_use()
        for _ in range(2):
            assert engine.cached(key_of(ids(60), ids(9, 1))) == self.kept(60, page_size)
            assert engine.cached(key_of(ids(60)[:30])) == self.kept(30, page_size)
            assert engine.cached(key_of(ids(60, 1))) == 0
            assert engine.tokens_in_use() == in_use
        settle(key_of(ids(60)))

    # -- decoding ---------------------------------------------------------------------------------------------------

    def test_greedy_decoding_equals_plain_transformers(
        self, engine: LocalEngine, model: Any, page_size: int, ids: Ids, settle: Settle
    ) -> None:
        """Cold and warm; what was decoded stays cached, but for the last token, which never ran."""
        tokens, expected = ids(40), plain_answer(model, ids(40), 12)
        grown = key_of(tokens, np.array(expected))
        for cached in (0, min(39, self.kept(40, page_size))):
            stream = list(engine.generate(key_of(tokens), SamplingParams(max_tokens=12)))
            assert [token.id for token in stream] == expected
            assert [token.finish_reason for token in stream] == [None] * 11 + ["length"]
            assert {token.num_cached_tokens for token in stream} == {cached}
            assert engine.cached(grown) == self.kept(51, page_size)
        settle(grown)

    def test_an_end_token_ends_the_answer(self, engine: LocalEngine, model: Any, ids: Ids, settle: Settle) -> None:
        """It is the last token of the stream, with its reason."""
        expected = plain_answer(model, ids(20), 8)
        end = expected[-1]
        count = expected.index(end) + 1
        sampling = SamplingParams(max_tokens=50, stop_token_ids=(end,))
        stream = list(engine.generate(key_of(ids(20)), sampling))
        assert [token.id for token in stream] == expected[:count]
        assert [token.finish_reason for token in stream] == [None] * (count - 1) + ["stop"]
        settle(key_of(ids(20), np.array(expected)))

    def test_logprobs_are_log_softmax(self, engine: LocalEngine, model: Any, ids: Ids, settle: Settle) -> None:
        """Only where the caller asks."""
        key = key_of(ids(20))
        (token,) = engine.generate(key, SamplingParams(max_tokens=1, logprobs=True))
        expected = float(plain_logits(model, ids(20))[0].log_softmax(-1)[token.id])
        assert token.logprob == pytest.approx(expected, abs=10 * self.atol)
        (token,) = engine.generate(key, SamplingParams(max_tokens=1))
        assert token.logprob is None
        settle(key)

    def test_a_logits_processor_decides(self, engine: LocalEngine, ids: Ids, settle: Settle) -> None:
        """It sees what was generated so far and may change the logits in place."""
        seen: list[list[int]] = []

        def count_up(generated: Any, logits: torch.Tensor) -> torch.Tensor:
            seen.append(list(generated))
            logits[:] = -1.0
            logits[7 + len(generated)] = 1.0
            return logits

        key, sampling = key_of(ids(20)), SamplingParams(max_tokens=3)
        for _ in range(2):
            stream = engine.generate(key, sampling, logits_processor=count_up)
            assert [token.id for token in stream] == [7, 8, 9]
        assert seen == 2 * [[], [7], [7, 8]]
        settle(key_of(ids(20), np.array([7, 8, 9])))

    def test_sampling_is_seeded(self, engine: LocalEngine, model: Any, ids: Ids, settle: Settle) -> None:
        """The same seed draws the same; the narrowest choice is the greedy one."""
        key, drawn = key_of(ids(20)), []
        for seed in (7, 7, 8, 9):
            drawn.append(answer(engine, key, 10, temperature=1.5, seed=seed))
        assert drawn[0] == drawn[1]
        assert len(set(map(tuple, drawn))) > 1
        greedy = plain_answer(model, ids(20), 10)
        assert answer(engine, key, 10, temperature=2.0, top_k=1, seed=3) == greedy
        assert answer(engine, key, 10, temperature=2.0, top_p=1e-6, seed=3) == greedy
        settle(*(key_of(ids(20), np.array(ending)) for ending in (*drawn, greedy)))

    # -- several at once --------------------------------------------------------------------------------------------

    def test_streams_of_several_threads_interleave(
        self, engine: LocalEngine, model: Any, ids: Ids, settle: Settle
    ) -> None:
        """Each answers as if it were alone, also two of the same thread."""
        prompts = [np.concatenate([ids(30), ids(5, seed)]) for seed in (1, 2, 3, 3)]
        alone = [plain_answer(model, prompt, 8) for prompt in prompts]
        streams = [engine.generate(key_of(prompt), SamplingParams(max_tokens=8)) for prompt in prompts]
        together = zip(*streams, strict=True)
        assert [[token.id for token in stream] for stream in zip(*together, strict=True)] == alone
        settle(*(key_of(prompt, np.array(ending)) for prompt, ending in zip(prompts, alone, strict=True)))

    def test_python_threads_may_share_an_engine(
        self, engine: LocalEngine, model: Any, ids: Ids, settle: Settle
    ) -> None:
        """Each answers as if it were alone."""
        prompts = [np.concatenate([ids(20), ids(10, seed)]) for seed in range(1, 6)]
        alone = [plain_answer(model, prompt, 6) for prompt in prompts]
        results: list[Any] = [None] * len(prompts)

        def work(i: int) -> None:
            try:
                results[i] = answer(engine, key_of(prompts[i]), 6)
            except Exception as error:
                results[i] = error

        workers = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert results == alone
        settle(*(key_of(prompt, np.array(ending)) for prompt, ending in zip(prompts, alone, strict=True)))

    @pytest.mark.parametrize("taken", [0, 1, 5])
    def test_closing_a_stream_releases_what_it_held(
        self, engine: LocalEngine, model: Any, page_size: int, ids: Ids, settle: Settle, taken: int
    ) -> None:
        """What was decoded stays cached, all of it can be dropped, and a stream that never began held nothing."""
        expected = plain_answer(model, ids(20), 5)
        grown = key_of(ids(20), np.array(expected))
        stream = engine.generate(key_of(ids(20)), SamplingParams(max_tokens=50))
        assert [token.id for token in itertools.islice(stream, taken)] == expected[:taken]
        stream.close()  # type: ignore[attr-defined]
        engine.check_integrity()
        assert engine.cached(grown) == (self.kept(19 + taken, page_size) if taken else 0)
        settle(grown)

    def test_a_running_stream_keeps_what_is_dropped(
        self, engine: LocalEngine, model: Any, ids: Ids, settle: Settle
    ) -> None:
        """Dropping its thread, or one that forks off it, does not disturb it."""
        expected = plain_answer(model, ids(30), 8)
        key, fork = key_of(ids(30)), key_of(ids(30)[:20], ids(10, 1))
        stream = engine.generate(key, SamplingParams(max_tokens=8))
        got = [next(stream).id, next(stream).id]
        engine.extend(fork)
        engine.drop(key, 0)
        engine.drop(fork, 0)
        engine.check_integrity()
        got += [token.id for token in stream]
        assert got == expected
        settle(key_of(ids(30), np.array(expected)), fork)

    # -- the cache by hand ------------------------------------------------------------------------------------------

    def test_drop_forgets_what_only_this_thread_uses(
        self, engine: LocalEngine, model: Any, page_size: int, ids: Ids, settle: Settle
    ) -> None:
        """It returns the slots it freed, leaves the fork alone, and dropping again frees nothing."""
        key, fork = key_of(ids(64)), key_of(ids(64)[:32], ids(32, 1))
        engine.extend(key)
        engine.extend(fork)
        for start, left in ((48, 48), (16, 32), (16, 32)):
            in_use, before = engine.tokens_in_use(), engine.cached(key)
            freed = engine.drop(key, start)
            engine.check_integrity()
            assert engine.cached(key) == self.kept(left, page_size)
            assert freed == in_use - engine.tokens_in_use() == before - self.kept(left, page_size)
        assert engine.cached(fork) == self.kept(64, page_size)
        for thread in (fork, key):
            self.assert_close(engine.extend(thread).logits, plain_logits(model, thread.ids))
        settle(key, fork)

    def test_what_is_read_is_what_transformers_computes(
        self, engine: LocalEngine, model: Any, ids: Ids, settle: Settle
    ) -> None:
        """K is rotated; the result is a copy."""
        self.needs_cache()
        key = key_of(ids(48))
        engine.extend(key)
        for start, end in ((0, 48 // 16 * 16), (10, 21), (5, 5)):
            for read, expected in zip(engine.read_kv(key, start, end), plain_kv(model, key.ids), strict=True):
                self.assert_close(read, expected[:, start:end])
                read.zero_()
        self.assert_close(engine.extend(key).logits, plain_logits(model, key.ids))
        settle(key)

    def test_what_is_written_is_read_and_attended_to(
        self, engine: LocalEngine, model: Any, ids: Ids, settle: Settle
    ) -> None:
        """States written over others serve the next call."""
        self.needs_cache()
        key, other = key_of(ids(48)), key_of(ids(16, 1), ids(48)[16:])
        engine.extend(key)
        before = engine.read_kv(key, 0, 40)
        engine.write_kv(key, 0, 40, *(states[:, :40] for states in plain_kv(model, other.ids)))
        for read, expected in zip(engine.read_kv(key, 0, 40), plain_kv(model, other.ids), strict=True):
            self.assert_close(read, expected[:, :40])
        expected = plain_logits(model, key.ids, num_last=2)
        assert float((engine.extend(key, num_last=2).logits.cpu() - expected).abs().max()) > self.atol
        engine.write_kv(key, 0, 40, *before)
        self.assert_close(engine.extend(key, num_last=2).logits, expected)
        settle(key)

    def test_what_is_not_cached_can_be_neither_read_nor_written(
        self, engine: LocalEngine, ids: Ids, settle: Settle
    ) -> None:
        """SpanError, also where part of the interval is cached."""
        spec = engine.spec
        engine.extend(key_of(ids(32)))
        states = torch.zeros(spec.num_layers, 10, spec.num_kv_heads, spec.head_dim)
        for key in (key_of(ids(32), ids(20, 1)), key_of(ids(52, 2))):
            with pytest.raises(SpanError):
                engine.read_kv(key, 26, 36)
            with pytest.raises(SpanError):
                engine.write_kv(key, 26, 36, states, states)
        settle(key_of(ids(32)))
