"""What a scheduler does when it is asked: edits for clients that keep their own ledger, span retractions for others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from pydantic import BaseModel

from kv_retract.cache.base import IntArray, ThreadKey
from kv_retract.errors import KVRetractError
from kv_retract.types import Interval

from . import api
from .cache import Namespace
from .editor import PathEditor
from .peers import EDIT_S, Peers
from .records import SpanLedger, SpanRecord, entry_of, key_of, new_records, standing
from .refusal import Refused

log = logging.getLogger(__name__)

BODIES: Mapping[str, type[BaseModel]] = {
    "match": api.MatchRequest,
    "edit": api.EditRequest,
    "drop": api.DropRequest,
    "retract": api.RetractRequest,
    "undo": api.ChangeRequest,
    "heal": api.ChangeRequest,
    "status": api.StatusRequest,
    "changes": api.ChangesRequest,
}
"""Operation to its body; each has a method of `SpanService`."""
_KEEPS_OUTDATED = {"retract", "status", "changes"}
"""Operations that do not forget an outdated thread."""


@dataclass(slots=True)
class _Outdated:
    """A thread whose cache has read what another replica took back.

    It is forgotten when it is asked for, or when its time is over. Until then the replica that took the spans back may
    tell this one of them itself, with the text, and the cache is edited instead.
    """

    until: float
    """By the monotonic clock, in seconds."""
    retraction_ids: set[str] = field(default_factory=set)


class SpanService:
    """Operations on one scheduler's cache. Not safe for threads: the scheduler calls it between batches.

    Args:
        editor: of the scheduler's cache.
        ledger: of span retractions.
        model: what `status` says of the served model.
        is_busy: tells of a namespace whether a request of it runs or waits.
        peers: other replicas; None: there are none.
    """

    def __init__(
        self,
        editor: PathEditor,
        ledger: SpanLedger,
        model: Mapping[str, Any],
        is_busy: Callable[[str], bool],
        peers: Peers | None = None,
    ) -> None:
        self.editor, self.ledger, self.peers = editor, ledger, peers
        self._model, self._is_busy = dict(model), is_busy
        self._outdated: dict[str, _Outdated] = {}

    def run(self, operation: str, body: str) -> BaseModel:
        """Run an operation; what went wrong comes back as an `api.Refusal`."""
        try:
            request = BODIES[operation].model_validate_json(body)
            self.catch_up(None if operation in _KEEPS_OUTDATED else getattr(request, "extra_key", None))
            answer: BaseModel = getattr(self, operation)(request)
            return answer
        except Refused as error:
            return api.Refusal(error=error.reason, message=str(error))  # type: ignore[arg-type]
        except (KVRetractError, ValueError) as error:
            return api.Refusal(error="bad_request", message=str(error))
        except Exception as error:
            log.exception("kv_retract: %s failed", operation)
            return api.Refusal(error="failed", message=f"{type(error).__name__}: {error}")

    # -- edits ------------------------------------------------------------------------------------------------------

    def match(self, body: api.MatchRequest) -> api.MatchAnswer:
        """Return how much of a key is cached."""
        return api.MatchAnswer(num_cached=len(self.editor.cache.locate(body.token_ids, _namespace(body)).slots))

    def edit(self, body: api.EditRequest) -> api.EditAnswer:
        """Edit a path for a client that keeps the ledger; other threads that share it keep it."""
        if body.eraser == "recompute":
            raise Refused("bad_request", "recompute leaves the spans out of the key: use drop, and send the new key")
        spans = _checked(body)
        return self.editor.edit(
            body.token_ids, spans, body.new_token_ids, _namespace(body), steer=body.eraser == "kveraser"
        )

    def drop(self, body: api.DropRequest) -> api.DropAnswer:
        """Forget a tail."""
        freed = self.editor.drop(body.token_ids, body.start, _namespace(body), branches=body.branches)
        return api.DropAnswer(slots_freed=freed)

    # -- span retractions -------------------------------------------------------------------------------------------

    def retract(self, body: api.RetractRequest) -> api.RetractAnswer:
        """Take spans back: first in the ledger, then in the cache."""
        if self._is_busy(body.extra_key):
            raise Refused("busy", f"a request of thread {body.extra_key!r} runs or waits; finish it, then try again")
        steering = self.editor.steering
        steered = body.guarantee == "steered" and body.eraser != "recompute"
        if steered and body.eraser == "kveraser" and steering is None:
            raise Refused("unsupported", "the server was started without an eraser; use eraser='recompute'")
        assert body.token_ids is not None, "messages are rendered before they come here"
        ids = np.array(body.token_ids, dtype=np.int64)
        if np.any(ids < 0):
            raise Refused("bad_request", "expected the original token ids, got tombstones among them; use edit")
        learned = steered and body.eraser == "kveraser"
        template = SpanRecord(
            retraction_id="", extra_key=body.extra_key, start=0, end=0, digest="",
            state="steered" if steered else "exact", eraser=body.eraser,
            eraser_id=steering.eraser_id if learned and steering else body.eraser,
            shared=bool(learned and steering and steering.suffix_free), policy=body.policy, reason=body.reason,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        spans = [(span.start, span.end) for span in body.spans if isinstance(span, api.Interval)]
        known, adopted = self._known(ids, spans, template)
        made = [r if r in known else self.ledger.again(r, adopted) for r in new_records(ids, spans, known, template)]
        new = [record for record in made if record not in known]
        before, exact = self.resolve(ids, known, Namespace(body.extra_key))
        num_cached = len(self.editor.cache.locate(before.ids.tolist(), Namespace(body.extra_key)).slots)
        # A stronger guarantee also changes what was steered before: the steered path has read it.
        changed = [record for record in made if record in new or not steered and record.state == "steered"]
        self.ledger.put(new)
        try:
            edited = self._apply(ids, known, exact, before, changed, steered=steered) if changed else api.EditAnswer()
        except BaseException:
            # What is refused has not happened here; at another replica it has.
            self.ledger.put([adopted.get(r.retraction_id) or replace(r, state="revoked") for r in new])
            raise
        if adopted:
            del self._outdated[body.extra_key]
        states = {record.retraction_id: record for record in self.ledger.records(body.extra_key)}
        return api.RetractAnswer(
            retractions=[_retraction(states[record.retraction_id]) for record in made],
            edit=edited,
            num_cached=num_cached,
        )

    def undo(self, body: api.ChangeRequest) -> api.StatusAnswer:
        """Take span retractions back: the next request reads the original text again."""
        return self._change(body, "revoked")

    def heal(self, body: api.ChangeRequest) -> api.StatusAnswer:
        """Make steered spans exact: the next request prefills what follows them without them."""
        return self._change(body, "exact")

    def status(self, body: api.StatusRequest) -> api.StatusAnswer:
        """Tell of the model, the eraser and the retractions of a thread."""
        steering, records = self.editor.steering, self.ledger.records(body.extra_key) if body.extra_key else []
        return api.StatusAnswer(
            **self._model,
            eraser_id=steering.eraser_id if steering else "",
            suffix_free=bool(steering and steering.suffix_free),
            threads=self.ledger.threads(),
            retractions=[_retraction(record) for record in records],
        )

    # -- replicas ---------------------------------------------------------------------------------------------------

    def changes(self, body: api.ChangesRequest) -> api.ChangesAnswer:
        """Tell another replica what changed."""
        ledger = self.ledger
        after = body.after if body.ledger_id == ledger.ledger_id else 0
        return api.ChangesAnswer(
            ledger_id=ledger.ledger_id,
            sequence=ledger.sequence,
            records=[asdict(record) for record in ledger.changes(after)],
        )

    def catch_up(self, asked: str | None = None) -> None:
        """Take over what other replicas took back, and forget what the cache read of it.

        Args:
            asked: thread that is about to be read; others are forgotten when their time is over. None: no thread.
        """
        now = time.monotonic()
        if self.peers is not None and (found := self.peers.take()):
            for record in self.ledger.adopt(found):
                if self.editor.cache.namespaces_of(record.extra_key) or self._is_busy(record.extra_key):
                    thread = self._outdated.setdefault(record.extra_key, _Outdated(now + EDIT_S))
                    thread.retraction_ids.add(record.retraction_id)
        for extra_key in [name for name, thread in self._outdated.items() if name == asked or thread.until <= now]:
            if not self._is_busy(extra_key):
                self._forget(extra_key)

    def _known(
        self, ids: IntArray, spans: Sequence[Interval], template: SpanRecord
    ) -> tuple[list[SpanRecord], dict[str, SpanRecord]]:
        """Return what stands in a thread and is out of its cache, and by id what was adopted and is still in it.

        A request that does not ask for all that was adopted cannot mend the cache, which is forgotten then.
        """
        known = standing(self.ledger.records(template.extra_key), ids)
        if (outdated := self._outdated.get(template.extra_key)) is None:
            return known, {}
        asked = [r for r in known if (r.start, r.end) in spans and r.state == template.state]
        adopted = {r.retraction_id: r for r in asked if r.retraction_id in outdated.retraction_ids}
        if adopted.keys() == outdated.retraction_ids:
            return [r for r in known if r.retraction_id not in adopted], adopted
        self._forget(template.extra_key)
        return known, {}

    def _forget(self, extra_key: str) -> None:
        self.editor.forget(extra_key)
        del self._outdated[extra_key]

    # -- requests ---------------------------------------------------------------------------------------------------

    def rewrite(self, ids: Sequence[int], extra_key: str | None, namespace: Namespace) -> IntArray | None:
        """Return the key of a request that arrives with original tokens; None: no span of it was taken back.

        A steered span whose tombstones are no longer cached is left out from now on: what follows is prefilled anew
        without it, and the ledger says `exact`.

        Args:
            ids: as they arrived.
            extra_key: the thread, as its clients name it.
            namespace: where the request reads the cache: a salt or a LoRA adapter makes it another one.
        """
        self.catch_up(extra_key)
        records = self.ledger.records(extra_key)
        if not records:
            return None
        tokens = np.asarray(ids, dtype=np.int64)
        found = standing(records, tokens)
        if not found:
            return None
        key, cold = self.resolve(tokens, found, namespace)
        self.ledger.set_state([r for r in found if r.retraction_id in cold], "exact", must_last=False)
        return key.ids

    def cold(self, ids: Sequence[int], namespace: Namespace) -> int:
        """Return how many tombstones of a request cannot be served from the cache."""
        at = np.flatnonzero(np.asarray(ids, dtype=np.int64) < 0)
        if not len(at):
            return 0
        return int((at >= self._usable(ids, namespace)).sum())

    def resolve(self, ids: IntArray, records: Sequence[SpanRecord], namespace: Namespace) -> tuple[ThreadKey, set[str]]:
        """Return the key of original tokens as the cache can serve it, and the steered records that are cold in it."""
        cold: set[str] = set()
        while True:
            key = key_of(ids, records, cold)
            usable = self._usable(key.ids.tolist(), namespace)
            steered = [r for r in records if r.state == "steered" and r.retraction_id not in cold]
            more = {r.retraction_id for r in steered if entry_of(r.end, records, cold) > usable}
            if not more:
                return key, cold
            cold |= more

    def _usable(self, ids: Sequence[int], namespace: Namespace) -> int:
        """Return how many leading entries of a key may be tombstones: cached, and not at its end."""
        return min(len(self.editor.cache.locate(ids, namespace).slots), len(ids) - api.TAIL)

    def _apply(
        self,
        ids: IntArray,
        known: Sequence[SpanRecord],
        cold: set[str],
        before: ThreadKey,
        changed: Sequence[SpanRecord],
        *,
        steered: bool,
    ) -> api.EditAnswer:
        """Edit the cache for records that are in the ledger; what cannot be steered becomes exact."""
        namespace, old = Namespace(changed[0].extra_key), before.ids.tolist()
        entries: list[Interval] = [(entry_of(r.start, known, cold), entry_of(r.end, known, cold)) for r in changed]
        if steered:
            after = key_of(ids, sorted([*known, *changed], key=lambda r: r.start), cold)
            try:
                edited = self.editor.edit(
                    old, entries, after.ids.tolist(), namespace, steer=changed[0].eraser == "kveraser", purge=True
                )
                num_cached = len(self.editor.cache.locate(after.ids.tolist(), namespace).slots)
                self.ledger.set_state(
                    [r for r, (_, e) in zip(changed, entries, strict=True) if e > num_cached], "exact"
                )
                return edited
            except Refused as error:
                log.info("kv_retract: exact instead of steered: %s", error)
        self.ledger.set_state(changed, "exact")
        return api.EditAnswer(slots_freed=self.editor.drop(old, entries[0][0], namespace, branches=True))

    def _change(self, body: api.ChangeRequest, state: Any) -> api.StatusAnswer:
        if self._is_busy(body.extra_key):
            raise Refused("busy", f"a request of thread {body.extra_key!r} runs or waits; finish it, then try again")
        records = {record.retraction_id: record for record in self.ledger.records(body.extra_key)}
        wanted = list(records) if body.retraction_ids is None else body.retraction_ids
        if unknown := [name for name in wanted if name not in records]:
            raise Refused("unknown_retraction", f"thread {body.extra_key!r} has no retraction {unknown[0]!r}")
        chosen = [records[name] for name in wanted if state == "revoked" or records[name].state == "steered"]
        self.ledger.decide(chosen, state)
        return self.status(api.StatusRequest(extra_key=body.extra_key))


def _namespace(body: api.MatchRequest | api.EditRequest | api.DropRequest) -> Namespace:
    return Namespace(body.extra_key or None)


def _checked(body: api.EditRequest) -> list[Interval]:
    """Return the spans of an edit; raises Refused where the two keys differ elsewhere, or not at all."""
    old, new = (np.array(ids, dtype=np.int64) for ids in (body.token_ids, body.new_token_ids))
    spans, at = [(span.start, span.end) for span in body.spans], 0
    for start, end in spans:
        if start < at or end > len(old):
            raise Refused("bad_request", f"span [{start}, {end}) must follow token {at} of a key of {len(old)}")
        at = end
    inside = np.zeros(len(old), dtype=np.bool_)
    for start, end in spans:
        inside[start:end] = True
    if len(old) != len(new) or np.any(old[~inside] != new[~inside]) or np.any(new[inside] >= 0):
        raise Refused("bad_request", "expected new_token_ids as token_ids, with negative ids in the spans only")
    if np.any(old[inside] < 0):
        raise Refused("bad_request", "a span was erased already, wholly or in part")
    return spans


def _retraction(record: SpanRecord) -> api.Retraction:
    return api.Retraction(
        retraction_id=record.retraction_id, start=record.start, end=record.end, state=record.state,
        eraser=record.eraser, policy=record.policy, reason=record.reason, created_at=record.created_at,
    )  # fmt: skip
