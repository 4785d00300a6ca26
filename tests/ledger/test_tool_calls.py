"""Tool calls in the answers of models."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_retract.errors import UnknownNameError
from kv_retract.ledger.tool_calls import TOOL_CALL_FORMATS, format_for_template

FORMATS = ["hermes", "llama3", "mistral", "qwen25"]


def parse(name, text):
    content, calls = TOOL_CALL_FORMATS.create(name).parse(text)
    return content, [(c.name, c.arguments) for c in calls]


@pytest.mark.parametrize("name", FORMATS)
def test_the_example_is_read_and_its_marks_are_in_it(name):
    form = TOOL_CALL_FORMATS.create(name)
    content, calls = form.parse(f"I will look.\n{form.example}")
    assert content == "I will look."
    assert [(c.name, json.loads(c.arguments)) for c in calls] == [("search", {"query": "weather"})]
    assert form.example.startswith(form.begin) and form.example.endswith(form.end)
    assert type(TOOL_CALL_FORMATS.create(form.name)) is type(form)


def test_ids_are_fresh():
    form = TOOL_CALL_FORMATS.create("hermes")
    ids = [c.id for _ in range(2) for c in form.parse(form.example * 2)[1]]
    assert len(set(ids)) == 4 and all(i.startswith("call_") and int(i[5:], 16) >= 0 for i in ids)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "text", ["", "No call here.", ' {"name": "Bob", "age": 3} ', "<tool_call>", "[TOOL_CALLS]", "{" * 3000]
)
def test_an_answer_without_calls_is_left_as_it_is(name, text):
    assert parse(name, text) == (text, [])


@pytest.mark.parametrize(
    ("name", "text", "want"),
    [
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a" : 1 }}\n</tool_call>', ("", [("f", '{"a" : 1 }')])),
        ("hermes", '<tool_call>{"arguments": {}, "name": "f"}', ("", [("f", "{}")])),
        (
            "hermes",
            'a\n<tool_call>\n{"name": "f", "arguments": {"x": "</tool_call>"}}\n</tool_call>\n<tool_call>\n'
            '{"name": "g", "arguments": "{\\"y\\": 2}"}\n</tool_call> b ',
            ("a\nb", [("f", '{"x": "</tool_call>"}'), ("g", '{"y": 2}')]),
        ),
        ("llama3", '{"name": "f", "parameters": {"a": 1}}', ("", [("f", '{"a": 1}')])),
        (
            "llama3",
            '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "arguments": {"a": []}}',
            ("", [("f", "{}"), ("g", '{"a": []}')]),
        ),
        ("llama3", 'Look:\n{"name": "f", "parameters": {}}\nDone.', ("Look:\nDone.", [("f", "{}")])),
        (
            "mistral",
            '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "]"}}, {"name": "g", "arguments": {}, "id": "abc"}]',
            ("", [("f", '{"a": "]"}'), ("g", "{}")]),
        ),
        (
            "mistral",
            'Sure.[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g{"b": 2}',
            ("Sure.", [("f", '{"a": 1}'), ("g", '{"b": 2}')]),
        ),
    ],
)
def test_calls_are_read_with_the_arguments_to_the_letter(name, text, want):
    assert parse(name, text) == want


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": }}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "f"}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "", "arguments": {}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "\\ud800", "arguments": {}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {}} and more </tool_call>'),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": ' + '{"a":' * 3000),
        ("llama3", 'As in {"name": "f", "parameters": {}} here'),
        ("llama3", '{"name": "f", "parameters": {}} here'),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}}'),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": }]'),
    ],
)
def test_malformed_calls_stay_in_the_content(name, text):
    assert parse(name, text) == (text, [])


def test_a_good_call_beside_a_malformed_one_is_read():
    bad, good = '<tool_call>{"name": }</tool_call>', '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert parse("hermes", bad + good) == (bad, [("f", "{}")])


@pytest.mark.parametrize("name", ["hermes", "llama3", "mistral"])
@pytest.mark.parametrize("piece", ["\n", " ", ";", "<|python_tag|>", "<tool_call>", "[TOOL_CALLS]", "[TOOL_CALLS]["])
def test_long_answers_are_parsed_in_linear_time(name, piece):
    text = piece * 50_000 + "x"
    began = time.perf_counter()
    assert parse(name, text) == (text, [])
    assert time.perf_counter() - began < 2


fragments = st.sampled_from(
    ['{"name": "f", ', '"arguments": {}', '"parameters": {}', "}", "[", "]", "\n", ";"]
    + ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "f[ARGS]{", "<|python_tag|>"]
)


@pytest.mark.parametrize("name", ["hermes", "llama3", "mistral"])
@given(text=st.text(max_size=200) | st.lists(fragments, max_size=12).map("".join))
def test_any_text_is_parsed_and_nothing_is_invented(name, text):
    content, calls = parse(name, text)
    assert all(c_name in text and arguments in text for c_name, arguments in calls)
    assert content == text if not calls else len(content) < len(text)


def test_the_template_tells_the_format():
    assert type(format_for_template("... [TOOL_CALLS] ...")).__name__ == "MistralToolCalls"
    assert (
        type(format_for_template("""{{ '{"name": "' + name + '", "parameters": ' }}""")).__name__
        == "Llama3JsonToolCalls"
    )
    assert type(format_for_template("""<tool_call> {"parameters": ... """)).__name__ == "HermesToolCalls"
    assert type(format_for_template("{{ message.content }}")).__name__ == "HermesToolCalls"
    with pytest.raises(UnknownNameError, match="hermes, llama3, mistral, qwen25"):
        TOOL_CALL_FORMATS.create("xml")
