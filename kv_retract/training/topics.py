"""What facts are about: many attributes of many things, so that a model reads them instead of knowing them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

_PEOPLE: Final = {
    "order": ("owner", "seller", "courier"), "flight": ("pilot", "purser"), "truck": ("driver", "mechanic"),
    "office": ("landlord", "cleaner"), "room": ("guest", "keeper"), "part": ("designer", "inspector"),
    "patient": ("doctor", "nurse"), "book": ("author", "illustrator"), "parcel": ("sender", "recipient"),
    "ship": ("captain", "first mate"), "project": ("leader", "auditor"), "account": ("holder", "adviser"),
    "course": ("teacher", "tutor"), "song": ("singer", "composer"), "painting": ("painter", "curator"),
    "bridge": ("architect", "surveyor"), "recipe": ("cook", "taster"), "horse": ("rider", "breeder"),
}  # fmt: skip
"""Entity to attributes whose value is somebody."""
_THINGS: Final = {
    "order": ("depot", "payment code"), "flight": ("gate", "terminal"), "truck": ("garage", "home base"),
    "office": ("address", "building"), "room": ("password", "colour"), "part": ("supplier", "material"),
    "patient": ("ward", "insurance"), "book": ("shelf", "printing house"), "parcel": ("next stop", "content"),
    "ship": ("home port", "cargo"), "project": ("code name", "budget line"), "account": ("bank", "branch"),
    "course": ("textbook", "classroom"), "song": ("record label", "first line"), "painting": ("frame", "museum"),
    "bridge": ("river", "building stone"), "recipe": ("main spice", "side dish"), "horse": ("stable", "race track"),
}  # fmt: skip
_PEOPLE_OF_ANY: Final = (
    "sponsor", "founder", "translator", "witness", "guardian", "examiner", "importer", "collector", "critic",
    "photographer", "narrator", "coordinator", "secretary", "spokesman", "volunteer", "technician", "specialist",
)  # fmt: skip
_THINGS_OF_ANY: Final = (
    "motto", "nickname", "category", "language", "symbol", "warranty", "catalogue mark", "place of storage",
    "country of origin", "point of entry", "town of registration", "kind of packaging", "emergency contact",
)  # fmt: skip
HOPS: Final = (
    "manager", "deputy", "home town", "neighbour", "employer", "assistant", "school", "favourite colour",
    "place of work", "town of residence", "field of study", "grandfather", "business partner", "landlady",
)  # fmt: skip
"""What is told of people."""


@dataclass(frozen=True, slots=True)
class Topic:
    """One kind of fact: `the owner of order Kel-42`."""

    attribute: str
    entity: str

    @property
    def tool(self) -> str:
        """The tool that looks it up."""
        return tool_name(self.attribute)

    def subject(self, name: str) -> str:
        """Return what a fact is about."""
        return f"{self.entity} {name}"

    def what(self, name: str) -> str:
        """Return the fact's name."""
        return f"the {self.attribute} of {self.subject(name)}"


def tool_name(attribute: str) -> str:
    """Return the name of the tool that looks an attribute up."""
    return "get_" + attribute.replace(" ", "_")


def draw_topic(rng: random.Random, *, person: bool = False) -> Topic:
    """Return a kind of fact, half of the time one that any entity can have; `person`: whose value is somebody."""
    entity = rng.choice(tuple(_PEOPLE))
    own = _PEOPLE[entity] if person else _PEOPLE[entity] + _THINGS[entity]
    general = _PEOPLE_OF_ANY if person else _PEOPLE_OF_ANY + _THINGS_OF_ANY
    return Topic(rng.choice(own if rng.random() < 0.5 else general), entity)
