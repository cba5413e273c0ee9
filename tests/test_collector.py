"""A collector that never stops, and the ways of those that keep their file open.

MINUTES in the environment makes the run longer: `make test-collector MINUTES=10`.
"""

import json
import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest

from storage import files, intake
from storage.sources import Columns, DuckDBSource, SourceSpec
from storage.store import Store
from tests.daemons import ROOT, environment

SECONDS = 60 * float(os.environ.get("MINUTES", "0")) or 6.0
SHARES = (0.1, 0.1)


def collecting(path: Path, seconds: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.collector", str(path), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)


def ended(collector: "subprocess.Popen[str]") -> dict[str, Any]:
    said, _ = collector.communicate(timeout=SECONDS + 120)
    assert collector.returncode == 0
    return dict(json.loads(said))


def spec(path: Path, **changes: Any) -> SourceSpec:
    columns = Columns(created_at="created_at")
    return SourceSpec(path=path, columns=columns, overlap=timedelta(hours=1), **changes)


def pull(path: Path, store: Store, **changes: Any) -> intake.IntakeReport:
    return intake.pull(DuckDBSource(spec(path, **changes)), store, shares=SHARES)


def stored(store: Store) -> list[str]:
    """The collector's names of all rows, each as often as it is there."""
    counts = store.row_counts()
    return sorted(
        row.id for task, splits in counts.items() for split in splits for row in store.task_rows(task, split)
    )


@pytest.mark.timeout(3600)
def test_a_collector_that_never_stops_loses_no_row_and_waits_little(tmp_path: Path) -> None:
    alone = ended(collecting(tmp_path / "alone.duckdb", min(SECONDS, 30.0)))
    path = tmp_path / "qa.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute(
            "CREATE TABLE qa (id TEXT, task TEXT, question TEXT, answer TEXT, created_at TIMESTAMP)"
        )
    pulls: list[float] = []  # milliseconds each
    with Store.open(tmp_path / "store.duckdb") as store:
        collector = collecting(path, SECONDS)
        while collector.poll() is None:
            begun = time.monotonic()
            pull(path, store)
            pulls.append(1000 * (time.monotonic() - begun))
        watched = ended(collector)
        pull(path, store)
        found = stored(store)
    print(f"alone: {alone}\nwith {len(pulls)} pulls: {watched}")
    assert found == sorted(f"c{n}" for n in range(watched["rows"])), "no row lost, none twice"
    assert len(pulls) >= 3
    # It may meet a reader at an opening, and waits a pull or two then; most of the time it meets nobody.
    assert watched["worst"] <= 5 * max(pulls) + 10 * alone["worst"]
    assert watched["median"] <= 10 * alone["median"] + max(pulls) / 2


# Collectors that keep their file open.


def test_an_inbox_of_parquet_files_hands_over_every_row_once(tmp_path: Path) -> None:
    """Written under another name, renamed when whole, taken in by `daemon ingest inbox/*.parquet` as often as
    one likes."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    done = threading.Event()

    def collect() -> None:
        with duckdb.connect() as connection:  # its own database is never closed, and nobody else's business
            for part in range(20):
                connection.execute(
                    f"COPY (SELECT 'p' || n AS id, 'stream' AS task, 'asked ' || n AS question, "
                    f"'yes' AS answer FROM range({part * 50}, {part * 50 + 50}) AS t(n)) "
                    f"TO '{inbox}/.part-{part:04}.tmp' (FORMAT parquet)"
                )
                (inbox / f".part-{part:04}.tmp").rename(inbox / f"part-{part:04}.parquet")
        done.set()

    writer = threading.Thread(target=collect)
    with Store.open(tmp_path / "store.duckdb") as store:
        writer.start()
        last = False
        while not last:
            last = done.is_set()
            for path in sorted(inbox.glob("*.parquet")):
                batches = files.read_files([path], Columns())
                intake.take(batches, store, SourceSpec(), shares=SHARES, source_name=f"file:{path.name}")
        writer.join()
        assert stored(store) == sorted(f"p{n}" for n in range(1000))


def test_rotated_files_are_read_while_the_newest_is_held_open(tmp_path: Path) -> None:
    """The collector writes today's file and never closes it; the link points to the last that is closed."""
    link = tmp_path / "qa.duckdb"
    total = 0
    with Store.open(tmp_path / "store.duckdb") as store:
        for day in range(3):
            closed, held = tmp_path / f"qa-{day}.duckdb", tmp_path / f"qa-{day + 1}.duckdb"
            _rows(closed, day * 100).close()
            aside = tmp_path / ".link"
            aside.symlink_to(closed)
            aside.rename(link)
            total += 100
            open_for_ever = _rows(held.with_suffix(".open"), 0)
            try:
                pull(link, store)
            finally:
                open_for_ever.close()
        assert stored(store) == sorted(f"r{n}" for n in range(total))


def _rows(path: Path, first: int) -> Any:
    connection = duckdb.connect(str(path))
    connection.execute(
        "CREATE TABLE qa AS SELECT 'r' || n AS id, 'stream' AS task, 'question ' || n AS question, "
        "'yes' AS answer, TIMESTAMP '2026-01-01' AS created_at FROM range(?, ?) AS t(n)",
        [first, first + 100],
    )
    return connection
