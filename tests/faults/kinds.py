"""The kinds of fault. Each is a trial: a bot, what goes wrong, what must come of it.

A kind returns "recovered" when the cycle came to its end by itself, and "refused" when it ended with an error
that says what to do, which was done, and then all went well. Anything else raises.
"""

import shutil
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb

from storage.records import Cycle, State
from tests.daemons import SECONDS, cli
from tests.faults import places, power
from tests.faults.bench import Broken, Trial, can_break_a_disk, can_mount
from tests.faults.places import MLFLOW

Kind = Callable[[Trial], str]
KINDS: dict[str, Kind] = {}
# What a kind asks of the machine and the account, beside the state on a file system of its own.
NEEDS: dict[str, Callable[[Path], bool]] = {
    "disk full": can_mount,
    "disk fails": can_break_a_disk,
    "read-only state": can_mount,
}


def kind(name: str) -> Callable[[Kind], Kind]:
    def register(function: Kind) -> Kind:
        KINDS[name] = function
        return function

    return register


def _recovers(trial: Trial, **fault: object) -> str:
    trial.promoted(trial.run(trial.armed(**fault)))
    return "recovered"


@kind("kill -9 of the daemon")
def _(trial: Trial) -> str:
    return _recovers(trial, **trial.draw("daemon"), deed="kill")


@kind("kill -9 of the worker")
def _(trial: Trial) -> str:
    return _recovers(trial, **trial.draw("worker"), deed="kill")


@kind("SIGTERM to the daemon")
def _(trial: Trial) -> str:
    return _recovers(trial, **trial.draw("daemon"), deed="term")


@kind("SIGTERM to the worker")
def _(trial: Trial) -> str:
    return _recovers(trial, **trial.draw("worker"), deed="term")


@kind("power cut")
def _(trial: Trial) -> str:
    process = trial.dice.choice(("daemon", "worker"))
    trial.on_death = lambda: _cut(trial)
    return _recovers(trial, **trial.draw(process), deed="power")


def _cut(trial: Trial) -> None:
    for lost in power.cut(trial.state, trial.home / "synced", trial.dice):
        with (trial.home / "daemon.log").open("a") as log:
            log.write(f"power cut: {lost}\n")
    power.everything(trial.state, trial.home / "synced")


@kind("kill -9 during an erasure")
def _(trial: Trial) -> str:
    return _recovers_erasing(trial, "kill")


@kind("power cut during an erasure")
def _(trial: Trial) -> str:
    """Of a row that the champion has learned; the audit looks for it everywhere afterwards."""
    trial.on_death = lambda: _cut(trial)
    return _recovers_erasing(trial, "power")


def _recovers_erasing(trial: Trial, deed: str) -> str:
    _erase(trial)
    return _recovers(trial, **trial.draw("daemon", places.ERASING), deed=deed)


def _erase(trial: Trial) -> None:
    trial.erases = True
    trial.put_back("taught")
    trial.counts = trial.bench.counts["erasing"]


@kind("out of memory")
def _(trial: Trial) -> str:
    """A limit of the worker's address space: what it may take more than it has."""
    fault = trial.armed(
        **trial.draw("worker"), deed="memory", amount=trial.dice.choice((0, 1 << 16, 1 << 20, 1 << 24))
    )
    cycle = trial.run(fault)
    if cycle.state is State.FAILED:
        trial.refused(cycle, "memory ran out")
        trial.promoted(trial.again())
        return "refused"
    trial.promoted(cycle)
    return "recovered"


@kind("MLflow down")
def _(trial: Trial) -> str:
    trial.on_wait = lambda reason: (trial.home / "mlflow-is-back").touch()
    return _recovers(trial, **trial.draw("daemon", MLFLOW), deed="mlflow")


@kind("MLflow fails once")
def _(trial: Trial) -> str:
    """In the middle of registering: with the request refused, or done and the answer lost."""
    return _recovers(trial, **trial.draw("daemon", MLFLOW), deed="mlflow", amount=1)


@kind("MLflow slow")
def _(trial: Trial) -> str:
    return _recovers(trial, **trial.draw("daemon", MLFLOW), deed="slow", amount=2)


@kind("clock jumps")
def _(trial: Trial) -> str:
    """Back or forward by an hour, by a second, or by months, in the middle of a cycle."""
    hours = trial.dice.choice((-1, 1, -24 * 200, 24 * 200, 1 / 3600, -1 / 3600))
    return _recovers(trial, **trial.draw("daemon"), deed="jump", amount=int(hours * 3600))


@kind("collector holds the lock")
def _(trial: Trial) -> str:
    with _held(trial.home / "qa.duckdb") as release:
        config = trial.config.read_text()
        trial.config.write_text(config.replace("[source]", "[source]\nbusy_timeout = 1.0"))
        trial.on_wait = lambda reason: release()
        trial.promoted(trial.run())
    if not any("open for writing" in reason for reason in trial.heard):
        raise Broken(f"the daemon waited for {trial.heard}")
    (trial.home / "fired").touch()
    return "recovered"


