"""Cron as cron means it, and the thread that keeps to it."""

import threading
from datetime import UTC, datetime, timedelta

import pytest

from daemon.schedule import Schedule, next_run
from storage.errors import ConfigError

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
    ],
)
def test_days_of_the_week_are_crons_not_apschedulers(field: str, days: set[str]) -> None:
    assert weekdays(f"0 0 * * {field}") == days


def test_day_of_month_or_day_of_week_is_enough_when_both_are_restricted() -> None:
    found = firings("0 0 13 * 5", 6)
    assert [at.day for at in found] == [6, 13, 20, 27, 3, 10]
    assert firings("0 0 2 * 0", 2)[0] == datetime(2026, 3, 2, tzinfo=UTC)


def test_a_time_zone_shifts_the_firing_and_survives_the_clock_change() -> None:
    summer, winter = datetime(2026, 7, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC)
    assert firings("30 2 * * *", 1, zone="Europe/Madrid", after=summer)[0].astimezone(UTC).hour == 0
    assert firings("30 2 * * *", 1, zone="Europe/Madrid", after=winter)[0].astimezone(UTC).hour == 1
    spring = firings("30 2 * * *", 2, zone="Europe/Madrid", after=datetime(2026, 3, 28, 12, tzinfo=UTC))
    assert [at.day for at in spring] == [29, 30]


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
    schedule.plan("* * * * *", "UTC")
    schedule._scheduler.start(paused=True)
    try:
        schedule._scheduler.modify_job("cycle", next_run_time=datetime.now(UTC) - timedelta(hours=5))
        schedule._scheduler.resume()
        assert done.wait(30)
    finally:
        schedule._scheduler.shutdown(wait=True)
    assert len(fired) == 1
