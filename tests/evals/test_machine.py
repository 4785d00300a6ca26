import getpass
import json
import platform
from pathlib import Path

import torch

from kv_retract import __version__
from kv_retract.evals import machine
from kv_retract.evals.machine import describe_machine, versions


def test_facts_of_the_machine():
    facts = describe_machine("cpu")
    assert facts["device"] == "cpu" and "accelerator" not in facts
    assert facts["threads"] == torch.get_num_threads() and facts["cores"] >= 1
    assert facts["processor"] and facts["system"].startswith(platform.system())
    assert json.loads(json.dumps(facts)) == facts


def test_hosts_users_and_folders_are_not_told():
    told = json.dumps([describe_machine("cpu"), versions()])
    for private in (platform.node(), str(Path.home()), str(Path.cwd())):
        assert private not in told
    assert getpass.getuser() not in describe_machine("cpu").values()


def test_versions_are_those_in_use():
    found = versions()
    assert found["python"] == platform.python_version() and found["kv-retract"] == __version__
    assert found["torch"] == torch.__version__ and {"transformers", "tokenizers", "numpy"} <= set(found)


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(machine, "_PACKAGES", ("numpy", "no-such-package"))
    assert set(versions()) == {"python", "numpy"}


def test_a_system_without_proc_still_has_a_processor(monkeypatch):
    assert machine._lines("/no/such/file") == []
    monkeypatch.setattr(machine, "_lines", lambda path: [])
    facts = describe_machine("cpu")
    assert facts["memory_gib"] is None and facts["processor"] in (platform.processor(), platform.machine())


def test_an_accelerator_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert describe_machine("cuda:1")["accelerator"] == "card 1"
