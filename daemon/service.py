"""`daemon run`: the process that stays.

    main thread       signals, systemd's watchdog and status; touches nothing that may block
    cycles            one cycle at a time, oldest first            (daemon.flight)
    control, client   the socket, one thread a client              (daemon.control, daemon.commands)
    apscheduler       asks for a cycle when it is time, reloads    (daemon.schedule)

Signal handlers only leave a note for the main thread. Nothing here imports torch; training happens
in child processes (daemon.executor).
"""

import json
import logging
import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from daemon import config, erasure, journal, operations, promote, retention, schedule, statedir
from daemon.base import check_champions_base, prepared_base
from daemon.commands import Commands, CycleExecutor, Daemon, make_executor
from daemon.control import ControlServer
from daemon.cycle import CycleRunner
from daemon.flight import Activity, Flight
from daemon.notify import Notifier
from daemon.settings import Settings
from storage.errors import (
    UNREADABLE,
    ConfigError,
    ControlError,
    HoldfastError,
    Interrupted,
    StoreBusy,
    StoreError,
)
from storage.records import utcnow
from storage.registry import Registry
from storage.store import Store

log = logging.getLogger(__name__)

STOP_SECONDS = 5.0  # for a cycle to end at its next checkpoint of the daemon's own work
WORKER_STOP_SECONDS = 25.0  # when a worker has to write its checkpoint first
TURN_SECONDS = 1.0  # of the main loop
POLL_SECONDS = 0.2  # between two tries at start
# Seconds to wait at start for a `daemon ingest` that began while no daemon ran, and for who reads the store.
# So long that systemd's limit of starts is never reached by waiting: five in ten minutes.
START_PATIENCE = 120.0
# Exit codes that systemd restarts: EX_SOFTWARE, and EX_TEMPFAIL while another command works on the state.
# 1 means that a person must act first.
BROKEN, BUSY = 70, 75
_PLAN = "schedule"  # the key in the store's meta: the plan, until when its firings were seen, and the last


def run(config_path: Path) -> int:
    """Runs the daemon until it is told to stop; the exit code."""
    journal.setup()
    os.umask(0o077)
    notifier = Notifier.from_environment()
    mail = _catch_signals()
    settings = config.load(config_path)
    statedir.refuse_root(settings.state_dir, "run")
    statedir.prepare(settings.state_dir)

    def wait(reason: str) -> None:
        notifier.status(f"waits: {reason}")
        with suppress(queue.Empty):
            if mail.get(timeout=POLL_SECONDS) == "stop":
                raise Interrupted

    mine = statedir.held(settings.state_dir, statedir.DAEMON, patience=START_PATIENCE, wait=wait)
    try:
        with mine, _open_store(settings, wait) as store:
            return Service(config_path, settings, store, notifier, mail).run()
    except Interrupted:
        return 0


