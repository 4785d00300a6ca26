"""A LangChain chat model on a session: every call retracts first, then answers."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput, ModelProfile
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from kv_retract.engine.base import LogitsProcessor
from kv_retract.engine.constraint import CallSyntax, ConstraintCompiler
from kv_retract.session import KVRetractSession
from kv_retract.types import Message, SamplingParams, StepDelta, StepResult

from .approval import retract_approved
from .messages import to_ai_message, to_messages
from .streaming import AnswerStream, in_thread
from .structured import Method, structured_output
from .threads import current_thread
from .tools import Tool, constraint_for, normalize_choice, schema_of, to_openai_tools

_SETTINGS = {
    "temperature", "max_tokens", "top_p", "top_k", "seed", "thread_id",
    "tools", "tool_choice", "parallel_tool_calls", "response_format", "strict",
    "model", "stream", "retract_approved",
}  # fmt: skip


@dataclass(frozen=True)
class _Call:
    """One call of the model, in the session's terms."""

    thread_id: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    sampling: SamplingParams
    constraint: LogitsProcessor | None


def _open_session(fields: dict[str, Any]) -> KVRetractSession:
    if fields["engine"] is not None:
        from ..sglang.engine import connect

        return connect(fields["engine"], fields["model_name"])
    return KVRetractSession.from_pretrained(fields["model_name"], device=fields["device"], dtype=fields["dtype"])


