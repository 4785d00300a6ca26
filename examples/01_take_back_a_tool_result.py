"""Take a tool result back: one session, one thread, one retraction, and what it cost.

The bundled model knows no fares, so its answers mean little; cache, edit and costs are real.
"""

from kv_retract import KVRetractSession, Message, Retraction, SamplingParams, SpanRef, ToolCall

SHORT = SamplingParams(max_tokens=12)


def main() -> None:
    """Answer, retract, answer."""
    session = KVRetractSession.from_pretrained(eraser="shift")
    thread = [
        Message("system", "You are a travel agent. Use the tools."),
        Message("user", "What does a flight to Oslo cost?"),
        Message("assistant", tool_calls=(ToolCall("c1", "get_fare", '{"city": "Oslo"}'),)),
        Message("tool", '{"fare": 4400, "currency": "NOK"}', tool_call_id="c1", name="get_fare"),
        Message("assistant", "A flight to Oslo costs 4400 NOK."),
        Message("user", "That fare is from last year. Please look again, and only tell me the price. " * 8),
    ]
    step = session.step("trip-42", thread, sampling=SHORT)
    print(f"first step: {step.num_prompt_tokens} tokens, {step.num_cached_tokens} of them cached")

    stale = Retraction(span=SpanRef(message=3), policy="explicit", reason="the fare is last year's")
    plan = session.retract("trip-42", thread, proposals=[stale])
    for span in plan.spans:
        print(f"retracted tokens [{span.start}, {span.end}): {span.record.reason}")
    done = session.last_erase("trip-42")
    assert done is not None
    print(f"the edit: {done.edit_ms:.1f} ms, {done.tokens_recomputed} tokens through the model")

    thread += [Message("assistant", "Let me look again."), Message("user", "Well?")]
    step = session.step("trip-42", thread, sampling=SHORT)
    print(f"next step: {step.num_prompt_tokens} tokens, {step.num_cached_tokens} of them cached")
    for record in session.history("trip-42"):
        print(f"history: {record.policy} {record.status.value} {record.span_tokens} tokens, because {record.reason}")


if __name__ == "__main__":
    main()
