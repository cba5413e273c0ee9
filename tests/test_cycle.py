"""The cycle with everything real but the process boundary: every ending, every restart."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon import operations, promote, report
from daemon.executor import Stop
from storage.errors import IntegrityError, Interrupted, StageError, WorkerError
from storage.records import Cycle, State
from strategies.contract import Progress, TrainReport
from tests.bots import FLAVOURS, Bot, fails, lesson, make_bot, make_bot_again, two_promoted

TOOK_TOO_LONG = StageError("the train stage took longer than 240 minutes and was stopped")


def test_two_tasks_in_two_cycles_end_promoted_with_a_full_accuracy_matrix(bot: Bot) -> None:
    two_promoted(bot)
    table = report.matrix(bot.store)
    assert table.tasks == ("colours", "flavours")
    assert table.rows == ("base", "cycle 1", "cycle 2")
    assert all(value is not None for line in table.values for value in line)
    assert table.learned_at == (1, 2)
    assert set(table.metrics()) >= {"average_accuracy", "backward_transfer", "forgetting"}
    assert bot.registry.alias("champion") == 2
    assert bot.registry.alias("challenger") is None


def test_who_watches_is_told_of_every_state_as_soon_as_it_is_reached(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    cycle, seen = bot.request(), []
    runner = bot.runner()

    def watch(number: int, progress: Progress | None) -> None:
        if progress is None:
            seen.append(bot.store.cycle(number))

    runner.on_progress = watch
    runner.run(cycle.id, Stop())
    assert [told.state for told in seen if told] == [
        State.PULLED, State.SNAPSHOTTED, State.TRAINED, State.EVALUATED, State.DECIDED, State.PROMOTED,
    ]  # fmt: skip


def test_what_a_training_says_people_should_know_is_shown_and_mlflow_has_the_adapters_own_shape(
    bot: Bot, base: Path
) -> None:
    bot.collect(lesson("colours"))
    bot.run()
    other = make_bot_again(bot, base, lora__rank=8)
    other.collect(lesson("flavours", FLAVOURS))
    cycle = other.run()
    words = report.cycle_report(other.store, cycle.id)["words"]
    told = "Mind: lora.rank = 8 was not used: the champion's adapter continues with 4."
    assert words.count(told) == 1
    with other.registry._connection.use() as (client, experiment):
        [run] = client.search_runs([experiment], f"tags.`holdfast.cycle` = '{cycle.id}'")
    assert run.data.params["lora.rank"] == "4"
    assert run.data.metrics["train/replay_rows"] == len(other.store.cycle_rows(cycle.id, "replay")) > 0


def test_a_cycle_is_told_as_far_as_it_came(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    cycle, seen = bot.request(), {}
    runner = bot.runner()

    def watch(number: int, progress: Progress | None) -> None:
        if progress is None:
            state = bot.store.cycle(number).state  # type: ignore[union-attr]
            seen[state] = report.cycle_report(bot.store, number)["words"]

    runner.on_progress = watch
    runner.run(cycle.id, Stop())
    assert seen[State.SNAPSHOTTED][0] == "Cycle 1 is snapshotted."
    assert any(line.startswith("It is to learn ") for line in seen[State.SNAPSHOTTED])
    assert any(line.startswith("It learned ") for line in seen[State.TRAINED])
    assert seen[State.DECIDED][0].startswith("Cycle 1: passed: "), "as MLflow keeps it"
    assert seen[State.PROMOTED][0].startswith("Cycle 1 is promoted: passed: ")
    assert "Scores: accuracy of colours." in seen[State.PROMOTED]


def test_every_score_is_the_mean_of_stored_predictions(bot: Bot) -> None:
    two_promoted(bot)
    for score in bot.store.scores():
        answers = bot.store.predictions(score.model, score.exam)
        assert len(answers) == score.size == 8
        assert score.score == pytest.approx(sum(p.score for p in answers.values()) / len(answers))


def test_the_champions_answers_are_not_asked_for_again(bot: Bot) -> None:
    two_promoted(bot)
    job_plan = [e for e in bot.store.scores(2) if e.label == "champion" and e.task == "colours"]
    earlier = [e for e in bot.store.scores(1) if e.label == "candidate" and e.task == "colours"]
    assert (job_plan[0].model, job_plan[0].exam) == (earlier[0].model, earlier[0].exam)


def test_without_new_rows_there_is_nothing_to_do(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    bot.run()
    cycle = bot.run()
    assert cycle.state is State.NOTHING
    assert "0 new training rows" in (cycle.reason or "")
    assert bot.executor.calls.count("train") == 1


def test_as_many_rows_as_are_wanted_are_enough_and_fewer_stay_pending(bot: Bot, base: Path) -> None:
    patient = make_bot_again(bot, base, training__min_rows=16)
    patient.collect(lesson("colours", train=15))
    cycle = patient.run()
    assert cycle.state is State.NOTHING
    assert "15 new training rows, training.min_rows is 16" in (cycle.reason or "")
    patient.collect([("late", "colours", "which one is colours 99", "red", "train")])
    assert patient.run().state is State.PROMOTED
    patient.store.close()


def test_rows_without_any_suite_are_trained_on_and_rejected_in_mlflow_too(bot: Bot) -> None:
    bot.collect(lesson("colours", suite=0))
    cycle = bot.run()
    assert (cycle.state, cycle.version) == (State.REJECTED, 1)
    assert "no suite of the new rows' tasks can speak" in (cycle.reason or "")
    assert bot.registry.alias("challenger") == 1
    assert bot.registry.alias("champion") is None


def test_a_rejected_cycle_leaves_its_rows_pending_and_the_champion_alone(
    bot: Bot, tmp_path: Path, base: Path
) -> None:
    bot.collect(lesson("colours"))
    bot.run()
    strict = make_bot_again(bot, base, gate__min_gain=1.0)
    strict.collect(lesson("flavours", FLAVOURS))
    cycle = strict.run()
    assert cycle.state is State.REJECTED
    assert strict.registry.alias("champion") == 1
    assert strict.registry.alias("challenger") == cycle.version
    pending = strict.store.pending(strict.store.lineage(1))
    assert {row.task for row in pending} == {"flavours"}


def test_a_schedule_does_not_try_every_night_what_was_rejected_already(bot: Bot, base: Path) -> None:
    strict = make_bot_again(bot, base, gate__min_gain=1.0)
    strict.collect(lesson("colours"))
    assert scheduled(strict).state is State.REJECTED
    again = scheduled(strict)
    assert again.state is State.NOTHING
    assert "rejected in cycle 1" in (again.reason or "")
    assert strict.run().state is State.REJECTED, "a person who asks for it gets it"
    assert strict.executor.calls.count("train") == 2
    strict.collect([("late", "colours", "which one is colours 99", "red", "train")])
    assert scheduled(strict).state is State.REJECTED, "new rows are a new try"
    open_gate = make_bot_again(strict, base)
    assert scheduled(open_gate).state is State.PROMOTED, "and so are other thresholds"
    open_gate.store.close()


def scheduled(bot: Bot) -> Cycle:
    return bot.run(bot.store.request_cycle("schedule", "schedule"))


def test_without_thresholds_nothing_is_promoted(tmp_path: Path, base: Path) -> None:
    bot = make_bot(tmp_path, base)
    settings = bot.settings.model_copy(
        update={"gate": bot.settings.gate.model_copy(update={"max_drop": None, "min_gain": None})}
    )
    bot.settings = settings
    bot.collect(lesson("colours"))
    cycle = bot.run()
    assert cycle.state is State.REJECTED
    assert "without thresholds nothing is promoted" in (cycle.reason or "")
    assert bot.registry.alias("champion") is None
    bot.store.close()


def test_a_cycle_is_judged_by_the_thresholds_that_it_began_with(bot: Bot, base: Path) -> None:
    bot.collect(lesson("colours"))
    cycle, stop = bot.request(), Stop()
    bot.executor.after = lambda stage: stop.request("shutdown") if stage == "train" else None
    with pytest.raises(Interrupted):
        bot.run(cycle, stop)
    strict = make_bot_again(bot, base, gate__min_gain=1.0)
    assert strict.run(cycle).state is State.PROMOTED


STAGES = [State.REQUESTED, State.PULLED, State.SNAPSHOTTED, State.TRAINED, State.EVALUATED, State.DECIDED]


@pytest.mark.parametrize("state", STAGES)
@pytest.mark.parametrize("moment", ["before the record", "after the record"])
def test_a_crash_at_any_transition_is_continued_to_the_same_end(bot: Bot, state: State, moment: str) -> None:
    bot.collect(lesson("colours"))
    cycle = bot.request()
    crash_at(bot, state, moment)
    with pytest.raises(Crash):
        bot.run(cycle)
    bot.reopen()
    assert [c.id for c in bot.store.unfinished()] == [cycle.id]
    ended = bot.run(bot.store.unfinished()[0])
    assert ended.state is State.PROMOTED
    assert ended.version == 1
    assert [p.version for p in bot.store.promotions()] == [1]
    assert len(bot.store.models()) == 1
    assert bot.store.row_counts()["colours"]["train"] == 16
    assert [s.version for s in bot.store.suites()] == [1]


class Crash(BaseException):
    """As sudden as a kill: no handler in the product may catch it."""


def crash_at(bot: Bot, state: State, moment: str) -> None:
    """The next `advance` out of `state` dies before or after its transaction."""
    advance = bot.store.advance

    def dying(cycle_id: int, to: State, **told: object) -> object:
        now = bot.store.cycle(cycle_id)
        assert now is not None
        if now.state is not state:
            return advance(cycle_id, to, **told)  # type: ignore[arg-type]
        if moment == "after the record":
            advance(cycle_id, to, **told)  # type: ignore[arg-type]
            if to.ended:
                pytest.skip("the last record ends the cycle: nothing is left to continue")
        raise Crash

    bot.store.advance = dying  # type: ignore[method-assign,assignment]


def test_cancelling_ends_the_cycle_and_keeps_the_rows_pending(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    stop = Stop()
    bot.executor.before = lambda stage: stop.request("cancel") if stage == "train" else None
    cycle = bot.run(stop=stop)
    assert cycle.state is State.CANCELLED
    assert len(bot.store.pending([])) == 16
    bot.executor.before = lambda stage: None
    assert bot.run().state is State.PROMOTED


def test_a_shutdown_in_mid_training_resumes_to_the_adapter_of_an_undisturbed_run(
    bot: Bot, tmp_path: Path, base: Path
) -> None:
    undisturbed = make_bot(tmp_path / "twin", base)
    undisturbed.collect(lesson("colours"))
    undisturbed.run()
    bot.collect(lesson("colours"))
    cycle = bot.request()
    with pytest.raises(Interrupted):
        bot.run(cycle, stop_after_polls(3))
    bot.reopen()
    assert bot.run(cycle).state is State.PROMOTED
    assert bot.store.models()[0].adapter_hash == undisturbed.store.models()[0].adapter_hash
    undisturbed.store.close()


def stop_after_polls(polls: int) -> Stop:
    """A shutdown that arrives while the training loop is running."""

    class Later(Stop):
        seen = 0
        armed = False

        def is_set(self) -> bool:
            if self.armed:
                self.seen += 1
                if self.seen > polls:
                    self.request("shutdown")
            return super().is_set()

        def check(self) -> None:
            super().check()

    stop = Later()
    stop.armed = True
    return stop


def test_a_worker_that_keeps_dying_fails_the_cycle_and_loses_nothing(bot: Bot) -> None:
    bot.collect(lesson("colours"))

    def die(stage: str) -> None:
        if stage == "train":
            raise WorkerError("the worker ended without a result (killed by signal 9)")

    bot.executor.before = die
    cycle = bot.run()
    assert cycle.state is State.FAILED
    assert "3 attempts" in (cycle.reason or "")
    assert len(bot.store.pending([])) == 16


def test_a_worker_that_dies_once_is_replaced(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    deaths = iter([True])

    def die_once(stage: str) -> None:
        if stage == "train" and next(deaths, False):
            raise WorkerError("killed")

    bot.executor.before = die_once
    assert bot.run().state is State.PROMOTED


def test_what_would_fail_again_is_not_tried_again(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    bot.executor.before = fails("train", TOOK_TOO_LONG)
    cycle = bot.run()
    assert (cycle.state, cycle.attempts) == (State.FAILED, 0)
    assert bot.executor.calls.count("train") == 1


def test_a_tampered_suite_stops_the_cycle_with_a_clear_error(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    bot.executor.before = lambda stage: tamper(bot) if stage == "train" else None
    cycle = bot.run()
    assert cycle.state is State.FAILED
    assert "suite" in (cycle.reason or "")
    assert bot.registry.alias("champion") is None


def tamper(bot: Bot) -> None:
    for path in (bot.settings.state_dir / "snapshots").glob("*/suites/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.chmod(0o600)
        path.write_bytes(bytes(data))


def change_suite(bot: Bot) -> None:
    """The copy in the snapshot is whole: it is the scores' own rows that would say something else."""
    bot.store._db.script("UPDATE rows SET answer = upper(answer) WHERE split = 'suite'")


