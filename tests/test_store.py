"""What the store promises: rows once, cycles along their arrows, promotions on record."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from storage import database
from storage.errors import IntegrityError, StoreBusy, StoreError
from storage.records import (
    TRANSITIONS,
    Cursor,
    Cycle,
    ModelVersion,
    Prediction,
    Promotion,
    Rejected,
    Score,
    State,
    TaskRecord,
    rejection_hash,
)
from storage.rows import Row, Split
from storage.store import Store

START = datetime(2026, 3, 1, 2, 30)
SHARES = (0.1, 0.15)
ON_THE_WAY = (State.PULLED, State.SNAPSHOTTED, State.TRAINED, State.EVALUATED, State.DECIDED)


class Clock:
    """A minute passes with every look at it."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        self.now += timedelta(minutes=1)
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store.duckdb", clock=Clock()) as store:
        yield store


def row(
    question: str, answer: str = "yes", *, task: str = "billing", split: Split | None = Split.TRAIN
) -> Row:
    return Row(id=f"id-{question}", task=task, question=question, answer=answer, split=split)


def rows(count: int, *, task: str = "billing", split: Split | None = Split.TRAIN) -> list[Row]:
    return [row(f"{task} question {number}?", task=task, split=split) for number in range(count)]


def walk(store: Store, cycle: Cycle, to: State, *, trained: list[str] = [], passed: bool = True) -> Cycle:  # noqa: B006
    """Take a cycle along its arrows to `to`."""
    for state in ON_THE_WAY:
        learned = [(row_hash, "train") for row_hash in trained] if state is State.SNAPSHOTTED else []
        verdict = (passed, "{}") if state is State.DECIDED else None
        cycle = store.advance(cycle.id, state, rows=learned, verdict=verdict)
        if state is to:
            return cycle
    return store.advance(cycle.id, to)


def learn(store: Store, version: int, parent: int | None, trained: list[str]) -> int:
    """A cycle that trained on rows, made a version and was promoted; its id."""
    cycle = store.request_cycle("manual", "test")
    walk(store, cycle, State.DECIDED, trained=trained)
    store.add_model(model(version, cycle.id, parent))
    store.promote(version, cycle_id=cycle.id, kind="gate", who="gate", why="better")
    store.advance(cycle.id, State.PROMOTED, version=version)
    return cycle.id


def model(version: int, cycle_id: int, parent: int | None = None) -> ModelVersion:
    return ModelVersion(
        version=version, cycle_id=cycle_id, parent=parent, result=f"cycles/{cycle_id}/train",
        adapter_hash=f"adapter-{version}", base="base", created_at=START,
    )  # fmt: skip


# -- rows ----------------------------------------------------------------------------------------


def test_a_row_is_stored_once_however_it_is_spelled(store: Store) -> None:
    first = store.accept([row("What is  VAT?"), row("what is vat? ")], "inbox")
    again = store.accept([row("WHAT IS VAT?", "YES")], "collector")
    assert (first.accepted, first.known, first.rejected) == (1, 1, 0)
    assert (again.accepted, again.known, again.rejected) == (0, 1, 0)
    (stored,) = store.pending([])
    assert (stored.question, stored.source, stored.seq) == ("What is  VAT?", "inbox", 1)


def test_a_row_comes_back_exactly_as_it_was_delivered(store: Store) -> None:
    text = "'; DROP TABLE rows; -- \n\t«ñ» 漢字 👩‍🚀 $name <|im_end|>"
    given = Row(
        id="7", task=text, question=text + "?", answer=text, context=text, created_at=START, split=Split.TRAIN
    )
    store.accept([given], text)
    (stored,) = store.rows_by_hash([given.hash])
    assert (stored.task, stored.question, stored.answer, stored.context) == (text, text + "?", text, text)
    assert (stored.created_at, stored.split, stored.source) == (START, Split.TRAIN, text)
    assert (stored.key, stored.question_key) == (given.key, given.question_key)


def test_rows_without_any_time_are_stored(store: Store) -> None:
    store.accept(rows(3), "inbox")
    assert [stored.created_at for stored in store.pending([])] == [None] * 3


