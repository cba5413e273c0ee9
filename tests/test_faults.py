"""One fault of each kind, and a few that the dice choose: `make test-faults` injects as many as one likes."""

import os
import random
from pathlib import Path

import pytest

from storage import artifacts
from tests.faults import bench, kinds, power
from tests.faults.__main__ import one

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
    if name in kinds.NEEDS_MOUNT and not bench.can_mount(made.folder):
        pytest.skip("needs an account that may mount a tmpfs")
    _, outcome = one(made, SEED, 1, name)
    assert outcome.went_off


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


@pytest.mark.parametrize("seed", range(8))
def test_a_folder_that_was_finished_survives_a_power_cut_with_all_its_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    power.everything(state, tmp_path / "synced")
    monkeypatch.setattr(os, "fsync", os.fsync)  # put back afterwards
    power.record(tmp_path)
    with artifacts.atomic_dir(state / "cycles" / "2" / "train") as folder:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights").write_text("learned")
    power.cut(state, tmp_path / "synced", random.Random(seed))
    artifacts.verify(state / "cycles" / "2" / "train")
