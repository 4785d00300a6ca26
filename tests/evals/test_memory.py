"""What forks weigh."""

import json

import pytest

from kv_retract.evals.memory import MemoryBench, bench_memory
from kv_retract.evals.results import dump


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_thousand_forks_weigh_less_than_a_tenth_of_a_thread(page_size):
    done = []
    document = bench_memory(MemoryBench(page_size=page_size), progress=lambda *step: done.append(step))
    one, forks, gone_on = document["rows"]
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert (one["ratio"], forks["kv_bytes"]) == (1.0, one["kv_bytes"])
    assert 1 < forks["ratio"] < 1.1 < gone_on["ratio"]
    assert document["per_fork_bytes"] < 2000
    assert gone_on["kv_bytes"] - forks["kv_bytes"] == document["own_kv_bytes"], "and nothing was copied"
    assert json.loads(dump(document))["forks"] == 1000


def test_one_thread_weighs_what_its_keys_and_values_do():
    shape = {"layers": 2, "kv_heads": 3, "head_dim": 8, "dtype": "bfloat16"}
    document = bench_memory(MemoryBench(context=100, forks=2, own_tokens=1, **shape))
    assert document["rows"][0]["kv_bytes"] == 100 * 2 * 2 * 3 * 8 * 2
    assert 0 < document["rows"][0]["host_bytes"] < 50_000
