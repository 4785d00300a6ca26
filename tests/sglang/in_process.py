"""Run by the SGLang environment's Python: the operations on an `sglang.Engine`, without a server; prints JSON."""

import json
import os
import sys


def main() -> None:
    """Generate, take a span back, generate again."""
    from kv_retract.integrations.sglang.serve import Server

    server = Server(max_tokens=8000)
    os.environ.update(server.environment())
    import sglang
    from sglang.srt.managers.io_struct import GenerateReqInput

    engine = sglang.Engine(**server.options(has_gpu=False))
    manager, run, ids = engine.tokenizer_manager, engine.loop.run_until_complete, json.loads(sys.argv[1])

    async def answer(tokens):
        sampling = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
        request = GenerateReqInput(input_ids=tokens, sampling_params=sampling, extra_key="thread")
        async for told in manager.generate_request(request, None):
            last = told
        return last["output_ids"], last["meta_info"]["cached_tokens"]

    body = {"extra_key": "thread", "token_ids": ids[:380], "spans": [{"start": 60, "end": 80}]}
    told = {"first": run(answer(ids[:380])), "retract": run(manager.kv_retract.call("retract", body))}
    told["second"] = run(answer(ids))
    told["refused"] = run(manager.kv_retract.call("retract", {**body, "spans": [{"start": 70, "end": 90}]}))
    print("ANSWER " + json.dumps(told), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()
