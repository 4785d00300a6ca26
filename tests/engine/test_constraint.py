"""Constrained answers: what a grammar allows, token by token, and that a random model cannot leave it."""

import json

import pytest
import torch

from kv_retract import KVRetractSession, Message, SamplingParams
from kv_retract.engine.constraint import CallSyntax, ConstraintCompiler
from kv_retract.engine.grammar import Literals, close_objects
from kv_retract.engine.models import load_reference_tokenizer
from kv_retract.errors import ConstraintError
from kv_retract.ledger.render import Renderer
from kv_retract.ledger.tool_calls import HermesToolCalls, Llama3JsonToolCalls, MistralToolCalls

FORBIDDEN = float("-inf")
PADDING = 10
"""The model's logits may be longer than the vocabulary; what stands there can never be chosen."""

PRICE = {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]}
REFUND = {"type": "object", "properties": {"euros": {"type": "integer"}}, "required": ["euros"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_price", "description": "d", "parameters": PRICE}},
    {"type": "function", "function": {"name": "refund", "parameters": REFUND}},
    {"type": "function", "function": {"name": "ping"}},
]
TEA = '<tool_call>\n{"name": "get_price", "arguments": {"item": "tea"}}\n</tool_call>'
PAY = '<tool_call>\n{"name": "refund", "arguments": {"euros": 3}}\n</tool_call>'
PING = '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def renderer():
    return Renderer(load_reference_tokenizer())


def compiler_for(renderer, calls=None):
    calls = calls or renderer.tool_calls
    return ConstraintCompiler(
        renderer.tokenizer,
        vocab_size=len(renderer.tokenizer) + PADDING,
        stop_token_ids=renderer.stop_token_ids,
        syntax=CallSyntax.from_example(calls.example, marker=calls.begin),
    )


@pytest.fixture(scope="module")
def compiler(renderer):
    return compiler_for(renderer)


@pytest.fixture(scope="module")
def refused(renderer):
    """Return from where on a constraint does not allow a whole answer; None where it allows all of it and its end."""

    def check(constraint, text):
        ids = [*renderer.tokenizer(text, add_special_tokens=False).input_ids, renderer.stop_token_ids[0]]
        for i, token in enumerate(ids):
            if constraint(ids[:i], torch.zeros(len(renderer.tokenizer) + PADDING))[token] == FORBIDDEN:
                return text[len(renderer.tokenizer.decode(ids[:i])) :]
        return None

    return check


# -- JSON -----------------------------------------------------------------------------------------------------------

ORDER = {
    "type": "object",
    "properties": {
        "item": {"type": "string"},
        "count": {"type": "integer"},
        "size": {"enum": ["small", "größer"]},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["item", "count"],
}


@pytest.mark.parametrize(
    "text",
    [
        '{"item": "tea", "count": 2}',
        '{"item": "茶 🍵 \\" \\n", "count": -2}',
        '{"item": "", "count": 0, "size": "größer", "tags": ["a", "b"]}',
    ],
)
def test_json_of_the_schema_is_allowed(compiler, refused, text):
    assert refused(compiler.json(ORDER), text) is None


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("Sure: {", "Sure: {"),
        ('{"count": 2', 'count": 2'),
        ('{"item": "tea"}', "}"),
        ('{"item": "tea", "count": 2.5}', ".5}"),
        ('{"item": "tea", "count": 2, "size": "big"}', 'big"}'),
        ('{"item": "tea", "count": 2, "more": 1}', 'more": 1}'),
        ('{"item": "tea", "count": 2} Enjoy!', " Enjoy!"),
    ],
)
def test_anything_else_is_not(compiler, refused, text, rest):
    got = refused(compiler.json(ORDER), text)
    # Where a token holds more than the first wrong character, it is refused as a whole.
    assert got is not None and text.endswith(got) and got.endswith(rest) and len(got) <= len(rest) + 2


def test_without_a_schema_any_object_and_nothing_else(compiler, refused):
    for text in ('{"a": {"b": [1, null, true]}}', "{}"):
        assert refused(compiler.json(), text) is None
    assert refused(compiler.json(), "[1]") == "[1]"
    assert refused(compiler.json({}), "[1]") is None, "an empty schema allows any value"


