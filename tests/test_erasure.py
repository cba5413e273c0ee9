"""What was erased is in no file of the state directory, and nobody who learned it answers."""

import shutil
import sys
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import pytest

from daemon import erasure, operations, promote, report, retention
from daemon.commands import Commands, Daemon
from daemon.control import Request
from daemon.executor import Stop
from daemon.flight import Flight
from storage import removals
from storage.errors import ControlError, Interrupted, RegistryError, RegistryUnavailable
from storage.intake import content_hash, take
from storage.records import Choice, State
from storage.removals import Removals
from storage.rows import Row, Split
from storage.sources import RawRow, SourceSpec
from storage.store import Store
from tests.bots import FLAVOURS, Bot, audited, fresh_mlflow, lesson, make_bot, make_bot_again, put_back
from tests.daemons import DaemonProcess, cli

SECRETS = {split: f"does zanzibar-{split}-q like it" for split in ("train", "validation", "suite")}
ANSWER = "quetzalcoatl"


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Bot, Path]:
    """Version 1 knows nothing; 2 learned a secret, and two more are in a suite and among validation rows; 3
    grew out of 2. A fourth row with the first secret's question was quarantined."""
    bot = make_bot(tmp_path_factory.mktemp("bot"), base, source__on_conflict="quarantine")
    bot.collect(lesson("colours"))
    assert bot.run().state is State.PROMOTED
    secret = [(f"s-{split}", "flavours", text, ANSWER, split) for split, text in SECRETS.items()]
    again = [("late", "flavours", SECRETS["train"], "sweet", "train")]
    bot.collect([*lesson("flavours", FLAVOURS), *secret, *again])
    assert bot.run().state is State.PROMOTED
    bot.collect(lesson("shapes", FLAVOURS))
    assert bot.run().state is State.PROMOTED
    bot.store.close()
    copy = tmp_path_factory.mktemp("copy") / "state"
    shutil.copytree(bot.settings.state_dir, copy)
    shutil.copy(bot.home / "qa.duckdb", copy.parent)
    return bot, copy


@pytest.fixture
def bot(grown: tuple[Bot, Path]) -> Iterator[Bot]:
    made, copy = grown
    made.reopen()
    yield made
    made.store.close()
    put_back(made, copy)
    shutil.copy(copy.parent / "qa.duckdb", made.home)


def meant(**which: Any) -> dict[str, Any]:
    return {"row": None, "task": None, "before": None, "contains": None, "where": [], **which}


def begin(bot: Bot, **which: Any) -> None:
    operations.erase(bot.settings, bot.store, "ann", "asked to", **meant(**which))


def erase(bot: Bot, **which: Any) -> None:
    begin(bot, **which)
    erasure.finish(bot.settings, bot.store, bot.registry)
    promote.repair_alias(bot.store, bot.registry)


def files_with(bot: Bot, text: str) -> list[str]:
    """Every file whose bytes have it. Parquet is compressed: its rows are read, too."""
    found = []
    for path in sorted(bot.settings.state_dir.rglob("*")):
        if not path.is_file():
            continue
        told = path.read_bytes()
        if path.suffix == ".parquet":
            told += str(duckdb.sql(f"FROM read_parquet('{path}')").fetchall()).encode()
        if text.encode() in told:
            found.append(str(path.relative_to(bot.settings.state_dir)))
    return found


def champion(bot: Bot) -> int | None:
    line = bot.store.champion()
    assert line is not None
    assert bot.registry.alias("champion") == line.version
    return line.version


def test_a_row_that_was_learned_is_nowhere_and_the_champion_is_the_last_that_never_saw_it(bot: Bot) -> None:
    places = files_with(bot, "zanzibar-train")
    assert any(place.startswith("snapshots/") for place in places), "else the test would prove nothing"
    assert "store.duckdb" in places
    assert audited(bot) == []
    erase(bot, row="s-train")
    assert files_with(bot, "zanzibar-train") == []
    assert champion(bot) == 1
    assert bot.store.tainted() == {2, 3}
    assert audited(bot) == []
    line = bot.store.promotions()[-1]
    assert (line.kind, line.who, line.why) == ("erasure", "ann", "erasure 1: asked to")
    assert bot.store.quarantined() == [], "it had the same question"
    tags = bot.registry._connection.client().get_model_version("test-bot", "3").tags
    assert tags["holdfast.erased"] == "erasure 1"


def test_the_answer_too_is_nowhere_when_no_row_has_it_any_more(bot: Bot) -> None:
    erase(bot, contains="ZANZIBAR")
    assert files_with(bot, "zanzibar") == []
    assert files_with(bot, ANSWER) == [], "neither as a label nor as something a model said"
    assert audited(bot) == []


