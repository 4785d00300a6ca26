"""Registries of factories, by name. Third parties add to them by decorator or by entry point."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from .errors import DuplicateNameError, PluginError, UnknownNameError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Names to factories of `T`; never instances.

    Args:
        kind: what it holds, in the singular, for messages: "policy".
        group: entry-point group that third-party distributions use. It is read once, at the first look-up; what it
            names is imported when it is used, so that a broken distribution does not break the others.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._factories: dict[str, Callable[..., T]] = {}
        self._entry_points: dict[str, EntryPoint] | None = None

    def register(self, name: str) -> Callable[[F], F]:
        """Return a decorator that registers a class or function under `name`.

        Raises:
            DuplicateNameError: another factory has the name.
        """

        def add(factory: F) -> F:
            known = self._factories.get(name)
            if known is not None and known is not factory:
                raise DuplicateNameError(
                    f"{self.kind} {name!r} is registered already, by {known!r}; choose another name"
                )
            self._factories[name] = factory
            return factory

        return add

    def create(self, name: str, /, **parameters: Any) -> T:
        """Build a new instance.

        Raises:
            UnknownNameError: nobody registered the name; the message lists what is known.
            PluginError: the distribution that registers it cannot be imported.
            ValueError: the factory does not take the parameters.
        """
        factory = self.factory(name)
        try:
            return factory(**parameters)
        except TypeError as error:
            raise ValueError(f"{self.kind} {name!r} does not take {parameters!r}: {error}") from error

    def factory(self, name: str) -> Callable[..., T]:
        """Return the factory itself; raises UnknownNameError and PluginError."""
        if name not in self._factories:
            self._factories[name] = self._load(name)
        return self._factories[name]

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted({*self._factories, *self._found()})

    def _load(self, name: str) -> Callable[..., T]:
        entry = self._found().get(name)
        if entry is None:
            raise UnknownNameError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names()) or 'none'}")
        try:
            loaded: Callable[..., T] = entry.load()
        except Exception as error:  # whatever another distribution's code raises
            source = f" of {entry.dist.name}" if entry.dist else ""
            raise PluginError(
                f"{self.kind} {name!r}{source} cannot be imported from {entry.value!r}: {type(error).__name__}: "
                f"{error}; repair or uninstall it"
            ) from error
        return loaded

    def _found(self) -> dict[str, EntryPoint]:
        if self._entry_points is None:
            self._entry_points = {entry.name: entry for entry in entry_points(group=self.group)}
        return self._entry_points
