"""What the demo and the benchmark share: a collector, a real daemon, cycles, and what the store says.

Everything goes a user's way: a config.toml, rows written into the collector's own DuckDB, a `daemon run`
process, `daemon retrain-now --wait`. Results are read from the stores with `daemon.report` once the daemon
has stopped; nothing here trains, scores or decides.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import duckdb

from daemon import report, rescue
from daemon.base import prepared_base
from daemon.config import load, render
from daemon.control import Client
from daemon.settings import Settings
from storage.errors import DaemonNotRunning, HoldfastError
from storage.records import Cycle
from storage.rows import Row
from storage.store import Store
from strategies.contract import TrainReport, result_files

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 60.0  # for `daemon run` to answer
STOP_SECONDS = 60.0

# Every candidate is promoted, whatever it forgot: this is how a stream is measured, not how a bot is run.
OPEN_GATE = {"gate.max_drop": 1.0, "gate.min_gain": -1.0}


class StreamError(HoldfastError):
    """The stream could not be run to its end."""


@dataclass(frozen=True, kw_only=True)
class Bot:
    """A folder: config.toml, the collector's database, the daemon's state directory and its log."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.toml"

    @property
    def source(self) -> Path:
        return self.folder / "collector.duckdb"

    @property
    def log(self) -> Path:
        return self.folder / "daemon.log"

    def settings(self) -> Settings:
        return load(self.config)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model answered to a held-out question in its exam."""

    question: str
    given: str
    right: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished stream left in a store."""

    matrix: report.Matrix
    metrics: dict[str, float]
    cycles: tuple[dict[str, Any], ...]  # report.cycle_report of each, oldest first
    training_seconds: float  # of CPU, all cycles together, without loading and evaluation
    state_bytes: int  # continual state of the last version


def make_bot(folder: Path, changes: Mapping[str, Any]) -> Bot:
    """A folder with a config as `daemon init` renders it, with `changes` ({"training.epochs": 3}) applied."""
    bot = Bot(folder=folder)
    folder.mkdir(parents=True, exist_ok=True)
    from_collector = {
        "source.path": bot.source.name,
        "source.columns.created_at": "created_at",
        "source.columns.split": "split",
        "schedule.cron": "",
    }
    bot.config.write_text(edited(render(), {**from_collector, **changes}), encoding="utf-8")
    bot.settings()  # a wrong change is reported here, not by the daemon
    return bot


def edited(text: str, changes: Mapping[str, Any]) -> str:
    """config.toml with other values; the comments stay. Keys of [tasks.NAME] are appended."""
    left, lines, section = dict(changes), [], ""
    for line in text.splitlines():
        if table := re.fullmatch(r"\[([\w.]+)\]", line):
            section = table[1]
        elif (setting := re.match(r"(?:# )?(\w+) = ", line)) and (key := f"{section}.{setting[1]}") in left:
            line = f"{setting[1]} = {json.dumps(left.pop(key))}"
        lines.append(line)
    for key in sorted(left):
        head, _, name = key.rpartition(".")
        if not head.startswith("tasks."):
            raise StreamError(f"there is no key {key!r} in config.toml; see `daemon init` for all keys")
        if f"[{head}]" not in lines:
            lines += ["", f"[{head}]"]
        lines.append(f"{name} = {json.dumps(left[key])}")
    return "\n".join(lines) + "\n"


def parse_change(text: str) -> tuple[str, Any]:
    """`training.epochs=3` from a command line."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def collect(path: Path, rows: Sequence[Row]) -> None:
    """Appends rows as a well-behaved collector does: open, write, close. Rows that are there stay."""
    with _open_patiently(path) as database:
        database.execute(
            "CREATE TABLE IF NOT EXISTS qa (id TEXT PRIMARY KEY, task TEXT, question TEXT, answer TEXT, "
            "split TEXT, created_at TIMESTAMP)"
        )
        database.execute("BEGIN")
        database.executemany(
            "INSERT OR IGNORE INTO qa VALUES (?, ?, ?, ?, ?, ?)",
            [(r.id, r.task, r.question, r.answer, r.split, r.created_at) for r in rows],
        )
        database.execute("COMMIT")


def _open_patiently(path: Path) -> duckdb.DuckDBPyConnection:
    """The daemon holds the file for a moment while it pulls; then it is free again."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return duckdb.connect(path)
        except duckdb.IOException:
            if time.monotonic() > deadline:
                raise
            time.sleep(random.uniform(0.02, 0.2))


def command(bot: Bot, *arguments: str) -> list[str]:
    """The command line of `daemon -c CONFIG …`."""
    return [sys.executable, "-m", "daemon.cli", "-c", str(bot.config), *arguments]


