"""A folder on the disk that holds the windows of long threads, so that they outlive the process.

L2 lies in a mapped file: what the pool writes is what the file holds, and the system decides what of it stays in
memory. The index and L1 are small and are written when the cache is saved. They are taken away when it is restored:
what is found without them is of a process that died, nobody can say which of its states had been retracted, and so
all of it is zeroed. KV is only cache: whatever is lost here is encoded again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..errors import WindowFileError
from .base import NO_SLOT, IntArray
from .bilayer import BiLayerPool, WindowShape
from .manager import CacheManager

_FORMAT = 1
_HEADER, _LOCK, _L2, _INDEX = "header.json", "lock", "l2.bin", "index.npz"
_DRAFT = ".draft"  # appended to the name of a file while it is written
_CHUNK = 1 << 16  # rows of L2 that are looked at together: their numbers take half a megabyte


@dataclass(frozen=True, slots=True, eq=False)
class _Saved:
    """What is kept beside L2: the paths of the index, and L1."""

    paths: list[tuple[str, IntArray, IntArray]]
    """Namespace, ids and slots, as `PrefixCache.paths` yields them."""
    rows: IntArray
    """Rows of L1 in use. Shape: (num_rows,)"""
    landmarks: tuple[torch.Tensor, torch.Tensor]
    """Their K and V. Shape of each: (num_layers, num_rows, num_kv_heads, head_dim)"""
    written: int
    """When L2 was written last, in nanoseconds, as its file system tells it."""

    @classmethod
    def of(cls, manager: CacheManager, pool: BiLayerPool, written: int) -> _Saved:
        """Gather it; copies."""
        rows = np.unique(pool.landmark_rows(manager.index.held_slots()))
        k, v = pool.read_landmarks(rows)
        return cls(list(manager.index.paths()), rows, (k.cpu(), v.cpu()), written)

    def write(self, file: IO[bytes]) -> None:
        """Write an archive of numpy arrays: each has a checksum there."""
        keys = json.dumps([extra_key for extra_key, _, _ in self.paths])  # an array would strip a NUL at its end
        none: IntArray = np.empty(0, dtype=np.int64)
        k, v = (part.contiguous().view(torch.uint8).numpy() for part in self.landmarks)  # numpy has no bfloat16
        np.savez(
            file, written=np.array(self.written), rows=self.rows, k=k, v=v,
            keys=np.frombuffer(keys.encode(), dtype=np.uint8),
            lengths=np.array([len(ids) for _, ids, _ in self.paths], dtype=np.int64),
            ids=np.concatenate([none, *(ids for _, ids, _ in self.paths)]),
            slots=np.concatenate([none, *(slots for _, _, slots in self.paths)]),
        )  # fmt: skip

    @classmethod
    def read(cls, file: IO[bytes], dtype: torch.dtype) -> _Saved:
        """Read it. Raises an exception of any kind where the file is damaged."""
        with np.load(file, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
        keys, ends = json.loads(found["keys"].tobytes()), np.cumsum(found["lengths"])[:-1]
        ids, slots = (np.split(found[name], ends) if keys else [] for name in ("ids", "slots"))
        k, v = (torch.from_numpy(found[name]).view(dtype) for name in ("k", "v"))
        return cls(list(zip(keys, ids, slots, strict=True)), found["rows"], (k, v), int(found["written"]))


class WindowFile:
    """The storage of a `BiLayerPool` on a local disk, for one process at a time.

    Open it, make the pool with its `storage` and a manager with the pool, and `restore` before anything is written; at
    the end `save` and `close`. The file is sparse: it takes room on the disk as windows are written, and a process that
    writes to it when the disk is full ends with SIGBUS. Not thread-safe by itself.

    Args:
        path: a folder of its own, made where there is none; only its owner may read it.
        num_layers, num_kv_heads, head_dim, num_windows, shape, dtype: as in `BiLayerPool`.
        identity: names the model and the landmarks that the states come from; those of others mean nothing to them.

    Raises:
        WindowFileError: the folder was made for another identity or other sizes, its header is damaged, somebody uses
            it, it cannot be read or written, or the disk has no room for so many windows. What was saved stays.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_windows: int,
        shape: WindowShape,
        dtype: torch.dtype,
        identity: str,
    ) -> None:
        self.path = Path(path)
        self._shape, self._dtype, self._num_slots = shape, dtype, num_windows * shape.window
        self._header = {
            "format": _FORMAT, "identity": identity, "num_layers": num_layers, "num_kv_heads": num_kv_heads,
            "head_dim": head_dim, "num_windows": num_windows, "window": shape.window, "ratio": shape.ratio,
            "dtype": str(dtype).removeprefix("torch."),
        }  # fmt: skip
        size = (2, num_layers, self._num_slots, num_kv_heads, head_dim)
        if min(size) < 1:
            raise ValueError(f"every size of a window file must be at least 1, got {self._header}")
        self._num_bytes = int(np.prod(size, dtype=object)) * dtype.itemsize
        with _naming(self.path), ExitStack() as opened:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock(opened)
            self._check_header()
            self._l2 = _open(self.path / _L2, opened)
            self._saved = self._read_index()
            if self._saved is None:
                self._forget()
                os.ftruncate(self._l2, 0)
            self._check_room()
            if self._saved is None:
                os.ftruncate(self._l2, self._num_bytes)
            num_elements = self._num_bytes // dtype.itemsize
            self._mapped: torch.Tensor | None = torch.from_file(
                str(self.path / _L2), shared=True, size=num_elements, dtype=dtype, device="cpu"
            ).view(size)
            self._opened = opened.pop_all()

    @property
    def storage(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of L2, for `BiLayerPool(storage=...)`; not to be used after `close`.

        Shape of each: (num_layers, num_windows * window, num_kv_heads, head_dim)
        """
        if self._mapped is None:
            raise WindowFileError(f"window file {str(self.path)!r} is closed; open another one")
        return self._mapped[0], self._mapped[1]

    def restore(self, manager: CacheManager) -> int:
        """Fill an empty manager with what was saved, once; zero what is not part of it; then nothing is saved any more.

        What was saved is gone if the process dies before it saves again. A saved index that is damaged, or older than
        the last write to L2, counts as none.

        Returns:
            How many tokens have their KV again.

        Raises:
            ValueError: the manager is not empty, or its pool does not use this storage.
            WindowFileError: the file is closed or cannot be written.
        """
        pool = self._pool(manager)
        if manager.pages_in_use() or next(manager.index.paths(), None) is not None:
            raise ValueError("what was saved can be restored only into an empty cache; do so before its first thread")
        saved, self._saved = self._saved, None
        if saved is None:
            return 0
        with _naming(self.path):
            self._forget()
            for extra_key, ids, slots in saved.paths:
                manager.index.insert(ids, slots, extra_key=extra_key)
            held = manager.index.held_slots()
            pool.claim(*np.unique(manager.pages_of(held), return_counts=True))
            visible = np.unique(held[held != NO_SLOT])
            self._zero_all_but(visible)
        pool.write_landmarks(saved.rows, *saved.landmarks)
        return len(visible)

    def save(self, manager: CacheManager) -> None:
        """Write everything that the index of a manager holds; it is on the disk when the call returns.

        The last thing to do with the manager: what is saved describes L2 as it is now. Most file systems tell whether
        it was written to afterwards, and then nothing is restored; one in memory (tmpfs) does not.

        Raises:
            ValueError: the manager's pool does not use this storage.
            WindowFileError: the file is closed or cannot be written; then nothing counts as saved.
        """
        pool = self._pool(manager)
        with _naming(self.path):
            self._saved = None
            self._forget()
            _flush(self._l2)
            # A second back, since file systems count in ticks: a write in the tick of this call would not show.
            written = time.time_ns() - 1_000_000_000
            os.utime(self._l2, ns=(written, written))
            os.fsync(self._l2)
            saved = _Saved.of(manager, pool, os.fstat(self._l2).st_mtime_ns)
            _write(self.path / _INDEX, saved.write)

    def close(self) -> None:
        """Let others use the folder; idempotent. What was not saved is zeroed when it is opened again."""
        self._mapped = None
        self._opened.close()

    def _pool(self, manager: CacheManager) -> BiLayerPool:
        k, v = self.storage
        pool = manager.pool
        same = (pool.k.data_ptr(), pool.v.data_ptr()) == (k.data_ptr(), v.data_ptr())
        if not isinstance(pool, BiLayerPool) or pool.shape != self._shape or not same:
            raise ValueError("expected the manager of a BiLayerPool with the storage and the shape of this window file")
        return pool

    def _lock(self, opened: ExitStack) -> None:
        descriptor = _open(self.path / _LOCK, opened)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WindowFileError(
                f"window file {str(self.path)!r} is in use; close the engine that uses it, in this process or another, "
                "or name another path"
            ) from None
        # Closing would not do: a child that was forked meanwhile holds the same lock.
        opened.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)

    def _check_header(self) -> None:
        """Compare with the header of the folder, or write one where the folder is new."""
        place, remedy = self.path / _HEADER, "name another path, or remove the folder: what it holds can be made again"
        if not place.exists() and not (self.path / _L2).exists():
            _write(place, lambda file: file.write(json.dumps(self._header, indent=1).encode()))
        try:
            found = json.loads(place.read_bytes())
            differing = [name for name in self._header if found.get(name) != self._header[name]]
        except (FileNotFoundError, ValueError, AttributeError):
            raise WindowFileError(
                f"window file {str(self.path)!r} has no header {_HEADER!r} that can be read; {remedy}"
            ) from None
        if differing:
            differences = (f"expected {name}={self._header[name]!r}, got {found.get(name)!r}" for name in differing)
            raise WindowFileError(
                f"window file {str(self.path)!r} is another one's: {'; '.join(differences)}; {remedy}"
            )

    def _check_room(self) -> None:
        """Writing to a mapped file on a full disk ends the process, so that must not happen for want of room."""
        file, disk = os.fstat(self._l2), os.fstatvfs(self._l2)
        missing, free = self._num_bytes - file.st_blocks * 512, disk.f_bavail * disk.f_frsize
        if missing > free:
            raise WindowFileError(
                f"window file {str(self.path)!r} may need {missing} more bytes and its disk has {free} left; hold "
                "fewer windows, or name a path on another disk"
            )

    def _read_index(self) -> _Saved | None:
        """Return what was saved; None where nothing was, or nothing that describes L2."""
        try:
            file = open(self.path / _INDEX, "rb")
        except FileNotFoundError:
            return None
        l2 = os.fstat(self._l2)
        with file:
            try:
                saved = _Saved.read(file, self._dtype)
                # Whatever passes its checksum and is wrong nevertheless must not name a slot that is not there.
                fits = all(
                    len(a) == len(b) and np.all((b >= NO_SLOT) & (b < self._num_slots)) for _, a, b in saved.paths
                )
            except Exception:  # a damaged archive fails in more ways than numpy documents
                return None
        return saved if fits and l2.st_size == self._num_bytes and l2.st_mtime_ns == saved.written else None

    def _forget(self) -> None:
        """Take the saved index away, and what is left of one that was not finished: both hold text."""
        for name in (_INDEX, _INDEX + _DRAFT):
            (self.path / name).unlink(missing_ok=True)
        _sync_folder(self.path)

    def _zero_all_but(self, slots: IntArray) -> None:
        """Zero the other slots where the file holds anything; elsewhere that would only make it grow."""
        assert self._mapped is not None, "only an open file is zeroed"
        stale = np.ones(self._num_slots, dtype=np.bool_)
        stale[slots] = False
        flat = self._mapped.flatten(0, 2).flatten(1)  # a row is K or V of one slot in one layer
        size = flat[0].nbytes
        for start, end in _written(self._l2, self._num_bytes):
            last = -(-end // size)
            for first in range(start // size, last, _CHUNK):
                rows = np.arange(first, min(first + _CHUNK, last))
                flat.index_fill_(0, torch.from_numpy(rows[stale[rows % self._num_slots]]), 0)


def _open(path: Path, opened: ExitStack) -> int:
    """Open a file for reading and writing, made where there is none; closed with the stack."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    opened.callback(os.close, descriptor)
    return descriptor


def _flush(descriptor: int) -> None:
    """Bring what was written through any mapping of a file to the disk.

    On Linux `fsync` does; POSIX promises it of `msync` alone, which torch does not offer: hence a second mapping, since
    it works on the pages of the file, whoever mapped them.
    """
    with mmap.mmap(descriptor, 0) as mapped:
        mapped.flush()
    os.fsync(descriptor)


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file under another name and rename it: nobody ever finds half of one. Raises OSError."""
    draft = path.with_name(path.name + _DRAFT)
    try:
        with os.fdopen(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "r+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _written(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a sparse file that are not holes, in bytes; all of it where the system cannot tell."""
    if not hasattr(os, "SEEK_DATA"):
        yield 0, size
        return
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # that is: nothing but a hole from here on
                raise
            return
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn an OSError into a WindowFileError that names the folder."""
    try:
        yield
    except OSError as error:
        raise WindowFileError(
            f"window file {str(path)!r} cannot be used: {error.strerror or error}; check that it is a folder whose "
            "files can be read and written, and that the disk is not full"
        ) from error
