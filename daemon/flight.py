"""Single flight: one thread that takes cycles, oldest first, each to its end before the next begins.

Knows when a cycle may start, wait, be joined or be stopped; what a cycle does is the runner's
(`daemon.cycle`). Everything that must survive a crash is in the store: on start the thread simply
finds the unfinished cycles there.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Protocol

from daemon import operations
from daemon.executor import Stop
from storage.errors import ControlError, HoldfastError, Interrupted
from storage.records import Cycle, State
from storage.store import Store
from strategies.contract import Progress

log = logging.getLogger(__name__)

HOUSEKEEPING_SECONDS = 600.0  # until what could not be tidied up is tried again
STORE_SECONDS = 10.0  # until a store that could not be used is tried again


class Runner(Protocol):
    """Advances a cycle to its end; see `daemon.cycle.CycleRunner`."""

    def run(self, cycle_id: int, stop: Stop) -> Cycle: ...


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Why the running cycle makes no progress, and when it tries again (UTC)."""

    reason: str
    until: datetime
    tries: int


@dataclass(frozen=True, kw_only=True)
class Activity:
    """What the thread is doing. Replaced as a whole, so that it can be read without a lock."""

    number: int = 0  # grows with every change
    cycle_id: int | None = None
    progress: Progress | None = None
    waiting: Waiting | None = None


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """Seconds between two tries: the first, doubled until the last."""

    first: float = 30.0
    last: float = 600.0

    def seconds(self, tries: int) -> float:
        return float(min(self.last, self.first * 2 ** min(tries - 1, 30)))


