"""Messages to token ids through the tokenizer's chat template; the only code that sees a template.

The ids are those of `tokenizer.apply_chat_template(..., tokenize=True)`, with one difference: a string that looks like
a special token stays plain text where it comes from a message or a tool, so that no content can end its own turn.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ..errors import MessageError, SpanError
from ..types import Message, SpanRef
from .encode import Guard, pattern_of, special_tokens
from .locate import Place, locate, styles_for
from .located import Located
from .marks import Marks
from .prepared import Preparer, Source, Tools, check_added, nonce_of
from .rendering import Rendering
from .segments import Encoder
from .tool_calls import TOOL_CALL_FORMATS, ToolCallFormat, format_for_template

__all__ = ["Renderer", "Rendering"]


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
        self._pattern = pattern_of(self._specials)
        self._preparer, self._encoder = Preparer(self._pattern), Encoder(tokenizer)
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
        # A step asks for the same twice: to plan, and to answer. Length and newest message tell most others apart.
        tools_text = json.dumps(tools, default=str)
        asked = (len(messages), add_generation_prompt, messages[-1:], messages, notices, tools_text)
        for known, rendering in tuple(self._recent):
            if known == asked:
                return rendering
        rendering = self._render(messages, tools, tools_text, notices, add_generation_prompt)
        self._recent.append((asked, rendering))
        return rendering

    def _render(
        self,
        messages: tuple[Message, ...],
        tools: Tools | None,
        tools_text: str,
        notices: Mapping[int, str],
        add_generation_prompt: bool,
    ) -> Rendering:
        prepared = self._preparer.prepare(messages)
        check_added(len(messages), tools, tools_text, notices)
        nonce = nonce_of(prepared, tools_text, notices)
        guard = Guard(self._pattern, f"{nonce}g")
        given = self._preparer.tools(tools, tools_text, guard) if tools else None
        source = Source(messages, prepared, {i: f"\n\n{guard.hide(text)}" for i, text in notices.items()}, guard)
        plain = source.for_template()
        pieces = guard.split(self._apply(plain, given, add_generation_prompt))
        text = "".join(piece for piece, _ in pieces)

        def text_up_to(message: int) -> str:
            return guard.join(self._apply(plain[: message + 1], given, False))

        apply = partial(self._apply, tools=given, add_generation_prompt=add_generation_prompt)
        find_places = partial(_places, text, source, apply, Marks(f"{nonce}m"))
        return Rendering(messages, text, self._encoder.encode(pieces), find_places, text_up_to)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens, those aside with which models write tool calls."""
        kept = [i for i in ids if i not in self._silent]
        text: str = self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _apply(self, messages: list[Mapping[str, Any]], tools: Any, add_generation_prompt: bool) -> str:
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


def _places(
    text: str, source: Source, apply: Callable[[list[Mapping[str, Any]]], str], marks: Marks
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
