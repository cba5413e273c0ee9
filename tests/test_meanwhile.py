"""What people and outages do while a cycle is under way, and stores and registries that do not match."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from daemon import experience, operations, promote, report
from storage.errors import ConfigError, RegistryError, RegistryUnavailable, StageError
from storage.records import State
from storage.registry import Registry
from strategies.contract import EvaluateJob, TaskKind, TrainJob, TrainReport
from tests.bots import FLAVOURS, Bot, audited, fails, lesson, make_bot, make_bot_again, two_promoted


@contextmanager
def away(bot: Bot, what: str) -> Iterator[None]:
    """MLflow fails in one of its operations."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RegistryUnavailable("MLflow is away")

    whole = getattr(bot.registry, what)
    setattr(bot.registry, what, fail)
    try:
        yield
    finally:
        setattr(bot.registry, what, whole)


def learn_flavours_while_mlflow_is_away(bot: Bot, what: str) -> int:
    """A second cycle that has passed the gate and waits for MLflow; its number."""
    bot.collect(lesson("colours"))
    bot.run()
    bot.collect(lesson("flavours", FLAVOURS))
    cycle = bot.request()
    with away(bot, what), pytest.raises(RegistryUnavailable):
        bot.run(cycle)
    waiting = bot.store.cycle(cycle.id)
    assert waiting is not None
    assert waiting.state is State.DECIDED
    return cycle.id


def run_again(bot: Bot, cycle_id: int) -> Any:
    cycle = bot.store.cycle(cycle_id)
    assert cycle is not None
    return bot.run(cycle)


def champions(bot: Bot) -> list[tuple[int | None, str]]:
    return [(line.version, line.kind) for line in bot.store.promotions()]


def test_a_rollback_while_a_verdict_waits_for_mlflow_is_not_overruled(bot: Bot) -> None:
    cycle = learn_flavours_while_mlflow_is_away(bot, "publish")
    promote.rollback(bot.store, bot.registry, "ana", "rude answers")
    ended = run_again(bot, cycle)
    assert ended.state is State.REJECTED
    assert "meanwhile" in ended.reason
    assert champions(bot) == [(1, "gate"), (None, "rollback")]


def test_a_cancel_while_a_verdict_waits_for_mlflow_leaves_the_old_champion(bot: Bot) -> None:
    cycle = learn_flavours_while_mlflow_is_away(bot, "log_stream")
    bot.store.event("cancel", cycle, by="ana")
    assert run_again(bot, cycle).state is State.CANCELLED
    assert champions(bot) == [(1, "gate")]
    assert bot.registry.alias("champion") == 1
    assert {row.task for row in bot.store.pending(bot.store.lineage(1))} == {"flavours"}
    night = bot.run(bot.store.request_cycle("schedule", "schedule"))
    assert night.state is State.PROMOTED, "the gate never refused these rows"