def test_the_first_answer_stays_and_the_other_is_quarantined_with_its_reason(store: Store) -> None:
    store.accept([row("Is it open?", "yes")], "inbox", on_conflict="quarantine")
    for _ in range(2):  # delivered again, it is still one line
        batch = [row("Is it open?", "no"), row("New?", "a"), row("New?", "b")]
        result = store.accept(batch, "inbox", on_conflict="quarantine")
        assert result.rejected == 2
    assert [r.answer for r in store.pending([])] == ["yes", "a"]
    assert store.quarantine_counts() == {"contradiction": 2}
    assert {item.detail for item in store.quarantined()} == {
        "the answer on record is 'yes', of row 'id-Is it open?' from inbox",
        "the answer on record is 'a', of row 'id-New?' from inbox",
    }


def test_the_same_question_under_two_tasks_stays_in_one_split(store: Store) -> None:
    store.accept([row("Why?", task="a", split=Split.SUITE)], "inbox")
    store.accept([row("why?", task="b", split=None)], "inbox", shares=(0.0, 0.0))  # alone, it would be train
    assert store.accept([row("Why? ", task="c", split=Split.TRAIN)], "inbox").rejected == 1
    assert store.row_counts() == {"a": {Split.SUITE: 1}, "b": {Split.SUITE: 1}}
    assert store.quarantine_counts() == {"split-conflict": 1}


def test_rows_without_a_split_get_the_one_of_their_content(store: Store) -> None:
    store.accept(rows(400, split=None), "inbox", shares=SHARES)
    counts = store.row_counts()["billing"]
    assert sum(counts.values()) == 400
    assert counts[Split.TRAIN] > counts[Split.SUITE] > 0
    assert counts[Split.VALIDATION] > 0


def test_a_row_repeats_what_its_id_said_last_and_anything_else_is_news(store: Store) -> None:
    one, two = row("One?"), row("Two?", split=Split.SUITE)
    store.accept([one], "inbox")
    again = [one, replace(one, id="other"), replace(one, created_at=START), two]
    assert store.repeats(again[:1], "inbox") == [True]
    assert store.repeats(again[:1], "elsewhere") == [False]
    assert store.repeats(again[1:], "inbox") == [False, False, False]
    assert store.repeats([one, replace(one, answer="no")], "inbox") == [False, False], "their order decides"
    assert store.repeats([], "inbox") == []


def test_rows_are_handed_out_in_the_order_asked_for_and_a_missing_one_is_named(store: Store) -> None:
    batch = rows(5)
    store.accept(batch, "inbox")
    asked = [batch[3].hash, batch[0].hash, batch[3].hash]
    assert [r.hash for r in store.rows_by_hash(asked)] == asked
    assert store.rows_by_hash([]) == []
    with pytest.raises(IntegrityError, match="first nowhere"):
        store.rows_by_hash([batch[0].hash, "nowhere"])


def test_quarantine_keeps_one_line_for_a_row_delivered_twice(store: Store) -> None:
    item = Rejected(
        hash=rejection_hash('{"question": 3}', "wrong-type"), id=None, task=None, raw='{"question": 3}',
        reason="wrong-type", detail="question is a number", source="inbox", at=START,
    )  # fmt: skip
    assert store.quarantine([item, item]) == 1
    assert store.quarantine([item]) == 0
    assert store.quarantined(reason="wrong-type") == [item]
    assert store.quarantined(reason="other") == []
    assert rejection_hash("\ud800", "invalid-utf8") != rejection_hash("\ud801", "invalid-utf8")


def test_a_cursor_is_kept_for_each_source(store: Store) -> None:
    assert store.cursor("a") is None
    store.save_cursor("a", Cursor(watermark=START))
    store.save_cursor("a", Cursor(watermark=START, pulled_at=START + timedelta(days=1)))
    assert store.cursor("a") == Cursor(watermark=START, pulled_at=START + timedelta(days=1))
    assert store.cursor("b") is None


# -- suites and tasks ----------------------------------------------------------------------------


def test_a_suite_grows_by_a_new_version_and_the_old_one_stays(store: Store) -> None:
    batch = rows(6, split=Split.SUITE)
    store.accept(batch, "inbox")
    hashes = [r.hash for r in batch]
    one = store.freeze_suite("billing", hashes[:4], "h1", 1)
    assert store.freeze_suite("billing", hashes[:4], "h1", 2) == one  # nothing changed, nothing is frozen
    two = store.freeze_suite("billing", hashes, "h2", 3)
    assert (one.version, one.size, two.version, two.size) == (1, 4, 2, 6)
    assert [r.hash for r in store.suite_rows("billing", 1)] == sorted(hashes[:4])
    assert [r.hash for r in store.suite_rows("billing", 2)] == sorted(hashes)
    assert store.latest_suites() == {"billing": two}
    assert store.suites() == [one, two]


