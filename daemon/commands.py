"""What the socket's commands do in a running daemon: the operations, plus what only a daemon knows.

Runs on the control server's client threads; everything it calls may be called from any thread.
"""

import inspect
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon import operations, statedir
from daemon.base import prepare_base, prepared_base
from daemon.control import ClientGone, Request
from daemon.executor import OnProgress, Stop, WorkerExecutor
from daemon.flight import Activity, Flight
from daemon.settings import Settings
from storage.errors import ControlError, Interrupted, StoreError
from storage.records import Cycle, State
from storage.registry import Registry
from storage.store import Store
from strategies import base
from strategies.contract import PreparedBase, PrepareJob, Progress

HEARTBEAT_SECONDS = 5.0  # so that a follower notices a dead daemon, and the daemon a dead follower
ERASURE_SECONDS = 120.0  # a client waits for an erasure to be finished; it goes on without
_LARGEST = 2**63 - 1  # the store's numbers end there
LINES_A_SECOND = 10.0  # of progress that a follower gets at most
# Which of the worker's stages report progress while a cycle stands where.
_STAGES = {
    State.REQUESTED: ("prepare",),
    State.PULLED: ("prepare",),
    State.SNAPSHOTTED: ("load", "train", "validate", "fisher", "blend", "evaluate"),
    State.TRAINED: ("load", "evaluate"),
}


class CycleExecutor(WorkerExecutor):
    """The worker of a cycle or of an ingest. Both may need the base at once: only one prepares it."""

    _preparing = threading.Lock()

    def prepare(self, job: PrepareJob, on_progress: OnProgress, stop: Stop) -> PreparedBase:
        with self._preparing:
            # Asked again: the other one may have done it while we waited.
            return base.prepared(Path(job.out)) or super().prepare(job, on_progress, stop)


def make_executor(settings: Settings) -> CycleExecutor:
    return CycleExecutor(time_limit=settings.training.time_limit * 60.0)


def prepared(
    settings: Settings, on_progress: OnProgress = lambda progress: None, stop: Stop | None = None
) -> PreparedBase:
    """The base, made ready by a worker of its own when that was not done before."""
    if prepared_base(settings) is None:
        statedir.refuse_root(settings.state_dir, "ask")  # all others have become the owner by now
    with make_executor(settings) as executor:
        return prepare_base(settings, executor, on_progress, stop or Stop())


@dataclass(kw_only=True)
class Daemon:
    """What commands work on. The service owns it and replaces `settings` and `registry` on reload."""

    settings: Settings
    store: Store
    registry: Registry
    flight: Flight
    facts: Callable[[], dict[str, Any]]  # what only the service knows, for `status`
    stop: Stop = field(default_factory=Stop)  # set when the daemon ends


