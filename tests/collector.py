"""A collector that never stops: python -m tests.collector FILE SECONDS

Opens its DuckDB, writes a few rows, closes it, 200 rows a second, and tries again when somebody reads. At its
end it prints as JSON how many rows it wrote and how long it waited to open, in milliseconds.
"""

import json
import sys
import time
from pathlib import Path

import duckdb

RATE = 200  # rows a second
ROWS = 10  # in one opening
PAUSE = 0.005  # between two tries


def main() -> int:
    path, seconds = Path(sys.argv[1]), float(sys.argv[2])
    begun = time.monotonic()
    written, waits = 0, []
    while (now := time.monotonic() - begun) < seconds:
        if written > now * RATE:
            time.sleep(written / RATE - now)
            continue
        waits.append(write(path, range(written, written + ROWS)))
        written += ROWS
    waits.sort()
    told = {"rows": written, "openings": len(waits), "median": waits[len(waits) // 2], "worst": waits[-1]}
    print(json.dumps({**told, "p99": waits[len(waits) * 99 // 100]}))
    return 0


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
