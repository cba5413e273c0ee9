"""What every method owes: the same training twice is the same to the last byte, and so is one in pieces."""

from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from storage.errors import Interrupted
from strategies import loop
from strategies.catalogue import METHODS
from strategies.contract import LoraSpec, StrategySpec, TrainJob, TrainReport
from strategies.loop import train
from strategies.method import Method
from tests import trainings
from tests.trainings import SPEC, StopAfter, adapter_bytes, job, lesson, run, snapshot, state

PLAIN = StrategySpec(methods=(), replay_ratio=0.5, replay_size=12, fisher_rows=3)
SPECS = {name: replace(PLAIN, methods=(name,)) for name in METHODS if name != "der"} | {
    "der": replace(PLAIN, methods=("replay", "der")),
    "herding": replace(PLAIN, methods=("replay", "lwf"), replay_policy="herding", replay_dropout=0.3),
    "reservoir": replace(PLAIN, methods=("replay",), replay_policy="reservoir"),
    "hardest": replace(PLAIN, methods=("replay",), replay_policy="hardest"),
    "spaced": replace(PLAIN, methods=("replay",), replay_policy="spaced"),
    "many": replace(PLAIN, methods=("merge", "replay", "der", "lwf", "si"), replay_policy="hardest"),
    "more": replace(PLAIN, methods=("agem", "lwf", "ewc-lora", "olora")),
}


@pytest.fixture(scope="module", params=SPECS)
def whole(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A second cycle with dropout, validation and the best adapter, run in one go."""
    home = tmp_path_factory.mktemp(request.param)
    spec, lora = SPECS[request.param], LoraSpec(rank=2, alpha=4, dropout=0.3)
    run(job(base, snapshot(home / "1", lesson("a", 8)), home / "one", strategy=spec, lora=lora))
    watched = lesson("b", 4, split="validation", start=40)
    data = snapshot(home / "2", lesson("b", 8), watched, memory=lesson("a", 8))
    train_spec = replace(SPEC, epochs=3, accumulation=2, batch_size=2, patience=2)
    asked = job(base, data, home / "two", home / "one", strategy=spec, lora=lora, train=train_spec)
    run(asked)
    return asked


def again(whole: TrainJob, home: Path) -> TrainJob:
    return replace(whole, out=str(home / "out"), work=str(home / "work"))


def result(asked: TrainJob) -> tuple[bytes, dict[str, bytes]]:
    return adapter_bytes(asked.out), state(asked.out)


def told(report: TrainReport) -> list[object]:
    points = [(point.loss, point.penalty, point.replayed) for point in report.curve]
    return [points, report.validation_losses, report.rehearsed, report.notes]


def test_the_same_training_again_gives_the_same_bytes(whole: TrainJob, tmp_path: Path) -> None:
    asked = again(whole, tmp_path)
    assert told(run(asked)) == told(run(whole))
    assert result(asked) == result(whole)


class Ponders(Method):
    """Takes a minute before the first step, by the clock that it is given."""

    def __init__(self, clock: list[float]) -> None:
        super().__init__(PLAIN, seed=0)
        self.clock = clock

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.clock[0] += 60


def test_what_a_method_does_before_the_first_step_is_training_time(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LwF asks the champion about every row then; its price must not be hidden."""
    clock = [0.0]
    monkeypatch.setattr(
        loop, "time", SimpleNamespace(monotonic=lambda: clock[0], process_time=lambda: 2 * clock[0])
    )
    learner = trainings.learner(base, tmp_path, [Ponders(clock)])
    learner.train(trainings.experience(learner, lesson("a", 4)), eval_streams=[])
    assert (learner.course.seconds, learner.course.cpu_seconds) == (60, 120)


def test_a_training_in_pieces_gives_the_same_bytes(whole: TrainJob, tmp_path: Path) -> None:
    """Stopped before the first step, between steps, in validations, and after the last step; pieces that
    are too short for the first step of a method alternate with longer ones."""
    asked, interruptions = again(whole, tmp_path), 0
    for questions in cycle([1, 2, 3, 9, 1, 12, 2, 20]):
        try:
            report = train(asked, lambda progress: None, StopAfter(questions + interruptions // 8))
            break
        except Interrupted:
            interruptions += 1
            assert interruptions < 60, "no progress is made"
    assert interruptions > 2
    assert report.resumed > 0
    assert told(report) == told(run(whole))
    assert result(asked) == result(whole)
