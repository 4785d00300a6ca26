"""LangChain's tools, tool choices and response formats in the forms that a session and its constraints take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from kv_retract.engine.base import LogitsProcessor
from kv_retract.engine.constraint import ConstraintCompiler

Tool = Mapping[str, Any] | type | Callable[..., Any] | BaseTool


def to_openai_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Convert functions, classes, schemas and tools to OpenAI function tools."""
    return [convert_to_openai_tool(dict(tool) if isinstance(tool, Mapping) else tool) for tool in tools]


def normalize_choice(choice: Any, tools: Sequence[Mapping[str, Any]]) -> str:
    """Return `auto`, `required`, `none` or the name of a tool.

    Args:
        choice: None, one of these, `any`, a boolean, or OpenAI's `{"type": "function", "function": {"name": ...}}`.
            True asks for the one tool there is.
        tools: OpenAI function tools.

    Raises:
        ValueError: it is something else, or names a tool that is not there.
    """
    names: list[str] = [tool["function"]["name"] for tool in tools]
    if choice is True and len(names) == 1:
        return names[0]
    given = choice
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        choice = function.get("name", choice.get("type", given)) if isinstance(function, Mapping) else given
    if isinstance(choice, str) and choice in names:
        return choice
    modes = {mode: mode for mode in ("auto", "required", "none")}
    modes |= {None: "auto", False: "auto", True: "required", "any": "required"}
    mode = modes.get(choice) if isinstance(choice, str | bool | None) else None
    if mode is None:
        raise ValueError(
            f"expected tool_choice auto, any, required, none, a boolean or one of the tools "
            f"({', '.join(names) or 'none bound'}), got {given!r}"
        )
    if mode == "required" and not names:
        raise ValueError(f"tool_choice {choice!r} asks for a tool call but no tool is bound; call bind_tools first")
    return mode


def schema_of(response_format: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the JSON schema that an OpenAI `response_format` asks for; None for text.

    Raises:
        ValueError: the format is unknown, or `json_schema` comes without a schema.
    """
    kind = response_format.get("type") if response_format else "text"
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    schema = (response_format.get("json_schema") or {}).get("schema")
    if kind != "json_schema" or not isinstance(schema, Mapping):
        raise ValueError(
            "expected response_format text, json_object, or json_schema with json_schema.schema, got "
            f"{response_format!r}"
        )
    return dict(schema)


def constraint_for(
    compiler: Callable[[], ConstraintCompiler],
    tools: Sequence[Mapping[str, Any]],
    *,
    choice: str,
    schema: Mapping[str, Any] | None,
    parallel: bool,
    strict: bool,
) -> LogitsProcessor | None:
    """Return what keeps an answer in its form; None where any text will do.

    Args:
        compiler: called only where there is something to constrain.
        tools: OpenAI function tools; empty where there are none.
        choice: see `normalize_choice`.
        schema: of the answer, where it is no call.
        parallel: whether there may be several calls.
        strict: whether calls that the model makes of its own accord must fit their schemas.
    """
    if tools and (choice != "auto" or strict or schema is not None):
        return compiler().tools(tools, choice=choice, parallel=parallel, answer=schema)
    return compiler().json(schema) if schema is not None else None
