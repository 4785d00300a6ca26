"""Each suite fails where an implementation breaks its contract: a kit that passes everything would prove nothing."""

import ast
from pathlib import Path

import pytest

FAULTY = [Path(__file__).with_name(name) for name in ("faulty_values.py", "faulty_tensors.py")]

FOUND_BY = {
    "IndexWithoutNamespaces": ["namespaces_never_match", "random_operations_agree_with_the_oracle"],
    "IndexThatHandsOutItsOwnSlots": ["results_are_copies"],
    "IndexThatLosesAPage": ["eviction_stops_when_enough_is_given_up", "random_operations_agree_with_the_oracle"],
    "IndexThatLocksNothing": ["sizes_follow_locks", "locked_paths_are_neither_evicted_nor_removed"],
    "IndexThatOverlooksBranches": ["exclusive_from_finds_the_last_branch"],
    "IndexThatCutsPages": ["remove_tail_inside_a_page_takes_the_page", "random_operations_agree_with_the_oracle"],
    "PolicyThatRemembers": ["proposals_depend_on_the_messages_only"],
    "PolicyThatQuotes": ["it_proposes_something_in_the_example", "proposals_are_well_formed"],
    "PolicyThatMissesTheThread": ["proposals_are_well_formed"],
    "PolicyThatChangesItsMind": ["what_was_proposed_stays_proposed"],
    "PolicyThatChangesMessages": ["proposals_depend_on_the_messages_only"],
    "PolicyThatRepeatsItself": ["proposals_are_well_formed"],
    "PolicyThatTakesItsTime": ["two_thousand_messages_take_milliseconds"],
    "PolicyThatSaysNothing": ["it_proposes_something_in_the_example"],
    "LedgerThatAddsOneByOne": ["adding_is_all_or_nothing"],
    "LedgerThatForgetsStatuses": ["adding_again_changes_nothing"],
    "LedgerThatOverwrites": ["a_status_may_be_changed_only_where_it_still_is_what_it_was"],
    "LedgerThatSharesForks": ["a_fork_copies_and_then_goes_its_own_way"],
    "LedgerThatOnlySaysItIsDurable": ["records_outlive_a_durable_ledger"],
    "EraserThatDrawsLots": ["twice_gives_the_same_states"],
    "EraserThatLiesAboutItsGap": ["new_key_is_cached_and_old_text_is_not"],
    "EraserWhoseCostFalls": ["cost_and_identity"],
    "EngineThatCountsPositions": ["positions_are_those_of_the_key"],
    "EngineThatFeedsTombstones": ["a_cold_tombstone_is_refused"],
    "EngineThatKeepsTheText": ["a_recompute_edit_equals_a_prefill_without_the_spans"],
    "EngineThatCommitsHalfEdits": ["an_eraser_that_fails_leaves_no_half_edit"],
    "EngineThatServesWhatFailedEditsWrote": ["an_eraser_that_fails_leaves_no_half_edit"],
    "EngineThatWritesWhatOthersShare": ["an_eraser_that_fails_leaves_no_half_edit"],
    "EngineThatLeaksStreams": ["a_running_stream_keeps_what_is_dropped", "streams_of_several_threads_interleave"],
    "EngineThatLeaksOnRefusal": ["a_cold_tombstone_is_refused", "what_cannot_run_is_refused"],
    "EngineThatDeniesItsCache": ["logits_equal_plain_transformers_with_and_without_hits"],
    "EngineThatSwapsKeysAndValues": ["what_is_read_is_what_transformers_computes"],
    "EngineThatDropsFromTheStart": ["drop_forgets_what_only_this_thread_uses"],
    "EngineThatRoundsLogits": ["logits_equal_plain_transformers_with_and_without_hits"],
    "EngineThatPrefillsHalf": ["a_prefill_brings_a_key_into_the_cache_and_says_what_it_took"],
    "EngineThatSeesNoDifference": ["the_divergence_of_two_caches_is_that_of_their_distributions"],
    "EngineThatIgnoresProcessors": ["a_logits_processor_decides"],
}
"""Faulty implementation -> the tests of its suite that must fail, each at one parameter at least."""


class Failures:
    """A pytest plugin that keeps the tests that failed, and what broke before they could."""

    def __init__(self):
        self.tests, self.broken = set(), []

    def pytest_runtest_logreport(self, report):
        if report.failed and report.when == "call":
            _, suite, test = report.nodeid.split("::")
            self.tests.add((suite, test.partition("[")[0]))
        elif report.failed and report.when == "setup":
            self.broken.append(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.broken.append(report.nodeid)


def suites(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test")}


@pytest.fixture(scope="module")
def failures():
    plugin = Failures()
    named = [
        f"{file}::{suite}::test_{test}"
        for file in FAULTY
        for suite in sorted(suites(file))
        for test in FOUND_BY[suite.removeprefix("Test")]
    ]
    # In this process, since loading torch anew would take longer than all of the tests.
    pytest.main(["-q", "--tb=no", "-p", "no:cacheprovider", *named], plugins=[plugin])
    assert not plugin.broken
    return plugin.tests


@pytest.mark.parametrize("name", FOUND_BY)
def test_a_faulty_implementation_fails(failures, name):
    assert {(f"Test{name}", f"test_{test}") for test in FOUND_BY[name]} <= failures
