"""Two answers to one question: which of them counts, and what stays on record. Real stores."""

import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import IntegrityError
from storage.intake import IntakeReport, pull, take
from storage.records import OnConflict, Prediction, Score, StoredRow, Supersession
from storage.rows import Row, Split
from storage.sources import Columns, DuckDBSource, RawRow, SourceSpec
from storage.store import Store
from tests.test_store import Clock, learn

DAY = datetime(2026, 1, 1)
SHARES = (0.1, 0.3)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store.duckdb", clock=Clock()) as store:
        yield store


def row(
    answer: str,
    day: int | None = None,
    *,
    question: str = "When do you open?",
    split: Split | None = Split.TRAIN,
    id: str = "",
) -> Row:
    at = None if day is None else DAY + timedelta(days=day)
    return Row(
        id=id or f"{answer}-{day}", task="shop", question=question, answer=answer, created_at=at, split=split
    )


def tell(store: Store, *rows: Row, source: str = "inbox", on_conflict: OnConflict = "newest") -> int:
    """The rows one after the other, as so many deliveries; how many lost their place."""
    accepted = [
        store.accept([one], source, shares=SHARES, on_conflict=on_conflict).superseded for one in rows
    ]
    return sum(accepted)


def counting(store: Store, split: Split = Split.TRAIN) -> list[str]:
    return [found.answer for found in store.task_rows("shop", split)]


def everything(store: Store) -> list[tuple[object, ...]]:
    """What a delivery may have changed."""
    tables = ("rows", "labels", "supersessions", "quarantine", "events")
    return [line for table in tables for line in store._db.script(f"SELECT * FROM {table} ORDER BY ALL")]


# -- newest ----------------------------------------------------------------------------------------


def test_the_newer_answer_counts_and_the_older_one_stays_on_record_with_its_successor(store: Store) -> None:
    old, new = row("nine", 1), row("ten", 2)
    assert tell(store, old, new) == 1
    assert counting(store) == ["ten"]
    assert [found.answer for found in store.pending([])] == ["ten"]
    assert store.pending_count([]) == 1
    assert store.row_counts() == {"shop": {Split.TRAIN: 1}}
    assert [found.answer for found in store.rows_by_hash([old.hash])] == ["nine"], "nothing is ever lost"
    (line,) = store.supersessions()
    assert (line.row_hash, line.by_hash) == (old.hash, new.hash)
    assert line.at == store.rows_by_hash([new.hash])[0].accepted_at
    assert store.superseded([old.hash, new.hash]) == {old.hash}
    assert store.superseded_count() == 1


def test_a_late_arrival_with_an_older_label_is_stored_but_does_not_count(store: Store) -> None:
    assert tell(store, row("ten", 2), row("nine", 1)) == 1
    assert counting(store) == ["ten"]
    assert [line.by_hash for line in store.supersessions()] == [row("ten").hash]


@pytest.mark.parametrize("days", [(None, None), (5, None), (None, 1), (3, 3)])
def test_without_two_different_times_the_later_arrival_is_newer(
    store: Store, days: tuple[int | None, int | None]
) -> None:
    tell(store, row("nine", days[0]), row("ten", days[1]))
    assert counting(store) == ["ten"]


def test_a_label_from_the_future_does_not_win_for_ever(store: Store) -> None:
    """Somebody's 2099, or a wrong clock: it counts by its arrival, and saying it again is no news."""
    tell(store, row("nine", 1), row("eleven", 30_000, id="a typo"))
    assert counting(store) == ["eleven"]
    assert tell(store, row("ten", 2)) == 1
    assert counting(store) == ["ten"]
    before = everything(store)
    tell(store, row("eleven", 30_000, id="a typo"))
    assert everything(store) == before
    assert counting(store) == ["ten"]


def test_a_clock_that_is_less_than_a_day_ahead_is_believed_and_no_other(store: Store) -> None:
    """It is the 60th day's eve: in another time zone that day may have come."""
    tell(store, row("ten", 60), row("nine", 59))
    assert counting(store) == ["ten"], "nine is the older answer, though it came later"
    tell(store, row("eleven", 61), row("twelve", 60))
    assert counting(store) == ["twelve"], "the 61st is not yet, so that eleven has no time"


