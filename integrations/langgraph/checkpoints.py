"""Purging checkpoints: older ones still hold what a redaction took out of the newest state."""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from kv_retract.errors import UnsupportedError

_DELTA = "counters_since_delta_snapshot"
"""Key in the metadata of checkpoints whose channels are kept by their differences."""
_NEWEST = """
    SELECT checkpoint_ns, MAX(checkpoint_id) FROM checkpoints WHERE thread_id = :thread GROUP BY checkpoint_ns
    HAVING instr(checkpoint_ns, ':') = 0 OR MAX(checkpoint_id) > coalesce(
        (SELECT MAX(checkpoint_id) FROM checkpoints WHERE thread_id = :thread AND checkpoint_ns = ''), '')
"""
"""`_kept` in SQL."""


def purge_checkpoints(checkpointer: BaseCheckpointSaver[Any], *thread_ids: str) -> int:
    """Delete all checkpoints of threads but the newest, from which they go on; return how many were deleted.

    What a thread needs to go on is kept: its newest checkpoint with its pending writes, interrupts among them, and the
    newest one of each subgraph that is under way or has a memory of its own. There is no way back to older ones.

    Call it while no run of these threads is at work. What the newest checkpoint holds is not looked at: redact first
    (`KVRetractMiddleware(session, redact=True)`), and let the thread take a step.

    Deleted rows leave their bytes in an SQLite file and in its write-ahead log. So the file is written anew (`VACUUM`:
    that takes time and disk space for all of it, and other writers wait), and the log is emptied. Copies are out of
    reach: backups, snapshots and freed blocks of the disk, traces, the store, other threads.

    Args:
        checkpointer: `InMemorySaver`, `SqliteSaver`, or one that implements `prune`.
        *thread_ids: one that is unknown has nothing to delete.

    Raises:
        UnsupportedError: the checkpointer cannot do it, or a thread's graph keeps channels by their differences
            (`DeltaChannel`). Nothing was deleted then, but for what `prune` itself deletes.
        sqlite3.OperationalError: another connection is using the file. Call again when it is done.
    """
    if type(checkpointer).prune is not BaseCheckpointSaver.prune:
        before = [found for id in thread_ids for found in checkpointer.list(_thread(id))]
        checkpointer.prune(thread_ids, strategy="keep_latest")
        return _pruned(before, [found for id in thread_ids for found in checkpointer.list(_thread(id))])
    if isinstance(checkpointer, InMemorySaver):
        return _purge_memory(checkpointer, thread_ids)
    if not isinstance(checkpointer, SqliteSaver):
        _refuse(checkpointer)
    with checkpointer.cursor(transaction=False) as cursor:
        script, rows = _script(thread_ids), None
        try:
            while True:
                rows = cursor.execute(*script.send(rows)).fetchall()
        except StopIteration as done:
            return int(done.value)
        except BaseException:
            checkpointer.conn.rollback()
            raise


async def apurge_checkpoints(checkpointer: BaseCheckpointSaver[Any], *thread_ids: str) -> int:
    """As `purge_checkpoints`, for `AsyncSqliteSaver`, `InMemorySaver`, or one that implements `aprune`."""
    if type(checkpointer).aprune is not BaseCheckpointSaver.aprune:
        before = [found for id in thread_ids async for found in checkpointer.alist(_thread(id))]
        await checkpointer.aprune(thread_ids, strategy="keep_latest")
        return _pruned(before, [found for id in thread_ids async for found in checkpointer.alist(_thread(id))])
    if isinstance(checkpointer, InMemorySaver):
        return _purge_memory(checkpointer, thread_ids)
    if not isinstance(checkpointer, AsyncSqliteSaver):
        _refuse(checkpointer)
    await checkpointer.setup()
    async with checkpointer.lock, checkpointer.conn.cursor() as cursor:
        script, rows = _script(thread_ids), None
        try:
            while True:
                await cursor.execute(*script.send(rows))
                rows = list(await cursor.fetchall())
        except StopIteration as done:
            return int(done.value)
        except BaseException:
            await checkpointer.conn.rollback()
            raise


def _kept(newest: Mapping[str, str]) -> dict[str, str]:
    """Return the checkpoint to keep by namespace, of the newest ones.

    The namespace of a subgraph's run ends in `:` and the id of its task. It is under way where it has saved something
    since its thread's newest checkpoint; else the thread has gone on without it. Ids of checkpoints grow with time.
    """
    return {ns: id for ns, id in newest.items() if ":" not in ns or id > newest.get("", "")}


