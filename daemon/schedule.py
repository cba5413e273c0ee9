"""When cycles start by themselves: the only importer of apscheduler.

Reads cron expressions as cron does: 0 and 7 are Sunday, and when both the day of the month and the
day of the week are restricted, either is enough. (APScheduler alone counts days from Monday and wants
both.) When the clocks change, a time that comes twice fires once, and one that is skipped fires as much
later as the clocks were put forward; an expression for every hour keeps to the hours that really pass.
(APScheduler alone fires twice, and leaves a night out where the clocks change at midnight.) Knows nothing
of cycles: firing only calls the function it was given.
"""

import re
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.combining import OrTrigger
from apscheduler.triggers.cron import CronTrigger

from storage.errors import ConfigError

_JOB = "cycle"
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS = ("minute", "hour", "day", "month", "day_of_week")
_PART = re.compile(r"^(?:\*|(?P<first>\w+)(?:-(?P<last>\w+))?)(?:/(?P<step>\d+))?$")
_DAY = timedelta(days=1)
_PUT_BACK = timedelta(hours=3)  # more than a time zone's summer, less than what a plan can do without
LOOK_SECONDS = 30  # how late a firing may be after the machine slept
_SHORTCUTS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}


class Schedule:
    """A background thread that calls `fire` at the planned times. Missed firings become one."""

    def __init__(self, fire: Callable[[], None]) -> None:
        self._fire = fire
        self._scheduler = BackgroundScheduler(
            executors={"default": ThreadPoolExecutor(1)},
            timezone="UTC",
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        )
        self._ahead = _ahead()
        self.fired: datetime | None = None  # the last time, be it by an earlier daemon

    def start(self) -> None:
        self._scheduler.start()

    def plan(self, cron: str, timezone: str) -> None:
        """Replaces the plan; "" plans nothing. Raises `ConfigError` and keeps the old plan otherwise."""
        trigger = parse(cron, timezone)
        if trigger is None:
            if self._scheduler.get_job(_JOB):
                self._scheduler.remove_job(_JOB)
            return
        first = self._first(trigger)
        self._scheduler.add_job(self._fire, trigger, id=_JOB, replace_existing=True, next_run_time=first)

    def look(self) -> None:
        """Compares the plan with the clock now, which may have been set.

        A time that was planned while the clock was far ahead would not come for as long as it was. One
        that has fired does not come again.
        """
        before, self._ahead = self._ahead, _ahead()
        job = self._scheduler.get_job(_JOB)
        if job and before - self._ahead > LOOK_SECONDS:
            again = self._first(job.trigger)
            with suppress(JobLookupError):  # removed by a reload meanwhile
                job.modify(next_run_time=min(again, job.next_run_time))
        self._scheduler.wakeup()

    def unfired(self, since: datetime) -> datetime:
        """Since when no time has fired: `since`, or the last firing where the clock was put back from there.

        A last firing that is further ahead says only that the clock was wrong.
        """
        fired = self.fired
        return fired if fired is not None and since < fired < since + _PUT_BACK else since

    def soon(self, work: Callable[[], None]) -> None:
        """Has this done once, on the thread that also fires: one after the other."""
        self._scheduler.add_job(work)

    def next_run(self) -> datetime | None:
        """The next planned time, with its time zone; None when nothing is planned."""
        job = self._scheduler.get_job(_JOB)
        return getattr(job, "next_run_time", None)

    def _first(self, trigger: BaseTrigger) -> datetime | None:
        return _next(trigger, self.unfired(datetime.now(UTC) - timedelta(microseconds=1)))

    def stop(self) -> None:
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)


def _ahead() -> float:
    """Seconds by which the clock is ahead of one that nobody sets. It only grows in a suspend."""
    return time.time() - time.monotonic()


def next_run(cron: str, timezone: str, *, after: datetime) -> datetime | None:
    """The first planned time after `after` (naive times are UTC), or None without a plan."""
    trigger = parse(cron, timezone)
    return _next(trigger, after) if trigger else None


def parse(cron: str, timezone: str) -> BaseTrigger | None:
    """The trigger of a cron expression, None for "".

    Raises `ConfigError` for what cron would not take, and for what would never fire.
    """
    if not cron.strip():
        return None
    try:
        trigger = _trigger(cron, ZoneInfo(timezone))
    except ValueError as error:
        raise ConfigError(
            f'schedule.cron = "{cron}": {error}; for instance "30 2 * * *", or "" for none'
        ) from None
    if _next(trigger, datetime.now(UTC)) is None:
        raise ConfigError(f'schedule.cron = "{cron}": this never happens; check the day and the month')
    return trigger


