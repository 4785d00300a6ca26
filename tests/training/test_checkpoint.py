"""The folder of a run: whole states only, one configuration, and errors that say what to do."""

import json

import pytest
import torch

from kv_retract.errors import KVRetractError
from kv_retract.training.checkpoint import CheckpointError, RunFolder

STATE = {"model": {"w": torch.arange(3.0)}, "step": 5}


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "a" / "run", {"steps": 10, "lengths": ((0.0, 96),)})


def names(folder):
    return sorted(path.name for path in folder.path.iterdir())


def test_a_new_run(folder):
    assert names(folder) == ["config.json"] and folder.load() is None and folder.entries() == []
    assert json.loads((folder.path / "config.json").read_text()) == {"steps": 10, "lengths": [[0.0, 96]]}


def test_what_is_saved_is_loaded_and_replaced(folder):
    folder.save(STATE)
    loaded = folder.load()
    assert loaded["step"] == 5 and torch.equal(loaded["model"]["w"], STATE["model"]["w"])
    folder.save({**STATE, "step": 6})
    assert folder.load()["step"] == 6 and names(folder) == ["config.json", "state.pt"]


def test_the_log_grows_across_openings(folder):
    folder.log({"step": 1, "loss": 0.5})
    again = RunFolder(folder.path, {"lengths": [[0.0, 96]], "steps": 10})
    again.log({"step": 2})
    assert folder.entries() == [{"step": 1, "loss": 0.5}, {"step": 2}]


def test_a_kill_while_saving_leaves_the_old_state(folder, monkeypatch):
    folder.save(STATE)

    def killed(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.save({**STATE, "step": 6})
    assert folder.load()["step"] == 5
    folder.save({**STATE, "step": 7})
    assert folder.load()["step"] == 7 and names(folder) == ["config.json", "state.pt"], "what was left is replaced"


@pytest.mark.parametrize("config", [{"steps": 11}, {}, {"steps": 10, "more": 1}])
def test_another_configuration(folder, config):
    before = (folder.path / "config.json").read_text()
    with pytest.raises(CheckpointError, match="another configuration .*choose another folder") as caught:
        RunFolder(folder.path, {"lengths": ((0.0, 96),), **config} if config else {})
    assert ("(more)" if "more" in config else "steps") in str(caught.value)
    assert isinstance(caught.value, KVRetractError)
    assert (folder.path / "config.json").read_text() == before


@pytest.mark.parametrize("content", [b"", b"not a state", b"PK\x03\x04 half"])
def test_a_damaged_state(folder, content):
    (folder.path / "state.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot read .*state\.pt.*remove it to begin anew"):
        folder.load()


def test_a_state_that_was_cut(folder):
    folder.save({"model": {"w": torch.arange(5000.0)}})
    file = folder.path / "state.pt"
    file.write_bytes(file.read_bytes()[:9000])
    with pytest.raises(CheckpointError):
        folder.load()


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "null"])
def test_a_damaged_configuration(folder, content):
    (folder.path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="choose another folder"):
        RunFolder(folder.path, {})


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CheckpointError, match="cannot use .* choose another folder"):
            RunFolder(path, {})
