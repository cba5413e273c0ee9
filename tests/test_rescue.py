"""Rescuing a candidate that learned but forgot: every way it can go, with real trainings and real blends.

What the models answer is scripted, except in the first test, so that each way is met for certain.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from daemon import console, gate, operations, report, rescue
from daemon.executor import OnProgress, Stop
from storage import snapshots
from storage.artifacts import atomic_dir, made_for, verify
from storage.errors import Interrupted, ModelError, ModelMissing, StageError, WorkerError
from storage.parquet import read_rows
from storage.records import Candidate, Cycle, State
from strategies.contract import EvaluateJob, StrategySpec, TrainReport
from strategies.evaluation import SCHEMA
from tests.bots import FLAVOURS, Bot, InlineExecutor, audited, lesson, make_bot, make_bot_again
from tests.trainings import state

# Scores on (colours, flavours): the old task and the new one.
Scores = tuple[float, float]
FORGOT: Scores = (0.5, 1.0)
GOOD: Scores = (1.0, 0.75)
DULL: Scores = (1.0, 0.0)
TRADE: dict[str, Scores] = {"1": FORGOT, "0.9": FORGOT, "0.6": (1.0, 0.75), "0.5": (1.0, 0.5), "0": DULL}


class Scripted(InlineExecutor):
    """Trains and blends for real; what a model answers is written here.

    `suites` has the scores of each attempt's candidate, `probes` those of each share of its blends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.suites: dict[int, Scores] = {1: FORGOT}
        self.probes: dict[int, dict[str, Scores]] = {2: TRADE, 4: TRADE}
        self.jobs: list[EvaluateJob] = []

    def evaluate(self, job: EvaluateJob, on_progress: OnProgress, stop: Stop) -> None:
        self._enter("evaluate")
        self.jobs.append(job)
        place = Path(job.out).parent.name
        attempt = int(place.removeprefix("rescue-")) if "rescue" in place else 1
        if not made_for(Path(job.out), job.digest):
            lines = [line for label, task in job.plan for line in self._answers(job, attempt, label, task)]
            with atomic_dir(job.out, {"job": job.digest}) as folder:
                pq.write_table(pa.Table.from_pylist(lines, SCHEMA), folder / "predictions.parquet")
        self.after("evaluate")

    def _answers(self, job: EvaluateJob, attempt: int, label: str, task: str) -> list[dict[str, object]]:
        suite = next(suite for suite in job.suites if suite.task.name == task)
        rows = [row for row in read_rows(suite.path) if row.task == task]
        right = round(self._scores(job, attempt, label)[task == "flavours"] * len(rows))
        return [
            {"model": label, "task": task, "row_hash": row.hash, "prediction": "?"}
            | dict.fromkeys(("exact_match", "token_f1", "score"), float(n < right))
            for n, row in enumerate(rows)
        ]

    def _scores(self, job: EvaluateJob, attempt: int, label: str) -> Scores:
        if "1" in job.models:  # blends, on validation rows
            return self.probes[attempt].get(label, DULL)
        if "champion" not in job.models:
            return (1.0, 0.0) if label == "candidate" else (0.0, 0.0)
        return self.suites[attempt] if label == "candidate" else DULL


@pytest.fixture
def rescued(tmp_path: Path, base: Path) -> Iterator[Bot]:
    """A bot that has learned colours and has flavours to learn; its plain training will forget colours."""
    made = make(tmp_path, base)
    yield made
    made.store.close()


def make(home: Path, base: Path, **overrides: object) -> Bot:
    limits = {"gate.max_drop": 0.1, "gate.min_gain": 0.2, "strategy.replay_ratio": 0.25}
    bot = make_bot(home, base, **{**limits, **overrides})
    bot.executor = Scripted()
    bot.collect(lesson("colours"))
    assert bot.run().state is State.PROMOTED
    bot.collect(lesson("flavours", FLAVOURS))
    bot.executor.calls.clear()
    return bot


def script(bot: Bot) -> Scripted:
    assert isinstance(bot.executor, Scripted)
    return bot.executor


def kinds(bot: Bot, cycle: Cycle) -> list[tuple[str, bool | None]]:
    return [(candidate.kind, candidate.passed) for candidate in bot.store.candidates(cycle.id)]


