"""Kills at random points, each followed by a restart: nothing acknowledged is lost, nothing retracted is read (D1)."""

import json
import random
from collections import Counter

import pytest

pytestmark = pytest.mark.slow

FILES, KILLS = 10, 20
"""Each pair of files, a ledger and an audit log, lives through so many kills, everything checked after each."""
STEPS = (300, 2000, 6000)
"""A process is killed at a random step up to one of these: in its first operation, or later."""
OPENING, OPENING_SHARE = 150, 0.3
"""And some are killed at a step up to this one while they open the files, before anything is checked."""


def killed_at(folder):
    lines = (folder / "journal.jsonl").read_text().splitlines()
    return [entry["killed"] for entry in map(json.loads, lines) if "killed" in entry]


def last_check(nursery, folder):
    ended = nursery.order(folder=str(folder), last=True)
    assert ended == {"checked": True, "killed": False, "status": 0}


@pytest.mark.parametrize("seed", range(FILES))
def test_killed_at_random_steps_of_the_write_path(nursery, tmp_path, seed):
    rng, kills = random.Random(seed), 0
    for life in range(KILLS):
        if life == 0 or rng.random() < OPENING_SHARE:
            order = {"folder": str(tmp_path), "seed": f"{seed}/{life}/0", "at": rng.randint(1, OPENING)}
            assert nursery.order(**order, opening=True)["killed"]
            kills += 1
        order = {"folder": str(tmp_path), "seed": f"{seed}/{life}", "at": rng.randint(1, rng.choice(STEPS))}
        print(order)  # shown where a check fails
        assert nursery.order(**order) == {"checked": True, "killed": True, "status": -9}
        kills += 1
    last_check(nursery, tmp_path)
    places = Counter(place.split(":")[0] for place in killed_at(tmp_path))
    print(places)
    assert places.total() == kills
    assert any("audit/" in place for place in places) and places["SQLite"] + places["ledger/sqlite.py"]


def test_killed_at_random_times(nursery, tmp_path):
    """No step lies within a write or a sync of the system; a signal from outside may."""
    rng = random.Random(0)
    for life in range(20):
        order = {"folder": str(tmp_path), "seed": f"times/{life}", "delay": rng.uniform(0, 0.4)}
        print(order)
        assert nursery.order(**order) == {"checked": True, "killed": True, "status": -9}
    last_check(nursery, tmp_path)
