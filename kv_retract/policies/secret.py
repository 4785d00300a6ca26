"""Keys and personal data that should never have entered the context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar, get_args

from ..errors import PolicyError
from ..ledger.recent import Kept, remembered
from ..types import Guarantee, Message, Part, Retraction, Role, SpanRef
from .base import PolicyContext, RetractionPolicy, register_policy
from .detectors import Detector, Found, check_share, detect, joined
from .injection import check_roles
from .secret_kinds import KINDS, Kind

SECRET_KINDS = tuple(dict.fromkeys(kind.name for kind in KINDS))
"""Every kind that is known."""
_ON_REQUEST = ("e-mail address", "phone number")
DEFAULT_SECRET_KINDS = tuple(name for name in SECRET_KINDS if name not in _ON_REQUEST)
"""Those that are looked for unless you choose: an agent often needs addresses and numbers to do its work."""


@dataclass(kw_only=True)
class SecretDetector:
    """Find secrets by their form, and by check digits, checksums or randomness where they have such."""

    kinds: Sequence[str] = DEFAULT_SECRET_KINDS
    """Names from `SECRET_KINDS`."""
    allow: Sequence[str] = ()
    """Values that are no secrets, as globs: `AKIA*EXAMPLE`, `4111*1111`."""
    _chosen: tuple[Kind, ...] = field(init=False, repr=False, compare=False)
    _needles: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raise PolicyError where a kind is unknown."""
        unknown = [self.kinds] if isinstance(self.kinds, str) else sorted(set(self.kinds) - set(SECRET_KINDS))
        if unknown:
            raise PolicyError(f"expected kinds among {', '.join(SECRET_KINDS)}, got {unknown!r}")
        if isinstance(self.allow, str):
            raise PolicyError("expected a sequence of globs for allow, got text; put it in a list")
        self._chosen = tuple(kind for kind in KINDS if kind.name in self.kinds)
        self._needles = tuple(dict.fromkeys(needle for kind in self._chosen for needle in kind.needles))

    def __call__(self, text: str, /) -> list[Found]:
        """Return the values in order, without what names or quotes them."""
        if not text:
            return []
        small = text.lower()
        hints = {needle for needle in self._needles if needle in small}
        return joined(
            find
            for kind in self._chosen
            if not kind.needles or not hints.isdisjoint(kind.needles)
            for find in self._matches(kind, text)
        )

    def _matches(self, kind: Kind, text: str) -> Iterator[Found]:
        for match in kind.pattern.finditer(text):
            group = next((name for name, value in match.groupdict().items() if value is not None), 0)
            value = match[group]
            confidence = kind.sure(value)
            if confidence > 0 and not any(fnmatchcase(value, glob) for glob in self.allow):
                yield Found(*match.span(group), confidence, kind.name)


@register_policy("secret")
@dataclass(kw_only=True)
class ExposedSecret(RetractionPolicy):
    """Retract keys, passwords, card and account numbers wherever they stand; only the value goes, not what names it.

    The guarantee is `EXACT`, so the thread reads as if the value had never been there; what was logged or sent before
    is not called back, and a key that was exposed must still be replaced. False positives: sample keys in
    documentation, a number of another meaning that passes the Luhn check (one in ten of those with a card's first
    digits and length), a word behind `password:` that is none. Not found are secrets without a form, in encodings, or
    split over messages, and whatever stands in reasoning text. The planner protects the system prompt and the newest
    user message: a secret in these stays until they are neither.
    """

    name: ClassVar[str] = "secret"

    kinds: Sequence[str] = DEFAULT_SECRET_KINDS
    """What to look for, from `SECRET_KINDS`. E-mail addresses and phone numbers only on request."""
    allow: Sequence[str] = ()
    """Values to leave alone, as globs."""
    detectors: Sequence[Detector] = ()
    """Further detectors, for what only you know the form of: `PatternDetector(patterns={"customer": r"C-\\d{6}"})`."""
    min_confidence: float = 0.5
    """Finds that are less sure are left alone."""
    roles: Sequence[Role] = get_args(Role)
    """Whose messages are looked at."""
    arguments: bool = True
    """Whether the arguments of tool calls are looked at too."""
    guarantee: Guarantee = Guarantee.EXACT
    _finder: Kept[Callable[[str], list[Found]]] = field(
        default_factory=lambda: Kept(_finder), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Accept the guarantee as text; raises PolicyError where a parameter is not what it should be."""
        self.guarantee = Guarantee(self.guarantee)
        check_roles(self.roles)
        check_share("min_confidence", self.min_confidence)
        SecretDetector(kinds=self.kinds, allow=self.allow)

    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Return the values in message order, contents before arguments.

        Raises:
            PolicyError: one of `detectors` returned something else than ranges of the text.
        """
        find_in = self._finder.of(tuple(self.kinds), tuple(self.allow), tuple(self.detectors), self.min_confidence)
        return [
            Retraction(
                span=SpanRef(index, part, call, find.start, find.end),
                policy=self.name,
                reason=f"{message.role} message {index} holds a secret or personal data: {find.label}",
                guarantee=self.guarantee,
                confidence=find.confidence,
            )
            for index, message in enumerate(ctx.messages)
            if message.role in self.roles
            for part, call, text in self._texts(message)
            for find in find_in(text)
        ]

    def _texts(self, message: Message) -> Iterator[tuple[Part, int, str]]:
        yield "content", 0, message.content
        if self.arguments:
            for number, call in enumerate(message.tool_calls):
                yield "tool_call", number, call.arguments


def _finder(
    kinds: Sequence[str], allow: Sequence[str], others: Sequence[Detector], least: float
) -> Callable[[str], list[Found]]:
    # A thread only grows: before every step all but its newest texts come again.
    detectors = (SecretDetector(kinds=kinds, allow=allow), *others)
    return remembered(lambda text: joined(f for found in detectors for f in detect(found, text, least)))