@pytest.mark.parametrize("days", [(1, 2, 3, 4), (None, None, None, None)])
@pytest.mark.parametrize("id", ["", "the same for all"])
def test_an_answer_that_comes_back_counts_again(store: Store, days: tuple[int | None, ...], id: str) -> None:
    answers = ("nine", "ten", "nine", "ten")
    rows = [
        row(answer, day, id=id or str(n)) for n, (answer, day) in enumerate(zip(answers, days, strict=True))
    ]
    for number, one in enumerate(rows):
        told = store.accept([one], "inbox")
        assert counting(store) == [one.answer]
        assert (told.accepted, told.known) == ((1, 0) if number < 2 else (0, 1))
        assert told.superseded == (number > 0)
    nine, ten = rows[0].hash, rows[1].hash
    moves = [(line.row_hash, line.by_hash) for line in store.supersessions()]
    back = [(ten, nine), (nine, None), (nine, ten), (ten, None)]
    assert moves == [(nine, ten), *back]


def test_an_answer_given_again_later_is_as_new_as_its_newest_label(store: Store) -> None:
    tell(store, row("nine", 1), row("nine", 5), row("ten", 3))
    assert counting(store) == ["nine"]
    tell(store, row("nine", 2, id="an old copy"), row("ten", 4))
    assert counting(store) == ["nine"]
    tell(store, row("ten", 6))
    assert counting(store) == ["ten"]


def test_an_answer_that_comes_back_without_a_time_is_the_later_arrival(store: Store) -> None:
    tell(store, row("nine", 1), row("ten", 2), row("nine", id="by hand"))
    assert counting(store) == ["nine"]


def test_an_old_copy_of_the_newest_answer_does_not_make_it_old(store: Store) -> None:
    tell(store, row("nine", 5), row("ten", 3), on_conflict="both")
    tell(store, row("nine", 2, id="an old copy"))
    assert counting(store) == ["nine"]


def test_within_one_batch_only_the_outcome_is_told(store: Store) -> None:
    batch = [row("nine", id="1"), row("ten", id="2"), row("nine", id="3")]
    told = store.accept(batch, "inbox")
    assert (told.accepted, told.known, told.superseded) == (2, 1, 1)
    assert counting(store) == ["nine"]
    assert [(line.row_hash, line.by_hash) for line in store.supersessions()] == [
        (batch[1].hash, batch[0].hash)
    ]


def test_what_an_id_said_last_within_a_batch_is_what_it_said_last(store: Store) -> None:
    """A row that is edited and edited back between two reads, and then once more."""
    store.accept([row("nine", id="7"), row("ten", id="7"), row("nine", id="7")], "inbox")
    assert counting(store) == ["nine"]
    before = everything(store)
    tell(store, row("nine", id="7"))
    assert everything(store) == before
    tell(store, row("ten", id="7"))
    assert counting(store) == ["ten"]


def test_an_answer_is_as_new_as_its_newest_label_also_when_the_batch_told_an_older_one_last(
    store: Store,
) -> None:
    store.accept([row("nine", 5, id="7"), row("ten", id="7"), row("nine", 2, id="7")], "inbox")
    assert counting(store) == ["nine"]
    tell(store, row("eleven", 3))
    assert counting(store) == ["nine"]


def test_another_question_context_or_task_is_no_conflict(store: Store) -> None:
    one = row("nine")
    others = [
        row("ten", question="When do you close?"),
        Row(id="2", task="bar", question=one.question, answer="ten"),
    ]
    others += [
        Row(id="3", task="shop", question=one.question, answer="x", context="In May.", split=Split.TRAIN)
    ]
    assert tell(store, one, *others) == 0
    assert len(store.pending([])) == 4


