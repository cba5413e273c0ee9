"""One cycle at a time: queueing, joining, pausing, cancelling, waiting, stopping. Real store, toy runner."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon import operations
from daemon.executor import Stop
from daemon.flight import Activity, Backoff, Flight
from storage.errors import Cancelled, ControlError, RegistryUnavailable, SourceBusy, StoreBusy
from storage.records import Cycle, State
from storage.store import Store

PATIENCE = 20.0


class ToyRunner:
    """Ends a cycle with nothing to do, once it is let through; or raises what it was told to."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.entered = threading.Semaphore(0)
        self.let_through = threading.Event()
        self.errors: list[Exception] = []
        self.may_fail = threading.Event()
        self.may_fail.set()
        self.order: list[int] = []
        self.at_once = 0
        self.most_at_once = 0

    def run(self, cycle_id: int, stop: Stop) -> Cycle:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.order.append(cycle_id)
        self.entered.release()
        try:
            return self._run(cycle_id, stop)
        finally:
            self.at_once -= 1

    def _run(self, cycle_id: int, stop: Stop) -> Cycle:
        if self.errors:
            assert self.may_fail.wait(PATIENCE)
            raise self.errors.pop(0)
        try:
            while not self.let_through.is_set():
                stop.wait(0.01)
                stop.check()
        except Cancelled:
            return self.store.advance(cycle_id, State.CANCELLED, reason="cancelled")
        return self.store.advance(cycle_id, State.NOTHING, reason="toy")


class Scene:
    """A flight over a real store."""

    def __init__(self, path: Path, *, backoff: Backoff | None = None) -> None:
        self.store = Store.open(path)
        self.runner = ToyRunner(self.store)
        self.flight = Flight(self.store, lambda: self.runner, backoff=backoff or Backoff(first=3600))

    def until(self, met: Callable[[Activity], bool]) -> Activity:
        seen = -1
        for _ in range(1000):
            activity = self.flight.news(seen, PATIENCE / 1000)
            if met(activity):
                return activity
            seen = activity.number
        raise AssertionError(f"never happened; last {self.flight.activity}")

    def state(self, cycle_id: int) -> State:
        cycle = self.store.cycle(cycle_id)
        assert cycle is not None
        return cycle.state

    def entered(self) -> None:
        assert self.runner.entered.acquire(timeout=PATIENCE)

    def end(self) -> None:
        self.flight.close()
        self.flight._thread.join(PATIENCE)
        assert not self.flight.alive()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path / "store.duckdb")
    made.flight.start()
    yield made
    made.end()
    made.store.close()


def test_a_request_is_run_and_one_more_is_queued_and_further_ones_join_it(scene: Scene) -> None:
    first, joined = scene.flight.request("manual", "ann")
    assert not joined
    scene.entered()
    second, joined = scene.flight.request("schedule", "schedule")
    assert not joined
    third, joined = scene.flight.request("manual", "bob")
    assert joined
    assert third.id == second.id != first.id
    scene.runner.let_through.set()
    scene.until(lambda a: a.cycle_id is None and scene.state(second.id).ended)
    assert scene.runner.order == [first.id, second.id]
    assert scene.runner.most_at_once == 1


def test_a_person_who_joins_a_scheduled_cycle_makes_it_theirs(tmp_path: Path) -> None:
    """A schedule does not try again what was rejected; who asks by hand wants just that."""
    made = Scene(tmp_path / "store.duckdb")
    planned, _ = made.flight.request("schedule", "schedule")
    cycle, joined = made.flight.request("manual", "ann")
    assert (cycle.id, joined) == (planned.id, True)
    assert (cycle.trigger, cycle.requested_by) == ("manual", "ann")
    assert made.flight.request("schedule", "schedule") == (made.store.cycle(planned.id), True)
    assert made.store.cycle(planned.id) == cycle
    made.store.close()


def test_nobody_joins_a_cycle_that_was_cancelled(tmp_path: Path) -> None:
    """The daemon was killed before it heard of the cancellation that is on record."""
    made = Scene(tmp_path / "store.duckdb")
    cancelled = made.store.request_cycle("manual", "ann")
    made.store.event("cancel", cancelled.id, by="ann")
    cycle, joined = made.flight.request("schedule", "schedule")
    assert not joined
    assert cycle.id != cancelled.id
    made.store.close()


