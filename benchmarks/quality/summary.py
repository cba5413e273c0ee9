"""Records of one stream and order, put side by side: means over seeds, costs relative to naive. Pure."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from benchmarks.contenders import CONTENDERS
from benchmarks.quality.records import RunRecord
from storage.errors import HoldfastError

NAIVE, JOINT = "naive", "joint"


@dataclass(frozen=True, kw_only=True)
class Stat:
    """Mean and sample standard deviation over seeds (0 with one)."""

    mean: float
    deviation: float = 0.0
    count: int = 1

    def told(self, scale: float = 1.0, digits: int = 1) -> str:
        text = f"{round(self.mean * scale, digits) + 0.0:.{digits}f}"  # no -0.0
        return f"{text} ± {self.deviation * scale:.{digits}f}" if self.deviation else text


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A contender on a stream in an order: its runs, one a seed."""

    name: str
    runs: tuple[RunRecord, ...]
    naive: dict[int, RunRecord]  # the naive runs of the same stream and order, by seed
    failed: str = ""

    def metric(self, name: str) -> Stat | None:
        return self._stat(lambda run: run.metrics.get(name))

    def extra(self, name: str) -> Stat | None:
        return self._stat(lambda run: run.extras.get(name))

    @property
    def accuracy(self) -> float:
        found = self.metric("average_accuracy")
        return found.mean if found else 0.0

    @property
    def time(self) -> Stat | None:
        """CPU seconds of training, times naive's of the same seed, where both were timed alike."""

        def ratio(run: RunRecord) -> float | None:
            naive = self.naive.get(run.plan.seed)
            seconds = naive.seconds_by(run.timed_by) if naive is not None else None
            return run.cpu_seconds / seconds if seconds else None

        return self._stat(ratio)

    @property
    def peak_memory(self) -> Stat | None:
        """Of the process, exams included, times naive's of the same seed in the same arithmetic."""

        def ratio(run: RunRecord) -> float | None:
            naive = self.naive.get(run.plan.seed)
            alike = naive is not None and naive.arithmetic == run.arithmetic
            return run.peak_rss / naive.peak_rss if naive is not None and alike else None

        return self._stat(ratio)

    @property
    def memory_rows(self) -> float:
        return statistics.fmean(run.lessons[-1].memory_rows for run in self.runs)

    @property
    def memory_share(self) -> float:
        return statistics.fmean(run.memory_share for run in self.runs)

    @property
    def state_bytes(self) -> float:
        return statistics.fmean(run.lessons[-1].state_bytes for run in self.runs)

    @property
    def curve(self) -> list[float]:
        """Mean accuracy over the tasks learned so far, after every experience, and over seeds."""
        curves = [_curve(run) for run in self.runs]
        return [statistics.fmean(point) for point in zip(*curves, strict=True)]

    def _stat(self, value: Callable[[RunRecord], float | None]) -> Stat | None:
        return stat(value(run) for run in self.runs)


@dataclass(frozen=True, kw_only=True)
class Board:
    """What was measured on one stream in one order, with the same seeds for all."""

    stream: str
    order: str
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]

    def entry(self, name: str) -> Entry | None:
        return next((e for e in self.entries if e.name == name and e.runs), None)

    @property
    def measured(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.runs]

    @property
    def rivals(self) -> list[Entry]:
        """Who could be chosen for use, best first: not the baselines, and no foreign code."""
        ours = [
            e
            for e in self.measured
            if e.name not in (NAIVE, JOINT) and not any(run.plan.stock for run in e.runs)
        ]
        return sorted(ours, key=lambda entry: -entry.accuracy)


class MixedRecords(HoldfastError):
    """Records of one size were made with different sizes or settings, and cannot stand in one table."""


def boards(records: Iterable[RunRecord]) -> list[Board]:
    """One for each stream, order and widest set of seeds that somebody has run, and for each seed of the
    others: seeds differ by more than methods do, so nobody is compared over other ones.

    Raises `MixedRecords`.
    """
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for record in records:
        groups.setdefault((record.plan.stream, record.plan.order), []).append(record)
    for found in groups.values():
        _check_alike(found)
    return [
        Board(stream=stream, order=order, seeds=seeds, entries=_entries(found))
        for (stream, order), group in groups.items()
        for seeds, found in _layers(group)
    ]


