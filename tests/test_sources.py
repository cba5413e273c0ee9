"""Reading somebody else's DuckDB: what is new, what came late, and a collector that is busy."""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest

from storage.errors import SourceBusy, SourceError, SourceMissing
from storage.records import Cursor
from storage.sources import Columns, DuckDBSource, SourceSpec

NOW = datetime(2026, 3, 1, 2, 30)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
TIMED = Columns(created_at="created_at")


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


class Reader:
    """Pulls as the daemon does, with a clock of its own."""

    def __init__(self, spec: SourceSpec) -> None:
        self.spec = spec
        self.clock = Clock()
        self.cursor: Cursor | None = None

    def pull(self) -> list[str]:
        source = DuckDBSource(self.spec, clock=self.clock, sleep=no_sleep)
        ids = [str(row.values["id"]) for batch in source.batches(self.cursor) for row in batch]
        self.cursor = source.next_cursor(self.cursor)
        return ids


def no_sleep(seconds: float) -> None:
    raise AssertionError("nobody holds the file, so nothing should wait")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qa.duckdb"


def write(path: Path, *statements: str) -> None:
    with duckdb.connect(str(path)) as connection:
        for statement in statements:
            connection.execute(statement)


def timed_table(path: Path, *rows: tuple[str, datetime | None]) -> None:
    write(
        path,
        "CREATE TABLE IF NOT EXISTS qa "
        "(id TEXT, task TEXT, question TEXT, answer TEXT, created_at TIMESTAMP)",
    )
    with duckdb.connect(str(path)) as connection:
        for name, created_at in rows:
            connection.execute("INSERT INTO qa VALUES (?, 't', ?, 'a', ?)", [name, name, created_at])


def values(spec: SourceSpec) -> list[dict[str, Any]]:
    source = DuckDBSource(spec, clock=Clock(), sleep=no_sleep)
    return [dict(row.values) for batch in source.batches(None) for row in batch]


# -- what a pull reads ---------------------------------------------------------------------------


def test_a_pull_reads_what_is_new_and_an_overlap_of_what_is_not(path: Path) -> None:
    timed_table(path, ("old", NOW - 9 * DAY), ("recent", NOW - HOUR))
    reader = Reader(SourceSpec(path=path, columns=TIMED))
    assert reader.pull() == ["old", "recent"]
    timed_table(path, ("new", NOW))
    assert reader.pull() == ["recent", "new"]


def test_a_late_row_within_the_overlap_is_found_at_the_next_pull(path: Path) -> None:
    timed_table(path, ("first", NOW - HOUR))
    reader = Reader(SourceSpec(path=path, columns=TIMED))
    reader.pull()
    timed_table(path, ("late", NOW - 40 * HOUR))
    assert "late" in reader.pull()


def test_a_row_later_than_the_overlap_is_found_by_the_next_full_scan(path: Path) -> None:
    timed_table(path, ("first", NOW - HOUR))
    reader = Reader(SourceSpec(path=path, columns=TIMED))
    reader.pull()
    timed_table(path, ("very late", NOW - 90 * DAY))
    assert reader.pull() == ["first"]
    reader.clock.now += 7 * DAY
    assert reader.pull() == ["first", "very late"]
    assert reader.pull() == ["first"]


def test_a_clock_that_was_put_back_leads_to_a_full_scan(path: Path) -> None:
    timed_table(path, ("old", NOW - 60 * DAY), ("new", NOW - HOUR))
    reader = Reader(SourceSpec(path=path, columns=TIMED))
    reader.pull()
    reader.clock.now -= 30 * DAY
    assert reader.pull() == ["old", "new"]


def test_a_row_from_the_future_hides_nothing(path: Path) -> None:
    timed_table(path, ("typo", datetime(2099, 1, 1)), ("now", NOW))
    reader = Reader(SourceSpec(path=path, columns=TIMED, overlap=timedelta()))
    reader.pull()
    reader.clock.now += HOUR
    timed_table(path, ("after", NOW + HOUR))
    assert "after" in reader.pull()