class Flight:
    """The cycle thread and its queue. All methods may be called from any thread."""

    def __init__(
        self,
        store: Store,
        make_runner: Callable[[], Runner],
        *,
        backoff: Backoff | None = None,
        housekeeping: Callable[[], bool] = lambda: True,
    ) -> None:
        self.store = store
        self.activity = Activity()
        self._make_runner = make_runner  # asked before every try, so that a reloaded config counts
        self._backoff = backoff or Backoff()
        self._housekeeping = housekeeping  # False: something is left to do
        self._untidy = True
        self._asked = False  # to tidy up, since that was last begun
        self._turn = threading.Condition(threading.RLock())  # guards the queue; waits for work
        self._news = threading.Condition()  # waits for a new activity
        self._stop = Stop()
        self._closing = False
        self._retry_now = False
        self._thread = threading.Thread(target=self._loop, name="cycles", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def alive(self) -> bool:
        return self._thread.is_alive()

    def request(self, trigger: str, who: str) -> tuple[Cycle, bool]:
        """A cycle that will see every row there is now, and whether it was asked for already.

        While one runs, one more is queued, and further requests join that one.
        """
        with self._turn:
            self._check_open()
            operations.check_not_paused(self.store)
            self._wake()
            for cycle in self.store.unfinished():
                running = cycle.id == self.activity.cycle_id and self.activity.waiting is None
                if cycle.state is not State.REQUESTED or running or self.store.is_cancelled(cycle.id):
                    continue
                if cycle.trigger == "schedule" and trigger != "schedule":  # a person gets another try
                    cycle = self.store.join(cycle.id, trigger, who)
                return cycle, True
            return self.store.request_cycle(trigger, who), False

    def cancel(self, who: str, cycle_id: int | None = None) -> Cycle:
        """Stops the running cycle, or takes a queued one out; its rows stay pending."""
        with self._turn:
            cycle = self._to_cancel(cycle_id)
            self.store.event("cancel", cycle.id, by=who)
            if cycle.id == self.activity.cycle_id:
                self._stop.request("cancel")
            else:
                cycle = self.store.advance(
                    cycle.id, State.CANCELLED, reason=f"taken out of the queue by {who}"
                )
            self._wake()
            return cycle

    def halt(self, cycle_id: int) -> None:
        """Stops a cycle if it runs, of which it is on record already who cancelled it."""
        with self._turn:
            if cycle_id == self.activity.cycle_id:
                self._stop.request("cancel")

    def wake(self, *, untidy: bool = False) -> None:
        """Something changed: look again for work, and do not wait for the next try."""
        with self._turn:
            self._untidy = self._untidy or untidy
            self._asked = self._asked or untidy
            self._wake()

    def close(self) -> None:
        """Asks the thread to end; the running cycle keeps its place. `alive()` tells when it has."""
        self._closing = True
        self._stop.request("shutdown")
        if self._turn.acquire(timeout=1):  # who holds it may wait for the store
            self._wake()
            self._turn.release()
        self._tell()

    @property
    def closing(self) -> bool:
        return self._closing

    def on_progress(self, cycle_id: int, progress: Progress | None) -> None:
        """`None`: the cycle has reached another state, whose first progress is still to come."""
        self._tell(cycle_id=cycle_id, progress=progress, waiting=None)

    def news(self, seen: int, timeout: float) -> Activity:
        """The activity, as soon as it is newer than number `seen`, or after `timeout` seconds."""
        with self._news:
            self._news.wait_for(lambda: self.activity.number != seen or self._closing, timeout)
            return self.activity

    # The thread.

    def _loop(self) -> None:
        while (cycle := self._next()) is not None:
            log.info(
                "cycle %d: %s, asked for by %s", cycle.id, cycle.state, cycle.requested_by,
                extra={"action": "cycle", "cycle": cycle.id, "snapshot": cycle.snapshot},
            )  # fmt: skip
            try:
                self._fly(cycle.id)
            finally:
                self._untidy = True  # the alias may not have followed a promotion
                self._tell(cycle_id=None, progress=None, waiting=None)

    def _next(self) -> Cycle | None:
        """The oldest unfinished cycle, waiting for one if need be; None when the daemon stops."""
        while not self._closing:
            self._tidy()
            with self._turn:
                try:
                    unfinished = [] if operations.paused(self.store) else self.store.unfinished()
                except HoldfastError as error:
                    self._rest_from(error)
                    continue
                if unfinished and not self._closing:
                    self._stop = Stop()
                    self._tell(cycle_id=unfinished[0].id, progress=None, waiting=None)
                    return unfinished[0]
                self._rest()
        return None

    def _fly(self, cycle_id: int) -> None:
        """Tries until the cycle has ended or the daemon stops."""
        tries = 0
        while not self._closing:
            with self._turn:
                self._retry_now = False  # before the try: what is asked for meanwhile is not lost
            try:
                self._make_runner().run(cycle_id, self._stop)
                return
            except Interrupted:
                log.info(
                    "the cycle waits for the next start", extra={"action": "interrupted", "cycle": cycle_id}
                )
                return
            except HoldfastError as error:
                tries += 1
                self._wait(cycle_id, str(error), tries)
            except Exception as error:  # a bug: told, and the cycle given up, or it would end every start
                log.exception("internal error", extra={"action": "failed", "cycle": cycle_id})
                self._give_up(cycle_id, f"internal error: {error!r}; the daemon's log has the details")
                return

    def _wait(self, cycle_id: int, reason: str, tries: int) -> None:
        """Until the next try, or until something is asked for. A paused daemon does not try."""
        seconds = self._backoff.seconds(tries)
        until = self.store.clock() + timedelta(seconds=seconds)
        log.warning("%s; next try in %.0f s", reason, seconds, extra={"action": "waiting", "cycle": cycle_id})
        with self._turn:
            self._tell(
                cycle_id=cycle_id, progress=None, waiting=Waiting(reason=reason, until=until, tries=tries)
            )
            self._turn.wait_for(lambda: self._retry_now or self._asked or self._closing, seconds)
        self._tidy()  # an erasure does not wait for a collector that never lets go
        while not self._may_try():
            self._tidy()
        self._tell(waiting=None)

    def _may_try(self) -> bool:
        """Also false when there is something to tidy up first."""
        with self._turn:
            try:
                if self._stop.is_set() or not operations.paused(self.store):
                    return True
                self._rest()
            except HoldfastError as error:
                self._rest_from(error)
            return False

    def _rest(self) -> None:
        """Until something is asked for: to be held with the turn."""
        if not self._closing and not self._asked:  # it may have been asked while it tidied up
            self._turn.wait(HOUSEKEEPING_SECONDS if self._untidy else None)

    def _rest_from(self, error: HoldfastError) -> None:
        """A reader has the store, its disk is full, or a record is damaged: to be held with the turn."""
        log.error("%s; tried again in %.0f s", error, STORE_SECONDS, extra={"action": "store-unused"})
        if not self._closing:
            self._turn.wait(STORE_SECONDS)

    def _give_up(self, cycle_id: int, reason: str) -> None:
        try:
            cycle = self.store.cycle(cycle_id)
            if cycle is not None and not cycle.state.ended:
                self.store.advance(cycle_id, State.FAILED, reason=reason)
        except HoldfastError as error:  # it is met again, and given up then
            with self._turn:
                self._rest_from(error)

    def _tidy(self) -> None:
        if self._untidy and not self._closing:
            self._untidy = self._asked = False  # before the work: what comes up meanwhile is not lost
            try:
                tidy = self._housekeeping()
            except Exception:  # a bug: told, and no reason that no cycle runs
                log.exception("internal error while tidying up", extra={"action": "untidy"})
                tidy = False
            if not tidy:
                self._untidy = True

    # Shared.

    def _to_cancel(self, cycle_id: int | None) -> Cycle:
        unfinished = {cycle.id: cycle for cycle in self.store.unfinished()}
        if cycle_id is None:
            cycle_id = next(iter(unfinished), None)
        if cycle_id is None:
            raise ControlError("nothing to cancel: no cycle runs or waits")
        if cycle_id not in unfinished:
            raise ControlError(f"cycle {cycle_id} neither runs nor waits; see `daemon history`")
        return unfinished[cycle_id]

    def _check_open(self) -> None:
        if self._closing:
            raise ControlError("the daemon is stopping; ask again when it is back")

    def _wake(self) -> None:
        self._retry_now = True
        self._turn.notify_all()

    def _tell(self, **changes: object) -> None:
        with self._news:
            self.activity = replace(self.activity, number=self.activity.number + 1, **changes)  # type: ignore[arg-type]
            self._news.notify_all()
