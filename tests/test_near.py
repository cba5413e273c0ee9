"""Near-duplicates: questions with the same words never straddle training and suite."""

import random
import shutil
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon import report
from storage.database import SQL, Database
from storage.records import StoredRow, utcnow
from storage.rows import Row, Split, derive_split, words
from storage.store import Store
from tests.bots import Bot, lesson

SHARES = (0.1, 0.2)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store.duckdb") as opened:
        yield opened


def row(question: str, split: Split | None = None, **fields: str) -> Row:
    return Row(
        **{"id": question[:20], "task": "t", "question": question, "answer": "a", **fields}, split=split
    )  # type: ignore[arg-type]


def everything(store: Store) -> list[StoredRow]:
    return [found for task in store.row_counts() for split in Split for found in store.task_rows(task, split)]


@pytest.mark.parametrize(
    "other",
    [
        "please: what's my balance",
        "What is... my BALANCE, please?!",
        "balance what’s my please",
        "«whats my balance», please",
        "ｗhat's\u200b my/balance;please",
    ],
)
def test_the_same_words_in_any_order_and_punctuation_are_near(other: str) -> None:
    same = {words("what's my balance please"), words("what is my balance please")}
    assert words(other) in same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("where is order 17", "where is order 71"),
        ("is it is it", "is it"),
        ("2 + 3", "2 3"),
        ("कि", "का"),  # the vowel is a combining mark
        ("ที่", "ที"),
        ("über", "uber"),
        ("???", "!!!"),
        ("👍", "👎"),
    ],
)
def test_other_words_are_not_near(one: str, other: str) -> None:
    assert words(one) != words(other)


@given(st.text(), st.randoms(use_true_random=False))
def test_order_and_punctuation_never_matter_and_letters_always_do(text: str, order: random.Random) -> None:
    shuffled = text.split()
    order.shuffle(shuffled)
    if any(unicodedata.category(c)[0] in "LN" for c in text):
        assert words(text) == words(", ".join(shuffled))
        assert words(text) != words(f"{text} x")
    assert words(words(text)) == words(text)


def test_a_training_row_near_a_suite_question_is_quarantined_by_name(store: Store) -> None:
    suite = row("what is my balance", Split.SUITE, id="s1")
    near = row("my balance: what is it? is", Split.TRAIN)
    twin = row("My balance... is WHAT?", Split.TRAIN, answer="other", task="u")
    found = store.accept([suite, near, twin], "inbox")
    assert (found.accepted, found.rejected) == (2, 1)
    (refused,) = store.quarantined()
    assert (refused.reason, refused.detail) == (
        "near-duplicate",
        "row 's1' asks with the same words and is in suite",
    )
    assert [r.question for r in store.pending([])] == [near.question]
    assert store.accept([twin], "inbox").rejected == 1, "in a later batch too"
    assert store.accept([replace(twin, split=Split.SUITE)], "inbox").accepted == 1, "the way out"


def test_a_suite_row_near_a_learned_question_is_quarantined(store: Store) -> None:
    store.accept([row("is my card here", Split.TRAIN), row("is it late", Split.VALIDATION)], "inbox")
    late = [row("my card is here", Split.SUITE), row("it is late?", Split.SUITE)]
    watched = row("here is my card", Split.VALIDATION)  # neither is examined
    found = store.accept([*late, watched], "inbox")
    assert (found.accepted, found.rejected) == (1, 2)
    assert store.quarantine_counts() == {"near-duplicate": 2}
    assert store.task_rows("t", Split.SUITE) == []


def test_without_a_split_of_its_own_a_near_duplicate_goes_where_the_other_is(store: Store) -> None:
    """Nothing is refused, whatever comes first."""
    texts = [f"what is the price of number {n} in town" for n in range(200)]
    mixed = [f"In town, what is number {n}: the price of?" for n in range(200)]
    first = store.accept([row(text) for text in texts[:100] + mixed[100:]], "inbox", shares=SHARES)
    later = store.accept([row(text) for text in mixed[:100] + texts[100:]], "other", shares=SHARES)
    assert (first.accepted, later.accepted, later.rejected) == (200, 200, 0)
    splits: dict[str, list[Split]] = {}
    for found in everything(store):
        splits.setdefault(found.words_key, []).append(found.split)
    assert len(splits) == 200
    assert all(len(found) == 2 and len(set(found)) == 1 for found in splits.values())
    assert {found[0] for found in splits.values()} == {*Split}


