"""What retention lets go is gone and on record; what lineage, rollback, resume and audit need is there."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon import audit, erasure, operations, promote, report, retention
from daemon.executor import Stop
from storage.errors import ControlError, Interrupted, RegistryUnavailable
from storage.records import State
from tests.bots import FLAVOURS, Bot, audited, lesson, make_bot, make_bot_again, put_back
from tests.daemons import cli, read_json

TASKS = ("colours", "flavours", "shapes", "sizes")
TIGHT: dict[str, object] = {
    "retention__champions": 1,
    "retention__rejected": 1,
    "retention__predictions": 1,
    "retention__snapshots": 0,
}


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Bot, Path]:
    """Four promoted versions, then three rejected ones; and a copy of their state."""
    bot = make_bot(tmp_path_factory.mktemp("bot"), base, **TIGHT)
    for task in TASKS:
        bot.collect(lesson(task, FLAVOURS))
        assert bot.run().state is State.PROMOTED
    strict = make_bot_again(bot, base, gate__min_gain=1.0, **TIGHT)
    for number in range(3):
        strict.collect(lesson(f"more {number}"))
        assert strict.run().state is State.REJECTED
    strict.store.close()
    copy = tmp_path_factory.mktemp("copy") / "state"
    shutil.copytree(strict.settings.state_dir, copy)
    return strict, copy


@pytest.fixture
def bot(grown: tuple[Bot, Path]) -> Iterator[Bot]:
    made, copy = grown
    made.reopen()
    yield made
    made.store.close()
    put_back(made, copy)


def prune(bot: Bot) -> set[str]:
    return {one.path for one in retention.prune(bot.settings, bot.store, bot.registry)}


def there(bot: Bot, version: int) -> bool:
    """Whether a version can be answered with, here and from MLflow's copy."""
    model = bot.store.model(version)
    assert model is not None
    listed = {one.version: one for one in bot.registry.look().versions}[version]
    assert listed.weights is not None
    here = (bot.settings.state_dir / model.result / "adapter").is_dir()
    assert here == listed.weights.is_file(), "both copies, or none"
    return here


def test_only_what_may_go_is_gone_and_an_audit_does_not_miss_it(bot: Bot) -> None:
    before = report.matrix(bot.store)
    assert audited(bot) == []
    assert prune(bot)
    assert audited(bot) == []
    kept = {version for version in range(1, 8) if there(bot, version)}
    assert kept == {3, 4, 7}, "a past champion, the champion, the newest rejected one"
    assert report.matrix(bot.store) == before, "the matrix needs the answers of every ancestor"
    snapshots = {path.name for path in (bot.settings.state_dir / "snapshots").iterdir()}
    assert snapshots == {cycle.snapshot for cycle in bot.store.cycles() if cycle.id in kept}
    assert prune(bot) == set(), "there is nothing to do twice"


def left(bot: Bot, **limits: int) -> tuple[set[int], set[int]]:
    """Versions whose model, and those whose answers, the next pass would leave where they are."""
    keep = bot.settings.retention.model_copy(update=limits)
    settings = bot.settings.model_copy(update={"retention": keep})
    told = {one.path for one in retention.plan(settings, bot.store)}
    models, answers = (
        {version for version in range(1, 8) if f"mlflow/{version}/{what}" not in told}
        for what in ("model", "answers")
    )
    return models, answers


def test_what_a_rollback_returns_to_is_kept_beside_who_served_last(bot: Bot) -> None:
    promote.rollback(bot.store, bot.registry, "ann", "4 is rude")
    assert left(bot)[0] == {2, 3, 4, 7}


def test_a_rejected_version_that_served_is_a_champion_and_no_rejected_one(bot: Bot) -> None:
    promote.manual(bot.store, bot.registry, 7, "ann", "it is better than it looks")
    assert left(bot)[0] == {4, 6, 7}


def test_answers_of_rejected_versions_may_be_kept_longer_than_their_models(bot: Bot) -> None:
    assert left(bot, rejected=1, predictions=2) == ({3, 4, 7}, {1, 2, 3, 4, 6, 7})


def test_a_bot_goes_on_learning_and_rolls_back_after_pruning(bot: Bot, base: Path) -> None:
    prune(bot)
    relaxed = make_bot_again(bot, base, **TIGHT)
    relaxed.clock.now = bot.clock.now
    assert relaxed.run().state is State.PROMOTED, "the rows of the rejected cycles are pending"
    promote.rollback(relaxed.store, relaxed.registry, "ann", "worse")
    prune(relaxed)
    assert audited(relaxed) == []
    relaxed.store.close()
    bot.reopen()