def test_the_rebuild_learns_everything_else_and_the_next_pull_does_not_bring_it_back(bot: Bot) -> None:
    erase(bot, contains="zanzibar")
    rebuild = bot.store.unfinished()
    assert [cycle.trigger for cycle in rebuild] == ["erasure"]
    made = bot.run(rebuild[0])
    assert (made.state, made.parent) == (State.PROMOTED, 1)
    promote.repair_alias(bot.store, bot.registry)
    learned = {row.task for row in bot.store.rows_by_hash(bot.store.cycle_rows(made.id, "train"))}
    assert learned == {"flavours", "shapes"}
    assert files_with(bot, "zanzibar") == [], "the collector still has it"
    assert bot.store.quarantined() == []
    assert audited(bot) == []
    retention.prune(bot.settings, bot.store, bot.registry)
    assert audited(bot) == []


def test_what_was_refused_once_and_taken_in_since_stays_unless_it_is_meant_itself(bot: Bot) -> None:
    """The line of quarantine goes, as it has the question; the row is another one, and may be learned."""
    (refused,) = bot.store.quarantined()
    late = Row(id="late", task="flavours", question=SECRETS["train"], answer="sweet", split=Split.TRAIN)
    bot.store.accept([late], refused.source, on_conflict="newest")
    planned = operations.erase_plan(bot.settings, bot.store, **meant(row="s-train"))
    erase(bot, row="s-train")
    assert [row.id for row in bot.store.rows_by_hash([late.hash])] == ["late"]
    assert bot.store.superseded([late.hash]) == set()
    assert bot.store.quarantined() == []
    assert (sum(line["rows"] for line in planned["rows"]), planned["versions"]) == (1, [2, 3])
    assert bot.store.tainted() == {2, 3}
    assert audited(bot) == []


def test_a_refused_row_is_known_again_whatever_it_lacked() -> None:
    row = Row(id="1", task="general", question="how many", answer="0")
    for raw in (
        '"question": "how many", "answer": 0',
        '"task": null, "question": "How many", "answer": "0"',
    ):
        assert content_hash(f"{{{raw}}}", "general") == row.hash


@pytest.mark.parametrize("deleted", ["version", "run"])
def test_what_somebody_deleted_in_mlflow_is_erased_there_too(bot: Bot, deleted: str) -> None:
    """Deleting a version leaves its run, and deleting a run leaves its files."""
    client = bot.registry._connection.client()
    run = client.get_model_version("test-bot", "2").run_id
    client.delete_model_version("test-bot", "2")
    if deleted == "run":
        client.delete_run(run)
    artifacts = bot.settings.state_dir / "artifacts"
    assert any(run in str(path) for path in artifacts.rglob("model")), "else the test would prove nothing"
    erase(bot, row="s-train")
    assert files_with(bot, "zanzibar-train") == []
    assert not any(run in str(path) for path in artifacts.rglob("model")), "an adapter that learned it"


def test_a_suite_gets_a_version_without_the_row_and_nobody_falls(bot: Bot) -> None:
    """No model learns a suite row, so the champion stays; what it was asked is forgotten."""
    suites = {(suite.task, suite.version): suite.size for suite in bot.store.suites()}
    erase(bot, row="s-suite")
    assert files_with(bot, "zanzibar-suite") == []
    assert champion(bot) == 3
    assert bot.store.tainted() == set()
    assert bot.store.unfinished() == [], "there is nothing to learn again"
    assert audited(bot) == []
    assert operations.serving(bot.settings, bot.store)["snapshot"] is None, "it held the row"
    bot.collect(lesson("sizes", FLAVOURS))
    assert bot.run().state is State.PROMOTED
    latest = bot.store.latest_suites()["flavours"]
    assert (latest.version, latest.size) == (2, suites["flavours", 1] - 1)
    promote.repair_alias(bot.store, bot.registry)
    assert audited(bot) == []
    assert files_with(bot, "zanzibar-suite") == []


def test_a_task_that_was_erased_whole_is_no_longer_examined(bot: Bot) -> None:
    erase(bot, task="flavours")
    rebuild = bot.store.unfinished()[0]
    made = bot.run(rebuild)
    assert made.state is State.NOTHING or "flavours" not in {s.task for s in bot.store.scores(made.id)}
    assert "flavours" not in bot.store.latest_suites()
    assert audited(bot) == []


def test_who_learned_it_never_serves_again(bot: Bot) -> None:
    erase(bot, row="s-train")
    with pytest.raises(ControlError, match="version 3 learned a row that was erased"):
        promote.manual(bot.store, bot.registry, 3, "ann", "it was better")
    promote.rollback(bot.store, bot.registry, "ann", "to the base")
    last = bot.store.champion()
    assert last is not None
    assert last.version is None, "the erased ones are no champions to return to"


