"""The examples of CONTRIBUTING.md pass the suites that it names."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from kv_retract.erasers import ERASERS
from kv_retract.policies import POLICIES
from kv_retract.testing.engines import EngineConformance
from kv_retract.testing.erasers import EraserConformance
from kv_retract.testing.policies import PolicyConformance

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def guide():
    """The names that the page's code defines; the registries stay as they were."""
    kept = [(registry, dict(registry._factories)) for registry in (ERASERS, POLICIES)]
    names = {"__name__": "guide"}
    try:
        for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            exec(compile(block, PAGE.name, "exec"), names)
    finally:
        for registry, factories in kept:
            registry._factories.clear()
            registry._factories.update(factories)
    return SimpleNamespace(**names)


class TestLongToolResult(PolicyConformance):
    results = ("short", "longer than ten characters", "")

    @pytest.fixture
    def policy(self, guide):
        return guide.LongToolResult(max_chars=10)

    @pytest.fixture
    def thread(self, guide):
        return guide.thread


class TestFadeEraser(EraserConformance):
    @pytest.fixture
    def eraser(self, guide):
        return guide.FadeEraser(factor=0.0)


class TestCachelessEngine(EngineConformance):
    caches = False

    @pytest.fixture
    def make_engine(self, guide):
        return guide.CachelessEngine


def test_the_guide_shows_the_suites(guide):
    assert issubclass(guide.TestLongToolResult, PolicyConformance)
    assert issubclass(guide.TestCachelessEngine, EngineConformance) and not guide.TestCachelessEngine.caches
