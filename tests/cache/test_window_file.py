"""Windows that outlive their process: what comes back, what must not, and who is kept out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kv_retract.cache.base import NO_SLOT, IntArray
from kv_retract.cache.bilayer import BiLayerPool, WindowShape
from kv_retract.cache.keys import tombstone_ids
from kv_retract.cache.manager import CacheManager
from kv_retract.cache.pool import PagedKVPool
from kv_retract.cache.radix import RadixCache
from kv_retract.cache.window_file import WindowFile
from kv_retract.errors import CacheIntegrityError, WindowFileError

WINDOW = 4
SIZES = {
    "num_layers": 2, "num_kv_heads": 1, "head_dim": 4, "num_windows": 16, "shape": WindowShape(window=WINDOW, ratio=2),
    "dtype": torch.float32,
}  # fmt: skip
KEYS = ["", "a", "a\0", "\0", "Ω 🙂 \ud800"]


@dataclass
class Opened:
    file: WindowFile
    pool: BiLayerPool
    manager: CacheManager

    @property
    def index(self) -> RadixCache:
        return self.manager.index


@pytest.fixture
def start(tmp_path):
    """Open the folder, as a process that starts does; what a test leaves open is closed."""
    files = []

    def start(
        *, identity: str = "model and landmarks", path: Path = tmp_path / "made" / "windows", **changes
    ) -> Opened:
        sizes = {**SIZES, **changes}
        file = WindowFile(path, identity=identity, **sizes)
        files.append(file)
        pool = BiLayerPool(storage=file.storage, **sizes)
        return Opened(file, pool, CacheManager(pool, RadixCache(page_size=sizes["shape"].window)))

    yield start
    for file in files:
        file.close()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "made" / "windows"


def ids_of(*windows: int) -> IntArray:
    return (np.array(windows)[:, None] * WINDOW + np.arange(WINDOW)).reshape(-1)


def noise(pool: BiLayerPool, count: int) -> torch.Tensor:
    return torch.randn(pool.k.shape[0], count, *pool.k.shape[2:]).to(pool.k.dtype)


def store(opened: Opened, ids: IntArray, *, keep: int | None = None, **where: str) -> IntArray:
    """Encode windows of a thread, with states that nobody else has; return their slots."""
    pool, manager = opened.pool, opened.manager
    lease = manager.lease(ids, **where)
    slots = manager.append(lease, ids[lease.num_cached :])
    rows = pool.landmark_rows(slots)
    pool.write(slots, noise(pool, len(slots)), noise(pool, len(slots)))
    pool.write_landmarks(rows, noise(pool, len(rows)), noise(pool, len(rows)))
    slots = lease.slots.copy()
    manager.release(lease, keep=keep)
    return slots


def retract(opened: Opened, ids: IntArray, first: int, last: int, *, keeps_old: bool = False) -> IntArray:
    """Hide a span behind tombstones; with `keeps_old` a running thread goes on with the path as it was."""
    lease = opened.manager.lease(ids)
    if not keeps_old:
        opened.manager.release(lease)
    new_ids = ids.copy()
    new_ids[first:last] = tombstone_ids(ids[first:last], "mask", f"{first}")
    with opened.manager.open_edit(ids, start=first) as edit:
        edit.hide(first, last)
        edit.commit(new_ids)
    opened.manager.release(lease)
    return new_ids


def fill(opened: Opened) -> None:
    """Forks, namespaces, a steered path beside the old one, a window that is hidden as a whole."""
    store(opened, ids_of(0, 1, 2))
    store(opened, ids_of(0, 1, 3))
    for extra_key in KEYS[1:]:
        store(opened, ids_of(0), extra_key=extra_key)
    retract(opened, ids_of(0, 1, 2), 5, 7, keeps_old=True)
    store(opened, ids_of(8, 9, 10))
    retract(opened, ids_of(8, 9, 10), 3, 9)


def contents(opened: Opened) -> dict:
    """Every path with its slots, and the states of both layers that can be reached through it."""
    found = {}
    for extra_key, ids, slots in opened.index.paths():
        assert np.array_equal(opened.index.match_prefix(ids, extra_key=extra_key).slots, slots)
        rows = opened.pool.landmark_rows(slots)
        states = [*opened.pool.read(slots[slots != NO_SLOT]), *opened.pool.read_landmarks(rows)]
        found[extra_key, tuple(ids.tolist())] = (slots.tolist(), [(s.dtype, s.tolist()) for s in states])
    return found


def num_slots(opened: Opened) -> int:
    held = opened.index.held_slots()
    return len(np.unique(held[held != NO_SLOT]))


def holds_anything(folder: Path) -> bool:
    return (folder / "l2.bin").read_bytes().strip(b"\0") != b""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def saved(start, write=fill, **changes) -> Opened:
    """A process that has written, saved and ended."""
    opened = start(**changes)
    write(opened)
    opened.file.save(opened.manager)
    opened.file.close()
    return opened


# -- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_that_was_indexed_comes_back(start, folder, dtype):
    before = start(dtype=dtype)
    fill(before)
    expected, refcounts, count = contents(before), before.pool.refcounts.copy(), num_slots(before)
    assert {key for key, _ in expected} == set(KEYS) and refcounts.max() == 2
    assert any(min(ids) < 0 for _, ids in expected) and any(NO_SLOT in slots for slots, _ in expected.values())
    before.file.save(before.manager)
    before.file.close()
    after = start(dtype=dtype)
    assert after.file.restore(after.manager) == count > 0
    after.manager.check_integrity()
    assert contents(after) == expected
    assert after.pool.refcounts.tolist() == refcounts.tolist()
    assert names(folder) == {"header.json", "lock", "l2.bin"}, "a saved index must not outlive its first reader"


def test_what_came_back_is_an_ordinary_cache(start):
    """It is extended, retracted from, saved again, and in the end given back without a trace."""
    saved(start)
    second = start()
    second.file.restore(second.manager)
    store(second, ids_of(0, 1, 2, 5))
    retract(second, ids_of(0, 1, 3), 9, 10)
    second.manager.check_integrity()
    expected = contents(second)
    second.file.save(second.manager)
    second.file.close()
    third = start()
    third.file.restore(third.manager)
    assert contents(third) == expected
    third.manager.free(third.manager.pages_of(third.index.evict(1000)))
    third.manager.check_integrity()
    assert third.manager.pages_in_use() == 0
    assert not any(x.any() for x in (third.pool.k, third.pool.v, third.pool.landmark_k, third.pool.landmark_v))


def test_the_order_of_eviction_comes_back(start):
    def write(opened):
        for name in (3, 2, 1):
            store(opened, ids_of(name))
        opened.manager.match(ids_of(3))

    saved(start, write)
    after = start()
    after.file.restore(after.manager)
    name_of = {tuple(slots): ids[0] // WINDOW for _, ids, slots in after.index.paths()}
    order = [name_of[tuple(after.index.evict(1))] for _ in range(3)]
    assert order == [2, 1, 3]


def test_an_empty_cache_can_be_saved(start):
    saved(start, lambda opened: None)
    after = start()
    assert after.file.restore(after.manager) == 0
    store(after, ids_of(1))
    after.manager.check_integrity()


def test_it_comes_back_once(start):
    saved(start)
    start().file.close()  # opening alone takes nothing away
    after = start()
    assert after.file.restore(after.manager) > 0
    after.manager.free(after.manager.pages_of(after.index.evict(1000)))
    assert after.file.restore(after.manager) == 0 and not list(after.index.paths())


def test_only_an_empty_cache_on_this_storage_is_filled(start):
    saved(start)
    after = start()
    other = BiLayerPool(**SIZES)
    for wrong in (other, PagedKVPool(num_layers=2, num_kv_heads=1, head_dim=4, num_pages=16, page_size=WINDOW)):
        with pytest.raises(ValueError, match="with the storage and the shape of this window file"):
            after.file.restore(CacheManager(wrong, RadixCache(page_size=WINDOW)))
    lease = after.manager.lease(ids_of(7))
    after.manager.append(lease, ids_of(7))
    with pytest.raises(ValueError, match="only into an empty cache"):
        after.file.restore(after.manager)
    after.manager.release(lease, keep=0)
    after.index.insert(ids_of(-7), np.full(WINDOW, NO_SLOT))
    with pytest.raises(ValueError, match="only into an empty cache"):
        after.file.restore(after.manager)
    after.index.evict(1)
    assert after.file.restore(after.manager) > 0, "a refusal loses nothing"


# -- what must not come back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.5, -0.0], ids=["a number", "a negative zero"])
def test_what_no_path_reaches_is_zero_in_the_file(start, folder, value):
    """States of free windows, of running threads, and behind tombstones in windows that others shared."""
    before = start()
    fill(before)
    lease = before.manager.lease(ids_of(0, 12))
    running = before.manager.append(lease, ids_of(12))
    free = before.pool.slots_of(np.flatnonzero(before.pool.refcounts == 0))
    held = before.index.held_slots()
    behind = np.setdiff1d(before.pool.slots_of(before.manager.pages_of(held)), held)
    expected = contents(before)
    for slots in (running, free, behind):
        assert len(slots)
        states = torch.full((2, len(slots), 1, 4), value)
        before.pool.write(slots, states, states)
    before.file.save(before.manager)
    before.file.close()
    after = start()
    after.file.restore(after.manager)
    flat = np.fromfile(folder / "l2.bin", dtype=np.int32).reshape(2, 2, -1, 4)
    unreached = np.concatenate([running, free, behind])
    assert not flat[:, :, unreached].any()
    assert flat[:, :, np.setdiff1d(held, [NO_SLOT])].any(axis=3).all()
    assert contents(after) == expected


def test_text_behind_a_tombstone_is_gone_when_its_last_reader_is(start, folder):
    """The window was shared when the span was hidden in it, so nobody could zero it then."""
    before = start()
    slots = store(before, ids_of(0, 1))
    steered = retract(before, ids_of(0, 1), 5, 7, keeps_old=True)
    before.manager.purge(ids_of(0, 1), 5)
    before.file.save(before.manager)
    before.file.close()
    after = start()
    after.file.restore(after.manager)
    assert [ids.tolist() for _, ids, _ in after.index.paths()] == [steered.tolist()]
    assert not after.pool.k[:, slots[5:7]].any() and not after.pool.v[:, slots[5:7]].any()
    assert after.pool.k[:, slots[4]].any()


PROCESS = """
import os, sys, torch
from kv_retract.cache.bilayer import BiLayerPool, WindowShape
from kv_retract.cache.manager import CacheManager
from kv_retract.cache.radix import RadixCache
from kv_retract.cache.window_file import WindowFile
from kv_retract.errors import WindowFileError
sizes = dict(num_layers=2, num_kv_heads=1, head_dim=4, num_windows=16, shape=WindowShape(window=4, ratio=2),
             dtype=torch.float32)