def test_who_asks_for_a_version_without_files_is_told_so(bot: Bot) -> None:
    prune(bot)
    for ask in (
        lambda: promote.manual(bot.store, bot.registry, 1, "ann", "try"),
        lambda: operations.serving(bot.settings, bot.store, 1),
    ):
        with pytest.raises(ControlError, match=r"version 1 has no files .* that have: 3, 4, 7"):
            ask()
    promote.rollback(bot.store, bot.registry, "ann", "worse")
    with pytest.raises(ControlError, match="version 2 has no files any more"):
        promote.rollback(bot.store, bot.registry, "ann", "worse still")


def test_a_rejected_cycle_says_that_its_numbers_cannot_be_computed_again(bot: Bot) -> None:
    scores = bot.store.scores(5)
    prune(bot)
    assert bot.store.scores(5) == scores, "the numbers stay"
    assert any("cannot be computed again" in line for line in operations.show(bot.store, 5)["words"])
    for cycle in (4, 7):
        assert not any("pruned" in line for line in operations.show(bot.store, cycle)["words"])
    run = bot.settings.state_dir / "artifacts"
    assert len(list(run.rglob("predictions.json"))) == 5, "of two rejected versions they are gone"


class Killed(BaseException):
    """As kill -9: nobody catches it."""


