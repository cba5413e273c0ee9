"""Runs stages in the worker: a child process in which torch lives.

The daemon's own process stays small and survives an out-of-memory kill of the training. This is the
only way to the worker: a snapshot directory goes in, a result directory comes out, so that another
executor (several GPUs, another machine) can take its place. Never imports torch.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from storage import errors
from storage.errors import Cancelled, HoldfastError, Interrupted, StageError, WorkerError
from strategies.contract import (
    BlendJob,
    EvaluateJob,
    PreparedBase,
    PrepareJob,
    Progress,
    Record,
    TrainJob,
    TrainReport,
)

OnProgress = Callable[[Progress], None]
POLL_SECONDS = 0.2  # how soon a stop request is noticed
GRACE_SECONDS = 20.0  # for the worker to write its checkpoint
# Threads that wait must not burn the core that a neighbour needs: on a busy box spinning costs a factor.
WORKER_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}


class Stop:
    """A request to stop, and why: the cycle resumes after a shutdown, and ends after a cancel."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.reason: Literal["shutdown", "cancel"] | None = None

    def request(self, reason: Literal["shutdown", "cancel"]) -> None:
        if self.reason != "shutdown":  # nothing outranks a shutdown
            self.reason = reason
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, seconds: float) -> bool:
        return self._event.wait(seconds)

    def check(self) -> None:
        """Raises `Interrupted` or `Cancelled` when a stop was requested."""
        if self.is_set():
            raise Cancelled() if self.reason == "cancel" else Interrupted()


class Until(Stop):
    """A stop request of its own at a deadline, and whatever is asked of the one that it wraps.

    A stage that meets the deadline ends with `StageError`, as one that exceeds its time limit.
    """

    def __init__(self, stop: Stop, over: Callable[[], bool], why: str) -> None:
        super().__init__()
        self._stop, self._over, self._why = stop, over, why

    def is_set(self) -> bool:
        return self._stop.is_set() or self._over()

    def wait(self, seconds: float) -> bool:
        return self._stop.wait(seconds)

    def check(self) -> None:
        self._stop.check()
        if self._over():
            raise StageError(self._why)


class Executor(Protocol):
    """Where stages run. Each call returns when its result directory is complete."""

    def prepare(self, job: PrepareJob, on_progress: OnProgress, stop: Stop) -> PreparedBase: ...

    def train(self, job: TrainJob, on_progress: OnProgress, stop: Stop) -> TrainReport: ...

    def blend(self, job: BlendJob, on_progress: OnProgress, stop: Stop) -> None: ...

    def evaluate(self, job: EvaluateJob, on_progress: OnProgress, stop: Stop) -> None: ...

    def close(self) -> None: ...


class WorkerExecutor:
    """One child process at a time, kept between the stages of a cycle: its imports are paid once.

    Raises `WorkerError` when the child dies, `StageError` when it exceeds `time_limit` (seconds a stage),
    the error that the child reports, or `Interrupted`/`Cancelled` when asked to stop.
    """

    def __init__(self, *, time_limit: float, environment: dict[str, str] | None = None) -> None:
        self.time_limit = time_limit
        self._environment = environment or {}
        self._worker: _Worker | None = None

    def prepare(self, job: PrepareJob, on_progress: OnProgress, stop: Stop) -> PreparedBase:
        return PreparedBase.from_dict(self._run("prepare", job, on_progress, stop))

    def train(self, job: TrainJob, on_progress: OnProgress, stop: Stop) -> TrainReport:
        return TrainReport.from_dict(self._run("train", job, on_progress, stop))

    def blend(self, job: BlendJob, on_progress: OnProgress, stop: Stop) -> None:
        self._run("blend", job, on_progress, stop)

    def evaluate(self, job: EvaluateJob, on_progress: OnProgress, stop: Stop) -> None:
        self._run("evaluate", job, on_progress, stop)

    @property
    def pid(self) -> int | None:
        return self._worker.process.pid if self._worker else None

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, stage: str, job: Record, on_progress: OnProgress, stop: Stop) -> dict[str, Any]:
        stop.check()
        if self._worker is None:
            self._worker = _Worker(self._environment)
        try:
            return self._follow(self._worker, stage, job, on_progress, stop)
        except BaseException:
            self.close()  # whatever went wrong, the next stage gets a fresh process
            raise

    def _follow(
        self, worker: "_Worker", stage: str, job: Record, on_progress: OnProgress, stop: Stop
    ) -> dict[str, Any]:
        worker.send({"stage": stage, "job": json.loads(job.to_json())})
        deadline = time.monotonic() + self.time_limit
        while True:
            message = worker.receive(POLL_SECONDS)
            if message is not None:
                if "done" in message:
                    return dict(message["done"])
                if "progress" in message:
                    on_progress(Progress.from_dict(message["progress"]))
                elif "interrupted" in message:
                    stop.check()
                    raise WorkerError(
                        "the worker was stopped from outside; the cycle continues from its checkpoint"
                    )
                elif "error" in message:
                    raise _rebuild(message["error"])
            if stop.is_set():
                worker.stop()
                stop.check()
            if time.monotonic() > deadline:
                worker.stop()
                raise StageError(
                    f"the {stage} stage took longer than {self.time_limit / 60:.0f} minutes and was stopped; "
                    "raise training.time_limit or lower training.epochs"
                )


class _Worker:
    """The child and its two pipes. Standard error goes to the daemon's, hence to the journal.

    Its temporary files are ours to remove: Avalanche's import alone makes two folders, and the child does
    not live to an orderly end. Raises `StageError` where none can be made, and `WorkerError` where no child
    can be started.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        try:
            self._scratch = tempfile.TemporaryDirectory(prefix="holdfast-", ignore_cleanup_errors=True)
        except OSError as error:
            raise StageError(f"{tempfile.gettempdir()}: {error.strerror}; make room there") from None
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "daemon.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**WORKER_ENVIRONMENT, **os.environ, **environment, "TMPDIR": self._scratch.name},
                cwd=Path(__file__).resolve().parent.parent,
                start_new_session=True,  # a Ctrl-C in the terminal is the daemon's to handle
                text=True,
            )
        except OSError as error:  # no memory, or no process more, just now
            self._scratch.cleanup()
            raise WorkerError(
                f"the worker cannot be started: {error.strerror}; see `journalctl -k`"
            ) from None
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, name="worker-output", daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(f"the worker is gone ({self._ending()})") from None

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """The next message, or None when there is none yet. Raises `WorkerError` when the child is dead."""
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            return None
        if line is None:
            raise WorkerError(f"the worker ended without a result ({self._ending()})")
        try:
            return dict(json.loads(line))
        except ValueError:
            raise WorkerError(f"the worker ended in the middle of a message ({self._ending()})") from None

    def stop(self) -> None:
        """SIGTERM, so that a checkpoint is written; SIGKILL when that takes too long."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # end of input: the worker exits at once
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._scratch.cleanup()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def _ending(self) -> str:
        try:
            code = self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return f"it closed its output and did not end within {GRACE_SECONDS:.0f} s: killed"
        if code == -signal.SIGKILL:
            return "killed by signal 9; the system does this when memory runs out: see `journalctl -k`"
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}; see the log above"


def _rebuild(error: dict[str, str]) -> HoldfastError:
    kind = getattr(errors, error.get("type", ""), WorkerError)
    if not (isinstance(kind, type) and issubclass(kind, HoldfastError)):
        kind = WorkerError
    return kind(error.get("message"))