try:
    file = WindowFile(sys.argv[1], identity="model and landmarks", **sizes)
except WindowFileError as error:
    print(error)
    sys.exit(3)
pool = BiLayerPool(storage=file.storage, **sizes)
restored = file.restore(CacheManager(pool, RadixCache(page_size=4)))
pool.k[:, -8:] = 7
print(restored)
sys.stdout.flush()
os._exit(9)
"""


def run(folder: Path) -> tuple[int, str]:
    """A second process that opens the folder, restores, writes, and is killed."""
    done = subprocess.run([sys.executable, "-c", PROCESS, str(folder)], capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize("had_saved", [False, True])
def test_a_process_that_is_killed_leaves_nothing(start, folder, had_saved):
    """Neither what it wrote nor what it had from the process before it: that may have been retracted since."""
    count = num_slots(saved(start)) if had_saved else 0
    assert run(folder) == (9, str(count))
    assert holds_anything(folder)
    after = start()
    assert not holds_anything(folder), "zeroed when it is opened, before anybody asks"
    assert not after.file.storage[0].any()
    assert after.file.restore(after.manager) == 0
    assert not list(after.index.paths()) and after.manager.pages_in_use() == 0


def test_what_was_saved_before_the_last_write_is_not_restored(start, folder):
    begun = time.time_ns()
    opened = start()
    fill(opened)
    opened.file.save(opened.manager)
    assert int(np.load(folder / "index.npz")["written"]) < begun, "a write in the tick of the save must show"
    opened.file.storage[0][0, 0] += 1
    told = os.stat(folder / "l2.bin").st_mtime_ns
    opened.file.close()
    if told == int(np.load(folder / "index.npz")["written"]):
        pytest.skip("this file system does not tell when a mapped file was written to")
    after = start()
    assert after.file.restore(after.manager) == 0 and not holds_anything(folder)


@pytest.mark.parametrize("change", [lambda data: data + b"\0" * 16, lambda data: data[:-16]])
def test_another_l2_than_the_one_that_was_saved_is_not_used(start, folder, change):
    saved(start)
    place = folder / "l2.bin"
    times = place.stat()
    place.write_bytes(change(place.read_bytes()))
    os.utime(place, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = start()
    assert after.file.restore(after.manager) == 0 and not holds_anything(folder)
    assert place.stat().st_size == times.st_size


def test_a_draft_of_an_index_is_removed(start, folder):
    """It holds the ids of texts; the process died while it saved."""
    start().file.close()
    (folder / "index.npz.draft").write_bytes(b"half of it")
    start()
    assert names(folder) == {"header.json", "lock", "l2.bin"}


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
def test_of_a_truncated_index_nothing_is_restored(start, folder, part):
    saved(start)
    content = (folder / "index.npz").read_bytes()
    (folder / "index.npz").write_bytes(content[: int(part * len(content))])
    after = start()
    assert after.file.restore(after.manager) == 0
    assert not holds_anything(folder) and names(folder) == {"header.json", "lock", "l2.bin"}
    store(after, ids_of(1))
    after.manager.check_integrity()


def test_a_changed_byte_of_the_index_restores_all_or_nothing(start, folder, tmp_path):
    """Whichever byte it is: some say nothing, as the date of an entry."""
    before = start()
    fill(before)
    expected = contents(before)
    before.file.save(before.manager)
    before.file.close()
    size, outcomes = (folder / "index.npz").stat().st_size, []
    for at in range(5, size, size // 150):
        copy = tmp_path / f"{at}"
        shutil.copytree(folder, copy)  # keeps times
        with open(copy / "index.npz", "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0x41]))
        after = start(path=copy)
        after.file.restore(after.manager)
        after.manager.check_integrity()
        outcomes.append(contents(after))
        assert outcomes[-1] in ({}, expected), f"byte {at} of {size}"
        assert outcomes[-1] or not holds_anything(copy)
        after.file.close()
    assert outcomes.count({}) > 100


def test_slots_that_are_not_there_are_not_restored(start, folder):
    saved(start)
    arrays = dict(np.load(folder / "index.npz"))
    arrays["slots"][-1] = 16 * WINDOW
    np.savez(folder / "index.npz", **arrays)
    after = start()
    assert after.file.restore(after.manager) == 0 and not holds_anything(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", None], ids=["empty", "cut", "list", "binary", "missing"]
)
def test_a_damaged_header_is_refused_and_nothing_is_lost(start, folder, content):
    """It may be anybody's."""
    before = saved(start)
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    if content is None:
        (folder / "header.json").unlink()
    else:
        (folder / "header.json").write_bytes(content)
    with pytest.raises(WindowFileError, match="no header 'header.json' that can be read; name another path, or remove"):
        start()
    (folder / "header.json").write_bytes(kept["header.json"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    after = start()
    assert after.file.restore(after.manager) == num_slots(before)


# -- who is kept out --------------------------------------------------------------------------------------------------


def test_one_at_a_time(start, folder):
    first = start()
    store(first, ids_of(1))
    expected = contents(first)
    in_use = f"window file '{folder}' is in use; close the engine that uses it"
    with pytest.raises(WindowFileError, match=in_use):
        start()
    code, said = run(folder)
    assert code == 3 and said.startswith(in_use)
    assert contents(first) == expected and holds_anything(folder), "who is refused must not touch anything"
    first.file.close()
    first.file.close()
    second = start()
    first.file.close()
    with pytest.raises(WindowFileError, match="in use"):  # closing again must not let a third one in
        start()
    second.file.close()
    assert run(folder) == (9, "0")
    start()


def test_a_forked_child_does_not_keep_it_locked(start):
    first = start()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(write)
        os.read(read, 1)  # until the parent has looked
        os._exit(0)
    try:
        first.file.close()
        start()
    finally:
        os.close(write)
        os.waitpid(child, 0)
        os.close(read)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"identity": "another"}, "expected identity='another', got 'model and landmarks'"),
        ({"num_layers": 1}, "expected num_layers=1, got 2"),
        ({"num_kv_heads": 2}, "expected num_kv_heads=2, got 1"),
        ({"head_dim": 8}, "expected head_dim=8, got 4"),
        ({"num_windows": 15}, "expected num_windows=15, got 16"),
        ({"shape": WindowShape(window=8, ratio=2)}, "expected window=8, got 4"),
        ({"shape": WindowShape(window=4, ratio=4)}, "expected ratio=4, got 2"),
        ({"dtype": torch.bfloat16}, "expected dtype='bfloat16', got 'float32'"),
        ({"dtype": torch.float16, "identity": ""}, "expected identity='', got .*; expected dtype='float16', .*"),
    ],
)  # fmt: skip
def test_windows_of_another_kind_are_refused_and_kept(start, folder, change, difference):
    before = saved(start)
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(
        WindowFileError, match=f"'{folder}' is another one's: {difference}; name another path, or remove"
    ):
        start(**change)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    after = start()
    assert after.file.restore(after.manager) == num_slots(before)