def test_a_cycle_that_was_under_way_is_cancelled_and_leaves_nothing(bot: Bot) -> None:
    bot.collect([("new", "sizes", "does zanzibar-new fit", ANSWER, "train"), *lesson("sizes", FLAVOURS)])
    stop = Stop()
    bot.executor.after = lambda stage: stop.request("shutdown") if stage == "train" else None
    cycle = bot.request()
    with pytest.raises(Interrupted):
        bot.run(cycle, stop)
    bot.executor.after = lambda stage: None
    assert files_with(bot, "zanzibar-new")
    erase(bot, row="new")
    after = bot.store.cycle(cycle.id)
    assert after is not None
    assert after.state is State.CANCELLED
    assert files_with(bot, "zanzibar-new") == []
    assert champion(bot) == 3, "it had not learned it"
    assert audited(bot) == []


def test_a_cycle_that_a_person_had_cancelled_was_cancelled_by_that_person(bot: Bot) -> None:
    bot.collect(lesson("sizes", FLAVOURS))
    cycle = bot.request()
    bot.store.advance(cycle.id, State.PULLED)
    bot.store.event("cancel", cycle.id, by="ann")
    begin(bot, row="s-train")
    erasure.finish(bot.settings, bot.store, bot.registry)
    after = bot.store.cycle(cycle.id)
    assert after is not None
    assert (after.state, after.reason) == (State.CANCELLED, "by ann; its rows stay pending")


def test_a_cycle_that_runs_stops_for_an_erasure_and_says_for_which(bot: Bot) -> None:
    bot.collect(lesson("sizes", FLAVOURS))
    training, erasing, trained = threading.Event(), threading.Event(), []

    def stand(stage: str) -> None:
        if stage == "train":
            training.set()
            assert erasing.wait(60)

    def tidy() -> bool:
        erasure.finish(bot.settings, bot.store, bot.registry)
        return True

    bot.executor.before, bot.executor.after = stand, trained.append
    flight = Flight(bot.store, bot.runner, housekeeping=tidy)
    daemon = Daemon(settings=bot.settings, store=bot.store, registry=bot.registry, flight=flight, facts=dict)
    asked = Request(command="erase", args={}, who="ann", emit=lambda told: erasing.set())
    cycle = bot.request()
    flight.start()
    try:
        assert training.wait(60)
        operations.pause(bot.store, "ann")  # so that the rebuild waits
        told = Commands(daemon).do_erase(asked, "asked to", [], row="s-train", dry_run=False)
    finally:
        erasing.set()
        flight.close()
        flight._thread.join(60)
        bot.executor.before = bot.executor.after = lambda stage: None
    assert told["done"]
    after = bot.store.cycle(cycle.id)
    assert after is not None
    assert after.reason == "by erasure 1; its rows stay pending"
    assert trained == [], "it did not first train to the end"


@pytest.mark.parametrize(
    ("place", "row"),
    [
        ("daemon.examination.check_suites", "s-suite"),
        ("daemon.experience.settle_tasks", "s-suite"),
        ("daemon.examination._store_predictions", "sizes-21"),
    ],
)
def test_an_erasure_in_the_middle_of_a_step_cancels_the_cycle_and_leaves_no_answer(
    bot: Bot, monkeypatch: pytest.MonkeyPatch, place: str, row: str
) -> None:
    """The step finds rows gone that it counted on, or has answers to rows that are gone."""
    bot.collect(lesson("sizes", FLAVOURS))
    module, name = place.rsplit(".", 1)
    real = getattr(sys.modules[module], name)

    def erased_meanwhile(*args: Any) -> Any:
        monkeypatch.undo()
        begin(bot, row=row)
        return real(*args)

    monkeypatch.setattr(place, erased_meanwhile)
    cycle = bot.run()
    assert (cycle.state, cycle.reason) == (State.CANCELLED, "by erasure 1; its rows stay pending")
    erasure.finish(bot.settings, bot.store, bot.registry)
    promote.repair_alias(bot.store, bot.registry)
    assert audited(bot) == []


def test_what_asks_with_the_same_words_is_erased_from_quarantine(bot: Bot) -> None:
    """It has them, and the id of the row that it was too near to; and would be taken in once that is gone."""
    near = [("near", "flavours", "like it: does zanzibar-suite-q?", ANSWER, "train")]
    bot.collect(near)
    assert bot.run().state is State.NOTHING
    assert {each.reason for each in bot.store.quarantined()} >= {"near-duplicate"}
    erase(bot, row="s-suite")
    assert files_with(bot, "s-suite") == []
    assert files_with(bot, "zanzibar-suite") == []
    bot.run()
    assert files_with(bot, "zanzibar-suite") == [], "the collector still has both"
    assert audited(bot) == []


