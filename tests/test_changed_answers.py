"""What a changed answer means for a cycle: suites, the matrix, the memory, the gate. A whole tiny bot."""

from pathlib import Path

import pytest

from daemon import experience, operations, report
from daemon.experience import _next_suite
from storage import snapshots
from storage.records import State, StoredRow
from storage.rows import Row, Split
from storage.store import Store
from tests.bots import COLOURS, FLAVOURS, Bot, lesson, make_bot_again

SUITE = range(20, 28)  # numbers of the suite's questions in lesson("colours")


def changed(numbers: range, split: str = "train") -> list[tuple[str, str, str, str, str]]:
    """The lesson's questions with these numbers, and the next colour as their answer."""
    return [
        (f"again-{n}", "colours", f"which one is colours {n}", COLOURS[(n + 1) % 4], split) for n in numbers
    ]


def versions(bot: Bot) -> list[tuple[int, int]]:
    return [(suite.version, suite.size) for suite in bot.store.suites() if suite.task == "colours"]


def part(bot: Bot, cycle: int, name: str) -> list[tuple[str, str]]:
    """(question, answer) of the rows in a part of a cycle's snapshot."""
    found = bot.store.cycle(cycle)
    assert found is not None
    assert found.snapshot is not None
    rows = snapshots.load(bot.settings.state_dir / "snapshots" / found.snapshot).rows(name)
    return [(row.question, row.answer) for row in rows]


def test_a_changed_answer_to_a_suite_question_goes_to_the_next_suite_and_is_never_trained_on(
    bot: Bot,
) -> None:
    bot.collect(lesson("colours"))
    assert bot.run().state is State.PROMOTED
    before = bot.store.suite_rows("colours", 1)
    bot.collect([*changed(range(20, 22)), *changed(range(8))])
    assert bot.run().state is State.PROMOTED
    assert versions(bot) == [(1, 8), (2, 8)]
    assert bot.store.suite_rows("colours", 1) == before, "a frozen suite never changes"
    old, new = ({row.key: row.answer for row in bot.store.suite_rows("colours", v)} for v in (1, 2))
    assert old.keys() == new.keys()
    assert sum(old[key] != new[key] for key in old) == 2
    questions = {f"which one is colours {n}" for n in SUITE}
    for name in ("train", "validation", "memory", "probe"):
        assert not questions & {question for question, _ in part(bot, 2, name)}
    assert {row.key for row in bot.store.suite_rows("colours", 2)} == {row.key for row in before}