@contextmanager
def _held(path: Path):  # type: ignore[no-untyped-def]
    connection = duckdb.connect(str(path))
    try:
        yield connection.close
    finally:
        connection.close()


@kind("two daemons")
def _(trial: Trial) -> str:
    """The second one is told about the first, which does not notice."""
    with trial.daemon() as daemon:
        number = daemon.retrain()
        second = trial.daemon()
        code = second.process.wait(SECONDS)
        second.__exit__(None, None, None)
        log = (trial.home / "daemon.log").read_text()
        if code != 1 or "runs on" not in log or "`daemon status`" not in log:
            raise Broken(f"the second daemon ended with {code}: {log}")
        if daemon.ended(number)["state"] != "promoted" or daemon.stop() != 0:
            raise Broken("the first daemon did not go on")
    (trial.home / "fired").touch()
    return "refused"


@kind("disk full")
def _(trial: Trial) -> str:
    """A small tmpfs with a few bytes left, or no inode; a person makes room and says the command."""
    with trial.bench.small_disk():
        ballast = trial.state / ".ballast"
        process = trial.dice.choice(("daemon", "worker"))
        left = trial.dice.choice((0, 4096, 40_000, 400_000, -1))
        trial.on_wait = lambda reason: shutil.rmtree(ballast, ignore_errors=True)
        cycle = trial.run(trial.armed(**trial.draw(process), deed="full", amount=left))
        shutil.rmtree(ballast, ignore_errors=True)
        how = _again_if_failed(trial, cycle, "space")
        trial.check()
    return how


def _again_if_failed(trial: Trial, cycle: Cycle, *words: str) -> str:
    if cycle.state is State.FAILED:
        trial.refused(cycle, *words)
        cycle = trial.again()
        how = "refused"
    else:
        how = "recovered"
    trial.promoted(cycle)
    return how


@kind("read-only state")
def _(trial: Trial) -> str:
    """The daemon does not start, and says of which directory; writable again, it does."""
    with trial.bench.small_disk():
        trial.bench.remount("ro")
        ran = cli(trial.config, "run")
        if ran.returncode == 0 or "read-only" not in ran.stderr or "Traceback" in ran.stderr:
            raise Broken(f"on a read-only state: {ran.returncode}, {ran.stderr}")
        trial.bench.remount("rw")
        (trial.home / "fired").touch()
        trial.promoted(trial.run())
        trial.check()
    return "refused"


@kind("disk fails")
def _(trial: Trial) -> str:
    """The state becomes read-only in mid-cycle; a person stops the daemon, repairs the disk, starts it."""
    with trial.bench.real_disk():
        fault = trial.armed(**trial.draw(trial.dice.choice(("daemon", "worker"))), deed="broken")
        with ExitStack() as stack:
            stack.push(daemon := trial.daemon_armed(fault))  # not entered: it may die before it is ready
            trial.meets_trouble(daemon)
            if daemon.process.poll() is None and daemon.stop() != 0:
                raise Broken(f"on a read-only state the daemon stopped with {daemon.process.returncode}")
        doctor = cli(trial.config, "doctor").stdout
        if trial.went_off() and (
            "FAIL  state" not in doctor or "read-only" not in doctor or "journalctl -k" not in doctor
        ):
            raise Broken(f"`daemon doctor` says only: {doctor}")
        trial.bench.repair()
        cycle = trial.run(begun=trial.was_asked())
        how = _again_if_failed(trial, cycle, "read-only")
        trial.check()
    return how


# Corruptions: what was made is changed behind the daemon's back while it is down.


def _stopped_after(trial: Trial, state: State) -> None:
    """A cycle whose daemon died when it had reached this state."""
    nth = list(_ORDER).index(state) + 1
    fault = trial.armed(place="storage.store:Store.advance", moment="after", nth=nth)
    with trial.daemon_armed(fault) as daemon:
        daemon.retrain()
        daemon.process.wait(SECONDS)
    trial.extra = {}


_ORDER = (State.PULLED, State.SNAPSHOTTED, State.TRAINED, State.EVALUATED, State.DECIDED)


def _damage(trial: Trial, path: Path) -> str:
    """Truncated, or one byte turned."""
    data = path.read_bytes()
    (trial.home / "fired").touch()
    if trial.dice.random() < 0.5:
        path.write_bytes(data[: trial.dice.randrange(len(data))])
        return "truncated"
    place = trial.dice.randrange(len(data))
    path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
    return "turned"


