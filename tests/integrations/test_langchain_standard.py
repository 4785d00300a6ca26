"""LangChain's own suites, against the real engine with a model that has learnt their prompts."""

import pytest
from langchain_core.exceptions import OutputParserException
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from pydantic import BaseModel

from kv_retract.integrations.langchain import ChatKVRetract


class OnFixtureModel:
    """What both suites need to know."""

    session = None

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _open(cls, tool_engine):
        cls.session = tool_engine
        yield
        tool_engine.engine.check_integrity()

    @property
    def chat_model_class(self):
        return ChatKVRetract

    @property
    def chat_model_params(self):
        return {"session": self.session}

    @property
    def has_tool_calling(self):
        return True

    @property
    def has_tool_choice(self):
        return True

    @property
    def has_structured_output(self):
        return True

    @property
    def supports_json_mode(self):
        return True

    @property
    def supports_anthropic_inputs(self):
        return True

    @property
    def supports_model_override(self):
        """A session runs one model; another one per call is refused."""
        return False


class TestUnit(OnFixtureModel, ChatModelUnitTests):
    pass


class TestIntegration(OnFixtureModel, ChatModelIntegrationTests):
    @property
    def supported_usage_metadata_details(self):
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream=False):
        model = ChatKVRetract(session=self.session)
        model.invoke("Hello")
        if not stream:
            message = model.invoke("Hello")
        else:
            message = None
            for chunk in model.stream("Hello"):
                message = chunk if message is None else message + chunk
        assert message.usage_metadata["input_token_details"]["cache_read"] > 0
        return message


@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
def test_every_method_of_structured_output_gives_the_learnt_answer(chat, method):
    schema = {
        "title": "Joke",
        "type": "object",
        "properties": {"setup": {"type": "string"}, "punchline": {"type": "string"}},
        "required": ["setup", "punchline"],
    }
    result = chat.with_structured_output(schema, method=method, include_raw=True).invoke("Tell me a joke about cats.")
    assert result["parsing_error"] is None
    assert result["parsed"] == {
        "setup": "Why did the cat sit on the keyboard?",
        "punchline": "To keep an eye on the mouse.",
    }


def test_structured_output_without_a_schema_or_a_known_method(chat):
    with pytest.raises(ValueError, match="'function_calling' needs a schema; pass one, or method='json_mode'"):
        chat.with_structured_output()
    with pytest.raises(ValueError, match="expected method function_calling, json_schema, json_mode, got 'regex'"):
        chat.with_structured_output({"title": "Joke", "type": "object"}, method="regex")
    joke = chat.with_structured_output(method="json_mode").invoke("Tell me a joke about cats.")
    assert joke["punchline"] == "To keep an eye on the mouse."


@pytest.mark.parametrize("include_raw", [True, False])
def test_an_answer_that_is_cut_off_is_a_parsing_error(chat, include_raw):
    class Joke(BaseModel):
        setup: str

    model = chat.with_structured_output(Joke, method="json_schema", include_raw=include_raw, max_tokens=3)
    if include_raw:
        result = model.invoke("Tell me a joke about cats.")
        assert result["parsed"] is None and isinstance(result["parsing_error"], OutputParserException)
        assert result["raw"].response_metadata["finish_reason"] == "length"
    else:
        with pytest.raises(OutputParserException):
            model.invoke("Tell me a joke about cats.")