class RunningDaemon:
    """A real `daemon run` process: started on entry, asked to end (SIGTERM) on exit."""

    def __init__(self, bot: Bot) -> None:
        self.bot = bot
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.bot.log.open("ab") as log:
            self._process = subprocess.Popen(
                command(self.bot, "run"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,  # Ctrl-C reaches us, and we ask the daemon to end
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def leave(self) -> None:
        """Lets it run on after we end."""
        self._process = None

    def run(self, *arguments: str) -> int:
        """A `daemon` command in this terminal, with its live progress; its exit code."""
        return subprocess.run(command(self.bot, *arguments), cwd=ROOT, check=False).returncode

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """The answer of the daemon's socket."""
        return Client(self.bot.settings().socket_path).call(what, **arguments)

    def _wait_until_it_answers(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.ask("status")
                return
            except DaemonNotRunning:
                if self._process.poll() is not None:
                    raise StreamError(f"the daemon ended at once:\n{tail(self.bot.log)}") from None
                if time.monotonic() > deadline:
                    raise StreamError(f"the daemon does not answer:\n{tail(self.bot.log)}") from None
            time.sleep(0.2)


def end_on_sigterm() -> None:
    """SIGTERM ends this program as Ctrl-C does, so that the daemon it started is stopped too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def to_its_end(run: Callable[[], int]) -> int:
    """A resumable command: its exit code, or what a user's mistake or a stop makes of it."""
    end_on_sigterm()
    try:
        return run()
    except HoldfastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command continues where it was", file=sys.stderr)
        return 130


def stop_daemon(bot: Bot) -> None:
    """Ends a daemon that an earlier run left behind, if one answers."""
    try:
        pid = Client(bot.settings().socket_path, timeout=5).call("status")["daemon"]["pid"]
    except HoldfastError:
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while bot.settings().socket_path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def cycles(bot: Bot) -> list[Cycle]:
    """All cycles so far, oldest first; the daemon must not run."""
    if not bot.settings().store_path.exists():
        return []
    with Store.open(bot.settings().store_path, read_only=True) as store:
        return sorted(store.cycles(1_000_000), key=lambda cycle: cycle.id)


def outcome(bot: Bot) -> Outcome:
    """Matrix, metrics and costs; the daemon must not run."""
    settings = bot.settings()
    with Store.open(settings.store_path, read_only=True) as store:
        matrix = report.matrix(store)
        ran = sorted(store.cycles(1_000_000), key=lambda cycle: cycle.id)
        champion = store.champion()
        made = store.model(champion.version) if champion and champion.version is not None else None
        return Outcome(
            matrix=matrix,
            metrics=matrix.metrics(),
            cycles=tuple(report.cycle_report(store, cycle.id) for cycle in ran),
            training_seconds=sum(_training_seconds(store, settings, cycle) for cycle in ran),
            state_bytes=_folder_bytes(result_files(settings.state_dir / made.result)["state"]) if made else 0,
        )


def answers(bot: Bot) -> dict[str, Answer]:
    """The champion's answers in its newest exams, by the collector's row id; the daemon must not run."""
    found: dict[str, Answer] = {}
    with Store.open(bot.settings().store_path, read_only=True) as store:
        champion = store.champion()
        model = store.model(champion.version) if champion and champion.version is not None else None
        exams = {s.exam for s in store.scores() if model and s.model == model.adapter_hash}
        for exam in sorted(exams):
            given = store.predictions(model.adapter_hash, exam) if model else {}
            for row in store.rows_by_hash(list(given)):
                answer = given[row.hash]
                right = answer.exact_match == 1
                found[row.id] = Answer(question=row.question, given=answer.prediction, right=right)
    return found


def _training_seconds(store: Store, settings: Settings, cycle: Cycle) -> float:
    """Of all attempts that were trained; a blend has its source's report. Trials of `auto` are gone."""
    made = [each for each in store.candidates(cycle.id) if each.kind != rescue.Kind.BLEND]
    paths = [result_files(settings.state_dir / candidate.result)["report"] for candidate in made]
    return sum(TrainReport.from_json(path.read_text()).cpu_seconds for path in paths if path.exists())


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def share_base(prepared: Bot) -> dict[str, Any]:
    """The setting with which another bot loads the base that this one has prepared already."""
    ready = prepared_base(prepared.settings())
    return {"model.base": ready.path} if ready else {}


def hardware() -> str:
    """The machine and its arithmetic, in words, for tables of measurements."""
    import torch

    from strategies.model import uses_bfloat16

    if torch.cuda.is_available():
        machine, device = torch.cuda.get_device_name(), torch.device("cuda")
    else:
        machine, device = f"{len(os.sched_getaffinity(0))} cores of {_processor()}", torch.device("cpu")
    return f"{machine} in {'bfloat16' if uses_bfloat16('auto', device) else 'float32'}"


def code() -> str:
    """The commit that measures, with a `+` where files were edited; "" outside a checkout."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--exclude=*",
        "--dirty=+",
        "--abbrev=12",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else "an unnamed CPU"
