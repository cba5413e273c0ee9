"""The daemon's own memory: rows, tasks, suites, cycles, models, verdicts, promotions, scores, events.

The only module that opens the daemon's DuckDB (through `storage.database`); its SQL is in
`storage/sql/`. Every method that changes something is one transaction, so that a crash at any moment
leaves either all of it or nothing. It keeps the rules that must never break, whoever calls: a row
once and in one split, a cycle along its arrows, no gate promotion without a passing verdict.
"""

import json
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from storage import bulk
from storage.acceptance import OnRecord, repeats, sort_out, spelled_alike
from storage.database import Database
from storage.errors import IntegrityError, StoreError
from storage.records import (
    TRANSITIONS,
    Acceptance,
    Candidate,
    Clock,
    Cursor,
    Cycle,
    Event,
    ModelVersion,
    OnConflict,
    Prediction,
    Promotion,
    Rejected,
    Score,
    State,
    StoredRow,
    Suite,
    Supersession,
    TaskRecord,
    utcnow,
)
from storage.rows import Row, Split

_ID = "store_id"  # the key in meta


class Store:
    """The store of one bot. Safe to call from several threads; held by one process at a time."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._db = database
        self.clock = clock

    @classmethod
    def open(cls, path: str | Path, *, clock: Clock = utcnow, read_only: bool = False) -> Self:
        """Open the store, making or migrating it where needed.

        Raises `StoreBusy` when another process holds it, `StoreError` when it cannot be used.
        """
        store = cls(Database.open(Path(path), now=clock(), read_only=read_only), clock)
        if not read_only and store.get_meta(_ID) is None:
            store.set_meta(_ID, uuid.uuid4().hex)
        return store

    def close(self) -> None:
        self._db.close()

    @property
    def id(self) -> str:
        """What tells this store from every other one: numbers of cycles begin at 1 in each."""
        return self.get_meta(_ID) or ""

    def transaction(self) -> AbstractContextManager[None]:
        """Several changes as one; nothing comes in between."""
        return self._db.transaction()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- rows ------------------------------------------------------------------------------------

    def accept(
        self,
        rows: Sequence[Row],
        source: str,
        *,
        shares: tuple[float, float] | None = None,
        on_conflict: OnConflict = "newest",
    ) -> Acceptance:
        """Store the rows that are new; count the ones known; quarantine the ones that cannot be.

        A row without a split takes the split that its question has already, under any task; a new
        question takes the split that its content gives with `shares` (validation, suite). Another answer
        to a question takes its split in any case, and `on_conflict` says which of the answers count: the
        newest label, only the first (the row is quarantined), or both. What is superseded stays stored.
        Raises `StoreError` when the store cannot be used.
        """
        with self._db.transaction():
            rows = spelled_alike(rows, [name for (name,) in self._db.rows("task_names")])
            keyed = [(row, row.hash, row.key, row.question_key) for row in rows]
            found = sort_out(
                keyed, record=self._on_record(keyed, source), shares=shares, source=source,
                on_conflict=on_conflict, seq=int(self._db.value("last_row")), now=self.clock(),
            )  # fmt: skip
            if found.fresh:
                self._db.rows("insert_rows", bulk.table(bulk.ROWS, found.fresh))
            if found.labels:
                self._db.rows("put_labels", bulk.table(bulk.LABELS, found.labels))
            superseded = self._supersede(found.supersessions, source)
            self.quarantine(found.rejected)
        accepted, rejected = len(found.fresh), len(found.rejected)
        known = len(rows) - accepted - rejected
        return Acceptance(accepted=accepted, known=known, rejected=rejected, superseded=superseded)

    def _supersede(self, moves: Sequence[Supersession], source: str) -> int:
        """Puts them on record; how many rows lost their place."""
        if moves:
            self._db.rows("insert_supersessions", bulk.table(bulk.SUPERSESSIONS, moves))
        lost = sum(move.by_hash is not None for move in moves)
        if lost:
            self.event("superseded", rows=lost, source=source)
        return lost

    def supersessions(self) -> list[Supersession]:
        """Which row lost its place to which, or has it back, and when; oldest first."""
        return self._db.all(Supersession, "supersessions")

    def superseded(self, hashes: Sequence[str]) -> set[str]:
        """Those of the rows that another answer has superseded."""
        return {row[0] for row in self._db.rows("superseded_given", bulk.column(hashes))}

    def superseded_count(self) -> int:
        return int(self._db.value("superseded_count"))

    def quarantine(self, items: Sequence[Rejected]) -> int:
        """Keep what was not accepted; how many of them are new."""
        if not items:
            return 0
        distinct = list({item.hash: item for item in items}.values())
        with self._db.transaction():
            return int(self._db.rows("insert_quarantine", bulk.table(bulk.QUARANTINE, distinct))[0][0])

    def quarantined(self, limit: int = 100, reason: str | None = None) -> list[Rejected]:
        return self._db.all(Rejected, "quarantined", limit=limit, reason=reason)

    def quarantine_counts(self) -> dict[str, int]:
        return dict(self._db.rows("quarantine_counts"))

    def repeats(self, rows: Sequence[Row], source: str) -> list[bool]:
        """Of each row of a source, whether it only says again what its id said last: nothing to accept."""
        return repeats(rows, {(row_hash, row_id): at for _, row_id, row_hash, at in self._told(rows, source)})

    def _on_record(self, rows: Sequence[tuple[Row, str, str, str]], source: str) -> OnRecord:
        """What is known of rows of a source, given with their hash, key and question key."""
        found = self._db.all(bulk.keyed_answer, "answers_given", bulk.column([row[2] for row in rows]))
        splits = self._db.rows("splits_given", bulk.column([row[3] for row in rows]))
        told = self._told([row[0] for row in rows], source)
        return OnRecord(
            answers={key: [answer for k, answer in group] for key, group in groupby(found, itemgetter(0))},
            splits={key: Split(split) for key, split in splits},
            told={(key, row_id): (row_hash, at) for key, row_id, row_hash, at in told},
        )

    def _told(self, rows: Sequence[Row], source: str) -> list[tuple[Any, ...]]:
        """(key, id, hash, time): what the source's rows with the ids of these said last."""
        return self._db.rows("told_given", bulk.column([row.id for row in rows]), source=source)

    def rows_by_hash(self, hashes: Sequence[str]) -> list[StoredRow]:
        """The rows in the order of the hashes; all of them must be there."""
        found = {row.hash: row for row in self._db.all(bulk.row, "rows_given", bulk.column(hashes))}
        missing = [row_hash for row_hash in hashes if row_hash not in found]
        if missing:
            raise IntegrityError(
                f"{len(missing)} row(s) are not in the store {self._db.path}, first {missing[0]}; was the "
                "store replaced by an older one? `daemon doctor` compares it with the state directory"
            )
        return [found[row_hash] for row_hash in hashes]

    def row_counts(self) -> dict[str, dict[Split, int]]:
        """Rows by task and split, without superseded ones."""
        counts: dict[str, dict[Split, int]] = {}
        for task, split, count in self._db.rows("row_counts"):
            counts.setdefault(task, {})[Split(split)] = count
        return counts

    def answer_shape(self, task: str) -> tuple[int, int, int]:
        """Of the task's answers outside the suite: how many, how many different, words of the longest."""
        rows, distinct, words = self._db.rows("answer_shape", task=task)[0]
        return rows, distinct, words

    def answers(self, task: str) -> list[str]:
        """The task's different answers outside the suite, sorted."""
        return [row[0] for row in self._db.rows("answers", task=task)]

    def task_rows(self, task: str, split: Split) -> list[StoredRow]:
        """The rows of a task in a split, without superseded ones, in order of acceptance."""
        return self._db.all(bulk.row, "task_rows", task=task, split=split)

    def pending(self, lineage: Sequence[int]) -> list[StoredRow]:
        """Training rows that no cycle of the lineage has trained on, in order of acceptance.

        Without superseded ones; but a row that counts again after the lineage has learned another answer is
        pending once more.
        """
        return self._db.all(bulk.row, "pending", split=Split.TRAIN, lineage=list(lineage))

    def pending_count(self, lineage: Sequence[int]) -> int:
        """How many training rows `pending` would give."""
        return int(self._db.value("pending_count", split=Split.TRAIN, lineage=list(lineage)))

    def pending_validation(self, lineage: Sequence[int]) -> list[StoredRow]:
        """Validation rows that no cycle of the lineage has watched, in order of acceptance."""
        return self._db.all(bulk.row, "pending", split=Split.VALIDATION, lineage=list(lineage))

    def cursor(self, source: str) -> Cursor | None:
        return self._db.one(Cursor, "cursor", source=source)

    def save_cursor(self, source: str, cursor: Cursor) -> None:
        with self._db.transaction():
            self._db.rows(
                "save_cursor", source=source, watermark=cursor.watermark,
                full_scan_at=cursor.full_scan_at, pulled_at=cursor.pulled_at,
            )  # fmt: skip

    # -- tasks and suites ------------------------------------------------------------------------

    def tasks(self) -> list[TaskRecord]:
        """All tasks, oldest first."""
        return self._db.all(bulk.task, "tasks")

    def put_task(self, task: TaskRecord) -> None:
        """Insert the task, or update its kind, metric, origin and labels."""
        with self._db.transaction():
            self._db.rows(
                "put_task", name=task.name, kind=str(task.kind), metric=str(task.metric), origin=task.origin,
                labels=json.dumps(sorted(task.labels), ensure_ascii=False), created_at=task.created_at,
            )  # fmt: skip

    def freeze_suite(self, task: str, hashes: Sequence[str], suite_hash: str, cycle_id: int) -> Suite:
        """The next version of a task's suite. Freezing what is frozen already changes nothing."""
        with self._db.transaction():
            latest = self._db.one(Suite, "latest_suite", task=task)
            if latest is not None and latest.hash == suite_hash:
                return latest
            given = bulk.column(hashes)
            strangers = self._db.rows("strangers_given", given, task=task)
            if strangers or not hashes:
                what = (
                    f"row {strangers[0][0]} is not a suite row of it that counts"
                    if strangers
                    else "it has no rows"
                )
                raise IntegrityError(f"the suite of {task!r} was not frozen: {what}; see `daemon doctor`")
            suite = Suite(
                task=task, version=latest.version + 1 if latest else 1, hash=suite_hash,
                size=given.num_rows, frozen_at=self.clock(), cycle_id=cycle_id,
            )  # fmt: skip
            self._db.rows("insert_suite", **asdict(suite))
            self._db.rows("insert_suite_rows", given, task=task, version=suite.version)
            return suite

    def suites(self) -> list[Suite]:
        """Every version of every suite."""
        return self._db.all(Suite, "suites")

    def latest_suites(self) -> dict[str, Suite]:
        return {suite.task: suite for suite in self._db.all(Suite, "latest_suites")}

    def suite_rows(self, task: str, version: int) -> list[StoredRow]:
        """The rows of a frozen suite, sorted by hash."""
        with self._db.transaction():
            suite = self._db.one(Suite, "suite", task=task, version=version)
            rows = self._db.all(bulk.row, "suite_rows", task=task, version=version)
        if suite is None:
            raise StoreError(f"there is no suite {task}@v{version}; `daemon status` names the tasks")
        if len(rows) != suite.size:
            raise IntegrityError(
                f"the suite {task}@v{version} was frozen with {suite.size} rows and has {len(rows)}; "
                "restore the store from a backup and run `daemon doctor`"
            )
        return rows

    # -- cycles ----------------------------------------------------------------------------------

    def request_cycle(self, trigger: str, requested_by: str) -> Cycle:
        with self._db.transaction():
            cycle = self._db.one(
                bulk.cycle, "insert_cycle", trigger=trigger, requested_by=requested_by, now=self.clock()
            )
            assert cycle is not None
            self.event(State.REQUESTED, cycle.id, trigger=trigger, by=requested_by)
            return cycle

    def cycle(self, cycle_id: int) -> Cycle | None:
        return self._db.one(bulk.cycle, "cycle", id=cycle_id)

    def unfinished(self) -> list[Cycle]:
        """Cycles that have not ended, oldest first."""
        return self._db.all(bulk.cycle, "unfinished")

    def cycles(self, limit: int = 50) -> list[Cycle]:
        """The newest cycles, newest first."""
        return self._db.all(bulk.cycle, "cycles", limit=limit)

    def cycles_with(self, snapshot: str) -> list[Cycle]:
        """The cycles that trained on a snapshot, newest first."""
        return self._db.all(bulk.cycle, "cycles_with", snapshot=snapshot)

    def advance(
        self,
        cycle_id: int,
        to: State,
        *,
        reason: str | None = None,
        parent: int | None = None,
        snapshot: str | None = None,
        version: int | None = None,
        rows: Sequence[tuple[str, str]] = (),
        verdict: tuple[bool, str] | None = None,
        candidates: Sequence[Candidate] = (),
        scores: Sequence[Score] = (),
    ) -> Cycle:
        """Record that a cycle has reached a state, with all that belongs to it, in one transaction.

        `rows` are (hash, role), roles `train`, `validation` or `replay`; a row given twice keeps its
        first role. `candidates` are new ones, or what became of known ones; `scores` replace earlier ones.
        What is None stays as it is. Raises `StoreError` for an arrow that does not exist.
        """
        with self._db.transaction():
            before = self._existing_cycle(cycle_id)
            if to not in TRANSITIONS[before.state]:
                raise StoreError(
                    f"cycle {cycle_id} is {before.state} and cannot become {to}; see `daemon history`"
                )
            now = self.clock()
            if verdict is not None:
                passed, text = verdict
                self._db.rows("insert_verdict", cycle_id=cycle_id, passed=passed, verdict=text, now=now)
            if to is State.PROMOTED:
                self._require_passed(cycle_id)
            if rows:
                self._db.rows("insert_cycle_rows", bulk.with_roles(rows), cycle_id=cycle_id)
            for candidate in candidates:
                self._db.rows("put_candidate", **asdict(candidate))
            self.put_scores(scores)
            told = {"reason": reason, "parent": parent, "snapshot": snapshot, "version": version}
            told = {name: value for name, value in told.items() if value is not None}
            started, finished = before.started_at or now, now if to.ended else None
            after = replace(before, state=to, started_at=started, finished_at=finished, **told)  # type: ignore[arg-type]
            self._db.rows("update_cycle", **asdict(after))
            made = {"candidate": candidates[-1].number} if candidates else {}
            self.event(to, cycle_id, **told, **made)
            return after

    def candidates(self, cycle_id: int) -> list[Candidate]:
        """What the cycle has put before the gate, or will; the last one is being worked on."""
        return self._db.all(Candidate, "candidates", cycle_id=cycle_id)

    def count_attempt(self, cycle_id: int) -> int:
        """One more death of the cycle's worker; how many that makes."""
        with self._db.transaction():
            self._existing_cycle(cycle_id)
            return int(self._db.value("count_attempt", id=cycle_id))

    def cycle_rows(self, cycle_id: int, role: str | None = None) -> list[str]:
        """Hashes of the rows of a cycle, by role and hash."""
        return [row[0] for row in self._db.rows("cycle_rows", cycle_id=cycle_id, role=role)]

    def first_learned(self, lineage: Sequence[int]) -> dict[str, int]:
        """The tasks that cycles of a lineage trained on, each with the first of them."""
        return dict(self._db.rows("first_learned", lineage=list(lineage)))

    def is_cancelled(self, cycle_id: int) -> bool:
        """Whether somebody asked for the cycle's end; it outlives the daemon that was told."""
        return bool(self._db.value("is_cancelled", cycle_id=cycle_id))

    def verdict(self, cycle_id: int) -> tuple[bool, str] | None:
        """Whether the cycle's candidate passed, and the whole verdict as JSON."""
        rows = self._db.rows("verdict", cycle_id=cycle_id)
        return (rows[0][0], rows[0][1]) if rows else None

    def _existing_cycle(self, cycle_id: int) -> Cycle:
        cycle = self.cycle(cycle_id)
        if cycle is None:
            raise StoreError(f"there is no cycle {cycle_id}; see `daemon history`")
        return cycle

    def _require_passed(self, cycle_id: int | None) -> None:
        verdict = None if cycle_id is None else self.verdict(cycle_id)
        if verdict is None or not verdict[0]:
            found = "has no verdict" if verdict is None else "did not pass the gate"
            raise StoreError(
                f"not promoted: cycle {cycle_id} {found}, and only a recorded passing verdict promotes by "
                "itself; see `daemon history`"
            )

    # -- models and promotions -------------------------------------------------------------------

    def add_model(self, model: ModelVersion) -> None:
        """Record a version. The same cycle may say it again, but not with another version."""
        with self._db.transaction():
            known = self._db.one(ModelVersion, "model_of_cycle", cycle_id=model.cycle_id)
            if known is not None and known.version != model.version:
                raise StoreError(
                    f"cycle {model.cycle_id} made version {known.version} already, not {model.version}; "
                    "see `daemon history`"
                )
            if known is None:
                self._db.rows("insert_model", **asdict(model))

    def model(self, version: int) -> ModelVersion | None:
        return self._db.one(ModelVersion, "model", version=version)

    def models(self) -> list[ModelVersion]:
        return self._db.all(ModelVersion, "models")

    def lineage(self, version: int | None) -> list[int]:
        """The cycles that made a version: its ancestors' and its own, oldest first. None: none."""
        models = {model.version: model for model in self.models()}
        cycles: list[int] = []
        while version is not None:
            model = models.pop(version, None)  # popped: a loop of parents ends here too
            if model is None:
                raise _no_model(version)
            cycles.append(model.cycle_id)
            version = model.parent
        return cycles[::-1]

    def champion(self) -> Promotion | None:
        """The last line of the promotions: who serves now."""
        return self._db.one(Promotion, "champion")

    def promotions(self) -> list[Promotion]:
        return self._db.all(Promotion, "promotions")

    def promote(
        self, version: int | None, *, cycle_id: int | None, kind: str, who: str, why: str
    ) -> Promotion:
        """Append to the history of `champion`. None is the bare base.

        Saying again what the last line says changes nothing. Kind `gate` needs a passing verdict on
        record for the cycle that made the version.
        """
        with self._db.transaction():
            last = self.champion()
            if last is not None and (last.version, last.cycle_id) == (version, cycle_id):
                return last
            model = None if version is None else self.model(version)
            if version is not None and model is None:
                raise _no_model(version)
            if kind == "gate":
                self._require_passed(cycle_id)
                if model is None or model.cycle_id != cycle_id:
                    raise StoreError(
                        f"not promoted: version {version} was not made by cycle {cycle_id}; "
                        "see `daemon history`"
                    )
            promotion = self._db.one(
                Promotion, "insert_promotion", version=version, previous=last.version if last else None,
                cycle_id=cycle_id, kind=kind, who=who, why=why, now=self.clock(),
            )  # fmt: skip
            assert promotion is not None
            self.event(
                "champion", cycle_id, version=version, previous=promotion.previous, how=kind, who=who, why=why
            )
            return promotion

    # -- evaluation ------------------------------------------------------------------------------

    def put_predictions(self, model: str, exam: str, predictions: Sequence[Prediction]) -> None:
        """Keep what a model answered; answers on record stay."""
        distinct = list({prediction.row_hash: prediction for prediction in predictions}.values())
        if distinct:
            with self._db.transaction():
                self._db.rows(
                    "insert_predictions", bulk.table(bulk.PREDICTIONS, distinct), model=model, exam=exam
                )

    def predictions(self, model: str, exam: str) -> dict[str, Prediction]:
        """What a model answered, by row hash."""
        found = self._db.all(Prediction, "predictions", model=model, exam=exam)
        return {prediction.row_hash: prediction for prediction in found}

    def put_scores(self, scores: Sequence[Score]) -> None:
        """Keep scores; one with the same cycle, label and task is replaced."""
        distinct = list({(score.cycle_id, score.label, score.task): score for score in scores}.values())
        if distinct:
            with self._db.transaction():
                self._db.rows("put_scores", bulk.table(bulk.SCORES, distinct))

    def scores(self, cycle_id: int | None = None) -> list[Score]:
        return self._db.all(Score, "scores", cycle_id=cycle_id)

    def comparable_scores(self, upto: int) -> dict[tuple[str, str], float]:
        """(model, task) to the mean score in the newest exam that it sat up to a cycle.

        Over the rows that every version of the task's suite has had: models that sat different versions are
        compared on the same questions and answers. When nothing is left of the first versions, over what
        every version has had since; models that sat only older ones then have no score.
        """
        return {(model, task): mean for model, task, mean in self._db.rows("comparable_scores", upto=upto)}

    # -- events and meta -------------------------------------------------------------------------

    def event(self, kind: str, cycle_id: int | None = None, **detail: Any) -> None:
        """Note something that happened. Details are JSON values; others are written as text."""
        with self._db.transaction():
            text = json.dumps(detail, default=str, ensure_ascii=False)
            self._db.rows("insert_event", now=self.clock(), kind=str(kind), cycle_id=cycle_id, detail=text)

    def events(self, limit: int = 200, cycle_id: int | None = None, kind: str | None = None) -> list[Event]:
        """The newest events, newest first."""
        return self._db.all(bulk.event, "events", limit=limit, cycle_id=cycle_id, kind=kind)

    def get_meta(self, key: str) -> str | None:
        value = self._db.value("get_meta", key=key)
        return None if value is None else str(value)

    def set_meta(self, key: str, value: str) -> None:
        with self._db.transaction():
            self._db.rows("set_meta", key=key, value=value)


def _no_model(version: int) -> StoreError:
    return StoreError(f"there is no model version {version}; see `daemon history`")
