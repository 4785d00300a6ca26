"""Ten thousand seeded random operations on the cache, each followed by every check."""

from __future__ import annotations

import random

import pytest


@pytest.mark.parametrize(
    ("page_size", "num_pages", "seed"),
    [(1, 48, 0), (1, 24, 1), (2, 24, 2), (2, 40, 3), (4, 16, 4), (4, 24, 5)],
)
def test_random_operations_keep_every_law(make_world, page_size: int, num_pages: int, seed: int) -> None:
    rng = random.Random(seed)
    world = make_world(page_size, num_pages)
    for _ in range(1_700):
        world.step(rng.randrange)
    # Every kind of outcome was met, so a pass means something.
    met = {"append", "append without room", "begin", "fork", "publish", "end", "commit", "abort"}
    met |= {"drop", "purge", "evict"}
    assert met <= world.done.keys(), met - world.done.keys()
    assert min(world.done[name] for name in ("commit", "abort", "fork", "publish")) >= 15, world.done
