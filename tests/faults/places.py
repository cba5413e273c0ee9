"""Named places of the cycle, and what can be done to a process that comes by one of them.

A place is a function that the daemon or the worker calls anyway; nothing in them knows of it. A fault is
armed through the environment of a process, so that it reaches the worker as it reaches the daemon, and goes
off once a trial: before or after the n-th call of its place.
"""

import functools
import importlib
import itertools
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tests.faults import power

VARIABLE = "FAULT"

PLACES: dict[str, tuple[str, ...]] = {
    "daemon": (
        "storage.store:Store.advance",
        "storage.row_store:RowStore.accept",
        "storage.row_store:RowStore.save_cursor",
        "storage.store:Store.freeze_suite",
        "storage.store:Store.put_task",
        "storage.store:Store.put_predictions",
        "storage.store:Store.put_scores",
        "storage.store:Store.add_model",
        "storage.store:Store.promote",
        "storage.artifacts:write_manifest",
        "storage.artifacts:write_file",
        "storage.artifacts:fsync",
        "pathlib:Path.rename",
        "daemon.executor:WorkerExecutor._run",
        "daemon.promote:repair_alias",
        "storage.registry:Registry._create_run",
        "storage.packaging:save",
        "storage.registry:Registry._ensure_model",
        "storage.registry:Registry._finish",
        "storage.registry:Registry.log_stream",
        "mlflow:MlflowClient.log_batch",
        "mlflow:MlflowClient.log_artifacts",
        "mlflow:MlflowClient.create_model_version",
        "mlflow:MlflowClient.set_terminated",
        "mlflow:MlflowClient.set_registered_model_alias",
    ),
    "worker": (
        "daemon.worker:Worker.tell",
        "strategies.loop:Learner.optimizer_step",
        "strategies.loop:Learner.validate",
        "strategies.checkpoint:Checkpoints.save",
        "strategies.evaluation:_generate",
        "storage.artifacts:write_manifest",
        "storage.artifacts:write_file",
        "storage.artifacts:fsync",
        "pathlib:Path.rename",
    ),
}
# What the daemon comes by only while it erases.
ERASING = (
    "storage.removals:Removals.erase",
    "storage.removals:Removals.prune",
    "storage.artifacts:remove",
    "storage.registry:Registry.erase",
    "storage.database:Database.rewrite",
    "storage.removals:Removals.erasure_done",
)
# Its every call is a request to MLflow.
MLFLOW = tuple(place for place in PLACES["daemon"] if place.startswith("mlflow:"))

WORKERS: list[Any] = []  # that this daemon has started


@dataclass(frozen=True, kw_only=True)
class Armed:
    """Where, when and how a fault goes off. `home` is the trial's folder."""

    home: str
    process: str = "daemon"
    place: str = ""
    moment: str = "before"
    nth: int = 1
    deed: str = "kill"
    amount: int = 0  # what the deed makes of it: seconds, bytes

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}

    def __str__(self) -> str:
        where = self.place.partition(":")[2]
        return f"{self.deed} {self.moment} call {self.nth} of {where} in the {self.process}"


def arm(process: str) -> None:
    """Called once, in a process that is about to begin its work."""
    told = os.environ.pop(VARIABLE, None)
    if told is None:
        return
    os.environ[VARIABLE] = told  # for a worker of this daemon
    fault = Armed(**json.loads(told))
    home = Path(fault.home)
    (home / f"{process}.pid").write_text(str(os.getpid()))
    if fault.deed == "power":
        power.record(home)
    if fault.deed == "count":
        for place in (*PLACES[process], *(ERASING if process == "daemon" else ())):
            _wrap(place, functools.partial(_count, home / "calls", f"{process} {place}"), after=False)
    elif fault.place and fault.process == process:
        calls = 0

        def come_by() -> None:
            nonlocal calls
            calls += 1
            if calls == fault.nth:
                _go_off(fault)

        _wrap(fault.place, come_by, after=fault.moment == "after")