def test_a_stop_does_not_wait_for_who_waits_for_the_store(scene: Scene) -> None:
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with scene.flight._turn:
            held.set()
            assert let_go.wait(PATIENCE)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(PATIENCE)
    scene.flight.close()
    assert scene.flight.closing
    assert scene.flight._stop.is_set()
    let_go.set()
    holder.join()
    scene.flight.wake()


def test_unfinished_cycles_of_an_earlier_process_come_first_and_oldest_first(tmp_path: Path) -> None:
    made = Scene(tmp_path / "store.duckdb")
    old = made.store.request_cycle("manual", "before")
    made.store.advance(old.id, State.PULLED)
    new, joined = made.flight.request("manual", "now")
    assert not joined, "the old one has pulled already and would not see rows that came since"
    made.runner.let_through.set()
    made.flight.start()
    made.until(lambda a: made.state(new.id).ended)
    assert made.runner.order == [old.id, new.id]
    made.end()
    made.store.close()


def test_a_shutdown_interrupts_and_leaves_the_cycle_where_it_is(scene: Scene) -> None:
    cycle, _ = scene.flight.request("manual", "ann")
    scene.entered()
    scene.end()
    assert scene.state(cycle.id) is State.REQUESTED
    with pytest.raises(ControlError, match="stopping"):
        scene.flight.request("manual", "ann")


def test_cancel_stops_the_running_cycle_and_the_next_one_runs(scene: Scene) -> None:
    first, _ = scene.flight.request("manual", "ann")
    scene.entered()
    second, _ = scene.flight.request("manual", "ann")
    assert scene.flight.cancel("ann").id == first.id
    scene.entered()
    assert scene.state(first.id) is State.CANCELLED
    scene.runner.let_through.set()
    scene.until(lambda a: scene.state(second.id) is State.NOTHING)


def test_cancel_takes_a_queued_cycle_out_of_the_queue(scene: Scene) -> None:
    first, _ = scene.flight.request("manual", "ann")
    scene.entered()
    second, _ = scene.flight.request("manual", "ann")
    cancelled = scene.flight.cancel("bob", second.id)
    assert cancelled.state is State.CANCELLED
    assert "bob" in (cancelled.reason or "")
    assert not scene.state(first.id).ended


def test_cancel_without_a_cycle_says_so(scene: Scene) -> None:
    with pytest.raises(ControlError, match="no cycle runs or waits"):
        scene.flight.cancel("ann")
    with pytest.raises(ControlError, match="cycle 7 neither runs nor waits"):
        scene.flight.cancel("ann", 7)


@pytest.mark.parametrize("error", [SourceBusy("held by PID 1"), RegistryUnavailable("nothing answers")])
def test_what_waiting_may_cure_is_tried_again_and_shown_meanwhile(scene: Scene, error: Exception) -> None:
    scene.runner.errors = [error]
    cycle, _ = scene.flight.request("manual", "ann")
    waiting = scene.until(lambda a: a.waiting is not None).waiting
    assert waiting is not None
    assert waiting.reason == str(error)
    assert waiting.tries == 1
    again, joined = scene.flight.request("manual", "bob")
    assert joined, "it has not pulled yet, so it will see the new rows too"
    assert again.id == cycle.id
    scene.entered()
    scene.entered()
    scene.runner.let_through.set()
    scene.until(lambda a: scene.state(cycle.id) is State.NOTHING)


def test_a_waiting_cycle_stops_at_once(scene: Scene) -> None:
    scene.runner.errors = [SourceBusy()]
    cycle, _ = scene.flight.request("manual", "ann")
    scene.until(lambda a: a.waiting is not None)
    scene.end()
    assert scene.state(cycle.id) is State.REQUESTED


def test_a_waiting_cycle_can_be_cancelled(scene: Scene) -> None:
    scene.runner.errors = [SourceBusy()]
    cycle, _ = scene.flight.request("manual", "ann")
    scene.until(lambda a: a.waiting is not None)
    scene.flight.cancel("ann")
    scene.until(lambda a: scene.state(cycle.id) is State.CANCELLED)


