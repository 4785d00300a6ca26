"""Fixtures: a program that has loaded the model, and forks processes that are killed (worker.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


class Nursery:
    """Talks to worker.py; every order starts one process and waits for its end."""

    def __init__(self, errors):
        self._errors = errors.open("w+")
        # Not this process: a fork of it would inherit the threads and locks of every test before.
        self._program = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        self._answer()

    def order(self, **order):
        """Carry out an order; return how it ended. What a process complained of is raised."""
        self._program.stdin.write(json.dumps(order) + "\n")
        self._program.stdin.flush()
        ended = self._answer()
        assert ended["status"] in (0, -9), f"{order} ended with {ended['status']}:\n{self._complaint()}"
        return ended

    def close(self):
        self._program.stdin.close()
        self._program.wait(60)
        self._program.stdout.close()
        self._errors.close()

    def _answer(self):
        line = self._program.stdout.readline()
        assert line, f"the program ended:\n{self._complaint()}"
        return json.loads(line)

    def _complaint(self):
        self._errors.seek(0)
        return self._errors.read()[-4000:]


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    opened = Nursery(tmp_path_factory.mktemp("nursery") / "stderr")
    yield opened
    opened.close()
