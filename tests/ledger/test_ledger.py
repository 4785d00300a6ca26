"""The public conformance suite over both ledgers."""

import pytest

from kv_retract.errors import LedgerError
from kv_retract.ledger.ledger import MemoryLedger, SqliteLedger
from kv_retract.testing.ledgers import LedgerConformance, record
from kv_retract.types import Status


class TestMemoryLedger(LedgerConformance):
    @pytest.fixture
    def make_ledger(self):
        return MemoryLedger


class TestSqliteLedger(LedgerConformance):
    durable = True

    @pytest.fixture
    def make_ledger(self, tmp_path):
        return lambda: SqliteLedger(tmp_path / "ledger.sqlite")


@pytest.fixture(params=["memory", "sqlite"])
def ledger(request, tmp_path):
    with MemoryLedger() if request.param == "memory" else SqliteLedger(tmp_path / "ledger.sqlite") as made:
        yield made


def test_errors_name_the_threads_and_what_they_hold(ledger):
    ledger.add("t", [record(1)])
    with pytest.raises(LedgerError, match="'t' has no retraction 'nobody' among its 1"):
        ledger.set_status("t", {"nobody": Status.EXACT})
    ledger.add("u", [record(1), record(2)])
    with pytest.raises(LedgerError, match="cannot fork 't' into 'u': it has 2 other retractions"):
        ledger.fork("t", "u")
    with pytest.raises(LedgerError, match="cannot fork 'empty'"):
        ledger.fork("empty", "t")