def _next(trigger: BaseTrigger, after: datetime) -> datetime | None:
    known = after if after.tzinfo else after.replace(tzinfo=UTC)
    found: datetime | None = trigger.get_next_fire_time(known, known)
    return found


def _trigger(cron: str, zone: ZoneInfo) -> BaseTrigger:
    if cron.strip().startswith("@"):
        instead = _SHORTCUTS.get(cron.strip().lower())
        raise ValueError(f"shortcuts are not read{f', write {instead!r}' if instead else ''}")
    parts = cron.lower().split()
    if len(parts) != len(_FIELDS):
        raise ValueError(f"{len(parts)} fields, cron has five: minute, hour, day, month, day of week")
    fields = dict(zip(_FIELDS, parts, strict=True))
    both = not fields["day"].startswith("*") and not fields["day_of_week"].startswith("*")
    fields["day_of_week"] = _weekdays(fields["day_of_week"])
    return _OnTheWall(_cron(fields, both), zone, hourly=fields["hour"] == "*")


def _cron(fields: dict[str, str], both: bool) -> BaseTrigger:
    if not both:
        return CronTrigger(**fields, timezone=UTC)
    either = [{**fields, "day_of_week": "*"}, {**fields, "day": "*"}]
    return OrTrigger([CronTrigger(**each, timezone=UTC) for each in either])


class _OnTheWall(BaseTrigger):  # type: ignore[misc]
    """Fires when a clock on a wall in `zone` shows the times of `shown`, a trigger of UTC.

    `hourly`: whenever the clock shows them, twice or never when it is put back or forward. Else once.
    """

    def __init__(self, shown: BaseTrigger, zone: ZoneInfo, *, hourly: bool) -> None:
        self._shown = shown
        self._zone = zone
        self._hourly = hourly

    def get_next_fire_time(self, previous: datetime | None, now: datetime) -> datetime | None:
        """The first time after `previous`, and after `now` where that is earlier, with the zone."""
        after = min(previous, now) if previous else now - timedelta(microseconds=1)
        found: datetime | None = None
        # What the clock has passed may be still to come, when it is put forward or back.
        wall = self._face(after) - self._shift(after)
        while (wall := self._shown.get_next_fire_time(wall, wall)) is not None:
            first, second = self._at(wall, 0), self._at(wall, 1)
            if found is not None and first >= found and wall >= self._face(found):
                break
            moments = [at for at in (first, second) if self._face(at) == wall] if self._hourly else [first]
            found = min((at for at in [*moments, found] if at is not None and at > after), default=None)
        return found.astimezone(self._zone) if found else None

    def _shift(self, at: datetime) -> timedelta:
        """By how much the clock is put forward or back around that moment."""
        ahead = [self._face(near) - near for near in (at - _DAY, at, at + _DAY)]
        return max(ahead) - min(ahead)

    def _at(self, wall: datetime, fold: int) -> datetime:
        """When the clock shows that, for the first time or for the second."""
        return wall.replace(tzinfo=self._zone, fold=fold).astimezone(UTC)

    def _face(self, at: datetime) -> datetime:
        """What the clock shows at that moment, written as a time of UTC."""
        return at.astimezone(self._zone).replace(tzinfo=UTC, fold=0)


def _weekdays(field: str) -> str:
    """Day names for cron's numbers, names, ranges and steps: `5-7` is `sun,fri,sat`."""
    chosen: set[int] = set()
    for part in field.split(","):
        match = _PART.match(part)
        if match is None:
            raise ValueError(f"day of week {part!r} is not understood; write names (mon-fri) or numbers 0-7")
        chosen |= _days_of(match)
    return ",".join(_DAYS[day] for day in sorted(chosen))


def _days_of(part: re.Match[str]) -> set[int]:
    step = int(part["step"] or 1)
    if step == 0:
        raise ValueError("a step of 0 in the day of week goes nowhere")
    first = _day(part["first"]) if part["first"] else 0
    last = _day(part["last"]) if part["last"] else first
    if part["first"] is None or (part["step"] and part["last"] is None):
        last = 6  # `*` and `2/2` run to the end of the week
    if last < first:
        last += 7  # `fri-mon` goes over the week's end
    return {day % 7 for day in range(first, last + 1, step)}


def _day(text: str) -> int:
    if text in _DAYS:
        return _DAYS.index(text)
    if text.isdigit() and int(text) <= 7:
        return int(text)
    raise ValueError(f"day of week {text!r} is neither a number 0-7 nor one of {', '.join(_DAYS)}")