class ChatKVRetract(BaseChatModel):
    """Chat model that answers through a `KVRetractSession`.

    Which thread of the session a call belongs to is decided by, in order: the setting `thread_id` of the call
    (`model.bind(thread_id=...)`), the field `thread_id`, and the config of the LangGraph run. A call without any runs
    in a throw-away thread: policies still see its messages, and the prefix cache is shared all the same.

    The setting `retract_approved` (id of a proposal to who approved it) takes back what policies under
    `require_approval` wait for; `KVRetractApprovalMiddleware` makes it.

    Tool choices other than `auto` and response formats are enforced while decoding, by a grammar. Where the model runs
    in an SGLang server they are refused by ConstraintError: the calls that it makes of its own accord (`auto`) work.

    Example:
        >>> session = KVRetractSession.from_pretrained()
        >>> ChatKVRetract(session=session, thread_id="trip-42").invoke("Cheapest flight to Oslo?")

        In a server that `kv-retract serve` started, with its model's tokenizer from a local directory. For policies,
        another eraser or an API key, open the session with `kv_retract.integrations.sglang.engine.connect`:

        >>> ChatKVRetract(engine="http://localhost:30000", model="models/qwen3-8b")

    Raises:
        ValueError: a session is given, and a model or an engine as well.
    """

    model_config = ConfigDict(populate_by_name=True, arbitrary_types_allowed=True, protected_namespaces=())

    model_name: str = Field(default="reference", alias="model")
    """Registered name or directory; with an engine, `reference` or the directory of the served model's tokenizer; with
    a session, the name of its model."""
    engine: str | None = None
    """URL of an SGLang server (`kv-retract serve`), for the session that is made here. None: the embedded engine."""
    device: str = "cpu"
    """For the session that is made here, without a server."""
    dtype: str = "float32"
    """For the session that is made here, without a server."""
    session: KVRetractSession = Field(default_factory=_open_session, exclude=True, repr=False)
    """Where threads live. By default one of its own is made, from `model` and `engine`; in a server it erases by
    `kveraser`."""
    temperature: float | None = None
    """None and 0: greedy."""
    max_tokens: int = 1024
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    stop: list[str] | None = None
    seed: int | None = None
    thread_id: str | None = None

    _compiler: ConstraintCompiler | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _name_model(self) -> Self:
        running = self.session.engine.spec.name
        if {"session", "model_name"} <= self.model_fields_set and self.model_name != running:
            raise ValueError(
                f"expected a session or a model, got both: the session runs {running!r}, model is {self.model_name!r}; "
                "leave one out"
            )
        if "session" in self.model_fields_set and self.engine is not None:
            raise ValueError(
                f"expected a session or an engine, got both: the session has one; leave {self.engine!r} out"
            )
        if "session" in self.model_fields_set:
            self.model_name = running
        return self

    # -- what LangChain asks for ------------------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        *_, last = self._deltas(messages, stop, kwargs)
        return self._result(last)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        last = None
        async for delta in in_thread(self._deltas(messages, stop, kwargs)):
            last = delta
        assert last is not None, "a stream ends with its result"
        return self._result(last)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        answer = self._answer_stream()
        for delta in self._deltas(messages, stop, kwargs):
            chunk = answer.push(delta)
            if chunk is not None:
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        answer = self._answer_stream()
        async for delta in in_thread(self._deltas(messages, stop, kwargs)):
            chunk = answer.push(delta)
            if chunk is not None:
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def bind_tools(
        self,
        tools: Sequence[Tool],
        *,
        tool_choice: Any = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Return the model with tools.

        Args:
            tools: functions, Pydantic classes, schemas or tools.
            tool_choice: `auto`, `any` or `required`, `none`, a name, True (the only tool), or OpenAI's dictionary.
            strict: constrain also the calls that the model makes under `auto` to the tools' schemas.
            parallel_tool_calls: False: one call at most.
            **kwargs: further settings of the call.

        Raises:
            ValueError: the tool choice names no tool.
        """
        formatted = to_openai_tools(tools)
        choice = normalize_choice(tool_choice, formatted)
        settings = {"strict": strict, "parallel_tool_calls": parallel_tool_calls}
        settings = {name: value for name, value in settings.items() if value is not None}
        return self.bind(tools=formatted, tool_choice=choice, **settings, **kwargs)

    def with_structured_output(
        self,
        schema: Mapping[str, Any] | type | None = None,
        *,
        include_raw: bool = False,
        method: Method = "function_calling",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return the model with its answers constrained to a schema, and parsed; see `structured_output`.

        Whatever the method, the form is enforced while decoding: `strict` is accepted and changes nothing.
        """
        return structured_output(self, schema, method=method, include_raw=include_raw, **kwargs)

    @property
    def _llm_type(self) -> str:
        return "kv-retract"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        names = ("model_name", "temperature", "max_tokens", "top_p", "top_k", "stop", "seed")
        return {"eraser": self.session.eraser.eraser_id, **{name: getattr(self, name) for name in names}}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = "kv_retract"
        return params

    def _resolve_model_profile(self) -> ModelProfile | None:
        return ModelProfile(
            max_input_tokens=self.session.engine.spec.max_positions,
            text_inputs=True,
            image_inputs=False,
            audio_inputs=False,
            tool_calling=True,
            tool_choice=self.session.engine.constrains,
        )

    # -- one call ---------------------------------------------------------------------------------------------------

    def _deltas(
        self, messages: Sequence[BaseMessage], stop: list[str] | None, settings: Mapping[str, Any]
    ) -> Generator[StepDelta, None, None]:
        call = self._call(messages, stop, settings)
        approved = settings.get("retract_approved") or {}
        retract_approved(self.session, call.thread_id, call.messages, approved, tools=call.tools)
        yield from self.session.stream(
            call.thread_id,
            call.messages,
            tools=call.tools,
            sampling=call.sampling,
            logits_processor=call.constraint,
        )

    def _call(self, messages: Sequence[BaseMessage], stop: list[str] | None, settings: Mapping[str, Any]) -> _Call:
        self._check_settings(settings)
        tools = to_openai_tools(settings.get("tools") or ())
        constraint = constraint_for(
            self._constraints,
            tools,
            choice=normalize_choice(settings.get("tool_choice"), tools),
            schema=schema_of(settings.get("response_format")),
            parallel=settings.get("parallel_tool_calls", True),
            strict=bool(settings.get("strict")),
        )
        return _Call(
            thread_id=settings.get("thread_id") or self.thread_id or current_thread() or throw_away_thread(),
            messages=to_messages(messages),
            tools=tools or None,
            sampling=self._sampling(stop, settings),
            constraint=constraint,
        )

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        unknown = sorted(name for name in settings if name not in _SETTINGS and not name.startswith("ls_"))
        if unknown:
            raise ValueError(f"unknown model settings {', '.join(unknown)}; known: {', '.join(sorted(_SETTINGS))}")
        if settings.get("model") not in (None, self.model_name):
            raise ValueError(
                f"this session runs {self.model_name!r}, got model={settings['model']!r}; make a ChatKVRetract for it"
            )

    def _sampling(self, stop: list[str] | None, settings: Mapping[str, Any]) -> SamplingParams:
        def value(name: str) -> Any:
            given = settings.get(name)
            return getattr(self, name) if given is None else given

        return SamplingParams(
            max_tokens=value("max_tokens"),
            temperature=value("temperature") or 0.0,
            top_p=value("top_p"),
            top_k=value("top_k"),
            seed=value("seed"),
            stop=tuple(self.stop or () if stop is None else stop),
        )

    def _constraints(self) -> ConstraintCompiler:
        if self._compiler is None:
            renderer = self.session.renderer
            self._compiler = ConstraintCompiler(
                renderer.tokenizer,
                vocab_size=self.session.engine.spec.vocab_size,
                stop_token_ids=renderer.stop_token_ids,
                syntax=CallSyntax.from_example(renderer.tool_calls.example, marker=renderer.tool_calls.begin),
            )
        return self._compiler

    def _answer_stream(self) -> AnswerStream:
        return AnswerStream(self.session.renderer.tool_calls, model_name=self.model_name)

    def _result(self, last: StepDelta) -> ChatResult:
        assert isinstance(last.result, StepResult), "the last delta carries the result"
        message = to_ai_message(last.result, model_name=self.model_name)
        info = {"finish_reason": last.result.finish_reason}
        return ChatResult(generations=[ChatGeneration(message=message, generation_info=info)])


def throw_away_thread() -> str:
    """Return a thread id that nobody else has."""
    return f"stateless-{uuid.uuid4().hex}"