class Service:
    """The daemon's parts, held together. `run` returns the exit code."""

    def __init__(
        self,
        config_path: Path,
        settings: Settings,
        store: Store,
        notifier: Notifier,
        mail: "queue.SimpleQueue[str]",
    ) -> None:
        self._config_path = config_path
        self._notifier = notifier
        self._mail = mail  # "stop" and "reload", from signal handlers
        self._started = utcnow()
        self._config_problem: str | None = None  # why the last reload was refused
        self._executor: CycleExecutor | None = None
        self._told = ""
        self._pinged = 0.0
        self._due = False  # a firing could not be written down
        self._looked = time.monotonic()  # when the schedule was last compared with the clock
        flight = Flight(store, self._make_runner, housekeeping=self._housekeeping)
        registry = operations.open_registry(settings, store)
        operations.keep_name(settings, store)
        self._daemon = Daemon(
            settings=settings, store=store, registry=registry, flight=flight, facts=self._facts
        )
        self._schedule = schedule.Schedule(self._fire)
        self._control = ControlServer(settings.socket_path, Commands(self._daemon))

    def run(self) -> int:
        daemon, code = self._daemon, BROKEN
        try:
            self._take_up_schedule()
            self._schedule.start()
            daemon.flight.start()
            self._control.start()
            log.info(
                "holdfast %s runs %s in %s",
                operations.software_version(), daemon.settings.bot.name, daemon.settings.state_dir,
                extra={"action": "started"},
            )  # fmt: skip
            self._notifier.ready(self._status_line())
            code = self._loop()
            return code
        finally:
            self._stop(code)

    # The main loop.

    def _loop(self) -> int:
        while True:
            mail = self._receive(TURN_SECONDS)
            if mail == "stop":
                return 0
            if mail == "reload":
                self._notifier.reloading()
                self._schedule.soon(self._reload)
            if not (self._daemon.flight.alive() and self._control.alive()):
                log.critical(
                    "a thread of the daemon died; the log above has the reason", extra={"action": "broken"}
                )
                return BROKEN
            self._look_at_the_clock()
            self._report()

    def _look_at_the_clock(self) -> None:
        """The scheduler waits by a clock that stands still while the machine sleeps and knows of no steps."""
        if time.monotonic() - self._looked >= schedule.LOOK_SECONDS:
            self._looked = time.monotonic()
            self._schedule.look()
            if self._due:
                self._schedule.soon(self._fire_if_due)

    def _receive(self, seconds: float) -> str | None:
        ping = self._notifier.ping_seconds
        try:
            return self._mail.get(timeout=min(seconds, ping or seconds))
        except queue.Empty:
            return None

    def _report(self) -> None:
        """The watchdog is fed only from here: after a turn of this loop that found all threads alive."""
        ping, now = self._notifier.ping_seconds, time.monotonic()
        if ping and now - self._pinged >= ping / 2:
            self._notifier.alive()
            self._pinged = now
        line = self._status_line()
        if line != self._told:
            self._notifier.status(line)
            self._told = line

    def _stop(self, code: int) -> None:
        """Within seconds: the cycle keeps its place, a worker writes its checkpoint."""
        daemon = self._daemon
        self._notifier.stopping("stopping; the running cycle continues at the next start")
        log.info("stopping", extra={"action": "stopping", "cycle": daemon.flight.activity.cycle_id})
        self._schedule.stop()
        daemon.stop.request("shutdown")
        daemon.flight.close()
        self._await_flight()
        self._control.close()
        if daemon.flight.alive():
            # What it is in the middle of is made to be repeated; a store in use is safer unclosed.
            log.warning(
                "work in progress is cut off, it is repeated at the next start", extra={"action": "cut-off"}
            )
            logging.shutdown()
            os._exit(code)
        log.info("stopped", extra={"action": "stopped"})

    def _await_flight(self) -> None:
        executor = self._executor
        working = executor is not None and executor.pid is not None
        deadline = time.monotonic() + (WORKER_STOP_SECONDS if working else STOP_SECONDS)
        while self._daemon.flight.alive() and time.monotonic() < deadline:
            if self._receive(0.1) == "stop":  # asked twice: now
                return

    # What the parts ask of the service.

    def _make_runner(self) -> CycleRunner:
        daemon = self._daemon
        self._executor = make_executor(daemon.settings)
        return CycleRunner(
            daemon.settings,
            daemon.store,
            daemon.registry,
            self._executor,
            clock=daemon.store.clock,
            on_progress=daemon.flight.on_progress,
        )

    def _housekeeping(self) -> bool:
        """Between two cycles; false when something is left to do."""
        erased = self._tidied(erasure.finish, "an erasure is not finished", "unerased")
        return (
            erased
            & self._tidied(_repair_alias, "the champion's alias was not checked", "alias-unchecked")
            & self._tidied(retention.prune, "not everything was pruned", "unpruned")
            & self._tidied(_refresh, "the store was not opened afresh", "unrefreshed")
        )

    def _tidied(
        self, work: Callable[[Settings, Store, Registry], object], otherwise: str, action: str
    ) -> bool:
        daemon = self._daemon
        try:
            work(daemon.settings, daemon.store, daemon.registry)
        except (HoldfastError, OSError) as error:
            log.warning("%s: %s", otherwise, error, extra={"action": action})
            return False
        return True

    def _facts(self) -> dict[str, Any]:
        planned = self._schedule.next_run()
        return {
            "pid": os.getpid(),
            "started_at": operations.moment(self._started),
            "config": str(self._config_path),
            "config_problem": self._config_problem,
            "next_run": operations.moment(planned) if planned else None,
            "torch_loaded": "torch" in sys.modules,
        }

    def _status_line(self) -> str:
        return status_line(self._daemon.flight.activity)

    # The schedule.

    def _fire(self) -> None:
        """It is time. Runs on the scheduler's thread."""
        self._due = False
        self._schedule.fired = datetime.now(UTC)
        try:
            cycle, joined = self._daemon.flight.request("schedule", "schedule")
        except ControlError as error:
            log.info("scheduled cycle skipped: %s", error, extra={"action": "skipped"})
        except HoldfastError as error:  # a full disk, for instance: it is due until it can be written
            log.error("the scheduled cycle waits: %s", error, extra={"action": "unwritten"})
            self._due = True
            return
        else:
            told = "joins the cycle that is queued" if joined else "asked for a cycle"
            log.info("the schedule %s", told, extra={"action": "scheduled", "cycle": cycle.id})
        self._seen()  # afterwards: a crash in between asks twice, and the second finds nothing to do

    def _fire_if_due(self) -> None:
        if self._due:
            self._fire()

    def _take_up_schedule(self) -> None:
        self._catch_up()
        self._plan()
        self._seen()

    def _plan(self) -> None:
        plan = self._daemon.settings.schedule
        self._schedule.plan(plan.cron, plan.timezone)

    def _catch_up(self) -> None:
        """Firings missed while the daemon was down, or the machine slept, become one cycle now."""
        plan, store = self._daemon.settings.schedule, self._daemon.store
        try:
            known = json.loads(store.get_meta(_PLAN) or "{}")
            seen = _time(known["seen"]) if known else None
            if self._schedule.fired is None and "fired" in known:
                self._schedule.fired = _time(known["fired"])
        except UNREADABLE as error:  # at worst a firing is missed
            log.warning("the schedule's state is damaged: %s", error, extra={"action": "unread"})
            known, seen = {}, None
        if seen is not None and (known.get("cron"), known.get("timezone")) == (plan.cron, plan.timezone):
            due = schedule.next_run(plan.cron, plan.timezone, after=self._schedule.unfired(seen))
            if due is not None and due <= datetime.now(UTC):
                log.info("the firing of %s was missed", due.isoformat(), extra={"action": "missed"})
                self._fire()

    def _seen(self) -> None:
        if self._due:
            return  # the next start, too, must find that it was missed
        plan = self._daemon.settings.schedule
        fired = self._schedule.fired
        seen = {
            "cron": plan.cron,
            "timezone": plan.timezone,
            "seen": operations.moment(datetime.now(UTC)),
            **({"fired": operations.moment(fired)} if fired else {}),
        }
        try:
            self._daemon.store.set_meta(_PLAN, json.dumps(seen))
        except StoreError as error:  # a full disk: at worst a cycle is asked for twice
            log.error("the schedule's state was not written: %s", error, extra={"action": "unwritten"})

    # Reload.

    def _reload(self) -> None:
        """SIGHUP: the new settings count from the next cycle; a config that is not valid changes nothing.

        Runs on the scheduler's thread: the store may be busy for longer than the watchdog waits.
        """
        try:
            self._take_settings()
        finally:
            self._notifier.ready(self._status_line())

    def _take_settings(self) -> None:
        try:
            settings = config.load(self._config_path)
            registry = operations.open_registry(settings, self._daemon.store)
            _check_same_bot(self._daemon.settings, settings)
            self._check_base(settings)
        except HoldfastError as error:
            self._config_problem = str(error)
            log.error("config not reloaded, the old one stays: %s", error, extra={"action": "reload-refused"})
        else:
            self._config_problem = None
            self._catch_up()  # by the old plan
            self._daemon.registry, self._daemon.settings = registry, settings
            self._plan()
            self._seen()
            self._daemon.flight.wake(untidy=True)
            log.info("config reloaded, it counts from the next cycle", extra={"action": "reloaded"})

    def _check_base(self, settings: Settings) -> None:
        """Raises `ConfigError` for a base that is known not to be the champion's."""
        champion, base = promote.serving(self._daemon.store), prepared_base(settings)
        if champion is not None and base is not None:
            check_champions_base(settings, base, champion.version, champion.base)


