"""Cron as cron means it, and the thread that keeps to it."""

import queue
import threading
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta, tzinfo
from itertools import pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from apscheduler.executors.debug import DebugExecutor
from apscheduler.schedulers import base as scheduler

from daemon import config, service
from daemon import schedule as schedules
from daemon.notify import Notifier
from daemon.schedule import Schedule, next_run
from storage.errors import ConfigError
from storage.records import Cycle
from storage.store import Store
from tests.bots import write_config

SUNDAY = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def firings(cron: str, count: int, *, zone: str = "UTC", after: datetime = SUNDAY) -> list[datetime]:
    found: list[datetime] = []
    for _ in range(count):
        at = next_run(cron, zone, after=found[-1] if found else after)
        assert at is not None
        found.append(at)
    return found


def weekdays(cron: str) -> set[str]:
    return {at.strftime("%a").lower() for at in firings(cron, 14)}


@pytest.mark.parametrize(
    ("field", "days"),
    [
        ("0", {"sun"}),
        ("7", {"sun"}),
        ("1", {"mon"}),
        ("6", {"sat"}),
        ("1-5", {"mon", "tue", "wed", "thu", "fri"}),
        ("5-7", {"fri", "sat", "sun"}),
        ("0-2", {"sun", "mon", "tue"}),
        ("fri-mon", {"fri", "sat", "sun", "mon"}),
        ("sun,3", {"sun", "wed"}),
        ("*/2", {"sun", "tue", "thu", "sat"}),
        ("1-5/2", {"mon", "wed", "fri"}),
        ("MON", {"mon"}),
        ("0-7", {"sun", "mon", "tue", "wed", "thu", "fri", "sat"}),
        ("2/2", {"tue", "thu", "sat"}),
    ],
)
def test_days_of_the_week_are_crons_not_apschedulers(field: str, days: set[str]) -> None:
    assert weekdays(f"0 0 * * {field}") == days


def test_day_of_month_or_day_of_week_is_enough_when_both_are_restricted() -> None:
    found = firings("0 0 13 * 5", 6)
    assert [at.day for at in found] == [6, 13, 20, 27, 3, 10]
    assert firings("0 0 2 * 0", 2)[0] == datetime(2026, 3, 2, tzinfo=UTC)


@pytest.mark.parametrize(
    ("cron", "first"), [("0 0 13 * */2", datetime(2026, 6, 13)), ("0 0 */2 * 5", datetime(2026, 3, 13))]
)
def test_a_star_with_a_step_restricts_no_day_and_so_both_must_fit(cron: str, first: datetime) -> None:
    """As in cron: the first 13th on an even day of the week, the first Friday on an odd day of the month."""
    assert firings(cron, 1) == [first.replace(tzinfo=UTC)]


def test_a_time_without_a_zone_is_utc() -> None:
    found = next_run("30 2 * * *", "Asia/Tokyo", after=datetime(2026, 3, 1, 17, 31))
    assert found == datetime(2026, 3, 2, 17, 30, tzinfo=UTC)


def test_a_time_zone_shifts_the_firing() -> None:
    summer, winter = datetime(2026, 7, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC)
    assert firings("30 2 * * *", 1, zone="Europe/Madrid", after=summer)[0].astimezone(UTC).hour == 0
    assert firings("30 2 * * *", 1, zone="Europe/Madrid", after=winter)[0].astimezone(UTC).hour == 1


# When the clocks change. Berlin puts them forward at 2:00 on 29 March, and back at 3:00 on 25 October.

SUMMER = datetime(2026, 7, 1, 12, tzinfo=UTC)
SPRING, AUTUMN = datetime(2026, 3, 28, 12, tzinfo=UTC), datetime(2026, 10, 24, 12, tzinfo=UTC)
NIGHT = datetime(2026, 10, 24, 23, tzinfo=UTC)  # an hour after midnight


