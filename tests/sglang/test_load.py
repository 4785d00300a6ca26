"""Many threads at once on a pool that is too small: no crash, no lost slot, no retracted text, ordinary answers."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from .servers import serving

pytestmark = [pytest.mark.sglang, pytest.mark.enable_socket]

SECONDS = float(os.environ.get("SGLANG_LOAD_SECONDS", "60"))
THREADS = 32
ORDINARY_TURNS = 4


class Thread:
    """One agent: appends turns, takes spans back, undoes some of it, and checks what the server holds."""

    def __init__(self, server, number):
        self.server, self.name = server, f"load/{number}"
        self.rng = np.random.default_rng(number)
        self.ids = self.rng.integers(3, 2000, int(self.rng.integers(60, 300)))
        self.retracted = {}
        self.turns = self.retractions = self.undone = 0

    def run(self, end):
        """Go on until the time is up and, however slow the machine, two spans were taken back."""
        while time.monotonic() < end or self.retractions < 2:
            action = self.rng.random()
            if action < 0.6 or len(self.ids) < 80:
                self.turn()
            elif action < 0.9:
                self.take_back()
            elif self.retracted:
                self.undo()
            self.check()
        return self

    def turn(self):
        self.ids = np.concatenate([self.ids, self.rng.integers(3, 2000, int(self.rng.integers(10, 40)))])
        told = self.server.generate(self.ids, self.name, n=int(self.rng.integers(1, 12)))
        left = len(self.ids) - sum(b - a for a, b in self.retracted.values())
        assert left <= told["prompt"] <= len(self.ids), "spans are in place as tombstones, or left out"
        if len(self.ids) < 700:
            self.ids = np.concatenate([self.ids, told["ids"]])
        else:
            self.ids, self.retracted = self.ids[:60], {}
            self.name += "'"
        self.turns += 1

    def take_back(self):
        start = int(self.rng.integers(0, len(self.ids) - 40))
        span = (start, start + int(self.rng.integers(1, 30)))
        if any(a < span[1] and span[0] < b for a, b in self.retracted.values()):
            return
        if self.ids[span[0]] == self.ids[span[1]]:
            return  # left out exactly, the thread would go on as it did: `check` could not tell one from the other
        guarantee = "exact" if self.rng.random() < 0.2 else "steered"
        told = self.server.retract(self.ids, [span], self.name, guarantee=guarantee, wait_s=60)
        (made,) = told["retractions"]
        self.retracted[made["retraction_id"]] = span
        self.retractions += 1

    def undo(self):
        made = str(self.rng.choice(sorted(self.retracted)))
        self.server.post("/kv_retract/undo", {"extra_key": self.name, "retraction_ids": [made], "wait_s": 60})
        del self.retracted[made]
        self.undone += 1

    def check(self):
        """No cached path holds a retracted text: the original matches up to the first span at most."""
        if self.retracted:
            first = min(start for start, _ in self.retracted.values())
            assert self.server.matched(self.ids, self.name) <= first, (self.name, self.retracted)


def ordinary(server, number):
    """Answers of a thread that nothing is taken back from."""
    rng, told = np.random.default_rng(10_000 + number), []
    ids = rng.integers(3, 2000, 100)
    for _ in range(ORDINARY_TURNS):
        answer = server.generate(ids, f"ordinary/{number}", n=8)
        told.append(answer["ids"])
        ids = np.concatenate([ids, answer["ids"], rng.integers(3, 2000, 20)])
    return told


@pytest.mark.slow
def test_a_load_of_many_threads(tmp_path):
    with serving(tmp_path, "--plain") as plain:
        wanted = [ordinary(plain, number) for number in range(4)]
    with serving(tmp_path, "--max-tokens", "6000") as server:
        server.http = httpx.Client(base_url=server.url, timeout=600, limits=httpx.Limits(max_connections=64))
        end = time.monotonic() + SECONDS
        with ThreadPoolExecutor(THREADS + 4) as pool:
            loads = [pool.submit(Thread(server, number).run, end) for number in range(THREADS)]
            others = [pool.submit(ordinary, server, number) for number in range(4)]
            threads = [load.result() for load in loads]
            found = [other.result() for other in others]
        server.assert_alive()
    done = {name: sum(getattr(thread, name) for thread in threads) for name in ("turns", "retractions", "undone")}
    print(done)
    assert found == wanted
    assert done["turns"] > THREADS and done["retractions"] > THREADS and done["undone"] > 0