def check_one_candidate_everywhere(bot: Bot, cycle: Cycle, number: int) -> None:
    """Version, registry, scores, verdict, files and rehearsed rows are of one and the same attempt."""
    candidate = bot.store.candidates(cycle.id)[number - 1]
    assert cycle.version is not None
    model = bot.store.model(cycle.version)
    assert model is not None
    assert (model.result, model.adapter_hash) == (candidate.result, candidate.model)
    bot.registry.check_has(cycle.version, model.adapter_hash)
    scored = {s.model for s in bot.store.scores(cycle.id) if s.label == "candidate"}
    assert scored == {candidate.model}
    assert bot.store.verdict(cycle.id) == (candidate.passed, candidate.verdict)
    result = bot.settings.state_dir / candidate.result
    verify(result)
    told = TrainReport.from_json((result / "report.json").read_text())
    assert bot.store.cycle_rows(cycle.id, "replay") == list(told.rehearsed)


def test_a_model_that_forgot_is_rescued_by_a_blend_for_real(tmp_path: Path, base: Path) -> None:
    """Plain fine-tuning makes the tiny model say `b` to everything; a blend on the way there knows both.

    The first lesson is learned longer than the second, so that the way has a stretch that knows both, not
    one point: 0.7 and 0.8 pass, and a tenth more or less of the rate moves the stretch along the grid.
    """
    limits = {"gate.max_drop": 0.3, "gate.min_gain": 0.0, "strategy.methods": "naive"}
    bot = make_bot(tmp_path, base, **limits, **{"training.learning_rate": 0.01, "training.epochs": 8})
    splits = ["train"] * 24 + ["validation"] * 8 + ["suite"] * 10
    bot.collect([(f"c{n}", "colours", f"colours {n}?", "a", split) for n, split in enumerate(splits)])
    bot.run()
    bot = make_bot_again(bot, base, **limits, **{"training.learning_rate": 0.009, "training.epochs": 3})
    unlike = "ZZ#{:04d} WWWW KKKK".format
    bot.collect([(f"f{n}", "flavours", unlike(n), "b", split) for n, split in enumerate(splits)])
    cycle = bot.run()
    assert kinds(bot, cycle) == [("train", False), ("blend", True)]
    assert cycle.state is State.PROMOTED
    assert "rescued by attempt 2" in (cycle.reason or "")
    check_one_candidate_everywhere(bot, cycle, 2)
    assert {s.task: s.score for s in bot.store.scores(2) if s.label == "candidate"} == {
        "colours": 1.0,
        "flavours": 1.0,
    }
    assert audited(bot) == [], "blends that were not chosen have answered validation rows, and are gone"
    bot.store.close()


def test_a_blend_that_passes_becomes_the_champion_and_the_next_cycle_continues_from_it(rescued: Bot) -> None:
    script(rescued).suites[2] = GOOD
    cycle = rescued.run()
    assert cycle.state is State.PROMOTED
    assert kinds(rescued, cycle) == [("train", False), ("blend", True)]
    assert rescued.store.candidates(cycle.id)[1].share == 0.6
    assert rescued.executor.calls == ["train", "evaluate", "blend", "evaluate", "evaluate"]
    check_one_candidate_everywhere(rescued, cycle, 2)
    assert rescued.registry.alias("champion") == 2
    folder = rescued.settings.state_dir / "cycles/2"
    assert state(folder / "rescue-2/train") == state(folder / "train"), "the continual state comes along"
    assert not list(folder.glob("**/work")), "blends that were not chosen are gone"
    rescued.collect([(f"m{n}", "flavours", f"more {n}", "sweet", "train") for n in range(12)])
    script(rescued).suites[1] = (1.0, 1.0)
    after = rescued.run()
    assert after.parent == 2
    learned = [h for c in rescued.store.lineage(2) for h in rescued.store.cycle_rows(c, "train")]
    assert len(learned) == len(set(learned)) == 32


def test_the_blends_answer_validation_rows_and_nothing_else(rescued: Bot) -> None:
    script(rescued).suites[2] = GOOD
    cycle = rescued.run()
    assert cycle.snapshot is not None
    snapshot = snapshots.load(rescued.settings.state_dir / "snapshots" / cycle.snapshot)
    chosen_by = [job for job in script(rescued).jobs if "0.5" in job.models]
    assert len(chosen_by) == 1
    assert {suite.path for suite in chosen_by[0].suites} == {str(snapshot.path / "probe.parquet")}
    assert {task for _, task in chosen_by[0].plan} == {"colours", "flavours"}
    rows = snapshot.rows("probe")
    assert {row.split for row in rows} == {"validation"}
    examined = {row.hash for task in ("colours", "flavours") for row in read_rows(snapshot.suite_path(task))}
    assert not {row.hash for row in rows} & examined


