"""What the corpus consists of: traces with retractable spans, and probes with the right answers. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..ledger.messages import message_from_openai, message_to_openai
from ..types import Message, SpanRef

UNKNOWN = "I do not know."
"""The right answer where the trace does not tell, or no longer tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSpan:
    """A part of a trace that may be taken back."""

    span_id: str
    """Unique in its sample."""
    kind: str
    """What it is: `tool_result`, `update`, `preference`, `withdrawal`, `injection`, `error`, `distractor`, `needle`."""
    ref: SpanRef
    subject: str
    """What later messages call the thing it is about; empty where it concerns whatever follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A question to ask at the end of a trace. Probes are independent: each is asked on the bare trace."""

    question: str
    answer: str
    """The right answer with all spans in place."""
    without: Mapping[str, str]
    """Span id to the right answer once that span is taken back; only spans that change the answer. All other spans
    of the sample must not affect it."""

    def answer_without(self, span_id: str | None) -> str:
        """Return the right answer once a span is taken back; None: with all spans in place."""
        return self.answer if span_id is None else self.without.get(span_id, self.answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSample:
    """One trace of the corpus."""

    sample_id: str
    family: str
    split: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    """OpenAI function tools."""
    spans: tuple[CorpusSpan, ...]
    probes: tuple[Probe, ...]

    def span(self, span_id: str) -> CorpusSpan:
        """Return a span by its id; raises KeyError."""
        for span in self.spans:
            if span.span_id == span_id:
                return span
        raise KeyError(span_id)

    def without(self, span_id: str) -> tuple[Message, ...]:
        """Return the messages with the text of a span cut out: the trace that never had it."""
        ref = self.span(span_id).ref
        message = self.messages[ref.message]
        end = len(message.content) if ref.end is None else ref.end
        cut = replace(message, content=message.content[: ref.start] + message.content[end:])
        return (*self.messages[: ref.message], cut, *self.messages[ref.message + 1 :])

    def mentioned_later(self, span_id: str) -> bool:
        """Whether a message behind a span names its subject, so that the model can have taken notes there."""
        return bool(self.mentions(span_id))

    def mentions(self, span_id: str) -> list[int]:
        """Return the messages behind a span that name its subject."""
        span = self.span(span_id)
        later = range(span.ref.message + 1, len(self.messages))
        return [index for index in later if span.subject in self.messages[index].content]

    def to_json(self) -> dict[str, Any]:
        """Return one line of the corpus; `from_json` inverts it. `kv-retract replay` reads its messages."""
        return {
            "sample_id": self.sample_id,
            "family": self.family,
            "split": self.split,
            "messages": [message_to_openai(m) for m in self.messages],
            "tools": list(self.tools),
            "spans": [
                {
                    "span_id": s.span_id, "kind": s.kind, "subject": s.subject, "message": s.ref.message,
                    "start": s.ref.start, "end": s.ref.end,
                }
                for s in self.spans
            ],
            "probes": [{"question": p.question, "answer": p.answer, "without": dict(p.without)} for p in self.probes],
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CorpusSample:
        """Read what `to_json` wrote.

        Raises:
            ValueError: a field is missing or of another form, or a span is not there.
        """
        try:
            sample = cls(
                sample_id=data["sample_id"],
                family=data["family"],
                split=data["split"],
                messages=tuple(message_from_openai(m) for m in data["messages"]),
                tools=tuple(data["tools"]),
                spans=tuple(
                    CorpusSpan(
                        span_id=s["span_id"], kind=s["kind"], subject=s["subject"],
                        ref=SpanRef(s["message"], start=s["start"], end=s["end"]),
                    )
                    for s in data["spans"]
                ),
                probes=tuple(Probe(**p) for p in data["probes"]),
            )  # fmt: skip
            _check(sample)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"not a sample of the corpus: {error!r}") from error
        return sample


def _check(sample: CorpusSample) -> None:
    for span in sample.spans:
        ref = span.ref
        length = len(sample.messages[ref.message].content)
        if not (ref.message >= 0 and 0 <= ref.start < (length if ref.end is None else ref.end) <= length):
            raise ValueError(f"span {span.span_id!r}: expected a range of the {length} characters of its message")
    for probe in sample.probes:
        for span_id in probe.without.keys():
            sample.span(span_id)
