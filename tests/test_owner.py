"""A collector that is a server and never lets go of its file: rows come by way of its inbox."""

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pytest

from storage.store import Store
from tests import soak
from tests.bots import write_config
from tests.daemons import ROOT, SECONDS, DaemonProcess, environment
from tests.test_collector import stored

WRITERS, BATCHES, ROWS = 3, 20, 10
LATE = 3  # batches whose transaction is open while rows are handed over

pytestmark = pytest.mark.acceptance


@contextmanager
def owner(home: Path, port: int = 0) -> Iterator[int]:
    """The server, and its port; killed when this is left."""
    command = [sys.executable, "-m", "tests.owner", str(home / "qa.duckdb"), str(home / "inbox"), str(port)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def ask(port: int, what: str, body: object = None) -> object:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("POST", what, body=json.dumps(body))
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def write(port: int, batch: range, what: str = "/rows") -> None:
    """Until it is acknowledged: what a server that died had written may be written twice."""
    rows = [{"id": f"o{n}", "question": f"asked {n}", "answer": f"answer {n % 7}"} for n in batch]
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            assert ask(port, what, rows) == "written"
            return
        except (OSError, http.client.HTTPException):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def hand_over(daemon: DaemonProcess, port: int, inbox: Path) -> int:
    """What a timer does: `daemon ingest inbox/*.parquet`. The number of rows that were new."""
    assert isinstance(ask(port, "/hand-over"), int)
    told = daemon.call("ingest", paths=[str(path) for path in sorted(inbox.glob("*.parquet"))])
    assert told["rejected"] == 0, told
    return int(told["accepted"])


def test_a_server_hands_every_row_over_once_while_it_is_written_to_and_when_it_dies(
    tmp_path: Path, base: Path
) -> None:
    inbox, rows = tmp_path / "inbox", WRITERS * BATCHES * ROWS
    inbox.mkdir()
    batches = [range(n, n + ROWS) for n in range(0, rows, ROWS)]
    late = [range(rows + n, rows + n + 1) for n in range(LATE)]
    config = write_config(tmp_path, base, source__path="", source__columns__split="")
    taken = 0
    with DaemonProcess(config) as daemon, ThreadPoolExecutor(WRITERS + 1) as pool:
        with owner(tmp_path) as port:
            with pytest.raises(duckdb.IOException):
                duckdb.connect(str(tmp_path / "qa.duckdb"), read_only=True)
            writing = [pool.submit(write, port, batch) for batch in batches[: len(batches) // 2]]
            writing += [pool.submit(write, port, one, "/rows/late") for one in late]
            while not all(one.done() for one in writing):
                taken += hand_over(daemon, port, inbox)
            writing = [pool.submit(write, port, batch) for batch in batches[len(batches) // 2 :]]
            with pytest.raises(http.client.RemoteDisconnected):
                ask(port, "/hand-over/die")
        with owner(tmp_path, port):
            while not all(one.done() for one in writing):
                taken += hand_over(daemon, port, inbox)
            taken += hand_over(daemon, port, inbox)
            assert hand_over(daemon, port, inbox) == 0
        for one in writing:
            one.result()
        assert daemon.stop() == 0
    with Store.open(tmp_path / "state/store.duckdb", read_only=True) as store:
        assert stored(store) == sorted(f"o{n}" for n in range(rows + LATE))
    assert taken == rows + LATE
    assert soak.findings(daemon) == []