class Commands:
    """One method a command; its parameters are the command's arguments."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def __call__(self, request: Request) -> dict[str, Any]:
        method = getattr(self, f"do_{request.command}", None)
        if method is None:
            known = ", ".join(sorted(name[3:] for name in dir(self) if name.startswith("do_")))
            raise ControlError(f"there is no command {request.command!r}; commands: {known}")
        _check_arguments(request, method)
        result: dict[str, Any] = method(request, **request.args)
        return result

    def do_status(self, request: Request) -> dict[str, Any]:
        daemon = self._daemon
        told = operations.status(daemon.settings, daemon.store)
        activity = daemon.flight.activity
        cycle = daemon.store.cycle(activity.cycle_id) if activity.cycle_id is not None else None
        return {**told, "daemon": {**daemon.facts(), "activity": shown(activity, cycle)}}

    def do_history(self, request: Request, limit: int = 20) -> dict[str, Any]:
        return operations.history(self._daemon.store, limit)

    def do_show(self, request: Request, cycle: int) -> dict[str, Any]:
        return operations.show(self._daemon.store, cycle)

    def do_quarantine(self, request: Request, limit: int = 100, reason: str | None = None) -> dict[str, Any]:
        return operations.quarantine(self._daemon.store, limit, reason)

    def do_audit(self, request: Request) -> dict[str, Any]:
        daemon = self._daemon
        return operations.audit(
            daemon.settings, daemon.store, daemon.registry, lambda name: request.emit({"check": name})
        )

    def do_prune(self, request: Request, dry_run: bool = True) -> dict[str, Any]:
        """What would go; between two cycles the daemon lets it go by itself."""
        told = operations.prunable(self._daemon.settings, self._daemon.store)
        if dry_run:
            return told
        self._daemon.flight.wake(untidy=True)
        return {**told, "later": True}

    def do_serving(self, request: Request, version: int | None = None) -> dict[str, Any]:
        return operations.serving(self._daemon.settings, self._daemon.store, version)

    def do_retrain(self, request: Request, wait: bool = False) -> dict[str, Any]:
        cycle, joined = self._daemon.flight.request("manual", request.who)
        request.emit({"cycle": cycle.id, "state": cycle.state, "joined": joined})
        if wait:
            cycle = self._follow(cycle.id, request)
        return {"cycle": operations.plain(cycle), "joined": joined}

    def do_follow(self, request: Request, cycle: int | None = None) -> dict[str, Any]:
        running = self._daemon.flight.activity.cycle_id
        chosen = cycle if cycle is not None else running
        if chosen is None:
            raise ControlError("no cycle runs; `daemon retrain-now --wait` starts one")
        return {"cycle": operations.plain(self._follow(chosen, request))}

    def do_cancel(self, request: Request, cycle: int | None = None) -> dict[str, Any]:
        return {"cycle": operations.plain(self._daemon.flight.cancel(request.who, cycle))}

    def do_pause(self, request: Request) -> dict[str, Any]:
        told = operations.pause(self._daemon.store, request.who)
        return {**told, "running": self._daemon.flight.activity.cycle_id}

    def do_resume(self, request: Request) -> dict[str, Any]:
        told = operations.resume(self._daemon.store, request.who)
        self._daemon.flight.wake()
        return told

    def do_promote(self, request: Request, version: int, why: str) -> dict[str, Any]:
        daemon = self._daemon
        return self._moved(operations.promote(daemon.store, daemon.registry, version, request.who, why))

    def do_rollback(self, request: Request, why: str) -> dict[str, Any]:
        daemon = self._daemon
        return self._moved(operations.rollback(daemon.store, daemon.registry, request.who, why))

    def do_erase(
        self,
        request: Request,
        why: str,
        where: list[str],
        row: str | None = None,
        task: str | None = None,
        before: str | None = None,
        contains: str | None = None,
        dry_run: bool = True,
    ) -> dict[str, Any]:
        """Begun at once, finished between two cycles: a cycle that runs is cancelled for it."""
        daemon = self._daemon
        which = {"row": row, "task": task, "before": before, "contains": contains, "where": where}
        if dry_run:
            return operations.erase_plan(daemon.settings, daemon.store, **which)
        begun = operations.erase(daemon.settings, daemon.store, request.who, why, **which)
        for cycle in daemon.store.unfinished():
            if daemon.store.is_cancelled(cycle.id):
                daemon.flight.halt(cycle.id)
        daemon.flight.wake(untidy=True)
        return {"erasure": begun, "done": self._await_erasure(begun["id"], request)}

    def _await_erasure(self, number: int, request: Request) -> bool:
        """Whether it was finished while the client could be kept waiting."""
        deadline, pace = time.monotonic() + ERASURE_SECONDS, threading.Event()
        while time.monotonic() < deadline and not self._daemon.flight.closing:
            with suppress(StoreError):  # a reader has it for a while; the erasure has begun all the same
                if any(one.id == number and one.done_at for one in self._daemon.store.erasures()):
                    return True
            request.emit({"erasure": number})
            pace.wait(0.2)
        return False

    def do_ingest(self, request: Request, paths: list[str]) -> dict[str, Any]:
        daemon = self._daemon
        files = [Path(path) for path in paths]
        if not files or not all(path.is_absolute() for path in files):
            raise ControlError("ingest needs absolute paths of files")

        def prepare() -> PreparedBase:
            return prepared(daemon.settings, lambda p: request.emit({"progress": progress(p)}), daemon.stop)

        def tell(so_far: str) -> None:
            with suppress(ClientGone):  # what was asked for is done all the same
                request.emit({"taken": so_far})
            if daemon.stop.is_set():
                raise ControlError("the daemon is stopping")

        try:
            return operations.ingest(daemon.settings, daemon.store, files, prepare, tell)
        except Interrupted:
            raise ControlError("the daemon is stopping; ingest again when it is back") from None

    def _moved(self, told: dict[str, Any]) -> dict[str, Any]:
        if told["warning"]:
            self._daemon.flight.wake(untidy=True)  # the alias is repaired as soon as MLflow is back
        return told

    def _follow(self, cycle_id: int, request: Request) -> Cycle:
        """Tells the client how the cycle goes until it has ended."""
        flight, seen, pace = self._daemon.flight, -1, threading.Event()
        while True:
            cycle = self._daemon.store.cycle(cycle_id)
            if cycle is None:
                raise ControlError(f"there is no cycle {cycle_id}; see `daemon history`")
            activity = flight.activity
            told = shown(activity, cycle) if activity.cycle_id == cycle_id else {"behind": activity.cycle_id}
            request.emit({**told, "cycle": cycle_id, "state": cycle.state})
            if cycle.state.ended:
                return cycle
            if flight.closing:
                raise ControlError(f"the daemon is stopping; cycle {cycle_id} continues at its next start")
            seen = flight.news(seen, HEARTBEAT_SECONDS).number
            pace.wait(1 / LINES_A_SECOND)


def shown(activity: Activity, cycle: Cycle | None) -> dict[str, Any]:
    """An activity as JSON values, without progress of a stage that the cycle has left behind."""
    waiting, step = activity.waiting, activity.progress
    fresh = step is not None and cycle is not None and step.stage in _STAGES.get(cycle.state, ())
    return {
        "cycle": activity.cycle_id,
        "progress": progress(step) if step and fresh else None,
        "waiting": operations.plain(waiting) if waiting else None,
    }


def progress(step: Progress) -> dict[str, Any]:
    return dict(operations.plain(step))


def _check_arguments(request: Request, method: Callable[..., Any]) -> None:
    """Names and types of the arguments, as the method declares them."""
    signature = inspect.signature(method)
    try:
        bound = signature.bind(request, **request.args)
    except TypeError as error:
        raise ControlError(f"{request.command}: {error}") from None
    for name, value in bound.arguments.items():
        wanted = signature.parameters[name].annotation
        if name == "request":
            continue
        if not _fits(value, wanted):
            raise ControlError(f"{request.command}: {name} = {value!r} is not of the type {_name(wanted)}")
        if problem := _unusable(value):
            raise ControlError(f"{request.command}: {name} = {repr(value)[:200]} {problem}")


def _fits(value: Any, wanted: Any) -> bool:
    if wanted == list[str]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, wanted) and (not isinstance(value, bool) or wanted is bool)


def _unusable(value: Any) -> str:
    """Why no command can do anything with a value of the right type; it is not the store's fault."""
    if isinstance(value, int) and not 0 <= value <= _LARGEST:
        return f"is not between 0 and {_LARGEST}"
    try:
        "".join(map(str, value if isinstance(value, list) else [value])).encode()
    except UnicodeEncodeError:
        return "is not UTF-8; write it, or rename the file, in UTF-8"
    return ""


def _name(wanted: Any) -> str:
    return wanted.__name__ if isinstance(wanted, type) else str(wanted)