def test_without_an_overlap_rows_of_the_same_instant_are_not_lost(path: Path) -> None:
    timed_table(path, ("one", NOW - HOUR))
    reader = Reader(SourceSpec(path=path, columns=TIMED, overlap=timedelta()))
    reader.pull()
    timed_table(path, ("two", NOW - HOUR))
    assert reader.pull() == ["one", "two"]


def test_rows_without_a_time_are_read_every_time(path: Path) -> None:
    timed_table(path, ("timed", NOW), ("timeless", None))
    reader = Reader(SourceSpec(path=path, columns=TIMED, overlap=timedelta()))
    reader.pull()
    timed_table(path, ("another", None))
    assert reader.pull() == ["timed", "timeless", "another"]


def test_without_a_time_column_everything_is_compared(path: Path) -> None:
    timed_table(path, ("a", NOW - 99 * DAY), ("b", NOW))
    reader = Reader(SourceSpec(path=path))
    assert reader.pull() == ["a", "b"]
    assert reader.pull() == ["a", "b"]
    assert reader.cursor == Cursor(watermark=None, full_scan_at=NOW, pulled_at=NOW)


@pytest.mark.parametrize(
    ("kind", "text", "expected", "watermark"),
    [
        (kind, text, time, time)
        for kind, text, time in [
            ("TIMESTAMP", "2026-02-01 10:00:00.123456", datetime(2026, 2, 1, 10, 0, 0, 123456)),
            ("TIMESTAMPTZ", "2026-02-01 10:00:00+02", datetime(2026, 2, 1, 8)),
            ("TIMESTAMP_S", "2026-02-01 10:00:00", datetime(2026, 2, 1, 10)),
            ("TIMESTAMP_NS", "2026-02-01 10:00:00.000001", datetime(2026, 2, 1, 10, 0, 0, 1)),
            ("DATE", "2026-02-01", datetime(2026, 2, 1)),
            ("VARCHAR", "2026-02-01T10:00:00", datetime(2026, 2, 1, 10)),
            ("VARCHAR", "2026-02-01T10:00:00+02:00", datetime(2026, 2, 1, 8)),
            ("VARCHAR", "2026-02-01 10:00:00-05", datetime(2026, 2, 1, 15)),
            ("VARCHAR", "2026-02-01T10:00:00Z", datetime(2026, 2, 1, 10)),
            ("VARCHAR", "last week", None),
            ("DATE", "5000000-01-01", None),
            ("TIMESTAMP", "infinity", None),
            ("TIMESTAMP", "-infinity", None),
        ]
    ]
    + [
        ("TIMESTAMP", "290000-01-01 00:00:00", None, NOW),
        ("TIMESTAMP_S", "290000-01-01 00:00:00", None, NOW),
        ("TIMESTAMP", "2027-01-01 00:00:00", datetime(2027, 1, 1), NOW),
        ("TIMESTAMP", "1960-01-01 00:00:00", datetime(1960, 1, 1), None),
    ],
)
def test_every_kind_of_time_is_understood_and_none_breaks_the_pull(
    path: Path, kind: str, text: str, expected: datetime | None, watermark: datetime | None
) -> None:
    write(
        path,
        f"CREATE TABLE qa (id INT, task TEXT, question TEXT, answer TEXT, created_at {kind})",
        f"INSERT INTO qa VALUES (1, 't', 'q', 'a', '{text}')",
    )
    source = DuckDBSource(SourceSpec(path=path, columns=TIMED), clock=Clock())
    (batch,) = source.batches(None)
    assert batch[0].values["created_at"] == expected
    cursor = source.next_cursor(None)
    assert cursor.watermark == watermark
    assert sum(map(len, source.batches(cursor))) == 1


def test_a_schema_may_have_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "app.duckdb"
    write(
        path,
        "CREATE SCHEMA app.app",
        "CREATE TABLE app.app.qa (id INT, task TEXT, question TEXT, answer TEXT)",
        "INSERT INTO app.app.qa VALUES (1, 't', 'q', 'a')",
    )
    (batch,) = DuckDBSource(SourceSpec(path=path, table="app.qa"), clock=Clock()).batches(None)
    assert batch[0].values["question"] == "q"