def test_a_kill_in_the_middle_leaves_nothing_half(bot: Bot, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every removal of the first pass, one after the other; and then a pass that is not disturbed."""
    removed, real = 0, shutil.rmtree

    def dies(path: Any, *args: Any, **options: Any) -> None:
        nonlocal removed
        removed += 1
        real(path, *args, **options)
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", dies)
    while True:
        try:
            prune(bot)
        except Killed:
            bot.reopen()
        else:
            break
        assert removed < 200
    assert removed > 12
    monkeypatch.undo()
    assert audited(bot) == []
    assert [version for version in range(1, 8) if there(bot, version)] == [3, 4, 7]
    assert all(one.done for one in bot.store.pruned().values())


def test_mlflow_is_told_when_it_is_back(bot: Bot, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*args: Any) -> None:
        raise RegistryUnavailable("MLflow is down")

    with monkeypatch.context() as patch:
        patch.setattr(bot.registry, "prune", down)
        with pytest.raises(RegistryUnavailable):
            prune(bot)
    assert not (bot.settings.state_dir / "cycles" / "1").exists(), "all else is gone"
    assert audited(bot) == []
    assert prune(bot) == set(), "nothing new"
    assert not there(bot, 1)


def test_an_unfinished_cycle_finds_everything_that_it_needs(bot: Bot) -> None:
    stop = Stop()
    bot.executor.before = lambda stage: stop.request("shutdown") if stage == "train" else None
    cycle = bot.request()
    with pytest.raises(Interrupted):
        bot.run(cycle, stop)
    bot.executor.before = lambda stage: None
    for why in ("its parent does not serve any more", "nor did it lately"):
        promote.rollback(bot.store, bot.registry, "ann", why)
    pruned = prune(bot)
    assert not any(path.startswith("predictions/") for path in pruned), "it may make the same model again"
    assert audited(bot) == []
    assert there(bot, 4)
    assert bot.run(cycle).state is State.REJECTED


def test_an_audit_that_a_pruning_overtakes_misses_nothing(bot: Bot, monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit reads the records first, and the files when it comes to them."""
    real, gone = audit.gather, set()

    def gathered(*given: Any) -> Any:
        found = real(*given)
        gone.update(prune(bot))
        return found

    monkeypatch.setattr(audit, "gather", gathered)
    assert audited(bot) == []
    assert any(path.startswith("snapshots/") for path in gone)
    assert any(path.startswith("cycles/") for path in gone)


def test_a_snapshot_that_is_taken_again_is_no_longer_pruned(bot: Bot) -> None:
    bot.collect(lesson("more 3"))
    assert bot.run().state is State.REJECTED, "so the snapshot of cycle 7 may go"
    prune(bot)
    seven = bot.store.cycle(7)
    assert seven is not None
    assert f"snapshots/{seven.snapshot}" in bot.store.pruned()
    bot.store.advance(bot.request().id, State.PULLED)
    again = bot.store.advance(9, State.SNAPSHOTTED, snapshot=seven.snapshot)
    assert f"snapshots/{again.snapshot}" not in bot.store.pruned()
    prune(bot)
    assert f"snapshots/{again.snapshot}" not in bot.store.pruned(), "it is needed until the cycle ends"


def test_a_snapshot_that_no_cycle_noted_goes(bot: Bot) -> None:
    folder = bot.settings.state_dir / "snapshots"
    noted = {path.name for path in folder.iterdir()}
    aside = f"{min(noted)}.damaged"
    for name in (aside, "0123456789abcdef", ".fedcba9876543210.tmp"):
        shutil.copytree(folder / min(noted), folder / name)
    prune(bot)
    left = {path.name for path in folder.iterdir()}
    assert left <= {*noted, aside}
    assert aside in left, "somebody moved it aside, to look at it"
    assert audited(bot) == []


@pytest.mark.parametrize(("keep", "left"), [(0, False), (1, True)])
def test_unfinished_work_of_a_cycle_that_was_stopped_is_kept_only_on_demand(
    tmp_path: Path, base: Path, keep: int, left: bool
) -> None:
    bot = make_bot(tmp_path, base, retention__checkpoints=keep)
    bot.collect(lesson("colours"))
    stop = Stop()
    cycle = bot.request()
    bot.executor.before = _cancel_at(stop, "evaluate")
    assert bot.run(cycle, stop).state is State.CANCELLED
    prune(bot)
    assert (bot.settings.state_dir / "cycles" / "1" / "train").exists() is left
    assert audited(bot) == []
    bot.store.close()


def _cancel_at(stop: Stop, wanted: str) -> Callable[[str], None]:
    def enter(stage: str) -> None:
        if stage == wanted:
            stop.request("cancel")
            stop.check()

    return enter


def test_answers_that_a_model_gives_after_its_others_were_pruned_are_kept_apart(
    tmp_path: Path, base: Path
) -> None:
    """The same rows make the same adapter again, which sits a newer suite."""
    bot = make_bot(
        tmp_path, base, gate__min_gain=1.0, retention__rejected=0, retention__predictions=0,
        retention__snapshots=0, evaluation__suite_growth=0.1,
    )  # fmt: skip
    bot.collect(lesson("colours"))
    bot.run()
    bot.collect([("more", "colours", "which one is colours 500", "red", "train")])
    bot.run()
    assert prune(bot)
    erasure.begin(bot.settings, bot.store, erasure.choice("more", None, None, None, []), "ann", "asked")
    erasure.finish(bot.settings, bot.store, bot.registry)
    bot.collect(
        [(f"new-{n}", "colours", f"which one is colours {100 + n}", "red", "suite") for n in range(8)]
    )
    third = bot.run()
    first, *_, last = bot.store.models()
    assert (last.cycle_id, last.adapter_hash) == (third.id, first.adapter_hash)
    assert audited(bot) == []
    assert "pruned" in "\n".join(report.explain(report.cycle_report(bot.store, 1)))
    assert "pruned" not in "\n".join(report.explain(report.cycle_report(bot.store, third.id)))
    bot.store.close()


@pytest.mark.parametrize("end", [State.CANCELLED, State.FAILED])
def test_a_version_that_only_mlflow_knows_loses_its_files(
    bot: Bot, monkeypatch: pytest.MonkeyPatch, end: State
) -> None:
    """Its cycle was cancelled before the store heard of it, or could not be finished."""

    def cut(*args: Any, **kwargs: Any) -> None:
        raise RegistryUnavailable("cut off")

    bot.collect(lesson("more and more"))
    cycle = bot.request()
    with monkeypatch.context() as patch:
        patch.setattr(bot.registry, "_finish", cut)
        with pytest.raises(RegistryUnavailable):
            bot.run(cycle)
    if end is State.CANCELLED:
        bot.store.event("cancel", cycle.id, by="ann")
        (waiting,) = bot.store.unfinished()
        assert bot.run(waiting).state is end
    else:
        bot.store.advance(cycle.id, end, reason="interrupted too often")
    prune(bot)
    (unknown,) = [one for one in bot.registry.look().versions if one.cycle_id == cycle.id]
    assert unknown.weights is not None
    assert not unknown.weights.is_file()
    assert audited(bot) == []
    monkeypatch.setattr(bot.registry, "look", cut)
    prune(bot)  # it is on record: MLflow is not asked again


def test_people_can_look_before(bot: Bot) -> None:
    bot.store.close()
    config = bot.home / "config.toml"
    told = read_json(cli(config, "prune", "--dry-run", "--json"))
    assert {"path": "cycles/1/train", "why": "cycle 1, promoted"} in told["removals"]
    assert (bot.settings.state_dir / "cycles" / "1").exists()
    assert "cycles/1/train" in cli(config, "prune").stdout
    assert not (bot.settings.state_dir / "cycles" / "1").exists()
    assert "nothing to remove" in cli(config, "prune").stdout
    bot.reopen()
