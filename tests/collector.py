"""A collector that never stops: python -m tests.collector FILE SECONDS

200 rows a second come to it, whatever it does. It opens its DuckDB, writes what has come, closes it, and
tries again when somebody reads. It prints a line when it begins, and at its end, or on SIGTERM, as JSON how
many rows it wrote and how long it waited for its openings, in milliseconds.
"""

import json
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import duckdb

RATE = 200  # rows a second
ROWS = 10  # in one opening, at least
PAUSE = 0.005  # between two tries


def main() -> int:
    path, seconds = Path(sys.argv[1]), float(sys.argv[2])
    enough = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: enough.set())
    print("begins", flush=True)
    begun = time.monotonic()
    written, waits = 0, []
    while (now := time.monotonic() - begun) < seconds and not enough.is_set():
        come = int(now * RATE)
        if come < written + ROWS:
            enough.wait((written + ROWS) / RATE - now)
            continue
        waits.append(write(path, range(written, come)))
        written = come
    print(json.dumps({"rows": written, "openings": len(waits), **percentiles(waits)}))
    return 0


def percentiles(found: Sequence[float]) -> dict[str, float]:
    """What half, nine in ten, 99 in 100 and all of the numbers stay within."""
    ordered = sorted(found)
    last = len(ordered) - 1
    return {
        name: round(ordered[last * percent // 100], 1)
        for name, percent in (("median", 50), ("p90", 90), ("p99", 99), ("worst", 100))
    }


def write(path: Path, numbers: range) -> float:
    """One opening; the milliseconds until it was granted."""
    asked = time.monotonic()
    while True:
        try:
            connection = duckdb.connect(str(path))
            break
        except duckdb.IOException:
            time.sleep(PAUSE)
    waited = 1000 * (time.monotonic() - asked)
    with connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS qa "
            "(id TEXT, task TEXT, question TEXT, answer TEXT, created_at TIMESTAMP)"
        )
        connection.execute(
            "INSERT INTO qa SELECT 'c' || n, 'stream', 'question number ' || n, 'answer ' || n % 7, "
            "current_timestamp::TIMESTAMP FROM range(?, ?) AS t(n)",
            [numbers.start, numbers.stop],
        )
    return waited


if __name__ == "__main__":
    sys.exit(main())