def test_what_nothing_helps_is_rejected_with_every_attempt_on_record(rescued: Bot) -> None:
    script(rescued).suites.update({2: FORGOT, 3: (0.5, 0.75), 4: FORGOT})
    cycle = rescued.run()
    assert cycle.state is State.REJECTED
    assert kinds(rescued, cycle) == [("train", False), ("blend", False), ("protect", False), ("blend", False)]
    check_one_candidate_everywhere(rescued, cycle, 1)
    protect, last = rescued.store.candidates(cycle.id)[2:]
    assert protect.strategy is not None
    assert StrategySpec.from_json(protect.strategy).replay_ratio == 0.5
    assert protect.change == "replay_ratio 0.25 → 0.5, lwf_weight 0.5 → 1.0"
    assert (protect.source, last.source) == (1, 3)
    assert len({c.model for c in rescued.store.candidates(cycle.id)}) == 4
    assert rescued.registry.alias("champion") == 1
    assert {row.task for row in rescued.store.pending(rescued.store.lineage(1))} == {"flavours"}
    reason = cycle.reason or ""
    assert "in vain: 60 % of the way from the champion to attempt 1, then trained again with more" in reason
    again = rescued.run(rescued.store.request_cycle("schedule", "schedule"))
    assert again.state is State.NOTHING, "the same snapshot is not tried every night"


def test_more_protection_that_passes_is_the_version_with_its_own_rehearsed_rows(rescued: Bot) -> None:
    script(rescued).suites.update({2: FORGOT, 3: GOOD})
    cycle = rescued.run()
    assert cycle.state is State.PROMOTED
    assert kinds(rescued, cycle) == [("train", False), ("blend", False), ("protect", True)]
    check_one_candidate_everywhere(rescued, cycle, 3)
    folder = rescued.settings.state_dir / "cycles/2"
    plain, protected = (
        TrainReport.from_json((folder / place / "report.json").read_text())
        for place in ("train", "rescue-3/train")
    )
    assert protected.replay_rows > plain.replay_rows
    assert len(protected.rehearsed) > len(plain.rehearsed)


def test_when_no_blend_helps_none_sits_the_exam(rescued: Bot) -> None:
    script(rescued).probes[2] = {"1": FORGOT}
    script(rescued).suites[3] = GOOD
    cycle = rescued.run()
    assert kinds(rescued, cycle) == [("train", False), ("blend", None), ("protect", True)]
    blend = rescued.store.candidates(cycle.id)[1]
    assert "no blend helps" in (blend.note or "")
    assert blend.curve is not None
    assert rescued.executor.calls == ["train", "evaluate", "blend", "evaluate", "train", "evaluate"]
    assert not (rescued.settings.state_dir / "cycles/2/rescue-2/evaluate").exists()


def test_naive_training_has_nothing_to_turn_up_and_ends_after_its_blends(tmp_path: Path, base: Path) -> None:
    bot = make(tmp_path, base, **{"strategy.methods": "naive"})
    script(bot).suites[2] = FORGOT
    cycle = bot.run()
    assert cycle.state is State.REJECTED
    assert kinds(bot, cycle) == [("train", False), ("blend", False)]
    bot.store.close()


@pytest.mark.parametrize(
    ("overrides", "plain"),
    [
        ({"rescue.attempts": 0}, FORGOT),
        ({}, (0.5, 0.0)),  # forgot and learned nothing
        ({}, (1.0, 0.0)),  # forgot nothing, and learned nothing
    ],
)
def test_what_is_not_to_be_rescued_is_rejected_at_once(
    tmp_path: Path, base: Path, overrides: dict[str, object], plain: Scores
) -> None:
    bot = make(tmp_path, base, **overrides)
    script(bot).suites[1] = plain
    cycle = bot.run()
    assert cycle.state is State.REJECTED
    assert kinds(bot, cycle) == [("train", False)]
    assert bot.executor.calls == ["train", "evaluate"]
    if overrides:
        assert cycle.snapshot is not None
        snapshot = snapshots.load(bot.settings.state_dir / "snapshots" / cycle.snapshot)
        assert snapshot.rows("probe") == []
    bot.store.close()


