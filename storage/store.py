"""The daemon's own memory: rows, tasks, suites, cycles, models, verdicts, promotions, scores, events.

The only module that opens the daemon's DuckDB (through `storage.database`); its SQL is in
`storage/sql/`, what it does with labeled rows in `storage.row_store`, and what it knows of removed things in
`storage.removals`. Every method that changes
something is one transaction, so that a crash at any moment leaves either all of it or nothing. It keeps
the rules that must never break, whoever calls: a row once and in one split, a cycle along its arrows, no
gate promotion without a passing verdict.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from storage import bulk
from storage.database import Database
from storage.errors import IntegrityError, StoreError
from storage.records import (
    TRANSITIONS,
    Candidate,
    Clock,
    Cycle,
    ModelVersion,
    Prediction,
    Promotion,
    Score,
    State,
    StoredRow,
    Suite,
    TaskRecord,
    utcnow,
)
from storage.removals import Removals
from storage.survey import Survey

ALL = 2**62  # a limit that is none
_ID = "store_id"  # the key in meta


class Store(Removals):
    """The store of one bot. Safe to call from several threads; held by one process at a time."""

    @classmethod
    def open(cls, path: str | Path, *, clock: Clock = utcnow, read_only: bool = False) -> Self:
        """Open the store, making or migrating it where needed.

        Raises `StoreBusy` when another process holds it, `StoreError` when it cannot be used.
        """
        store = cls(Database.open(Path(path), now=clock(), read_only=read_only), clock)
        try:
            if not read_only:
                store.name_words()
                if store.get_meta(_ID) is None:
                    store.set_meta(_ID, uuid.uuid4().hex)
        except BaseException:  # whoever tries again must not meet this one
            store.close()
            raise
        return store

    def refresh(self) -> None:
        """Gives back what DuckDB gathers in memory while it works; between two cycles."""
        self._db.refresh()

    def close(self) -> None:
        self._db.close()

    @property
    def id(self) -> str:
        """What tells this store from every other one: numbers of cycles begin at 1 in each."""
        return self.get_meta(_ID) or ""

    def survey(self) -> Survey:
        """Questions about the whole store, for an audit."""
        return Survey(self._db)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
                what = f"row {strangers[0][0]} is no suite row that counts" if strangers else "it has no rows"
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
        """The rows of a frozen suite, sorted by hash; without those that were erased since."""
        with self._db.transaction():
            suite = self._db.one(Suite, "suite", task=task, version=version)
            rows = self._db.all(bulk.row, "suite_rows", task=task, version=version)
            erased = int(self._db.value("lacking", task=task, version=version))
        if suite is None:
            raise StoreError(f"there is no suite {task}@v{version}; `daemon status` names the tasks")
        if len(rows) + erased != suite.size:
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

    def join(self, cycle_id: int, trigger: str, requested_by: str) -> Cycle:
        """Who asks for what a schedule has asked for already gets what they would have got alone."""
        with self._db.transaction():
            cycle = replace(self._existing_cycle(cycle_id), trigger=trigger, requested_by=requested_by)
            self._db.rows("update_cycle", **asdict(cycle))
            self.event("joined", cycle_id, trigger=trigger, by=requested_by)
            return cycle

    def cycle(self, cycle_id: int) -> Cycle | None:
        return self._db.one(bulk.cycle, "cycle", id=cycle_id)

    def unfinished(self) -> list[Cycle]:
        """Cycles that have not ended, oldest first."""
        return self._db.all(bulk.cycle, "unfinished")

    def cycles(self, limit: int = 50) -> list[Cycle]:
        """The newest cycles, newest first."""
        return self._db.all(bulk.cycle, "cycles", limit=limit)

    def last_ended(self) -> Cycle | None:
        """The cycle that ended last, whichever began first."""
        return self._db.one(bulk.cycle, "last_ended")

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
            if snapshot is not None:  # one that was pruned is there again
                self._db.rows("unprune", path=f"snapshots/{snapshot}")
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
            if version in self.tainted():
                raise StoreError(f"version {version} learned a row that was erased; see `daemon history`")
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

    # -- meta -------------------------------------------------------------------------

    def get_meta(self, key: str) -> str | None:
        value = self._db.value("get_meta", key=key)
        return None if value is None else str(value)

    def set_meta(self, key: str, value: str) -> None:
        with self._db.transaction():
            self._db.rows("set_meta", key=key, value=value)


def _no_model(version: int) -> StoreError:
    return StoreError(f"there is no model version {version}; see `daemon history`")
