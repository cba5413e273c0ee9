"""`strategy = "auto"`: trainings are real, what they answer on validation rows is scripted."""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from daemon import auto, report
from daemon.auto import Trial, affordable, best, reason
from daemon.executor import OnProgress, Stop
from storage.artifacts import atomic_dir, made_for
from storage.errors import Interrupted, ModelMissing, NonFiniteLoss, StageError, WorkerError
from storage.parquet import read_rows
from storage.records import State
from strategies import combinations
from strategies.contract import EvaluateJob, StrategySpec, TrainJob, TrainReport
from strategies.evaluation import SCHEMA
from tests.bots import FLAVOURS, Bot, InlineExecutor, lesson, make_bot

NAMES = ["+".join(methods) for methods in combinations.SHORTLIST]


class Scripted(InlineExecutor):
    """`right` is the share of validation rows that each trial answers right; suites are answered for real."""

    def __init__(self, right: Mapping[str, float]) -> None:
        super().__init__()
        self.right = right
        self.trained: list[str] = []
        self.broken: dict[str, Exception] = {}
        self.seconds: float | None = None
        self.probed = 0
        self.asked: set[str] = set()  # files of the rows that trials answered

    def train(self, job: TrainJob, on_progress: OnProgress, stop: Stop) -> TrainReport:
        if job.strategy.name in self.broken:
            raise self.broken[job.strategy.name]
        if not made_for(Path(job.out), job.digest):
            self.trained.append(job.strategy.name)
        told = super().train(job, on_progress, stop)
        return replace(told, seconds=self.seconds) if self.seconds is not None else told

    def evaluate(self, job: EvaluateJob, on_progress: OnProgress, stop: Stop) -> None:
        if "candidate" in job.models:
            super().evaluate(job, on_progress, stop)
        else:
            self._answer(job)

    def _answer(self, job: EvaluateJob) -> None:
        self.probed += 1
        self._enter("evaluate")
        lines: list[dict[str, Any]] = []
        for label, task in job.plan:
            path = next(suite.path for suite in job.suites if suite.task.name == task)
            self.asked.add(Path(path).name)
            rows = [row for row in read_rows(path) if row.task == task]
            for n, row in enumerate(rows):
                score = dict.fromkeys(
                    ("exact_match", "token_f1", "score"), float(n < self.right[label] * len(rows))
                )
                lines.append({"model": label, "task": task, "row_hash": row.hash, "prediction": "?"} | score)
        with atomic_dir(job.out, {"job": job.digest}) as folder:
            pq.write_table(pa.Table.from_pylist(lines, SCHEMA), folder / "predictions.parquet")
        self.after("evaluate")


@pytest.fixture
def bot(tmp_path: Path, base: Path) -> Iterator[Bot]:
    """It has learned colours and is about to learn flavours."""
    made = make_bot(tmp_path, base, **{"strategy.methods": "auto"})
    made.executor = Scripted(dict(zip(NAMES, (0.5, 1.0, 0.5), strict=True)))
    made.collect(lesson("colours"))
    made.run()
    made.collect(lesson("flavours", FLAVOURS))
    yield made
    made.store.close()


def script(bot: Bot) -> Scripted:
    assert isinstance(bot.executor, Scripted)
    return bot.executor


def test_the_best_on_validation_rows_is_the_candidate_and_the_reason_is_told(bot: Bot) -> None:
    assert script(bot).trained == [NAMES[0]]  # a first cycle has nothing to forget
    assert bot.store.candidates(1)[0].change is None
    cycle = bot.run()
    assert cycle.state is State.PROMOTED
    assert script(bot).trained == [NAMES[0], *NAMES]
    (candidate,) = bot.store.candidates(cycle.id)
    assert candidate.result == f"cycles/2/trial-{NAMES[1]}/train"
    told = json.loads((bot.settings.state_dir / candidate.result / "report.json").read_text())
    assert told["strategy"] == NAMES[1]
    assert f"auto chose {NAMES[1]}; mean score on the validation rows of 2 tasks" in (candidate.change or "")
    assert f"{NAMES[1]} 100.0" in (candidate.change or "")
    assert any(candidate.change in line for line in report.explain(report.cycle_report(bot.store, 2)))
    client = MlflowClient(bot.settings.tracking_uri)
    run = client.get_run(client.get_model_version("test-bot", "2").run_id)
    assert run.data.params["strategy.methods"] == NAMES[1]


def test_what_was_not_chosen_is_tidied_away(bot: Bot) -> None:
    bot.run()
    trials = [path.name for path in (bot.settings.state_dir / "cycles" / "2").glob("trial-*")]
    assert trials == [f"trial-{NAMES[1]}"]


def test_the_suites_have_no_part_in_the_choice(bot: Bot) -> None:
    bot.run()
    assert script(bot).asked == {"probe.parquet"}


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_daemon_that_is_stopped_between_trials_goes_on_with_the_next(bot: Bot, after: int) -> None:
    cycle = bot.request()
    count = 0

    def stop_there(stage: str) -> None:
        nonlocal count
        count += stage == "train"
        if count == after:
            count += 10
            raise Interrupted()

    script(bot).after = stop_there  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        bot.run(cycle)
    bot.reopen()
    assert bot.run(cycle).state is State.PROMOTED
    assert script(bot).trained == [NAMES[0], *NAMES]  # none of them twice
    assert bot.store.candidates(cycle.id)[0].strategy is not None