def test_the_number_of_attempts_is_the_one_that_the_cycle_began_with(rescued: Bot, base: Path) -> None:
    script(rescued).suites.update({2: FORGOT, 3: FORGOT})
    cycle = rescued.request()
    rescued.executor.before = stop_at("evaluate", 1)
    with pytest.raises(Interrupted):
        rescued.run(cycle)
    scripted = script(rescued)
    edited = make_bot_again(rescued, base, **{"rescue.attempts": 0, "gate.max_drop": 0.1})
    scripted.before = lambda stage: None
    edited.executor = scripted
    scripted.suites[4] = FORGOT
    assert len(edited.store.candidates(edited.run(cycle).id)) == 4
    edited.store.close()


def stop_at(stage: str, nth: int) -> Callable[[str], None]:
    """Raises `Interrupted`, as an executor does on shutdown, when a stage is begun the nth time."""
    seen = []

    def stand(begun: str) -> None:
        seen.append(begun)
        if begun == stage and seen.count(stage) == nth:
            raise Interrupted()

    return stand


class Crash(BaseException):
    """As sudden as a kill: no handler in the product may catch it."""


# Cycle 2 advances: pulled, snapshotted, trained, evaluated, then snapshotted (2), trained, evaluated,
# snapshotted (3), trained, evaluated, decided, promoted.
@pytest.mark.parametrize("moment", ["before the record", "after the record"])
@pytest.mark.parametrize("step", range(5, 13))
def test_a_crash_at_any_record_of_a_rescue_is_continued_to_the_same_end(
    rescued: Bot, step: int, moment: str
) -> None:
    script(rescued).suites.update({2: FORGOT, 3: GOOD})
    cycle = rescued.request()
    crash_at(rescued, step, moment)
    with pytest.raises(Crash):
        rescued.run(cycle)
    continues_to_the_third(rescued, cycle)


def crash_at(bot: Bot, step: int, moment: str) -> None:
    advance = bot.store.advance
    left = iter(range(step - 1, -1, -1))

    def dying(cycle_id: int, to: State, **told: object) -> object:
        last = next(left) == 0
        if last and moment == "before the record":
            raise Crash
        found = advance(cycle_id, to, **told)  # type: ignore[arg-type]
        if last:
            if to.ended:
                pytest.skip("the last record ends the cycle: nothing is left to continue")
            raise Crash
        return found

    bot.store.advance = dying  # type: ignore[method-assign,assignment]


def continues_to_the_third(bot: Bot, cycle: Cycle) -> None:
    bot.executor.before = bot.executor.after = lambda stage: None
    bot.reopen()
    assert [c.id for c in bot.store.unfinished()] == [cycle.id]
    ended = bot.run(bot.store.unfinished()[0])
    assert ended.state is State.PROMOTED
    assert kinds(bot, ended) == [("train", False), ("blend", False), ("protect", True)]
    assert [c.number for c in bot.store.candidates(cycle.id)] == [1, 2, 3]
    check_one_candidate_everywhere(bot, ended, 3)
    assert [p.version for p in bot.store.promotions()] == [1, 2]


@pytest.mark.parametrize(("stage", "nth"), [("blend", 1), ("evaluate", 2), ("evaluate", 3), ("train", 2)])
def test_a_crash_between_work_and_record_does_the_work_once_more(rescued: Bot, stage: str, nth: int) -> None:
    script(rescued).suites.update({2: FORGOT, 3: GOOD})
    seen: list[str] = []

    def die(done: str) -> None:
        seen.append(done)
        if done == stage and seen.count(stage) == nth:
            raise Crash

    rescued.executor.after = die
    cycle = rescued.request()
    with pytest.raises(Crash):
        rescued.run(cycle)
    continues_to_the_third(rescued, cycle)


def test_a_shutdown_while_blending_continues_there(rescued: Bot) -> None:
    script(rescued).suites.update({2: FORGOT, 3: GOOD})
    cycle = rescued.request()
    rescued.executor.before = stop_at("blend", 1)
    with pytest.raises(Interrupted):
        rescued.run(cycle)
    continues_to_the_third(rescued, cycle)
    assert rescued.executor.calls.count("train") == 2


