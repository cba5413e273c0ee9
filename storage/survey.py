"""What an audit asks of the store: questions about all of it at once. Reads, and changes nothing.

Beside `storage.store`, which has what the work needs; the SQL is in `sql/survey.sql`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from storage import bulk
from storage.database import Database


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """A row as a cycle used it. `split` None: the store has no such row."""

    cycle_id: int
    role: str
    row_hash: str
    split: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """How many rows these cycles have all been taught, and the first of them."""

    cycles: tuple[int, ...]
    count: int
    row_hash: str


class Survey:
    """The questions, on an open store. Make it with `Store.survey`."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def divided_questions(self) -> list[tuple[str, str, str]]:
        """Questions in more than one split: (question key, splits, hash of a row)."""
        return [(key, splits, row) for key, splits, row in self._db.rows("divided_questions")]

    def misplaced(self) -> list[Role]:
        """Rows that a cycle used as what their split forbids: a suite row in training, for instance."""
        return [
            Role(cycle_id=cycle, role=role, row_hash=row, split=split)
            for cycle, role, row, split in self._db.rows("misplaced")
        ]

    def lost_rows(self) -> list[Role]:
        """Rows of cycles that the store does not have."""
        return [
            Role(cycle_id=cycle, role=role, row_hash=row) for cycle, role, row in self._db.rows("lost_rows")
        ]

    def learned_by_several(self) -> list[Shared]:
        """Rows that were new to several cycles, by these cycles: right, but for cycles of one lineage.

        Without rows that lost their place to another answer and have it back: those are learned once more.
        """
        return [
            Shared(cycles=tuple(cycles), count=count, row_hash=row)
            for cycles, count, row in self._db.rows("learned_by_several")
        ]

    def unanswered(self) -> list[tuple[str, str]]:
        """Questions all of whose answers are superseded: (key, hash of a row)."""
        return [(key, row) for key, row in self._db.rows("unanswered")]

    def stray_supersessions(self) -> list[tuple[str, str | None]]:
        """(row, the row that took its place) that are not two answers of one question in the store."""
        return [(row, by) for row, by in self._db.rows("stray_supersessions")]

    def ever_superseded(self) -> set[str]:
        """Rows that have lost their place at least once."""
        return {row for (row,) in self._db.rows("ever_superseded")}

    def known(self, hashes: Sequence[str]) -> set[str]:
        """Those of the hashes that are rows of the store."""
        return {row for (row,) in self._db.rows("known_given", bulk.column(hashes))}

    def suite_members(self) -> dict[tuple[str, int], set[str]]:
        """(task, version) to the hashes of the rows that it was frozen with."""
        members: dict[tuple[str, int], set[str]] = {}
        for task, version, row in self._db.rows("suite_members"):
            members.setdefault((task, version), set()).add(row)
        return members

    def suite_questions(self) -> set[str]:
        """Keys of all questions that are kept for examining."""
        return {key for (key,) in self._db.rows("suite_questions")}

    def sat(self) -> dict[tuple[str, str], int]:
        """(model, exam) to the number of answers on record."""
        return {(model, exam): count for model, exam, count in self._db.rows("sat")}
