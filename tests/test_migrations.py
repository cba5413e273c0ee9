"""A store of any age opens or says why not: new, older, newer, damaged, somebody else's."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import duckdb
import pytest

from storage.database import QUERIES, SQL, Database, load_queries
from storage.errors import StoreError
from storage.records import State
from storage.rows import Row, Split
from storage.store import Store

NOW = datetime(2026, 3, 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with a row in it."""
    path = tmp_path / "store.duckdb"
    with Store.open(path) as store:
        store.accept([Row(id="1", task="t", question="q", answer="a", split=Split.TRAIN)], "inbox")
        store.request_cycle("manual", "ana")
    return path


def migrations(folder: Path, **more: str) -> Path:
    """The real migrations and more of them."""
    folder.mkdir()
    for file in SQL.glob("0*.sql"):
        shutil.copy(file, folder)
    for name, sql in more.items():
        (folder / f"{name.removeprefix('m')}.sql").write_text(sql)
    return folder


def test_opening_again_changes_nothing(path: Path) -> None:
    for _ in range(2):
        with Store.open(path) as store:
            assert len(store.pending([])) == 1
            assert [cycle.state for cycle in store.unfinished()] == [State.REQUESTED]


def test_an_older_store_is_brought_up_to_date_and_keeps_its_rows(path: Path, tmp_path: Path) -> None:
    folder = migrations(tmp_path / "sql", m900_more="ALTER TABLE cycles ADD COLUMN note TEXT;")
    database = Database.open(path, now=NOW, migrations=folder)
    assert database.script("SELECT note FROM cycles") == [(None,)]
    assert database.script("SELECT version, applied_at FROM schema_migrations")[-1] == (900, NOW)
    assert database.script("SELECT count(*) FROM rows") == [(1,)]
    database.close()


def test_a_migration_that_fails_leaves_nothing_of_itself(path: Path, tmp_path: Path) -> None:
    folder = migrations(tmp_path / "sql", m900_more="CREATE TABLE half (a INTEGER); SELECT nonsense;")
    with pytest.raises(StoreError, match="nonsense"):
        Database.open(path, now=NOW, migrations=folder)
    with Store.open(path) as store:  # as before, and not left open
        assert len(store.pending([])) == 1
    connection = duckdb.connect(str(path))
    assert connection.execute(
        "SELECT count(*) FROM duckdb_tables() WHERE table_name = 'half'"
    ).fetchall() == [(0,)]
    connection.close()


def test_a_store_of_a_newer_version_is_refused_untouched(path: Path, tmp_path: Path) -> None:
    folder = migrations(tmp_path / "sql", m900_more="CREATE TABLE later (a INTEGER);")
    Database.open(path, now=NOW, migrations=folder).close()
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(StoreError, match=r"has schema 900, .* newer version; install that one again"):
            Store.open(path, read_only=read_only)
    assert path.read_bytes() == before


def test_reading_alone_does_not_migrate(path: Path, tmp_path: Path) -> None:
    folder = migrations(tmp_path / "sql", m900_more="CREATE TABLE later (a INTEGER);")
    with pytest.raises(StoreError, match="needs 900; `daemon run` brings it up to date"):
        Database.open(path, now=NOW, read_only=True, migrations=folder)
    with pytest.raises(StoreError, match=r"no store at .*none\.duckdb yet; `daemon run` makes it"):
        Store.open(tmp_path / "none.duckdb", read_only=True)
    assert not (tmp_path / "none.duckdb").exists()


