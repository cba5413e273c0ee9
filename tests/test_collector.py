"""A collector that never stops, and the ways of those that keep their file open.

MINUTES in the environment makes the run longer: `make test-collector MINUTES=10`.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import duckdb
import pytest

from storage import files, intake
from storage.errors import SourceBusy
from storage.sources import Columns, DuckDBSource, SourceSpec
from storage.store import Store
from tests import collector, soak
from tests.bots import fresh_mlflow, write_config
from tests.daemons import ROOT, DaemonProcess, environment
from tests.stopwatch import Pull, longest, pulls

SECONDS = 60 * float(os.environ.get("MINUTES", "0")) or 6.0
SHARES = (0.1, 0.1)
WARM = range(10**6, 10**6 + 20)  # rows that are there before the collector starts
FEW = 6  # pulls, at least
# How many times as long a pull may take when somebody writes 200 rows a second meanwhile.
SLOWDOWN = 10.0
# How many times as long as its longest opening alone, or the collector's, the daemon may hold the file.
LONGER = 20.0
# Milliseconds for which a shared machine may stand still in one phase and not in the other; longer runs are
# made alone on a machine.
STALL = 0.0 if "MINUTES" in os.environ else 2000.0


@contextmanager
def collecting(path: Path, seconds: float) -> "Iterator[subprocess.Popen[str]]":
    """A collector that has begun; when this is left, it is gone."""
    command = [sys.executable, "-m", "tests.collector", str(path), str(seconds)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begins\n"
            yield process
        finally:
            process.kill()


def ended(process: "subprocess.Popen[str]") -> dict[str, Any]:
    said, _ = process.communicate(timeout=SECONDS + 120)
    assert process.returncode == 0
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


@pytest.mark.acceptance
@pytest.mark.timeout(3600)
def test_a_collector_that_never_stops_loses_no_row_and_waits_little(tmp_path: Path, base: Path) -> None:
    """Two real processes beside each other: the collector, and a daemon that runs one cycle after another."""
    with collecting(tmp_path / "alone.duckdb", min(SECONDS, 30.0)) as process:
        alone = ended(process)
    path, times = tmp_path / "qa.duckdb", tmp_path / "pulls"
    with running(tmp_path, base, times) as daemon:
        collector.write(path, WARM)
        cycle(daemon)  # imports what it needs, prepares the base
        with collecting(path, 2 * SECONDS + 600) as process:
            begun, taken = time.monotonic(), len(pulls(times))
            while time.monotonic() - begun < SECONDS or len(pulls(times)) < taken + FEW:
                cycle(daemon)
            beside = pulls(times)[taken:]
            process.terminate()
            watched = ended(process)
        cycle(daemon)  # what came after the last pull
        taken, written = len(pulls(times)), watched["rows"]
        many = sum(one.accepted for one in beside) // len(beside)
        for _ in range(FEW):  # the same work, with nobody beside it
            collector.write(path, range(written, written + many))
            written += many
            cycle(daemon)
        calm = pulls(times)[taken:]
        assert daemon.stop() == 0
    with Store.open(tmp_path / "state/store.duckdb", read_only=True) as store:
        found = stored(store)
        trained = len(store.models())
    slowdown = median(one.took for one in beside[-len(beside) // 2 :]) / median(one.took for one in calm)
    print(f"the collector alone: {alone}\nbeside the daemon, {trained} versions: {watched}")
    for name, some in (("beside the collector", beside), ("alone", calm)):
        print(f"{len(some)} pulls {name}: {summary(some)}")
    print(f"a pull beside the collector takes {slowdown:.2f} times as long")
    assert found == sorted(f"c{n}" for n in [*range(written), *WARM]), "no row lost, none twice"
    assert sum(one.accepted for one in pulls(times)) == len(found)
    assert soak.findings(daemon) == []
    assert longest(beside) <= STALL + LONGER * max(longest(calm), alone["worst"])
    # It may meet the daemon at an opening, and waits for that one then; most of the time it meets nobody.
    assert watched["worst"] <= STALL + 5 * longest(beside) + 10 * alone["worst"]
    assert watched["median"] <= 10 * alone["median"] + longest(beside) / 10
    assert slowdown <= SLOWDOWN


@contextmanager
def running(home: Path, base: Path, times: Path) -> Iterator[DaemonProcess]:
    """A daemon that pulls all the time: most cycles are over after the pull, the others a moment later."""
    config = write_config(
        home, base, source__columns__split="", source__columns__created_at="created_at",
        source__overlap_hours=0.01, gate__min_gain=-1.0, rescue__attempts=0, retention__champions=2,
        strategy__replay_size=50, training__min_rows=min(4000, int(130 * SECONDS)),
    )  # fmt: skip
    (home / "state").mkdir(mode=0o700)
    (home / "state/mlflow.db").write_bytes(fresh_mlflow().read_bytes())
    argv = [sys.executable, "-m", "tests.stopwatch", str(times), "--config", str(config), "run"]
    with DaemonProcess(config, argv=argv) as daemon:
        yield daemon


def cycle(daemon: DaemonProcess) -> None:
    assert daemon.ended(daemon.retrain())["state"] in ("promoted", "rejected", "nothing-to-do")


def summary(found: Sequence[Pull]) -> dict[str, Any]:
    return {
        "took": collector.percentiles([one.took for one in found]),
        "waited": collector.percentiles([sum(one.waited) for one in found]),
        "held": collector.percentiles([held for one in found for held in one.held]),
        "read": max(one.read for one in found),
    }


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
                batches = files.read_file(path, Columns())
                intake.take(batches, store, SourceSpec(), shares=SHARES, source_name=f"file:{path.name}")
        writer.join()
        assert stored(store) == sorted(f"p{n}" for n in range(1000))


def test_rotated_files_are_read_while_the_newest_is_held_open(tmp_path: Path) -> None:
    """The collector closes a file only to begin the next; the link points to the last that is closed."""
    link = tmp_path / "qa.duckdb"
    with Store.open(tmp_path / "store.duckdb") as store, ExitStack() as files_held:
        files_held.enter_context(held_open(tmp_path / "qa-0.duckdb", 0))
        for day in range(3):
            files_held.close()  # what was today's is yesterday's
            today = tmp_path / f"qa-{day + 1}.duckdb"
            files_held.enter_context(held_open(today, (day + 1) * 100))
            with pytest.raises(SourceBusy):
                pull(today, store, busy_timeout=0.0)
            aside = tmp_path / ".link"
            aside.symlink_to(tmp_path / f"qa-{day}.duckdb")
            aside.rename(link)
            assert pull(link, store).accepted == 100
        assert stored(store) == sorted(f"r{n}" for n in range(300))


@contextmanager
def held_open(path: Path, first: int) -> Iterator[None]:
    """A process that has written rows into a file and keeps it open."""
    script = (
        "import sys, pathlib; from tests.test_collector import _rows\n"
        "connection = _rows(pathlib.Path(sys.argv[1]), int(sys.argv[2]))\n"
        "print('open', flush=True); sys.stdin.read(); connection.close()"
    )
    command = [sys.executable, "-c", script, str(path), str(first)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield
        process.communicate()


def test_a_pull_ends_with_the_file_that_it_began_with(tmp_path: Path) -> None:
    """The link moves on between two openings of one pull; the next pull reads the next file whole."""
    link = tmp_path / "qa.duckdb"
    for first in (0, 100):
        _rows(tmp_path / f"{first}.duckdb", first).close()
    link.symlink_to(tmp_path / "0.duckdb")
    with Store.open(tmp_path / "store.duckdb") as store:
        accept = store.accept

        def rotating(*args: Any, **rules: Any) -> Any:
            aside = tmp_path / ".link"
            aside.symlink_to(tmp_path / "100.duckdb")
            aside.rename(link)
            return accept(*args, **rules)

        store.accept = rotating  # type: ignore[method-assign]
        assert pull(link, store, batch_rows=30).accepted == 100
        assert pull(link, store, batch_rows=30).accepted == 100
        assert stored(store) == sorted(f"r{n}" for n in range(200))


def _rows(path: Path, first: int) -> Any:
    connection = duckdb.connect(str(path))
    connection.execute(
        "CREATE TABLE qa AS SELECT 'r' || n AS id, 'stream' AS task, 'question ' || n AS question, "
        "'yes' AS answer, TIMESTAMP '2026-01-01' AS created_at FROM range(?, ?) AS t(n)",
        [first, first + 100],
    )
    return connection
