"""Which rows are new, which are known, and which contradict what is on record.

Pure functions on rows and on what the store has looked up; touches no database.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime

from storage.records import Rejected, StoredRow, rejection_hash
from storage.rows import Row, Split, derive_split, normalise


def sort_out(
    rows: Sequence[tuple[Row, str, str, str]],
    *,
    answers: dict[str, tuple[str, str]],
    splits: dict[str, Split],
    shares: tuple[float, float] | None,
    source: str,
    seq: int,
    now: datetime,
) -> tuple[list[StoredRow], list[Rejected]]:
    """The rows to store, numbered from `seq` + 1, and the rows to quarantine; the others are known.

    `rows` come with their hash, key and question key; `answers` and `splits` are what
    `Store.lookup_keys` found for them. The first answer to a key and the first split of a question
    stay for ever, within the rows too.
    """
    answers, splits = dict(answers), dict(splits)
    fresh: list[StoredRow] = []
    rejected: list[Rejected] = []
    for row, row_hash, key, question_key in rows:
        if key in answers:
            known_hash, answer = answers[key]
            if known_hash != row_hash:
                detail = f"the answer on record is {answer!r}"
                rejected.append(_reject(row, "contradiction", detail, source, now))
            continue
        settled = splits.get(question_key)
        split = row.split or settled or _derive(question_key, shares)
        if settled not in (None, split):
            detail = f"the question is in {settled} already, under another task"
            rejected.append(_reject(row, "split-conflict", detail, source, now))
            continue
        answers[key], splits[question_key] = (row_hash, row.answer), split
        fresh.append(
            StoredRow(
                hash=row_hash, key=key, question_key=question_key, seq=seq + len(fresh) + 1, id=row.id,
                task=row.task, question=row.question, answer=row.answer, context=row.context,
                created_at=row.created_at, split=split, source=source, accepted_at=now,
            )
        )  # fmt: skip
    return fresh, rejected


def spelled_alike(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows with each task under its first spelling: `Billing` and `billing` are one task."""
    first = {normalise(name): name for name in names}
    return [
        row
        if (name := first.setdefault(normalise(row.task), row.task)) == row.task
        else replace(row, task=name)
        for row in rows
    ]


def _derive(question_key: str, shares: tuple[float, float] | None) -> Split:
    assert shares is not None, "a new question without a split needs shares to derive it"
    validation, suite = shares
    return derive_split(question_key, validation=validation, suite=suite)


def _reject(row: Row, reason: str, detail: str, source: str, now: datetime) -> Rejected:
    raw = json.dumps(asdict(row), default=str, ensure_ascii=False, sort_keys=True)
    return Rejected(
        hash=rejection_hash(raw, reason), id=row.id, task=row.task, raw=raw, reason=reason, detail=detail,
        source=source, at=now,
    )  # fmt: skip
