"""The part of the store that labeled rows go through: taken in once, judged, superseded, handed out.

Opens nothing; `storage.store.Store` is this and all the rest.
"""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from operator import itemgetter
from typing import Any

from storage import bulk
from storage.acceptance import Keyed, OnRecord, repeats, sort_out, spelled_alike
from storage.database import Database
from storage.errors import IntegrityError
from storage.records import Acceptance, Clock, Cursor, Event, OnConflict, Rejected, StoredRow, Supersession
from storage.rows import Row, Split


class RowStore:
    """Rows and events of a store."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._db = database
        self.clock = clock

    def transaction(self) -> AbstractContextManager[None]:
        """Several changes as one; nothing comes in between."""
        return self._db.transaction()

    def reading(self, what: str) -> AbstractContextManager[None]:
        """What the store has of something, taken apart: damage becomes an `IntegrityError` that names it."""
        return self._db.reading(what)

    # -- rows --------------------------------------------------------------------------------------

    def accept(
        self,
        rows: Sequence[Row],
        source: str,
        *,
        shares: tuple[float, float] | None = None,
        on_conflict: OnConflict = "newest",
    ) -> Acceptance:
        """Store the rows that are new; count the ones known; quarantine the ones that cannot be.

        A row without a split takes the split that its question has already, under any task, or one with
        the same words; a new question takes the split that its content gives with `shares` (validation,
        suite). Another answer to a question takes its split in any case, and `on_conflict` says which of the
        answers count: the newest label, only the first (the row is quarantined), or both. What is superseded
        stays stored.
        Raises `StoreError` when the store cannot be used.
        """
        with self._db.transaction():
            rows = spelled_alike(rows, [name for (name,) in self._db.rows("task_names")])
            keyed = [(row, row.hash, row.key, row.question_key, row.words_key) for row in rows]
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

    def _on_record(self, rows: Sequence[Keyed], source: str) -> OnRecord:
        """What is known of rows of a source."""
        found = self._db.all(bulk.keyed_answer, "answers_given", bulk.column([row[2] for row in rows]))
        splits = self._db.rows("splits_given", bulk.column([row[3] for row in rows]))
        words = self._db.rows("words_given", bulk.column([row[4] for row in rows]))
        told = self._told([row[0] for row in rows], source)
        return OnRecord(
            answers={key: [answer for k, answer in group] for key, group in groupby(found, itemgetter(0))},
            splits={key: Split(split) for key, split in splits},
            words={key: (Split(split), row_id) for key, split, row_id in words},
            told={(key, row_id): (row_hash, at) for key, row_id, row_hash, at in told},
            erased=frozenset(h for (h,) in self._db.rows("erased_given", bulk.column([r[1] for r in rows]))),
        )

    def name_words(self) -> None:
        """Gives rows from before near-duplicates were known what tells them."""
        found = self._db.rows("wordless")
        if found:
            keys = {
                key: Row(id="", task="", question=question, answer="", context=context).words_key
                for key, context, question in found
            }
            with self._db.transaction():
                self._db.rows("set_words", bulk.words(keys))

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
                "store replaced by an older one? `daemon audit` compares it with the state directory"
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

    # -- events ------------------------------------------------------------------------------------

    def event(self, kind: str, cycle_id: int | None = None, **detail: Any) -> None:
        """Note something that happened. Details are JSON values; others are written as text."""
        with self._db.transaction():
            text = json.dumps(detail, default=str, ensure_ascii=False)
            self._db.rows("insert_event", now=self.clock(), kind=str(kind), cycle_id=cycle_id, detail=text)

    def events(self, limit: int = 200, cycle_id: int | None = None, kind: str | None = None) -> list[Event]:
        """The newest events, newest first."""
        return self._db.all(bulk.event, "events", limit=limit, cycle_id=cycle_id, kind=kind)
