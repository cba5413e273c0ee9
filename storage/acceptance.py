"""Which rows are new, which are known, and which answer of several counts.

Pure functions on rows and on what the store has looked up; touches no database.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta

from storage.records import Answer, Label, OnConflict, Rejected, StoredRow, Supersession, rejection_hash
from storage.rows import Row, Split, derive_split, normalise

AHEAD = timedelta(days=1)  # by which a collector's clock, in another time zone, may be ahead of ours

Keyed = tuple[Row, str, str, str, str]  # a row with its hash, key, question key and words key
Told = tuple[str, datetime | None]  # the row that was told, and the newest time it was told with


@dataclass(frozen=True, kw_only=True)
class OnRecord:
    """What the store knows of a batch of rows of one source; `Store.on_record` looks it up."""

    answers: dict[str, list[Answer]]  # by key, oldest first
    splits: dict[str, Split]  # by question key
    words: dict[str, tuple[Split, str]]  # by words key: the split of a question with them, and its id
    told: dict[tuple[str, str], Told]  # what the source's row with an id said last, by key and id
    erased: frozenset[str] = frozenset()  # hashes of rows that must not come back


@dataclass(kw_only=True)
class Sorted:
    """What becomes of a batch. Numbers (`seq`) of labels and supersessions count from 1 in each batch."""

    fresh: list[StoredRow]
    rejected: list[Rejected]
    labels: list[Label]
    supersessions: list[Supersession]


def sort_out(
    rows: Sequence[Keyed],
    *,
    record: OnRecord,
    shares: tuple[float, float] | None,
    source: str,
    on_conflict: OnConflict,
    seq: int,
    now: datetime,
) -> Sorted:
    """The rows to store, numbered from `seq` + 1, the rows to quarantine, and what is superseded by what.

    The first split of a question stays for ever, within the rows too, and another answer takes it over; so
    does a near-duplicate, a question with the same words. Only the outcome of the whole batch is told: a row
    that lost its place and got it back within it did not change.
    """
    desk = _Desk(record, shares, source, on_conflict, seq, now)
    for keyed in rows:
        desk.take(*keyed)
    return desk.sorted()


def repeats(rows: Sequence[Row], told: Mapping[tuple[str, str], datetime | None]) -> list[bool]:
    """Of each row of a source, whether it only says again what its id said last.

    `told` is that, by hash and id, with its newest time. Where one of two rows with the same id is news,
    their order decides which answer counts, so neither is called a repeat.
    """
    found = []
    for row in rows:
        last = (row.hash, row.id)
        found.append(last in told and not _is_news(row.created_at, told[last]))
    news = {row.id for row, repeated in zip(rows, found, strict=True) if not repeated}
    return [repeated and row.id not in news for row, repeated in zip(rows, found, strict=True)]


class _Desk:
    """Takes one row after the other; remembers what was on record before, and what is now."""

    def __init__(
        self,
        record: OnRecord,
        shares: tuple[float, float] | None,
        source: str,
        on_conflict: OnConflict,
        seq: int,
        now: datetime,
    ) -> None:
        self.shares, self.source, self.on_conflict = shares, source, on_conflict
        self.seq, self.now = seq, now
        self.answers = {key: {a.hash: a for a in found} for key, found in record.answers.items()}
        self.splits, self.words, self.told = dict(record.splits), dict(record.words), dict(record.told)
        self.erased = record.erased
        self.counted = {a.hash: a.counts for found in record.answers.values() for a in found}
        self.fresh: list[StoredRow] = []
        self.rejected: list[Rejected] = []
        self.labels: dict[tuple[str, str], datetime | None] = {}  # by hash and id, the newest last
        self.moved: dict[str, str | None] = {}  # row → the one that took its place; None: it counts

    def take(self, row: Row, row_hash: str, key: str, question_key: str, words_key: str) -> None:
        if row_hash in self.erased:
            return
        last, at = self.told.get((key, row.id), (None, None))
        given = self._time_of(row)
        if last == row_hash and not _is_news(given, at):
            return
        answers = self.answers.get(key, {})
        if at is not None and given is None and row_hash in answers:
            return  # without a time it is no newer than what the same id said with one
        if row_hash not in answers:
            if refusal := self._refusal(row, question_key, words_key, list(answers.values())):
                self.rejected.append(_reject(row, *refusal, self.source, self.now))
                return
            self._store(row, row_hash, key, question_key, words_key)
        self._label(row, given, row_hash, key)
        self._weigh(given, row_hash, self.answers[key])

    def sorted(self) -> Sorted:
        lost = [
            (row_hash, by)
            for row_hash, by in self.moved.items()
            if self.counted.get(row_hash, True) != (by is None)
        ]
        return Sorted(
            fresh=self.fresh,
            rejected=self.rejected,
            labels=[
                Label(row_hash=row_hash, source=self.source, id=row_id, created_at=at, seq=seq)
                for seq, ((row_hash, row_id), at) in enumerate(self.labels.items(), start=1)
            ],
            supersessions=[
                Supersession(seq=seq, row_hash=row_hash, by_hash=by, at=self.now)
                for seq, (row_hash, by) in enumerate(lost, start=1)
            ],
        )

    def _time_of(self, row: Row) -> datetime | None:
        """When the label was given. One in the future is none: its answer could never change."""
        given = row.created_at
        return given if given is not None and given <= self.now + AHEAD else None

    def _refusal(
        self, row: Row, question_key: str, words_key: str, answers: Sequence[Answer]
    ) -> tuple[str, str] | None:
        if answers:
            if self.on_conflict != "quarantine":
                return None
            first = next(answer for answer in answers if answer.counts)
            return (
                "contradiction",
                f"the answer on record is {first.answer!r}, of row {first.id!r} from {first.source}",
            )
        settled = self.splits.get(question_key)
        if row.split in (None, settled):
            return None
        if settled is not None:
            return "split-conflict", f"the question is in {settled} already, under another task"
        near, by = self.words.get(words_key, (row.split, ""))
        if row.split != near and Split.SUITE in (row.split, near):
            return "near-duplicate", f"row {by!r} asks with the same words and is in {near}"
        return None

    def _store(self, row: Row, row_hash: str, key: str, question_key: str, words_key: str) -> None:
        """A question's split is the first that it or a near-duplicate got, whatever a later answer says. It
        is derived from the words: who picks their order does not pick the split of who asks likewise."""
        near = self.words.get(words_key, (None, ""))[0]
        split = self.splits.get(question_key) or row.split or near or _derive(words_key, self.shares)
        self.splits[question_key] = split
        self.words.setdefault(words_key, (split, row.id))
        self.answers.setdefault(key, {})[row_hash] = Answer(
            hash=row_hash, answer=row.answer, id=row.id, source=self.source, created_at=None, counts=True
        )
        self.fresh.append(
            StoredRow(
                hash=row_hash, key=key, question_key=question_key, words_key=words_key,
                seq=self.seq + len(self.fresh) + 1, id=row.id, task=row.task, question=row.question,
                answer=row.answer, context=row.context, created_at=row.created_at, split=split,
                source=self.source, accepted_at=self.now,
            )
        )  # fmt: skip

    def _label(self, row: Row, given: datetime | None, row_hash: str, key: str) -> None:
        before = self.labels.pop((row_hash, row.id), None)
        newest = _newest(before, given)
        self.labels[row_hash, row.id] = newest
        self.told[key, row.id] = (row_hash, newest)
        answer = self.answers[key][row_hash]
        self.answers[key][row_hash] = replace(answer, created_at=_newest(answer.created_at, given))

    def _weigh(self, at: datetime | None, row_hash: str, answers: dict[str, Answer]) -> None:
        """Which of the answers to one question count, now that a label given `at` names one of them."""
        if self.on_conflict == "quarantine":
            return
        given = answers[row_hash].created_at if at else None
        counting = [a for a in answers.values() if a.counts and a.hash != row_hash]
        rivals = counting if self.on_conflict == "newest" else []
        newer = next((rival for rival in rivals if _is_older(given, rival.created_at)), None)
        if newer is not None:
            self._move(answers, row_hash, newer.hash)
            return
        for rival in rivals:
            self._move(answers, rival.hash, row_hash)
        self._move(answers, row_hash, None)

    def _move(self, answers: dict[str, Answer], row_hash: str, by: str | None) -> None:
        answers[row_hash] = replace(answers[row_hash], counts=by is None)
        self.moved[row_hash] = by


def _is_older(given: datetime | None, rival: datetime | None) -> bool:
    """By their times when both have one; else what arrives later is newer."""
    return given is not None and rival is not None and given < rival


def _is_news(given: datetime | None, last: datetime | None) -> bool:
    """Whether a label that was told before is given with a later time."""
    return given is not None and (last is None or given > last)


def _newest(one: datetime | None, other: datetime | None) -> datetime | None:
    return max((time for time in (one, other) if time is not None), default=None)


def spelled_alike(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows with each task under its first spelling: `Billing` and `billing` are one task."""
    first = {normalise(name): name for name in names}
    return [
        row
        if (name := first.setdefault(normalise(row.task), row.task)) == row.task
        else replace(row, task=name)
        for row in rows
    ]


def _derive(words_key: str, shares: tuple[float, float] | None) -> Split:
    assert shares is not None, "a new question without a split needs shares to derive it"
    validation, suite = shares
    return derive_split(words_key, validation=validation, suite=suite)


def _reject(row: Row, reason: str, detail: str, source: str, now: datetime) -> Rejected:
    raw = json.dumps(asdict(row), default=str, ensure_ascii=False, sort_keys=True)
    return Rejected(
        hash=rejection_hash(raw, reason), id=row.id, task=row.task, raw=raw, reason=reason, detail=detail,
        source=source, at=now,
    )  # fmt: skip
