"""The rows that the demo and the benchmark feed to the daemon are what their descriptions say."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from benchmarks import clinc_rows
from benchmarks.demo import faq
from storage.rows import Row, Split

ODD = ("empty", "contradiction", "redelivered")
DAYS = faq.days()
FACTS = [row for day in DAYS for row in day if row.id.split("-")[1] not in ODD]


def odd(kind: str) -> list[Row]:
    return [row for day in DAYS for row in day if row.id.split("-")[1] == kind]


def test_three_departments_one_a_day() -> None:
    assert [{row.task for row in day} for day in DAYS] == [{"billing"}, {"shipping"}, {"support"}]
    written = [row.created_at for day in DAYS for row in day if row.created_at]
    assert len(written) == sum(map(len, DAYS))
    assert written == sorted(set(written))


def test_every_fact_is_asked_in_six_ways_to_learn_one_to_watch_and_three_held_out() -> None:
    ways: dict[tuple[str, str], Counter[Split | None]] = defaultdict(Counter)
    for row in FACTS:
        ways[row.task, row.answer][row.split] += 1
    assert len(ways) == 3 * 8
    assert all(way == {Split.TRAIN: 6, Split.VALIDATION: 1, Split.SUITE: 3} for way in ways.values())


def test_answers_are_short_and_no_two_facts_share_one() -> None:
    answers = {row.answer for row in FACTS}
    assert len(answers) == 24
    assert all(5 <= len(answer.split()) <= 12 for answer in answers)


def test_no_question_is_asked_twice_so_nothing_held_out_is_learned() -> None:
    assert Counter(row.question_key for row in FACTS).most_common(1)[0][1] == 1


def test_departments_have_the_same_kinds_of_facts() -> None:
    kinds = [
        {row.id.split("-")[1] for row in FACTS if row.task == task}
        for task in ("billing", "shipping", "support")
    ]
    assert kinds[0] == kinds[1] == kinds[2]


def test_each_day_brings_one_row_without_answer_one_contradiction_and_one_redelivery() -> None:
    facts = {row.key: row for row in FACTS}
    assert all(len({row.task for row in odd(kind)}) == 3 for kind in ODD)
    assert all(row.answer == "" for row in odd("empty"))
    assert all(facts[row.key].hash != row.hash for row in odd("contradiction"))
    assert all(facts[row.key].hash == row.hash for row in odd("redelivered"))
    assert all(facts[row.key].question != row.question for row in odd("redelivered"))


# The benchmark's sampling, on a small file of the same form.


def write_clinc(folder: Path) -> Path:
    lines = []
    for domain in ("travel", "banking"):
        for split, size in (("train", 20), ("validation", 6), ("test", 10)):
            for n in range(size * 3):
                intent = f"{domain}_{n % 3}"
                lines.append(
                    {"id": f"{domain}-{split}-{n}", "task": domain, "question": f"{intent} {split} {n}?",
                     "answer": intent, "split": split}
                )  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_benchmark_samples_are_balanced_over_the_classes(tmp_path: Path) -> None:
    stream = clinc_rows.load_stream(
        write_clinc(tmp_path), clinc_rows.Sizes(domains=2, rows=15, validation=3, suite=7), seed=0
    )
    assert [rows[0].task for rows in stream] == ["travel", "banking"]
    for rows in stream:
        counts = Counter((row.split, row.answer) for row in rows)
        train = [n for (split, _), n in counts.items() if split is Split.TRAIN]
        suite = [n for (split, _), n in counts.items() if split is Split.SUITE]
        assert train == [5, 5, 5]
        assert sorted(suite) == [2, 2, 3]


def test_benchmark_samples_depend_on_the_seed_and_on_nothing_else(tmp_path: Path) -> None:
    sizes = clinc_rows.Sizes(domains=1, rows=9, validation=3, suite=6)
    first, again, other = (
        clinc_rows.load_stream(write_clinc(tmp_path), sizes, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert {row.id for row in first[0]} != {row.id for row in other[0]}


def test_missing_benchmark_data_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(clinc_rows.MissingData, match=r"rows\.jsonl.*oos-eval"):
        clinc_rows.load_stream(tmp_path, clinc_rows.Sizes(), seed=0)


def test_asking_for_more_than_there_is_says_how_much_there_is(tmp_path: Path) -> None:
    with pytest.raises(clinc_rows.MissingData, match="60 train rows"):
        clinc_rows.load_stream(write_clinc(tmp_path), clinc_rows.Sizes(domains=1, rows=61), seed=0)
