from pathlib import Path

import pytest

from kv_retract.evals.progress import expected_traces, silent


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("{}\n\n{}\n  \n{}")
    return path


def test_lines_that_hold_something_are_counted(lines, tmp_path):
    more = tmp_path / "u.JSONL"
    more.write_text("{}\n")
    assert expected_traces([lines, more]) == 4
    assert [expected_traces([lines], limit) for limit in (2, 9)] == [2, 3]


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("other", ["missing.jsonl", "t.json", "."])
def test_nobody_knows_how_much_other_files_hold(lines, tmp_path, other, limit):
    (tmp_path / "t.json").write_text("[]")
    assert expected_traces([lines, tmp_path / other], limit) == limit


def test_a_file_that_cannot_be_read_is_left_to_the_reader(lines, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert expected_traces([lines]) is None


def test_silence(capfd):
    silent(1, None)
    assert capfd.readouterr() == ("", "")
