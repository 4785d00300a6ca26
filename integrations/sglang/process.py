"""A server as a child process: started, waited for, stopped. For tests and benchmarks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from .config import environment_before
from .serve import ServeError


@dataclass(frozen=True, slots=True)
class ChildServer:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    """What it writes."""

    def tail(self) -> str:
        """Return the end of the log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:]


def free_port() -> int:
    """Return a port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def running_server(
    venv: Path, folder: Path, options: Sequence[str] = (), *, port: int | None = None, seconds: float = 300
) -> Iterator[ChildServer]:
    """Run `kv-retract serve` on loopback while the block runs; at its end it is killed.

    Args:
        venv: environment with SGLang and kv-retract.
        folder: for the log.
        options: of `kv-retract serve`.
        port: None: a free one.
        seconds: how long a start may take.

    Raises:
        ServeError: there is no such environment, or the server ended or did not answer in time.
    """
    program = venv / "bin" / "kv-retract"
    if not program.exists():
        raise ServeError(f"expected an environment with SGLang and kv-retract, found no {str(program)!r}")
    port = port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"server-{port}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(program), "serve", "--port", str(port), *options],
            stdout=output, stderr=subprocess.STDOUT, env=environment_before(program.parent), start_new_session=True,
        )  # fmt: skip
    server = ChildServer(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait(server, seconds)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(server: ChildServer, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise ServeError(f"the server ended: {server.tail()}")
        try:
            if httpx.get(f"{server.url}/health", timeout=30).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise ServeError(f"the server did not answer within {seconds:.0f} s: {server.tail()}")