def test_a_link_to_itself_is_told_in_words(tmp_path: Path) -> None:
    path = tmp_path / "qa.duckdb"
    path.symlink_to(path)
    with pytest.raises(SourceError, match=r"qa\.duckdb.* set source\.path"):
        list(DuckDBSource(SourceSpec(path=path), clock=Clock()).batches(None))


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        ("FLOAT", "0.1", "0.1"),
        ("DECIMAL(18,10)", "0.0000001", "0.0000001000"),
        ("DECIMAL(18,2)", "12.50", "12.50"),
        ("UHUGEINT", "340282366920938463463374607431768211455", "340282366920938463463374607431768211455"),
        ("BIT", "'101'", "101"),
        ("BIGINT", "9007199254740993", 9007199254740993),
        ("DOUBLE", "0.1", 0.1),
    ],
)
def test_numbers_are_answers_as_the_collector_writes_them(
    path: Path, kind: str, value: str, told: object
) -> None:
    write(
        path,
        f"CREATE TABLE qa (id INT, task TEXT, question TEXT, answer {kind})",
        f"INSERT INTO qa VALUES (1, 't', 'q', {value})",
    )
    (row,) = values(SourceSpec(path=path))
    assert row["answer"] == told


def test_a_number_is_not_taken_for_a_time(path: Path) -> None:
    write(path, "CREATE TABLE qa (id INT, task TEXT, question TEXT, answer TEXT, created_at BIGINT)")
    with pytest.raises(SourceError, match=r"'created_at' is BIGINT.*source.columns.created_at"):
        values(SourceSpec(path=path, columns=TIMED))


@pytest.mark.parametrize("rows", [0, 1, 9, 10, 11, 25, 70])
def test_batches_together_are_the_table(path: Path, rows: int) -> None:
    write(
        path,
        "CREATE TABLE qa AS SELECT i AS id, 't' AS task, 'q' || i AS question, 'a' AS answer "
        f"FROM range({rows}) AS r(i)",
        "DELETE FROM qa WHERE id % 7 = 3 OR id BETWEEN 30 AND 62",
    )
    source = DuckDBSource(SourceSpec(path=path, batch_rows=10))
    batches = list(source.batches(None))
    assert [row.values["id"] for batch in batches for row in batch] == [
        i for i in range(rows) if i % 7 != 3 and not 30 <= i <= 62
    ]
    assert all(0 < len(batch) <= 10 for batch in batches)


def test_columns_of_any_type_arrive(path: Path) -> None:
    write(
        path,
        "CREATE TYPE skill AS ENUM ('billing', 'returns')",
        "CREATE TABLE qa "
        "(id UUID, task skill, question TEXT, answer DECIMAL(6, 2), context JSON, split DATE)",
        "INSERT INTO qa VALUES ('2b6f7b0e-0000-4000-8000-000000000001', 'billing', 'how much?', 12.5, "
        "'{\"a\": 1}', 'infinity')",
    )
    (row,) = values(SourceSpec(path=path, columns=Columns(context="context", split="split")))
    assert str(row["id"]) == "2b6f7b0e-0000-4000-8000-000000000001"
    assert (row["task"], str(row["answer"]), row["context"]) == ("billing", "12.50", '{"a": 1}')
    assert row["split"] == "infinity"


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("STRUCT(a DATE, b INT[])", "{'a': DATE '290000-01-01', 'b': [1]}"),
        ("MAP(TEXT, DATE)", "MAP {'a': DATE '290000-01-01'}"),
        ("DATE[]", "[DATE '290000-01-01']"),
        ("DATE[1]", "[DATE '290000-01-01']"),
    ],
)
def test_what_is_not_flat_stays_so_whatever_is_in_it(path: Path, kind: str, value: str) -> None:
    """The intake refuses the row, and not the pull."""
    write(
        path,
        f"CREATE TABLE qa (id INT, task TEXT, question TEXT, answer {kind})",
        f"INSERT INTO qa VALUES (1, 't', 'q', {value}), (2, 't', 'q', NULL)",
    )
    odd, none = values(SourceSpec(path=path))
    assert isinstance(odd["answer"], dict | list)
    assert "290000-01-01" in str(odd["answer"])
    assert none["answer"] is None


