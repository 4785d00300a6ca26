"""The fixture model as a directory that `load_model` takes: its weights, with the bundled tokenizer."""

import shutil
from pathlib import Path

import pytest

from kv_retract.integrations.langchain import ChatKVRetract
from kv_retract.planner import Planner
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
    """Build sessions that share nothing with other tests: each test has a namespace of its own."""

    def build(*, name=None, **options):
        # Short suffixes are steered too, or these short threads would all be recomputed.
        options.setdefault("planner", Planner(exact_suffix=0))
        return KVRetractSession(
            tool_engine.engine, tool_engine.renderer, extra_key=name or request.node.nodeid, **options
        )

    return build


@pytest.fixture
def chat(new_session):
    return ChatKVRetract(session=new_session())