@pytest.mark.parametrize(("stage", "nth"), [("blend", 1), ("train", 2)])
def test_a_cancel_in_a_rescue_ends_the_cycle_and_keeps_the_rows_pending(
    rescued: Bot, stage: str, nth: int
) -> None:
    script(rescued).suites[2] = FORGOT
    stop = Stop()

    def cancel(begun: str) -> None:
        if begun == stage and rescued.executor.calls.count(stage) == nth:
            stop.request("cancel")
            stop.check()

    rescued.executor.before = cancel
    cycle = rescued.run(stop=stop)
    assert cycle.state is State.CANCELLED
    assert rescued.registry.alias("champion") == 1
    assert {row.task for row in rescued.store.pending(rescued.store.lineage(1))} == {"flavours"}
    assert rescued.store.cycle_rows(cycle.id, "replay") == []


def failing(bot: Bot, stage: str, nth: int, error: Exception, *, times: int = 1) -> None:
    left = [times]

    def fail(begun: str) -> None:
        if begun == stage and bot.executor.calls.count(stage) >= nth and left[0]:
            left[0] -= 1
            raise error

    bot.executor.before = fail


def test_a_worker_that_dies_in_a_rescue_is_replaced(rescued: Bot) -> None:
    script(rescued).suites.update({2: FORGOT, 3: GOOD})
    failing(rescued, "blend", 1, WorkerError("killed"), times=2)
    cycle = rescued.run()
    assert cycle.state is State.PROMOTED
    assert cycle.attempts == 2, "deaths of the worker, which are counted apart"
    assert len(rescued.store.candidates(cycle.id)) == 3


def test_a_worker_that_keeps_dying_in_a_rescue_fails_the_cycle(rescued: Bot) -> None:
    failing(rescued, "blend", 1, WorkerError("killed"), times=9)
    cycle = rescued.run()
    assert (cycle.state, cycle.attempts) == (State.FAILED, 3)


def test_adapters_that_cannot_be_blended_are_recorded_and_protection_is_tried(rescued: Bot) -> None:
    script(rescued).suites[3] = GOOD
    failing(rescued, "blend", 1, ModelError("adapters of other shapes cannot be blended"))
    cycle = rescued.run()
    assert cycle.state is State.PROMOTED
    assert kinds(rescued, cycle) == [("train", False), ("blend", None), ("protect", True)]
    assert "other shapes" in (rescued.store.candidates(cycle.id)[1].note or "")


def test_a_base_that_is_not_mounted_is_no_fault_of_the_attempt(rescued: Bot) -> None:
    failing(rescued, "blend", 1, ModelMissing())
    cycle = rescued.request()
    with pytest.raises(ModelMissing):
        rescued.run(cycle)
    assert kinds(rescued, cycle) == [("train", False), ("blend", None)]
    assert rescued.store.candidates(cycle.id)[-1].note is None, "it is tried again"


def forgotten() -> gate.Verdict:
    """Of a candidate that learned the new task and forgot the old one."""
    no, yes = (0.0,) * 20, (1.0,) * 20
    suites = [
        gate.SuiteScores(task="old", suite="old@v1", new=False, base=no, champion=yes, candidate=no),
        gate.SuiteScores(task="new", suite="new@v1", new=True, base=no, champion=no, candidate=yes),
    ]
    return gate.judge(suites, gate.Thresholds(max_drop=0.1, min_gain=0.2, bootstrap=100))


def plain(now: datetime) -> Candidate:
    return Candidate(
        cycle_id=2,
        number=1,
        kind="train",
        source=None,
        result="cycles/2/train",
        strategy=None,
        created_at=now,
    )


@pytest.mark.parametrize(
    ("methods", "next_kind"), [("joint", None), ("olora", "protect"), ("merge", "blend")]
)
def test_an_adapter_that_did_not_grow_out_of_the_champion_is_not_blended(
    methods: str, next_kind: str | None
) -> None:
    now, limits = datetime(2026, 1, 1), rescue.Limits(attempts=3, minutes=60)
    strategy = StrategySpec(methods=(methods,))
    following = rescue.following([plain(now)], forgotten(), limits, strategy, 1, now)
    assert (following.kind if following else None) == next_kind