def _count(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def _wrap(place: str, come_by: Callable[[], None], *, after: bool) -> None:
    module_name, _, path = place.partition(":")
    module = importlib.import_module(module_name)
    *outer, name = path.split(".")
    owner = functools.reduce(getattr, outer, module)
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not after:
            come_by()
        result = original(*args, **kwargs)
        if after:
            come_by()
        return result

    setattr(owner, name, wrapped)
    if owner is module:  # and wherever it was imported by its name
        for other in list(sys.modules.values()):
            if getattr(other, "__name__", "").startswith(("daemon", "storage", "strategies")):
                for known, value in list(vars(other).items()):
                    if value is original:
                        setattr(other, known, wrapped)


def _go_off(fault: Armed) -> None:
    try:
        (Path(fault.home) / "fired").touch(exist_ok=False)
    except FileExistsError:  # a process that was started after it
        return
    DEEDS[fault.deed](fault)


# Deeds.


def _kill(fault: Armed) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal is on its way


def _terminate(fault: Armed) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _kill_both(fault: Armed) -> None:
    """The machine stops: nobody has the time to notice that the other one is gone."""
    for process in ("daemon", "worker"):
        path = Path(fault.home) / f"{process}.pid"
        if path.exists() and (pid := int(path.read_text())) != os.getpid():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    _kill(fault)


def _fill_the_disk(fault: Armed) -> None:
    """All but `amount` bytes of the file system that the state lies on; -1: all of its inodes."""
    ballast = Path(fault.home) / "state" / ".ballast"
    ballast.mkdir()
    try:
        if fault.amount < 0:
            for number in itertools.count():
                (ballast / str(number)).touch()
        free = os.statvfs(ballast)
        left = free.f_bavail * free.f_bsize - fault.amount
        with (ballast / "bytes").open("wb", buffering=0) as file:
            while left > 0:
                left -= file.write(b"\0" * min(left, 1 << 20))
    except OSError:
        return


def _break_the_disk(fault: Armed) -> None:
    """The kernel finds the ext4 that the state lies on damaged, and lets nobody write there any more."""
    device = (Path(fault.home) / "state").stat().st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("a trial")


def _limit_memory(fault: Armed) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + fault.amount, resource.RLIM_INFINITY))


def _jump(fault: Armed) -> None:
    """The machine's clock is set, by `amount` seconds."""
    from storage import records

    records.jumped = timedelta(seconds=fault.amount)  # type: ignore[attr-defined]
    records.utcnow.__code__ = _utcnow.__code__  # everybody has the function already
    real = time.time
    time.time = lambda: real() + fault.amount


def _utcnow() -> datetime:
    """Becomes the body of the one in `storage.records`, where the names are known."""
    return datetime.now(UTC).replace(tzinfo=None) + jumped  # type: ignore[name-defined]  # noqa: F821


def _lose_mlflow(fault: Armed) -> None:
    """From now on each request fails, until the file `mlflow-is-back` is there; `amount` 1: only this one."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    def refuse() -> None:
        if not (Path(fault.home) / "mlflow-is-back").exists():
            raise MlflowException("API request failed: connection refused")

    if fault.amount == 1:
        refuse()
    for name in [name for name in vars(MlflowClient) if not name.startswith("_")]:
        if callable(getattr(MlflowClient, name)):
            _wrap(f"mlflow:MlflowClient.{name}", refuse, after=False)
    refuse()


def _slow(fault: Armed) -> None:
    time.sleep(fault.amount)


DEEDS: dict[str, Callable[[Armed], None]] = {
    "kill": _kill,
    "term": _terminate,
    "power": _kill_both,
    "full": _fill_the_disk,
    "broken": _break_the_disk,
    "memory": _limit_memory,
    "jump": _jump,
    "mlflow": _lose_mlflow,
    "slow": _slow,
}


def unvisited(counts: dict[str, int]) -> list[str]:
    """Places that a calm cycle did not come by: no fault would ever go off there."""
    named = [f"{process} {place}" for process, places in PLACES.items() for place in places]
    return [name for name in named if not counts.get(name)]


def draw(
    dice: random.Random, counts: dict[str, int], process: str, among: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Any call of any place, of all or of these."""
    place = dice.choice(among or PLACES[process])
    return {
        "process": process,
        "place": place,
        "moment": dice.choice(("before", "after")),
        "nth": dice.randint(1, counts[f"{process} {place}"]),
    }
