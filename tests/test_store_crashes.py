"""The store among threads and processes, killed in the middle of its work, and on a full disk."""

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.errors import StoreBusy, StoreError
from storage.records import State
from storage.rows import Row, Split
from storage.store import Store

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store.duckdb") as store:
        yield store


def rows(*questions: str) -> list[Row]:
    return [Row(id="1", task="t", question=text, answer="yes", split=Split.TRAIN) for text in questions]


def test_threads_may_share_the_store(store: Store) -> None:
    cycle = store.request_cycle("manual", "ana")
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(10):
                batch = rows(f"shared {step}?", f"own {number} {step}?")
                store.accept(batch, f"thread {number}")
                store.count_attempt(cycle.id)
                assert len(store.rows_by_hash([row.hash for row in batch])) == 2
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [r.seq for r in store.pending([])] == list(range(1, 91))
    assert store.count_attempt(cycle.id) == 81


def test_a_second_process_is_told_who_holds_the_store(tmp_path: Path) -> None:
    path = tmp_path / "store.duckdb"
    code = f"from storage.store import Store\nStore.open({str(path)!r})"
    with Store.open(path):
        for options in ("", ", read_only=True"):
            told = _python(code.replace(")", f"{options})", 1)).stderr
            assert f"StoreBusy: process {os.getpid()} holds the store {path}; is a daemon already" in told
        with pytest.raises(StoreBusy, match="this process"):
            Store.open(path)
    assert _python(code).returncode == 0  # closed is closed
    Store.open(path).close()


def test_readers_share_the_store_when_nobody_writes(tmp_path: Path) -> None:
    path = tmp_path / "store.duckdb"
    with Store.open(path) as store:
        store.accept(rows("a", "b", "c"), "inbox")
    with Store.open(path, read_only=True) as one, Store.open(path, read_only=True) as two:
        assert len(one.pending([])) == len(two.pending([])) == 3
        with pytest.raises(StoreError, match="could not be used"):
            one.set_meta("a", "b")


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store.duckdb")
    store.close()
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.champion()


def test_the_store_makes_its_folder_for_the_owner_alone(tmp_path: Path) -> None:
    Store.open(tmp_path / "state" / "store.duckdb").close()
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


# Writes without end, and says after each step what is safe on disk.
_WRITER = """
import sys
from storage.records import State
from storage.rows import Row, Split
from storage.store import Store

store = Store.open(sys.argv[1])
step = len(store.cycles(limit=10**6))
while True:
    questions = [f"{step} {n}" for n in range(50)]
    batch = [Row(id="1", task="t", question=q, answer="a", split=Split.TRAIN) for q in questions]
    store.accept(batch, "writer")
    cycle = store.request_cycle("manual", "writer")
    store.advance(cycle.id, State.PULLED)
    store.advance(cycle.id, State.SNAPSHOTTED, snapshot="s", rows=[(row.hash, "train") for row in batch])
    step += 1
    print(step, flush=True)
"""


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_kill_minus_nine_in_the_middle_of_writes_leaves_a_consistent_store(
    tmp_path: Path, steps: int
) -> None:
    path = tmp_path / "store.duckdb"
    for _ in range(3):
        acknowledged = _kill_after(path, steps)
        with Store.open(path) as store:
            _check_consistent(store, acknowledged)


def _kill_after(path: Path, steps: int) -> int:
    """Start the writer, kill it while it works on the step after `steps`; the last step it acknowledged."""
    command = [sys.executable, "-c", _WRITER, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        said = [int(writer.stdout.readline()) for _ in range(steps)]
        writer.send_signal(signal.SIGKILL)
        said += [int(line) for line in writer.stdout if line.strip()]
    return said[-1]


def _check_consistent(store: Store, acknowledged: int) -> None:
    cycles = store.cycles(limit=10**6)
    stored = store.pending([])
    assert len(cycles) >= acknowledged
    assert len(stored) >= acknowledged * 50
    assert len(stored) % 50 == 0  # a batch is there or not
    assert [r.seq for r in stored] == list(range(1, len(stored) + 1))
    for cycle in cycles:
        kinds = [event.kind for event in reversed(store.events(cycle_id=cycle.id))]
        assert kinds[-1] == cycle.state
        reached = [kind for kind in kinds if kind != State.CANCELLED]
        assert reached == ["requested", "pulled", "snapshotted"][: len(reached)]
        complete = "snapshotted" in reached
        assert len(store.cycle_rows(cycle.id, "train")) == (50 if complete else 0)
        assert cycle.snapshot == ("s" if complete else None)
    for cycle in store.unfinished():  # as the daemon would: settle what was left, then go on
        store.advance(cycle.id, State.CANCELLED, reason="test")


# Works in a process that may write no more than 300 kB to a file, which fails like a full disk.
_FULL_DISK = """
import resource, signal, sys
from storage.errors import StoreError
from storage.rows import Row, Split
from storage.store import Store

store = Store.open(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
for step in range(100):
    asked = [f"{step} {n}" for n in range(100)]
    try:
        store.accept([Row(id="1", task="t", question=q, answer="a", split=Split.TRAIN) for q in asked], "")
    except StoreError as error:
        print(step, "nothing was changed" in str(error))
        break
"""


def test_a_full_disk_loses_the_step_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "store.duckdb"
    command = [sys.executable, "-c", _FULL_DISK, str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    step, told = result.stdout.split()
    assert told == "True"
    assert int(step) > 0
    with Store.open(path) as store:
        assert len(store.pending([])) == int(step) * 100
        store.set_meta("space", "again")


def _python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