def _script(thread_ids: Sequence[str]) -> Generator[tuple[str, Mapping[str, str]], Sequence[Any] | None, int]:
    """Yield SQL statements, each answered by its rows; return how many checkpoints were deleted."""
    deleted = 0
    yield "BEGIN IMMEDIATE", {}
    for id in map(str, thread_ids):
        thread = {"thread": id}
        delta = yield (
            f"SELECT 1 FROM checkpoints WHERE thread_id = :thread AND instr(CAST(metadata AS TEXT), '{_DELTA}')",
            thread,
        )
        if delta:
            _refuse_delta(id)
        yield (
            f"DELETE FROM checkpoints WHERE thread_id = :thread AND (checkpoint_ns, checkpoint_id) NOT IN ({_NEWEST})",
            thread,
        )
        rows = yield "SELECT changes()", {}
        assert rows is not None, "every statement is answered"
        deleted += rows[0][0]
        yield (
            "DELETE FROM writes WHERE thread_id = :thread AND (checkpoint_ns, checkpoint_id) NOT IN "
            "(SELECT checkpoint_ns, checkpoint_id FROM checkpoints WHERE thread_id = :thread)",
            thread,
        )
        yield "UPDATE checkpoints SET parent_checkpoint_id = NULL WHERE thread_id = :thread", thread
    yield "COMMIT", {}
    yield "VACUUM", {}
    busy = yield "PRAGMA wal_checkpoint(TRUNCATE)", {}
    if busy and busy[0][0]:
        raise sqlite3.OperationalError(
            "the checkpoints are purged, but the write-ahead log still holds them, since another connection reads the "
            "file; close that one and purge again"
        )
    return deleted


def _purge_memory(saver: InMemorySaver, thread_ids: Iterable[str]) -> int:
    threads = [thread for thread in saver.storage if str(thread) in set(map(str, thread_ids))]
    for thread in threads:
        for namespace in saver.storage[thread].values():
            if any(_DELTA in saver.serde.loads_typed(metadata) for _, metadata, _ in namespace.values()):
                _refuse_delta(str(thread))
    return sum(_purge_thread(saver, thread) for thread in threads)


def _purge_thread(saver: InMemorySaver, thread: str) -> int:
    namespaces = saver.storage[thread]
    before = sum(map(len, namespaces.values()))
    kept = _kept({ns: max(found) for ns, found in namespaces.items() if found})
    values = set()
    for ns in list(namespaces):
        if ns not in kept:
            del namespaces[ns]
            continue
        checkpoint, metadata, _ = namespaces[ns][kept[ns]]
        namespaces[ns] = {kept[ns]: (checkpoint, metadata, None)}
        values |= {(ns, *item) for item in saver.serde.loads_typed(checkpoint)["channel_versions"].items()}
    for writes in [key for key in saver.writes if key[0] == thread and kept.get(key[1]) != key[2]]:
        del saver.writes[writes]
    for value in [key for key in saver.blobs if key[0] == thread and key[1:] not in values]:
        del saver.blobs[value]
    return before - len(kept)


def _pruned(before: Sequence[CheckpointTuple], after: Sequence[CheckpointTuple]) -> int:
    """Return how many are gone; refuse where the checkpointer keeps what subgraphs left that have ended."""
    newest: dict[str, dict[str, str]] = {}
    for found in after:
        at = found.config["configurable"]
        thread = newest.setdefault(str(at["thread_id"]), {})
        thread[at["checkpoint_ns"]] = max(at["checkpoint_id"], thread.get(at["checkpoint_ns"], ""))
    for thread_id, namespaces in newest.items():
        if ended := sorted(namespaces.keys() - _kept(namespaces).keys()):
            raise UnsupportedError(
                f"the checkpointer's own prune keeps checkpoints of {len(ended)} subgraphs of thread {thread_id!r} "
                f"that have ended, of {ended[0]!r} for one; delete these namespaces in its storage"
            )
    return len(before) - len(after)


def _thread(thread_id: str) -> Any:
    return {"configurable": {"thread_id": thread_id}}


def _refuse(checkpointer: BaseCheckpointSaver[Any]) -> NoReturn:
    raise UnsupportedError(
        f"expected an InMemorySaver, a SqliteSaver (AsyncSqliteSaver: apurge_checkpoints) or a checkpointer that "
        f"implements prune, got {type(checkpointer).__name__}; delete older checkpoints in its own storage, or copy "
        "the newest state to a new thread and call delete_thread"
    )


def _refuse_delta(thread_id: str) -> NoReturn:
    raise UnsupportedError(
        f"thread {thread_id!r} keeps channels by their differences (DeltaChannel), so that its newest checkpoint needs "
        "older ones; copy the newest state to a new thread and call delete_thread"
    )