def test_the_alias_challenger_leaves_a_version_that_learned_what_was_erased(bot: Bot, base: Path) -> None:
    bot = make_bot_again(bot, base, **{"gate.min_gain": 1.0})
    bot.collect([("new", "sizes", "does zanzibar-new fit", ANSWER, "train"), *lesson("sizes", FLAVOURS)])
    cycle = bot.run()
    assert cycle.state is State.REJECTED
    assert bot.registry.alias(promote.CHALLENGER) == cycle.version
    assert audited(bot) == []
    begin(bot, row="new")
    assert bot.registry.alias(promote.CHALLENGER) == cycle.version
    erasure.finish(bot.settings, bot.store, bot.registry)
    assert bot.registry.alias(promote.CHALLENGER) is None
    assert audited(bot) == []


class Killed(BaseException):
    """As kill -9: nobody catches it."""


def test_a_kill_in_the_middle_is_taken_up_again(bot: Bot, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each removal of a folder, and before and after the store is written anew."""
    begin(bot, row="s-train")
    assert any(f.check == "each_erasure_is_finished" for f in audited(bot))
    real, rewrite, kills = shutil.rmtree, Removals.rewrite, 0

    def dies(path: Any, *args: Any, **options: Any) -> None:
        nonlocal kills
        real(path, *args, **options)
        if "state" in Path(path).parts and kills < 12:
            kills += 1
            raise Killed

    def dies_too(self: Removals) -> None:
        nonlocal kills
        if kills % 2:
            rewrite(self)
        if kills < 15:
            kills += 1
            raise Killed
        rewrite(self)

    monkeypatch.setattr(shutil, "rmtree", dies)
    monkeypatch.setattr(Removals, "rewrite", dies_too)
    for _ in range(40):
        try:
            erasure.finish(bot.settings, bot.store, bot.registry)
        except Killed:
            bot.reopen()
        else:
            break
    monkeypatch.undo()
    assert kills > 8
    assert not erasure.is_due(bot.store)
    promote.repair_alias(bot.store, bot.registry)
    assert files_with(bot, "zanzibar-train") == []
    assert audited(bot) == []
    assert len(bot.store.unfinished()) == 1, "one rebuild, however often it was begun"


def test_mlflow_may_be_away_for_a_while(bot: Bot, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*args: Any) -> None:
        raise RegistryUnavailable("MLflow is down")

    with monkeypatch.context() as patch:
        patch.setattr(bot.registry, "erase", down)
        with pytest.raises(RegistryUnavailable):
            erase(bot, row="s-train")
    line = bot.store.champion()
    assert line is not None
    assert line.version == 1, "that does not wait"
    erasure.finish(bot.settings, bot.store, bot.registry)
    assert files_with(bot, "zanzibar-train") == []


def test_no_alias_ever_points_to_files_that_are_gone(bot: Bot, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = bot.registry.erase

    def erases(*args: Any) -> None:
        seen.append(bot.registry.alias(promote.CHAMPION))
        real(*args)

    monkeypatch.setattr(bot.registry, "erase", erases)
    before = bot.registry.alias(promote.CHAMPION)
    begin(bot, row="s-train")
    erasure.finish(bot.settings, bot.store, bot.registry)
    assert (before, seen) == (3, [1])
    assert bot.registry.alias(promote.CHAMPION) == champion(bot) == 1


def away(*args: Any, **kwargs: Any) -> Any:
    raise RegistryUnavailable("MLflow is away")


def test_a_version_that_waits_to_be_finished_keeps_its_files(
    bot: Bot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow was cut off between a version and the end of its run while an erasure was due."""
    values = {"id": "extra", "task": "colours", "question": "which one is colours 999", "answer": "pink"}
    take(
        [[RawRow(values=values, location="1")]],
        bot.store,
        SourceSpec(),
        shares=(0.0, 0.0),
        source_name="file",
    )
    begin(bot, row="extra")
    bot.collect(lesson("sizes", FLAVOURS))
    cycle = bot.request()
    with monkeypatch.context() as patch:
        patch.setattr(bot.registry, "_finish", away)
        with pytest.raises(RegistryUnavailable):
            bot.run(cycle)
    erasure.finish(bot.settings, bot.store, bot.registry)
    (left,) = bot.store.unfinished()
    assert bot.run(left).state is State.PROMOTED
    assert audited(bot) == []


def test_what_was_never_taught_is_no_label(tmp_path: Path, base: Path) -> None:
    """A validation row brings an answer of its own, and no training row of its task is new: no cycle would be
    on record as having used it."""
    bot = make_bot(tmp_path, base)
    bot.collect(lesson("colours"))
    assert bot.run().state is State.PROMOTED
    bot.collect(
        [("one", "colours", "which one is colours 999", ANSWER, "validation"), *lesson("flavours", FLAVOURS)]
    )
    assert bot.run().state is State.PROMOTED
    erase(bot, contains=ANSWER)
    assert files_with(bot, ANSWER) == []
    assert audited(bot) == []
    bot.store.close()


def test_another_mlflow_does_not_pass_for_an_erased_one(bot: Bot, tmp_path: Path) -> None:
    begin(bot, row="s-train")
    shutil.copy(fresh_mlflow(), tmp_path / "other.db")
    uri = f"sqlite:///{tmp_path / 'other.db'}"
    other = bot.settings.model_copy(
        update={"mlflow": bot.settings.mlflow.model_copy(update={"tracking_uri": uri})}
    )
    with pytest.raises(RegistryError, match="as this bot trained it"):
        erasure.finish(other, bot.store, operations.open_registry(other, bot.store))
    assert erasure.is_due(bot.store)
    erasure.finish(bot.settings, bot.store, bot.registry)
    assert files_with(bot, SECRETS["train"]) == []


def test_a_refused_row_is_of_the_task_that_the_intake_would_put_it_into(bot: Bot) -> None:
    said = {"question": "who is jane", "answer": " ", "context": "jane@x"}
    rows = [
        RawRow(values={"id": "1", "task": "Flavours", **said}, location="1"),
        RawRow(values={"id": "2", **said}, location="2"),
    ]
    take([rows], bot.store, SourceSpec(), shares=(0.1, 0.1), source_name="file")
    for task in ("flavours", "General"):
        found = erasure.plan(bot.settings, bot.store, erasure.choice(**meant(task=task, contains="jane@x")))
        assert len(found.quarantined) == 1


def refused_row(bot: Bot, **said: str) -> None:
    """One that lacks an answer, and that comes to quarantine from a file."""
    row = RawRow(values={"id": "jane-1", "task": "flavours", "answer": " ", **said}, location="1")
    take([[row]], bot.store, SourceSpec(), shares=(0.1, 0.1), source_name="file")


@pytest.mark.parametrize(
    ("which", "fits"),
    [
        ({"row": "jane-1"}, True),
        ({"row": "jane-2"}, False),
        ({"where": ["source=file"]}, True),
        ({"where": ["source=files"]}, False),
        ({"where": ["context=jane@x"]}, True),
        ({"where": ["context=jane@y"]}, False),
        ({"before": "2027-01-01"}, True),
        ({"before": "2026-03-01"}, False),
    ],
)
def test_a_refused_row_must_fit_every_condition(bot: Bot, which: dict[str, Any], fits: bool) -> None:
    refused_row(bot, question="who is jane", context="jane@x")
    wanted = erasure.choice(**meant(contains="jane@x", **which))
    if fits:
        assert [row.id for row in erasure.plan(bot.settings, bot.store, wanted).quarantined] == ["jane-1"]
    else:
        with pytest.raises(ControlError, match="no row fits"):
            erasure.plan(bot.settings, bot.store, wanted)


def test_a_refused_row_with_the_question_of_an_erased_one_goes_whatever_its_context(bot: Bot) -> None:
    refused_row(bot, question=SECRETS["train"], context="asked by jane")
    found = erasure.plan(bot.settings, bot.store, erasure.choice(**meant(row="s-train")))
    assert {row.id for row in found.quarantined} == {"late", "jane-1"}


def test_a_version_without_files_does_not_take_over(bot: Bot) -> None:
    keep = bot.settings.retention.model_copy(update={"champions": 1})
    settings = bot.settings.model_copy(update={"retention": keep})
    assert any(one.path == "mlflow/1/model" for one in retention.prune(settings, bot.store, bot.registry))
    found = erasure.plan(settings, bot.store, erasure.choice(**meant(row="s-train")))
    assert (found.moves, found.champion) == (True, None)


def test_a_cycle_that_waits_to_begin_is_the_rebuild(bot: Bot) -> None:
    """It has read nothing yet, and will read what is left."""
    waiting = bot.request()
    erase(bot, row="s-train")
    assert bot.store.unfinished() == [waiting]
    assert not bot.store.is_cancelled(waiting.id)


def test_a_snapshot_of_which_nobody_can_tell_what_it_holds_goes(bot: Bot) -> None:
    folder = bot.settings.state_dir / "snapshots"
    half, damaged = folder / ".0123456789abcdef.tmp", folder / "fedcba9876543210"
    for each in (half, damaged):
        each.mkdir()
    (damaged / "train.parquet").write_bytes(b"PAR1")
    erase(bot, row="s-train")
    assert not half.exists()
    assert not damaged.exists()


def test_what_mlflow_has_yet_to_remove_for_another_reason_is_not_done(bot: Bot) -> None:
    bot.store.prune([("mlflow/1/answers", "cycle 1, promoted")])
    erase(bot, row="s-train")
    pruned = bot.store.pruned()
    assert not pruned["mlflow/1/answers"].done
    assert pruned["mlflow/2/answers"].done


def test_a_task_is_meant_however_its_name_is_spelt(bot: Bot) -> None:
    exact, other = (
        erasure.plan(bot.settings, bot.store, erasure.choice(**meant(task=name)))
        for name in ("flavours", " FLAVOURS")
    )
    assert exact.rows
    assert other == exact


def test_a_condition_that_is_given_twice_is_one() -> None:
    once, twice = (erasure.choice(**meant(task="flavours", where=where)) for where in ([], ["task=flavours"]))
    assert once == twice


def stored_row(bot: Bot, row_id: str, *, question: str, task: str = "other", context: str = "") -> None:
    row = Row(id=row_id, task=task, question=question, answer="yes", context=context)
    bot.store.accept([row], "file", shares=(0.0, 0.0))


def test_a_task_of_which_no_suite_is_frozen_yet_is_meant_however_its_name_is_spelt(bot: Bot) -> None:
    stored_row(bot, "b-1", task="Billing", question="who pays")
    found = erasure.plan(bot.settings, bot.store, erasure.choice(**meant(task="billing")))
    assert [row.id for row in found.rows] == ["b-1"]


@pytest.mark.parametrize(
    ("said", "which"),
    [
        ("Jose\u0301 asks", {"contains": "JOS\u00c9"}),
        ("Jos\u00e9 asks", {"contains": "jose\u0301"}),
        ("in the Hauptstra\u00dfe 3", {"contains": "HAUPTSTRASSE"}),
        ('the one called "Jane\n Doe"', {"contains": '"jane doe"'}),
        ("Jose\u0301\u00a0 asks", {"where": ["context=JOS\u00c9 asks"]}),
        ("Jose\u0301 asks", {"contains": "jos\u00e9", "where": ["question=WHO"]}),
    ],
)
def test_a_row_is_meant_however_its_text_is_spelt_be_it_stored_or_refused(
    bot: Bot, said: str, which: dict[str, Any]
) -> None:
    wanted = erasure.choice(**meant(**which))
    refused_row(bot, question="who", context=said)
    found = erasure.plan(bot.settings, bot.store, wanted)
    assert [row.id for row in (*found.rows, *found.quarantined)] == ["jane-1"]
    stored_row(bot, "taken", question="who", context=said)
    found = erasure.plan(bot.settings, bot.store, wanted)
    assert [row.id for row in (*found.rows, *found.quarantined)] == ["taken", "jane-1"]
    erase(bot, **which)
    assert files_with(bot, said) == []
    assert audited(bot) == []


def test_a_space_at_the_end_of_a_text_is_part_of_it(bot: Bot) -> None:
    for word in ("art", "party"):
        refused_row(bot, question=f"{word} is fun")
        stored_row(bot, word, question=f"{word} is fun")
    found = erasure.plan(bot.settings, bot.store, erasure.choice(**meant(contains=" art ")))
    assert [row.id for row in found.rows] == ["art"]
    assert len(found.quarantined) == 1


def test_the_end_of_a_row_parts_words_as_a_space_does(bot: Bot) -> None:
    for n, question in enumerate(("who is John Smith", "who is John Smith today", "who is John Smithson")):
        stored_row(bot, str(n), question=question)
    found = erasure.plan(bot.settings, bot.store, erasure.choice(**meant(contains="John Smith ")))
    assert [row.id for row in found.rows] == ["0", "1"]


@pytest.mark.parametrize("part", ["stars", "empty", "line 7"])
def test_a_refused_row_is_not_meant_by_what_was_said_of_it(bot: Bot, part: str) -> None:
    """Its task, why it was refused, where it came from: none of it is searched in stored rows."""
    row = RawRow(
        values={"id": "jane-1", "task": "stars", "question": "who", "answer": " "}, location="line 7"
    )
    take([[row]], bot.store, SourceSpec(), shares=(0.1, 0.1), source_name="file")
    with pytest.raises(ControlError, match="no row fits"):
        erasure.plan(bot.settings, bot.store, erasure.choice(**meant(contains=part)))


def test_a_line_that_could_not_be_taken_apart_is_searched_too(bot: Bot) -> None:
    row = RawRow(values={"text": '{"question": "who is jane@x'}, location="1", problem="not valid JSON")
    take([[row]], bot.store, SourceSpec(), shares=(0.1, 0.1), source_name="file")
    found = erasure.plan(bot.settings, bot.store, erasure.choice(**meant(contains="jane@x")))
    assert len(found.quarantined) == 1


def test_one_task_may_be_named_twice(bot: Bot) -> None:
    stored_row(bot, "b-1", task="Billing", question="who pays")
    found = erasure.plan(
        bot.settings, bot.store, erasure.choice(**meant(task="billing", where=["task=Billing"]))
    )
    assert [row.id for row in found.rows] == ["b-1"]


def test_rows_are_read_by_the_page_and_each_comes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removals, "_PAGE", 2)
    with Store.open(tmp_path / "store.duckdb") as store:
        for count in range(5):
            assert [row.id for row in store.chosen_rows(Choice())] == [str(n) for n in range(count)]
            row = Row(id=str(count), task="shop", question=f"{count} or more", answer="yes")
            store.accept([row], "test", shares=(0.0, 0.0))
        assert [row.id for row in store.chosen_rows(Choice(contains="3 or"))] == ["3"]
    with duckdb.connect(str(tmp_path / "store.duckdb")) as connection:
        connection.execute("UPDATE rows SET seq = -7")
    with Store.open(tmp_path / "store.duckdb") as store:
        assert sorted(row.id for row in store.chosen_rows(Choice())) == [*"01234"], "whoever numbered them"