# -- what is no news -------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [True, False])
def test_reading_the_same_rows_again_changes_nothing(store: Store, times: bool) -> None:
    days: Sequence[int | None] = (1, 2, 3, 4, 5) if times else (None,) * 5
    answers = ("nine", "NINE", "ten", "eleven", "ten")
    rows = [row(answer, day, id=str(n)) for n, (answer, day) in enumerate(zip(answers, days, strict=True))]
    store.accept(rows, "table")
    before = everything(store)
    for order in (rows, rows[::-1], rows[1:2], rows[:3]):
        assert deliver(store, order).superseded == 0
        tell(store, *order, source="table")
    assert everything(store) == before
    assert counting(store) == ["ten"]


def deliver(store: Store, rows: Sequence[Row]) -> IntakeReport:
    """As `daemon ingest` does."""
    fields = ("id", "task", "question", "answer", "created_at", "split")
    raw = [RawRow(values={name: getattr(one, name) for name in fields}, location="here") for one in rows]
    return take([raw], store, SourceSpec(), shares=SHARES, source_name="table")


@pytest.mark.parametrize("days", [(1, 2), (None, None), (1, 1)])
def test_a_collector_that_repeats_its_ids_makes_no_noise_either(
    store: Store, days: tuple[int | None, int | None]
) -> None:
    rows = [row("nine", days[0], id="7"), row("ten", days[1], id="7")]
    for _ in range(3):
        deliver(store, rows)
        assert counting(store) == ["ten"]
    assert len(store.supersessions()) == 1
    assert store._db.script("SELECT count(*) FROM labels") == [(2,)]


@pytest.mark.parametrize("old", [None, 99_999])
def test_an_old_answer_without_a_time_does_not_come_back_between_two_full_scans(
    store: Store, old: int | None
) -> None:
    """A pull finds rows without a time each time, the same id's newer answer only while it is new."""
    mistaken, corrected = row("nine", old, id="7"), row("ten", 2, id="7")
    deliver(store, [mistaken, corrected])
    for _ in range(3):
        deliver(store, [mistaken])
        assert counting(store) == ["ten"]
    assert len(store.supersessions()) == 1
    deliver(store, [row("nine", 3, id="7")])
    assert counting(store) == ["nine"], "with a later time it is a correction"


def test_a_correction_from_a_file_is_not_undone_by_reading_the_source_again(store: Store) -> None:
    tell(store, row("nine", id="7"), source="table")
    tell(store, row("ten", id="7"), source="file")
    tell(store, row("nine", id="7"), source="table")
    assert counting(store) == ["ten"]


def test_an_answer_that_is_edited_in_place_and_back_is_followed(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "qa.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE qa (id INT, task TEXT, question TEXT, answer TEXT, split TEXT)")
        connection.execute("INSERT INTO qa VALUES (1, 'shop', 'When?', 'nine', 'train')")
    spec = SourceSpec(path=path, columns=Columns(split="split"))
    told = []
    for answer in ("nine", "ten", "ten", "nine"):
        with duckdb.connect(str(path)) as connection:
            connection.execute("UPDATE qa SET answer = ?", [answer])
        told.append(str(pull(DuckDBSource(spec), store, shares=SHARES)))
        assert counting(store) == [answer]
    assert told == [
        "1 read, 1 new, 0 known",
        "1 read, 1 new, 0 known, 1 superseded",
        "1 read, 0 new, 1 known",
        "1 read, 0 new, 1 known, 1 superseded",
    ]
    events = [(event.detail["rows"], event.detail["source"]) for event in store.events(kind="superseded")]
    assert events == [(1, DuckDBSource(spec).name)] * 2


# -- splits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["newest", "both"])
@pytest.mark.parametrize("first", list(Split))
def test_another_answer_takes_the_split_of_its_question_whatever_it_says(
    store: Store, policy: OnConflict, first: Split
) -> None:
    tell(store, row("nine", 1, split=first))
    for number, claim in enumerate([*Split, None], start=2):
        tell(store, row(f"at {number}", number, split=claim), on_conflict=policy)
    assert {found.split for found in all_rows(store)} == {first}
    assert store.quarantine_counts() == {}


def all_rows(store: Store) -> list[StoredRow]:
    hashes = [line[0] for line in store._db.script("SELECT hash FROM rows ORDER BY seq")]
    return store.rows_by_hash(hashes)