def test_a_cancel_while_mlflow_takes_the_version_leaves_the_old_champion(
    bot: Bot, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot.collect(lesson("colours"))
    bot.run()
    bot.collect(lesson("flavours", FLAVOURS))
    cycle, log_stream = bot.request(), bot.registry.log_stream

    def cancelled_meanwhile(*args: Any, **kwargs: Any) -> None:
        bot.store.event("cancel", cycle.id, by="ana")
        log_stream(*args, **kwargs)

    monkeypatch.setattr(bot.registry, "log_stream", cancelled_meanwhile)
    assert bot.run(cycle).state is State.CANCELLED
    assert champions(bot) == [(1, "gate")]


@pytest.mark.parametrize("is_away", [False, True])
def test_a_failed_cycle_is_in_mlflow_and_has_failed_without_it_too(bot: Bot, is_away: bool) -> None:
    bot.collect(lesson("colours"))
    took_too_long = StageError("the train stage took longer than 240 minutes and was stopped")
    cycle = bot.request()
    bot.executor.before = fails("train", took_too_long)
    with away(bot, "log_failure") if is_away else nullcontext():
        assert bot.run(cycle).state is State.FAILED
    if not is_away:
        run = published(bot.registry, cycle.id)
        assert (run.info.status, run.data.tags["holdfast.reason"]) == ("FAILED", str(took_too_long))


def test_a_version_promoted_by_hand_before_the_gate_came_to_it_has_one_line(bot: Bot) -> None:
    cycle = learn_flavours_while_mlflow_is_away(bot, "log_stream")
    promote.manual(bot.store, bot.registry, 2, "ana", "cannot wait")
    assert run_again(bot, cycle).state is State.PROMOTED
    assert champions(bot) == [(1, "gate"), (2, "manual")]
    assert promote.rollback(bot.store, bot.registry, "ana", "was wrong").version == 1


def test_an_alias_that_could_not_follow_does_not_undo_the_promotion(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    with away(bot, "alias"):
        assert bot.run().state is State.PROMOTED
    promote.repair_alias(bot.store, bot.registry)
    assert bot.registry.alias("champion") == 1


def test_a_cancel_outlives_the_daemon_that_was_told(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    cycle = bot.request()
    bot.store.event("cancel", cycle.id, by="ana")
    bot.reopen()
    assert bot.run(cycle).state is State.CANCELLED
    assert bot.executor.calls == []


def test_a_second_state_directory_on_one_mlflow_serves_its_own_adapter(
    bot: Bot, tmp_path: Path, base: Path
) -> None:
    bot.collect(lesson("colours"))
    bot.run()
    uri = bot.settings.tracking_uri
    other = make_bot(tmp_path / "other", base, mlflow__tracking_uri=uri, training__seed=7)
    other.collect(lesson("flavours", FLAVOURS))
    assert other.run().state is State.PROMOTED
    (ours,), (theirs,) = other.store.models(), bot.store.models()
    assert (theirs.version, ours.version) == (1, 2)
    other.registry.check_has(2, ours.adapter_hash)
    other.store.close()


def test_what_a_person_promoted_and_rolled_back_while_it_waited_is_not_promoted_again(bot: Bot) -> None:
    cycle = learn_flavours_while_mlflow_is_away(bot, "log_stream")
    promote.manual(bot.store, bot.registry, 2, "ana", "in a hurry")
    promote.rollback(bot.store, bot.registry, "ana", "rude answers")
    ended = run_again(bot, cycle)
    assert ended.state is State.REJECTED
    assert "promoted by hand and rolled back" in ended.reason
    assert champions(bot)[-1] == (1, "rollback")


def test_with_another_mlflow_the_cycle_waits_and_touches_no_alias(
    bot: Bot, tmp_path: Path, base: Path
) -> None:
    bot.collect(lesson("colours"))
    bot.run()
    shutil.copy(bot.settings.state_dir / "mlflow.db", tmp_path / "elsewhere.db")
    elsewhere = f"sqlite:///{tmp_path / 'empty.db'}"
    moved = make_bot_again(bot, base, mlflow__tracking_uri=elsewhere)
    moved.collect(lesson("flavours", FLAVOURS))
    cycle = moved.request()
    with pytest.raises(RegistryError, match=r"set mlflow\.tracking_uri back"):
        moved.run(cycle)
    assert moved.registry.alias("champion") is None
    back = make_bot_again(moved, base)
    assert run_again(back, cycle.id).state is State.PROMOTED
    assert back.registry.alias("champion") == 2
    back.store.close()


def test_a_version_deleted_by_hand_stops_no_later_cycle_unless_it_serves(bot: Bot) -> None:
    two_promoted(bot)
    promote.rollback(bot.store, bot.registry, "ana", "rude answers")
    MlflowClient(bot.settings.tracking_uri).delete_model_version(bot.settings.bot.name, "2")
    bot.collect(lesson("shapes", FLAVOURS))
    assert bot.run().state is State.PROMOTED
    MlflowClient(bot.settings.tracking_uri).delete_model_version(bot.settings.bot.name, "3")
    bot.collect(lesson("numbers", FLAVOURS))
    cycle = bot.request()
    with pytest.raises(RegistryError, match=r"version 3 of .*if it was deleted there, `daemon rollback`"):
        bot.run(cycle)
    promote.rollback(bot.store, bot.registry, "ana", "version 3 was deleted")
    assert run_again(bot, cycle.id).state.ended


def test_without_a_champion_any_version_shows_that_it_is_the_right_mlflow(bot: Bot) -> None:
    two_promoted(bot)
    for why in ("rude answers", "wrong answers"):
        promote.rollback(bot.store, bot.registry, "ana", why)
    assert promote.serving(bot.store) is None
    MlflowClient(bot.settings.tracking_uri).delete_model_version(bot.settings.bot.name, "2")
    bot.collect(lesson("shapes", FLAVOURS))
    assert bot.run().state is State.PROMOTED


def test_a_bot_with_versions_keeps_its_name(bot: Bot) -> None:
    named = bot.settings.model_copy(update={"bot": bot.settings.bot.model_copy(update={"name": "other"})})
    operations.keep_name(bot.settings, bot.store)
    operations.open_registry(named, bot.store)
    bot.collect(lesson("colours"))
    bot.run()
    with pytest.raises(ConfigError, match=r'bot.name = "other", but .* in MLflow as "test-bot"; set it back'):
        operations.open_registry(named, bot.store)


def test_after_a_restored_backup_no_row_counts_as_learned_that_no_model_saw(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    bot.run()
    bot.store.close()
    backup = bot.home / "backup.duckdb"
    shutil.copy(bot.settings.store_path, backup)
    bot.reopen()
    bot.collect(lesson("flavours", FLAVOURS))
    bot.run()
    bot.store.close()
    shutil.copy(backup, bot.settings.store_path)
    bot.reopen()
    bot.collect([(f"n{i}", "flavours", f"another flavour {i}", "sweet", "train") for i in range(30)])
    cycle = bot.run()
    assert cycle.state is State.PROMOTED
    folder = bot.settings.state_dir / "cycles" / str(cycle.id) / "train"
    told = TrainReport.from_json((folder / "report.json").read_text())
    assert told.rows == len(bot.store.cycle_rows(cycle.id, "train")) == 46


def test_jobs_say_what_they_start_from_and_not_only_where_that_lies(
    bot: Bot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a whole backup was put back, another adapter may come to lie in the same place: what was made
    from the one before is then not taken for what the same paths ask for."""
    bot.collect(lesson("colours"))
    bot.run()
    jobs: list[TrainJob | EvaluateJob] = []
    train, evaluate = bot.executor.train, bot.executor.evaluate
    monkeypatch.setattr(bot.executor, "train", lambda job, *rest: jobs.append(job) or train(job, *rest))
    monkeypatch.setattr(bot.executor, "evaluate", lambda job, *rest: jobs.append(job) or evaluate(job, *rest))
    bot.collect(lesson("flavours", FLAVOURS))
    bot.run()
    champion, candidate = (model.adapter_hash for model in bot.store.models())
    trained, examined = jobs
    assert isinstance(trained, TrainJob)
    assert trained.parent_adapter == champion
    assert isinstance(examined, EvaluateJob)
    assert (examined.keys["champion"], examined.keys["candidate"]) == (champion, candidate)
    assert examined.keys.keys() == examined.models.keys()


def test_mlflow_shows_what_a_cycle_was_run_with_whatever_the_configuration_says_since(
    bot: Bot, base: Path
) -> None:
    bot.collect(lesson("colours"))
    cycle = bot.request()
    with away(bot, "publish"), pytest.raises(RegistryUnavailable):
        bot.run(cycle)
    edited = make_bot_again(bot, base, training__learning_rate=0.5, evaluation__max_new_tokens=3)
    edited.collect([("late", "colours", "which one is colours 77", "mauve", "train")])
    assert run_again(edited, cycle.id).state is State.PROMOTED
    run = published(edited.registry, cycle.id)
    assert run.data.params["training.learning_rate"] == "0.01"
    assert run.data.params["evaluation.max_new_tokens"] == "12"
    edited.store.close()


def published(registry: Registry, cycle_id: int) -> Any:
    with registry._connection.use() as (client, experiment):
        (run,) = client.search_runs([experiment], f"tags.`holdfast.cycle` = '{cycle_id}'")
        return run


def test_a_clock_that_is_put_right_does_not_hide_who_moved_the_champion(bot: Bot) -> None:
    two_promoted(bot)
    bot.collect(lesson("shapes", FLAVOURS))
    bot.clock.now += timedelta(hours=3)
    cycle = bot.request()

    def put_right(stage: str) -> None:
        if stage == "evaluate":
            bot.clock.now -= timedelta(hours=6)
            promote.rollback(bot.store, bot.registry, "ann", "rude")

    bot.executor.after = put_right
    assert bot.run(cycle).state is State.REJECTED
    assert audited(bot) == []


def test_a_suite_that_grew_does_not_make_forgetting_be_forgotten(bot: Bot) -> None:
    two_promoted(bot)
    before = report.matrix(bot.store)
    bot.collect(
        [(f"c{i}", "colours", f"another {i}", "red", "suite" if i < 6 else "train") for i in range(20)]
    )
    bot.run()
    after = report.matrix(bot.store)
    assert {s.version for s in bot.store.scores(3) if s.task == "colours"} == {2}
    assert after.values[:3] == before.values, "the past is what it was, on the rows that it was measured on"


def test_a_task_whose_answers_stop_being_a_closed_set_is_answered_freely(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    bot.run()
    assert bot.store.tasks()[0].kind == TaskKind.LABELS
    sentences = [
        (f"s{i}", "colours", f"tell me about colours {i}", f"Open page {i} and choose the {i}th", "train")
        for i in range(30)
    ]
    bot.collect(sentences)
    bot.run()
    assert bot.store.tasks()[0].kind == TaskKind.FREE
    assert [e.detail["now"] for e in bot.store.events() if e.kind == "task-kind"] == ["free"]


@pytest.mark.parametrize(
    ("rows", "distinct", "longest", "was_labels", "kind"),
    [
        (6, 2, 4, False, TaskKind.LABELS),
        (5, 2, 4, False, TaskKind.FREE),  # not every answer three times
        (4, 2, 4, True, TaskKind.LABELS),  # twice is enough to stay one
        (3, 2, 4, True, TaskKind.FREE),
        (6, 2, 5, False, TaskKind.FREE),  # a sentence
        (9, 1, 1, False, TaskKind.FREE),  # one answer is no choice
        (900, 300, 1, False, TaskKind.LABELS),
        (903, 301, 1, False, TaskKind.FREE),
    ],
)
def test_answers_are_a_closed_set_when_they_are_few_short_and_keep_coming_back(
    rows: int, distinct: int, longest: int, was_labels: bool, kind: TaskKind
) -> None:
    assert experience.infer_kind(rows, distinct, longest, was_labels=was_labels) is kind


def test_labels_come_from_rows_that_can_be_learned(bot: Bot) -> None:
    bot.collect([*lesson("colours"), ("odd", "colours", "which one is odd", "ultraviolet", "suite")])
    bot.run()
    assert "ultraviolet" not in bot.store.tasks()[0].labels


def test_spellings_of_a_task_that_differ_in_case_are_one_task(bot: Bot) -> None:
    bot.collect(lesson("Colours"))
    bot.collect([(f"x{i}", "colours ", f"other {i}", "red", "train") for i in range(4)])
    bot.run()
    assert list(bot.store.row_counts()) == ["Colours"]