@pytest.mark.parametrize(
    ("cron", "evening", "first", "second"),
    [
        ("30 2 * * *", SPRING, "2026-03-29T03:30+02:00", "2026-03-30T02:30+02:00"),  # 2:30 is not there
        ("30 2 * * *", AUTUMN, "2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"),  # 2:30 comes twice
        ("0 3 * * *", SPRING, "2026-03-29T03:00+02:00", "2026-03-30T03:00+02:00"),
        ("0 3 * * *", AUTUMN, "2026-10-25T03:00+01:00", "2026-10-26T03:00+01:00"),
        ("0 2,3 * * *", SPRING, "2026-03-29T03:00+02:00", "2026-03-30T02:00+02:00"),  # both are one moment
        ("30 */2 * * *", NIGHT, "2026-10-25T02:30+02:00", "2026-10-25T04:30+01:00"),  # not every hour
        ("45 2 * 3,10 0", SPRING, "2026-03-29T03:45+02:00", "2026-10-04T02:45+02:00"),
    ],
)
def test_in_the_night_of_a_clock_change_it_fires_once(
    cron: str, evening: datetime, first: str, second: str
) -> None:
    found = firings(cron, 2, zone="Europe/Berlin", after=evening)
    assert [at.isoformat(timespec="minutes") for at in found] == [first, second]


def test_times_that_are_skipped_come_in_order_among_those_that_are_not() -> None:
    """On Lord Howe the clock goes from 2:00 to 2:30: 2:10 comes at 2:40, after 2:35."""
    night = datetime(2026, 10, 3, 12, tzinfo=UTC)
    found = firings("10,20,35 2 * * *", 3, zone="Australia/Lord_Howe", after=night)
    assert [(at.hour, at.minute) for at in found] == [(2, 35), (2, 40), (2, 50)]


@pytest.mark.parametrize("evening", [SPRING, AUTUMN])
def test_every_hour_is_every_hour_that_passes(evening: datetime) -> None:
    found = [at.astimezone(UTC) for at in firings("30 * * * *", 24, zone="Europe/Berlin", after=evening)]
    assert {later - earlier for earlier, later in pairwise(found)} == {timedelta(hours=1)}


@pytest.mark.parametrize(
    "zone",
    [
        "Europe/Berlin",
        "America/New_York",
        "America/Santiago",  # at midnight
        "Australia/Lord_Howe",  # by half an hour
        "Antarctica/Troll",  # by two hours
        "UTC",
    ],
)
@pytest.mark.parametrize("cron", ["30 2 * * *", "0 3 * * *", "15 0 * * *", "30 1 * * 0-6"])
def test_there_is_one_firing_a_day_all_the_year(zone: str, cron: str) -> None:
    year = datetime(2026, 1, 1, tzinfo=ZoneInfo(zone)) - timedelta(minutes=1)
    days = [at.date() for at in firings(cron, 365, zone=zone, after=year)]
    assert days == [date(2026, 1, 1) + timedelta(days=n) for n in range(365)]


class Moved(datetime):
    """The scheduler's clock, which the test moves."""

    at = AUTUMN

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return cls.at.astimezone(tz)