def test_who_picks_the_order_of_the_words_does_not_pick_the_split(tmp_path: Path) -> None:
    """Or a row that comes first, in the right order, kept the question of somebody else out of training."""
    given = ["how", "do", "i", "cancel", "an", "order", "that", "was", "sent"]
    for n in range(20):
        random.Random(n).shuffle(given)
        with Store.open(tmp_path / f"{n}.duckdb") as store:
            store.accept([row(" ".join(given))], "inbox", shares=SHARES)
            (found,) = everything(store)
            assert found.split == derive_split(found.words_key, validation=SHARES[0], suite=SHARES[1])


def test_of_several_near_duplicates_the_first_decides_where_the_next_goes(store: Store) -> None:
    rows = [row("is my card here", Split.TRAIN), row("here is my card", Split.VALIDATION)]
    assert store.accept([*rows, row("my card is here")], "inbox", shares=SHARES).accepted == 3
    assert [found.question for found in store.task_rows("t", Split.TRAIN)] == [
        "is my card here", "my card is here",
    ]  # fmt: skip
    watched = store.task_rows("t", Split.VALIDATION)
    assert [found.question for found in watched] == ["here is my card"], "as it asked to"


def test_the_same_question_about_another_context_is_another_question(store: Store) -> None:
    store.accept([row("who is he", Split.SUITE, context="Ann met Bob.")], "inbox")
    other = row("is he who", Split.TRAIN, context="Cid met Dan.")
    assert store.accept([other], "inbox").accepted == 1
    assert store.accept([replace(other, context="bob, met ann")], "inbox").rejected == 1


def test_questions_without_words_are_compared_as_they_are(store: Store) -> None:
    rows = [row("?", Split.SUITE), row("!", Split.TRAIN), row("…", Split.TRAIN), row("👍", Split.TRAIN)]
    assert store.accept(rows, "inbox").accepted == 4


def test_rows_from_before_are_recognised_after_the_upgrade(tmp_path: Path) -> None:
    folder, path = tmp_path / "sql", tmp_path / "old.duckdb"
    folder.mkdir()
    for old in sorted(SQL.glob("00[1-5]_*.sql")):
        shutil.copy(old, folder)
    before = row("what is VAT", Split.SUITE)
    database = Database.open(path, now=utcnow(), migrations=folder)
    for n, spelled in enumerate(("what is VAT", "What is VAT ")):
        made = replace(before, question=spelled, answer=str(n))
        database.script(
            f"INSERT INTO rows VALUES ('{made.hash}', '{made.key}', '{made.question_key}', {n}, 'old', 't', "
            f"'{spelled}', '{n}', '', NULL, 'suite', 'x', TIMESTAMP '2026-01-01')"
        )
    database.close()
    for _ in range(2):
        with Store.open(path) as store:
            assert [found.words_key for found in store.task_rows("t", Split.SUITE)] == [before.words_key] * 2
            assert store.accept([row("VAT is what", Split.TRAIN)], "inbox").rejected == 1


def test_the_cost_grows_with_the_rows_and_not_with_their_square(tmp_path: Path) -> None:
    """Four times the rows take at most ten times the time, by the same machine."""
    took = []
    for size in (2_000, 8_000):
        with Store.open(tmp_path / f"{size}.duckdb") as store:
            store.accept([row(f"suite question {n} here", Split.SUITE) for n in range(size // 10)], "inbox")
            begun = time.process_time()
            for start in range(0, size, 1000):
                batch = [row(f"here question {n} suite", Split.TRAIN) for n in range(start, start + 1000)]
                store.accept(batch, "inbox")
            took.append(time.process_time() - begun)
            assert store.quarantine_counts() == {"near-duplicate": size // 10}
    assert took[1] < 10 * took[0]


def test_a_very_long_question_is_a_question(store: Store) -> None:
    text = " ".join(f"w{n}" for n in range(200_000))
    backwards = " ".join(reversed(text.split()))
    assert store.accept([row(text, Split.SUITE), row(backwards, Split.TRAIN)], "inbox").rejected == 1


def test_a_cycle_says_what_it_kept_out(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    near = [(f"near-{n}", "colours", f"colours {n}: which one is?", "red", "train") for n in range(20, 24)]
    bot.collect(near)
    cycle = bot.run()
    told = "\n".join(report.explain(report.cycle_report(bot.store, cycle.id)))
    assert "4 not accepted (new in quarantine: 4 near-duplicate)" in told
    (published,) = bot.settings.state_dir.rglob("verdict.md")
    assert "4 near-duplicate" in published.read_text()
    learned = {found.question for found in bot.store.rows_by_hash(bot.store.cycle_rows(cycle.id, "train"))}
    assert learned
    assert not learned & {question for _, _, question, _, _ in near}
