"""One fault of each kind, and a few that the dice choose: `make test-faults` injects as many as one likes."""

import os
import random
import shutil
from pathlib import Path

import pytest

from storage import artifacts
from tests.faults import bench, kinds, places, power
from tests.faults.__main__ import one, swept

pytestmark = pytest.mark.acceptance

SEED = 1
# Kinds that share their way through the code with another one are left to `make test-faults`.
QUICK = (
    "kill -9 of the daemon",
    "SIGTERM to the worker",
    "power cut",
    "MLflow fails once",
    "clock jumps",
    "two daemons",
    "disk full",
    "disk fails",
    "corrupted checkpoint",
    "tampered suite",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bench.Bench:
    made = bench.Bench(tmp_path_factory.mktemp("faults"))
    made.prepare()
    return made


@pytest.mark.parametrize("name", QUICK)
def test_after_a_fault_nothing_is_lost_nothing_done_twice_and_the_champion_loads(
    made: bench.Bench, name: str
) -> None:
    if name in kinds.NEEDS and not kinds.NEEDS[name](made.folder):
        pytest.skip("needs an account that may mount a tmpfs, or the image of a disk")
    _, outcome = one(made, SEED, 1, name)
    assert outcome.went_off


# The store has a champion that MLflow does not know; MLflow a version that the store does not know; what an
# erasure that is on record as done has removed must not be back.
@pytest.mark.parametrize(
    "point",
    [
        "kill -9 of the daemon, after storage.store:Store.promote",
        "kill -9 of the daemon, after mlflow:MlflowClient.create_model_version",
        "power cut during an erasure, after storage.removals:Removals.erasure_done",
    ],
)
def test_stopped_at_the_worst_places_the_daemon_goes_on(made: bench.Bench, point: str) -> None:
    number = [str(point) for point in kinds.POINTS].index(point) + 1
    _, outcome = swept(made, SEED, number)
    assert outcome.how == "recovered"


def test_a_place_that_a_calm_cycle_does_not_come_by_is_told(made: bench.Bench) -> None:
    counts = dict(made.counts["new"])
    assert places.unvisited(counts) == []
    del counts["daemon storage.store:Store.promote"]
    assert places.unvisited(counts) == ["daemon storage.store:Store.promote"]


def test_a_daemon_that_ends_by_itself_is_not_taken_for_one_that_was_killed(made: bench.Bench) -> None:
    trial = made.trial("new", random.Random(1))
    for deed, code in (("kill", 70), ("slow", -9), ("term", -9), ("jump", 0)):
        trial.fault = trial.armed(deed=deed)
        (trial.home / "fired").touch()
        with pytest.raises(bench.Broken, match="by itself"):
            trial.check_end(code)
    trial.fault = trial.armed(deed="kill", process="worker")
    with pytest.raises(bench.Broken, match="by itself"):
        trial.check_end(-9)
    trial.fault = trial.armed(deed="kill")
    trial.check_end(-9)
    with pytest.raises(bench.Broken, match="by itself"):  # a second time
        trial.check_end(-9)


def test_a_traceback_in_the_daemons_log_is_a_failure(made: bench.Bench) -> None:
    trial = made.trial("new", random.Random(1))
    lines = [
        "02:00:00 info     started\n",
        "Traceback (most recent call last):\n",
        '  File "daemon/flight.py"\n',
    ]
    (trial.home / "daemon.log").write_text("".join(lines))
    with pytest.raises(bench.Broken, match=r"flight\.py"):
        trial.check_log(worker_may_trace=True)
    (trial.home / "daemon.log").write_text("".join(lines).replace("flight", "worker"))
    trial.check_log(worker_may_trace=True)
    with pytest.raises(bench.Broken):
        trial.check_log(worker_may_trace=False)


@pytest.mark.parametrize(
    ("reason", "does"),
    [
        ("memory ran out; lower training.batch_size", True),
        ("x; then `daemon retrain-now`", True),
        ("x; check `free -m`", True),
        ("x; sorry", False),
        ("x; `daemon heal`", False),
        ("adapter.safetensors was changed; move it", False),
    ],
)
def test_a_reason_says_what_to_do_when_it_names_a_command_or_a_setting(reason: str, does: bool) -> None:
    assert bench.says_what_to_do(reason) is does


def test_the_same_number_is_the_same_trial(made: bench.Bench) -> None:
    drawn = [[made.trial("taught", random.Random("1/7")).draw("daemon") for _ in range(3)] for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_a_power_cut_takes_what_was_not_synced(tmp_path: Path) -> None:
    """The simulation itself: without it a missing fsync would never be found."""
    state, log = tmp_path / "state", tmp_path / "synced"
    state.mkdir()
    (state / "old").write_text("old")
    power.everything(state, log)
    (state / "new").write_text("never synced")
    lost = {line for seed in range(8) for line in _cut_copy(state, log, tmp_path, seed)}
    assert "new was never there" in lost
    assert not any(line.startswith("old") for line in lost)


def _cut_copy(state: Path, log: Path, folder: Path, seed: int) -> list[str]:
    found = power.cut(state, log, random.Random(seed))
    if not (state / "new").exists():
        (state / "new").write_text("never synced")
    return found


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state, all of it synced, in a process that writes down what it syncs from now on."""
    state = tmp_path / "state"
    (state / "snapshots" / "one").mkdir(parents=True)
    (state / "snapshots" / "one" / "rows.parquet").write_text("secret")
    power.everything(state, tmp_path / "synced")
    monkeypatch.setattr(os, "fsync", os.fsync)  # both put back afterwards
    monkeypatch.setattr(os, "rmdir", os.rmdir)
    power.record(tmp_path)
    return state


def test_a_power_cut_brings_back_what_was_removed_without_a_sync(recorded: Path) -> None:
    folder, back = recorded / "snapshots" / "one", []
    for seed in range(16):
        shutil.rmtree(folder, ignore_errors=True)
        power.cut(recorded, recorded.with_name("synced"), random.Random(seed))
        back += [path.read_text() for path in folder.glob("*")]
    assert 0 < len(back) < 16
    assert set(back) == {"secret"}


def test_a_power_cut_gives_a_new_folder_nothing_of_the_one_whose_number_it_has(recorded: Path) -> None:
    folder = recorded / "snapshots" / "one"
    number = folder.stat().st_ino
    shutil.rmtree(folder)
    made = [recorded / "snapshots" / f"new-{n}" for n in range(64)]
    for path in made:  # one of them gets the number, on most file systems
        path.mkdir()
    again = [path for path in made if path.stat().st_ino == number]
    for seed in range(8):
        power.cut(recorded, recorded.with_name("synced"), random.Random(seed))
        assert not any(list(path.glob("*")) for path in again)


@pytest.mark.parametrize("seed", range(8))
def test_what_was_removed_does_not_come_back_after_a_power_cut(recorded: Path, seed: int) -> None:
    """An erasure is on record as done when this has returned."""
    artifacts.remove(recorded / "snapshots" / "one")
    power.cut(recorded, recorded.with_name("synced"), random.Random(seed))
    assert not (recorded / "snapshots" / "one").exists()


@pytest.mark.parametrize("seed", range(8))
def test_a_replaced_file_is_the_old_one_or_the_new_one_after_a_power_cut(recorded: Path, seed: int) -> None:
    artifacts.write_file(recorded / "note", "old")
    aside = recorded / ".note.tmp"
    aside.write_text("new")
    artifacts.fsync(aside)
    os.replace(aside, recorded / "note")
    power.cut(recorded, recorded.with_name("synced"), random.Random(seed))
    assert (recorded / "note").read_text() in ("old", "new")


@pytest.mark.parametrize("seed", range(8))
def test_a_folder_that_was_finished_survives_a_power_cut_with_all_its_parents(
    recorded: Path, seed: int
) -> None:
    with artifacts.atomic_dir(recorded / "cycles" / "2" / "train") as folder:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights").write_text("learned")
    power.cut(recorded, recorded.with_name("synced"), random.Random(seed))
    artifacts.verify(recorded / "cycles" / "2" / "train")
