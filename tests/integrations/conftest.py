"""The fixture model as a directory that `load_model` takes: its weights, with the bundled tokenizer."""

import runpy
import shutil
from itertools import chain, repeat
from pathlib import Path

import pytest
from langchain.agents import create_agent
from langchain_core.tools import tool

from kv_retract.integrations.langchain import ChatKVRetract, KVRetractMiddleware
from kv_retract.planner import Planner
from kv_retract.policies.superseded import SupersededToolResult
from kv_retract.reference import TOKENIZER_DIR
from kv_retract.session import KVRetractSession

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tool_model"


@pytest.fixture(scope="session")
def tool_model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tool-model"
    shutil.copytree(TOKENIZER_DIR, folder)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURE / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def tool_engine(tool_model_dir):
    """One engine for the whole run; sessions on it take a namespace each."""
    return KVRetractSession.from_pretrained(str(tool_model_dir), max_tokens=32_768)


@pytest.fixture
def new_session(tool_engine, request):
    """Build sessions that share nothing with other tests, nor with those of another name."""

    def build(*, name="", **options):
        # Short suffixes are steered too, or these short threads would all be recomputed.
        options.setdefault("planner", Planner(exact_suffix=0))
        namespace = f"{request.node.nodeid} {name}"
        return KVRetractSession(tool_engine.engine, tool_engine.renderer, extra_key=namespace, **options)

    return build


@pytest.fixture
def chat(new_session):
    return ChatKVRetract(session=new_session())


@pytest.fixture
def new_get_price():
    """Build a tool that the model has learnt to call: it finds three prices, and from then on the last of them."""

    def build():
        learnt = runpy.run_path(str(FIXTURE / "teacher.py"))["PRICES"]
        prices = chain(learnt, repeat(learnt[-1]))

        @tool
        def get_price(item: str) -> str:
            """Look up the price of an item."""
            return next(prices)

        return get_price

    return build


@pytest.fixture
def get_price(new_get_price):
    return new_get_price()


@pytest.fixture
def shop(new_session, get_price):
    """Build (agent, session): an agent that asks for prices, and takes older ones back."""

    def build(*, outer=(), inner=(), session=None, tools=(), model=None, guarantee="steered", **options):
        session = session or new_session(policies=[SupersededToolResult(guarantee=guarantee)])
        agent = create_agent(
            model or ChatKVRetract(session=session),
            list(tools) or [get_price],
            middleware=[*outer, KVRetractMiddleware(session), *inner],
            **options,
        )
        return agent, session

    return build
