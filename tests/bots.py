"""A whole bot for tests: tiny base, real store, real MLflow, stages run in this process.

`InlineExecutor` is an executor like any other: it runs the worker's own stage functions, only without
the child process, so that a test pays the imports once.
"""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import duckdb

from daemon import audit, config, operations
from daemon.commands import Commands, Daemon
from daemon.cycle import CycleRunner
from daemon.executor import OnProgress, Stop
from daemon.flight import Flight
from daemon.settings import Settings
from storage.errors import Interrupted
from storage.records import Cycle, State
from storage.registry import Registry
from storage.store import Store
from strategies.contract import BlendJob, EvaluateJob, PreparedBase, PrepareJob, TrainJob, TrainReport
from tests.toys import tiny_base

COLOURS = ("red", "green", "blue", "white")
FLAVOURS = ("sweet", "sour", "salty", "bitter")


class InlineExecutor:
    """Runs stages here. `before` and `after` let a test stand in a doorway: they get the stage's name."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.before: Callable[[str], None] = lambda stage: None
        self.after: Callable[[str], None] = lambda stage: None

    def prepare(self, job: PrepareJob, on_progress: OnProgress, stop: Stop) -> PreparedBase:
        from strategies.base import prepare

        self._enter("prepare")
        return prepare(job)

    def train(self, job: TrainJob, on_progress: OnProgress, stop: Stop) -> TrainReport:
        from strategies.loop import train

        self._enter("train")
        try:
            report = train(job, on_progress, stop.is_set)
        except Interrupted:
            stop.check()  # a cancel, if that is what it was
            raise
        self.after("train")
        return report

    def blend(self, job: BlendJob, on_progress: OnProgress, stop: Stop) -> None:
        from strategies.blend import blend

        self._enter("blend")
        blend(job, on_progress)
        self.after("blend")

    def evaluate(self, job: EvaluateJob, on_progress: OnProgress, stop: Stop) -> None:
        from strategies.evaluation import evaluate

        self._enter("evaluate")
        evaluate(job, on_progress)
        self.after("evaluate")

    def close(self) -> None:
        pass

    def _enter(self, stage: str) -> None:
        self.calls.append(stage)
        self.before(stage)


class Clock:
    """A clock that a test moves; every reading is a second later, so that order is visible."""

    def __init__(self) -> None:
        self.now = datetime(2026, 3, 1, 2, 30)

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


@dataclass(kw_only=True)
class Bot:
    """One bot in a temporary directory."""

    home: Path
    settings: Settings
    clock: Clock
    executor: InlineExecutor
    store: Store
    registry: Registry

    def request(self) -> Cycle:
        return self.store.request_cycle("manual", "test")

    def run(self, cycle: Cycle | None = None, stop: Stop | None = None) -> Cycle:
        cycle = cycle or self.request()
        return self.runner().run(cycle.id, stop or Stop())

    def runner(self) -> CycleRunner:
        return CycleRunner(self.settings, self.store, self.registry, self.executor, clock=self.clock)

    def reopen(self) -> None:
        """As after a restart: nothing survives but what is on disk."""
        self.store.close()
        self.store = Store.open(self.settings.store_path, clock=self.clock)
        self.registry = operations.open_registry(self.settings, self.store)

    def collect(self, rows: Iterable[tuple[str, str, str, str, str]]) -> None:
        collect(self.home / "qa.duckdb", rows)


def fails(stage: str, error: Exception) -> Callable[[str], None]:
    """For an executor's `before`: that stage ends in the error."""

    def fail(begun: str) -> None:
        if begun == stage:
            raise error

    return fail