def test_base_champion_and_candidate_are_all_examined_on_the_new_answers(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    bot.run()
    bot.collect([*changed(SUITE), *lesson("flavours", FLAVOURS)])
    bot.run()
    scores = [score for score in bot.store.scores(2) if score.task == "colours"]
    assert {(score.label, score.version, score.size) for score in scores} == {
        ("base", 2, 8),
        ("champion", 2, 8),
        ("candidate", 2, 8),
    }
    asked = {row.hash for row in bot.store.suite_rows("colours", 2)}
    assert all(bot.store.predictions(score.model, score.exam).keys() == asked for score in scores)


def test_the_matrix_compares_models_on_answers_that_never_changed(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    bot.run()
    first = {s.label: s for s in bot.store.scores(1)}
    before = report.matrix(bot.store, cycle_id=1)
    bot.collect([*changed(range(20, 23)), *lesson("flavours", FLAVOURS)])
    bot.run()
    same = {r.hash for r in bot.store.suite_rows("colours", 1)} & {
        r.hash for r in bot.store.suite_rows("colours", 2)
    }
    assert len(same) == 5
    table = report.matrix(bot.store)
    column = [line[table.tasks.index("colours")] for line in table.values]
    sat = [s for s in bot.store.scores(2) if s.task == "colours"]
    keys = [next(s for s in sat if s.label == label) for label in ("base", "champion", "candidate")]
    for score, value in zip(keys, column, strict=True):
        answers = bot.store.predictions(score.model, score.exam)
        assert value == pytest.approx(sum(answers[row].score for row in same) / 5)
    assert first["candidate"].model == keys[1].model
    assert report.matrix(bot.store, cycle_id=1) == before, "what was said of an older cycle stays"


def test_a_superseded_row_is_not_rehearsed_not_watched_and_not_probed(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    bot.run()
    remembered = experience._memory(bot.store, bot.settings, 1)
    assert remembered
    numbers = range(20)  # all that was trained on or watched
    bot.collect(changed(numbers))
    bot.run()
    assert part(bot, 2, "memory") == []
    old = {(f"which one is colours {n}", COLOURS[n % 4]) for n in numbers}
    new = {(f"which one is colours {n}", COLOURS[(n + 1) % 4]) for n in numbers}
    shown = {name: set(part(bot, 2, name)) for name in ("train", "validation", "probe")}
    assert all(rows <= new and not rows & old for rows in shown.values())
    assert [len(rows) for rows in shown.values()] == [16, 4, 4]


def test_an_answer_that_came_back_is_trained_on_again_and_examined_as_before(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    bot.run()
    bot.collect([*changed(range(16)), *changed(SUITE)])
    assert bot.run().state is State.PROMOTED
    back = [(f"back-{row[0]}", *row[1:]) for row in lesson("colours") if row[4] != "validation"]
    bot.collect(back)
    assert bot.run().state is State.PROMOTED
    assert set(part(bot, 3, "train")) == {(row[2], row[3]) for row in back if row[4] == "train"}
    assert versions(bot) == [(1, 8), (2, 8), (3, 8)]
    assert bot.store.suite_rows("colours", 3) == bot.store.suite_rows("colours", 1)
    assert bot.run().state is State.NOTHING


def test_people_are_told_how_many_answers_changed(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    bot.run()
    bot.collect(changed(range(3)))
    cycle = bot.run()
    pulled = next(e for e in bot.store.events(cycle_id=cycle.id) if e.kind == "pulled")
    assert pulled.detail["reason"] == "31 read, 3 new, 28 known, 3 superseded"
    told = operations.status(bot.settings, bot.store)["rows"]
    assert (told["total"], told["pending"], told["superseded"]) == (28, 3, 3)
    (change,) = operations.history(bot.store, 20)["superseded"]
    assert (change["rows"], change["at"][-1]) == (3, "Z")
    assert change["source"].startswith("duckdb:")


def test_under_both_two_answers_are_trained_on_and_rehearsed(bot: Bot, base: Path) -> None:
    both = make_bot_again(bot, base, source__on_conflict="both")
    both.collect(lesson("colours"))
    both.run()
    remembered = len(experience._memory(both.store, both.settings, 1))
    both.collect(changed(range(16)))
    assert both.run().state is State.PROMOTED
    assert len(part(both, 2, "train")) == 16
    assert len(part(both, 2, "memory")) == remembered
    assert set(both.store.cycle_rows(2, "replay")) <= set(both.store.cycle_rows(1, "train"))
    assert both.store.cycle_rows(2, "replay"), "the other answer is rehearsed"
    assert both.run().state is State.NOTHING
    both.store.close()


# -- which rows the next version has ---------------------------------------------------------------------


def held_out(store: Store, answer: str, numbers: range) -> list[StoredRow]:
    rows = [Row(id=f"{n}", task="t", question=f"q{n}", answer=answer, split=Split.SUITE) for n in numbers]
    store.accept(rows, answer)
    return store.task_rows("t", Split.SUITE)


def test_in_a_full_suite_the_successors_take_the_places_of_the_superseded(bot: Bot) -> None:
    old = held_out(bot.store, "a", range(8))
    now = held_out(bot.store, "b", range(6, 40))
    stale = bot.store.superseded([row.hash for row in old])
    for limit in (1, 8, 12):
        rows = _next_suite(old, stale, now, limit)
        assert len(rows) == max(8, limit)
        assert {row.question for row in old} <= {row.question for row in rows}
        assert not stale & {row.hash for row in rows}
        assert [row.hash for row in rows] == sorted(row.hash for row in rows)
