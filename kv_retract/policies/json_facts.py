"""What tool results in JSON say about which entity."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from ..ledger.recent import MOST_CHARACTERS, Recent
from .json_nodes import Place
from .tool_results import ToolResult, any_glob

Entity = frozenset[tuple[str, str]]
"""Names and values of the keys that say which thing an object is about."""
Path = tuple[str, ...]
"""Keys from the entity's object to a value."""

LONGEST_TEXT = 80
"""Text with more characters is prose, which two sources never word alike: it is no fact."""

_OVERHEAD = 256
"""What a remembered result, and every fact in it, counts beyond the characters."""
_MOST_NAMES = 16_384
"""Names, paths and entities that a reader remembers of each."""
_Role = Literal["key", "qualifier", "fact"]
_KINDS: dict[type, str] = {str: "text", bool: "bool", int: "number", float: "number"}
About = tuple[Entity, Path, str]
"""What a plain value is about: entity, path, and the kind of value, which is `text`, `number` or `bool`."""


def agree(one: Any, other: Any) -> bool:
    """Whether two values of one kind say the same: 12 and 12.0, text without case and extra white space."""
    return bool(one == other) or (isinstance(one, str) and _plain_text(one) == _plain_text(other))


class FactReader:
    """Reads facts; remembers which names match which globs, which entities it has met, and what results said lately.

    Safe to share between threads.

    An object with a key of its own is about that entity, within the entities of the objects around it: a line of an
    order is another line in another order. An object without one continues the object around it, but in a list it
    says nothing, as nobody knows which item it is.

    Args:
        keys: globs of names that identify an entity. Where an object has `id`, its other keys are references.
        qualifiers: globs of names under whose values facts hold, in an object or in the arguments of the call.
        compare: globs of facts to read, by name or by path with dots.
        ignore: globs of facts to leave out, likewise.
        inherit: False for entities that are the same wherever they stand.
    """

    def __init__(
        self,
        *,
        keys: Sequence[str],
        qualifiers: Sequence[str],
        compare: Sequence[str],
        ignore: Sequence[str],
        inherit: bool = True,
    ) -> None:
        self._keys, self._qualifiers, self._compare, self._ignore = keys, qualifiers, compare, ignore
        self.inherit = inherit
        # Objects in lists repeat their names, and results their objects: each is looked at once, and equal entities
        # are one object, so that look-ups need not compare them.
        self._roles: dict[str, _Role] = {}
        self._read: dict[Path, bool] = {}
        self._entities: dict[Entity, Entity] = {}
        self._recent: Recent[tuple[str, str, str], Mapping[About, Any]] = Recent(MOST_CHARACTERS)

    def facts(self, content: str, result: ToolResult) -> Mapping[About, Any]:
        """Return the values that one result gives, in the order of its text; none where it is not JSON.

        What it says in several ways (two payments by one card) is no fact. A thread only grows: what older results say
        is remembered.
        """
        if not _may_be_json(content):
            return {}
        key = content, result.name, result.raw_arguments
        [known] = self._recent.find([key])
        if known is None:
            self._forget_many()
            walk = _Walk(self, result.name, result.arguments)
            known = walk.said if walk.through(content) else {}
            size = len(content) + len(result.raw_arguments) + _OVERHEAD * (1 + len(known))
            self._recent.keep([(key, known, size)])
        return known

    def places(self, content: str, result: ToolResult) -> dict[About, list[Place]]:
        """Return where the facts of one result stand; apart from `facts`, as few results are ever cut."""
        walk = _Walk(self, result.name, result.arguments, with_places=True)
        return walk.places if walk.through(content) else {}

    def role(self, name: str) -> _Role:
        """Return what a value under this name is for."""
        role = self._roles.get(name)
        if role is None:
            qualifier = any_glob(name, self._qualifiers)
            role = "key" if any_glob(name, self._keys) else "qualifier" if qualifier else "fact"
            self._roles[name] = role
        return role

    def reads(self, path: Path) -> bool:
        """Whether the value at this path is a fact to compare."""
        wanted = self._read.get(path)
        if wanted is None:
            names = (path[-1], ".".join(path))
            ignored = any(any_glob(name, self._ignore) for name in names)
            wanted = not ignored and any(any_glob(name, self._compare) for name in names)
            self._read[path] = wanted
        return wanted

    def _forget_many(self) -> None:
        for known in (self._roles, self._read, self._entities):
            if len(known) > _MOST_NAMES:
                known.clear()

    def same(self, entity: Entity) -> Entity:
        """Return the one object that stands for equal entities."""
        return self._entities.setdefault(entity, entity)