def test_trials_end_with_the_budget(bot: Bot) -> None:
    script(bot).seconds = 25 * 60.0
    cycle = bot.run()
    (candidate,) = bot.store.candidates(cycle.id)
    assert script(bot).trained == [NAMES[0], *NAMES[:2]]
    assert f"{NAMES[2]}: not tried, strategy.auto_minutes is 60" in (candidate.change or "")


def test_a_trial_that_failed_has_spent_of_the_budget_too(bot: Bot, monkeypatch: pytest.MonkeyPatch) -> None:
    script(bot).broken = {NAMES[0]: StageError("memory ran out")}
    script(bot).seconds = 10 * 60.0
    monkeypatch.setattr(auto, "monotonic", itertools.count(0, 55 * 60).__next__)
    cycle = bot.run()
    assert f"{NAMES[2]}: not tried, strategy.auto_minutes is 60" in (
        bot.store.candidates(cycle.id)[0].change or ""
    )


def test_one_training_that_fills_the_budget_is_not_examined_for_nothing(bot: Bot) -> None:
    script(bot).seconds = 31 * 60.0
    cycle = bot.run()
    assert cycle.state is State.PROMOTED
    assert (script(bot).trained, script(bot).probed) == ([NAMES[0], NAMES[0]], 0)
    told = bot.store.candidates(cycle.id)[0].change or ""
    assert told.startswith(f"auto chose {NAMES[0]}; it alone was trained (1860 s); {NAMES[1]}: not tried")


@pytest.mark.parametrize(
    "error", [NonFiniteLoss("the loss became nan"), StageError("memory ran out"), WorkerError("it died")]
)
def test_a_trial_that_fails_is_passed_over_when_there_is_another(bot: Bot, error: Exception) -> None:
    script(bot).broken = {NAMES[1]: error}
    cycle = bot.run()
    assert cycle.state is State.PROMOTED
    (candidate,) = bot.store.candidates(cycle.id)
    assert f"auto chose {NAMES[0]}" in (candidate.change or "")
    assert f"{NAMES[1]}: {error}" in (candidate.change or "")


@pytest.mark.parametrize("trial", range(len(NAMES)))
def test_a_base_that_goes_after_a_trial_is_waited_for(
    bot: Bot, base: Path, tmp_path: Path, trial: int
) -> None:
    """It is not the trial's fault, and must not decide which strategy is chosen."""
    elsewhere = tmp_path / "elsewhere"

    def unmount(stage: str) -> None:
        if script(bot).trained[1:] == NAMES[: trial + 1]:  # the first is the champion's
            base.rename(elsewhere)

    script(bot).after = unmount  # type: ignore[method-assign]
    cycle = bot.request()
    with pytest.raises(ModelMissing, match="is it mounted"):
        bot.run(cycle)

    elsewhere.rename(base)
    script(bot).after = lambda stage: None  # type: ignore[method-assign]
    assert bot.run(cycle).state is State.PROMOTED
    assert script(bot).trained == [NAMES[0], *NAMES]


def test_when_none_can_learn_the_rows_the_cycle_fails_with_the_reason(bot: Bot) -> None:
    script(bot).broken = dict.fromkeys(NAMES, NonFiniteLoss("the loss became nan"))
    cycle = bot.run()
    assert cycle.state is State.FAILED
    assert "became nan" in (cycle.reason or "")


def test_a_first_trial_whose_worker_dies_is_tried_again(bot: Bot) -> None:
    dies = iter([True, False])

    def die(stage: str) -> None:
        if stage == "train" and next(dies, False):
            raise WorkerError("killed")

    script(bot).before = die  # type: ignore[method-assign]
    cycle = bot.run()
    assert cycle.state is State.PROMOTED
    assert script(bot).trained == [NAMES[0], NAMES[0], *NAMES]


def test_a_cancelled_cycle_leaves_no_trials(bot: Bot) -> None:
    cycle, stop = bot.request(), Stop()
    script(bot).after = lambda stage: stop.request("cancel") if stage == "train" else None  # type: ignore[method-assign]
    assert bot.run(cycle, stop).state is State.CANCELLED
    assert not list((bot.settings.state_dir / "cycles" / "2").glob("trial-*"))


def trial(name: str, *scores: float) -> Trial:
    return Trial(
        strategy=StrategySpec(methods=tuple(name.split("+"))),
        result=Path(name),
        seconds=60.0,
        scores={str(n): score for n, score in enumerate(scores)},
    )


def test_tasks_count_alike_and_of_equals_the_first_is_chosen() -> None:
    one, two, three = trial("replay", 1.0, 0.5), trial("ewc", 0.9, 0.6), trial("si", 0.8, 0.6)
    assert best([one, two, three]) is one
    assert best([three, two, one]) is two
    summed = trial("replay", 0.3, 0.2, 0.1), trial("ewc", 0.1, 0.2, 0.3)  # equal but for the last bit
    assert best(summed) is summed[0]


def test_a_budget_is_for_all_trainings_together() -> None:
    assert affordable([], 1)
    assert affordable([60.0, 60.0], 3)
    assert not affordable([60.0, 61.0], 3)
    assert not affordable([100.0, 10.0], 2), "the next one may take as long as the longest"


def test_the_reason_has_every_number() -> None:
    told = reason(
        trial("replay", 1.0, 0.5), [trial("replay", 1.0, 0.5), trial("ewc", 0.5, 0.5)], {"si": "why"}
    )
    assert told == (
        "auto chose replay; mean score on the validation rows of 2 tasks: replay 75.0 (60 s), "
        "ewc 50.0 (60 s); si: why"
    )