def write_config(home: Path, base: Path, **overrides: object) -> Path:
    """A config for a tiny bot whose collector is `home/qa.duckdb`; overrides are dotted keys."""
    values: dict[str, object] = {
        "bot.name": "test-bot",
        "model.base": str(base),
        "model.max_tokens": 128,
        "model.dtype": "float32",
        "lora.rank": 4,
        "training.epochs": 2,
        "training.learning_rate": 0.01,
        "training.batch_size": 8,
        "training.patience": 0,
        "training.checkpoint_steps": 2,
        "training.threads": 1,
        "source.path": str(home / "qa.duckdb"),
        "source.columns.split": "split",
        "strategy.fisher_rows": 8,
        "evaluation.max_new_tokens": 12,
        "gate.max_drop": 1.0,
        "gate.min_gain": -1.0,
        "gate.bootstrap": 200,
        "schedule.cron": "",
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    tables: dict[str, list[str]] = {}
    for key, value in values.items():
        table, _, name = key.rpartition(".")
        tables.setdefault(table, []).append(f"{name} = {config._toml(value)}")
    path = home / "config.toml"
    path.write_text("\n".join(f"[{table}]\n" + "\n".join(lines) + "\n" for table, lines in tables.items()))
    return path


def make_bot(home: Path, base: Path | None = None, **overrides: object) -> Bot:
    home.mkdir(parents=True, exist_ok=True)
    settings = config.load(write_config(home, base or tiny_base(home / "base"), **overrides))
    settings.state_dir.mkdir(mode=0o700, exist_ok=True)
    if not (settings.state_dir / "mlflow.db").exists():
        shutil.copy(fresh_mlflow(), settings.state_dir / "mlflow.db")
    clock = Clock()
    store = Store.open(settings.store_path, clock=clock)
    registry = operations.open_registry(settings, store)
    return Bot(
        home=home, settings=settings, clock=clock, executor=InlineExecutor(), store=store, registry=registry
    )


@functools.cache
def fresh_mlflow() -> Path:
    """An MLflow database as MLflow makes it: its migrations take seconds, so they run once."""
    folder = Path(tempfile.mkdtemp(prefix="holdfast-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Registry(
        f"sqlite:///{folder / 'mlflow.db'}", "template", folder, Path("unused"), store_id="template"
    ).check()
    return folder / "mlflow.db"


def collect(path: Path, rows: Iterable[tuple[str, str, str, str, str]]) -> None:
    """What a collector does: opens its file, appends (id, task, question, answer, split), closes it."""
    with duckdb.connect(str(path)) as connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS qa (id TEXT, task TEXT, question TEXT, answer TEXT, split TEXT)"
        )
        connection.executemany("INSERT INTO qa VALUES (?, ?, ?, ?, ?)", list(rows))


def lesson(
    task: str, answers: tuple[str, ...] = COLOURS, train: int = 16, suite: int = 8
) -> list[tuple[str, str, str, str, str]]:
    """A little closed-label task: which answer belongs to which numbered thing of the task."""
    splits = ["train"] * train + ["validation"] * 4 + ["suite"] * suite
    return [
        (f"{task}-{n}", task, f"which one is {task} {n}", answers[n % len(answers)], split)
        for n, split in enumerate(splits)
    ]


def audited(bot: Bot) -> list[audit.Finding]:
    return list(audit.examine(bot.settings, bot.store, bot.registry))


def put_back(bot: Bot, copy: Path) -> None:
    """The bot's state as the copy has it. The store is closed."""
    for path in bot.settings.state_dir.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "mlflow.db":  # MLflow keeps it open: it is written over
            path.unlink()
    shutil.copytree(copy, bot.settings.state_dir, dirs_exist_ok=True)


def commands(bot: Bot) -> Commands:
    """What a daemon of the bot would do at its socket; no cycle runs."""
    flight = Flight(bot.store, bot.runner)
    return Commands(
        Daemon(settings=bot.settings, store=bot.store, registry=bot.registry, flight=flight, facts=dict)
    )


def two_promoted(bot: Bot) -> None:
    bot.collect(lesson("colours"))
    assert bot.run().state is State.PROMOTED
    bot.collect(lesson("flavours", FLAVOURS))
    assert bot.run().state is State.PROMOTED


def make_bot_again(bot: Bot, base: Path, **overrides: object) -> Bot:
    """The same bot under another configuration, as after an edit and a restart."""
    bot.store.close()
    other = make_bot(bot.home, base, **overrides)
    bot.store = other.store
    return other