def test_a_macro_of_the_collectors_is_not_taken_for_ours(path: Path) -> None:
    timed_table(path, ("a", NOW))
    write(path, "CREATE MACRO epoch_us(x) AS 'yesterday'")
    assert values(SourceSpec(path=path, columns=TIMED))[0]["created_at"] == NOW


# -- names ---------------------------------------------------------------------------------------

ODD = ['we"ird', "semi;colon --", "space name", "naïve", "select", "dot.ted", "'quoted'"]


@pytest.mark.parametrize("name", ODD)
def test_odd_names_are_only_names(path: Path, name: str) -> None:
    quoted = '"' + name.replace('"', '""') + '"'
    write(
        path,
        f"CREATE SCHEMA {quoted}",
        f"CREATE TABLE {quoted}.{quoted} (id INT, {quoted} TEXT, answer TEXT)",
        f"INSERT INTO {quoted}.{quoted} VALUES (1, 'q', 'a')",
    )
    spec = SourceSpec(path=path, table=f"{quoted}.{quoted}", columns=Columns(question=name, task=""))
    assert values(spec) == [{"id": 1, "question": "q", "answer": "a"}]


@pytest.mark.parametrize("table", ["qa; DROP TABLE qa", "qa) UNION SELECT 1 --", "main.qa WHERE 1=1"])
def test_a_table_name_cannot_carry_a_statement(path: Path, table: str) -> None:
    timed_table(path, ("a", NOW))
    with pytest.raises(SourceError, match="there is no table or view"):
        values(SourceSpec(path=path, table=table))
    assert len(values(SourceSpec(path=path))) == 1


@pytest.mark.parametrize("table", ["a.b.c", 'un"closed', "a..b", ".", '"qa" x'])
def test_a_name_that_is_none_is_refused_with_how_to_write_it(path: Path, table: str) -> None:
    with pytest.raises(SourceError, match="is not a table name; write it as"):
        DuckDBSource(SourceSpec(path=path, table=table))


def test_names_are_found_in_any_case_as_in_sql(path: Path) -> None:
    write(path, "CREATE TABLE QA (ID INT, Task TEXT, Question TEXT, ANSWER TEXT)")
    write(path, "INSERT INTO qa VALUES (1, 't', 'q', 'a')")
    (row,) = values(SourceSpec(path=path, table="Main.Qa"))
    assert row == {"id": 1, "task": "t", "question": "q", "answer": "a"}


def test_a_missing_table_is_named_with_those_that_exist(path: Path) -> None:
    timed_table(path)
    write(path, "CREATE SCHEMA bot", "CREATE VIEW bot.labeled AS SELECT * FROM qa")
    with pytest.raises(SourceError, match=r"no table or view 'labels' in .*; it has bot\.labeled, qa\."):
        values(SourceSpec(path=path, table="labels"))


def test_a_missing_column_is_named_with_those_that_exist(path: Path) -> None:
    write(path, "CREATE TABLE qa (id INT, question TEXT, reply TEXT)")
    with pytest.raises(SourceError, match=r"no column 'answer'; it has id, question, reply.*columns.answer"):
        values(SourceSpec(path=path))
    with pytest.raises(SourceError, match=r'no column \'task\'.*columns.task to the right one, or to ""'):
        values(SourceSpec(path=path, columns=Columns(answer="reply")))


def test_a_column_called_rowid_does_not_confuse_the_paging(path: Path) -> None:
    write(
        path,
        "CREATE TABLE qa AS SELECT i AS id, 't' AS task, 'q' AS question, 'a' AS answer, 5 AS rowid "
        "FROM range(25) AS r(i)",
    )
    assert len(values(SourceSpec(path=path, batch_rows=10))) == 25


