"""Merging: the way between champion and candidate, by arithmetic, and that a restart goes it only once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from storage.errors import Interrupted
from strategies.contract import Progress, StrategySpec, TrainJob
from strategies.loop import train
from tests import trainings
from tests.trainings import SPEC, adapter_bytes, job, lesson, run, snapshot, state

MERGE = StrategySpec(methods=("merge",), fisher_rows=4)


@pytest.fixture(scope="module")
def home(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A champion in `one`; and what it would have become without merging, with and without early stop."""
    home = tmp_path_factory.mktemp("home")
    run(job(base, snapshot(home / "1", lesson("a", 8)), home / "one"))
    watched = lesson("b", 4, split="validation", start=40)
    second = snapshot(home / "2", lesson("b", 8), watched)
    for patience in (0, 1):
        spec = replace(SPEC, epochs=4, learning_rate=0.1, patience=patience)
        run(job(base, second, home / f"naive {patience}", home / "one", train=spec))
    return home


@pytest.mark.parametrize("patience", [0, 1])
@pytest.mark.parametrize("weight", [0.3, 0.7])
def test_a_cycle_ends_part_of_the_way(
    base: Path, home: Path, tmp_path: Path, weight: float, patience: int
) -> None:
    spec = replace(SPEC, epochs=4, learning_rate=0.1, patience=patience)
    strategy = replace(MERGE, merge_weight=weight)
    run(job(base, home / "2", tmp_path / "two", home / "one", strategy=strategy, train=spec))
    start, end = trainings.adapter(home / "one"), trainings.adapter(home / f"naive {patience}")
    found = trainings.adapter(tmp_path / "two")
    assert found.keys() == start.keys()
    for name, tensor in found.items():
        expected = start[name].double() + weight * (end[name].double() - start[name].double())
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-8)
    assert any(not torch.allclose(start[name], end[name], atol=1e-3) for name in start)


@pytest.mark.parametrize(("weight", "same"), [(0.0, "one"), (1.0, "naive 0")])
def test_the_way_has_two_ends(base: Path, home: Path, tmp_path: Path, weight: float, same: str) -> None:
    spec = replace(SPEC, epochs=4, learning_rate=0.1)
    strategy = replace(MERGE, merge_weight=weight)
    run(job(base, home / "2", tmp_path / "two", home / "one", strategy=strategy, train=spec))
    assert adapter_bytes(tmp_path / "two") == adapter_bytes(home / same)


def test_a_first_cycle_is_not_merged(base: Path, home: Path, tmp_path: Path) -> None:
    run(job(base, home / "1", tmp_path / "first", strategy=replace(MERGE, merge_weight=0.2)))
    assert adapter_bytes(tmp_path / "first") == adapter_bytes(home / "one")


def stop_after_the_merge(asked: TrainJob) -> None:
    """At the second row that EWC looks at."""
    looked: list[Progress] = []

    def tell(progress: Progress) -> None:
        if progress.stage == "fisher":
            looked.append(progress)

    with pytest.raises(Interrupted):
        train(asked, tell, lambda: bool(looked))


def test_a_stop_after_the_merge_does_not_merge_twice(base: Path, home: Path, tmp_path: Path) -> None:
    """EWC looks at the merged adapter, and is interrupted there again and again."""
    strategy = replace(MERGE, methods=("merge", "ewc"))
    data = home / "2"
    run(job(base, data, tmp_path / "whole", home / "one", strategy=strategy))
    asked = job(base, data, tmp_path / "pieces", home / "one", strategy=strategy)
    for _ in range(3):
        stop_after_the_merge(asked)
    assert run(asked).resumed == 3
    assert adapter_bytes(tmp_path / "pieces") == adapter_bytes(tmp_path / "whole")
    assert state(tmp_path / "pieces") == state(tmp_path / "whole") != {}


def test_what_others_remember_is_the_merged_adapter(base: Path, home: Path, tmp_path: Path) -> None:
    strategy = replace(MERGE, methods=("ewc", "merge"))
    run(job(base, home / "2", tmp_path / "two", home / "one", strategy=strategy))
    third = run(job(base, home / "2", tmp_path / "three", tmp_path / "two", strategy=strategy))
    assert third.curve[0].penalty == pytest.approx(0, abs=1e-9), "the anchor is where the next one starts"
    assert third.curve[1].penalty > 1e-9
