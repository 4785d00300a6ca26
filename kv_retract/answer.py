"""One answer of the model: tokens of the engine to text, tool calls and a finished result."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import cast

from .engine.base import Engine, GeneratedToken, LogitsProcessor
from .errors import ColdTombstoneError
from .ledger.render import Renderer
from .streaming import TextStream
from .thread import ThreadView
from .types import Message, RetractionPlan, SamplingParams, StepDelta, StepResult


def stream_thread(
    engine: Engine,
    renderer: Renderer,
    view_of: Callable[[], ThreadView],
    plan: RetractionPlan,
    sampling: SamplingParams,
    logits_processor: LogitsProcessor | None = None,
) -> Iterator[StepDelta]:
    """As `stream_answer`; views the thread anew where another one needed the room of a steered span in between."""
    while True:
        try:
            yield from stream_answer(engine, renderer, view_of(), plan, sampling, logits_processor)
            return
        except ColdTombstoneError:
            continue


def stream_answer(
    engine: Engine,
    renderer: Renderer,
    view: ThreadView,
    plan: RetractionPlan,
    sampling: SamplingParams,
    logits_processor: LogitsProcessor | None = None,
) -> Generator[StepDelta, None, None]:
    """Decode an answer to a thread, piece by piece; the last piece carries the result, with `plan` in it.

    Closing the generator stops decoding; what was decoded stays cached. Raises as `Engine.generate`.
    """
    stop_ids = tuple(sorted({*sampling.stop_token_ids, *renderer.stop_token_ids}))
    sampling = replace(sampling, stop_token_ids=stop_ids)
    text, ids, logprobs, cached, reason = TextStream(renderer.decode, sampling.stop), [], [], 0, "length"
    told = 0  # of the ids, in earlier pieces
    tokens = engine.generate(view.key, sampling, logits_processor=logits_processor)
    with closing(cast(Generator[GeneratedToken, None, None], tokens)):
        for token in tokens:
            cached, reason = token.num_cached_tokens, token.finish_reason or reason
            if token.finish_reason == "stop":
                break
            ids.append(token.id)
            logprobs.append(token.logprob or 0.0)
            delta = text.push(token.id)
            if delta:
                yield StepDelta(text=delta, token_ids=tuple(ids[told:]))
                told = len(ids)
            if text.stopped:
                reason = "stop"
                break
    rest = text.finish()
    content, calls = renderer.tool_calls.parse(text.text)
    result = StepResult(
        message=Message("assistant", content, tool_calls=calls),
        token_ids=tuple(ids),
        finish_reason="tool_calls" if calls else reason,
        num_prompt_tokens=len(view.key),
        num_cached_tokens=cached,
        num_completion_tokens=len(ids),
        plan=plan,
        retraction_ids=tuple(dict.fromkeys(record.retraction_id for record in view.records)),
        logprobs=tuple(logprobs) if sampling.logprobs else None,
    )
    yield StepDelta(text=rest, token_ids=tuple(ids[told:]), result=result)