def test_views_are_read_and_sliced(path: Path) -> None:
    timed_table(path, *[(str(n), NOW - n * DAY) for n in range(5)])
    write(path, "CREATE VIEW asked AS SELECT * FROM qa WHERE id <> '3'")
    spec = SourceSpec(path=path, table="asked", columns=TIMED, batch_rows=2)
    assert [len(batch) for batch in DuckDBSource(spec, clock=Clock()).batches(None)] == [2, 2]
    reader = Reader(spec)
    reader.pull()
    assert reader.pull() == ["0", "1", "2"]


def test_a_view_on_a_table_that_is_gone_is_an_error_in_words(path: Path) -> None:
    timed_table(path)
    write(path, "CREATE VIEW asked AS SELECT * FROM qa", "DROP TABLE qa")
    with pytest.raises(SourceError, match=r"asked in .* cannot be read: .*qa"):
        values(SourceSpec(path=path, table="asked"))


def test_a_view_reads_no_other_file_than_its_own(path: Path, tmp_path: Path) -> None:
    """Or whoever may write views had what the daemon may read: its config, its environment, its home."""
    (tmp_path / "secret").write_text("s3cret")
    write(
        path,
        f"CREATE VIEW qa AS SELECT 1 AS id, 't' AS task, 'q' AS question, content AS answer "
        f"FROM read_text('{tmp_path}/secret')",
    )
    with pytest.raises(SourceError, match="disabled by configuration; a view may read tables of its own"):
        values(SourceSpec(path=path))


def test_an_error_does_not_repeat_the_value_that_caused_it(path: Path) -> None:
    write(
        path,
        "CREATE TABLE told (id TEXT)",
        "INSERT INTO told VALUES ('it''s 0171-555')",
        "CREATE VIEW qa AS SELECT id::INT AS id, 't' AS task, 'q' AS question, 'a' AS answer FROM told",
    )
    with pytest.raises(SourceError, match=r"Could not convert string '…' to INT32") as told:
        values(SourceSpec(path=path))
    assert "0171" not in str(told.value)


# -- the file ------------------------------------------------------------------------------------


def test_without_a_path_the_error_says_what_to_set() -> None:
    with pytest.raises(SourceError, match=r"set source\.path"):
        DuckDBSource(SourceSpec())


def test_a_missing_file_is_an_error_and_is_not_made(path: Path) -> None:
    for absent in (path, path.parent / "not mounted" / path.name):
        with pytest.raises(SourceMissing, match=f"there is no file {re.escape(str(absent))}.*tried again"):
            values(SourceSpec(path=absent))
        assert not absent.exists()


def test_a_folder_in_the_place_of_the_file_is_told(path: Path) -> None:
    with pytest.raises(SourceError, match=r"is a directory; set source\.path to the DuckDB file in it"):
        values(SourceSpec(path=path.parent))


