"""Hypothesis looks for a short sequence of operations that breaks a law of the cache."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)


def machine_of(make_world, page_size: int) -> type[RuleBasedStateMachine]:
    class CacheMachine(RuleBasedStateMachine):
        @initialize(num_pages=st.integers(8, 24))
        def start(self, num_pages: int) -> None:
            self.world = make_world(page_size, num_pages)

        @rule(data=st.data())
        def begin(self, data) -> None:
            self.world.begin(self.choices(data))

        @precondition(lambda self: self.world.running)
        @rule(data=st.data())
        def append(self, data) -> None:
            self.world.append(self.choices(data))

        @precondition(lambda self: self.world.running)
        @rule(data=st.data())
        def fork(self, data) -> None:
            self.world.fork(self.choices(data))

        @precondition(lambda self: self.world.running)
        @rule(data=st.data())
        def publish(self, data) -> None:
            self.world.publish(self.choices(data))

        @precondition(lambda self: self.world.running)
        @rule(data=st.data())
        def end(self, data) -> None:
            self.world.end(self.choices(data))

        @rule(data=st.data())
        def edit(self, data) -> None:
            self.world.edit(self.choices(data))

        @rule(data=st.data())
        def drop(self, data) -> None:
            self.world.drop(self.choices(data))

        @rule(data=st.data())
        def evict(self, data) -> None:
            self.world.evict(self.choices(data))

        @rule(data=st.data())
        def lock(self, data) -> None:
            self.world.lock(self.choices(data))

        @precondition(lambda self: self.world.locks)
        @rule(data=st.data())
        def unlock(self, data) -> None:
            self.world.unlock(self.choices(data))

        @invariant()
        def laws_hold(self) -> None:
            if hasattr(self, "world"):
                self.world.check()

        @staticmethod
        def choices(data):
            return lambda n: data.draw(st.integers(0, n - 1))

    return CacheMachine


@pytest.mark.parametrize("page_size", [1, 2, 4])
def test_no_sequence_of_operations_breaks_a_law(make_world, page_size: int) -> None:
    run_state_machine_as_test(
        machine_of(make_world, page_size),
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
