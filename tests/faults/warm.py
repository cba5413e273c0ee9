"""Processes that start in milliseconds: forked from one that has imported everything already.

Torch and MLflow take longer to import than a tiny cycle takes to run. What is forked is the real `daemon run`
and the real worker, each in a process of its own with its own pipes, environment, signals and exit code; only
the imports are shared.
"""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver, reduction
from pathlib import Path
from typing import Any

from tests.daemons import DaemonProcess
from tests.faults import places

_PRELOAD = ["tests.faults.preload"]


@cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


class WarmProcess:
    """`python -m daemon.cli …` or `python -m daemon.worker`, as `subprocess.Popen` would start it."""

    def __init__(
        self,
        args: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | Path,
        stdin: int | None = None,
        stdout: int | None = None,
        stdout_to: int | None = None,
        stderr: Any = None,
        **rest: object,
    ) -> None:
        assert args[1] == "-m", args
        mine, theirs = [], []
        self.stdin = self.stdout = None
        if stdin == subprocess.PIPE:
            read, write = os.pipe()
            self.stdin = os.fdopen(write, "w")
            mine.append(read)
            theirs.append((read, 0))
        if stdout == subprocess.PIPE:
            read, write = os.pipe()
            self.stdout = os.fdopen(read)
            mine.append(write)
            theirs.append((write, 1))
        if stdout_to is not None:
            theirs.append((stdout_to, 1))
        theirs.append((stderr.fileno() if stderr is not None else 2, 2))
        ends = [(reduction.DupFd, fd, number) for fd, number in theirs]
        self._process = _context().Process(
            target=_Entry(args[2], list(args[3:]), dict(env), str(cwd), ends), daemon=False
        )
        self._process.start()
        for fd in mine:
            os.close(fd)

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        code = self._process.exitcode
        return None if code is None else int(code)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("warm process", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Entry:
    """What runs in the child. Pickled on the way there, which is when descriptors may be handed over."""

    def __init__(self, module: str, args: list[str], env: dict[str, str], cwd: str, ends: list[Any]) -> None:
        self.told = (module, args, env, cwd)
        self.ends = ends

    def __reduce__(self) -> Any:
        return _Arrived, (*self.told, [(make(fd), number) for make, fd, number in self.ends])


class _Arrived:
    def __init__(self, module: str, args: list[str], env: dict[str, str], cwd: str, ends: list[Any]) -> None:
        self.module, self.args, self.env, self.cwd, self.ends = module, args, env, cwd, ends

    def __call__(self) -> None:
        for end, number in self.ends:
            os.dup2(end.detach(), number)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        os.environ.clear()
        os.environ.update(self.env)
        os.chdir(self.cwd)
        sys.argv = [self.module, *self.args]
        if self.module == "daemon.worker":
            os.setsid()
            places.arm("worker")
            from daemon import worker

            code = worker.main()
            sys.stderr.flush()
            os._exit(code)
        # The worker comes from the same server; multiprocessing would start one for each process that asks.
        forkserver._forkserver.ensure_running = lambda: None
        _workers_start_warm()
        places.arm("daemon")
        importlib.import_module("daemon.cli").main()


def _workers_start_warm() -> None:
    """The daemon asks `subprocess` for its worker, and for nothing else."""
    from daemon import executor

    class Subprocess:
        PIPE, TimeoutExpired = subprocess.PIPE, subprocess.TimeoutExpired

        @staticmethod
        def Popen(args: Sequence[str], **options: Any) -> WarmProcess:
            places.WORKERS.append(started := WarmProcess(args, **options))
            return started

    executor.subprocess = Subprocess  # type: ignore[assignment]


class WarmDaemon(DaemonProcess):
    """`daemon run` as `DaemonProcess`, warm."""

    start = staticmethod(WarmProcess)
