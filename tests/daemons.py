"""Real daemon processes for tests: started, listened to as systemd would, signalled, and always ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from daemon import config
from daemon.control import Client
from daemon.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 400.0  # far more than anything here takes; a test that waits this long has failed


def environment(**extra: str) -> dict[str, str]:
    """This process's, without anybody's Holdfast settings, and with the clone to import from."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HOLDFAST_")}
    return {**kept, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", **extra}


def command(config_path: Path, *args: str) -> list[str]:
    return [sys.executable, "-m", "daemon.cli", "--config", str(config_path), *args]


def cli(config_path: Path, *args: str, stdin: str = "", **extra: str) -> subprocess.CompletedProcess[str]:
    """A command of the CLI, run to its end in a directory that has nothing to do with it."""
    return subprocess.run(
        command(config_path, *args),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=config_path.parent if config_path.parent.exists() else "/",
        env=environment(**extra),
        check=False,
    )


class DaemonProcess:
    """`daemon run` as a child. Entering waits until it is ready, or says something else to systemd; leaving
    kills it if it still lives."""

    start = staticmethod(subprocess.Popen)  # another way to start a process, for who has one

    def __init__(
        self, config_path: Path, *, until: str = "READY=1", argv: list[str] | None = None, **extra: str
    ) -> None:
        self.config_path = config_path
        self.settings: Settings = config.load(config_path)
        self._ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ear.bind("")  # an abstract name of the kernel's choice
        self._ear.settimeout(SECONDS)
        self.heard: list[str] = []
        self._first = until
        self.log = config_path.parent / "daemon.log"
        address = "@" + self._ear.getsockname()[1:].decode()
        with self.log.open("a") as log:
            self.process = self.start(
                argv or command(config_path, "run"),
                stderr=log,
                cwd=config_path.parent,
                env=environment(NOTIFY_SOCKET=address, **extra),
            )

    def __enter__(self) -> Self:
        self.hear(self._first)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._ear.close()
        if kind is not None:
            print(self.log.read_text())  # pytest shows it with the failure

    def hear(self, wanted: str) -> None:
        """Waits until the daemon has told systemd a line that begins like this."""
        while True:
            self._ear.settimeout(0.2)
            try:
                lines = self._ear.recv(4096).decode().split("\n")
            except TimeoutError:
                if self.process.poll() is not None:
                    raise AssertionError(
                        f"ended with {self.process.returncode}: {self.log.read_text()}"
                    ) from None
                continue
            self.heard += lines
            if any(line.startswith(wanted) for line in lines):
                return

    def call(self, name: str, **args: Any) -> dict[str, Any]:
        return Client(self.settings.socket_path, timeout=SECONDS).call(name, **args)

    def status(self) -> dict[str, Any]:
        return self.call("status")

    def until(self, met: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first status for which this holds; told so when it never comes."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            told = self.status()
            if met(told):
                return told
            time.sleep(0.02)  # leaves the processor to the daemon
        raise AssertionError(f"never happened; last seen: {told}\n{self.log.read_text()}")

    def retrain(self) -> int:
        """Asks for a cycle; its number."""
        return int(self.call("retrain")["cycle"]["id"])

    def ended(self, cycle: int) -> dict[str, Any]:
        """The cycle, once it has ended."""
        return dict(self.call("follow", cycle=cycle)["cycle"])

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.signal(signal.SIGTERM)
        return self.process.wait(SECONDS)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(SECONDS)


def read_json(ran: subprocess.CompletedProcess[str]) -> Any:
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def training_step(told: dict[str, object]) -> int:
    """Which training step the running cycle is at."""
    daemon = told["daemon"]
    assert isinstance(daemon, dict)
    progress = daemon["activity"]["progress"]
    return int(progress["step"]) if progress and progress["stage"] == "train" else 0


def children(pid: int) -> list[int]:
    """By parent, as /proc/PID/task/*/children would lose those of a thread that ends in between."""
    with suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children()]
    return []
