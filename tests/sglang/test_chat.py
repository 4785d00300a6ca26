"""OpenAI chat traffic on a server with the plugin, and spans that are named by messages."""

import json

import pytest

from .servers import serving

pytestmark = [pytest.mark.sglang, pytest.mark.enable_socket]

SYSTEM = "You are an agent with tools. Keep your answers to one short sentence."
FACT = "The gate of flight Kel-42 is {}."
PARAMETERS = {"type": "object", "properties": {"flight": {"type": "string"}}, "required": ["flight"]}
TOOLS = [{"type": "function", "function": {"name": "get_gate", "description": "Look up it.", "parameters": PARAMETERS}}]
LOOK_UP = "Please look up the gate of flight Kel-42."
AGAIN = "Can you check the gate of flight Kel-42 for me?"
WRONG = 7
"""The message with the newest, wrong result."""


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def looked_up(request, call_id, result, reply):
    function = {"name": "get_gate", "arguments": '{"flight": "Kel-42"}'}
    return [
        say("user", request),
        say("assistant", None, tool_calls=[{"id": call_id, "type": "function", "function": function}]),
        say("tool", result, tool_call_id=call_id),
        say("assistant", reply),
    ]


def thread(*, wrong=None, first=None):
    """Two look-ups and a question; the second result is the one to take back."""
    return [
        first or say("system", SYSTEM),
        *looked_up(LOOK_UP, "c1", json.dumps({"result": FACT.format("Mar")}), "Done, I have it now."),
        *looked_up(AGAIN, "c2", wrong or json.dumps({"result": FACT.format("Sol")}), "I have looked that up."),
        say("user", "What is the gate of flight Kel-42?"),
    ]


def body(messages, extra_key=None, **more):
    return {
        "model": "reference", "messages": messages, "max_tokens": 48, "temperature": 0, "extra_key": extra_key, **more
    }  # fmt: skip


def chat(server, messages, extra_key, **more):
    """Return a message, and how many tokens of the prompt there were and were cached."""
    (choice,) = server.post(
        "/v1/chat/completions", body(messages, extra_key, return_meta_info=True, **more)
    )["choices"]  # fmt: skip
    return choice["message"], choice["meta_info"]["prompt_tokens"], choice["meta_info"]["cached_tokens"]


def streamed(server, messages, extra_key=None, **more):
    """Return contents, calls, finish reason and usage of a streamed answer."""
    asked = body(messages, extra_key, stream=True, stream_options={"include_usage": True}, **more)
    pieces, calls, reason, usage = [], {}, None, None
    with server.http.stream("POST", "/v1/chat/completions", json=asked) as stream:
        assert stream.status_code == 200, stream.read()
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert events.pop() == "[DONE]"
    for event in map(json.loads, events):
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            reason = choice.get("finish_reason") or reason
            pieces += [choice["delta"]["content"]] if choice["delta"].get("content") else []
            for call in choice["delta"].get("tool_calls") or ():
                name, arguments = calls.get(call["index"], ("", ""))
                function = call["function"]
                calls[call["index"]] = name + (function["name"] or ""), arguments + (function["arguments"] or "")
    return pieces, calls, reason, (usage["prompt_tokens"], usage["completion_tokens"])


def retract(server, messages, extra_key, span, *, status=200, **more):
    asked = {"extra_key": extra_key, "messages": messages, "spans": [span], "reason": "of another day", **more}
    return server.post("/kv_retract/retract", asked, status=status)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("plain"), "--plain") as running:
        yield running


@pytest.fixture
def name(request):
    return request.node.name


REQUESTS = {
    "one question": body([say("user", "What is the gate of flight Kel-42?")]),
    "system prompt": body(thread()),
    "tools": body(thread(), tools=TOOLS),
    "namespace": body(thread(), "other", tools=TOOLS),
    "tool call": body([say("system", SYSTEM), say("user", LOOK_UP)], tools=TOOLS),
    "stop": body(thread(), stop=["42"]),
    "several": body(thread(), n=2),
    "log-probabilities": body(thread(), logprobs=True, top_logprobs=2),
}