class _Walk:
    """Goes once through one result."""

    def __init__(
        self, reader: FactReader, tool: str, arguments: Mapping[str, Any], *, with_places: bool = False
    ) -> None:
        self.said: dict[About, Any] = {}
        self.places: dict[About, list[Place]] = {}
        self._unclear: set[About] = set()
        self._with_places = with_places
        self._reader = reader
        self._tool = tool
        self._asked = frozenset(_pairs(arguments, [name for name in arguments if reader.role(name) == "key"]))
        self._asked_with = _pairs(arguments, [name for name in arguments if reader.role(name) == "qualifier"])

    def through(self, content: str) -> bool:
        """Read the text; False where it is not JSON."""
        if not _may_be_json(content):
            return False
        try:
            self._inside(json.loads(content), None, None, (), ())
        except (ValueError, RecursionError):
            return False
        for about in self._unclear:
            del self.said[about]
        return True

    def _inside(self, value: Any, entity: Entity | None, around: Entity | None, path: Path, place: Place) -> None:
        """Read what stands in a value.

        Args:
            value: an object, a list, or anything else, which says nothing by itself.
            entity: whose plain values an object here holds.
            around: the innermost entity that `value` stands in.
            path: keys from the object of `entity` to `value`.
            place: keys and indices from the root to `value`.
        """
        if isinstance(value, list):
            for index, item in enumerate(value):
                self._inside(item, None, around, path, (*place, index))
        elif isinstance(value, dict):
            named: dict[_Role, list[str]] = {"key": [], "qualifier": [], "fact": []}
            nested = []
            for name, member in value.items():
                if isinstance(member, dict | list):
                    nested.append(name)
                else:
                    named[self._reader.role(name)].append(name)
            own = _pairs(value, named["key"])
            if own:
                entity = around = self._entity(self._own(own, place), _pairs(value, named["qualifier"]), around)
                path = ()
            if entity is not None:
                for name in named["fact"]:
                    self._say(entity, (*path, name), value[name], place)
            for name in nested:
                self._inside(value[name], entity, around, (*path, name), (*place, name))

    def _say(self, entity: Entity, path: Path, value: Any, place: Place) -> None:
        kind = _KINDS.get(type(value))
        if kind is None or not self._reader.reads(path) or (kind == "text" and len(value) > LONGEST_TEXT):
            return
        about = (entity, path, kind)
        if not agree(self.said.setdefault(about, value), value):
            self._unclear.add(about)
        if self._with_places:
            self.places.setdefault(about, []).append((*place, path[-1]))

    def _own(self, pairs: list[tuple[str, str]], place: Place) -> Entity:
        ids = [pair for pair in pairs if pair[0] == "id"]
        if ids and ids[0][1].isdigit():
            # The ids of a data base table begin with 1, so a bare number says nothing outside of its place.
            ids.append(("", "/".join((self._tool, *(key for key in place if isinstance(key, str))))))
        return frozenset(ids or pairs)

    def _entity(self, own: Entity, qualifiers: list[tuple[str, str]], around: Entity | None) -> Entity:
        if around is None:  # a result may repeat whom it was asked about
            around = self._asked if own.isdisjoint(self._asked) else frozenset()
        entity = own.union(qualifiers, around if self._reader.inherit else ())
        if self._asked_with:
            names = {name for name, _ in entity}
            entity = entity.union(pair for pair in self._asked_with if pair[0] not in names)
        return self._reader.same(entity)


def _may_be_json(content: str) -> bool:
    return content[:1].lstrip() in ("", "{", "[") and content.lstrip()[:1] in ("{", "[")


def _pairs(values: Mapping[str, Any], names: Iterable[str]) -> list[tuple[str, str]]:
    """Return names and values, where the value can identify something."""
    found = [(name, values[name]) for name in names]
    return [(name, str(value)) for name, value in found if _KINDS.get(type(value), "bool") != "bool" and value != ""]


def _plain_text(text: str) -> str:
    return " ".join(text.split()).casefold()