def _layers(found: Sequence[RunRecord]) -> Iterator[tuple[tuple[int, ...], list[RunRecord]]]:
    """For each set of seeds that a contender has run: all who have run them. Where others ran more, its seeds
    are shown one by one. Failures go to the first."""
    ran: dict[str, frozenset[int]] = {}
    for record in found:
        if not record.failed:
            ran[record.plan.contender] = ran.get(record.plan.contender, frozenset()) | {record.plan.seed}
    rivals = {seeds for name, seeds in ran.items() if name not in (NAIVE, JOINT)}
    rivals = rivals or {*ran.values()} or {frozenset()}
    widest = {seeds for seeds in rivals if not any(seeds < other for other in rivals)}
    alone = {frozenset({seed}) for seeds in rivals - widest for seed in seeds}
    failed = [record for record in found if record.failed]
    for seeds in sorted(widest | alone, key=lambda seeds: (len(seeds), *seeds)):
        shown = [r for r in found if not r.failed and r.plan.seed in seeds and seeds <= ran[r.plan.contender]]
        yield tuple(sorted(seeds)), [*shown, *failed]
        failed = []


def _check_alike(found: Sequence[RunRecord]) -> None:
    """All but a contender's own changes must be the same."""
    first = _setup(found[0])
    for record in found[1:]:
        other = _setup(record)
        for key in first.keys() & other.keys():
            if first[key] != other[key]:
                raise MixedRecords(
                    f"{found[0].plan.name} was made with {key} = {first[key]}, {record.plan.name} with "
                    f"{other[key]}; remove the record that is not wanted; trials have --records"
                )


def _setup(record: RunRecord) -> dict[str, Any]:
    plan = record.plan
    contender = CONTENDERS.get(plan.contender)
    own = {*contender.train, *contender.lora} if contender else set()
    shared = {**plan.sizes, **plan.train, **plan.lora, "base": plan.base, "tokens": plan.max_new_tokens}
    return {key: value for key, value in shared.items() if key not in own}


def _entries(found: Sequence[RunRecord]) -> tuple[Entry, ...]:
    naive = {r.plan.seed: r for r in found if r.plan.contender == NAIVE and not r.failed}
    order = {name: n for n, name in enumerate(CONTENDERS)}
    names = sorted({r.plan.contender for r in found}, key=lambda name: (order.get(name, len(order)), name))
    return tuple(
        Entry(
            name=name,
            runs=tuple(r for r in found if r.plan.contender == name and not r.failed),
            naive=naive,
            failed=next((r.failed for r in found if r.plan.contender == name and r.failed), ""),
        )
        for name in names
    )


def stat(values: Iterable[float | None]) -> Stat | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return Stat(mean=statistics.fmean(known), deviation=deviation, count=len(known))


def _curve(run: RunRecord) -> list[float]:
    points = []
    for after, row in enumerate(run.matrix[1:], 1):
        known = [
            cell for cell, at in zip(row, run.learned_at, strict=True) if at <= after and cell is not None
        ]
        points.append(statistics.fmean(known))
    return points


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How a cost developed over the experiences of a stream."""

    first: float  # mean over the first tenth, at least three, without the very first
    last: float  # mean over the last tenth, at least three
    slope: float  # of the least-squares line, per experience, without the very first

    @property
    def relative(self) -> float:
        """The slope as a share of the mean of the first."""
        return self.slope / self.first if self.first else 0.0


def growth(values: Sequence[float]) -> Growth:
    """The first experience is left out: it warms up, and no method has a past yet."""
    rest = list(values[1:]) or list(values)
    width = min(max(len(rest) // 10, 3), len(rest))
    slope = float(numpy.polyfit(range(len(rest)), rest, 1)[0]) if len(rest) > 1 else 0.0
    return Growth(first=statistics.fmean(rest[:width]), last=statistics.fmean(rest[-width:]), slope=slope)


def costs(run: RunRecord) -> dict[str, list[float]]:
    """What must stay flat, experience by experience, with the unit in the name."""
    lessons = run.lessons
    return {
        "state (kB)": [lesson.state_bytes / 1e3 for lesson in lessons],
        "adapter (kB)": [lesson.adapter_bytes / 1e3 for lesson in lessons],
        "CPU time of a step (ms)": [1e3 * lesson.cpu_seconds / max(lesson.steps, 1) for lesson in lessons],
        "CPU time of an answer (ms)": [1e3 * lesson.evaluation_seconds for lesson in lessons],
        "peak memory of the process (MB)": [lesson.peak_rss / 1e6 for lesson in lessons],
    }
