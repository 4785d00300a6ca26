"""Names with parameters, as in `repair:tokens=16` or `tool_error:exclude=["get_*"],include_call=true`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kv_retract.errors import KVRetractError
from kv_retract.registry import Registry

T = TypeVar("T")

_NAME = re.compile(r"\s*([^\s:,=]+)\s*")
_PARAMETER = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*")
_SPACE = re.compile(r"\s*")


class SpecError(KVRetractError, ValueError):
    """A name with parameters is malformed, or its factory does not take the parameters."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One registered name and the parameters for its factory."""

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The spec as it may be typed again; parameters in canonical JSON."""
        values = (f"{key}={json.dumps(value, separators=(',', ':'))}" for key, value in self.parameters.items())
        return f"{self.name}:{','.join(values)}" if self.parameters else self.name

    def create(self, registry: Registry[T]) -> T:
        """Build the object.

        Raises:
            UnknownNameError: the registry does not know the name.
            SpecError: the factory refuses the parameters.
        """
        try:
            return registry.create(self.name, **self.parameters)
        except KVRetractError:
            raise
        except (TypeError, ValueError) as error:
            raise SpecError(f"cannot make {registry.kind} {self.label!r}: {error}") from error


def arm_label(spec: Spec, made: object) -> str:
    """Return how results call an arm: the spec, or the variant of an eraser that was loaded from a folder."""
    variant = getattr(made, "variant", None)
    return f"{spec.name}:variant={json.dumps(variant)}" if variant and "path" in spec.parameters else spec.label


def parse_specs(texts: Iterable[str]) -> list[Spec]:
    """Parse specs; each text may hold several, joined by commas. Repeated ones are kept once.

    A value is JSON; what is no JSON is taken as text up to the next comma: `guarantee=exact`.

    Raises:
        SpecError: a text does not have the form `name`, or `name:key=value,key=value`.
    """
    found: dict[str, Spec] = {}
    for text in texts:
        for spec in _parse(text):
            found.setdefault(spec.label, spec)
    return list(found.values())


def _parse(text: str) -> Iterable[Spec]:
    at, text = 0, text.strip()
    while True:
        name = _NAME.match(text, at)
        if name is None:
            raise _malformed(text, at)
        at, parameters = name.end(), {}
        separator = text[at : at + 1]
        # Behind a colon, and behind each comma that a `key=` follows, stands another parameter.
        while separator in (":", ",") and (key := _PARAMETER.match(text, at + 1)):
            if separator == "," and not parameters:
                break
            parameters[key[1]], at = _value(text, key.end())
            separator = text[at : at + 1]
        if separator == ":":
            raise _malformed(text, at)
        yield Spec(name[1], parameters)
        if not separator:
            return
        if separator != ",":
            raise _malformed(text, at)
        at += 1


def _value(text: str, at: int) -> tuple[Any, int]:
    try:
        value, end = json.JSONDecoder().raw_decode(text, at)
        end = _SPACE.match(text, end).end()  # type: ignore[union-attr]
    except ValueError:
        value, end = None, -1
    if end < 0 or text[end : end + 1] not in ("", ","):
        end = (text + ",").index(",", at)
        value = text[at:end].strip()
    return value, end


def _malformed(text: str, at: int) -> SpecError:
    return SpecError(
        f"expected a name, or name:key=value,key=value with JSON values, got {text!r} (character {at + 1})"
    )