def test_a_superseded_row_can_be_frozen_into_no_suite_but_stays_in_the_old_one(store: Store) -> None:
    old, new = row("nine", 1, split=Split.SUITE), row("ten", 2, split=Split.TRAIN)
    tell(store, old)
    store.freeze_suite("shop", [old.hash], "h1", 1)
    tell(store, new)
    assert [found.answer for found in store.suite_rows("shop", 1)] == ["nine"]
    with pytest.raises(IntegrityError, match="is no suite row that counts"):
        store.freeze_suite("shop", [old.hash], "h2", 2)
    assert store.freeze_suite("shop", [new.hash], "h2", 2).version == 2


def test_models_are_compared_on_what_every_version_has_had_and_anew_when_nothing_of_that_is_left(
    store: Store,
) -> None:
    rows = [row("nine", question=f"{n}?", split=Split.SUITE).hash for n in range(3)]
    tell(store, *(row("nine", question=f"{n}?", split=Split.SUITE) for n in range(3)))
    for cycle, asked in enumerate([rows[:2], rows[1:], [rows[0], rows[2]]], start=1):
        store.freeze_suite("shop", asked, f"h{cycle}", cycle)
        sit(store, cycle, {row_hash: cycle + rows.index(row_hash) / 10 for row_hash in asked})
    assert store.comparable_scores(1) == {("m1", "shop"): pytest.approx(1.05)}
    assert store.comparable_scores(2) == {("m1", "shop"): 1.1, ("m2", "shop"): 2.1}
    assert store.comparable_scores(3) == {("m2", "shop"): 2.2, ("m3", "shop"): 3.2}


def sit(store: Store, cycle: int, scores: dict[str, float]) -> None:
    """A model of the cycle's number sits the exam of that number."""
    answers = [
        Prediction(row_hash=row_hash, prediction="", exact_match=0, token_f1=0, score=score)
        for row_hash, score in scores.items()
    ]
    store.put_predictions(f"m{cycle}", f"e{cycle}", answers)
    made = Score(
        cycle_id=cycle, label="candidate", task="shop", version=cycle, model=f"m{cycle}", exam=f"e{cycle}",
        metric="token_f1", score=0, size=len(answers),
    )  # fmt: skip
    store.put_scores([made])


# -- quarantine, both, and from one to the other ------------------------------------------------------


def test_with_quarantine_the_first_answer_counts_and_the_other_is_refused_by_name(store: Store) -> None:
    tell(store, row("nine", 1, id="7"), row("ten", 2), on_conflict="quarantine")
    assert counting(store) == ["nine"]
    (refused,) = store.quarantined()
    assert (refused.reason, refused.detail) == (
        "contradiction", "the answer on record is 'nine', of row '7' from inbox",
    )  # fmt: skip
    assert store.supersessions() == []


def test_a_refusal_names_the_answer_that_counts_and_not_the_first_one(store: Store) -> None:
    tell(store, row("nine", 1), row("ten", 2))
    tell(store, row("eleven", 3), on_conflict="quarantine")
    (refused,) = store.quarantined()
    assert refused.detail.startswith("the answer on record is 'ten'")


def test_with_both_each_answer_counts_and_is_trained_on(store: Store) -> None:
    assert tell(store, row("nine", 1), row("ten", 2), row("nine", 3), on_conflict="both") == 0
    assert [found.answer for found in store.pending([])] == ["nine", "ten"]
    cycle = learn(store, 1, None, [row("nine").hash])
    later = learn(store, 2, 1, [row("ten").hash])
    assert store.pending([cycle, later]) == [], "neither is unlearned by the other"


def test_when_the_setting_changes_what_was_decided_stays_and_the_next_answer_decides_anew(
    store: Store,
) -> None:
    tell(store, row("nine", 1), row("ten", 2), on_conflict="both")
    assert counting(store) == ["nine", "ten"]
    assert tell(store, row("eleven", 3)) == 2
    assert counting(store) == ["eleven"]
    tell(store, row("nine", 4), row("twelve", 5), on_conflict="quarantine")
    assert counting(store) == ["eleven"]
    tell(store, row("ten", 6), on_conflict="both")
    assert counting(store) == ["ten", "eleven"]
    assert tell(store, row("eleven", 5)) == 1
    assert counting(store) == ["ten"]


