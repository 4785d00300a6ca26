import json

from kv_retract.policies import PolicyContext, ToolErrorRecovered
from kv_retract.trace import read_traces

LOG = """
########################################
BEGIN TRIAL 1
------------- BEGIN CORRECT AGENTS -------------

Question: Who made "Creature Comforts"?
Thought 1: I search.
It may be a film.
Action 1: Search["Creature Comforts"]
Observation 1: Could not find ["Creature Comforts"]. Similar: ['Nick Park']
Thought 2: The name without quotes.
Action 2: Search[Nick Park]
Observation 2: Nick Park is a film maker [1].
Thought 3: Done.
Action 3: Finish[Nick Park]
Observation 3: Answer is CORRECT
Correct answer: Nick Park

Question: Second?
Thought 1: I
Action 1: Search[x]
Observation 1: found
------------- BEGIN INCORRECT AGENTS -----------

"""


def test_log_becomes_one_trace_per_question(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(LOG)
    first, second = read_traces(path)
    assert [m.role for m in first.messages] == ["user"] + ["assistant", "tool"] * 2 + ["assistant"]
    assert first.messages[0].content == 'Who made "Creature Comforts"?'
    assert first.messages[1].content == "I search.\nIt may be a film."
    assert json.loads(first.messages[1].tool_calls[0].arguments) == {"input": '"Creature Comforts"'}
    assert first.messages[5].tool_calls[0].name == "Finish"
    assert "CORRECT" not in "".join(m.content for m in first.messages)
    assert [m.content for m in second.messages] == ["Second?", "I", "found"]
    assert [LOG.splitlines()[int(t.source.rsplit(":", 1)[1]) - 1][:9] for t in (first, second)] == ["Question:"] * 2
    context = PolicyContext(thread_id="t", messages=first.messages)
    assert [r.span.message for r in ToolErrorRecovered().propose(context)] == [2]
