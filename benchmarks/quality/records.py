"""The record of a finished run: a small JSON file, committed, from which alone the pages are made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality.plan import Plan
from storage.artifacts import write_file
from storage.errors import IntegrityError
from strategies.contract import Record

FOLDER = Path(__file__).resolve().parent.parent / "records"


@dataclass(frozen=True, kw_only=True)
class Lesson(Record):
    """What one experience cost, and what the model knew after it."""

    name: str
    rows: int  # new training rows
    rows_seen: int  # training rows so far that still hold
    replayed: int  # remembered rows in an epoch
    steps: int
    cpu_seconds: float  # of training
    state_bytes: int
    memory_rows: int
    evaluation_seconds: float  # of CPU, per answered row
    peak_rss: int  # bytes, of the process so far, exams included
    scores: dict[str, float]  # task → mean score of its suite
    adapter_bytes: int = 0  # 0: not measured


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """One run. `failed` is the reason why there are no results."""

    digest_of_plan: str
    plan: Plan
    tasks: tuple[str, ...] = ()
    learned_at: tuple[int, ...] = ()
    matrix: tuple[tuple[float | None, ...], ...] = ()  # row 0: the base
    metrics: dict[str, float | None] = field(default_factory=dict)
    extras: dict[str, float] = field(default_factory=dict)  # what only some streams measure
    lessons: tuple[Lesson, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)  # the specs in full
    hardware: str = ""
    date: str = ""
    code: str = ""  # the commit that measured; "" in the first records, which did not say it
    clock: str = ""  # written in by hand where a day's machine, load or code changed, see `timed_by`
    timed_again: dict[str, float] = field(default_factory=dict)  # by hand: CPU seconds under other clocks
    failed: str = ""

    @property
    def cpu_seconds(self) -> float:
        return sum(lesson.cpu_seconds for lesson in self.lessons)

    @property
    def timed_by(self) -> str:
        """Times are compared between records that have the same: a day and a machine, unless said."""
        return self.clock or f"{self.date}, {self.hardware}"

    def seconds_by(self, clock: str) -> float | None:
        """CPU seconds of training under these conditions, if this run was ever timed under them."""
        return self.cpu_seconds if clock == self.timed_by else self.timed_again.get(clock)

    @property
    def arithmetic(self) -> str:
        """Where the hardware is named without it, that was bfloat16."""
        return "float32" if self.hardware.endswith("in float32") else "bfloat16"

    @property
    def memory_share(self) -> float:
        """Remembered rows at the end, of all training rows seen."""
        seen = sum(lesson.rows for lesson in self.lessons)
        return self.lessons[-1].memory_rows / seen if seen else 0.0

    @property
    def peak_rss(self) -> int:
        return max(lesson.peak_rss for lesson in self.lessons)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunRecord":
        return cls(
            **{
                **values,
                "plan": Plan.from_dict(values["plan"]),
                "tasks": tuple(values["tasks"]),
                "learned_at": tuple(values["learned_at"]),
                "matrix": tuple(map(tuple, values["matrix"])),
                "lessons": tuple(Lesson.from_dict(lesson) for lesson in values["lessons"]),
            }
        )


def matrix(
    tasks: Sequence[str], base: Mapping[str, float], lessons: Sequence[Lesson]
) -> tuple[tuple[float | None, ...], ...]:
    """The base's row, then one for each experience; cells that were not measured are None."""
    rows = [base, *(lesson.scores for lesson in lessons)]
    return tuple(tuple(row.get(task) for task in tasks) for row in rows)


def place(plan: Plan, folder: Path = FOLDER) -> Path:
    return folder / plan.size / f"{plan.name}.json"


def find(plan: Plan, folder: Path = FOLDER) -> RunRecord | None:
    """The record of exactly this plan, or None."""
    path = place(plan, folder)
    found = read(path) if path.exists() else None
    return found if found is not None and found.digest_of_plan == plan.digest else None


def save(record: RunRecord, folder: Path = FOLDER) -> Path:
    path = place(record.plan, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(json.loads(record.to_json()), indent=1, sort_keys=True) + "\n")
    return path


def read(path: Path) -> RunRecord:
    try:
        return RunRecord.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"the record {path} cannot be read ({error}); remove it and run again") from None


def all_of(size: str, folder: Path = FOLDER) -> list[RunRecord]:
    """Every record of a size, in a fixed order."""
    return [read(path) for path in sorted((folder / size).glob("*.json"))]