def test_a_pipe_in_the_place_of_the_file_is_told_and_not_waited_for(path: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    path.symlink_to(tmp_path / "pipe")
    with pytest.raises(SourceError, match=f"{tmp_path}/pipe is a pipe or a device; set source"):
        values(SourceSpec(path=path))


def test_a_file_in_a_closed_folder_is_not_called_missing(path: Path) -> None:
    closed = path.parent / "closed"
    closed.mkdir(mode=0)
    account = os.geteuid()
    if account == 0:
        os.seteuid(65534)  # root is let in everywhere
    try:
        with pytest.raises(SourceError, match=r"is closed to this account; .*set source\.path"):
            values(SourceSpec(path=closed / "qa.duckdb"))
    finally:
        os.seteuid(account)


def test_a_file_that_is_no_database_is_an_error_in_words(path: Path) -> None:
    path.write_text("id,question,answer\n" * 500)
    with pytest.raises(SourceError, match="not a valid DuckDB database"):
        values(SourceSpec(path=path))


@pytest.mark.parametrize("version", ["v1.0.0", "latest"])
def test_reading_changes_nothing_in_the_file_and_keeps_its_storage_version(path: Path, version: str) -> None:
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{path}' AS c (STORAGE_VERSION '{version}')")
        connection.execute("CREATE TABLE c.qa (id INT, task TEXT, question TEXT, answer TEXT)")
        connection.execute("INSERT INTO c.qa VALUES (1, 't', 'q', 'a')")
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(values(SourceSpec(path=path))) == 1
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_rows_that_a_killed_collector_left_in_its_log_are_read(path: Path) -> None:
    code = (
        "import duckdb, os, sys\n"
        "c = duckdb.connect(sys.argv[1])\n"
        "c.execute('CREATE TABLE qa (id INT, task TEXT, question TEXT, answer TEXT)')\n"
        "c.execute(\"INSERT INTO qa VALUES (1, 't', 'q', 'a')\")\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    log = path.with_name(path.name + ".wal")
    assert log.exists()
    before = log.read_bytes()
    assert len(values(SourceSpec(path=path))) == 1
    assert log.read_bytes() == before


# -- a collector that is busy ----------------------------------------------------------------------

HOLDER = """
import duckdb, sys
connection = duckdb.connect(sys.argv[1])
print("holding", flush=True)
for line in sys.stdin:
    connection.execute(line)
    print("done", flush=True)
"""


class Collector:
    """A real second process that has the file open for writing."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "holding\n"

    def execute(self, statement: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(statement + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture
def collector(path: Path) -> Iterator[Collector]:
    timed_table(path, ("a", NOW))
    holder = Collector(path)
    yield holder
    if holder.process.poll() is None:
        holder.close()


def test_a_busy_collector_is_waited_for(path: Path, collector: Collector) -> None:
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 4:
            collector.execute("INSERT INTO qa VALUES ('b', 't', 'b', 'a', NULL)")
            collector.close()

    source = DuckDBSource(SourceSpec(path=path), clock=Clock(), sleep=sleep)
    assert [row.values["id"] for batch in source.batches(None) for row in batch] == ["a", "b"]
    assert len(naps) == 4
    assert 0.025 <= naps[0] <= 0.05
    assert 0.2 <= naps[3] <= 0.4


def test_a_collector_that_never_lets_go_is_named_by_its_pid(path: Path, collector: Collector) -> None:
    naps: list[float] = []
    source = DuckDBSource(SourceSpec(path=path, busy_timeout=30.0), clock=Clock(), sleep=naps.append)
    with pytest.raises(SourceBusy, match=rf"PID {collector.process.pid}\).*waited 30 s.*source.busy_timeout"):
        list(source.batches(None))
    assert sum(naps) == pytest.approx(30.0)
    assert max(naps) <= 2.0


def test_the_collector_may_write_while_a_batch_is_worked_on_and_the_pull_still_ends(path: Path) -> None:
    timed_table(path, *[(str(n), NOW) for n in range(10)])
    reader = Reader(SourceSpec(path=path, columns=TIMED, batch_rows=4))
    source = DuckDBSource(reader.spec, clock=reader.clock, sleep=no_sleep)
    seen = []
    for batch in source.batches(None):
        seen += [row.values["id"] for row in batch]
        other = Collector(path)  # would be refused if our file were still open
        for n in range(5):
            other.execute(f"INSERT INTO qa VALUES ('more {len(seen)} {n}', 't', 'q', 'a', now()::TIMESTAMP)")
        other.close()
    assert len(seen) < 20
    reader.cursor = source.next_cursor(None)
    more = reader.pull()
    assert len(set(more + seen)) == len({*seen, *more, *(str(n) for n in range(10))}) == 25


def test_a_writer_in_this_very_process_counts_as_busy(path: Path) -> None:
    timed_table(path, ("a", NOW))
    spec = replace(SourceSpec(path=path), busy_timeout=0.0)
    with duckdb.connect(str(path)), pytest.raises(SourceBusy, match="this process or another"):
        list(DuckDBSource(spec).batches(None))