def test_a_cancel_during_a_try_that_fails_does_not_wait_for_the_next_one(scene: Scene) -> None:
    scene.runner.errors = [RegistryUnavailable("nothing answered for a minute")]
    scene.runner.may_fail.clear()
    cycle, _ = scene.flight.request("manual", "ann")
    scene.entered()
    scene.flight.cancel("ann")
    scene.runner.may_fail.set()
    scene.until(lambda a: scene.state(cycle.id) is State.CANCELLED)


def test_waits_double_up_to_a_limit() -> None:
    backoff = Backoff(first=30, last=600)
    assert [backoff.seconds(tries) for tries in (1, 2, 3, 4, 5, 6, 1000)] == [30, 60, 120, 240, 480, 600, 600]


def test_a_bug_fails_the_cycle_and_not_the_daemon(scene: Scene) -> None:
    scene.runner.errors = [KeyError("oops")]
    cycle, _ = scene.flight.request("manual", "ann")
    scene.until(lambda a: scene.state(cycle.id) is State.FAILED)
    reason = scene.store.cycle(cycle.id)
    assert reason is not None
    assert "KeyError('oops')" in (reason.reason or "")
    scene.runner.let_through.set()
    after, _ = scene.flight.request("manual", "ann")
    scene.until(lambda a: scene.state(after.id) is State.NOTHING)


def test_paused_means_that_nothing_starts_until_resumed(scene: Scene) -> None:
    first, _ = scene.flight.request("manual", "ann")
    scene.entered()
    second, _ = scene.flight.request("manual", "ann")
    assert not operations.pause(scene.store, "bob")["already"]
    assert operations.pause(scene.store, "eve")["already"]
    with pytest.raises(ControlError, match="paused by bob"):
        scene.flight.request("manual", "ann")
    scene.runner.let_through.set()
    scene.until(lambda a: a.cycle_id is None)
    assert scene.state(first.id).ended, "the running one is not disturbed"
    assert not scene.runner.entered.acquire(timeout=0.3)
    operations.resume(scene.store, "bob")
    scene.flight.wake()
    scene.until(lambda a: scene.state(second.id).ended)


