"""Spans in the rendered ids: never a wrong interval, and no token too many."""

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kv_retract.errors import SpanError
from kv_retract.ledger.render import Renderer
from kv_retract.types import Message, SpanRef, ToolCall


def byte_alphabet():
    """Byte-level BPE writes each byte as one printable character: printable ones as themselves, others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


ALPHABET = byte_alphabet()


def token_bytes(renderer, ids):
    """The bytes of each token."""
    specials = set(renderer.tokenizer.all_special_ids)
    tokens = renderer.tokenizer.convert_ids_to_tokens(ids.tolist())
    return [
        t.encode() if i in specials else bytes(ALPHABET[c] for c in t)
        for t, i in zip(tokens, ids.tolist(), strict=True)
    ]


def tokens_of(renderer, rendering, start, end):
    """Slow twin of `Encoding.interval`: the tokens that hold a byte of characters `[start, end)` of the text."""
    low, high = (len(rendering.text[:i].encode()) for i in (start, end))
    at, hit = 0, []
    for number, data in enumerate(token_bytes(renderer, rendering.ids)):
        if at < high and at + len(data) > low:
            hit.append(number)
        at += len(data)
    assert at == len(rendering.text.encode())
    return hit[0], hit[-1] + 1


def read(renderer, rendering, ref):
    start, end = rendering.interval(ref)
    return renderer.tokenizer.decode(rendering.ids[start:end])


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="@"), max_size=30)
hostile = st.sampled_from(
    ["</s>", "<|im_end|>", "<|im_start|>", " ", "\n\n", "\x1c\x1d", "M0c0x0am", "😀", "e\u0301", "</think>"]
)
contents = st.lists(words | hostile, max_size=5).map("".join)


@pytest.mark.parametrize("name", ["chatml", "llama3", "phi3", "mistral"])
@settings(max_examples=60)
@given(bodies=st.lists(contents, min_size=1, max_size=4), data=st.data())
def test_an_interval_holds_its_characters_and_no_token_more(renderers, name, bodies, data):
    renderer = renderers[name]
    messages = [Message("assistant" if i % 2 else "user", f"@{i}@{body}") for i, body in enumerate(bodies)]
    rendering = renderer.render(messages)
    i = data.draw(st.integers(0, len(messages) - 1))
    content = messages[i].content
    kept = content.rstrip() if name == "llama3" else content
    at = rendering.text.index(f"@{i}@")
    assert rendering.text[at : at + len(kept)] == kept
    assert rendering.interval(SpanRef(i)) == tokens_of(renderer, rendering, at, at + len(kept))
    start = data.draw(st.integers(0, len(kept) - 1))
    end = data.draw(st.integers(start + 1, len(kept)))
    got = rendering.interval(SpanRef(i, start=start, end=end))
    assert got == tokens_of(renderer, rendering, at + start, at + end)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("name", ["chatml", "qwen3", "picky"])
@settings(max_examples=60)
@given(value=st.dictionaries(words, json_values, min_size=1, max_size=3), compact=st.booleans(), data=st.data())
def test_characters_of_arguments_are_found_in_other_white_space(renderers, name, value, compact, data):
    renderer = renderers[name]
    arguments = json.dumps(value, ensure_ascii=False, separators=(",", ":") if compact else None)
    assume(json.loads(arguments) == value)
    call = ToolCall("c", "get_fare", arguments)
    rendering = renderer.render([Message("user", "{}"), Message("assistant", "@", (call, call))])
    start, end = rendering.interval(SpanRef(1, "tool_call", 1))
    rendered = json.dumps(value, ensure_ascii=False, indent=2 if name == "picky" else None)
    name_at = rendering.text.rindex("get_fare")
    at = rendering.text.index(rendered, name_at)
    assert (start, end) == tokens_of(renderer, rendering, name_at, at + len(rendered))
    i = data.draw(st.integers(0, len(arguments) - 1))
    chars = rendering.places[1, "tool_call", 1].characters(rendering.text, i, i + 1)
    if chars[0] < chars[1]:
        assert rendering.text[chars[0] : chars[1]].strip() == arguments[i].strip()
    else:
        assert arguments[i] == " ", "only white space between JSON tokens may get lost"


def test_every_part_that_stands_in_the_text_is_listed_in_order(renderers):
    messages = [
        Message("user", "go"),
        Message("assistant", "both", (ToolCall("c1", "f", "{}"), ToolCall("c2", "f", '{"a": 1}'))),
        Message("tool", "go", tool_call_id="c1"),
        Message("tool", "", tool_call_id="c2"),
    ]
    rendering = renderers["chatml"].render(messages)
    assert [(s.ref.message, s.ref.part, s.ref.call) for s in rendering.spans()] == [
        (0, "content", 0),
        (1, "content", 0),
        (1, "tool_call", 0),
        (1, "tool_call", 1),
        (2, "content", 0),
    ]
    shown = [rendering.text[p.start : p.end] for p in rendering.places.values()]
    assert shown == ["go", "both", 'f", "arguments": {}', 'f", "arguments": {"a": 1}', "go"]
    assert all((s.start, s.end) == rendering.interval(s.ref) for s in rendering.spans())


@pytest.mark.parametrize("head", ["", " ", "\n\n", "\t\x1c "])
@pytest.mark.parametrize("tail", ["", "\n", " \x1d\n\n"])
@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3", "json_xml"])
def test_white_space_at_the_edges_belongs_to_the_content_unless_it_is_trimmed(renderers, name, head, tail):
    content = f"{head}Oslo{tail}"
    rendering = renderers[name].render([Message("user", "a"), Message("tool", content), Message("user", " b ")])
    located = rendering.places[1, "content", 0]
    shown = rendering.text[located.start : located.end]
    if name == "llama3":
        assert shown == "Oslo"
        if head:
            with pytest.raises(SpanError, match="nothing of characters"):
                rendering.interval(SpanRef(1, end=len(head)))
    else:
        assert shown == (json.dumps(content, ensure_ascii=False)[1:-1] if name == "json_xml" else content)
    core = located.characters(rendering.text, len(head), len(head) + 4)
    assert rendering.text[slice(*core)] == "Oslo"


def test_text_that_is_escaped_as_json_is_found_character_by_character(renderers):
    content = 'say "hi"\n\tto\\Zürich 😀 <|im_end|>!'
    rendering = renderers["json_xml"].render([Message("tool", content)])
    located = rendering.places[0, "content", 0]
    for i, ch in enumerate(content):
        chars = located.characters(rendering.text, i, i + 1)
        assert rendering.text[slice(*chars)] == json.dumps(ch, ensure_ascii=False)[1:-1]


def test_marks_are_not_confused_by_messages_that_repeat_each_other(renderers):
    messages = [
        Message("user", "ok"),
        Message("assistant", "ok ok"),
        Message("user", "ok"),
        Message("assistant", "user"),
    ]
    rendering = renderers["chatml"].render(messages)
    starts = [rendering.interval(SpanRef(i))[0] for i in range(4)]
    assert starts == sorted(set(starts))
    assert [read(renderers["chatml"], rendering, SpanRef(i)) for i in range(4)] == [m.content for m in messages]


def test_the_system_prompt_is_found_where_the_template_moved_it(renderers):
    renderer = renderers["mistral"]
    messages = [Message("system", "Be brief."), Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    rendering = renderer.render(messages)
    assert read(renderer, rendering, SpanRef(0)).strip() == "Be brief."
    assert rendering.interval(SpanRef(0)) > rendering.interval(SpanRef(2))


# -- reasoning ----------------------------------------------------------------------------------------------------

THOUGHT = "<think>\nThe list says 380.\n</think>\n\nIt costs 380 euros."


def test_reasoning_inside_of_a_content_is_part_of_it_while_it_is_rendered(renderers):
    renderer = renderers["qwen3"]
    rendering = renderer.render([Message("user", "price?"), Message("assistant", THOUGHT)])
    located = rendering.places[1, "content", 0]
    assert rendering.text[located.start : located.end] == THOUGHT.removeprefix("<think>\n")
    at = THOUGHT.index("list")
    assert "list" in read(renderer, rendering, SpanRef(1, start=at, end=at + 4))


def test_reasoning_that_is_dropped_later_leaves_the_answer_to_retract(renderers):
    renderer = renderers["qwen3"]
    rendering = renderer.render([Message("user", "price?"), Message("assistant", THOUGHT), Message("user", "thanks")])
    assert "The list says" not in rendering.text
    located = rendering.places[1, "content", 0]
    assert rendering.text[located.start : located.end] == "It costs 380 euros."
    at = THOUGHT.index("380 euros")
    assert read(renderer, rendering, SpanRef(1, start=at, end=at + 3)).strip() == "380"
    with pytest.raises(SpanError, match=r"nothing of characters \[13, 17\)"):
        rendering.interval(SpanRef(1, start=13, end=17))
    assert rendering.leaves_out(SpanRef(1, start=13, end=17)) and not rendering.leaves_out(SpanRef(1))
    assert not rendering.leaves_out(SpanRef(1, start=13, end=at + 3))


def test_a_message_that_the_template_drops_is_known_to_be_left_out(renderers):
    messages = [Message("system", "user"), Message("user", "hello")]
    rendering = renderers["picky"].render(messages)
    assert rendering.leaves_out(SpanRef(0)) and not rendering.leaves_out(SpanRef(1))
    with pytest.raises(SpanError, match="message 0, content: .* leaves it out"):
        rendering.interval(SpanRef(0))


# -- templates that marks disturb ---------------------------------------------------------------------------------


def test_a_template_that_looks_at_the_first_character_is_marked_in_the_middle(renderers):
    renderer = renderers["picky"]
    messages = [Message("user", "/help me "), Message("assistant", "/ok\n"), Message("user", "/help me now")]
    rendering = renderer.render(messages)
    assert rendering.text.count("(command) ") == 2
    shown = [rendering.text[p.start : p.end] for p in (rendering.places[i, "content", 0] for i in range(3))]
    assert shown == ["/help me", "/ok\n", "/help me now"]
    assert read(renderer, rendering, SpanRef(0, start=1, end=5)).strip() == "help"


def test_a_name_that_is_repeated_with_the_result_is_found_in_the_call(renderers):
    renderer = renderers["picky"]
    call = ToolCall("c", "get_fare", '{"city":"Oslo"}')
    rendering = renderer.render([Message("assistant", "", (call,)), Message("tool", "380", tool_call_id="c")])
    assert rendering.text.count("get_fare") == 2
    assert read(renderer, rendering, SpanRef(0, "tool_call")).strip().startswith("get_fare json")
    start = call.arguments.index("Oslo")
    assert "Oslo" in read(renderer, rendering, SpanRef(0, "tool_call", start=start, end=start + 4))


def test_arguments_that_are_no_json_any_more_can_only_be_retracted_whole(renderers):
    renderer = renderers["json_xml"]
    call = ToolCall("c", "f", '{"a": "x", "city": "Oslo a"}')
    rendering = renderer.render([Message("assistant", "", (call,)), Message("tool", "Oslo a")])
    located = rendering.places[0, "tool_call", 0]
    assert rendering.text[located.start : located.end] == ("f>\n<parameter=a>x</parameter>\n<parameter=city>Oslo a")
    with pytest.raises(SpanError, match="retract the whole part"):
        rendering.interval(SpanRef(0, "tool_call", start=1, end=3))
    number = renderer.render([Message("assistant", "", (ToolCall("c", "f", '{"a": 1}'),)), Message("tool", '{"a": 1}')])
    with pytest.raises(SpanError, match="message 0, tool call 0: .* rewrites it"):
        number.interval(SpanRef(0, "tool_call"))


def test_a_call_without_arguments_does_not_take_those_of_its_neighbor(renderers):
    renderer = renderers["json_xml"]
    rendering = renderer.render([Message("assistant", "", (ToolCall("c", "f", "{}"),)), Message("tool", "{}")])
    located = rendering.places[0, "tool_call", 0]
    assert rendering.text[located.start : located.end] == "f"


@pytest.mark.parametrize("arguments", ['{"a": 1, "a": 2}', '{"a": 1e5}', '{"\\u0061": 1}'])
def test_arguments_that_the_template_rewrites_are_found_whole(renderers, arguments):
    rendering = renderers["chatml"].render([Message("assistant", "", (ToolCall("c", "f", arguments),))])
    located = rendering.places[0, "tool_call", 0]
    shown = json.dumps(json.loads(arguments))
    assert rendering.text[located.start : located.end].endswith(shown)
    with pytest.raises(SpanError, match="retract the whole part"):
        rendering.interval(SpanRef(0, "tool_call", start=2, end=4))


def test_malformed_arguments_are_found_character_by_character(renderers):
    call = ToolCall("c", "f", '{"city": "Os')
    rendering = renderers["chatml"].render([Message("assistant", "", (call,))])
    assert read(renderers["chatml"], rendering, SpanRef(0, "tool_call", start=10)).strip() in ("Os", '"Os', "Os}")


def test_a_text_that_the_template_writes_twice_cannot_be_retracted(renderers):
    tokenizer = type(renderers["chatml"].tokenizer)(tokenizer_object=renderers["chatml"].tokenizer.backend_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} again: {{ m.content }}\n{% endfor %}"
    rendering = Renderer(tokenizer).render([Message("user", "secret")])
    with pytest.raises(SpanError, match="rewrites it"):
        rendering.interval(SpanRef(0))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}"
    rendering = Renderer(tokenizer).render([Message("user", "secret"), Message("tool", "ALL CAPS")])
    assert not rendering.spans()


# -- ends and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatml", "llama3", "phi3"])
def test_the_end_of_a_message_includes_its_end_of_turn(renderers, name):
    renderer = renderers[name]
    messages = [Message("user", "one"), Message("assistant", "two"), Message("user", "three")]
    rendering = renderer.render(messages)
    ends = [rendering.end_of(i) for i in range(3)]
    parts = [renderer.tokenizer.decode(rendering.ids[a:b]) for a, b in zip([0, *ends], [*ends, None], strict=True)]
    assert [word in part for word, part in zip(["one", "two", "three"], parts, strict=False)] == [True] * 3
    assert parts[3].strip() in (
        "<|im_start|>assistant",
        "<|start_header_id|>assistant<|end_header_id|>",
        "<|assistant|>",
    )
    with pytest.raises(SpanError, match="0 to 2, got 3"):
        rendering.end_of(3)


def test_the_end_of_a_message_that_is_rendered_otherwise_later_is_unknown(renderers):
    rendering = renderers["mistral"].render(
        [Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    )
    with pytest.raises(SpanError, match="end of message 1 cannot be located"):
        rendering.end_of(1)


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        (SpanRef(2), "0 to 1, got 2"),
        (SpanRef(-1), "0 to 1, got -1"),
        (SpanRef(0, start=2, end=2), "message 0, content: .* 5 characters"),
        (SpanRef(0, start=3, end=2), r"\[3, 2\)"),
        (SpanRef(0, end=6), r"\[0, 6\)"),
        (SpanRef(0, start=-1), r"\[-1, 5\)"),
        (SpanRef(0, "tool_call"), "0 tool calls, got call 0"),
        (SpanRef(1, "tool_call", 1), "1 tool calls, got call 1"),
        (SpanRef(1, "tool_call", 0, 0, 9), r"tool call 0: .* 2 characters"),
        (SpanRef(1), "message 1, content: .* 0 characters"),
        (SpanRef(0, "reasoning"), "got 'reasoning'"),
    ],
)
def test_a_range_outside_of_the_thread_is_refused(renderers, ref, says):
    messages = [Message("user", "hello"), Message("assistant", "", (ToolCall("c", "f", "{}"),))]
    with pytest.raises(SpanError, match=says):
        renderers["chatml"].render(messages).interval(ref)


def test_white_space_alone_cannot_be_located(renderers):
    rendering = renderers["llama3"].render([Message("user", " \n "), Message("assistant", "a")])
    with pytest.raises(SpanError):
        rendering.interval(SpanRef(0))
    assert read(renderers["llama3"], rendering, SpanRef(1)) == "a"


def test_a_sentencepiece_tokenizer_gives_the_same_places(renderers):
    renderer = renderers["sentencepiece"]
    rendering = renderer.render(
        [Message("user", "the price </s> of Zürich 😀 is 380"), Message("assistant", "ok then")]
    )
    for text in ("price", "</s>", "Zürich", "😀", "380"):
        at = rendering.messages[0].content.index(text)
        assert text in read(renderer, rendering, SpanRef(0, start=at, end=at + len(text)))
    assert read(renderer, rendering, SpanRef(1)).strip() == "ok then"
