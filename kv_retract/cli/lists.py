"""Commands that list what the registries hold."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from ..errors import PluginError
from .common import Json, console

if TYPE_CHECKING:
    from ..registry import Registry


def policies(as_json: Json = False) -> None:
    """List the policies: detectors that find what to take back."""
    from ..policies import POLICIES

    _list(POLICIES, as_json)


def erasers(as_json: Json = False) -> None:
    """List the erasers: ways to edit the cache."""
    from ..erasers import ERASERS

    _list(ERASERS, as_json)


def models(as_json: Json = False) -> None:
    """List the models of the embedded engine; a directory works as well."""
    from ..engine.models import MODELS

    _list(MODELS, as_json, hidden={"device", "dtype", "seed"})


def describe(registry: Registry[Any], *, hidden: set[str] = frozenset()) -> list[dict[str, Any]]:  # type: ignore[assignment]
    """Return name, summary and parameters with their defaults of everything that a registry holds.

    A part of another distribution that cannot be imported, or is no factory, is listed with the reason.
    """
    found = []
    for name in registry.names():
        try:
            factory = registry.factory(name)
            parameters = _parameters(factory)
        except (PluginError, TypeError, ValueError) as error:  # the latter two: it names something else than a factory
            found.append({"name": name, "summary": f"(unusable) {error}", "parameters": {}})
            continue
        summary = (inspect.getdoc(factory) or "").split("\n\n")[0].replace("\n", " ")
        defaults = {key: value for key, value in parameters.items() if key not in hidden}
        found.append({"name": name, "summary": summary, "parameters": defaults})
    return found


def _parameters(factory: Callable[..., Any]) -> dict[str, str]:
    if dataclasses.is_dataclass(factory):
        fields = [f for f in dataclasses.fields(factory) if f.init]
        made = {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
        return {f.name: _default(made.get(f.name, f.default)) for f in fields}
    return {p.name: _default(p.default) for p in inspect.signature(factory).parameters.values()}


def _default(value: Any) -> str:
    if value in (dataclasses.MISSING, inspect.Parameter.empty):
        return "(required)"
    text = str(value.value) if isinstance(value, StrEnum) else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _list(registry: Registry[Any], as_json: bool, *, hidden: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    from ..evals.console import print_parts
    from ..evals.results import dump

    parts = describe(registry, hidden=hidden)
    if as_json:
        print(dump(parts))
    else:
        print_parts(registry.kind, parts, console())