def test_the_style_is_that_of_json_dumps_so_that_an_answer_keeps_its_tokens(compiler, refused):
    value = {"item": "tea", "count": 2, "tags": ["a", "b"]}
    assert refused(compiler.json(ORDER), json.dumps(value)) is None
    for other in (json.dumps(value, separators=(",", ":")), json.dumps(value, indent=1)):
        assert refused(compiler.json(ORDER), other) is not None


def test_an_answer_ends_only_where_the_grammar_is_satisfied(compiler, renderer):
    constraint, (stop,) = compiler.json(ORDER), renderer.stop_token_ids
    ids = renderer.tokenizer('{"item": "tea", "count": 2}', add_special_tokens=False).input_ids
    ends = [constraint(ids[:i], torch.zeros(len(renderer.tokenizer)))[stop] > FORBIDDEN for i in range(len(ids) + 1)]
    assert ends == [False] * len(ids) + [True]


def test_forbidden_logits_are_minus_infinity_and_the_others_unchanged(compiler, renderer):
    logits = torch.randn(len(renderer.tokenizer) + PADDING, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    masked = compiler.json(ORDER)([], logits)
    assert torch.equal(logits, before), "the caller's logits are not changed"
    allowed = masked > FORBIDDEN
    assert torch.equal(masked[allowed], logits[allowed])
    # The tokenizer's own tokens for a forced text, and no others: the answer has the ids it would be rendered with.
    assert allowed.nonzero().flatten().tolist() == renderer.tokenizer('{"item": "').input_ids[:1]
    assert not allowed[-PADDING:].any()


def test_the_ids_of_an_answer_only_grow(compiler, renderer):
    constraint = compiler.json(ORDER)
    ids = renderer.tokenizer('{"item": "tea"').input_ids
    logits = torch.zeros(len(renderer.tokenizer))
    once = constraint(ids, logits)
    assert torch.equal(constraint(ids, logits), once), "asking again is harmless"
    with pytest.raises(ConstraintError, match="do not extend those of the call before.*use a new constraint for each"):
        constraint(ids[:2], logits)
    with pytest.raises(ConstraintError, match="left the grammar of the JSON schema after 1 tokens"):
        compiler.json(ORDER)(renderer.tokenizer("Sure").input_ids[:1], logits)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nope"},
        {"type": "string", "pattern": "("},
        {"$ref": "#/$defs/missing"},
        {"type": "integer", "minimum": 5, "maximum": 3},
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
        {"type": "object", "allOf": 3},
        5,
        [],
    ],
)
def test_schemas_that_cannot_be_met_are_refused(compiler, schema):
    with pytest.raises(ConstraintError, match="cannot be turned into a grammar; simplify|expected a JSON schema"):
        compiler.json(schema)
    with pytest.raises(ConstraintError):
        compiler.tools(TOOLS, answer=schema)


# -- schemas that list properties -----------------------------------------------------------------------------------

A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
B = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}


def test_listed_properties_are_all_there_are_unless_the_schema_says_otherwise(compiler, refused):
    nested = {
        "type": "object",
        "properties": {"list": {"type": "array", "items": A}, "either": {"anyOf": [B, {"type": "null"}]}},
        "$defs": {"unused": A},
    }
    closed = close_objects(nested)
    assert closed["additionalProperties"] is False and closed["$defs"]["unused"]["additionalProperties"] is False
    assert close_objects({**A, "additionalProperties": True}) == {**A, "additionalProperties": True}
    assert "additionalProperties" not in nested, "the schema is not changed"
    assert refused(compiler.json(nested), '{"list": [{"a": 1}], "either": {"b": 2}}') is None
    assert refused(compiler.json(nested), '{"list": [{"a": 1, "z": 2}]}') is not None
    assert refused(compiler.json(nested), '{"either": {"b": 2, "z": 3}}') is not None
    assert refused(compiler.json({**A, "additionalProperties": True}), '{"a": 1, "z": 2}') is None


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [A, B]},
        {"$defs": {"A": A, "B": B}, "allOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]},
        {"$defs": {"B": B}, **A, "allOf": [{"$ref": "#/$defs/B"}]},
        {**A, "anyOf": [B, {"properties": {"c": {}}, "required": ["c"]}]},
    ],
)
def test_schemas_that_combine_objects_can_be_met(compiler, refused, schema):
    assert refused(compiler.json(schema), '{"a": 1, "b": 2}') is None
    assert refused(compiler.json(schema), '{"a": 1}') is not None
    whole = {"type": "object", "properties": {"x": schema}, "$defs": schema.get("$defs", {})}
    assert refused(compiler.json(whole), '{"x": {"a": 1, "b": 2}}') is None


