"""A real SGLang server on loopback, and how tests talk to it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from kv_retract.integrations.sglang.process import ChildServer, running_server

ROOT = Path(__file__).parents[2]
VENV = Path(os.environ.get("SGLANG_VENV", ROOT / ".venv-sglang"))


class Server:
    """A running server."""

    def __init__(self, child: ChildServer) -> None:
        self.child, self.url, self.tail = child, child.url, child.tail
        self.http = httpx.Client(base_url=child.url, timeout=120)

    def post(self, path: str, body: dict[str, Any], *, status: int = 200) -> Any:
        answer = self.http.post(path, json=body)
        assert answer.status_code == status, f"{path}: {answer.status_code} {answer.text}\n{self.tail()}"
        return answer.json()

    def generate(self, ids, extra_key, *, n: int = 8, status: int = 200, **more: Any) -> dict[str, Any]:
        """Greedy tokens, with log-probabilities and how much of the prompt was cached."""
        sampling = {"max_new_tokens": n, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": [int(i) for i in ids], "sampling_params": sampling, "extra_key": extra_key, **more}
        told = self.post("/generate", {**body, "return_logprob": True}, status=status)
        if status != 200:
            return told
        meta = told["meta_info"]
        return {
            "ids": told["output_ids"], "cached": meta["cached_tokens"], "prompt": meta["prompt_tokens"],
            "logprobs": np.array([entry[0] for entry in meta["output_token_logprobs"]]),
        }  # fmt: skip

    def retract(self, ids, spans, extra_key, *, status: int = 200, **more: Any) -> Any:
        body = {"token_ids": [int(i) for i in ids], "spans": [{"start": a, "end": b} for a, b in spans]}
        return self.post("/kv_retract/retract", {**body, "extra_key": extra_key, **more}, status=status)

    def matched(self, ids, extra_key) -> int:
        body = {"token_ids": [int(i) for i in ids], "extra_key": extra_key}
        return self.post("/kv_retract/match", body)["num_cached"]

    def states(self, extra_key) -> list[str]:
        return [r["state"] for r in self.post("/kv_retract/status", {"extra_key": extra_key})["retractions"]]

    def flush(self) -> None:
        time.sleep(1.5)  # a server that has just answered is not idle yet, and refuses
        assert self.http.post("/flush_cache").status_code == 200, self.tail()

    def assert_alive(self) -> None:
        """SGLang's own leak check ends the scheduler when idle: alive a while later means that no slot is lost."""
        time.sleep(2.5)
        assert self.child.process.poll() is None and self.http.get("/health").status_code == 200, self.tail()
        assert "leak" not in self.tail().lower(), self.tail()


@contextmanager
def serving(folder: Path, *options: str, port: int | None = None) -> Iterator[Server]:
    """Start `kv-retract serve`, wait until it answers, kill it."""
    with running_server(VENV, folder, options, port=port) as child:
        server = Server(child)
        try:
            yield server
        finally:
            server.http.close()