def test_only_held_out_rows_of_the_task_can_be_frozen(store: Store) -> None:
    trained, other = row("a"), row("b", task="other", split=Split.SUITE)
    store.accept([trained, other], "inbox")
    for hashes in ([trained.hash], [other.hash], ["nowhere"], []):
        with pytest.raises(IntegrityError, match="was not frozen"):
            store.freeze_suite("billing", hashes, "h", 1)
    assert store.suites() == []
    with pytest.raises(StoreError, match="no suite billing@v1"):
        store.suite_rows("billing", 1)


def test_a_task_keeps_its_birthday_when_its_labels_grow(store: Store) -> None:
    store.put_task(_task(labels=("no", "yes")))
    store.put_task(_task(labels=("yes", "maybe", "no"), created_at=START + timedelta(days=1)))
    assert store.tasks() == [_task(labels=("maybe", "no", "yes"))]


def _task(*, labels: tuple[str, ...], created_at: datetime = START) -> TaskRecord:
    return TaskRecord(
        name="intent",
        kind="labels",
        metric="accuracy",
        origin="inferred",
        labels=labels,
        created_at=created_at,
    )


# -- cycles --------------------------------------------------------------------------------------


def test_a_cycle_walks_its_arrows_and_leaves_an_event_at_each(store: Store) -> None:
    cycle = store.request_cycle("schedule", "cron")
    assert (cycle.id, cycle.state, cycle.started_at) == (1, State.REQUESTED, None)
    done = walk(store, cycle, State.PROMOTED)
    assert done.started_at is not None
    assert done.finished_at is not None
    assert done.started_at < done.finished_at
    assert store.cycle(1) == done
    assert [e.kind for e in reversed(store.events(cycle_id=1))] == [
        *(State.REQUESTED, *ON_THE_WAY, State.PROMOTED)
    ]
    assert store.unfinished() == []


def test_what_a_step_does_not_say_stays(store: Store) -> None:
    cycle = store.request_cycle("manual", "ana")
    store.advance(cycle.id, State.PULLED, parent=4, reason="128 new rows")
    after = store.advance(cycle.id, State.SNAPSHOTTED, snapshot="abc")
    assert (after.parent, after.reason, after.snapshot) == (4, "128 new rows", "abc")
    assert store.events(limit=1)[0].detail == {"snapshot": "abc"}
    assert store.cycle(cycle.id) == after


@pytest.mark.parametrize("state", [State.REQUESTED, *ON_THE_WAY, State.PROMOTED])
def test_an_arrow_that_does_not_exist_is_refused_and_changes_nothing(store: Store, state: State) -> None:
    cycle = store.request_cycle("manual", "ana")
    cycle = cycle if state is State.REQUESTED else walk(store, cycle, state)
    for to in set(State) - TRANSITIONS[state]:
        with pytest.raises(StoreError, match=f"is {state} and cannot become {to}; see `daemon history`"):
            store.advance(cycle.id, to, rows=[("h", "replay")], reason="no")
    assert store.cycle(cycle.id) == cycle
    assert store.cycle_rows(cycle.id) == []


@pytest.mark.parametrize("end", [State.FAILED, State.CANCELLED])
@pytest.mark.parametrize("state", ON_THE_WAY)
def test_a_cycle_can_stop_anywhere(store: Store, state: State, end: State) -> None:
    cycle = walk(store, store.request_cycle("manual", "ana"), state)
    assert not state.ended
    stopped = store.advance(cycle.id, end, reason="the disk is full")
    assert stopped.state.ended
    assert stopped.finished_at is not None
    assert stopped.reason == "the disk is full"


def test_a_step_that_fails_halfway_leaves_no_half(store: Store) -> None:
    cycle = walk(store, store.request_cycle("manual", "ana"), State.EVALUATED)
    with pytest.raises(StoreError, match="did not pass the gate"):
        store.advance(walk(store, cycle_of(store), State.DECIDED, passed=False).id, State.PROMOTED)
    before = store.events()
    with pytest.raises(AttributeError):
        store.advance(cycle.id, State.DECIDED, verdict=(True, "{}"), reason=object().nothing)  # type: ignore[attr-defined]
    with pytest.raises(StoreError):  # the verdict is written, then the row without a role is refused
        store.advance(cycle.id, State.DECIDED, verdict=(True, "{}"), rows=[("h", None)])  # type: ignore[list-item]
    assert store.verdict(cycle.id) is None
    assert store.cycle(cycle.id) == cycle
    assert store.events() == before


