"""Which blend of champion and candidate is put before the gate: scores on validation rows in, a choice out.

Pure: no store, no model, and no suite. Suites are for the gate alone; what is chosen by them would be
flattered by them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from strategies.contract import Record

GRID = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # shares to try; 1 is the candidate, 0 the champion
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Point(Record):
    """Mean scores on the validation rows of each task, `share` of the way from champion to candidate."""

    share: float
    scores: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Curve(Record):
    """The trade-off: what each share knows of the new tasks, and what it costs on the others.

    Points go from the candidate (share 1) down to the champion (share 0); all have the same tasks. A task
    without validation rows is not among them and has no say.
    """

    new_tasks: tuple[str, ...]  # tasks of the cycle's new rows
    rows: Mapping[str, int]  # validation rows of each task
    points: tuple[Point, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(
            new_tasks=tuple(values["new_tasks"]),
            rows=values["rows"],
            points=tuple(Point.from_dict(point) for point in values["points"]),
        )

    @property
    def champion(self) -> Point:
        return self.points[-1]

    @property
    def between(self) -> tuple[Point, ...]:
        """The blends alone."""
        return self.points[1:-1]

    def new(self, point: Point) -> float | None:
        """Mean score over the new tasks; None when none of them has validation rows."""
        return _mean([score for task, score in point.scores.items() if task in self.new_tasks])

    def old(self, point: Point) -> float | None:
        """Mean score over the other tasks; None when none of them has validation rows."""
        return _mean([score for task, score in point.scores.items() if task not in self.new_tasks])

    def worst(self, point: Point) -> tuple[str, float]:
        """The task that lost most against the champion, and its change (below 0: a loss).

        New tasks count as well: the gate lets no suite drop, and rows of a known task may be new.
        """
        lost = {task: point.scores[task] - before for task, before in self.champion.scores.items()}
        task = min(lost, key=lambda name: (lost[name], name))
        return task, lost[task]


@dataclass(frozen=True, kw_only=True)
class Choice(Record):
    """The share to examine, or None, and why."""

    share: float | None
    why: str


def choose(curve: Curve, max_drop: float) -> Choice:
    """The blend that knows most of the new tasks among those that lose at most `max_drop` on every task.

    Ties go to the larger share. When every blend loses more, the one that loses least, if that is less
    than what the candidate loses: suite rows may be kinder than validation rows. A blend that knows no more
    of the new tasks than the champion is not worth an exam, unless there was nothing left to learn.
    """
    learned = {point.share: new for point in curve.between if (new := curve.new(point)) is not None}
    before = curve.new(curve.champion)
    if before is None or not learned:
        return Choice(share=None, why="no blend can be chosen: the new tasks have no validation rows")
    useful = [p for p in curve.between if learned[p.share] > before + _ROUNDING or before >= 1 - _ROUNDING]
    if not useful:
        return Choice(share=None, why="no blend helps: none knows more of the new tasks than the champion")
    kept = [p for p in useful if -curve.worst(p)[1] <= max_drop + _ROUNDING]
    if kept:
        best = max(kept, key=lambda p: (round(learned[p.share], 9), p.share))
    else:
        best = max(useful, key=lambda p: (round(curve.worst(p)[1], 9), p.share))
        if curve.worst(best)[1] <= curve.worst(curve.points[0])[1] + _ROUNDING:
            return Choice(share=None, why="no blend helps: what learned forgot as much as the candidate")
    task, change = curve.worst(best)
    told = (
        f"on validation rows {learned[best.share] * 100:.1f} on the new tasks (champion {before * 100:.1f}), "
        f"largest change {change * 100:+.1f} ({task})"
    )
    return Choice(share=best.share, why=told if kept else f"{told}; every blend loses too much there")


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
