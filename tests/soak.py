"""Many cycles in a row through one daemon, under churn; what the process and its state weigh after each.

    python -m tests.soak --cycles 100            workers that train nothing: a second or two a cycle
    python -m tests.soak --cycles 20 --real      the real worker and a tiny model

`make test-soak CYCLES=100` is the first. Ends with 1 when something grows beyond what retention allows.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

from daemon import audit, operations
from storage.errors import ControlError
from storage.records import State
from storage.store import Store
from tests.bots import fresh_mlflow, write_config
from tests.daemons import DaemonProcess, command
from tests.toys import tiny_base

TASKS, ROWS = 4, 12
# What may grow from the second quarter to the last: memory by allocators' whims, the rest by nothing.
RSS_MB, FILES, THREADS, KEPT_SHARE = 12.0, 2, 1, 0.15
RECORD_KB = 400.0  # a cycle's rows, scores, history, numbers and pictures, which stay for ever


@dataclass(frozen=True, kw_only=True)
class Weight:
    """The daemon after a cycle."""

    cycle: int
    rss_mb: float
    files: int  # open
    threads: int
    kept_kb: float  # cycles/, snapshots/ and MLflow's models: what retention bounds
    record_kb: float  # the rest of the state


def weigh(daemon: DaemonProcess, cycle: int) -> Weight:
    proc = Path(f"/proc/{daemon.process.pid}")
    told = (proc / "status").read_text().split("VmRSS:")[1].split()
    state = daemon.settings.state_dir
    kept, record = 0, 0
    for path in (Path(folder) / name for folder, _, names in os.walk(state) for name in names):
        parts = path.relative_to(state).parts
        if parts[0] == "models":
            continue
        with suppress(FileNotFoundError):  # it works on meanwhile
            size = path.stat().st_size
            if parts[0] in ("cycles", "snapshots") or "model" in parts:
                kept += size
            else:
                record += size
    return Weight(
        cycle=cycle,
        rss_mb=int(told[0]) / 1024,
        files=len(list((proc / "fd").iterdir())),
        threads=len(list((proc / "task").iterdir())),
        kept_kb=kept / 1024,
        record_kb=record / 1024,
    )


@contextmanager
def running(home: Path, base: Path, *, real: bool) -> Iterator[DaemonProcess]:
    path = write_config(
        home, base, training__epochs=1, gate__min_gain=-0.5, rescue__attempts=0, evaluation__suite_rows=16,
        retention__champions=2, retention__rejected=1, retention__snapshots=2, retention__predictions=2,
        strategy__replay_size=50, source__path="",
    )  # fmt: skip
    (home / "state").mkdir(mode=0o700, exist_ok=True)
    (home / "state/mlflow.db").write_bytes(fresh_mlflow().read_bytes())
    module = command(path, "run") if real else [
        sys.executable, "-m", "tests.toy_worker", "daemon", "--config", str(path), "run"
    ]  # fmt: skip
    with DaemonProcess(path, argv=module) as daemon:
        yield daemon


def soak(daemon: DaemonProcess, cycles: int) -> Iterator[Weight]:
    """Rows come and cycles run. In the middle of some, more rows come, or they are cancelled, joined, or the
    champion is rolled back under them."""
    cancelled = 0
    for number in range(1, cycles + 1):
        ingest(daemon, f"{number}", number)
        cycle = daemon.retrain()
        if number % 7 == 3:
            in_training(daemon, cycle)
            with suppress(ControlError):  # it has ended by itself
                daemon.call("cancel", cycle=cycle)
            ended = daemon.ended(cycle)
            assert ended["state"] in ("cancelled", "promoted", "rejected"), ended
            cancelled += ended["state"] == "cancelled"
            cycle = daemon.retrain()
        if number % 5 == 2:
            daemon.retrain()  # joins, or is queued and finds nothing to do
        if number % 4 == 1:
            in_training(daemon, cycle)
            ingest(daemon, f"{number}b", number + 1)
        if number % 11 == 6 and daemon.call("status")["champion"]:
            in_training(daemon, cycle)
            daemon.call("rollback", why="soak")
        ended = daemon.ended(cycle)
        assert ended["state"] in ("promoted", "rejected", "nothing-to-do"), ended
        daemon.until(lambda told: not told["unfinished"])
        while (told := daemon.call("prune", dry_run=True))["removals"] or told["left"]:
            time.sleep(0.02)
        yield weigh(daemon, number)
    assert cancelled or cycles < 3, "no cancellation met its cycle"


def in_training(daemon: DaemonProcess, cycle: int) -> None:
    """Waits until the cycle trains, or is past it."""
    before = (State.REQUESTED, State.PULLED)
    daemon.until(lambda told: not any(c["id"] == cycle and c["state"] in before for c in told["unfinished"]))


def ingest(daemon: DaemonProcess, name: str, number: int) -> None:
    told = daemon.call("ingest", paths=[str(lesson(daemon.config_path.parent, name, number))])
    assert told["accepted"] == 2 * ROWS, told


def lesson(home: Path, name: str, number: int) -> Path:
    """A file of new rows of one task. No two have the same words: they would share a split."""
    path, task = home / f"rows-{name}.jsonl", f"task {number % TASKS}"
    splits = ["train"] * ROWS + ["validation"] * (ROWS // 2) + ["suite"] * (ROWS - ROWS // 2)
    rows = [
        {
            "id": f"{name}-{n}",
            "task": task,
            "question": f"what is {name}x{n}",
            "answer": f"it is {n}",
        }
        | {"split": split}
        for n, split in enumerate(splits)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def growth(weights: Sequence[Weight]) -> tuple[dict[str, float], list[str]]:
    """Medians of the last quarter less those of the second, and what of that is too much."""
    quarter = len(weights) // 4
    early, late = weights[quarter : 2 * quarter], weights[-quarter:]
    grown = {}
    for name in (field.name for field in fields(Weight) if field.name != "cycle"):
        before, after = (median(getattr(one, name) for one in part) for part in (early, late))
        grown[name] = after - before
    apart = median(one.cycle for one in late) - median(one.cycle for one in early)
    grown["record_kb"] /= apart
    kept = median(one.kept_kb for one in early)
    limits = {
        "rss_mb": RSS_MB, "files": FILES, "threads": THREADS, "kept_kb": KEPT_SHARE * kept,
        "record_kb": RECORD_KB,
    }  # fmt: skip
    return grown, [
        f"{name} grew by {grown[name]:.1f}, at most {limit:.1f}"
        for name, limit in limits.items()
        if grown[name] > limit
    ]


def findings(daemon: DaemonProcess) -> list[audit.Finding]:
    """What an audit says afterwards, when the daemon is stopped."""
    with Store.open(daemon.settings.store_path, read_only=True) as store:
        return list(audit.examine(daemon.settings, store, operations.open_registry(daemon.settings, store)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--real", action="store_true")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # and leave no daemon behind
    with tempfile.TemporaryDirectory() as folder:
        home, weights = Path(folder), []
        with running(home, tiny_base(home / "base"), real=asked.real) as daemon:
            for weight in soak(daemon, asked.cycles):
                weights.append(weight)
                told = {k: round(v, 1) for k, v in asdict(weight).items()}
                print(json.dumps(told), flush=True)
            daemon.stop()
        grown, wrong = growth(weights)
        wrong += [f"{one.check}: {one.message}" for one in findings(daemon)]
    print("from the second quarter to the last:", json.dumps({k: round(v, 2) for k, v in grown.items()}))
    print("\n".join(wrong) or "nothing grew beyond what retention allows, and the audit has no finding")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