def test_somebody_elses_duckdb_file_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "collector.duckdb"
    connection = duckdb.connect(str(path))
    connection.execute("CREATE TABLE qa (question TEXT)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"not a Holdfast store \(it has the tables qa\); set bot.state_dir"):
        Store.open(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"no database at all" * 1000, id="text"),
        pytest.param(lambda data: b"\x00" * len(data), id="zeros"),
        pytest.param(lambda data: data[: len(data) // 2], id="cut in half"),
        pytest.param(lambda data: data[:20] + bytes([data[20] ^ 255]) + data[21:], id="flipped header byte"),
        pytest.param(lambda data: data[:12288] + b"\xff" * (len(data) - 12288), id="overwritten pages"),
    ],
)
def test_a_damaged_file_says_what_to_do(path: Path, damage: Callable[[bytes], bytes]) -> None:
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StoreError, match="`daemon doctor`") as caught, Store.open(path) as store:
        store.pending([])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_journal_says_what_to_do(tmp_path: Path) -> None:
    path, journal = tmp_path / "store.duckdb", tmp_path / "store.duckdb.wal"
    code = f"import os; from storage.store import Store; store = Store.open({str(path)!r}); os._exit(9)"
    subprocess.run([sys.executable, "-c", code], cwd=SQL.parent.parent, check=False)
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 255
    journal.write_bytes(data)
    with pytest.raises(
        StoreError, match=r"journal of the store is damaged: .* move store\.duckdb\.wal aside"
    ):
        Store.open(path)


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"check bot\.state_dir"):
        Store.open(tmp_path / "file" / "store.duckdb")


def test_every_query_has_a_name_of_its_own_and_is_used() -> None:
    files = [load_queries(SQL / f"{name}.sql") for name in ("queries", "removals", "survey")]
    assert sum(map(len, files)) == len(QUERIES)
    users = ("store.py", "row_store.py", "removals.py", "survey.py")
    source = "".join((SQL.parent / name).read_text() for name in users)
    unused = [name for name in QUERIES if f'"{name}"' not in source]
    assert unused == []


def test_cycles_from_before_there_were_candidates_have_their_plain_training(tmp_path: Path) -> None:
    folder, path = tmp_path / "sql", tmp_path / "old.duckdb"
    folder.mkdir()
    shutil.copy(SQL / "001_init.sql", folder)
    old = Database.open(path, now=NOW, migrations=folder)
    old.script(
        "INSERT INTO cycles (id, state, trigger, requested_by, requested_at, snapshot) VALUES "
        "(1, 'promoted', 'manual', 'ana', '2026-01-01', 's1'), "
        "(2, 'trained', 'manual', 'ana', '2026-01-02', 's2'), "
        "(3, 'requested', 'manual', 'ana', '2026-01-03', NULL)"
    )
    old.script("INSERT INTO verdicts VALUES (1, true, '{}', '2026-01-01')")
    old.script("INSERT INTO models VALUES (1, 1, NULL, 'cycles/1/train', 'abc', 'base', '2026-01-01')")
    old.close()
    with Store.open(path) as store:
        done, working = store.candidates(1), store.candidates(2)
        assert [(c.number, c.kind, c.result, c.model, c.passed) for c in done] == [
            (1, "train", "cycles/1/train", "abc", True)
        ]
        assert [(c.result, c.passed, c.note) for c in working] == [("cycles/2/train", None, None)]
        assert store.candidates(3) == []


def test_rows_from_before_answers_could_change_are_kept_and_can_be_superseded(tmp_path: Path) -> None:
    folder, path = tmp_path / "sql", tmp_path / "old.duckdb"
    folder.mkdir()
    for name in ("001_init.sql", "002_candidates.sql"):
        shutil.copy(SQL / name, folder)
    given = [
        Row(id=str(n), task="t", question=f"q{n}", answer="a", created_at=NOW, split=Split.TRAIN)
        for n in range(3)
    ]
    old = Database.open(path, now=NOW, migrations=folder)
    for seq, row in enumerate(given, start=1):
        old.script(
            f"INSERT INTO rows VALUES ('{row.hash}', '{row.key}', '{row.question_key}', {seq}, '{row.id}', "
            f"'t', '{row.question}', 'a', '', TIMESTAMP '{NOW}', 'train', 'inbox', TIMESTAMP '{NOW}')"
        )
    old.close()
    with Store.open(path) as store:
        assert [(row.hash, row.seq) for row in store.pending([])] == [
            (row.hash, seq) for seq, row in enumerate(given, start=1)
        ]
        assert store.repeats(given, "inbox") == [True] * 3
        late = replace(given[0], answer="too old", created_at=datetime(2025, 1, 1))
        new = replace(given[1], answer="b", created_at=datetime(2027, 1, 1))
        assert store.accept([late, new], "inbox").superseded == 2
        assert [row.answer for row in store.pending([])] == ["a", "a", "b"]
    with Store.open(path) as store:  # and so it stays
        assert store.superseded_count() == 2
