"""The part of the store that knows what was removed on purpose.

Opens nothing; `storage.store.Store` is this and all the rest.
"""

from collections.abc import Sequence

from storage import bulk
from storage.records import Pruned
from storage.row_store import RowStore

ANSWERS = "predictions/"  # how the path of a model's answers begins
MLFLOW = "mlflow/"  # and that of files which MLflow has


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
