"""What a function of unchanging things returned lately, so that it is not asked again at every step."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from functools import lru_cache, wraps
from typing import Any, Generic, TypeVar

SHORT = 1024
"""Characters of a text that counts as short."""
MOST_SHORT = 8192
"""Short texts whose values `remembered` keeps."""
MOST_CHARACTERS = 1 << 22
"""Characters of all longer ones."""

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Values by key; beyond a total size the ones that were not asked for longest go. Safe to share between threads.

    Args:
        most: total size to keep, in whatever unit `keep` is told sizes in.
    """

    def __init__(self, most: int) -> None:
        self._most, self._size = most, 0
        self._values: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._most,)  # copies begin empty

    def find(self, keys: Iterable[Key]) -> list[Value | None]:
        """Return the value of each key, None where it is not there. Nobody may change what is returned."""
        values = self._values
        found: list[Value | None] = []
        with self._lock:
            for key in keys:
                entry = values.get(key)
                if entry is None:
                    found.append(None)
                else:
                    values.move_to_end(key)
                    found.append(entry[0])
        return found

    def keep(self, entries: Iterable[tuple[Key, Value, int]]) -> None:
        """Keep keys, their values and how large each is; what is larger than all there may be is not kept."""
        with self._lock:
            for key, value, size in entries:
                if size > self._most:
                    continue
                _, before = self._values.pop(key, (None, 0))
                self._values[key] = value, size
                self._size += size - before
            while self._size > self._most:
                _, (_, size) = self._values.popitem(last=False)
                self._size -= size


class Kept(Generic[Value]):
    """A value that is made of settings, and anew where these have changed. Safe to share between threads.

    Args:
        make: takes the settings.
    """

    def __init__(self, make: Callable[..., Value]) -> None:
        self._make = make
        self._made: tuple[tuple[Any, ...], Value] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._make,)  # copies make their own

    def of(self, *settings: Any) -> Value:
        """Return the value for some settings. Nobody may change it."""
        made = self._made
        if made is None or made[0] != settings:
            made = self._made = settings, self._make(*settings)
        return made[1]


def remembered(function: Callable[[str], Value]) -> Callable[[str], Value]:
    """Return a function that remembers what a pure function of one text returned lately; nobody may change that.

    Bounded by `MOST_SHORT` and `MOST_CHARACTERS`. What is raised is not remembered.
    """
    of_short = lru_cache(maxsize=MOST_SHORT)(function)
    of_long: Recent[str, tuple[Value]] = Recent(MOST_CHARACTERS)

    @wraps(function, updated=())
    def ask(text: str) -> Value:
        if len(text) <= SHORT:
            return of_short(text)
        [known] = of_long.find([text])
        if known is None:
            known = (function(text),)
            of_long.keep([(text, known, len(text))])
        return known[0]

    return ask