def test_a_rollback_passes_over_who_learned_what_was_erased(bot: Bot) -> None:
    bot.collect(lesson("sizes", FLAVOURS))
    assert bot.run().version == 4
    promote.manual(bot.store, bot.registry, 3, "ann", "4 is rude")
    found = erasure.plan(bot.settings, bot.store, erasure.choice(**meant(row="s-train")))
    assert found.versions == [2, 3, 4], "4 grew out of 3, and 3 out of 2"
    erase(bot, where=["task=sizes"])
    assert promote.champions(bot.store.promotions()) == [1, 2, 3, 4, 3]
    assert promote.rollback(bot.store, bot.registry, "ann", "3 is rude, too").version == 2
    assert promote.champions(bot.store.promotions()) == [1, 2]
    assert audited(bot) == []


def test_where_every_champion_before_learned_it_a_rollback_says_so(bot: Bot) -> None:
    """Not to the base: nobody who asked for a rollback meant to lose all that was ever learned."""
    for version in (3, 2, 1):
        promote.rollback(bot.store, bot.registry, "ann", f"not {version}")
    for version in (2, 1):
        promote.manual(bot.store, bot.registry, version, "ann", "on second thoughts")
    erase(bot, row="s-train")
    with pytest.raises(ControlError, match="every champion before this one learned a row that was erased"):
        promote.rollback(bot.store, bot.registry, "ann", "1 is rude, too")
    assert champion(bot) == 1