def cycle_of(store: Store) -> Cycle:
    return store.request_cycle("manual", "ana")


def test_unfinished_cycles_come_oldest_first_and_the_list_newest_first(store: Store) -> None:
    for _ in range(3):
        store.request_cycle("manual", "ana")
    store.advance(2, State.NOTHING, reason="no new rows")
    assert [c.id for c in store.unfinished()] == [1, 3]
    assert [c.id for c in store.cycles(limit=2)] == [3, 2]


def test_attempts_are_counted(store: Store) -> None:
    cycle = store.request_cycle("manual", "ana")
    assert [store.count_attempt(cycle.id) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(StoreError, match="no cycle 9"):
        store.count_attempt(9)


def test_the_rows_a_cycle_trained_on_can_be_listed(store: Store) -> None:
    batch = rows(2) + rows(1, task="trivia")
    store.accept(batch, "inbox")
    one, two, three = (r.hash for r in batch)
    cycle = store.request_cycle("manual", "ana")
    store.advance(cycle.id, State.PULLED)
    roles = [(one, "train"), (three, "train"), (two, "replay"), (one, "replay")]
    store.advance(cycle.id, State.SNAPSHOTTED, rows=roles)
    assert store.cycle_rows(cycle.id, "train") == sorted([one, three])
    assert store.cycle_rows(cycle.id, "replay") == [two]
    assert set(store.cycle_rows(cycle.id)) == {one, two, three}
    assert store.first_learned([cycle.id]) == {"billing": cycle.id, "trivia": cycle.id}


# -- lineage, pending rows and promotions ----------------------------------------------------------


def test_rows_of_a_rejected_or_failed_cycle_stay_pending(store: Store) -> None:
    store.accept(rows(4), "inbox")
    trained = [r.hash for r in store.pending([])]
    for end in (State.REJECTED, State.FAILED):
        cycle = store.request_cycle("manual", "ana")
        walk(store, cycle, end, trained=trained, passed=False)
        assert [r.hash for r in store.pending(store.lineage(None))] == trained


def test_rows_return_to_pending_when_their_version_is_rolled_back(store: Store) -> None:
    batch = rows(6)
    store.accept(batch, "inbox")
    hashes = [r.hash for r in batch]
    first = learn(store, 1, None, hashes[:2])
    second = learn(store, 2, 1, hashes[2:4])
    assert store.lineage(2) == [first, second]
    assert [r.hash for r in store.pending(store.lineage(2))] == hashes[4:]
    back = store.promote(1, cycle_id=None, kind="rollback", who="ana", why="wrong prices")
    assert (back.version, back.previous, back.kind) == (1, 2, "rollback")
    assert [r.hash for r in store.pending(store.lineage(1))] == hashes[2:]
    third = learn(store, 3, 1, hashes[2:])
    assert store.lineage(3) == [first, third]  # the rolled-back version is no ancestor
    assert store.pending(store.lineage(3)) == []
    assert [r.hash for r in store.pending(store.lineage(None))] == hashes


def test_validation_rows_are_pending_apart_from_training_rows(store: Store) -> None:
    watched, learned = row("v", split=Split.VALIDATION), row("t")
    store.accept([watched, learned, row("s", split=Split.SUITE)], "inbox")
    cycle = store.request_cycle("manual", "ana")
    assert [r.hash for r in store.pending_validation([])] == [watched.hash]
    store.advance(cycle.id, State.PULLED)
    store.advance(cycle.id, State.SNAPSHOTTED, rows=[(watched.hash, "validation")])
    assert store.pending_validation([cycle.id]) == []
    assert [r.hash for r in store.pending([cycle.id])] == [learned.hash]


def test_the_gate_promotes_only_the_version_of_a_passing_verdict(store: Store) -> None:
    undecided = walk(store, cycle_of(store), State.EVALUATED)
    failed = walk(store, cycle_of(store), State.DECIDED, passed=False)
    passed = walk(store, cycle_of(store), State.DECIDED)
    for version, cycle in enumerate((undecided, failed, passed), start=1):
        store.add_model(model(version, cycle.id))
    for version, cycle_id, told in [
        (1, undecided.id, "has no verdict"),
        (2, failed.id, "did not pass"),
        (2, passed.id, "was not made by cycle 3"),
        (3, None, "has no verdict"),
        (9, passed.id, "no model version 9"),
    ]:
        with pytest.raises(StoreError, match=told):
            store.promote(version, cycle_id=cycle_id, kind="gate", who="gate", why="")
    assert store.champion() is None
    with pytest.raises(StoreError, match="did not pass"):
        store.advance(failed.id, State.PROMOTED)
    line = store.promote(3, cycle_id=passed.id, kind="gate", who="gate", why="better")
    assert store.champion() == line


def test_a_person_may_override_the_gate_and_stays_on_record(store: Store) -> None:
    cycle = walk(store, cycle_of(store), State.DECIDED, passed=False)
    store.add_model(model(1, cycle.id))
    line = store.promote(1, cycle_id=None, kind="manual", who="ana", why="the suite is wrong")
    assert (line.version, line.who, line.why) == (1, "ana", "the suite is wrong")
    event = store.events(limit=1)[0]
    assert (event.kind, event.detail["who"], event.detail["how"]) == ("champion", "ana", "manual")
    with pytest.raises(StoreError):
        store.promote(1, cycle_id=7, kind="wish", who="ana", why="")


def test_promoting_twice_after_a_crash_is_one_promotion(store: Store) -> None:
    cycle = learn(store, 1, None, [])
    lines = [store.promote(1, cycle_id=cycle, kind="gate", who="gate", why="again") for _ in range(2)]
    assert lines == [store.champion()] * 2
    assert len(store.promotions()) == 1


def test_a_rollback_to_the_bare_base_is_a_promotion_of_nothing(store: Store) -> None:
    learn(store, 1, None, [])
    line = store.promote(None, cycle_id=None, kind="rollback", who="ana", why="start over")
    assert isinstance(line, Promotion)
    assert (line.seq, line.version, line.previous) == (2, None, 1)
    assert store.lineage(line.version) == []


def test_a_cycle_makes_one_version(store: Store) -> None:
    store.add_model(model(1, 5))
    store.add_model(model(1, 5))
    with pytest.raises(StoreError, match="cycle 5 made version 1 already, not 2"):
        store.add_model(model(2, 5))
    assert store.models() == [model(1, 5)]
    assert store.model(1) == model(1, 5)
    assert store.model(2) is None
    with pytest.raises(StoreError, match="no model version 2"):
        store.lineage(2)


# -- evaluation, events, meta ----------------------------------------------------------------------


def test_an_answer_on_record_is_never_replaced(store: Store) -> None:
    first = Prediction(row_hash="r", prediction="Paris", exact_match=1.0, token_f1=1.0, score=1.0)
    other = Prediction(row_hash="r", prediction="Rome", exact_match=0.0, token_f1=0.0, score=0.0)
    store.put_predictions("m", "exam", [first])
    store.put_predictions("m", "exam", [other])
    store.put_predictions("m", "another", [other, other])
    store.put_predictions("m", "exam", [])
    assert store.predictions("m", "exam") == {"r": first}
    assert store.predictions("m", "another") == {"r": other}
    assert store.predictions("nobody", "exam") == {}


def test_a_score_measured_again_replaces_the_first(store: Store) -> None:
    store.put_scores([_score(1, 0.25), _score(2, 0.5)])
    store.put_scores([_score(2, 0.75)])
    assert store.scores(2) == [_score(2, 0.75)]
    assert store.scores() == [_score(1, 0.25), _score(2, 0.75)]


def _score(cycle_id: int, value: float) -> Score:
    return Score(
        cycle_id=cycle_id, label="candidate", task="billing", version=1, model="m", exam="e",
        metric="token_f1", score=value, size=10,
    )  # fmt: skip


def test_events_keep_details_and_the_newest_come_first(store: Store) -> None:
    store.event("started", version="0.1", path=Path("/x"))
    store.event("pull", cycle_id=3, rows=5, who="añá")
    assert [(e.kind, e.cycle_id, e.detail) for e in store.events()] == [
        ("pull", 3, {"rows": 5, "who": "añá"}),
        ("started", None, {"version": "0.1", "path": "/x"}),
    ]
    assert [e.seq for e in store.events(limit=1)] == [2]


def test_meta_holds_one_value_for_a_key(store: Store) -> None:
    assert store.get_meta("bot") is None
    store.set_meta("bot", "a")
    store.set_meta("bot", "b")
    assert store.get_meta("bot") == "b"


def test_a_store_opened_afresh_has_everything(store: Store) -> None:
    store.event("started")
    store.refresh()
    store.event("pull")
    assert [event.kind for event in store.events()] == ["pull", "started"]
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.refresh()


def test_a_reader_that_comes_in_between_costs_a_try_and_not_the_store(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.event("started")
    connect, reader = database._connect, []

    def too_late(path: Path, *, read_only: bool) -> object:
        reader.append(path)
        raise StoreBusy("a reader was faster")

    monkeypatch.setattr(database, "_PATIENCE", 0.0)
    monkeypatch.setattr(database, "_connect", too_late)
    with pytest.raises(StoreBusy, match="faster"):
        store.refresh()
    with pytest.raises(StoreBusy, match="faster"):
        store.events()
    monkeypatch.setattr(database, "_connect", connect)
    assert [event.kind for event in store.events()] == ["started"]
    assert len(reader) >= 2


@contextmanager
def reader(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the store open and stays."""
    reads = (
        "import duckdb, sys; it = duckdb.connect(sys.argv[1], read_only=True); "
        "print('in', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", reads, str(path)], **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.read(2) == "in"
        yield process
        process.stdin.close()


def test_a_reader_that_comes_in_while_the_store_is_opened_afresh_is_named_and_waited_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.event("started")
    monkeypatch.setattr(database, "_PATIENCE", 0.0)
    store._db._let_go()
    with reader(store._db.path) as process, pytest.raises(StoreBusy) as told:
        store.events()
    assert f"process {process.pid} holds the store" in str(told.value)
    assert "end it" in str(told.value)
    assert "is a daemon already running" not in str(told.value)
    assert [event.kind for event in store.events()] == ["started"]


@pytest.mark.parametrize("left", ["a reader", "the journal"])
def test_a_store_that_somebody_reads_or_whose_journal_is_left_is_not_replaced(
    store: Store, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    store.event("started")
    path, let_go, inode = store._db.path, store._db._let_go, store._db.path.stat().st_ino
    journal = path.with_name(f"{path.name}.wal")
    with ExitStack() as until_then, monkeypatch.context() as patch:

        def then_somebody_comes() -> None:
            let_go()
            patch.undo()
            if left == "a reader":
                until_then.enter_context(reader(path))
            else:
                journal.touch()

        patch.setattr(store._db, "_let_go", then_somebody_comes)
        with pytest.raises(StoreError, match="which is to be replaced") as told:
            store.rewrite()
        assert isinstance(told.value, StoreBusy) == (left == "a reader")
    journal.unlink(missing_ok=True)
    assert path.stat().st_ino == inode
    assert [each.name for each in path.parent.iterdir() if each.name.endswith(".new")] == []
    store.rewrite()
    assert path.stat().st_ino != inode
    assert [event.kind for event in store.events()] == ["started"]


def test_a_store_whose_opening_fails_can_be_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store.duckdb"
    with monkeypatch.context() as patch:
        patch.setattr(Store, "set_meta", lambda *given: (_ for _ in ()).throw(StoreError("no space")))
        with pytest.raises(StoreError, match="no space") as failed:
            Store.open(path)
    Store.open(path).close()
    assert failed.value.__traceback__ is not None, "which still has the first one"


def test_a_copy_that_the_disk_has_no_room_for_leaves_nothing_behind_and_the_next_try_may_come(
    tmp_path: Path,
) -> None:
    """A limit on the size of files stands for the disk."""
    path = tmp_path / "store.duckdb"
    with Store.open(path) as store:
        store.set_meta("much", "".join(map(str, range(400_000))))
        store.refresh()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, hard))
        try:
            with pytest.raises(StoreError):
                store.rewrite()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []
        store.rewrite()
        assert (store.get_meta("much") or "").startswith("0123")


@pytest.mark.parametrize("place", ["", ".", "cycles", "/etc", "cycles/../..", "cycles/1/\0", "snapshots/1"])
def test_a_record_that_leads_out_of_its_cycle_is_damage(place: str) -> None:
    """Its directory would be read, and removed when retention or an erasure wants it gone."""
    with pytest.raises(ValueError, match="no directory of a cycle"):
        replace(model(1, 1), result=place)