def damage_adapter(bot: Bot) -> None:
    """One bit in a weight: it would load, and answer."""
    adapter = bot.settings.state_dir / "cycles/1/train/adapter/adapter_model.safetensors"
    weights = bytearray(adapter.read_bytes())
    weights[-1] ^= 1
    adapter.write_bytes(weights)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (change_suite, "suite colours@v1 in the store is not the one that was frozen"),
        (damage_adapter, "adapter_model.safetensors was changed"),
    ],
)
def test_what_was_changed_after_the_training_stops_the_cycle_before_the_exam(
    bot: Bot, spoil: Callable[[Bot], None], told: str
) -> None:
    bot.collect(lesson("colours"))
    bot.executor.after = lambda stage: spoil(bot) if stage == "train" else None
    cycle = bot.run()
    assert cycle.state is State.FAILED
    assert told in (cycle.reason or "")
    assert "evaluate" not in bot.executor.calls


def test_a_full_disk_fails_the_cycle_with_the_remedy(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    bot.executor.before = fails("train", OSError(errno.ENOSPC, "No space left on device"))
    cycle = bot.run()
    assert cycle.state is State.FAILED
    assert "No space left on device; free space or fix the permissions" in (cycle.reason or "")


def test_a_damaged_champion_adapter_stops_the_next_cycle(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    bot.run()
    adapter = bot.settings.state_dir / "cycles/1/train/adapter/adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-8])
    bot.collect(lesson("flavours", FLAVOURS))
    cycle = bot.run()
    assert cycle.state is State.FAILED
    assert "adapter_model.safetensors" in (cycle.reason or "")
    with pytest.raises(IntegrityError):
        raise IntegrityError(cycle.reason)


def test_after_a_rollback_the_next_cycle_continues_from_the_older_version_and_its_memory(bot: Bot) -> None:
    two_promoted(bot)
    promote.rollback(bot.store, bot.registry, "ana", "version 2 was rude")
    assert bot.registry.alias("champion") == 1
    cycle = bot.run()  # the rows of the abandoned version are pending again
    assert cycle.state is State.PROMOTED
    assert cycle.parent == 1
    assert {bot.store.rows_by_hash([h])[0].task for h in bot.store.cycle_rows(cycle.id, "train")} == {
        "flavours"
    }
    replayed = bot.store.rows_by_hash(bot.store.cycle_rows(cycle.id, "replay"))
    assert {row.task for row in replayed} == {"colours"}
    assert bot.store.lineage(cycle.version) == [1, cycle.id]


def test_what_a_person_rolled_back_is_not_promoted_again_the_next_night(bot: Bot) -> None:
    two_promoted(bot)
    promote.rollback(bot.store, bot.registry, "ana", "version 2 was rude")
    night = bot.run(bot.store.request_cycle("schedule", "schedule"))
    assert night.state is State.NOTHING
    assert "made version 2, which was rolled back, see `daemon show 2`" in (night.reason or "")
    bot.collect(lesson("shapes"))
    again = bot.run(bot.store.request_cycle("schedule", "schedule"))
    assert again.state is State.PROMOTED, "other rows, another try"


def test_repeated_rollbacks_walk_back_to_the_bare_base(bot: Bot) -> None:
    two_promoted(bot)
    promote.rollback(bot.store, bot.registry, "ana", "first")
    promote.rollback(bot.store, bot.registry, "ana", "second")
    champion = bot.store.champion()
    assert champion is not None
    assert champion.version is None
    assert bot.registry.alias("champion") is None
    assert bot.run().parent is None


def test_a_manual_promotion_is_on_record_with_who_and_why(bot: Bot) -> None:
    two_promoted(bot)
    line = promote.manual(bot.store, bot.registry, 1, "ana", "customers prefer it")
    assert (line.kind, line.who, line.why, line.previous) == ("manual", "ana", "customers prefer it", 2)
    assert bot.registry.alias("champion") == 1


def test_a_champion_changed_by_hand_in_mid_cycle_is_not_overwritten(bot: Bot) -> None:
    two_promoted(bot)
    bot.collect(
        [
            (f"x{i}", "numbers", f"what is number {i}", str(i % 3), "train" if i < 16 else "suite")
            for i in range(26)
        ]
    )
    bot.executor.after = lambda stage: (
        promote.rollback(bot.store, bot.registry, "ana", "mid-cycle") and None if stage == "train" else None
    )
    cycle = bot.run()
    assert cycle.state is State.REJECTED
    assert "meanwhile" in (cycle.reason or "")
    assert bot.registry.alias("champion") == 1
    tags = bot.registry._connection.client().get_model_version("test-bot", str(cycle.version)).tags
    assert (tags["holdfast.verdict"], tags["holdfast.reason"]) == ("rejected", cycle.reason)


def test_an_alias_lost_in_the_registry_is_repaired_from_the_store(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    bot.run()
    bot.registry.delete_alias("champion")
    promote.repair_alias(bot.store, bot.registry)
    assert bot.registry.alias("champion") == 1


def test_the_rows_of_any_version_can_be_listed(bot: Bot) -> None:
    two_promoted(bot)
    learned = [h for cycle in bot.store.lineage(2) for h in bot.store.cycle_rows(cycle, "train")]
    assert len(learned) == len(set(learned)) == 32
    told = TrainReport.from_json((bot.settings.state_dir / "cycles/2/train/report.json").read_text())
    assert bot.store.cycle_rows(2, "replay") == list(told.rehearsed)
    assert 0 < len(told.rehearsed) <= 16
    assert bot.store.cycle_rows(1, "replay") == []


def test_a_suite_that_grew_enough_becomes_a_new_version_with_the_old_rows_in_it(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    bot.run()
    more = [(f"c{i}", "colours", f"another {i}", "red", "suite" if i < 6 else "train") for i in range(20)]
    bot.collect(more)
    bot.run()
    versions = [s for s in bot.store.suites() if s.task == "colours"]
    assert [(s.version, s.size) for s in versions] == [(1, 8), (2, 14)]
    old, new = (bot.store.suite_rows("colours", v) for v in (1, 2))
    assert {row.hash for row in old} < {row.hash for row in new}
    assert {s.version for s in bot.store.scores(2)} == {2}


def test_a_cycle_is_explained_in_words(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    cycle = bot.run()
    told = report.cycle_report(bot.store, 1)
    json.dumps(told)
    text = "\n".join(report.explain(told))
    assert "Cycle 1 is promoted" in text
    assert "colours@v1 went from" in text
    (line,) = bot.store.promotions()
    assert (line.kind, line.why) == ("gate", cycle.reason)


def test_a_cycle_that_made_nothing_is_not_taken_for_the_base_that_somebody_went_back_to(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    bot.run()
    promote.rollback(bot.store, bot.registry, "ann", "rude")
    bot.collect(lesson("flavours", FLAVOURS))
    bot.executor.before = fails("train", TOOK_TOO_LONG)
    assert scheduled(bot).state is State.FAILED
    bot.executor.before = lambda stage: None
    assert scheduled(bot).state is State.PROMOTED


def test_people_are_told_how_far_the_source_was_read(bot: Bot) -> None:
    bot.collect(lesson("colours", train=4))
    assert operations.status(bot.settings, bot.store)["source"]["pulled_at"] is None
    bot.run()
    assert operations.status(bot.settings, bot.store)["source"]["pulled_at"] is not None