def test_each_attempt_is_made_of_the_training_before_it_and_protects_more_than_that() -> None:
    now, limits = datetime(2026, 1, 1), rescue.Limits(attempts=5, minutes=60)
    strategy, tried = StrategySpec(methods=("replay",), replay_ratio=0.5), [plain(now)]
    while following := rescue.following(tried, forgotten(), limits, strategy, 1, now):
        tried.append(following)
    assert [(made.kind, made.source) for made in tried] == [
        ("train", None), ("blend", 1), ("protect", 1), ("blend", 3), ("protect", 3), ("blend", 5),
    ]  # fmt: skip
    ratios = [rescue.strategy_of(made, strategy).replay_ratio for made in tried]
    assert ratios == [0.5, 0.5, 1.0, 1.0, 2.0, 2.0]


def test_neither_a_first_cycle_nor_what_passed_is_rescued() -> None:
    now, limits, strategy = datetime(2026, 1, 1), rescue.Limits(attempts=3, minutes=60), StrategySpec()
    assert rescue.following([plain(now)], forgotten(), limits, strategy, None, now) is None
    blend = rescue.following([plain(now)], forgotten(), limits, strategy, 1, now)
    assert blend is not None
    passed = replace(forgotten(), passed=True)
    assert rescue.following([plain(now), blend], passed, limits, strategy, 1, now) is None
    assert rescue.concluded([plain(now), blend]) == plain(now), "what training made, when none passed"


def test_the_time_is_for_all_attempts_together() -> None:
    began, limits = datetime(2026, 1, 1), rescue.Limits(attempts=9, minutes=60)
    late = replace(plain(began), number=3, created_at=began + timedelta(minutes=59))
    tried = [plain(began - timedelta(hours=9)), plain(began), late]
    assert not rescue.is_over(tried[:1], limits, began), "the plain training has a time of its own"
    assert not rescue.is_over(tried, limits, began + timedelta(minutes=60))
    assert rescue.is_over(tried, limits, began + timedelta(minutes=61))


def test_a_snapshot_from_before_there_were_rescues_allows_none() -> None:
    old = snapshots.Snapshot(id="0" * 16, path=Path("unused"), info={"meta": {}})
    assert rescue.Limits.of(old) == rescue.Limits(attempts=0, minutes=0)


@pytest.mark.parametrize(("attempts", "cut_short"), [(1, False), (2, True)])
def test_time_ends_a_rescue_only_where_an_attempt_was_left(attempts: int, cut_short: bool) -> None:
    """The daemon was off between the last exam and its verdict, until long after."""
    began, limits = datetime(2026, 1, 1), rescue.Limits(attempts=attempts, minutes=60)
    strategy, late = StrategySpec(methods=("replay",)), datetime(2026, 1, 2)
    blend = rescue.following([plain(began)], forgotten(), limits, strategy, 1, began)
    assert blend is not None
    tried = [plain(began), blend]
    left = rescue.following(tried, forgotten(), limits, strategy, 1, late)
    assert rescue.is_cut_short(tried, left, limits, late) is cut_short
    assert not rescue.is_cut_short(tried, left, limits, began)
    aside = [tried[0], replace(blend, note="the time for rescuing was over")]
    assert rescue.is_cut_short(aside, None, limits, late)
    assert not rescue.is_cut_short(aside, None, limits, began)


@pytest.mark.parametrize(("stage", "nth"), [("train", 2), ("evaluate", 4)])
def test_an_attempt_that_fails_does_not_fail_the_cycle_that_has_its_verdict(
    rescued: Bot, stage: str, nth: int
) -> None:
    script(rescued).suites[2] = FORGOT
    failing(rescued, stage, nth, StageError("the stage took longer than 240 minutes and was stopped"))
    cycle = rescued.run()
    assert cycle.state is State.REJECTED
    assert kinds(rescued, cycle) == [("train", False), ("blend", False), ("protect", None)]
    check_one_candidate_everywhere(rescued, cycle, 1)
    assert "240 minutes" in "\n".join(report.explain(report.cycle_report(rescued.store, cycle.id)))


