"""The worker process: real children, real signals, and adapters equal to the last bit.

Starting one costs many seconds of imports, so children are kept from test to test while they live.
"""

import errno
import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from daemon import executor as executors
from daemon.executor import Stop, Until, WorkerExecutor, _Worker
from storage.artifacts import atomic_dir, is_complete, made_for
from storage.errors import Cancelled, StageError, WorkerError
from strategies.checkpoint import INFO
from strategies.contract import (
    BlendJob,
    LoraSpec,
    PreparedBase,
    PrepareJob,
    Progress,
    Record,
    StrategySpec,
    TrainJob,
    TrainReport,
)
from tests.daemons import SECONDS
from tests.trainings import SPEC, adapter_bytes, job, lesson, run, snapshot, state

ROOT = Path(__file__).resolve().parent.parent


class Child:
    """A worker and its pipes, as the daemon holds them."""

    def __init__(self, command: tuple[str, ...] = ("-m", "daemon.worker")) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        assert self.process.stdout is not None
        fcntl.fcntl(self.process.stdout, fcntl.F_SETPIPE_SZ, 4096)  # it gets no further ahead than we listen

    def ask(self, stage: str, asked: Record | dict[str, Any]) -> None:
        assert self.process.stdin is not None
        values = json.loads(asked.to_json()) if isinstance(asked, Record) else asked
        self.process.stdin.write(json.dumps({"stage": stage, "job": values}) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """The next message; every line must be one."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the worker ended: {self.process.wait(SECONDS)} {self.errors()}"
        return dict(json.loads(line))

    def answer(self) -> dict[str, Any]:
        """The first message that is not progress."""
        while "progress" in (message := self.hear()):
            pass
        return message

    def hear_step(self, step: int) -> None:
        """Waits until training has come that far."""
        while True:
            message = self.hear()
            progress = Progress.from_dict(message["progress"])
            if progress.stage == "train" and progress.step >= step:
                return

    def train(self, asked: TrainJob) -> TrainReport:
        self.ask("train", asked)
        message = self.answer()
        assert "done" in message, message
        return TrainReport.from_dict(message["done"])

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        self.process.kill()
        self.process.wait(SECONDS)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


class Children:
    """Hands out the living child, or a new one."""

    def __init__(self) -> None:
        self.all: list[Child] = []

    def get(self) -> Child:
        if not self.all or not self.all[-1].alive():
            self.all.append(Child())
        return self.all[-1]


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    found = Children()
    yield found
    for child in found.all:
        child.end()


@pytest.fixture(scope="module")
def cycles(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainJob, TrainJob]:
    """Two cycles with everything on, run one after the other in this process: what children must equal."""
    home = tmp_path_factory.mktemp("cycles")
    strategy = StrategySpec(methods=("replay", "ewc"), fisher_rows=6, ewc_lambda=100.0)
    common = {"strategy": strategy, "lora": LoraSpec(rank=2, alpha=4, dropout=0.3)}
    first = job(base, snapshot(home / "first", lesson("a", 12)), home / "one", **common)
    data = snapshot(
        home / "second", lesson("b", 12), lesson("b", 4, split="validation", start=40), lesson("a", 12)
    )
    spec = replace(SPEC, epochs=25, patience=25)  # long enough to be hit in the middle
    second = job(base, data, home / "two", home / "one", train=spec, **common)
    run(first)
    run(second)
    return first, second


def elsewhere(asked: TrainJob, home: Path, parent: Path | None = None) -> TrainJob:
    changes = {"parent": str(parent)} if parent else {}
    return replace(asked, out=str(home / "out"), work=str(home / "work"), **changes)


def assert_same(one: TrainJob, other: TrainJob) -> None:
    assert adapter_bytes(one.out) == adapter_bytes(other.out)
    assert state(one.out) == state(other.out)


def test_a_directory_is_made_for_the_job_in_its_manifest_and_no_other(tmp_path: Path) -> None:
    with atomic_dir(tmp_path / "out", {"job": "one"}):
        assert not made_for(tmp_path / "out", "one")
    with atomic_dir(tmp_path / "old"):
        pass
    assert made_for(tmp_path / "out", "one")
    assert not made_for(tmp_path / "out", "two")
    assert not made_for(tmp_path / "old", "one")


def test_another_process_makes_the_same_adapter_and_the_same_state(
    children: Children, cycles: tuple[TrainJob, TrainJob], tmp_path: Path
) -> None:
    """The second cycle knows the first one's penalty and memory only from disk."""
    child, (first, second) = children.get(), cycles
    mine = elsewhere(first, tmp_path / "first")
    report = child.train(mine)
    assert report.resumed == 0
    assert_same(mine, first)
    after = elsewhere(second, tmp_path / "second", parent=Path(mine.out))
    penalties = [point.penalty for point in child.train(after).curve]
    assert penalties[0] == 0
    assert all(penalty > 0 for penalty in penalties[1:])
    assert_same(after, second)


def test_sigterm_leaves_a_checkpoint_from_which_another_process_continues(
    children: Children, cycles: tuple[TrainJob, TrainJob], tmp_path: Path
) -> None:
    asked, child = elsewhere(cycles[1], tmp_path), children.get()
    child.ask("train", asked)
    child.hear_step(10)
    child.process.send_signal(signal.SIGTERM)
    assert child.answer() == {"interrupted": True}
    assert child.process.wait(SECONDS) == 75
    assert (Path(asked.work) / INFO).exists()
    assert not is_complete(asked.out)

    report = children.get().train(asked)
    assert report.resumed == 1
    assert_same(asked, cycles[1])


def test_kill_9_loses_the_steps_since_the_checkpoint_and_nothing_else(
    children: Children, cycles: tuple[TrainJob, TrainJob], tmp_path: Path
) -> None:
    asked, child = elsewhere(cycles[1], tmp_path), children.get()
    child.ask("train", asked)
    child.hear_step(10)
    child.process.kill()
    assert child.process.wait(SECONDS) == -signal.SIGKILL
    assert not is_complete(asked.out)

    report = children.get().train(asked)
    assert report.resumed == 1
    assert_same(asked, cycles[1])


def test_a_base_is_prepared_in_the_worker(children: Children, base: Path, tmp_path: Path) -> None:
    child = children.get()
    child.ask("prepare", PrepareJob(base=str(base), out=str(tmp_path / "prepared")))
    assert PreparedBase.from_dict(child.answer()["done"]).parameters > 0


def test_adapters_are_blended_in_the_worker_and_one_deadline_ends_its_stages(
    cycles: tuple[TrainJob, TrainJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)  # it asks once
    asked = BlendJob(
        out=str(tmp_path / "out"),
        champion=cycles[0].out,
        champion_adapter="one",
        candidate=cycles[1].out,
        candidate_adapter="two",
        shares=(0.5,),
    )
    with WorkerExecutor(time_limit=SECONDS) as executor:
        with pytest.raises(StageError, match="no time left"):
            executor.blend(asked, lambda progress: None, Until(Stop(), lambda: True, "no time left"))
        cancelled = Stop()
        cancelled.request("cancel")
        with pytest.raises(Cancelled):  # a person comes first
            executor.blend(asked, lambda progress: None, Until(cancelled, lambda: True, "no time left"))
        assert not (tmp_path / "out").exists()
        executor.blend(asked, lambda progress: None, Until(Stop(), lambda: False, "no time left"))
        assert made_for(asked.out, asked.digest)
        steps: list[int] = []
        slow = elsewhere(cycles[1], tmp_path / "slow")
        midway = Until(Stop(), lambda: 2 in steps, "no time left")
        with pytest.raises(StageError, match="no time left"):  # checkpointed, as by a shutdown
            executor.train(slow, lambda progress: steps.append(progress.step), midway)
        assert not is_complete(slow.out)
    assert not list(temporary.iterdir()), "what the worker's libraries leave there goes with it"


def test_an_error_reaches_the_daemon_by_name_and_the_worker_lives_on(
    children: Children, cycles: tuple[TrainJob, TrainJob], tmp_path: Path
) -> None:
    child = children.get()
    nowhere = replace(cycles[0].model, path=str(tmp_path / "nowhere"))
    child.ask("train", replace(elsewhere(cycles[0], tmp_path), model=nowhere))
    error = child.answer()["error"]
    assert error["type"] == "ModelError"
    assert "nowhere" in error["message"]
    assert child.alive()


def test_the_end_of_input_ends_the_worker_at_once_even_in_training(
    children: Children, cycles: tuple[TrainJob, TrainJob], tmp_path: Path
) -> None:
    asked, child = elsewhere(cycles[1], tmp_path), children.get()
    child.ask("train", asked)
    child.hear_step(5)
    assert child.process.stdin is not None
    child.process.stdin.close()
    assert child.process.wait(SECONDS) == 0
    assert not is_complete(asked.out)
    assert child.errors() == "", "libraries must not chat into the journal"


# Stages that misbehave, in a worker without torch: what is sent, and what is not.
NOISY = """
import ctypes, os, subprocess, sys, threading, time
import daemon.worker as worker
from storage.errors import ModelError
from strategies.contract import Progress

def noise(job, running):
    print("printed")
    os.write(1, b"written to the file descriptor\\n")
    subprocess.run(["echo", "from a program"])
    return {"heard": True}

def fail(job, running):
    raise {"memory": MemoryError(), "torch": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
           "mapping": ModelError("x cannot be loaded: unable to mmap: Cannot allocate memory (12)"),
           "thread": ModelError("x cannot be loaded: can't start new thread"),
           "disk": OSError(28, "No space left on device"),
           "bug": KeyError("first line")}[job["how"]]

def talk(job, running):
    while True:
        running.tell_or_stop(Progress(stage="evaluate"))
        time.sleep(0.01)

def deaf(job, running):
    # In C, at a lock that no signal interrupts and that only the stop sets free. The other thread comes to
    # run when this one gives up the interpreter, which it does at the lock and not before.
    libc, lock, there = ctypes.CDLL(None), ctypes.create_string_buffer(64), []
    libc.pthread_mutex_lock(lock)

    def free():
        while not there:
            time.sleep(0.001)
        running.tell(Progress(stage="evaluate"))
        running._stop.wait()
        libc.pthread_mutex_unlock(lock)

    threading.Thread(target=free).start()
    sys.setswitchinterval(1000)
    there.append(True)
    libc.pthread_mutex_lock(lock)
    running.tell_or_stop(Progress(stage="evaluate"))

worker.STAGES.update(noise=noise, fail=fail, talk=talk, deaf=deaf)
os._exit(worker.main())
"""


@pytest.fixture
def noisy() -> Iterator[Child]:
    child = Child(("-c", NOISY))
    yield child
    child.end()


def test_what_libraries_print_goes_to_the_log_and_not_into_the_protocol(noisy: Child) -> None:
    noisy.ask("noise", {})
    assert noisy.hear() == {"done": {"heard": True}}
    assert noisy.process.stdin is not None
    noisy.process.stdin.close()
    assert noisy.process.wait(SECONDS) == 0
    log = noisy.errors()
    assert all(words in log for words in ("printed", "written to the file descriptor", "from a program"))


def test_errors_that_are_not_ours_are_one_line_for_people_and_a_traceback_in_the_log(noisy: Child) -> None:
    messages = {}
    for how in ("memory", "torch", "mapping", "thread", "disk", "bug"):
        noisy.ask("fail", {"how": how})
        error = noisy.hear()["error"]
        assert error["type"] == "StageError"
        messages[how] = error["message"]
    assert "No space left on device; free space" in messages["disk"]
    assert messages["bug"] == "KeyError: 'first line'"
    for how in ("memory", "torch", "mapping", "thread"):
        assert "memory ran out" in messages[how]
        assert "lower training.batch_size" in messages[how]
    noisy.ask("no-such-stage", {})
    assert noisy.hear()["error"]["type"] == "StageError"
    assert noisy.process.stdin is not None
    noisy.process.stdin.close()
    assert "Traceback" in noisy.errors()


@pytest.mark.parametrize(
    ("stage", "first"),
    [("talk", "progress"), ("noise", "done"), ("deaf", "progress")],
    ids=["in a stage without checkpoints", "idle", "while the main thread waits in C"],
)
def test_sigterm_ends_a_worker_where_it_is(noisy: Child, stage: str, first: str) -> None:
    noisy.ask(stage, {})
    assert first in noisy.hear()
    noisy.process.send_signal(signal.SIGTERM)
    assert noisy.answer() == {"interrupted": True}
    assert noisy.process.wait(SECONDS) == 75


def test_a_worker_that_closes_its_output_and_stays_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "GRACE_SECONDS", 0.1)
    mute = _Worker.__new__(_Worker)
    mute.process = subprocess.Popen(["sleep", "600"], text=True)
    mute._lines = queue.Queue()
    mute._lines.put(None)
    with pytest.raises(WorkerError, match="did not end within"):
        mute.receive(0)
    assert mute.process.wait(SECONDS) == -signal.SIGKILL


def test_a_worker_that_cannot_be_started_is_one_that_died_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", full)
    with (
        WorkerExecutor(time_limit=SECONDS) as executor,
        pytest.raises(WorkerError, match="cannot be started"),
    ):
        executor.prepare(PrepareJob(base="any", out="out"), lambda progress: None, Stop())
    assert not list(tmp_path.iterdir())


def test_a_worker_that_dies_in_the_middle_of_a_message_is_a_worker_that_died() -> None:
    dead = _Worker.__new__(_Worker)
    dead.process = subprocess.Popen(["sleep", "600"], text=True)
    dead.process.kill()
    dead._lines = queue.Queue()
    dead._lines.put('{"done": {"curve": [')
    with pytest.raises(WorkerError, match="middle of a message"):
        dead.receive(0)
