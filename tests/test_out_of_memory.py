"""The kernel finds no more memory: a cgroup with a limit holds the daemon and a larger neighbour.

Skipped where no such cgroup can be made, with the reason.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bots import collect, lesson, write_config
from tests.daemons import SECONDS, DaemonProcess, cli

pytestmark = pytest.mark.acceptance

MEGABYTE = 1 << 20
# Larger than any worker of a tiny model, so that the kernel would take it first if it went by size.
NEIGHBOUR = f"held = b'x' * {1024 * MEGABYTE}; print('ready', flush=True); input()"


@pytest.fixture
def memory() -> Iterator["MemoryCgroup"]:
    try:
        cgroup = MemoryCgroup()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made: {error}")
    try:
        yield cgroup
    finally:
        cgroup.remove()


class MemoryCgroup:
    """Of either version: the files have other names. What is in it shares one limit."""

    def __init__(self) -> None:
        parent, self._used, self._limit = _hierarchy()
        self._path = parent / f"holdfast-test-{os.getpid()}"
        self._path.mkdir()
        if not (self._path / self._limit).exists():
            self._path.rmdir()
            raise OSError(f"{parent} hands the memory controller down to nobody")

    def take(self, process: subprocess.Popen[str]) -> None:
        (self._path / "cgroup.procs").write_text(str(process.pid))

    def leave(self, size: int) -> None:
        """This many bytes more than are used now."""
        used = int((self._path / self._used).read_text())
        (self._path / self._limit).write_text(str(used + size))

    def remove(self) -> None:
        deadline = time.monotonic() + SECONDS
        while (self._path / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)  # killed, and not yet gone
        self._path.rmdir()


def _hierarchy() -> tuple[Path, str, str]:
    """This process's memory cgroup, and the names of its files for what is used and for the limit."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(where + own["memory"]), "memory.usage_in_bytes", "memory.limit_in_bytes"
        if kind == "cgroup2" and "memory" in Path(where, "cgroup.controllers").read_text().split():
            return Path(where + own[""]), "memory.current", "memory.max"
    raise OSError("no hierarchy with the memory controller is mounted")


@contextmanager
def neighbour(memory: MemoryCgroup) -> Iterator[subprocess.Popen[str]]:
    """Another process of the same machine, the bot itself for one."""
    process = subprocess.Popen(
        ["sh", "-c", 'read go && exec "$@"', "sh", sys.executable, "-c", NEIGHBOUR],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        memory.take(process)
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_worker_is_what_the_kernel_kills_and_the_cycle_says_so(
    tmp_path: Path, base: Path, memory: MemoryCgroup
) -> None:
    path = write_config(tmp_path, base)
    collect(tmp_path / "qa.duckdb", lesson("colours"))
    with neighbour(memory) as other, DaemonProcess(path) as daemon:
        memory.take(daemon.process)
        memory.leave(300 * MEGABYTE)  # the daemon grows by half of that, the worker by more
        failed = daemon.ended(daemon.retrain())
        assert other.poll() is None, "a bot beside it is left alone"
        assert failed["state"] == "failed"
        assert "killed by signal 9; the system does this when memory runs out" in failed["reason"]
        assert "3 attempts" in failed["reason"]
        memory.leave(8192 * MEGABYTE)
        assert daemon.ended(daemon.retrain())["state"] == "promoted", daemon.log.read_text()
        assert daemon.stop() == 0
    assert "nothing is wrong" in cli(path, "audit").stdout