def _refuses(trial: Trial, path: Path, *, start: bool = True) -> str:
    """With this file damaged the cycle fails and the audit names it; put back, all goes well. Files of failed
    cycles are kept, or the audit could not see it."""
    kept = trial.home / "kept"
    shutil.copy(path, kept)
    _damage(trial, path)
    trial.config.write_text(trial.config.read_text() + "[retention]\ncheckpoints = 1\n")
    trial.refused(trial.run_on() if start else trial.run(), str(path))
    found = trial.findings()
    if not any(str(path) in told for told in found):
        raise Broken(f"the audit does not name {path}: {found}")
    with trial.store() as store:
        if len(store.promotions()) != trial.number - 1:
            raise Broken("something was promoted from a damaged file")
    shutil.copy(kept, path)
    trial.promoted(trial.again())
    return "refused"


@kind("corrupted checkpoint")
def _(trial: Trial) -> str:
    """Costs time and not the cycle: the training begins again."""
    nth = trial.counts["worker strategies.checkpoint:Checkpoints.save"]
    fault = trial.armed(
        process="worker",
        place="strategies.checkpoint:Checkpoints.save",
        moment="after",
        nth=trial.dice.randint(1, nth - 1),
        deed="power",
    )

    def damage() -> None:
        found = sorted((trial.state / "cycles").glob("*/work/checkpoint*"))
        if not found:
            raise Broken("there is no checkpoint to damage")
        _damage(trial, trial.dice.choice(found))

    trial.on_death = damage
    trial.promoted(trial.run(fault))
    return "recovered"


@kind("corrupted snapshot")
def _(trial: Trial) -> str:
    _stopped_after(trial, trial.dice.choice((State.SNAPSHOTTED, State.TRAINED, State.EVALUATED)))
    (folder,) = (p for p in (trial.state / "snapshots").iterdir() if p.name == trial.cycle().snapshot)
    files = sorted(p for p in folder.rglob("*.parquet"))
    return _refuses(trial, trial.dice.choice(files))


@kind("tampered suite")
def _(trial: Trial) -> str:
    """An answer of a frozen suite, in the store itself."""
    _stopped_after(trial, State.TRAINED)
    with duckdb.connect(str(trial.settings.store_path)) as store:
        key, task, before = store.execute(
            "SELECT hash, task, answer FROM rows WHERE split = 'suite' ORDER BY hash LIMIT 1"
        ).fetchall()[0]
        store.execute("UPDATE rows SET answer = 'tampered' WHERE hash = ?", [key])
    trial.refused(trial.run_on(), f"{task}@v1")
    found = trial.findings()
    if not any(f"{task}@v1" in told for told in found):
        raise Broken(f"the audit does not name the suite {task}@v1: {found}")
    with duckdb.connect(str(trial.settings.store_path)) as store:
        store.execute("UPDATE rows SET answer = ? WHERE hash = ?", [before, key])
    trial.promoted(trial.again())
    return "refused"


@kind("truncated adapter")
def _(trial: Trial) -> str:
    """Of the candidate after its training, or of the champion that the next training would continue."""
    if trial.beginning == "new" or trial.dice.random() < 0.5:
        _stopped_after(trial, State.TRAINED)
        return _refuses(trial, _adapter(trial, trial.number))
    return _refuses(trial, _adapter(trial, 1), start=False)


def _adapter(trial: Trial, cycle: int) -> Path:
    (found,) = (trial.state / "cycles" / str(cycle) / "train").rglob("adapter_model.safetensors")
    return found


# The sweep: every place, and every way to stop a process there.


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where the sweep stops a process, and how."""

    kind: str
    deed: str
    process: str
    place: str
    moment: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.moment} {self.place}"


_STOPS = (
    ("kill -9 of the daemon", "kill", "daemon", places.PLACES["daemon"]),
    ("kill -9 of the worker", "kill", "worker", places.PLACES["worker"]),
    ("kill -9 during an erasure", "kill", "daemon", places.ERASING),
    ("SIGTERM to the daemon", "term", "daemon", places.PLACES["daemon"]),
    ("SIGTERM to the worker", "term", "worker", places.PLACES["worker"]),
    ("power cut", "power", "daemon", places.PLACES["daemon"]),
    ("power cut", "power", "worker", places.PLACES["worker"]),
    ("power cut during an erasure", "power", "daemon", places.ERASING),
)
POINTS = [
    Point(kind=name, deed=deed, process=process, place=place, moment=moment)
    for name, deed, process, among in _STOPS
    for place in among
    for moment in ("before", "after")
]


def stop_at(trial: Trial, point: Point) -> str:
    """Which call of the place it is, the dice choose."""
    if point.place in places.ERASING:
        _erase(trial)
    if point.deed == "power":
        trial.on_death = lambda: _cut(trial)
    where = {**trial.draw(point.process, (point.place,)), "moment": point.moment}
    return _recovers(trial, **where, deed=point.deed)
