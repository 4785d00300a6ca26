import json
from pathlib import Path

import pytest

from kv_retract.errors import PolicyError
from kv_retract.policies.base import POLICIES, PolicyContext
from kv_retract.policies.oversized import Oversized
from kv_retract.testing.policies import PolicyConformance
from kv_retract.trace import Trace, read_traces
from kv_retract.types import Guarantee, Message, ToolCall

DATA = Path(__file__).parents[3] / "shared" / "data"
SMALL = {"limit": 200, "head": 50, "tail": 30, "min_span": 40, "keep_steps": 1}
ANSWER = [Message("assistant", "I see.")]


class TestOversizedConformance(PolicyConformance):
    results = (
        "a",
        "word " * 60,
        "a line\n" * 40,
        "no border" * 40,
        json.dumps([{"n": n, "text": "an item"} for n in range(20)]),
        json.dumps({"rows": list(range(100))}),
        "[" + "1, " * 100,
        "Error: " + "x" * 300,
    )

    @pytest.fixture
    def policy(self):
        return Oversized(**SMALL)

    @pytest.fixture
    def thread(self):
        call = Message("assistant", tool_calls=(ToolCall("c", "get_item", "{}"),))
        return [call, Message("tool", self.results[1], tool_call_id="c"), *ANSWER]

    def check(self, policy, messages, proposals):
        super().check(policy, messages, proposals)
        for span in (r.span for r in proposals):
            length = len(messages[span.message].content)
            assert length > policy.limit and span.end - span.start >= policy.min_span
            assert span.start >= policy.head and length - span.end >= policy.tail


def parts(threads, text, **parameters):
    """Return what stays before, what goes, what stays after; None where nothing goes."""
    context = threads.ctx(threads.call("read", {}, text), ANSWER)
    proposals = Oversized(**SMALL | parameters).propose(context)
    if not proposals:
        return None
    [span] = [r.span for r in proposals]
    text = context.messages[1].content
    return text[: span.start], text[span.start : span.end], text[span.end :]


def test_only_after_the_model_had_its_use_of_it(threads):
    t = threads
    result = t.call("read", {}, "word " * 100)
    policy = Oversized(**SMALL | {"keep_steps": 2})
    assert t.proposed(policy, t.ctx(result, ANSWER, t.user("and?"))) == []
    [retraction] = policy.propose(t.ctx(result, ANSWER, t.user("and?"), ANSWER))
    assert retraction.reason == "the middle of a result of 500 characters; 2 answers followed it"
    assert t.proposed(Oversized(**SMALL | {"keep_steps": 0}), t.ctx(result)) == [1]


def test_the_limit_is_exclusive(threads):
    assert parts(threads, "x" * 200) is None
    assert parts(threads, "x" * 201) == ("x" * 50, "x" * 121, "x" * 30)


def test_lines(threads):
    lines = [f"{n:03}: some code\n" for n in range(40)]
    before, middle, after = parts(threads, "".join(lines))
    assert before == "".join(lines[:4]) and after == "".join(lines[-2:])
    assert middle == "".join(lines[4:-2])


def test_head_and_tail_that_end_at_a_line_stay_as_they_are(threads):
    lines = ["123456789\n"] * 30
    assert parts(threads, "".join(lines)) == ("".join(lines[:5]), "".join(lines[5:-3]), "".join(lines[-3:]))


def test_a_border_in_the_head_does_not_count(threads):
    assert parts(threads, "x" * 9 + "\n" + "y" * 240) == ("x" * 9 + "\n" + "y" * 40, "y" * 170, "y" * 30)


def test_sentences_else_words(threads):
    sentences = [f"Here is sentence {n:02}, a short one. " for n in range(12)]
    assert parts(threads, "".join(sentences)) == ("".join(sentences[:2]), "".join(sentences[2:-1]), sentences[-1])
    before, _, after = parts(threads, "words that never end " * 20)
    assert before.endswith(" ") and not after.startswith(" ") and len(before) < 60


@pytest.mark.parametrize("form", ["list", "object", "indented"])
def test_items_of_a_json_list(threads, form):
    rows = [{"row": n, "text": "a row, and more."} for n in range(20)]
    text = json.dumps(rows if form == "list" else {"total": 20, "rows": rows}, indent=1 if form == "indented" else None)
    before, middle, after = parts(threads, text)
    rest = json.loads(before + after)
    rest = rest if form == "list" else rest["rows"]
    gone = json.loads(f"[{middle.rstrip().rstrip(',')}]")
    head = rows.index(gone[0])
    assert rest[:head] + gone + rest[head:] == rows


def test_few_large_items_are_cut_inside(threads):
    text = json.dumps([{"text": "one long item " * 20}, {"text": "another"}])
    _, middle, _ = parts(threads, text)
    assert len(middle) > len(text) // 2


def test_never_next_to_nothing(threads):
    # The only line breaks are far inside: what is left between them is not worth an edit.
    text = "x" * 90 + "\n" + "y" * 35 + "\n" + "z" * 79
    assert parts(threads, text) is None
    assert parts(threads, text, min_span=36) == ("x" * 90 + "\n", "y" * 35 + "\n", "z" * 79)


def test_tools_are_chosen_by_name(threads):
    text = "x" * 300
    assert parts(threads, text, tools=("search_*",)) is None
    assert parts(threads, text, tools=("r*",), exclude=("read",)) is None
    assert parts(threads, text, tools=("r*",)) is not None


def test_user_messages_stay(threads):
    assert threads.proposed(Oversized(**SMALL), threads.ctx(threads.user("x" * 900), ANSWER * 9)) == []


def test_guarantee(threads):
    policy = POLICIES.create("oversized", **SMALL, guarantee="exact")
    [retraction] = policy.propose(threads.ctx(threads.call("read", {}, "x" * 300), ANSWER))
    assert retraction.guarantee is Guarantee.EXACT


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"limit": 100}, "1000 \\+ 500 \\+ 1000 > 100"),
        ({"head": -1}, "expected head"),
        ({"min_span": 0}, "expected min_span"),
        ({"keep_steps": 1.5}, "expected keep_steps"),
        ({"tail": True}, "expected tail"),
    ],
)
def test_sizes_that_do_not_fit(parameters, message):
    with pytest.raises(PolicyError, match=message):
        Oversized(**parameters)


@pytest.mark.parametrize("name", ["tau_bench", "swe_agent"])
def test_real_results_are_cut_at_their_borders(name):
    if not (DATA / name).exists():
        pytest.skip(f"the public data set {name} is not beside this checkout")
    cut = 0
    for trace in read_traces(DATA / name):
        assert isinstance(trace, Trace)
        for retraction in Oversized().propose(PolicyContext(thread_id=trace.trace_id, messages=trace.messages)):
            span = retraction.span
            content = trace.messages[span.message].content
            if name == "tau_bench":
                rest = json.loads(content[: span.start] + content[span.end :])
                assert rest and all(item in json.loads(content) for item in rest)
            else:
                assert content[span.start - 1] == content[span.end - 1] == "\n"
            cut += 1
    assert cut == {"tau_bench": 5, "swe_agent": 3}[name]