def test_one_reference_in_all_of_is_closed_as_if_it_stood_there(compiler, refused):
    schema = {"$defs": {"B": B}, "allOf": [{"$ref": "#/$defs/B"}]}
    assert refused(compiler.json(schema), '{"b": 1}') is None
    assert refused(compiler.json(schema), '{"b": 1, "c": 2}') is not None


# -- tool calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "allowed", "not_allowed"),
    [
        ("auto", ["Hello.", TEA, f"Let me look. {TEA}", f"{TEA}\n{PAY}"], [f"{TEA} Done.", TEA.replace("item", "it")]),
        ("required", [TEA, PING, f"{PAY}\n{TEA}"], ["Hello.", f"Let me look. {TEA}", PAY.replace("3", '"3"'), ""]),
        ("none", ["Hello.", "", "a < b <b>"], [TEA, f"Let me look. {TEA}", "<tool_call>"]),
        ("refund", [PAY], [TEA, f"{PAY}\n{PAY}", "Hello."]),
        ("ping", [PING], [PING.replace("{}", '{"a": 1}')]),
    ],
)
def test_choices(compiler, refused, choice, allowed, not_allowed):
    for text in allowed:
        assert refused(compiler.tools(TOOLS, choice=choice), text) is None, text
    for text in not_allowed:
        assert refused(compiler.tools(TOOLS, choice=choice), text) is not None, text


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_one_call_at_most(compiler, refused, choice):
    one = compiler.tools(TOOLS, choice=choice, parallel=False)
    assert refused(one, TEA) is None
    assert refused(compiler.tools(TOOLS, choice=choice, parallel=False), f"{TEA}\n{PAY}") == f"\n{PAY}"


def test_a_schema_for_what_is_no_call(compiler, refused):
    for choice in ("auto", "none"):
        assert refused(compiler.tools(TOOLS, choice=choice, answer=A), '{"a": 1}') is None
        assert refused(compiler.tools(TOOLS, choice=choice, answer=A), "Hello.") == "Hello."
    assert refused(compiler.tools(TOOLS, choice="auto", answer=A), TEA) is None
    assert refused(compiler.tools(TOOLS, choice="none", answer=A), TEA) == TEA


def test_a_call_cannot_be_spelled_with_other_tokens_either(compiler, renderer):
    ids = [i for part in ("<", "tool", "_call", ">") for i in renderer.tokenizer(part).input_ids]
    assert renderer.tokenizer.decode(ids) == "<tool_call>" and len(ids) > 3
    constraint, logits = compiler.tools(TOOLS, choice="none"), torch.zeros(len(renderer.tokenizer))
    allowed = [constraint(ids[:i], logits)[token] > FORBIDDEN for i, token in enumerate(ids)]
    assert allowed == [True] * (len(ids) - 1) + [False]


def test_without_tools_there_is_text_only(compiler, refused):
    assert refused(compiler.tools([]), "Hello.") is None
    assert refused(compiler.tools([]), TEA) is not None


def test_an_unknown_choice_lists_the_tools(compiler):
    with pytest.raises(ConstraintError, match=r"\(get_price, refund, ping\), got 'get_weather'"):
        compiler.tools(TOOLS, choice="get_weather")
    with pytest.raises(ConstraintError, match=r"\(none\), got 'get_price'"):
        compiler.tools([], choice="get_price")
    broken = [{"type": "function", "function": {"name": "f", "parameters": {"type": "nope"}}}]
    with pytest.raises(ConstraintError, match="tool choice 'required' cannot be turned into a grammar"):
        compiler.tools(broken, choice="required")


