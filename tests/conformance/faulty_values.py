"""Prefix indexes, policies and ledgers that break their contract on purpose, for `test_the_kit_finds_faults.py`.

The name of the file keeps it out of an ordinary run of the tests.
"""

import time
from dataclasses import dataclass, field, replace

import pytest

from kv_retract.cache.base import MatchResult
from kv_retract.cache.radix import RadixCache
from kv_retract.ledger.memory import MemoryLedger
from kv_retract.policies.base import RetractionPolicy
from kv_retract.testing.ledgers import LedgerConformance
from kv_retract.testing.policies import PolicyConformance
from kv_retract.testing.prefix_cache import PrefixCacheConformance
from kv_retract.types import Message, Retraction, SpanRef

# -- prefix indexes ---------------------------------------------------------------------------------------------------


class IndexWithoutNamespaces(RadixCache):
    def match_prefix(self, ids, *, extra_key=""):
        return super().match_prefix(ids)

    def insert(self, ids, slots, *, extra_key=""):
        return super().insert(ids, slots)


class IndexThatHandsOutItsOwnSlots(RadixCache):
    def match_prefix(self, ids, *, extra_key=""):
        match = super().match_prefix(ids, extra_key=extra_key)
        return MatchResult(match.node.slots, match.node) if len(match.node.slots) == len(match.slots) else match


class IndexThatLosesAPage(RadixCache):
    def evict(self, num_slots):
        return super().evict(num_slots)[self.page_size :]


class IndexThatLocksNothing(RadixCache):
    def inc_lock_ref(self, node):
        pass

    def dec_lock_ref(self, node):
        pass


class IndexThatOverlooksBranches(RadixCache):
    def exclusive_from(self, ids, *, extra_key="", locks=0):
        return 0


class IndexThatCutsPages(RadixCache):
    def remove_tail(self, ids, start, *, extra_key=""):
        return super().remove_tail(ids, -(-start // self.page_size) * self.page_size, extra_key=extra_key)


class OfIndex(PrefixCacheConformance):
    type = RadixCache

    @pytest.fixture
    def make_index(self):
        return self.type


class TestIndexWithoutNamespaces(OfIndex):
    type = IndexWithoutNamespaces


class TestIndexThatHandsOutItsOwnSlots(OfIndex):
    type = IndexThatHandsOutItsOwnSlots


class TestIndexThatLosesAPage(OfIndex):
    type = IndexThatLosesAPage


class TestIndexThatLocksNothing(OfIndex):
    type = IndexThatLocksNothing


class TestIndexThatOverlooksBranches(OfIndex):
    type = IndexThatOverlooksBranches


class TestIndexThatCutsPages(OfIndex):
    type = IndexThatCutsPages


# -- policies ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class AllResults(RetractionPolicy):
    """Not wrong by itself: proposes every tool result; the faulty policies change that."""

    name = "all_results"

    def propose(self, ctx):
        return [
            Retraction(span=SpanRef(i), policy=self.name, reason="a tool result")
            for i, m in enumerate(ctx.messages)
            if m.role == "tool"
        ]


@dataclass(kw_only=True)
class PolicyThatRemembers(AllResults):
    seen: set = field(default_factory=set)

    def propose(self, ctx):
        new = [r for r in super().propose(ctx) if r.span not in self.seen]
        self.seen.update(r.span for r in new)
        return new


@dataclass(kw_only=True)
class PolicyThatQuotes(AllResults):
    def propose(self, ctx):
        return [replace(r, reason=f"withdrawn: {ctx.messages[r.span.message].content!r}") for r in super().propose(ctx)]


@dataclass(kw_only=True)
class PolicyThatMissesTheThread(AllResults):
    def propose(self, ctx):
        return [replace(r, span=SpanRef(r.span.message, start=0, end=5)) for r in super().propose(ctx)]


@dataclass(kw_only=True)
class PolicyThatChangesItsMind(AllResults):
    def propose(self, ctx):
        return super().propose(ctx)[-1:]


@dataclass(kw_only=True)
class PolicyThatChangesMessages(AllResults):
    def propose(self, ctx):
        proposals = super().propose(ctx)
        if isinstance(ctx.messages, list):
            ctx.messages.append(Message("user", "seen"))
        return proposals


@dataclass(kw_only=True)
class PolicyThatRepeatsItself(AllResults):
    def propose(self, ctx):
        return 2 * super().propose(ctx)


@dataclass(kw_only=True)
class PolicyThatTakesItsTime(AllResults):
    def propose(self, ctx):
        time.sleep(0.06)
        return super().propose(ctx)


@dataclass(kw_only=True)
class PolicyThatSaysNothing(AllResults):
    def propose(self, ctx):
        return []


class OfPolicy(PolicyConformance):
    type = AllResults

    @pytest.fixture
    def policy(self):
        return self.type()

    @pytest.fixture
    def thread(self):
        return [Message("user", "hello"), Message("tool", "a long result of 7 words")]


class TestPolicyThatRemembers(OfPolicy):
    type = PolicyThatRemembers


class TestPolicyThatQuotes(OfPolicy):
    type = PolicyThatQuotes


class TestPolicyThatMissesTheThread(OfPolicy):
    type = PolicyThatMissesTheThread


class TestPolicyThatChangesItsMind(OfPolicy):
    type = PolicyThatChangesItsMind


class TestPolicyThatChangesMessages(OfPolicy):
    type = PolicyThatChangesMessages


class TestPolicyThatRepeatsItself(OfPolicy):
    type = PolicyThatRepeatsItself


class TestPolicyThatTakesItsTime(OfPolicy):
    type = PolicyThatTakesItsTime
    time_limit = 0.005


class TestPolicyThatSaysNothing(OfPolicy):
    type = PolicyThatSaysNothing


# -- ledgers ----------------------------------------------------------------------------------------------------------


class LedgerThatAddsOneByOne(MemoryLedger):
    def add(self, thread_id, records):
        for record in records:
            super().add(thread_id, [record])


class LedgerThatForgetsStatuses(MemoryLedger):
    def add(self, thread_id, records):
        with self._lock:
            self._put(thread_id, records)


class LedgerThatOverwrites(MemoryLedger):
    def set_status(self, thread_id, statuses, *, only=None):
        super().set_status(thread_id, statuses)


class LedgerThatSharesForks(MemoryLedger):
    def fork(self, source, target):
        super().fork(source, target)
        if source in self._threads:
            self._threads[target] = self._threads[source]


class OfLedger(LedgerConformance):
    type = MemoryLedger

    @pytest.fixture
    def make_ledger(self):
        return self.type


class TestLedgerThatAddsOneByOne(OfLedger):
    type = LedgerThatAddsOneByOne


class TestLedgerThatForgetsStatuses(OfLedger):
    type = LedgerThatForgetsStatuses


class TestLedgerThatOverwrites(OfLedger):
    type = LedgerThatOverwrites


class TestLedgerThatSharesForks(OfLedger):
    type = LedgerThatSharesForks


class TestLedgerThatOnlySaysItIsDurable(OfLedger):
    durable = True
