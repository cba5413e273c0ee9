"""The connection under the store: open, migrate, named queries, transactions, and errors in words.

Knows DuckDB and nothing of what the tables mean; only `storage.store`, with its part `storage.row_store`,
may use it. One connection is shared by all threads under one lock, and a transaction holds the lock from
begin to commit.
"""

import fcntl
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Self, TypeVar

import duckdb

from storage import duck
from storage.artifacts import fsync
from storage.errors import StoreBusy, StoreError, first_line, reading

SQL = Path(__file__).parent / "sql"
T = TypeVar("T")

_PATIENCE = 30.0  # seconds for a reader to go
_WHO = "; is a daemon already running? Try `daemon status`"
_HOLDER = re.compile(r"PID (\d+)")
_MIGRATION = re.compile(r"^(\d{3})_\w+\.sql$")

# DuckDB's file lock is between processes only; within this one we keep our own.
_open_here: "weakref.WeakValueDictionary[Path, Database]" = weakref.WeakValueDictionary()
_opening = threading.Lock()


def load_queries(path: Path) -> dict[str, str]:
    """The `-- name: foo` blocks of an SQL file."""
    blocks = re.split(r"^-- name: (\w+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    names, texts = blocks[1::2], blocks[2::2]
    assert len(set(names)) == len(names), "two queries with one name"
    return {name: text.partition(";")[0].strip() for name, text in zip(names, texts, strict=True)}


QUERIES = {
    name: text
    for file in ("queries", "removals", "survey")
    for name, text in load_queries(SQL / f"{file}.sql").items()
}


class Database:
    """A migrated DuckDB file. Open it with `Database.open`."""

    def __init__(self, path: Path, connection: Any) -> None:
        self.path = path
        self._connection = connection  # None while the file is opened anew
        self._closed = False
        self._lock = threading.RLock()
        self._depth = 0

    @classmethod
    def open(cls, path: Path, *, now: datetime, read_only: bool = False, migrations: Path = SQL) -> Self:
        path = path.resolve()
        if read_only and not path.exists():
            raise StoreError(f"there is no store at {path} yet; `daemon run` makes it")
        with _opening:
            holder = _open_here.get(path)
            if holder is not None and not read_only:
                raise StoreBusy(
                    f"this process ({os.getpid()}) already has the store {path} open; close it first"
                )
            database = cls(path, _connect(path, read_only=read_only))
            try:
                _migrate(database, migrations, now=now, read_only=read_only)
            except BaseException:
                database.close()
                raise
            if not read_only:
                _open_here[path] = database
        return database

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._let_go()
        if _open_here.get(self.path) is self:
            del _open_here[self.path]

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, and nobody else in between. A transaction inside another joins it."""
        with self._lock, self._in_words():
            if self._depth == 0:
                self._use().execute("BEGIN TRANSACTION")
            self._depth += 1
            try:
                yield
                if self._depth == 1:
                    self._use().execute("COMMIT")
            except BaseException:
                if self._depth == 1:
                    with suppress(duckdb.Error):  # a failed COMMIT has rolled back by itself
                        self._use().execute("ROLLBACK")
                raise
            finally:
                self._depth -= 1

    def rewrite(self) -> None:
        """Puts a copy in the file's place that has nothing but what is in the tables now.

        A crash leaves the old file or the new one. Raises `StoreBusy` when a reader has the file that is to
        go, and `StoreError` when its journal is still there, which would be taken for the new one's.
        """
        aside = self.path.with_name(f".{self.path.name}.new")
        with self._lock, self._in_words():
            assert self._depth == 0, "a transaction is open"
            leftovers = (aside, aside.with_name(f"{aside.name}.wal"))
            for leftover in leftovers:
                leftover.unlink(missing_ok=True)
            connection = self._use()
            connection.execute("CHECKPOINT")
            name = connection.execute("SELECT current_database()").fetchone()[0]
            quoted = name.replace('"', '""'), str(aside).replace("'", "''")
            try:
                connection.execute(f"ATTACH '{quoted[1]}' AS holdfast_new")
                connection.execute(f'COPY FROM DATABASE "{quoted[0]}" TO holdfast_new')
                connection.execute("DETACH holdfast_new")
                self._let_go()  # writes its journal into the file that goes
                with _alone(self.path):
                    os.replace(aside, self.path)
                    fsync(self.path.parent)  # before there is a journal, which fits the new file only
            except BaseException:  # half a copy on a full disk would keep it full
                self._let_go()
                for leftover in leftovers:
                    leftover.unlink(missing_ok=True)
                raise
            self._use()

    def refresh(self) -> None:
        """Closes the file and opens it again, which writes its journal into it.

        DuckDB 2.0 holds some hundred bytes for each statement that appends (half a megabyte a cycle), and
        gives them back only then. Raises `StoreBusy` when a reader comes in between; the next use tries
        again.
        """
        with self._lock, self._in_words():
            assert self._depth == 0, "a transaction is open"
            self._let_go()
            self._use()

    def rows(self, query: str, given: Any = None, **values: Any) -> list[tuple[Any, ...]]:
        """All rows of a named query."""
        return self._run(query, given, values)[1]

    def value(self, query: str, **values: Any) -> Any:
        """The first column of the first row; None without a row."""
        rows = self.rows(query, **values)
        return rows[0][0] if rows else None

    def all(self, make: Callable[..., T], query: str, given: Any = None, **values: Any) -> list[T]:
        """All rows of a named query, each made into a record from its column names."""
        names, rows = self._run(query, given, values)
        with self.reading(f"the answer to its query {query!r}"):
            return [make(**dict(zip(names, row, strict=True))) for row in rows]

    def one(self, make: Callable[..., T], query: str, **values: Any) -> T | None:
        """The first row as a record; None without a row."""
        records = self.all(make, query, **values)
        return records[0] if records else None

    def script(self, sql: str) -> list[tuple[Any, ...]]:
        """Run SQL that is not one of the named queries: migrations, and looking around."""
        with self._lock, self._in_words():
            return list(self._use().execute(sql).fetchall())

    def reading(self, what: str) -> AbstractContextManager[None]:
        return reading(f"the store {self.path}", what)

    def _run(self, query: str, given: Any, values: dict[str, Any]) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Everything is fetched before the lock is given back: an open result blocks the next query."""
        with self._lock, self._in_words():
            connection = self._use()
            if given is not None:
                connection.register("given", given)
            try:
                connection.execute(QUERIES[query], values or None)
                return [column[0] for column in connection.description], connection.fetchall()
            finally:
                if given is not None:
                    with suppress(duckdb.Error):  # in a failed transaction; the next `given` replaces it
                        connection.unregister("given")

    def _use(self) -> Any:
        if self._closed:
            raise StoreError(f"the store {self.path} is closed")
        if self._connection is None:
            self._connection = _reconnect(self.path)
        return self._connection

    def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except duckdb.Error as error:
            raise StoreError(
                f"the store {self.path} could not be used: {first_line(error)}; "
                "nothing was changed. `daemon doctor` looks for the cause"
            ) from error


def _connect(path: Path, *, read_only: bool) -> Any:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return duck.connect(path, read_only=read_only)
    except OSError as error:
        raise StoreError(f"the folder of the store cannot be made: {error}; check bot.state_dir") from None
    except duckdb.Error as error:
        raise _explain(path, error) from None


def _reconnect(path: Path) -> Any:
    """A command that only reads may have come in between; it is gone in a moment."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return _connect(path, read_only=False)
        except StoreBusy as error:
            if time.monotonic() > deadline:
                raise StoreBusy(
                    f"{str(error).removesuffix(_WHO)}: it came while the daemon opened the store afresh, and "
                    "stays; end it, and the daemon goes on"
                ) from None
            time.sleep(0.05)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Nobody has the file open, nor opens it while the block runs, by the lock that DuckDB itself takes."""
    with open(path, "rb+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreBusy(
                f"another process began to read the store {path}, which is to be replaced"
            ) from None
        journal = path.with_name(f"{path.name}.wal")
        if journal.exists():
            raise StoreError(
                f"{journal} was not written into the store, which is to be replaced; `daemon doctor` looks "
                "for the cause"
            )
        yield


def _explain(path: Path, error: Exception) -> StoreError:
    """Why the file did not open, and what to do about it."""
    text = first_line(error)
    if "set lock" in text or "different configuration" in text:
        holder = _HOLDER.search(str(error))
        process = f"process {holder[1]}" if holder else "another process"
        return StoreBusy(f"{process} holds the store {path}{_WHO}")
    if "Cannot open file" in text or "ermission denied" in text:
        return StoreError(f"the store {path} cannot be opened: {text}; check the owner and mode of the file")
    if "version number" in text:
        return StoreError(
            f"the store {path} was written by another DuckDB: {text}; `pip install --upgrade duckdb` reads it"
        )
    if "WAL" in text:
        return StoreError(
            f"the journal of the store is damaged: {text}; stop the daemon and put your newest backup of "
            f"{path} and {path.name}.wal in their place. Without a backup, move {path.name}.wal aside: the "
            "store then opens without its last changes. `daemon doctor` shows what is there"
        )
    return StoreError(
        f"the store {path} is damaged: {text}; stop the daemon, move {path.name} and {path.name}.wal "
        "aside, put your newest backup in their place, and run `daemon doctor`"
    )


def _migrate(database: Database, folder: Path, *, now: datetime, read_only: bool) -> None:
    """Bring the schema up to date: each migration is one transaction, recorded in it."""
    try:
        applied = _applied(database)
        known = _migrations(folder)
    except StoreError as error:
        if error.__cause__ is not None:  # the file opened, but its pages do not read
            raise _explain(database.path, error.__cause__) from None  # type: ignore[arg-type]
        raise
    if applied > max(known):
        raise StoreError(
            f"the store {database.path} has schema {applied}, this Holdfast knows {max(known)}; "
            "it was written by a newer version; install that one again (docs/operations.md, Upgrading)"
        )
    missing = [number for number in sorted(known) if number > applied]
    if missing and read_only:
        raise StoreError(
            f"the store {database.path} has schema {applied}, this Holdfast needs {max(known)}; "
            "`daemon run` brings it up to date"
        )
    for number in missing:
        with database.transaction():
            database.script(known[number].read_text(encoding="utf-8"))
            database.script(
                f"INSERT INTO schema_migrations VALUES ({number}, TIMESTAMP '{now.isoformat(' ')}')"
            )


def _applied(database: Database) -> int:
    """The highest migration in the file; 0 for an empty file, which is a new one."""
    names = {row[0] for row in database.script("SELECT table_name FROM duckdb_tables()")}
    if not names:
        return 0
    if "schema_migrations" not in names:
        raise StoreError(
            f"{database.path} is a DuckDB file, but not a Holdfast store (it has the tables "
            f"{', '.join(sorted(names)[:5])}); set bot.state_dir to a folder of the daemon's own"
        )
    return int(database.script("SELECT coalesce(max(version), 0) FROM schema_migrations")[0][0])


def _migrations(folder: Path) -> dict[int, Path]:
    found = ((_MIGRATION.match(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in found if match}
