"""A key that a tool result should never have held is erased exactly, before the next token.

`secret` asks for the guarantee `EXACT`: no cached state that has read the key stays, neither in this thread nor in a
fork, and what followed is recomputed without it. Only the value goes; the rest of the result survives.
"""

import torch

from kv_retract import KVRetractSession, Message, SamplingParams, ToolCall
from kv_retract.cache.keys import build_key
from kv_retract.policies import ExposedSecret

KEY = "AKIAQ3EGTRZMVNW4XK7P"
THREAD = [
    Message("system", "You are an operations assistant. Use the tools."),
    Message("user", "Why does the upload fail?"),
    Message("assistant", tool_calls=(ToolCall("c1", "read_log", '{"service": "upload"}'),)),
    Message("tool", f"access denied for {KEY} on bucket reports-eu", tool_call_id="c1", name="read_log"),
    Message("assistant", "Access to the bucket reports-eu is denied."),
    Message("user", "Who can change that?"),
]
SHORT = SamplingParams(max_tokens=8)


def main() -> None:
    """Read a key, erase it, and compare with a model that never saw it."""
    session = KVRetractSession.from_pretrained()
    session.step("ops-1", THREAD, sampling=SHORT)
    before = session.key("ops-1", THREAD)

    session.policies = [ExposedSecret()]
    step = session.step("ops-1", THREAD, sampling=SHORT)
    [record] = session.history("ops-1")
    print(f"{record.policy}: {record.span_tokens} tokens, guarantee {record.guarantee}, status {record.status}")

    key = session.key("ops-1", THREAD)
    read = session.renderer.decode(key.ids.tolist())
    print("the key is still read:", KEY in read)
    print("the bucket is still read:", "reports-eu" in read)
    start = step.plan.spans[0].start
    print("states that had read it are gone:", session.engine.cached(before) <= start)
    # The same tokens in a namespace of their own: a model that never saw the key.
    fresh = build_key(key.ids, (), extra_key="fresh")
    ours, theirs = (session.engine.extend(k).logits[-1].log_softmax(-1) for k in (key, fresh))
    print("as if it had never been there:", bool(torch.allclose(ours, theirs, atol=1e-4)))


if __name__ == "__main__":
    main()
