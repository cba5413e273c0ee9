"""What a stream is: experiences with their rows, and the questions with the answers that are right by then.

Pure records and functions on rows. Every stream passes through `Stream.tidy`, so that no question is
trained on and examined, and an answer that was changed is never offered again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from benchmarks.sampling import FIRST_DAY
from storage.records import StoredRow
from storage.rows import Row, Split
from strategies.contract import Metric, Task, TaskKind


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What arrives at once. `suites` are the questions of tasks that first appear here or changed here."""

    name: str
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    suites: Mapping[str, tuple[Row, ...]]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Experiences in the order in which they are learned."""

    name: str
    order: str
    experiences: tuple[Experience, ...]
    labels: bool = False  # answers are a closed set: the last model is examined with decoding constrained too
    replaced: Mapping[tuple[str, str], str] = field(default_factory=dict)  # (task, new answer) → old answer

    @property
    def tasks(self) -> list[str]:
        """In the order of their first suite: the columns of the accuracy matrix."""
        return list(dict.fromkeys(task for experience in self.experiences for task in experience.suites))

    @property
    def learned_at(self) -> list[int]:
        """For each task, the experience that brings it, counted from 1."""
        return [
            next(n for n, experience in enumerate(self.experiences, 1) if task in experience.suites)
            for task in self.tasks
        ]

    def suite(self, task: str, after: int) -> tuple[Row, ...]:
        """A task's questions with the answers that are right after `after` experiences.

        Before a task arrived its first suite is the one: that is what forward transfer asks.
        """
        versions = [e.suites[task] for e in self.experiences[:after] if task in e.suites]
        if versions:
            return versions[-1]
        return next(e.suites[task] for e in self.experiences if task in e.suites)

    def rows_seen(self, after: int) -> list[Row]:
        """Training rows of the first experiences that still hold: an answer given anew replaces the old."""
        newest = {row.key: row for e in self.experiences[:after] for row in e.train}
        return list(newest.values())

    def past(self, number: int) -> list[Row]:
        """What experience `number` (from 0) may remember: earlier rows that it does not correct."""
        corrected = {row.key for row in self.experiences[number].train}
        return [row for row in self.rows_seen(number) if row.key not in corrected]

    def union(self) -> "Stream":
        """Everything at once, as a stream of one experience: what joint training learns from."""
        watched = {row.key: row for e in self.experiences for row in e.validation}
        last = len(self.experiences)
        everything = Experience(
            name="everything",
            train=tuple(self.rows_seen(last)),
            validation=tuple(watched.values()),
            suites={task: self.suite(task, last) for task in self.tasks},
        )
        return replace(self, experiences=(everything,))

    def tidy(self) -> "Stream":
        """Without rows whose question is examined, or watched and trained on; without repeated rows."""
        examined = {r.question_key for e in self.experiences for rows in e.suites.values() for r in rows}
        watched = {r.question_key for e in self.experiences for r in e.validation} - examined
        return replace(
            self,
            experiences=tuple(
                replace(
                    e,
                    train=_once(r for r in e.train if r.question_key not in examined | watched),
                    validation=_once(r for r in e.validation if r.question_key not in examined),
                    suites={task: _once(rows) for task, rows in e.suites.items()},
                )
                for e in self.experiences
            ),
        )


def labels_task(stream: Stream, task: str) -> Task:
    """The task with its answers as a closed set: those that are right at the end."""
    last = len(stream.experiences)
    answers = {row.answer for row in stream.rows_seen(last) if row.task == task}
    return Task(name=task, kind=TaskKind.LABELS, metric=Metric.ACCURACY, labels=tuple(sorted(answers)))


def free_task(name: str) -> Task:
    return Task(name=name, kind=TaskKind.FREE, metric=Metric.EXACT_MATCH)


def stored(row: Row) -> StoredRow:
    """The row as a store would hand it out: what snapshots are written from."""
    assert row.split is not None
    day = row.created_at or FIRST_DAY
    return StoredRow(
        hash=row.hash,
        key=row.key,
        question_key=row.question_key,
        words_key=row.words_key,
        seq=0,
        id=row.id,
        task=row.task,
        question=row.question,
        answer=row.answer,
        context=row.context,
        created_at=day,
        split=row.split,
        source="benchmark",
        accepted_at=day,
    )


def by_split(rows: Iterable[Row], split: Split) -> list[Row]:
    return [row for row in rows if row.split is split]


def _once(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The first row of every question: a task has one answer to each."""
    kept: dict[str, Row] = {}
    for row in rows:
        kept.setdefault(row.key, row)
    return tuple(kept.values())
