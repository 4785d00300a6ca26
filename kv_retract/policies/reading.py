"""Policies from plain data: a name with parameters, or a file of them."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import KVRetractError, PolicyError
from .base import POLICIES, RetractionPolicy

PolicySpec: TypeAlias = RetractionPolicy | Mapping[str, Any] | str
"""A policy, its name, or a mapping with `name` and its parameters: `{"name": "superseded", "readers": ["get_*"]}`."""


class PolicySpecError(PolicyError):
    """A spec of a policy is wrong; the message begins with its place."""

    def __init__(self, place: str, problem: str) -> None:
        self.place, self.problem = place, problem
        super().__init__(f"{place}: {problem}")


def policy_from(spec: PolicySpec, *, place: str = "policy") -> RetractionPolicy:
    """Build a policy from plain data; a policy is returned as it is.

    Wrappers take their inner policies in the same form: `{"name": "any_of", "policies": ["tool_error", {...}]}`.

    Args:
        spec: see `PolicySpec`.
        place: where the spec stands, for messages.

    Raises:
        PolicySpecError: an unknown name or parameter, or a parameter of a wrong form; says where, and what is known.
    """
    if isinstance(spec, RetractionPolicy):
        return spec
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        raise PolicySpecError(place, f"expected a policy, its name, or a mapping with a name, got {spec!r}")
    parameters = dict(spec)
    name = parameters.pop("name", None)
    if not isinstance(name, str) or not all(isinstance(key, str) for key in parameters):
        known = ", ".join(POLICIES.names())
        raise PolicySpecError(place, f"expected a mapping with the name of a policy, got {spec!r}; known: {known}")
    try:
        takes = _parameters(name, parameters)
    except KVRetractError as error:
        raise PolicySpecError(place, str(error)) from error
    if unknown := sorted(parameters.keys() - takes):
        raise PolicySpecError(
            place,
            f"policy {name!r} has no parameter {', '.join(map(repr, unknown))}; "
            f"known: {', '.join(sorted(takes)) or 'none'}",
        )
    try:
        policy = POLICIES.create(name, **parameters)
    except PolicySpecError as error:  # of an inner policy
        raise PolicySpecError(f"{place}.{error.place}", error.problem) from error
    except (KVRetractError, ValueError, TypeError, AttributeError) as error:
        raise PolicySpecError(place, str(error)) from error
    if not isinstance(policy, RetractionPolicy):
        raise PolicySpecError(place, f"{name!r} is registered as a policy, but makes a {type(policy).__name__}")
    return policy


def policies_from(specs: Sequence[PolicySpec], *, place: str = "policies") -> tuple[RetractionPolicy, ...]:
    """Build a list of policies; raises PolicySpecError, see `policy_from`."""
    if isinstance(specs, str | Mapping) or not isinstance(specs, Sequence):
        raise PolicySpecError(place, f"expected a list of policies, got {specs!r}")
    return tuple(policy_from(spec, place=f"{place}[{number}]") for number, spec in enumerate(specs))


def read_policies(path: str | PathLike[str]) -> tuple[RetractionPolicy, ...]:
    """Read a file that holds a list of specs: `.json`, or `.yaml` and `.yml` where PyYAML is installed.

    Raises:
        PolicyError: the file cannot be read or is malformed, or a spec in it is wrong: `PolicySpecError`, whose place
            is as in `policies.yaml[2].policies[0]`, counted from 0.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix not in (".json", ".yaml", ".yml"):
        raise PolicyError(f"expected a file that ends with .json, .yaml or .yml, got {str(file)!r}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"cannot read {str(file)!r}: {error}; check path, permissions and UTF-8") from error
    return policies_from(_json(text, file) if suffix == ".json" else _yaml(text, file), place=file.name)


def _parameters(name: str, given: Mapping[str, Any]) -> set[str]:
    factory = POLICIES.factory(name)
    if isinstance(factory, type) and dataclasses.is_dataclass(factory):
        return {field.name for field in dataclasses.fields(factory) if field.init}
    parameters = inspect.signature(factory).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return set(given) if takes_any else {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}


def _json(text: str, file: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"expected JSON in {str(file)!r}: {error}") from error


def _yaml(text: str, file: Path) -> Any:
    try:
        yaml = import_module("yaml")
    except ImportError as error:
        raise PolicyError(
            f"reading {str(file)!r} needs PyYAML: install it (`pip install pyyaml`), or write the list as JSON"
        ) from error
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise PolicyError(f"expected YAML in {str(file)!r}: {error}") from error