def told(answer):
    """Return what an answer says, without its ids, times and log-probabilities."""
    choices = []
    for choice in answer["choices"]:
        calls = [call["function"] for call in choice["message"].get("tool_calls") or ()]
        tokens = [token["token"] for token in (choice["logprobs"] or {}).get("content", ())]
        choices.append((choice["message"]["content"], calls, choice["finish_reason"], tokens))
    return choices, {key: answer["usage"][key] for key in ("prompt_tokens", "completion_tokens")}


@pytest.mark.parametrize("kind", REQUESTS)
def test_answers_are_those_of_a_plain_server(server, plain, kind):
    wanted = plain.post("/v1/chat/completions", REQUESTS[kind])
    found = server.post("/v1/chat/completions", REQUESTS[kind])
    assert told(found) == told(wanted)


@pytest.mark.parametrize("kind", ["system prompt", "tools", "tool call"])
def test_streams_are_those_of_a_plain_server(server, plain, kind):
    asked = {key: REQUESTS[kind].get(key) for key in ("messages", "tools") if REQUESTS[kind].get(key)}
    wanted, found = streamed(plain, **asked), streamed(server, **asked)
    assert ("".join(found[0]), *found[1:]) == ("".join(wanted[0]), *wanted[1:])
    if kind == "tool call":
        assert found[1:3] == ({0: ("get_gate", '{"flight": "Kel-42"}')}, "tool_calls")
    else:
        assert "".join(found[0]) == FACT.format("Sol") and len(found[0]) > 1


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["without tools", "tools"])
def test_a_span_named_by_its_message_is_found_when_the_messages_come_again(server, name, tools):
    more = {"tools": tools} if tools else {}
    before, tokens, _ = chat(server, thread(), name, **more)
    done = retract(server, thread(), name, {"message": WRONG}, **more)
    (made,) = done["retractions"]
    assert made["state"] == "steered" and done["edit"]["tokens_erased"] == made["end"] - made["start"]
    after, after_tokens, cached = chat(server, thread(), name, **more)
    assert (before["content"], after["content"]) == (FACT.format("Sol"), FACT.format("Mar"))
    assert after_tokens == tokens and tokens - 8 < cached < tokens
    longer = [
        *thread(),
        say("assistant", "Let me look again."),
        say("user", "Now, what was the gate of flight Kel-42?"),
    ]
    last, longer_tokens, cached = chat(server, longer, name, **more)
    assert last["content"] == FACT.format("Mar") and tokens - 8 < cached < longer_tokens
    assert "".join(streamed(server, longer, name, **more)[0]) == FACT.format("Mar")
    assert chat(server, thread(), f"{name}/other", **more)[0] == before, "another namespace is untouched"
    server.assert_alive()


def test_characters_are_those_tokens(server, loaded, name):
    """The interval is one of the server's own rendering, and holds the characters and little more."""
    content = thread()[WRONG]["content"]
    start = content.index("Sol")
    chat(server, thread(), name, tools=TOOLS)
    span = {"message": WRONG, "start": start, "end": start + 3}
    (made,) = retract(server, thread(), name, span, tools=TOOLS)["retractions"]
    ids = server.post("/v1/tokenize", {"model": "reference", "messages": thread(), "tools": TOOLS})["tokens"]
    text = loaded.tokenizer.decode(ids[made["start"] : made["end"]])
    assert "Sol" in text and len(text) < 8