def test_another_format_is_refused(start, folder):
    start().file.close()
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps({**header, "format": 2}))
    with pytest.raises(WindowFileError, match="expected format=1, got 2"):
        start()


def test_only_the_owner_may_read_it(start, folder):
    mask = os.umask(0)
    try:
        saved(start)
    finally:
        os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(
        ["header.json", "lock", "l2.bin", "index.npz"], 0o600
    )


def test_a_path_that_is_no_folder_is_refused(start, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WindowFileError, match="file' cannot be used: File exists; check that it is a folder"):
        start(path=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_closed_file_is_not_used(start):
    opened = start()
    opened.file.close()
    for use in (opened.file.save, opened.file.restore, lambda _: opened.file.storage):
        with pytest.raises(WindowFileError, match="is closed; open another one"):
            use(opened.manager)


# -- the disk ---------------------------------------------------------------------------------------------------------


def test_windows_take_room_as_they_are_written(start, folder):
    """Opening, restoring and zeroing write nothing where nothing was."""
    big = {"num_windows": 256, "shape": WindowShape(window=1024, ratio=16)}

    def taken():
        found = (folder / "l2.bin").stat()
        assert found.st_size == 2 * 2 * 256 * 1024 * 4 * 4
        return found.st_blocks * 512

    opened = start(**big)
    assert taken() < 64 * 1024
    opened.pool.alloc(200)
    slots = opened.pool.slots_of(opened.pool.alloc(1))
    opened.index.insert(slots, slots)
    opened.pool.write(slots, noise(opened.pool, 1024), noise(opened.pool, 1024))
    opened.file.save(opened.manager)
    opened.file.close()
    written = taken()
    assert 64 * 1024 <= written < 256 * 1024
    after = start(**big)
    assert after.file.restore(after.manager) == 1024
    after.file.save(after.manager)
    assert taken() == written
    (folder / "index.npz").unlink()
    after.file.close()
    start(**big)
    assert taken() < 64 * 1024, "what a process leaves that did not save is given back to the disk"


def test_more_windows_than_the_disk_can_hold_are_refused(start, folder):
    with pytest.raises(WindowFileError, match=r"may need \d+ more bytes and its disk has \d+ left; hold fewer windows"):
        start(num_windows=2**40)
    with pytest.raises(ValueError, match="at least 1"):
        start(num_windows=0, path=folder.parent / "empty")


def test_room_that_the_file_has_already_is_not_asked_for_again(start, monkeypatch):
    def write(opened):
        for name in range(SIZES["num_windows"]):
            store(opened, ids_of(name))

    saved(start, write)
    monkeypatch.setattr(os, "fstatvfs", lambda _: SimpleNamespace(f_bavail=0, f_frsize=4096))
    after = start()
    assert after.file.restore(after.manager) == SIZES["num_windows"] * WINDOW
    after.file.close()
    with pytest.raises(WindowFileError, match="may need 4096 more bytes and its disk has 0 left"):
        start()


@pytest.fixture
def calls(monkeypatch):
    """What is brought to the disk, in order, and the set of files at which the disk breaks."""
    calls, failing = [], set()
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        calls.append(f"sync {name}")
        if name in failing:
            raise OSError(5, "Input/output error")
        real_fsync(descriptor)

    def replace(source, target):
        calls.append(f"rename {Path(target).name}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return calls, failing


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not name descriptors")


@needs_proc
def test_the_index_is_written_when_l2_is_on_the_disk(start, calls):
    opened = start()
    fill(opened)
    opened.file.save(opened.manager)
    calls[0].clear()
    opened.file.save(opened.manager)
    assert calls[0] == [
        "sync windows", "sync l2.bin", "sync l2.bin", "sync index.npz.draft", "rename index.npz", "sync windows"
    ]  # fmt: skip


@needs_proc
@pytest.mark.parametrize("broken", ["l2.bin", "index.npz.draft"])
def test_a_disk_that_breaks_while_saving_leaves_nothing_half(start, folder, calls, broken):
    opened = start()
    fill(opened)
    opened.file.save(opened.manager)
    calls[1].add(broken)
    with pytest.raises(WindowFileError, match="cannot be used: Input/output error"):
        opened.file.save(opened.manager)
    calls[1].clear()
    assert names(folder) == {"header.json", "lock", "l2.bin"}
    opened.file.close()
    after = start()
    assert after.file.restore(after.manager) == 0 and not holds_anything(folder)


# -- claiming pages ---------------------------------------------------------------------------------------------------


def make_pool() -> PagedKVPool:
    return PagedKVPool(num_layers=1, num_kv_heads=1, head_dim=1, num_pages=4, page_size=2)


def test_claimed_pages_are_held_as_often_as_asked_and_not_handed_out():
    pool = make_pool()
    pool.claim(np.array([2, 0]), np.array([3, 1]))
    assert pool.refcounts.tolist() == [1, 0, 3, 0] and pool.num_free == 2
    pool.check_integrity()
    assert sorted(pool.alloc(2)) == [1, 3]
    assert pool.release(np.array([2, 2, 0])).tolist() == [0]
    assert pool.release(np.array([2])).tolist() == [2]
    pool.check_integrity()


@pytest.mark.parametrize(("pages", "counts"), [([1, 2], [1, 1]), ([0, 0], [1, 1]), ([0], [0]), ([-1], [1]), ([4], [1])])
def test_pages_that_cannot_be_claimed(pages, counts):
    pool = make_pool()
    pool.claim(np.array([2]), np.array([1]))
    with pytest.raises(CacheIntegrityError):
        pool.claim(np.array(pages), np.array(counts))
    assert pool.refcounts.tolist() == [0, 0, 1, 0]
    pool.check_integrity()
