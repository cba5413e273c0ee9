"""kill -9 of the daemon and the worker, at every state: afterwards all is as a calm run leaves it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from storage import artifacts
from storage.records import State
from storage.registry import Registry
from storage.store import Store
from tests.bots import FLAVOURS, collect, fresh_mlflow, lesson, write_config
from tests.daemons import ROOT, SECONDS, DaemonProcess, children, environment, training_step

pytestmark = pytest.mark.acceptance

WORKING = [State.REQUESTED, State.PULLED, State.SNAPSHOTTED, State.TRAINED, State.EVALUATED, State.DECIDED]
LESSON = lesson("colours", train=32)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, base: Path) -> str:
    """Adapter hash of the same cycle when nothing is killed."""
    home = tmp_path_factory.mktemp("calm")
    path = make_home(home, base)
    with DaemonProcess(path) as daemon:
        assert daemon.ended(daemon.retrain())["state"] == "promoted"
        daemon.stop()
    with Store.open(home / "state/store.duckdb", read_only=True) as store:
        return store.models()[0].adapter_hash


@pytest.fixture
def home(tmp_path: Path, base: Path) -> Path:
    make_home(tmp_path, base)
    return tmp_path


def make_home(home: Path, base: Path) -> Path:
    path = write_config(home, base, training__epochs=40)  # long enough to be met in the middle
    (home / "state").mkdir(mode=0o700)
    (home / "state/mlflow.db").write_bytes(fresh_mlflow().read_bytes())
    collect(home / "qa.duckdb", LESSON)
    return path


def run_until_it_kills_itself(config: Path, state: State, moment: str) -> None:
    """A daemon that dies by signal 9 when a cycle leaves `state`; it finds the cycle by itself."""
    killed = subprocess.run(
        [sys.executable, "-m", "tests.killer", state, moment, "--config", str(config), "run"],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def request_a_cycle(home: Path) -> None:
    with Store.open(home / "state/store.duckdb") as store:
        store.request_cycle("manual", "test")


def check_invariants(home: Path, adapter_hash: str) -> None:
    """What must hold however it came to be: one of each, and each whole."""
    with Store.open(home / "state/store.duckdb", read_only=True) as store:
        assert [cycle.state for cycle in store.cycles()] == [State.PROMOTED]
        (model,) = store.models()
        (promotion,) = store.promotions()
        (suite,) = store.suites()
        assert model.adapter_hash == adapter_hash, (
            "same snapshot and seed, same adapter, however often killed"
        )
        assert (promotion.version, promotion.kind) == (1, "gate")
        assert store.verdict(promotion.cycle_id or 0) is not None
        assert suite.size == 8
        counts = {split.value: n for split, n in store.row_counts()["colours"].items()}
        assert counts == {"train": 32, "validation": 4, "suite": 8}
        assert len(store.cycle_rows(1, "train")) == 32
        assert store.pending(store.lineage(1)) == []
        for score in store.scores():
            assert len(store.predictions(score.model, score.exam)) == 8
        store_id = store.id
    registry = Registry(
        f"sqlite:///{home / 'state/mlflow.db'}",
        "test-bot",
        home / "state/artifacts",
        Path("x"),
        store_id=store_id,
    )
    assert registry.alias("champion") == registry.version_of(1) == 1
    artifacts.verify(home / "state/cycles/1/train")
    artifacts.verify(home / "state/cycles/1/evaluate")
    (snapshot,) = (home / "state/snapshots").iterdir()
    artifacts.verify(snapshot)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_daemon_killed_on_leaving_every_state_ends_where_a_calm_one_does(
    home: Path, calm: str, moment: str
) -> None:
    request_a_cycle(home)
    for state in WORKING:
        if (state, moment) != (State.DECIDED, "after"):  # the cycle has ended then: nobody is left to kill
            run_until_it_kills_itself(home / "config.toml", state, moment)
    with DaemonProcess(home / "config.toml") as daemon:
        assert daemon.ended(1)["state"] == "promoted", daemon.log.read_text()
        daemon.stop()
    check_invariants(home, calm)


def test_a_worker_killed_in_training_is_replaced_and_the_cycle_ends_as_if_nothing_had_been(
    home: Path, calm: str
) -> None:
    with DaemonProcess(home / "config.toml") as daemon:
        cycle = daemon.retrain()
        daemon.until(lambda told: training_step(told) >= 3)
        for pid in children(daemon.process.pid):
            os.kill(pid, signal.SIGKILL)
        assert daemon.ended(cycle)["state"] == "promoted", daemon.log.read_text()
        assert daemon.call("show", cycle=cycle)["cycle"]["attempts"] <= 1
        daemon.stop()
    check_invariants(home, calm)


def test_a_daemon_killed_in_mid_training_takes_its_worker_along_and_resumes(home: Path, calm: str) -> None:
    with DaemonProcess(home / "config.toml") as daemon:
        daemon.retrain()
        daemon.until(lambda told: training_step(told) >= 3)
        workers = children(daemon.process.pid)
        daemon.process.kill()
        daemon.process.wait()
        for pid in workers:
            wait_for_the_end_of(pid)
    with DaemonProcess(home / "config.toml") as daemon:
        assert daemon.ended(1)["state"] == "promoted", daemon.log.read_text()
        collect(home / "qa.duckdb", lesson("flavours", FLAVOURS))
        assert daemon.ended(daemon.retrain())["state"] == "promoted", "and life goes on"
        daemon.stop()


def wait_for_the_end_of(pid: int) -> None:
    """A process that is nobody's child here: polled until it is gone or a zombie."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        time.sleep(0.05)
    raise AssertionError(f"the worker {pid} outlived its daemon")