UNUSUAL = {
    "text that looks like special tokens": thread(wrong=f"<|im_end|> {FACT.format('Sol')} <|im_start|>"),
    "text blocks": thread(wrong=[{"type": "text", "text": "Done."}, {"type": "text", "text": FACT.format("Sol")}]),
    "a developer's prompt": thread(first=say("developer", SYSTEM)),
    "a name": thread(first=say("system", SYSTEM, name="desk")),
    "arguments with spaces": [
        {**m, "tool_calls": [{**c, "function": {**c["function"], "arguments": '{ "flight":"Kel-42" }'}}
                             for c in m["tool_calls"]]} if "tool_calls" in m else m
        for m in thread()
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSUAL)
def test_whatever_the_server_makes_of_the_messages(server, name, kind):
    messages = UNUSUAL[kind]
    before, tokens, _ = chat(server, messages, name, tools=TOOLS)
    (made,) = retract(server, messages, name, {"message": WRONG}, tools=TOOLS)["retractions"]
    after, after_tokens, cached = chat(server, messages, name, tools=TOOLS)
    assert made["state"] == "steered" and after_tokens == tokens and tokens - 8 < cached < tokens
    assert FACT.format("Sol") in before["content"] and "Sol" not in after["content"]


def test_an_agents_own_calls_sent_back_as_they_came(server, name):
    messages = [say("system", SYSTEM)]
    for value in ("Mar", "Sol"):
        messages.append(say("user", LOOK_UP))
        answer, _, _ = chat(server, messages, name, tools=TOOLS)
        (call,) = answer["tool_calls"]
        messages += [answer, say("tool", json.dumps({"result": FACT.format(value)}), tool_call_id=call["id"])]
        messages.append(chat(server, messages, name, tools=TOOLS)[0])
    messages.append(say("user", "What is the gate of flight Kel-42?"))
    before, tokens, _ = chat(server, messages, name, tools=TOOLS)
    assert before["content"] == FACT.format("Sol")
    retract(server, messages, name, {"message": WRONG}, tools=TOOLS)
    after, _, cached = chat(server, messages, name, tools=TOOLS)
    assert after["content"] == FACT.format("Mar") and tokens - 8 < cached < tokens


def test_undo_brings_it_back_and_heal_makes_it_exact(server, name):
    before, tokens, _ = chat(server, thread(), name)
    (made,) = retract(server, thread(), name, {"message": WRONG}, policy="desk")["retractions"]
    (kept,) = server.post("/kv_retract/heal", {"extra_key": name})["retractions"]
    assert (kept["state"], kept["policy"], kept["reason"]) == ("exact", "desk", "of another day")
    after, after_tokens, _ = chat(server, thread(), name)
    assert after["content"] == FACT.format("Mar") and after_tokens == tokens - (made["end"] - made["start"])
    told = server.post("/kv_retract/undo", {"extra_key": name, "retraction_ids": [made["retraction_id"]]})
    assert [r["state"] for r in told["retractions"]] == server.states(name) == ["revoked"]
    again, again_tokens, _ = chat(server, thread(), name)
    assert again["content"] == before["content"] and again_tokens == tokens


BAD = {
    "no such message": ({"message": 99}, {}, "expected a message from 0 to 9, got 99"),
    "past the end": ({"message": WRONG, "start": 500, "end": 600}, {}, "got [500, 600)"),
    "empty": ({"message": 2}, {}, "at least one of its 0 characters"),
    "tokens of messages": ({"start": 7, "end": 9}, {}, "{message, start, end} with messages"),
    "both": ({"message": WRONG}, {"token_ids": [1, 2]}, "either token_ids or messages"),
    "no messages": ({"message": 0}, {"messages": []}, "at least one message"),
    "no role": ({"message": 0}, {"messages": [say("alien", "a")]}, "'role' must be one of"),
    "no tool": ({"message": WRONG}, {"tools": [{"nope": 1}]}, "tools.0.function: Field required"),
    "an image": ({"message": 0}, {"messages": [say("user", [{"type": "image_url", "image_url": {"url": "x"}}])]},
                 "'image_url' is not text"),
    "no thread": ({"message": WRONG}, {"extra_key": None}, "extra_key: Input should be a valid string"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_with_a_request_is_said(server, name, kind):
    span, more, message = BAD[kind]
    refused = retract(server, **{"messages": thread(), "extra_key": name, "span": span, "status": 400, **more})
    assert refused["error"] == "bad_request" and message in refused["message"]
    assert server.states(name) == []


@pytest.mark.parametrize("content", ["", "{nope", "[1]"])
def test_a_body_that_is_no_object_is_said(server, content):
    answer = server.http.post("/kv_retract/status", content=content)
    assert answer.status_code == 400 and answer.json()["error"] == "bad_request"
    assert "expected a JSON object" in answer.json()["message"]
