"""Joint training: the whole past from the base again, with nothing of the parent but its rows."""

from dataclasses import replace
from pathlib import Path

import pytest

from strategies.contract import LoraSpec, StrategySpec, result_files
from strategies.joint import Joint
from strategies.replay_memory import memory_hashes
from tests import trainings
from tests.trainings import SPEC, adapter_bytes, job, lesson, run, snapshot, state

JOINT = StrategySpec(methods=("joint",), replay_size=3, replay_share=0.1)
OLD, NEW = lesson("a", 10), lesson("b", 6)


@pytest.fixture(scope="module")
def home(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two joint cycles, in `one` and `two`."""
    home = tmp_path_factory.mktemp("home")
    run(job(base, snapshot(home / "1", OLD), home / "one", strategy=JOINT))
    data = snapshot(home / "2", NEW, memory=OLD)
    run(job(base, data, home / "two", home / "one", strategy=JOINT))
    return home


def remembered(out: Path) -> list[str]:
    return memory_hashes(result_files(out)["state"])


def test_all_rows_are_remembered_whatever_room_replay_has(home: Path) -> None:
    assert set(remembered(home / "one")) == {row.hash for row in OLD}
    assert set(remembered(home / "two")) == {row.hash for row in [*OLD, *NEW]}


def test_a_policy_that_ranks_rows_costs_it_nothing(base: Path, tmp_path: Path) -> None:
    joint = Joint(replace(JOINT, replay_policy="herding"), seed=0)
    learner = trainings.learner(base, tmp_path, [joint])
    learner.train(trainings.experience(learner, NEW), eval_streams=[])
    assert joint.features is None
    assert len(joint.memory) == 6


def test_every_epoch_learns_all_rows_of_all_cycles(base: Path, home: Path) -> None:
    report = run(job(base, home / "2", home / "two", home / "one", strategy=JOINT))
    assert (report.rows, report.replay_rows, report.memory_rows) == (6, 10, 16)
    assert report.rehearsed == tuple(sorted(row.hash for row in OLD))
    assert report.steps == SPEC.epochs * 16 / SPEC.batch_size


def test_it_is_one_training_on_everything(base: Path, home: Path, tmp_path: Path) -> None:
    """The rows of the memory come after the new ones, in the memory's order."""
    by_hash = {row.hash: row for row in OLD}
    everything = [*NEW, *(by_hash[row] for row in remembered(home / "one"))]
    naive = run(job(base, snapshot(tmp_path / "all", everything), tmp_path / "fresh"))
    assert naive.rows == 16
    assert adapter_bytes(tmp_path / "fresh") == adapter_bytes(home / "two")


def test_nothing_of_the_parents_adapter_is_left(base: Path, home: Path, tmp_path: Path) -> None:
    """Another parent with the same rows: it learned faster, at another rank."""
    faster, wider = replace(SPEC, learning_rate=0.1), LoraSpec(rank=4, alpha=4)
    run(job(base, home / "1", tmp_path / "one", strategy=JOINT, train=faster, lora=wider))
    assert adapter_bytes(tmp_path / "one") != adapter_bytes(home / "one")
    report = run(job(base, home / "2", tmp_path / "two", tmp_path / "one", strategy=JOINT))
    assert adapter_bytes(tmp_path / "two") == adapter_bytes(home / "two")
    assert state(tmp_path / "two") == state(home / "two")
    assert not any("lora" in note for note in report.notes), "the new settings were used"


def test_rows_that_were_erased_are_not_learned_again(base: Path, home: Path, tmp_path: Path) -> None:
    data = snapshot(tmp_path / "2", NEW, memory=OLD[:7])
    report = run(job(base, data, tmp_path / "two", home / "one", strategy=JOINT))
    assert report.replay_rows == 7
    assert "3 remembered rows are superseded or erased, and were forgotten" in report.notes
    assert set(remembered(tmp_path / "two")) == {row.hash for row in [*OLD[:7], *NEW]}


def test_rows_that_replay_had_let_go_are_missed_aloud(base: Path, tmp_path: Path) -> None:
    replay = StrategySpec(methods=("replay",), replay_size=4)
    run(job(base, snapshot(tmp_path / "1", OLD), tmp_path / "one", strategy=replay))
    kept = [row for row in OLD if row.hash in remembered(tmp_path / "one")]
    data = snapshot(tmp_path / "2", NEW, memory=kept)
    report = run(job(base, data, tmp_path / "two", tmp_path / "one", strategy=JOINT))
    assert "joint knows nothing of 6 rows that are not in the memory any more" in report.notes
