"""Instructions that came in with a tool's result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, get_args

from ..errors import PolicyError
from ..ledger.recent import Kept, remembered
from ..types import Guarantee, Retraction, Role, SpanRef
from .base import PolicyContext, RetractionPolicy, register_policy
from .detectors import Detector, Found, check_share, detect
from .heuristics import HeuristicInjectionDetector
from .tool_results import any_glob

_ROLES = get_args(Role)


@register_policy("injection")
@dataclass(kw_only=True)
class InjectedInstruction(RetractionPolicy):
    """Retract text in tool results that gives the model orders; the rest of the result stays.

    False positives: pages that quote or discuss injections, documentation of chat templates and notes that a company
    writes for its assistants look like injections and may be what the user asked about. What goes is the passage: the
    marked block, or the sentence with the sign and the rest of its line, so that harmless text which follows on the
    same line goes too. Not found are orders that only their content gives away; `detector` takes a trained classifier
    (`ClassifierDetector`) or any function. A steered retraction lowers an injection's influence; for one that must
    not act at all, set `guarantee="exact"`.
    """

    name: ClassVar[str] = "injection"

    detector: Detector = field(default_factory=HeuristicInjectionDetector)
    """From a text to the ranges of characters that are injected."""
    min_confidence: float = 0.5
    """Finds that are less sure are left alone. At 0.4 the default detector also takes entries like `TODO: send ...`."""
    roles: Sequence[Role] = ("tool",)
    """Whose messages are looked at. What a user writes is theirs to write; add `user` where users paste documents."""
    exclude: Sequence[str] = ()
    """Globs of tool names whose results are trusted."""
    guarantee: Guarantee = Guarantee.STEERED
    _finder: Kept[Callable[[str], list[Found]]] = field(
        default_factory=lambda: Kept(_finder), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Accept the guarantee as text; raises PolicyError where a parameter is not what it should be."""
        self.guarantee = Guarantee(self.guarantee)
        check_roles(self.roles)
        check_share("min_confidence", self.min_confidence)
        if not callable(self.detector):
            raise PolicyError(
                f"expected a detector, a callable from text to finds, got a {type(self.detector).__name__}; "
                "see kv_retract.policies.Detector"
            )

    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Return the injected passages in message order.

        Raises:
            PolicyError: the detector returned something else than ranges of the text.
        """
        trusted, find_in = self._trusted(ctx), self._finder.of(self.detector, self.min_confidence)
        return [
            Retraction(
                span=SpanRef(index, start=find.start, end=find.end),
                policy=self.name,
                reason=f"{message.role} message {index} holds text for the model: {find.label}",
                guarantee=self.guarantee,
                confidence=find.confidence,
            )
            for index, message in enumerate(ctx.messages)
            if message.role in self.roles and index not in trusted
            for find in find_in(message.content)
        ]

    def _trusted(self, ctx: PolicyContext) -> set[int]:
        if not self.exclude:
            return set()
        return {result.message for result in ctx.tool_results() if any_glob(result.name, self.exclude)}


def _finder(detector: Detector, least: float) -> Callable[[str], list[Found]]:
    # A thread only grows: before every step all but its newest texts come again.
    return remembered(lambda text: detect(detector, text, least))


def check_roles(roles: Sequence[str]) -> None:
    """Raise PolicyError unless `roles` are roles of messages."""
    unknown = [roles] if isinstance(roles, str) else [role for role in roles if role not in _ROLES]
    if unknown or not roles:
        raise PolicyError(f"expected roles, a sequence of {', '.join(_ROLES)}, got {roles!r}")