@pytest.mark.parametrize(
    ("calls", "call", "two"),
    [
        (Llama3JsonToolCalls(), '{"name": "refund", "parameters": {"euros": 3}}', None),
        (
            MistralToolCalls(),
            '[TOOL_CALLS][{"name": "refund", "arguments": {"euros": 3}}]',
            '[TOOL_CALLS][{"name": "refund", "arguments": {"euros": 3}}, {"name": "ping", "arguments": {}}]',
        ),
    ],
)
def test_other_ways_to_write_calls(renderer, refused, calls, call, two):
    compiler = compiler_for(renderer, calls)
    for choice in ("auto", "required", "refund"):
        assert refused(compiler.tools(TOOLS, choice=choice), call) is None, choice
        assert refused(compiler.tools(TOOLS, choice=choice), call.replace("3", "[]")) is not None, choice
    assert calls.parse(call)[1][0].arguments == '{"euros": 3}', "and they are read back"
    assert refused(compiler.tools(TOOLS, choice="none"), call) is not None
    if two:
        # The mark is no token of its own here: it has to be found in the text.
        assert refused(compiler.tools(TOOLS), f"Let me look. {call}") is None
        assert refused(compiler.tools(TOOLS), f"Let me look. {call} Done.") == " Done."
        assert refused(compiler.tools(TOOLS), two) is None and len(calls.parse(two)[1]) == 2
        assert refused(compiler.tools(TOOLS, parallel=False), two) is not None


def test_the_syntax_is_read_off_an_example():
    syntax = CallSyntax.from_example(HermesToolCalls.example)
    assert (syntax.begin, syntax.end) == ("<tool_call>\n", "\n</tool_call>") and not syntax.listed
    assert CallSyntax.from_example(Llama3JsonToolCalls.example).arguments_key == "parameters"
    assert CallSyntax.from_example(MistralToolCalls.example).listed
    for example in ("search(x)", "{}", '{"name": "f"}', '{"name": "f", "arguments": {}, "id": 1}'):
        with pytest.raises(ConstraintError, match="expected a tool call as a JSON object with its name and its arg"):
            CallSyntax.from_example(example)


def test_added_tokens_are_written_by_id():
    literals = Literals({"<a>": 7, "<a><b>": 8})
    assert literals('x<a><b>"') == '"x" <[8]> "\\""' and literals("") == ""
    assert literals.holds_token("<a>x") and not literals.holds_token("x<a>")
    assert Literals({})("<a>") == '"<a>"'


# -- a model that knows nothing -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session():
    return KVRetractSession.from_pretrained("random", max_tokens=8192)


def step(session, constraint, seed, max_tokens=200):
    sampling = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=seed)
    return session.step("t", [Message("user", "How much?")], sampling=sampling, logits_processor=constraint)


@pytest.mark.parametrize("seed", range(4))
def test_a_random_model_writes_valid_json(session, compiler, seed):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "euros": {"type": "integer", "maximum": 999}},
        "required": ["name", "euros"],
    }
    result = step(session, compiler.json(schema), seed)
    assert result.finish_reason == "stop"
    value = json.loads(result.message.content)
    assert set(value) == {"name", "euros"} and value["euros"] <= 999 and len(value["name"]) <= 12


@pytest.mark.parametrize("seed", range(3))
def test_characters_of_several_tokens_stay_whole(session, compiler, seed):
    words = ["茶🍵", "größer", "Ωμέγα"]
    result = step(session, compiler.json({"enum": words}), seed)
    assert json.loads(result.message.content) in words
    assert len(result.token_ids) > len(result.message.content), "no character here has a token of its own"


@pytest.mark.parametrize("seed", range(4))
def test_a_random_model_calls_a_tool_or_keeps_silent_about_it(session, compiler, seed):
    colours = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    tools = [{"name": "paint", "parameters": colours}]
    called = step(session, compiler.tools(tools, choice="required", parallel=False), seed)
    (call,) = called.message.tool_calls
    assert call.name == "paint" and json.loads(call.arguments)["colour"] in ("red", "blue")
    assert called.message.content == "" and called.finish_reason == "tool_calls"
    ids = session.renderer.tokenizer(HermesToolCalls.example.replace("search", "paint"))["input_ids"]
    assert called.token_ids[:3] == tuple(ids[:3]), "the mark is one token, as the template writes it"
    silent = step(session, compiler.tools(tools, choice="none"), seed, max_tokens=40)
    assert silent.message.tool_calls == () and "<tool_call>" not in silent.message.content