def status_line(activity: Activity) -> str:
    """One line for `systemctl status`."""
    if activity.cycle_id is None:
        return "idle"
    if activity.waiting is not None:
        return f"cycle {activity.cycle_id} waits: {activity.waiting.reason}"
    step = activity.progress
    if step is None:
        return f"cycle {activity.cycle_id}"
    count = f" {step.step}/{step.steps}" if step.steps else ""
    left = f", {step.left:.0f} s left" if step.left is not None else ""
    return f"cycle {activity.cycle_id}: {step.stage}{count}{left}"


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _check_same_bot(old: Settings, new: Settings) -> None:
    for key in ("state_dir", "name"):
        before, after = getattr(old.bot, key), getattr(new.bot, key)
        if before != after:
            raise ConfigError(
                f"bot.{key} changed from {str(before)!r} to {str(after)!r}; that needs a restart"
            )


def _repair_alias(settings: Settings, store: Store, registry: Registry) -> None:
    """After a crash MLflow's alias may lag behind the store."""
    if store.promotions():  # else no alias was ever set; spares a new daemon the import of MLflow
        promote.repair_alias(store, registry)


def _refresh(settings: Settings, store: Store, registry: Registry) -> None:
    store.refresh()


@contextmanager
def _open_store(settings: Settings, wait: Callable[[str], None]) -> Iterator[Store]:
    deadline = time.monotonic() + START_PATIENCE
    while True:
        try:
            store = Store.open(settings.store_path)
            break
        except StoreBusy as error:  # a command that only reads, gone in a moment
            if time.monotonic() > deadline:
                raise
            wait(str(error))
    with store:
        yield store


def _catch_signals() -> "queue.SimpleQueue[str]":
    """Signals as mail. SimpleQueue.put may be called in a handler; locks of other kinds may not."""
    mail: queue.SimpleQueue[str] = queue.SimpleQueue()
    words = {signal.SIGTERM: "stop", signal.SIGINT: "stop", signal.SIGHUP: "reload"}

    def handle(number: int, frame: FrameType | None) -> None:
        mail.put(words[signal.Signals(number)])

    for number in words:
        signal.signal(number, handle)
    return mail
