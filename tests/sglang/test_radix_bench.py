"""The benchmark of prefix indexes with SGLang's own caches: they find the same prefixes, and ours is no slower."""

import pytest

from kv_retract.evals.radix import RadixBench, bench_radix
from kv_retract.evals.radix_cores import OURS, SGLANG

from .servers import VENV

pytestmark = pytest.mark.sglang


@pytest.mark.parametrize("page", [1, 16])
def test_every_index_finds_the_same(page):
    found = bench_radix(RadixBench(threads=200, repeats=2, page=page, venv=VENV))
    assert list(found["cores"]) == [OURS, *SGLANG] and found["versions"]["sglang"]
    for name in SGLANG:
        assert set(found["cores"][name]) > {"match_us", "lookup_us", "insert_us"}
    print(found["ratio_to"])
    for name in ("sglang python", "sglang radix_cache"):
        assert max(found["ratio_to"][name].values()) < 1
