"""Sessions and the chat model on an SGLang server; a fake one with the embedded engine behind it."""

from functools import partial

import httpx
import pytest
from langchain_core.tools import tool

from kv_retract.erasers import KVEraserEraser
from kv_retract.errors import (
    ConstraintError,
    EraserMismatchError,
    KVRetractError,
    ServerError,
    UnsupportedError,
    UnsupportedModelError,
)
from kv_retract.integrations.langchain import ChatKVRetract
from kv_retract.integrations.sglang import SGLangEngine, engine
from kv_retract.integrations.sglang.engine import connect
from kv_retract.planner import Planner
from kv_retract.session import KVRetractSession
from kv_retract.types import Guarantee, Message, Retraction, SamplingParams, SpanRef, Status

from .sglang_fakes import KVERASER, URL, EmbeddedServer

# -- sessions on it -------------------------------------------------------------------------------------------------

QUESTION = "Which of them is right?"
THREAD = [
    Message("system", "You are a helpful agent."),
    Message("user", "The meeting is on Monday, and the room is 214, says the first mail."),
    Message("user", "The meeting is on Friday, says the second mail. " * 3),
    Message("user", QUESTION),
]


@pytest.fixture(scope="module")
def embedded():
    return KVRetractSession.from_pretrained(max_tokens=8192)


@pytest.fixture
def server(embedded):
    return EmbeddedServer(embedded.engine)


def proposal(**options):
    return Retraction(span=SpanRef(1), policy="test", reason="test", **options)


def run(session):
    """Answer, take the first mail back, answer again; return both results and what the edit did."""
    first = session.step("t", THREAD, sampling=SamplingParams(max_tokens=6, logprobs=True))
    session.retract("t", THREAD, proposals=[proposal()])
    erased = session.last_erase("t")
    return first, session.step("t", THREAD, sampling=SamplingParams(max_tokens=6, logprobs=True)), erased


def test_a_session_behaves_as_on_the_embedded_engine(embedded, server):
    options = dict(eraser="kveraser", planner=Planner(exact_suffix=0))
    ours = KVRetractSession(
        SGLangEngine(URL, transport=httpx.MockTransport(server)), embedded.renderer, extra_key="served", **options
    )
    theirs = KVRetractSession(embedded.engine, embedded.renderer, extra_key="here", **options)
    (first, second, erased), (first_here, second_here, erased_here) = run(ours), run(theirs)
    assert (first.token_ids, first.logprobs) == (first_here.token_ids, first_here.logprobs)
    assert (second.token_ids, second.logprobs) == (second_here.token_ids, second_here.logprobs)
    assert second.num_cached_tokens == second_here.num_cached_tokens == second.num_prompt_tokens - 1
    assert (erased.tokens_erased, erased.tokens_moved) == (erased_here.tokens_erased, erased_here.tokens_moved)
    assert erased.tokens_erased > 10 and len(server.edits) == 1
    assert [r.status for r in ours.history("t")] == [Status.STEERED]
    embedded.engine.check_integrity()


def test_a_session_goes_on_after_the_server_lost_its_cache(embedded, server):
    session = connect(URL, transport=httpx.MockTransport(server), extra_key="lost", planner=Planner(exact_suffix=0))
    run(session)
    embedded.engine.purge(session.key("t", THREAD), 0)
    again = session.step("t", THREAD, sampling=SamplingParams(max_tokens=6))
    assert [r.status for r in session.history("t")] == [Status.EXACT] and again.num_cached_tokens == 0
    key = session.key("t", THREAD)
    assert (key.ids >= 0).all(), "the span is left out"
    embedded.engine.purge(key, 0)


def test_a_guarantee_is_kept_by_what_the_next_request_prefills(embedded, server):
    session = connect(URL, transport=httpx.MockTransport(server), extra_key="secret")
    session.step("t", THREAD, sampling=SamplingParams(max_tokens=6))
    before = session.key("t", THREAD)
    session.retract("t", THREAD, proposals=[proposal(guarantee=Guarantee.EXACT)])
    (record,) = session.history("t")
    assert record.status is Status.EXACT and server.edits == []
    assert session.engine.cached(before) < len(before) // 2
    result = session.step("t", THREAD, sampling=SamplingParams(max_tokens=6))
    assert result.num_prompt_tokens < len(before)


def test_connecting_tells_at_once_what_the_server_cannot_do(server, tmp_path):
    reach = partial(connect, URL, transport=httpx.MockTransport(server))
    assert reach().eraser.eraser_id == KVERASER.eraser_id
    assert reach(eraser="recompute").eraser.exact
    with pytest.raises(UnsupportedError, match="'mask' cannot run"):
        reach(eraser="mask")
    with pytest.raises(EraserMismatchError, match="blind"):
        reach(eraser=KVEraserEraser(variant="blind"))
    with pytest.raises(UnsupportedModelError, match="directory of the served model's tokenizer, got"):
        connect(URL, tmp_path / "none", transport=httpx.MockTransport(server))


# -- the chat model -------------------------------------------------------------------------------------------------


@pytest.fixture
def served_chat(server, monkeypatch):
    """Build chat models that reach the fake by its URL."""
    reach = {"transport": httpx.MockTransport(server)}
    monkeypatch.setattr(engine, "SGLangEngine", lambda url, **options: SGLangEngine(url, **options | reach))
    return partial(ChatKVRetract, engine=URL)


@tool
def get_price(item: str) -> str:
    """Look up the price of an item."""
    return "12 EUR"


def test_a_chat_model_takes_the_url_of_a_server(served_chat, embedded):
    chat = served_chat(max_tokens=8)
    assert isinstance(chat.session.engine, SGLangEngine) and chat.session.eraser.name == "kveraser"
    here = ChatKVRetract(session=embedded, max_tokens=8)
    assert chat.invoke("Hello").text == here.invoke("Hello").text
    assert chat.profile["max_input_tokens"] == here.profile["max_input_tokens"]
    assert (chat.profile["tool_choice"], here.profile["tool_choice"]) == (False, True)


def test_tools_work_as_the_model_likes_and_not_by_force(served_chat):
    chat = served_chat(max_tokens=8)
    chat.bind_tools([get_price]).invoke("What is the price of tea?")
    for forced in (
        chat.bind_tools([get_price], tool_choice="any"),
        chat.bind_tools([get_price], strict=True),
        chat.with_structured_output({"title": "answer", "type": "object", "properties": {}}),
    ):
        with pytest.raises(ConstraintError, match="tool_choice 'auto'"):
            forced.invoke("What is the price of tea?")


def test_a_session_and_an_engine_are_one_too_many(embedded):
    with pytest.raises(ValueError, match=f"expected a session or an engine, got both.*leave '{URL}' out"):
        ChatKVRetract(session=embedded, engine=URL)


def test_every_error_of_the_client_is_one_of_ours():
    assert all(issubclass(error, KVRetractError) for error in (ServerError, UnsupportedError))
    assert issubclass(ServerError, ConnectionError) and issubclass(UnsupportedError, NotImplementedError)
