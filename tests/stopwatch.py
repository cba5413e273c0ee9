"""`daemon run` with a stopwatch at its pulls: python -m tests.stopwatch FILE ARGUMENTS…

All else is the daemon, with workers that train nothing (`tests.toy_worker`). Each pull becomes a line of JSON
in FILE: how many milliseconds it took, how long each of its openings waited for the collector's file and then
held it, how many rows it read, and how many of them were new.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from storage import intake
from storage.sources import DuckDBSource
from tests import toy_worker


@dataclass(kw_only=True)
class Pull:
    """Milliseconds, and rows."""

    took: float = 0.0
    waited: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    read: int = 0
    accepted: int = 0


def pulls(path: Path) -> list[Pull]:
    """Those that are finished."""
    return [Pull(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def start(path: Path) -> None:
    """From now on the pulls of this process are timed."""
    now, granted = Pull(), 0.0
    pull, open_, read = intake.pull, DuckDBSource._open, DuckDBSource._read

    def timed_pull(*args: Any, **rules: Any) -> intake.IntakeReport:
        nonlocal now
        now, begun = Pull(), time.monotonic()
        report = pull(*args, **rules)
        now.took = _since(begun)
        now.read, now.accepted = report.read, report.accepted
        with path.open("a") as file:
            file.write(json.dumps(asdict(now)) + "\n")
        return report

    def timed_open(self: DuckDBSource) -> Any:
        nonlocal granted
        asked = time.monotonic()
        connection = open_(self)
        now.waited.append(_since(asked))
        granted = time.monotonic()
        return connection

    def timed_read(self: DuckDBSource, since: int | None, after: int) -> Any:
        found = read(self, since, after)
        now.held.append(_since(granted))
        return found

    intake.pull = timed_pull
    DuckDBSource._open, DuckDBSource._read = timed_open, timed_read  # type: ignore[method-assign]


def _since(moment: float) -> float:
    return round(1000 * (time.monotonic() - moment), 2)


def longest(found: Sequence[Pull]) -> float:
    """The longest that the collector's file was held."""
    return max(held for one in found for held in one.held)


if __name__ == "__main__":
    start(Path(sys.argv[1]))
    sys.argv[1] = "daemon"
    toy_worker.run_daemon()