def test_a_suite_that_lost_its_first_rows_is_still_in_the_matrix(tmp_path: Path, base: Path) -> None:
    bot = make_bot(tmp_path, base, evaluation__suite_growth=0.1)
    bot.collect(lesson("colours"))
    assert bot.run().state is State.PROMOTED
    more = [
        (f"new-{n}", "colours", f"which one is colours {100 + n}", "red", "suite" if n < 8 else "train")
        for n in range(16)
    ]
    bot.collect(more)
    bot.run()
    first = [row.id for row in bot.store.suite_rows("colours", 1)]
    for row in first:
        begin(bot, row=row)
    erasure.finish(bot.settings, bot.store, bot.registry)
    assert report.matrix(bot.store).tasks == ("colours",)
    bot.store.close()


def test_an_audit_finds_what_came_back(bot: Bot) -> None:
    erase(bot, row="s-train")
    bot.store.close()
    row = Row(id="x", task="flavours", question=SECRETS["train"], answer=ANSWER)
    with duckdb.connect(str(bot.settings.store_path)) as connection:
        connection.execute(
            "INSERT INTO rows SELECT ?, ?, ?, max(seq) + 1, 'x', ?, ?, ?, '', NULL, 'train', 'x', "
            "max(accepted_at), ? FROM rows",
            [row.hash, row.key, row.question_key, row.task, row.question, row.answer, row.words_key],
        )
        connection.execute("UPDATE promotions SET version = 3 WHERE kind = 'erasure'")
    bot.reopen()
    found = {finding.check for finding in audited(bot)}
    assert {"no_erased_row_is_left_anywhere", "nothing_that_learned_an_erased_row_serves"} <= found


