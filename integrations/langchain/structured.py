"""Structured output: a schema in, parsed objects out."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any, Literal, get_args

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.base import BaseGenerationOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

Method = Literal["function_calling", "json_schema", "json_mode"]
Parser = BaseOutputParser[Any] | BaseGenerationOutputParser[Any]


def structured_output(
    model: BaseChatModel,
    schema: Mapping[str, Any] | type | None,
    *,
    method: Method,
    include_raw: bool,
    **bound: Any,
) -> Runnable[LanguageModelInput, Any]:
    """Return the model with its answers constrained to a schema, and parsed.

    Args:
        model: the chat model.
        schema: a Pydantic class, a TypedDict, a JSON schema or an OpenAI tool. Only `json_mode` goes without.
        method: `function_calling` shows the schema to the model as a tool that it must call; `json_schema` only
            constrains the answer; `json_mode` asks for any JSON object.
        include_raw: return `{"raw", "parsed", "parsing_error"}` instead of raising where parsing fails.
        **bound: further settings for the model.

    Raises:
        ValueError: the method is unknown, or the schema is missing.
    """
    if method not in get_args(Method):
        raise ValueError(f"expected method {', '.join(get_args(Method))}, got {method!r}")
    if schema is None and method != "json_mode":
        raise ValueError(f"method {method!r} needs a schema; pass one, or method='json_mode' for any JSON object")
    if schema is not None:
        given = dict(schema) if isinstance(schema, Mapping) else schema
        bound["ls_structured_output_format"] = {
            "kwargs": {"method": method},
            "schema": convert_to_json_schema(given),
        }
    if method == "function_calling":
        tool = convert_to_openai_tool(given)
        llm = model.bind_tools([tool], tool_choice=tool["function"]["name"], **bound)
        parser = _call_parser(given, tool["function"]["name"])
    else:
        llm = model.bind(response_format=_response_format(schema, method), **bound)
        parser = _text_parser(schema)
    return _with_raw(llm, parser) if include_raw else llm | parser


def _response_format(schema: Any, method: Method) -> dict[str, Any]:
    if method == "json_mode":
        return {"type": "json_object"}
    json_schema = convert_to_json_schema(schema)
    return {"type": "json_schema", "json_schema": {"name": json_schema.get("title", "answer"), "schema": json_schema}}


def _call_parser(schema: Any, name: str) -> Parser:
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return PydanticToolsParser(tools=[schema], first_tool_only=True)
    return JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)


def _text_parser(schema: Any) -> Parser:
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return PydanticOutputParser(pydantic_object=schema)
    return JsonOutputParser()


def _with_raw(llm: Runnable[Any, Any], parser: Parser) -> Runnable[Any, Any]:
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=llm) | parsed.with_fallbacks([failed], exception_key="parsing_error")
