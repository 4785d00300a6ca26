"""What is measured of policies: overlaps, exact spans, labels of the corpus and of files."""

import json
from dataclasses import dataclass

import pytest

from kv_retract.errors import OutputExistsError, TraceError
from kv_retract.evals.policies import (
    Judged,
    LabelledThread,
    PolicyEval,
    eval_policies,
    judge,
    policy_rows,
    read_labelled,
)
from kv_retract.evals.specs import Spec
from kv_retract.policies import RetractionPolicy
from kv_retract.types import Message, Retraction, SpanRef, ToolCall


@dataclass(kw_only=True)
class Fixed(RetractionPolicy):
    """Proposes the spans that it was given."""

    name = "fixed"
    spans: tuple = ()

    def propose(self, ctx):
        return [Retraction(span=span, policy="fixed", reason="given") for span in self.spans]


MESSAGES = (Message("user", "one two  three"), Message("assistant", tool_calls=(ToolCall("c", "look", "one two"),)))


def judged(labels, proposals):
    thread = LabelledThread(thread_id="t", source="s", messages=MESSAGES, labels={"fixed": tuple(labels)})
    return judge(Fixed(spans=tuple(proposals)), thread, "fixed")


def test_a_proposal_is_right_where_it_overlaps_a_label():
    one, two = SpanRef(0, start=0, end=3), SpanRef(0, start=4, end=7)
    found = judged([one, two], [SpanRef(0, start=2, end=4), SpanRef(0, start=7, end=14)])
    assert found.found == (True, False) and found.exact == (False,) and found.right == (True, False)
    assert judged([], [one]).right == (False,) and judged([one], []).found == (False,)


def test_white_space_and_open_ends_make_no_difference():
    found = judged([SpanRef(0, start=7, end=None)], [SpanRef(0, start=9, end=14)])
    assert found.exact == (True,) and found.right == (True,)


def test_parts_of_a_message_are_kept_apart():
    assert judged([SpanRef(1, "tool_call", 0, 0, 3)], [SpanRef(1, "tool_call", 0, 0, 3)]).exact == (True,)
    assert judged([SpanRef(0, start=0, end=3)], [SpanRef(1, "tool_call", 0, 0, 3)]).found == (False,)


def test_rows_pool_labels_and_proposals_of_a_source():
    some = [
        Judged(thread_id="a", source="s", policy="p", found=(True, True), exact=(True, False), right=(True, False)),
        Judged(thread_id="b", source="s", policy="p", found=(False, True), exact=(True,), right=()),
        Judged(thread_id="c", source="other", policy="p", found=(), exact=(), right=()),
    ]
    row, other = policy_rows(some)
    assert (row["threads"], row["labels"], row["proposals"]) == (2, 4, 2)
    assert (row["recall"], row["precision"]) == (0.75, 0.5) and row["exact"] == pytest.approx(2 / 3)
    assert other["source"] == "other" and other["recall"] is None and other["recall_se"] is None


def line(**changes):
    given = {"trace_id": 1, "messages": [{"role": "user", "content": "forget it"}], "labels": {"fixed": []}}
    return json.dumps({**given, **changes}) + "\n"


def test_labelled_threads_of_a_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(line() + "\n" + line(source="s", labels={"fixed": [{"message": 0, "start": 0, "end": 6}]}))
    first, second = read_labelled(path)
    assert (first.thread_id, first.source, first.labels) == ("1", "mine", {"fixed": ()})
    assert (second.source, second.labels) == ("s", {"fixed": (SpanRef(0, start=0, end=6),)})


@pytest.mark.parametrize(
    "wrong",
    [
        "[1]", "{", json.dumps({"messages": []}), line(labels={"fixed": [{"message": 0}]}), line(labels=[1]),
        line(labels={"fixed": [{"message": 3, "start": 0, "end": 1}]}),
        line(labels={"fixed": [{"message": 0, "start": 0, "end": 99}]}),
    ],
)  # fmt: skip
def test_what_is_no_labelled_thread(tmp_path, wrong):
    path = tmp_path / "mine.jsonl"
    path.write_text(line() + wrong)
    with pytest.raises(TraceError, match=r"line 2 of .*mine\.jsonl"):
        list(read_labelled(path))
    with pytest.raises(TraceError, match="cannot read"):
        list(read_labelled(tmp_path / "none"))


def test_the_corpus_tells_what_there_is_to_find(tmp_path):
    specs = (Spec("superseded"), Spec("tool_error", {"same_arguments": ["booking"]}))
    settings = PolicyEval(out=tmp_path / "out", policies=specs, n=8, lengths=(256,), split="train")
    told = []
    metrics = eval_policies(settings, progress=lambda done, total: told.append((done, total)))
    rows = {row["policy"]: row for row in metrics["rows"]}
    assert list(rows) == [spec.label for spec in specs] and told[-1] == (16, 16)
    assert rows["superseded"]["source"] == "corpus, updates" and rows["superseded"]["labels"] > 0
    assert rows["superseded"]["recall"] == rows["superseded"]["precision"] == rows["superseded"]["exact"] == 1
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 16
    with pytest.raises(OutputExistsError):
        eval_policies(settings)