class Night:
    """The parts of `daemon.service` that keep to a schedule, on a clock that the test moves."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch, evening: datetime) -> None:
        self.path = write_config(home, home, schedule__cron="30 2 * * *", schedule__timezone="Europe/Berlin")
        self.settings = config.load(self.path)
        self.store = Store.open(self.settings.store_path)
        self.fired: list[datetime] = []
        self.steady = 0.0
        Moved.at = evening
        for module in (scheduler, schedules, service):
            monkeypatch.setattr(module, "datetime", Moved)
        monkeypatch.setattr(schedules, "_ahead", lambda: Moved.at.timestamp() - self.steady)
        self.start()

    def start(self) -> None:
        notifier, mail = Notifier.from_environment(), queue.SimpleQueue[str]()
        self.service = service.Service(self.path, self.settings, self.store, notifier, mail)
        self.service._daemon.flight.request = self.request  # type: ignore[method-assign]
        turns = self.service._schedule._scheduler
        self.service._take_up_schedule()
        turns.start(paused=True)  # its thread sleeps: the test takes its turns
        turns.wakeup = lambda: None
        turns.remove_executor("default")
        turns.add_executor(DebugExecutor())  # fires on the spot
        turns.state = scheduler.STATE_RUNNING

    def stop(self) -> None:
        self.service._schedule._scheduler.__dict__.pop("wakeup")
        self.service._schedule.stop()
        self.service._control.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def request(self, trigger: str, who: str) -> tuple[Cycle, bool]:
        self.fired.append(Moved.at)
        return self.store.request_cycle(trigger, who), False

    def goes_on(self, minutes: int) -> None:
        for _ in range(minutes):
            Moved.at += timedelta(minutes=1)
            self.steady += 60
            self.service._looked = float("-inf")
            self.service._look_at_the_clock()
            self.service._schedule._scheduler._process_jobs()

    def sleeps(self, minutes: int) -> None:
        """Powered off, or suspended: the clock goes on alone."""
        Moved.at += timedelta(minutes=minutes)

    def clock_is_set(self, to: datetime) -> None:
        Moved.at = to


@pytest.fixture
def night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Night]:
    made = Night(tmp_path, monkeypatch, getattr(request, "param", SUMMER))
    yield made
    made.stop()
    made.store.close()


@pytest.mark.parametrize(
    ("night", "at"),
    [(SPRING, "2026-03-29T01:30+00:00"), (AUTUMN, "2026-10-25T00:30+00:00")],
    indirect=["night"],
)
def test_the_daemon_fires_once_in_the_night_of_a_clock_change(night: Night, at: str) -> None:
    night.goes_on(24 * 60)
    assert [found.isoformat(timespec="minutes") for found in night.fired] == [at]


@pytest.mark.parametrize("night", [SPRING, AUTUMN], indirect=True)
@pytest.mark.parametrize(("minutes", "runs"), [(7, 1), (20, 0), (60, 5), (90, 1)])
def test_a_daemon_restarted_all_night_long_asks_once(night: Night, minutes: int, runs: int) -> None:
    """What was due while it was down is made up, and what has fired is not."""
    end = Moved.at + timedelta(hours=24)
    while Moved.at < end:
        night.goes_on(runs)
        night.sleeps(minutes - runs)
        night.restart()
    assert len(night.fired) == 1


@pytest.mark.parametrize("night", [SPRING, AUTUMN], indirect=True)
@pytest.mark.parametrize("restarts", [(), ("before",), ("after",), ("before", "after"), ("reload",)])
@pytest.mark.parametrize("back", [1, 60, 120])
def test_a_clock_that_is_put_back_after_the_firing_does_not_bring_it_again(
    night: Night, restarts: tuple[str, ...], back: int
) -> None:
    night.sleeps(12 * 60)
    while not night.fired:
        night.goes_on(1)
    fired = night.fired[0]
    if "before" in restarts:
        night.restart()
    night.clock_is_set(Moved.at - timedelta(minutes=back))
    if "after" in restarts:
        night.restart()
    if "reload" in restarts:
        night.service._reload()
    night.goes_on(back // 2)
    if "after" in restarts:
        night.restart()
    night.goes_on(back + 10)
    assert night.fired == [fired]
    night.sleeps(20 * 60)
    while len(night.fired) == 1:
        night.goes_on(1)
    wall = night.fired[1].astimezone(ZoneInfo("Europe/Berlin"))
    assert (wall.hour, wall.minute // 10) == (2, 3)
    assert timedelta(hours=20) < night.fired[1] - fired < timedelta(hours=26), "the next night has its own"


@pytest.mark.parametrize("ahead", [timedelta(days=200), timedelta(hours=8)])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_firing_far_ahead_of_the_right_time_does_not_stop_the_schedule(
    night: Night, restarted: bool, ahead: timedelta
) -> None:
    right = Moved.at
    night.clock_is_set(right + ahead)
    while not night.fired:
        night.goes_on(10)
    night.clock_is_set(right)
    if restarted:
        night.restart()
    night.goes_on(24 * 60)
    assert [at.date() for at in night.fired[1:]] == [date(2026, 7, 2)]


def test_a_daemon_that_is_down_at_its_time_makes_it_up_although_the_clock_was_put_back(night: Night) -> None:
    night.goes_on(24 * 60)
    assert len(night.fired) == 1
    night.clock_is_set(Moved.at - timedelta(hours=1))
    night.restart()
    night.sleeps(24 * 60)
    night.restart()
    assert len(night.fired) == 2


@pytest.mark.parametrize(
    ("cron", "told"),
    [
        ("0 0 31 2 *", "never happens"),
        ("0 0 30 2 *", "never happens"),
        ("* * * *", "4 fields"),
        ("0 0 * * 8", "day of week '8'"),
        ("0 0 * * mo", "day of week 'mo'"),
        ("0 0 * * 1/0", "step of 0"),
        ("0 0 * * 1,,2", "not understood"),
        ("61 * * * *", "61"),
        ("*/90 * * * *", "90"),
        ("@daily", "0 0 * * *"),
        ("soon", "1 fields"),
    ],
)
def test_what_cron_would_not_take_or_never_reach_is_refused_with_the_value(cron: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        next_run(cron, "UTC", after=SUNDAY)
    assert f'schedule.cron = "{cron}"' in str(refused.value)
    assert told in str(refused.value)


def test_leap_day_is_rare_but_happens() -> None:
    assert firings("0 0 29 2 *", 1)[0] == datetime(2028, 2, 29, tzinfo=UTC)


def test_an_empty_expression_plans_nothing() -> None:
    assert next_run("", "UTC", after=SUNDAY) is None


def test_the_thread_fires_can_be_replanned_while_it_runs_and_tells_its_next_time() -> None:
    fired = threading.Event()
    schedule = Schedule(fired.set)
    schedule.start()
    try:
        assert schedule.next_run() is None
        schedule.plan("* * * * *", "UTC")
        planned = schedule.next_run()
        assert planned is not None
        assert planned - datetime.now(UTC) <= timedelta(minutes=1)
        with pytest.raises(ConfigError):
            schedule.plan("0 0 31 2 *", "UTC")
        assert schedule.next_run() is not None, "a refused plan leaves the old one"
        schedule._scheduler.modify_job("cycle", next_run_time=datetime.now(UTC))
        assert fired.wait(30)
        schedule.plan("", "UTC")
        assert schedule.next_run() is None
    finally:
        schedule.stop()


def test_firings_missed_while_asleep_become_one() -> None:
    fired: list[int] = []
    done = threading.Event()

    def fire() -> None:
        fired.append(1)
        done.set()

    schedule = Schedule(fire)
    schedule.plan("0 0 1 1 *", "UTC")
    schedule._scheduler.start(paused=True)
    try:
        schedule._scheduler.modify_job("cycle", next_run_time=datetime.now(UTC) - timedelta(hours=5))
        schedule._scheduler.resume()
        assert done.wait(30)
    finally:
        schedule._scheduler.shutdown(wait=True)
    assert len(fired) == 1


def test_a_firing_slept_through_is_seen_with_the_next_look_at_the_clock() -> None:
    """The scheduler waits by a clock that stands still in a suspend: its alarm is still hours away."""
    fired = threading.Event()
    schedule = Schedule(fired.set)
    schedule.plan("0 0 1 1 *", "UTC")
    schedule.start()
    try:
        job = schedule._scheduler.get_job("cycle")
        job._modify(next_run_time=datetime.now(UTC) - timedelta(hours=5))
        schedule._scheduler._lookup_jobstore("default").update_job(job)  # without waking it, as a sleep would
        schedule.look()
        assert fired.wait(30)
    finally:
        schedule.stop()


@pytest.mark.parametrize(("put_back", "next_within"), [(200 * 86400.0, timedelta(minutes=1)), (2.0, None)])
def test_a_clock_that_was_far_ahead_and_is_put_right_does_not_stop_the_schedule(
    put_back: float, next_within: timedelta | None
) -> None:
    schedule = Schedule(lambda: None)
    schedule.plan("* * * * *", "UTC")
    schedule._scheduler.start(paused=True)
    try:
        planned = datetime.now(UTC) + timedelta(days=200)
        schedule._scheduler.modify_job("cycle", next_run_time=planned)
        schedule._ahead += put_back
        schedule.look()
        found = schedule.next_run()
        assert found is not None
        if next_within is None:
            assert found == planned, "a small step may come just after a firing, which would come again"
        else:
            assert found - datetime.now(UTC) <= next_within
    finally:
        schedule.stop()


def test_a_plan_that_a_reload_takes_away_meanwhile_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule(lambda: None)
    schedule.plan("0 0 1 1 *", "UTC")
    schedule._scheduler.start(paused=True)
    try:
        job = schedule._scheduler.get_job("cycle")
        schedule.plan("", "UTC")
        monkeypatch.setattr(schedule._scheduler, "get_job", lambda name: job)
        schedule._ahead += 3600
        schedule.look()
    finally:
        schedule.stop()


def test_a_firing_that_is_due_stays_due_when_the_clock_is_put_back() -> None:
    schedule = Schedule(lambda: None)
    schedule.plan("0 0 1 1 *", "UTC")
    schedule._scheduler.start(paused=True)
    try:
        due = datetime.now(UTC) - timedelta(minutes=1)
        schedule._scheduler.modify_job("cycle", next_run_time=due)
        schedule._ahead += 3600
        schedule.look()
        assert schedule.next_run() == due
    finally:
        schedule.stop()
