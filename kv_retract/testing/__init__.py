"""Public conformance kit: what every engine, eraser, policy, prefix cache and ledger must pass.

Subclass a suite in a pytest module and give it the object under test, as with `langchain-tests`:

    class TestMyEraser(EraserConformance):
        @pytest.fixture
        def eraser(self):
            return MyEraser()

| suite | fixtures to provide | needs, besides pytest |
|---|---|---|
| `erasers.EraserConformance` | `eraser` | the extra `hf` |
| `policies.PolicyConformance` | `policy`, `thread` | `hypothesis` |
| `prefix_cache.PrefixCacheConformance` | `make_index` | nothing |
| `engines.EngineConformance` | `make_engine` | the extra `hf` |
| `ledgers.LedgerConformance` | `make_ledger` | nothing |

What an implementation may decide for itself is a class attribute or a fixture with a default; each suite's docstring
lists them. A suite that passes says that the contract holds, not that the implementation is good.
"""

import sys

if "pytest" in sys.modules:  # the tiny models are of use without it
    import pytest

    # A failing assert of a suite then shows its values, as one in a test file does.
    for name in (
        "engine_edits", "engine_fixtures", "engines", "erasers", "ledgers", "policies", "prefix_cache",
        "prefix_cache_walk",
    ):  # fmt: skip
        pytest.register_assert_rewrite(f"{__name__}.{name}")
