"""Registries of factories, by name. Third parties add to them by decorator or by entry point."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from .errors import DuplicateNameError, UnknownNameError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Names to factories of `T`; never instances.

    Args:
        kind: what it holds, in the singular, for messages: "policy".
        group: entry-point group that third-party distributions use. It is read once, at the first look-up.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._factories: dict[str, Callable[..., T]] = {}
        self._entry_points_read = False

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
            ValueError: the factory does not take the parameters.
        """
        factory = self.factory(name)
        try:
            return factory(**parameters)
        except TypeError as error:
            raise ValueError(f"{self.kind} {name!r} does not take {parameters!r}: {error}") from error

    def factory(self, name: str) -> Callable[..., T]:
        """Return the factory itself; raises UnknownNameError."""
        self._read_entry_points()
        if name not in self._factories:
            raise UnknownNameError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names()) or 'none'}")
        return self._factories[name]

    def names(self) -> list[str]:
        """Return all names, sorted."""
        self._read_entry_points()
        return sorted(self._factories)

    def _read_entry_points(self) -> None:
        if self._entry_points_read:
            return
        self._entry_points_read = True
        for entry in entry_points(group=self.group):
            if entry.name not in self._factories:
                self._factories[entry.name] = _lazy(entry.load)


def _lazy(load: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """Import the entry point only when it is used: a broken plugin must not break the others."""

    def factory(**parameters: Any) -> Any:
        return load()(**parameters)

    return factory
