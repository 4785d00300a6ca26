"""Grammars in llguidance's Lark dialect: JSON of a schema, tool calls, and text that holds no call."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConstraintError

# As json.dumps writes it, and so chat templates: an answer that is rendered again keeps its tokens.
_JSON_STYLE = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False, "lenient": True}

_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMAS = ("items", "additionalProperties", "contains")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSyntax:
    """How a model writes a tool call: `begin {"name": ..., "<arguments_key>": {...}} end`."""

    begin: str
    """What stands before the JSON object, white space included. Empty where nothing announces a call."""
    end: str
    """What stands behind it."""
    arguments_key: str = "arguments"
    separator: str = "\n"
    """Between two calls."""
    marker: str = ""
    """What a text without calls must not hold; by default `begin`, stripped."""
    listed: bool = False
    """Whether all calls share one `begin` and `end`, as elements of one JSON array."""

    @classmethod
    def from_example(cls, example: str, *, marker: str = "") -> CallSyntax:
        """Read the syntax off one call as the model writes it (`ToolCallFormat.example`).

        Raises:
            ConstraintError: the example holds no JSON object with `name` and one other key.
        """
        start = max(example.find("{"), 0)
        try:
            call, end = json.JSONDecoder().raw_decode(example, start)
            _, key = call
        except ValueError as error:
            raise ConstraintError(
                f"expected a tool call as a JSON object with its name and its arguments, got {example!r}"
            ) from error
        listed = example[:start].endswith("[") and example[end:].startswith("]")
        begin, end_text = example[: start - listed], example[end + listed :]
        return cls(begin=begin, end=end_text, arguments_key=key, listed=listed, marker=marker)


class Literals:
    """Writes fixed texts as grammar symbols: added tokens by id, since only the template may spell them otherwise.

    Args:
        added_tokens: text to id of the tokens that stand outside of the tokenizer's merges.
    """

    def __init__(self, added_tokens: Mapping[str, int]) -> None:
        self._ids = dict(added_tokens)
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if self._ids else r"(?!)()")

    def __call__(self, text: str) -> str:
        """Return the symbols for a text; empty for an empty one."""
        parts = [part for part in self._pattern.split(text) if part]
        return " ".join(f"<[{self._ids[p]}]>" if p in self._ids else json.dumps(p, ensure_ascii=False) for p in parts)

    def holds_token(self, text: str) -> bool:
        """Whether an added token begins the text: the lexer then sees the border by itself."""
        return bool(self._pattern.match(text))


def json_grammar(schema: Mapping[str, Any] | None) -> str:
    """Return a grammar for JSON of a schema, or for any JSON object; raises ConstraintError where it is no object."""
    return f"start: {_json({'type': 'object'} if schema is None else schema)}\n"


def tool_grammar(
    tools: Sequence[Mapping[str, Any]],
    syntax: CallSyntax,
    literals: Literals,
    *,
    choice: str,
    parallel: bool,
    answer: Mapping[str, Any] | None,
) -> str:
    """Return a grammar for answers with or without tool calls; arguments as in `ConstraintCompiler.tools`.

    Raises:
        ConstraintError: `choice` is neither a mode nor the name of a tool, or a schema is no object.
    """
    functions = [tool.get("function", tool) for tool in tools]
    names = [function["name"] for function in functions]
    if choice not in ("auto", "required", "none", *names):
        raise ConstraintError(
            f"expected tool choice auto, required, none or one of the tools ({', '.join(names) or 'none'}), "
            f"got {choice!r}"
        )
    rules = _text_rules(syntax) if answer is None else [f"text: {_json(answer)}"]
    if choice == "none" or not functions:
        return _lark(["start: text", *rules])
    named = [function for function in functions if function["name"] == choice]
    rules += _call_rules(named or functions, syntax)
    calls = _calls(syntax, literals, several=parallel and not named)
    if choice == "auto":
        return _lark([*_auto_rules(syntax, literals, calls, answer), *rules])
    return _lark([f"start: {calls}", *rules])


def close_objects(schema: Any) -> Any:
    """Return a schema whose objects allow only the properties they list, where it does not say otherwise.

    Generated schemas of functions leave `additionalProperties` out and mean that there are none. A schema that
    describes an object in several places at once (`allOf`, or alternatives beside properties) is returned as it is:
    closed parts would exclude each other.
    """
    return schema if _combines(schema) else _close(schema)


def _combines(schema: Any) -> bool:
    if not isinstance(schema, Mapping):
        return False
    all_of = schema.get("allOf")
    places = sum(key in schema for key in ("properties", "$ref", "anyOf", "oneOf"))
    places += len(all_of) if isinstance(all_of, list) else 0
    children = [child for key in _MAPS if isinstance(schema.get(key), Mapping) for child in schema[key].values()]
    children += [child for key in _LISTS if isinstance(schema.get(key), list) for child in schema[key]]
    children += [schema[key] for key in _SCHEMAS if key in schema]
    return places > 1 or any(map(_combines, children))


def _close(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    closed = dict(schema)
    for key in _MAPS:
        if isinstance(closed.get(key), Mapping):
            closed[key] = {name: _close(value) for name, value in closed[key].items()}
    for key in _SCHEMAS:
        if key in closed:
            closed[key] = _close(closed[key])
    for key in _LISTS:
        if isinstance(closed.get(key), list):
            closed[key] = [_close(value) for value in closed[key]]
    if "properties" in closed:
        closed.setdefault("additionalProperties", False)
    return closed


def _json(schema: Any) -> str:
    if not isinstance(schema, Mapping):
        raise ConstraintError(f"expected a JSON schema as an object, got {schema!r}")
    return "%json " + json.dumps({**close_objects(schema), "x-guidance": _JSON_STYLE}, ensure_ascii=False)


def _call_rules(functions: Sequence[Mapping[str, Any]], syntax: CallSyntax) -> list[str]:
    """Rules `call` and, for each function, `call_i`: one JSON object."""
    rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(functions)))]
    for i, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "{syntax.arguments_key}": '
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        rules += [f'call_{i}: {json.dumps(head, ensure_ascii=False)} arguments_{i} "}}"']
        rules += [f"arguments_{i}: {_json(parameters)}"]
    return rules


def _calls(syntax: CallSyntax, literals: Literals, *, several: bool) -> str:
    begin, end = literals(syntax.begin), literals(syntax.end)
    if syntax.listed:
        return f'{begin} "[" call {"(" + json.dumps(", ") + " call)*" if several else ""} "]" {end}'
    one = f"{begin} call {end}"
    return f"{one} ({literals(syntax.separator)} {one})*" if several else one


def _text_rules(syntax: CallSyntax) -> list[str]:
    marker = syntax.marker or syntax.begin.strip()
    without = f" & ~/(?s:.*){re.escape(marker).replace('/', chr(92) + '/')}(?s:.*)/" if marker else ""
    return ["text: TEXT", f"TEXT: /(?s:.*)/{without}"]


def _auto_rules(syntax: CallSyntax, literals: Literals, calls: str, answer: Mapping[str, Any] | None) -> list[str]:
    """Text, then calls. One or the other where a schema rules the text, or nothing announces a call."""
    if answer is not None or not syntax.begin.strip():
        return [f"start: text | {calls}"]
    if literals.holds_token(syntax.begin):
        return [f"start: text | text {calls}"]
    # Without a token of its own, the beginning of a call is a lexeme: the shortest text that ends with it.
    rest = calls.removeprefix(literals(syntax.begin))
    return [f"start: text | head {rest}", f"head[lazy]: /(?s:.*)/ {literals(syntax.begin)}"]


def _lark(rules: Sequence[str]) -> str:
    return "\n".join(rules) + "\n"