def test_a_pause_outlives_the_process(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store.duckdb") as store:
        operations.pause(store, "bob")
    with Store.open(tmp_path / "store.duckdb") as store:
        found = operations.paused(store)
        assert found is not None
        assert found["by"] == "bob"
        operations.resume(store, "bob")
        assert operations.paused(store) is None


def test_what_could_not_be_tidied_is_tried_again_before_the_next_cycle(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store.duckdb") as store:
        tried: list[int] = []

        def tidy() -> bool:
            tried.append(1)
            return len(tried) > 1

        runner = ToyRunner(store)
        runner.let_through.set()
        flight = Flight(store, lambda: runner, housekeeping=tidy)
        flight.request("manual", "ann")
        flight.start()
        assert runner.entered.acquire(timeout=PATIENCE)
        while len(tried) < 2:
            flight.news(flight.activity.number, 0.05)
        flight.close()
        flight._thread.join(PATIENCE)
        assert len(tried) == 2


@pytest.mark.parametrize("paused", [False, True])
def test_what_is_asked_for_is_tidied_up_while_a_cycle_waits(tmp_path: Path, paused: bool) -> None:
    """An erasure must not wait for a collector that never lets go, nor for the end of a pause."""
    tidied = threading.Semaphore(0)

    def tidy() -> bool:
        tidied.release()
        return True

    with Store.open(tmp_path / "store.duckdb") as store:
        runner = ToyRunner(store)
        runner.errors = [SourceBusy("the collector has it")] * 9
        flight = Flight(store, lambda: runner, backoff=Backoff(first=3600), housekeeping=tidy)
        flight.request("manual", "ann")
        flight.start()
        assert tidied.acquire(timeout=PATIENCE)
        while flight.activity.waiting is None:
            flight.news(flight.activity.number, 0.05)
        if paused:
            operations.pause(store, "ann")
            flight.wake()
        for _ in range(2):
            flight.wake(untidy=True)
            assert tidied.acquire(timeout=PATIENCE)
        flight.close()
        flight._thread.join(PATIENCE)
        assert not flight.alive()


def test_a_bug_while_it_tidies_up_is_told_and_cycles_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Store.open(tmp_path / "store.duckdb") as store:
        runner = ToyRunner(store)
        runner.let_through.set()
        flight = Flight(store, lambda: runner, housekeeping=lambda: bool(1 / 0))
        flight.request("manual", "ann")
        flight.start()
        assert runner.entered.acquire(timeout=PATIENCE)
        flight.close()
        flight._thread.join(PATIENCE)
        assert "internal error while tidying up" in caplog.text


def test_what_is_asked_for_while_it_tidies_up_is_not_forgotten(tmp_path: Path) -> None:
    begun, asked, again = threading.Semaphore(0), threading.Event(), threading.Event()

    def tidy() -> bool:
        begun.release()
        if asked.is_set():
            again.set()
        return asked.wait(PATIENCE)

    with Store.open(tmp_path / "store.duckdb") as store:
        flight = Flight(store, lambda: ToyRunner(store), housekeeping=tidy)
        flight.start()
        assert begun.acquire(timeout=PATIENCE)
        flight.wake(untidy=True)
        asked.set()
        assert again.wait(PATIENCE)
        flight.close()
        flight._thread.join(PATIENCE)


@pytest.mark.parametrize("when", ["idle", "waiting", "paused", "giving up"])
def test_a_store_that_cannot_be_used_for_a_while_does_not_end_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    """A stranger who reads slipped in while it was opened afresh."""
    made = Scene(tmp_path / "store.duckdb")
    used, refused, away = made.store._db._use, threading.Semaphore(0), threading.Event()

    def use() -> object:
        if threading.current_thread() is made.flight._thread and not away.is_set():
            refused.release()
            raise StoreBusy("process 7 holds the store")
        return used()

    monkeypatch.setattr("daemon.flight.STORE_SECONDS", 0.01)
    if when == "waiting":
        made.runner.errors = [SourceBusy("the collector has it")]
        made.flight._backoff = Backoff(first=0.0)
    if when == "giving up":
        made.runner.errors = [ValueError("a bug")] * 9
    made.runner.may_fail.clear()
    made.runner.let_through.set()
    if when == "paused":
        operations.pause(made.store, "ann")
    elif when != "idle":
        made.flight.request("manual", "ann")
    made.flight.start()
    if when in ("waiting", "giving up"):
        made.entered()
    monkeypatch.setattr(made.store._db, "_use", use)
    made.runner.may_fail.set()
    made.flight.wake()
    for _ in range(3):
        assert refused.acquire(timeout=PATIENCE)
        made.flight.wake()
    away.set()
    if when == "paused":
        operations.resume(made.store, "ann")
    made.runner.errors.clear()
    cycle, _ = made.flight.request("manual", "bob")
    made.until(lambda a: a.cycle_id is None and made.state(cycle.id).ended)
    assert "process 7 holds the store; tried again" in caplog.text
    made.end()
    made.store.close()


@pytest.mark.parametrize("when", ["idle", "giving up"])
def test_a_damaged_record_does_not_end_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    monkeypatch.setattr("daemon.flight.STORE_SECONDS", 0.01)
    made, read = Scene(tmp_path / "store.duckdb"), threading.Semaphore(0)
    reads = {name: getattr(made.store, name) for name in ("unfinished", "cycle")}
    if when == "giving up":
        made.runner.errors = [ValueError("a bug")]
        made.runner.may_fail.clear()
    made.runner.let_through.set()
    cycle, _ = made.flight.request("manual", "ann")
    if when == "giving up":
        made.flight.start()
        made.entered()
    made.store._db.script("UPDATE cycles SET state = 'requestedx'")
    for name, its in reads.items():
        monkeypatch.setattr(made.store, name, lambda *key, its=its: read.release() or its(*key))
    if when == "giving up":
        made.runner.may_fail.set()
    else:
        made.flight.start()
    for _ in range(3):
        assert read.acquire(timeout=PATIENCE)
        made.flight.wake()
    assert made.flight.alive()
    assert "requestedx" in caplog.text
    made.store._db.script("UPDATE cycles SET state = 'requested'")
    made.until(lambda a: a.cycle_id is None and made.state(cycle.id).ended)
    made.end()
    made.store.close()