def test_an_answer_refused_under_quarantine_is_taken_in_when_it_comes_again_under_newest(
    store: Store,
) -> None:
    both = [row("nine", 1), row("ten", 2)]
    tell(store, *both, on_conflict="quarantine")
    assert tell(store, *both) == 1
    assert counting(store) == ["ten"]


# -- learned -----------------------------------------------------------------------------------------


def test_an_answer_that_came_back_is_learned_again_by_whoever_learned_the_other(store: Store) -> None:
    nine, ten = row("nine", 1), row("ten", 2)
    tell(store, nine)
    first = learn(store, 1, None, [nine.hash])
    tell(store, ten)
    assert [found.answer for found in store.pending([first])] == ["ten"]
    tell(store, row("nine", 3))
    assert store.pending([first]) == [], "the model that never learned the other one still knows it"
    tell(store, row("ten", 4))
    second = learn(store, 2, 1, [ten.hash])
    tell(store, row("nine", 5))
    assert [found.answer for found in store.pending([first, second])] == ["nine"]
    assert store.pending_count([first, second]) == 1
    assert store.pending([first]) == [], "after a rollback it is known again"
    third = learn(store, 3, 2, [nine.hash])
    assert store.pending([first, second, third]) == []


def test_labels_of_a_task_are_those_of_rows_that_count(store: Store) -> None:
    tell(store, row("nine", 1), row("ten", 2))
    assert store.answers("shop") == ["ten"]
    assert store.answer_shape("shop") == (1, 1, 1)


# -- whatever comes, in whatever order -------------------------------------------------------------------

LABELS = st.lists(
    st.tuples(
        st.sampled_from(["one?", "two?", " TWO? ", "three?"]),
        st.sampled_from(["a", "A", "b", "c"]),
        st.sampled_from([None, *Split]),
        st.sampled_from(["1", "2", "3"]),
    ),
    min_size=1,
    max_size=12,
)


@given(LABELS, st.randoms(use_true_random=False), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_in_any_order_the_newest_label_survives_and_no_suite_question_is_trained_on(
    labels: list[tuple[str, str, Split | None, str]], order: object, size: int
) -> None:
    rows = [
        row(answer, day, question=question, split=split, id=id)
        for day, (question, answer, split, id) in enumerate(labels)
    ]
    newest = {one.key: one.hash for one in rows}  # the last of each question
    arrived = rows.copy()
    order.shuffle(arrived)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder) / "store.duckdb") as store:
        for start in range(0, len(arrived), size):
            store.accept(arrived[start : start + size], "inbox", shares=SHARES)
        check(store, rows, newest)
        for start in range(0, len(rows), size):  # and delivered again, in another order
            store.accept(rows[start : start + size], "inbox", shares=SHARES)
        check(store, rows, newest)


def check(store: Store, rows: list[Row], newest: dict[str, str]) -> None:
    counts = [found for split in Split for found in store.task_rows("shop", split)]
    assert {found.key: found.hash for found in counts} == newest
    assert len(counts) == len(newest)
    assert {found.hash for found in all_rows(store)} == {one.hash for one in rows}, "nothing is lost"
    splits: dict[str, set[Split]] = {}
    for found in all_rows(store):
        splits.setdefault(found.question_key, set()).add(found.split)
    assert all(len(found) == 1 for found in splits.values())
    examined = {found.question_key for found in store.task_rows("shop", Split.SUITE)}
    assert not examined & {found.question_key for found in store.pending([])}
    lost = latest(store.supersessions())
    assert store.superseded([one.hash for one in rows]) == lost
    assert lost == {one.hash for one in rows} - set(newest.values())


def latest(moves: list[Supersession]) -> set[str]:
    """Rows of which the last word is that they lost their place."""
    by = {move.row_hash: move.by_hash for move in moves}
    return {row_hash for row_hash, successor in by.items() if successor is not None}