@pytest.mark.parametrize(
    ("which", "told"),
    [
        ({}, "which rows"),
        ({"row": "nobody"}, "no row fits"),
        ({"where": ["hash=1"]}, "columns: task, source, question, answer, context"),
        ({"where": ["task"]}, "is not COLUMN=VALUE"),
        ({"before": "yesterday"}, "is no date"),
        ({"before": "2026-03-01T12:00+01:00"}, "has a time zone; give it in UTC"),
        ({"contains": "' OR 1=1 --"}, "no row fits"),
        ({"contains": ""}, "'' is in every row"),
        ({"contains": " \u200b", "task": "flavours"}, "is in every row"),
        ({"task": "flavours", "where": ["task=shapes"]}, "task cannot be both 'flavours' and 'shapes'"),
        ({"where": ["question=x", "question=y"]}, "question cannot be both 'x' and 'y'"),
        ({"where": ["answer=x' OR 'a'='a"]}, "no row fits"),
    ],
)
def test_what_names_no_row_erases_nothing(bot: Bot, which: dict[str, Any], told: str) -> None:
    before = bot.store.row_counts()
    with pytest.raises(ControlError, match=told):
        begin(bot, **which)
    assert bot.store.row_counts() == before


def test_an_answer_whose_successor_is_erased_counts_again(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store.duckdb") as store:
        told = [Row(id=a, task="shop", question="when is it open", answer=a) for a in ("9", "10", "11")]
        for row in told:
            store.accept([row], "test", shares=(0.0, 0.0))
        first, second, third = (row.hash for row in told)
        store.erase([second], [], rebuild=False, who="ann", why="x")
        assert store.superseded([first, third]) == {first}, "the third counts, as before"
        store.erase([third], [], rebuild=False, who="ann", why="x")
        assert store.superseded([first]) == set()
        assert store.survey().stray_supersessions() == []
        assert store.survey().unanswered() == []


def test_of_several_answers_whose_successor_is_erased_the_last_one_counts(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store.duckdb") as store:
        days = [("9", 1), ("10", 2), ("11", 3), ("10", 4)]
        told = [
            Row(id=a, task="shop", question="when is it open", answer=a, created_at=datetime(2026, 1, day))
            for a, day in days
        ]
        for row in told:
            store.accept([row], "test", shares=(0.0, 0.0))
        first, second, third = (row.hash for row in told[:3])
        assert store.superseded([first, second, third]) == {first, third}
        store.erase([second], [], rebuild=False, who="ann", why="x")
        assert store.superseded([first, third]) == {first}
        assert store.survey().stray_supersessions() == []
        store.erase([third], [], rebuild=False, who="ann", why="x")
        assert store.superseded([first]) == set()


def test_the_command_says_what_it_will_do_and_asks(bot: Bot, base: Path) -> None:
    config = bot.home / "config.toml"
    bot.store.close()
    refused = cli(config, "erase", "--row", "s-train", "--why", "asked to", stdin="n\n")
    assert refused.returncode == 1
    assert "1 train rows of flavours will be erased" in refused.stdout
    assert "versions that learned one and go: 2, 3" in refused.stdout
    assert "the champion will be version 1" in refused.stdout
    bot.reopen()
    assert bot.store.erasures() == []
    bot.store.close()
    with DaemonProcess(config) as daemon:
        daemon.call("pause")  # so that the rebuild waits
        ran = cli(config, "erase", "--row", "s-train", "--why", "asked to", "--yes")
        assert "erasure 1 is done" in ran.stdout, ran.stderr
        assert daemon.status()["champion"]["version"] == 1
        assert daemon.stop() == 0
    ran = cli(config, "erase", "--row", "s-suite", "--why", "asked to", "--yes")
    assert "erasure 2 is done" in ran.stdout, ran.stderr
    bot.reopen()
    assert files_with(bot, "zanzibar-train") + files_with(bot, "zanzibar-suite") == []
    assert audited(bot) == []


def test_a_start_finishes_what_was_begun(bot: Bot) -> None:
    operations.pause(bot.store, "ann")
    begin(bot, row="s-train")
    bot.store.close()
    with DaemonProcess(bot.home / "config.toml") as daemon:
        daemon.until(lambda told: bool(told["unfinished"]))
        assert daemon.stop() == 0
    bot.reopen()
    assert not erasure.is_due(bot.store)
    assert files_with(bot, "zanzibar-train") == []
