"""The collector's DuckDB, read politely: short read-only openings, one batch each, after a cursor.

The only opener of the collector's file. It never writes, keeps nothing and judges nothing: it hands out
raw rows, and reads some of them more than once rather than miss one. Judging is `storage.intake`'s work.
"""

import os
import random
import re
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb

from storage import duck
from storage.errors import UNREADABLE, SourceBusy, SourceError, SourceMissing, first_line
from storage.records import Clock, Cursor, OnConflict, utcnow

REQUIRED = ("id", "question", "answer")

_HOLDER = re.compile(r"held in (?P<program>.+?) \(PID (?P<pid>\d+)\)")
_NAME_PART = re.compile(r'"(?:[^"]|"")+"|[^."]+')
_EPOCH = datetime(1970, 1, 1)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_ABOUT_VALUES = (duckdb.DataError, duckdb.InvalidInputException)
_AS_TEXT = ("TIME", "DATE", "INTERVAL", "FLOAT", "DECIMAL", "UHUGEINT", "BIT", "BIGNUM")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What the collector calls the fields of a row; "" where it has none."""

    id: str = "id"
    question: str = "question"
    answer: str = "answer"
    task: str = "task"
    context: str = ""
    created_at: str = ""
    split: str = ""

    def named(self) -> dict[str, str]:
        """Field to column name, of those that have one."""
        return {field: name for field, name in asdict(self).items() if name}


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """Where rows come from and what they look like. `path` None: files only."""

    path: Path | None = None
    table: str = "qa"
    columns: Columns = Columns()
    default_task: str = "general"
    on_conflict: OnConflict = "newest"
    # Of tasks whose labels are configured, by normalised name: their spellings without case.
    labels: Mapping[str, Collection[str]] = field(default_factory=dict)
    overlap: timedelta = timedelta(hours=48)
    full_scan_every: timedelta = timedelta(days=7)
    batch_rows: int = 20_000
    busy_timeout: float = 60.0  # seconds, for each opening


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """A row as delivered, by our field names, and where it was.

    With a `problem` there is no row: a piece of the source could not be taken apart, and `values`
    has its text.
    """

    values: dict[str, object]
    location: str
    problem: str = ""


def source_name(path: Path, table: str) -> str:
    """What the store knows a table by: its cursor, and where rows came from."""
    return f"duckdb:{path.absolute()}:{table}"


class DuckDBSource:
    """A table or view in the collector's DuckDB file."""

    def __init__(
        self, spec: SourceSpec, *, clock: Clock = utcnow, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        if spec.path is None:
            raise SourceError("no source is configured; set source.path to your collector's DuckDB file")
        self.spec = spec
        self.path = spec.path.absolute()
        self.name = source_name(spec.path, spec.table)
        self._parts = _split_name(spec.table)
        self._clock = clock
        self._sleep = sleep
        self._started: datetime | None = None
        self._full = True
        self._newest = 0  # microseconds since 1970
        self._last: int | None = None  # row number at the first opening
        self._file = self.path  # what a link led to when a pull began

    def batches(self, cursor: Cursor | None) -> Iterator[list[RawRow]]:
        """The rows since `cursor`, minus the overlap; all rows when a full comparison is due.

        The file is closed while the caller works on a batch. Rows that are written after the first
        opening may wait for the next pull, so that a busy collector cannot keep a pull going for ever. A
        link that is moved to another file meanwhile counts from the next pull on.
        """
        try:
            self._file = self.path.resolve()
        except (OSError, RuntimeError) as error:  # a link that leads back to itself
            raise SourceError(f"{self.path} cannot be followed: {error}; set source.path") from None
        self._started = self._clock()
        self._full = self._needs_full_scan(cursor, self._started)
        self._newest = self._capped(_microseconds(cursor.watermark)) if cursor and cursor.watermark else 0
        since = None if self._full else self._newest - self.spec.overlap // timedelta(microseconds=1)
        self._last = None
        after: int | None = -1
        while after is not None:
            table, after = self._read(since, after)
            # A view has no row numbers to come back to: it is read at once and handed out in slices.
            for start in range(0, table.num_rows, self.spec.batch_rows):
                try:
                    rows = self._raw_rows(table.slice(start, self.spec.batch_rows))
                except UNREADABLE as error:
                    raise self._unreadable(error) from None
                yield rows

    def next_cursor(self, cursor: Cursor | None) -> Cursor:
        """Where the next pull starts, once every batch is safely stored."""
        if self._started is None:
            raise SourceError("nothing was read from the source yet")
        has_times = bool(self.spec.columns.created_at) and self._newest
        return Cursor(
            watermark=_EPOCH + timedelta(microseconds=self._newest) if has_times else None,
            full_scan_at=self._started if self._full or cursor is None else cursor.full_scan_at,
            pulled_at=self._started,
        )

    def _needs_full_scan(self, cursor: Cursor | None, now: datetime) -> bool:
        if not self.spec.columns.created_at or cursor is None:
            return True
        if cursor.watermark is None or cursor.full_scan_at is None:
            return True
        # A negative age means that a clock was put back: nothing is known about the age then.
        return not timedelta() <= now - cursor.full_scan_at < self.spec.full_scan_every

    def _raw_rows(self, table: Any) -> list[RawRow]:
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        numbers = columns.pop("rowid")
        if "created_at" in columns:
            columns["created_at"] = [self._time(value) for value in columns["created_at"]]
        fields = list(columns)
        return [
            RawRow(
                values=dict(zip(fields, values, strict=True)),
                location=self.spec.table if number is None else f"{self.spec.table} rowid {number}",
            )
            for number, *values in zip(numbers, *columns.values(), strict=True)
        ]

    def _time(self, microseconds: int | None) -> datetime | None:
        """A time that was read; also moves the watermark."""
        if microseconds is None:
            return None
        self._newest = max(self._newest, self._capped(microseconds))
        try:
            return _EPOCH + timedelta(microseconds=microseconds)
        except OverflowError:
            return None

    def _capped(self, microseconds: int) -> int:
        """Never beyond now: one row dated 2099 must not hide everything that comes before 2099."""
        assert self._started is not None
        return min(microseconds, _microseconds(self._started))

    def _read(self, since: int | None, after: int) -> tuple[Any, int | None]:
        """One opening: rows as an Arrow table, and the row number to go on from, None at the end."""
        with self._open() as connection:
            try:
                target, types, has_numbers = self._look(connection)
                if has_numbers and self._last is None:
                    highest = connection.execute(f"SELECT coalesce(max(rowid), -1) FROM {target}").fetchall()
                    self._last = int(highest[0][0])
                table = connection.sql(self._query(target, types, since, after)).to_arrow_table()
            except (duckdb.Error, *UNREADABLE) as error:
                raise self._unreadable(error) from None
        return table, self._go_on(table, since, after)

    def _unreadable(self, error: Exception) -> SourceError:
        """Without the value that could not be converted: it is of a row, which somebody may want erased."""
        told = first_line(error)
        if not isinstance(error, duckdb.Error) or isinstance(error, _ABOUT_VALUES):
            told = re.sub("'.*'", "'…'", told)
        elif isinstance(error, duckdb.PermissionException):
            told += "; a view may read tables of its own file only: `daemon ingest` takes in other files"
        return SourceError(
            f"{self.spec.table} in {self.path} cannot be read: {told}; "
            "try the table in DuckDB itself, and check source.table and source.columns"
        )

    def _go_on(self, table: Any, since: int | None, after: int) -> int | None:
        if self._last is None:
            return None
        if since is None:
            return after + self.spec.batch_rows if after + self.spec.batch_rows < self._last else None
        return int(table.column("rowid")[-1].as_py()) if table.num_rows == self.spec.batch_rows else None

    def _query(self, target: str, types: dict[str, str], since: int | None, after: int) -> str:
        """A batch by row numbers, which follow the order of writing as a rule. Where rows moved between
        two openings (deletes, then a checkpoint), the overlap or the next full scan finds them."""
        selected = {
            field: _expression(field, name, types[name.casefold()])
            for field, name in self.spec.columns.named().items()
        }
        numbered = self._last is not None
        columns = [f"{'rowid' if numbered else 'NULL'} AS rowid"]
        columns += [f"{expression} AS {quote(field)}" for field, expression in selected.items()]
        conditions = ["true"]
        if since is not None:
            created = selected["created_at"]
            conditions.append(f"({created} IS NULL OR {created} >= {since})")
        if numbered:
            # All rows: a range of numbers needs no sorting. Few rows of many: the next ones that fit.
            upto = self._last if since is not None else after + self.spec.batch_rows
            conditions.append(f"rowid > {after} AND rowid <= {upto}")
        query = f"SELECT {', '.join(columns)} FROM {target} WHERE {' AND '.join(conditions)}"
        return f"{query} ORDER BY rowid LIMIT {self.spec.batch_rows}" if numbered else query

    def _look(self, connection: Any) -> tuple[str, dict[str, str], bool]:
        """The quoted table, its columns with their types, and whether its rows have numbers."""
        schema, table = self._parts
        found = connection.execute(
            "SELECT schema_name, table_name, true FROM duckdb_tables() "
            "WHERE NOT internal AND database_name = current_database() UNION ALL "
            "SELECT schema_name, view_name, false FROM duckdb_views() "
            "WHERE NOT internal AND database_name = current_database() ORDER BY ALL"
        ).fetchall()
        wanted = (schema.casefold(), table.casefold())
        fitting = [line for line in found if (line[0].casefold(), line[1].casefold()) == wanted]
        if not fitting:
            names = [n if s == "main" else f"{s}.{n}" for s, n, _ in found]
            raise SourceError(
                f"there is no table or view {self.spec.table!r} in {self.path}; it has "
                f"{listed(names)}. Set source.table"
            )
        its_schema, its_name, is_table = fitting[0]
        (catalog,) = connection.execute("SELECT current_database()").fetchone()
        target = ".".join(map(quote, (catalog, its_schema, its_name)))  # a schema may have the file's name
        described = connection.execute(f"DESCRIBE SELECT * FROM {target}").fetchall()
        types = {line[0].casefold(): str(line[1]) for line in described}
        self._require_columns([line[0] for line in described])
        return target, types, is_table and "rowid" not in types

    def _require_columns(self, found: list[str]) -> None:
        known = {name.casefold() for name in found}
        for key, name in self.spec.columns.named().items():
            if name.casefold() not in known:
                optional = "" if key in REQUIRED else ', or to "" when there is none'
                raise SourceError(
                    f"{self.spec.table} in {self.path} has no column {name!r}; it has {listed(found)}. "
                    f"Set source.columns.{key} to the right one{optional}"
                )

    def _open(self) -> Any:
        """A read-only connection; waits for a collector that is writing."""
        waited, pause = 0.0, _FIRST_PAUSE
        if os.path.exists(self._file) and not (os.path.isfile(self._file) or os.path.isdir(self._file)):
            raise SourceError(f"{self._file} is a pipe or a device; set source.path to a DuckDB file")
        while True:
            try:
                connection = duck.connect(self._file, read_only=True)
                connection.execute("SET TimeZone = 'UTC'")  # of texts that name none
                connection.execute("SET enable_external_access = false")  # or a view reads what we may read
                return connection
            except duckdb.Error as error:
                if not _is_busy(error):
                    raise self._explain(error) from None
                left = self.spec.busy_timeout - waited
                if left <= 0:
                    raise self._busy(error) from None
            # Jitter, so that two programs that wait for each other do not keep meeting.
            nap = min(left, pause * random.uniform(0.5, 1.0))
            self._sleep(nap)
            waited, pause = waited + nap, min(2 * pause, _LONGEST_PAUSE)

    def _busy(self, error: Exception) -> SourceBusy:
        holder = _HOLDER.search(str(error))
        who = f"{holder['program']} (PID {holder['pid']})" if holder else "this process or another"
        return SourceBusy(
            f"{who} has {self.path} open for writing; waited {self.spec.busy_timeout:g} s. Let the collector "
            "close its file between writes, or raise source.busy_timeout; the pull will be tried again"
        )

    def _explain(self, error: Exception) -> SourceError:
        text = first_line(error)
        try:
            is_folder = stat.S_ISDIR(self._file.stat().st_mode)
        except PermissionError:
            return SourceError(
                f"{self._file} is in a folder that is closed to this account; put it where it can be read, "
                "and set source.path"
            )
        except OSError as failed:  # of a folder that is not mounted, or whose server is away
            return SourceMissing(
                f"there is no file {self._file} ({failed.strerror}); is its folder mounted? Else set "
                "source.path to your collector's DuckDB and `systemctl reload holdfast`; the pull will be "
                "tried again"
            )
        if is_folder:
            return SourceError(f"{self._file} is a directory; set source.path to the DuckDB file in it")
        from storage.files import SUFFIXES  # which is built on this module

        if self._file.suffix.lower() in SUFFIXES:
            return SourceError(f"{self.path} is no DuckDB file; take it in with `daemon ingest {self.path}`")
        if "version number" in text:
            return SourceError(
                f"{self.path} was written by a newer DuckDB than this one ({duckdb.__version__}): {text}; "
                "`pip install --upgrade duckdb`"
            )
        return SourceError(
            f"{self.path} cannot be opened: {text}; check source.path and the file's permissions"
        )


def quote(name: str) -> str:
    """Any text as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def _split_name(text: str) -> tuple[str, str]:
    """`table` or `schema.table`; a part with a dot or quote in it is written in double quotes."""
    parts = _NAME_PART.findall(text)
    if ".".join(parts) != text or len(parts) not in (1, 2):
        raise SourceError(
            f"source.table = {text!r} is not a table name; write it as table or schema.table, and names "
            'with a dot or a quote in them as "my.table" (quotes doubled)'
        )
    names = [part[1:-1].replace('""', '"') if part.startswith('"') else part.strip() for part in parts]
    return ("main", names[0]) if len(names) == 1 else (names[0], names[1])


def _expression(field: str, name: str, kind: str) -> str:
    return _as_microseconds(name, kind) if field == "created_at" else as_written(name, kind)


def as_written(name: str, kind: str) -> str:
    """How a column is read. Times leave DuckDB as text: Python has no year 290000. So do numbers that Python
    would write in another way, or Arrow not at all. What is not flat stays so, around a text."""
    column, text = quote(name), f"CAST({quote(name)} AS VARCHAR)"
    if kind.endswith("]"):
        return f"CASE WHEN {column} IS NOT NULL THEN [{text}] END"
    if kind.startswith(("STRUCT", "MAP")):
        return f"CASE WHEN {column} IS NOT NULL THEN {{'text': {text}}} END"
    return text if kind.startswith(_AS_TEXT) else column


def _as_microseconds(name: str, kind: str) -> str:
    """A column of times as integers: the same for every kind of timestamp, whatever time zone the
    connection has. NULL for what is no finite time. Named in full: a collector may have a macro like that."""
    if kind == "TIMESTAMP WITH TIME ZONE":
        return f"system.main.epoch_us({quote(name)})"
    if kind.startswith(("TIMESTAMP", "DATE")):  # tried, as there are dates that no timestamp reaches
        return f"system.main.epoch_us(TRY_CAST({quote(name)} AS TIMESTAMP))"
    if kind == "VARCHAR":
        return f"system.main.epoch_us(TRY_CAST({quote(name)} AS TIMESTAMPTZ))"
    raise SourceError(
        f"the column {name!r} is {kind}, not a timestamp; set source.columns.created_at to a TIMESTAMP "
        'column, or to "" to compare all rows at every pull'
    )


def _microseconds(time: datetime) -> int:
    if time.tzinfo is not None:
        time = time.astimezone(UTC).replace(tzinfo=None)
    return (time - _EPOCH) // timedelta(microseconds=1)


def _is_busy(error: Exception) -> bool:
    text = str(error)
    return "set lock on file" in text or "different configuration" in text


def listed(names: list[str], most: int = 20) -> str:
    shown = ", ".join(names[:most]) or "nothing"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
