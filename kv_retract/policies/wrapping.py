"""What policies that are made of policies have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import PolicyError
from .base import RetractionPolicy
from .reading import PolicySpec, policies_from, policy_from


class PolicyWrapper(RetractionPolicy):
    """A policy that asks others."""

    @abstractmethod
    def inner(self) -> Sequence[RetractionPolicy]:
        """Return the policies that it asks."""

    def finders(self) -> set[str]:
        """Return the names that its proposals can carry."""
        found: set[str] = set()
        for policy in self.inner():
            found |= policy.finders() if isinstance(policy, PolicyWrapper) else {policy.name}
        return found


@dataclass(kw_only=True)
class WrapperOfMany(PolicyWrapper):
    """A policy that asks several others, in order."""

    policies: Sequence[PolicySpec]
    """The inner policies, each as a policy, its name, or a mapping with name and parameters."""

    def __post_init__(self) -> None:
        """Build the inner policies; raises PolicyError where there is none or one is wrong."""
        self._built = self.policies = policies_from(self.policies)
        if not self._built:
            raise PolicyError(f"policy {self.name!r} has no inner policies; give at least one")

    def inner(self) -> Sequence[RetractionPolicy]:
        """Return the policies that it asks."""
        return self._built


@dataclass(kw_only=True)
class WrapperOfOne(PolicyWrapper):
    """A policy that asks one other."""

    policy: PolicySpec
    """The inner policy, as a policy, its name, or a mapping with name and parameters."""

    def __post_init__(self) -> None:
        """Build the inner policy; raises PolicyError where it is wrong."""
        self._built = self.policy = policy_from(self.policy)

    def inner(self) -> Sequence[RetractionPolicy]:
        """Return the policy that it asks."""
        return (self._built,)
