"""Messages to token ids through the tokenizer's chat template; the only code that sees a template.

The ids are those of `tokenizer.apply_chat_template(..., tokenize=True)`, with one difference: a string that looks like
a special token stays plain text where it comes from a message or a tool, so that no content can end its own turn.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

from ..errors import MessageError, SpanError
from ..types import Message, SpanRef
from .encode import Guard, encode, special_tokens
from .locate import CALLS, Place, Style, arguments_of, locate, mark_call, mark_content, styles_for
from .located import Located
from .marks import Marks
from .rendering import Rendering
from .tool_calls import TOOL_CALL_FORMATS, ToolCallFormat, format_for_template

__all__ = ["Renderer", "Rendering"]

Tools = Sequence[Mapping[str, Any]]


class Renderer:
    """Renders threads with one tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer with a chat template.
        template_kwargs: further variables for the template, such as `{"enable_thinking": False}`.
        tool_call_format: how the model writes tool calls: a registered name. None: guessed from the template.
        keep: how many of the newest renderings are kept for those who ask again.

    Raises:
        ValueError: the tokenizer has no chat template or gives no character offsets.
        UnknownNameError: no tool-call format has this name.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        tool_call_format: str | None = None,
        keep: int = 16,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"expected a fast tokenizer, since spans need character offsets, got {type(tokenizer).__name__!r}; "
                "load it with use_fast=True or convert it to tokenizer.json"
            )
        if not tokenizer.chat_template:
            raise ValueError(
                "expected a tokenizer with a chat template, got one without; set tokenizer.chat_template to that of "
                "the model's instruct version"
            )
        self.tokenizer = tokenizer
        self._kwargs = dict(template_kwargs or {})
        self._specials = special_tokens(tokenizer)
        self.tool_calls: ToolCallFormat = (
            TOOL_CALL_FORMATS.create(tool_call_format)
            if tool_call_format
            else format_for_template(str(tokenizer.chat_template))
        )
        self._recent: deque[tuple[Any, Rendering]] = deque(maxlen=keep)
        self._silent = {i for text, i in self._specials.items() if text not in self.tool_calls.keep}
        self.stop_token_ids: tuple[int, ...] = self._stop_token_ids()
        """Ids that end an assistant turn: the end-of-text token, and what the template writes behind an answer."""

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        notices: Mapping[int, str] | None = None,
        add_generation_prompt: bool = True,
    ) -> Rendering:
        """Render messages to token ids. Linear in the length of the thread; asked for the same again, it is at hand.

        Args:
            messages: the thread, oldest first; at least one.
            tools: OpenAI function tools, for templates that list them.
            notices: texts to append to the content of messages, by index; no part of those contents.
            add_generation_prompt: end with the beginning of an assistant turn.

        Raises:
            MessageError: there is no message, a text is not valid Unicode, or the template refuses the messages.
        """
        messages, notices = tuple(messages), dict(notices or {})  # the caller's may grow; places are found later
        # A step asks for the same twice: to plan, and to answer. Lengths tell most others apart.
        asked = (len(messages), add_generation_prompt, messages, notices, json.dumps(tools, default=str))
        for known, rendering in tuple(self._recent):
            if known == asked:
                return rendering
        rendering = self._render(messages, tools, notices, add_generation_prompt)
        self._recent.append((asked, rendering))
        return rendering

    def _render(
        self,
        messages: tuple[Message, ...],
        tools: Tools | None,
        notices: Mapping[int, str],
        add_generation_prompt: bool,
    ) -> Rendering:
        _check(messages, tools, notices)
        nonce = _nonce(messages, tools, notices)
        guard = Guard(list(self._specials), f"{nonce}g")
        given = guard.hide(list(tools)) if tools else None
        source = _Source(messages, {i: f"\n\n{guard.hide(text)}" for i, text in notices.items()}, guard)
        plain = source.for_template()
        pieces = guard.split(self._apply(plain, given, add_generation_prompt))
        text = "".join(piece for piece, _ in pieces)

        def text_up_to(message: int) -> str:
            return guard.join(self._apply(plain[: message + 1], given, False))

        apply = partial(self._apply, tools=given, add_generation_prompt=add_generation_prompt)
        find_places = partial(_places, text, source, apply, Marks(f"{nonce}m"))
        return Rendering(messages, text, encode(self.tokenizer, pieces), find_places, text_up_to)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens, those aside with which models write tool calls."""
        kept = [i for i in ids if i not in self._silent]
        text: str = self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _apply(self, messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False, **self._kwargs
            )
        except Exception as error:  # templates raise whatever they like, through jinja2
            roles = ", ".join(m["role"] for m in messages[:12]) + (", ..." if len(messages) > 12 else "")
            raise MessageError(
                f"the chat template refuses these messages (roles: {roles}): {error or type(error).__name__}; change "
                "their order or roles as it asks"
            ) from error
        return text

    def _stop_token_ids(self) -> tuple[int, ...]:
        ids = {self.tokenizer.eos_token_id} - {None}
        try:
            rendering = self.render([Message("user", "a"), Message("assistant", "b")], add_generation_prompt=False)
            _, end = rendering.interval(SpanRef(1))
        except (MessageError, SpanError):
            return tuple(sorted(ids))
        special = set(self._specials.values())
        behind = [i for i in rendering.ids[end:].tolist() if i in special]
        return tuple(sorted(ids | set(behind[:1])))


@dataclass(frozen=True, slots=True)
class _Source:
    """What is rendered: once as it is, once or more with marks."""

    messages: Sequence[Message]
    added: Mapping[int, str]
    """Text behind the contents of messages, hidden already."""
    guard: Guard

    def for_template(self, style: Style | None = None, marks: Marks | None = None) -> list[dict[str, Any]]:
        """Return the messages as chat templates expect them."""
        hide = self.guard.hide
        dicts = []
        for i, m in enumerate(self.messages):
            content = hide(m.content)
            if style and marks and m.role in style.groups:
                content = mark_content(m.content, i, style, marks, hide)
            data: dict[str, Any] = {"role": m.role, "content": content + self.added.get(i, "")}
            functions = [{"name": hide(c.name), "arguments": hide(arguments_of(c))} for c in m.tool_calls]
            if style and marks and CALLS in style.groups:
                for c, function in enumerate(functions):
                    mark_call(function, i, c, marks)
            if functions:
                data["tool_calls"] = [
                    {"id": hide(call.id), "type": "function", "function": function}
                    for call, function in zip(m.tool_calls, functions, strict=True)
                ]
            optional = {"tool_call_id": m.tool_call_id, "name": m.name, "reasoning_content": m.reasoning or None}
            data.update({key: hide(value) for key, value in optional.items() if value is not None})
            dicts.append(data)
        return dicts


def _places(
    text: str, source: _Source, apply: Callable[[list[dict[str, Any]]], str], marks: Marks
) -> dict[Place, Located]:
    """Render with marks until each group of messages came out as without them, and read where they stand."""
    places: dict[Place, Located] = {}
    done: set[str] = set()
    for number, styles in enumerate(styles_for(source.messages)):
        for style in styles:
            if style.groups <= done:
                continue
            try:
                marked = source.guard.join(apply(source.for_template(style, marks)))
            except MessageError:
                continue  # the marks themselves offend the template
            unmarked, found = marks.read(marked)
            if unmarked == text:
                places |= locate(text, found, source.messages, style)
                done |= style.groups
        if number == 0 and done:
            break
    return places


def _check(messages: Sequence[Message], tools: Tools | None, notices: Mapping[int, str]) -> None:
    if not messages:
        raise MessageError("expected at least one message, got none; begin the thread with a system or user message")
    for i, m in enumerate(messages):
        optional = (m.name or "", m.tool_call_id or "")
        calls = (text for call in m.tool_calls for text in (call.id, call.name, call.arguments))
        for text in (m.content, m.reasoning, *optional, *calls):
            _check_unicode(text, f"message {i} ({m.role})")
    for i, text in notices.items():
        if not 0 <= i < len(messages):
            raise MessageError(f"expected notices for messages 0 to {len(messages) - 1}, got one for {i!r}")
        _check_unicode(text, f"the notice for message {i}")
    _check_unicode(json.dumps(tools, ensure_ascii=False, default=str), "a tool's description")


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MessageError(
            f"{where} is not valid Unicode: lone surrogate at character {error.start}; pass it through "
            "text.encode('utf-8', 'replace').decode() first"
        ) from error


def _nonce(messages: Sequence[Message], tools: Tools | None, notices: Mapping[int, str]) -> str:
    """Hash everything that is rendered: nothing in it can contain the hash."""
    seed = [json.dumps(tools, default=str), *(m.digest() for m in messages), *(f"{i} {n}" for i, n in notices.items())]
    return sha256("\0".join(seed).encode()).hexdigest()[:24]