@pytest.mark.parametrize(("stage", "nth", "made"), [("blend", 1, 2), ("train", 2, 3)])
def test_when_the_time_for_rescuing_is_over_the_cycle_is_rejected(
    rescued: Bot, stage: str, nth: int, made: int
) -> None:
    script(rescued).suites[2] = FORGOT

    def wait(begun: str) -> None:
        if begun == stage and rescued.executor.calls.count(stage) == nth:
            rescued.clock.now += rescued.clock.now.resolution * 1_000_000 * 3600 * 3

    rescued.executor.before = wait
    cycle = rescued.run()
    assert cycle.state is State.REJECTED
    assert len(rescued.store.candidates(cycle.id)) == made
    assert "then the time for rescuing was over" in (cycle.reason or "")
    check_one_candidate_everywhere(rescued, cycle, 1)


def test_a_rescue_that_the_clock_ended_is_given_one_more_night(rescued: Bot) -> None:
    script(rescued).suites[2] = FORGOT

    def wait(begun: str) -> None:
        if begun == "blend":
            rescued.clock.now += timedelta(hours=3)

    def night() -> Cycle:
        return rescued.run(rescued.store.request_cycle("schedule", "schedule"))

    rescued.executor.before = wait
    first, second, third = night(), night(), night()
    assert (first.state, second.state) == (State.REJECTED, State.REJECTED)
    assert third.state is State.NOTHING, "a machine that is always too slow does not train for ever"
    assert f"rejected in cycle {second.id}" in (third.reason or "")


def test_a_rescue_that_came_to_its_end_is_not_tried_again_by_schedule(rescued: Bot) -> None:
    script(rescued).suites |= dict.fromkeys((2, 3, 4), FORGOT)
    assert rescued.run().state is State.REJECTED
    again = rescued.run(rescued.store.request_cycle("schedule", "schedule"))
    assert again.state is State.NOTHING


def test_a_first_cycle_has_no_champion_to_be_blended_with(tmp_path: Path, base: Path) -> None:
    bot = make_bot(tmp_path, base, **{"gate.max_drop": 0.1, "gate.min_gain": -1.0})
    scripted = Scripted()
    scripted._scores = lambda job, attempt, label: (0.5, 0.5) if label == "candidate" else (1.0, 0.0)  # type: ignore[method-assign]
    bot.executor = scripted
    bot.collect([*lesson("colours"), *lesson("flavours", FLAVOURS)])
    cycle = bot.run()
    assert cycle.state is State.REJECTED
    assert kinds(bot, cycle) == [("train", False)]
    bot.store.close()


def test_every_attempt_is_told_in_words_in_numbers_and_in_mlflow(
    rescued: Bot, capsys: pytest.CaptureFixture[str]
) -> None:
    script(rescued).suites.update({2: FORGOT, 3: GOOD})
    cycle = rescued.run()
    told = operations.show(rescued.store, cycle.id)
    json.dumps(told)
    words = "\n".join(told["words"])
    assert "It took 3 attempts:" in words
    assert "1  plain training: rejected: colours@v1 went from 100.0 to 50.0" in words
    assert "2  60 % of the way from the champion to attempt 1, on validation rows 75.0 on the new" in words
    assert "3  trained again with more protection (replay_ratio 0.25 → 0.5, lwf_weight" in words
    assert words.count("this one is the version") == 1
    points = told["attempts"][1]["curve"]
    assert [point["share"] for point in points] == [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]
    assert [point["share"] for point in points if point["chosen"]] == [0.6]
    console.show(told)
    table = capsys.readouterr().out
    assert "attempt 2, share" in table
    assert "examined" in table
    artifacts = rescued.settings.state_dir / "artifacts"
    (picture,) = artifacts.rglob("trade_off.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    logged = [json.loads(path.read_text()) for path in artifacts.rglob("attempts.json")]
    assert sorted(len(attempts) for attempts in logged) == [1, 3]


def test_every_number_of_the_curve_can_be_recomputed_from_stored_predictions(rescued: Bot) -> None:
    script(rescued).suites[2] = GOOD
    cycle = rescued.run()
    candidate = rescued.store.candidates(cycle.id)[1]
    assert candidate.model is not None
    told = report.cycle_report(rescued.store, cycle.id)["attempts"][1]["curve"][4]
    assert told["scores"] == {"colours": 1.0, "flavours": 0.75}
    found = rescued.store._db.script(
        f"SELECT exam, avg(score), count(*) FROM predictions WHERE model = '{candidate.model}' GROUP BY exam"
    )
    kept = sorted((mean, count) for _, mean, count in found)
    assert kept == [(0.75, 4), (0.75, 8), (1.0, 4), (1.0, 8)]  # four validation rows, eight suite rows
