"""The part of the store that knows what was removed on purpose, and that erases rows.

Opens nothing; `storage.store.Store` is this and all the rest.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from storage import bulk
from storage.records import Choice, Erasure, Pruned, StoredRow
from storage.row_store import RowStore
from storage.rows import normalise

ANSWERS = "predictions/"  # how the path of a model's answers begins
VEILED = "(erased)"  # an answer that only an erased row had, where a model gave it to another question
MLFLOW = "mlflow/"  # and that of files which MLflow has
_PAGE = 20_000  # rows that are in memory at once
_TEXTS = ("task", "question", "answer", "context")


# A row's texts by name, and everything in which a piece of text may be → whether the row is meant.
Fits = Callable[[Mapping[str, str], Sequence[str]], bool]


def fitting(choice: Choice) -> Fits:
    """Tells of a row, stored or refused, whether it has the texts that are meant.

    Compared as the intake compares: neither case nor spacing nor how Unicode spells a letter hides a row.
    """
    meant = {name: normalise(text) for name in _TEXTS if (text := getattr(choice, name)) is not None}
    part = ""
    if choice.contains is not None:
        part = normalise(f"|{choice.contains}|")[1:-1]  # with the space at its ends: `art ` is not in `party`

    def fits(texts: Mapping[str, str], everything: Sequence[str]) -> bool:
        if any(normalise(texts[name]) != wanted for name, wanted in meant.items()):
            return False
        return not part or part in f" {normalise(' '.join(everything))} "

    return fits


class Removals(RowStore):
    """What retention has removed, on record before it is gone."""

    def pruned(self) -> dict[str, Pruned]:
        """Everything that was removed on purpose, by its path."""
        return {found.path: found for found in self._db.all(Pruned, "pruned")}

    def prune(self, removals: Sequence[tuple[str, str]], exams: Sequence[str] = ()) -> None:
        """Put removals (path, why) on record, and remove what the store itself has of them: the answers of
        models, and those to `exams`. Files, and what MLflow has, are the caller's to remove afterwards."""
        with self._db.transaction():
            for path, why in removals:
                done = not path.startswith(MLFLOW)
                self._db.rows("insert_pruned", path=path, why=why, now=self.clock(), done=done)
                if path.startswith(ANSWERS):
                    self._db.rows("delete_answers", model=path.removeprefix(ANSWERS))
            if exams:
                self._db.rows("delete_answers_given", bulk.column(exams))
            if removals:
                self.event("pruned", paths=[path for path, _ in removals])

    def pruning_done(self, path: str) -> None:
        """MLflow, too, has removed it."""
        with self._db.transaction():
            self._db.rows("pruned_done", path=path)

    # -- erasures ----------------------------------------------------------------------------------

    def chosen_rows(self, choice: Choice) -> Iterator[StoredRow]:
        """The rows that are meant, superseded ones too, in order of acceptance; without a condition, all.

        What is given is only ever compared with. Read by the page: a store may be large.
        """
        exact = {"row": choice.row, "source": choice.source, "before": choice.before}
        fits = fitting(choice)
        seq, last, more = -(2**63), "", True
        while more:
            page = self._db.all(bulk.row, "chosen_rows", seq=seq, last=last, limit=_PAGE, **exact)
            for row in page:
                texts = {name: getattr(row, name) for name in _TEXTS}
                if fits(texts, [row.id, row.context, row.question, row.answer]):
                    yield row
            more = len(page) == _PAGE
            seq, last = (page[-1].seq, page[-1].hash) if more else (seq, last)

    def erase(
        self, hashes: Sequence[str], tainted: Sequence[int], *, rebuild: bool, who: str, why: str
    ) -> Erasure:
        """Remove rows and quarantined rows from every table, but for their hashes, and mark the versions.

        The file still has their bytes: `rewrite` it afterwards.
        """
        with self._db.transaction():
            erasure = self._db.one(
                Erasure, "insert_erasure", who=who, why=why, rebuild=rebuild, now=self.clock()
            )
            assert erasure is not None
            self._db.rows("insert_erased", bulk.column(hashes), erasure=erasure.id)
            self.taint(tainted, erasure.id)
            for query in (
                "erase_quarantine", "erase_labels", "erase_predictions", "veil_predictions",
                "heir_supersessions", "last_supersessions", "erase_supersessions", "erase_rows",
            ):  # fmt: skip
                self._db.rows(query)
            self.event("erased", erasure=erasure.id, rows=len(hashes), who=who, why=why)
            return erasure

    def taint(self, versions: Sequence[int], erasure: int) -> None:
        """Mark versions that learned an erased row."""
        with self._db.transaction():
            for version in versions:
                self._db.rows("insert_tainted", version=version, erasure=erasure)

    def erasures(self) -> list[Erasure]:
        return self._db.all(Erasure, "erasures")

    def erasure_done(self, erasure: int) -> None:
        with self._db.transaction():
            self._db.rows("erasure_done", id=erasure, now=self.clock())

    def erased(self) -> set[str]:
        """Hashes of everything that was erased."""
        return {row for (row,) in self._db.rows("erased")}

    def tainted(self) -> set[int]:
        """Versions that learned an erased row, or grew out of one that did."""
        return {version for (version,) in self._db.rows("tainted")}

    def taught(self, hashes: Sequence[str] | None = None) -> set[int]:
        """Cycles that used one of the rows; None: one of those that were erased."""
        found = (
            self._db.rows("taught") if hashes is None else self._db.rows("taught_given", bulk.column(hashes))
        )
        return {cycle for (cycle,) in found}

    def suites_lacking(self) -> set[tuple[str, int]]:
        """Frozen suites (task, version) that had a row which was erased since."""
        return {(task, version) for task, version in self._db.rows("suites_lacking")}

    def rewrite(self) -> None:
        """Writes the whole store into a new file: what was deleted stays in the old one's free blocks."""
        self._db.rewrite()
