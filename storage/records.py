"""What the store hands out and takes: frozen records, one a noun, and the states of a cycle.

Knows no database and no model, so that every part of Holdfast may import it. Times are naive UTC.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any, Literal

from storage.rows import Split

Clock = Callable[[], datetime]


def utcnow() -> datetime:
    """Now, in UTC, without a time zone: the only kind of time in the store."""
    return datetime.now(UTC).replace(tzinfo=None)


class State(StrEnum):
    """Where a cycle stands. Each name says what is done and durable."""

    REQUESTED = "requested"
    PULLED = "pulled"
    SNAPSHOTTED = "snapshotted"
    TRAINED = "trained"
    EVALUATED = "evaluated"
    DECIDED = "decided"
    PROMOTED = "promoted"
    REJECTED = "rejected"
    FAILED = "failed"
    CANCELLED = "cancelled"
    NOTHING = "nothing-to-do"

    @property
    def ended(self) -> bool:
        return not TRANSITIONS[self]


_STOPPED = frozenset({State.FAILED, State.CANCELLED})

# Every arrow that a cycle may take; a state without arrows is an end.
TRANSITIONS: dict[State, frozenset[State]] = {
    State.REQUESTED: _STOPPED | {State.PULLED, State.NOTHING},
    State.PULLED: _STOPPED | {State.SNAPSHOTTED, State.NOTHING},
    # Straight to evaluated: nothing came of an attempt to rescue, so there is nothing to examine.
    State.SNAPSHOTTED: _STOPPED | {State.TRAINED, State.EVALUATED},
    State.TRAINED: _STOPPED | {State.EVALUATED},
    # Back to snapshotted: the candidate forgot, and the next one is made.
    State.EVALUATED: _STOPPED | {State.DECIDED, State.SNAPSHOTTED},
    State.DECIDED: _STOPPED | {State.PROMOTED, State.REJECTED},
    State.PROMOTED: frozenset(),
    State.REJECTED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
    State.NOTHING: frozenset(),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRow:
    """An accepted row. `seq` is the order of acceptance."""

    hash: str
    key: str
    question_key: str
    words_key: str
    seq: int
    id: str
    task: str
    question: str
    answer: str
    context: str
    created_at: datetime | None
    split: Split
    source: str
    accepted_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """A row that was not accepted, as it was delivered, and why. Make `hash` with `rejection_hash`."""

    hash: str
    id: str | None
    task: str | None
    raw: str  # JSON of the fields
    reason: str  # short code
    detail: str
    source: str
    at: datetime


def rejection_hash(raw: str, reason: str) -> str:
    """Identity of a rejected row: the same bad row delivered again is the same line of quarantine."""
    return hashlib.sha256(f"{reason}\x1f{raw}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Acceptance:
    """What became of the rows handed to `Store.accept`; the first three add up to all of them.

    `superseded` counts stored rows that lost their place to another answer, the ones just stored included.
    """

    accepted: int
    known: int
    rejected: int
    superseded: int = 0


# What becomes of a question's other answer: the newest counts, or the first, or all of them.
OnConflict = Literal["newest", "quarantine", "both"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An answer on record. `created_at` is the newest time it was given with; `counts`: not superseded."""

    hash: str
    answer: str
    id: str
    source: str
    created_at: datetime | None
    counts: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """That a row of a source gives a stored row's label; `seq` is the order in which labels were news."""

    row_hash: str
    source: str
    id: str
    created_at: datetime | None
    seq: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Supersession:
    """A row that lost its place to another answer, or has it back (`by_hash` None), and when."""

    seq: int
    row_hash: str
    by_hash: str | None
    at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """How far a source has been read."""

    watermark: datetime | None = None
    full_scan_at: datetime | None = None
    pulled_at: datetime | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRecord:
    """A task as the store knows it. `origin` is `inferred` or `config`; labels are sorted."""

    name: str
    kind: str
    metric: str
    origin: str
    labels: tuple[str, ...]
    created_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """A frozen version of a task's suite. `hash` covers the exact texts."""

    task: str
    version: int
    hash: str
    size: int
    frozen_at: datetime
    cycle_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cycle:
    """One run of the whole flow. `parent` is the version it continued from, `version` the one it made."""

    id: int
    state: State
    trigger: str
    requested_by: str
    requested_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    parent: int | None
    snapshot: str | None
    version: int | None
    reason: str | None
    attempts: int  # how often its worker died; its candidates are another thing


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """What a cycle puts before the gate: first its plain training, then one attempt to rescue it at a time.

    Made by `daemon.rescue`, which says what the kinds mean. `strategy`, `curve` and `verdict` are JSON.
    """

    cycle_id: int
    number: int  # from 1
    kind: str  # train | blend | protect
    source: int | None  # number of the candidate that it starts from
    result: str  # result directory, relative to the state directory
    strategy: str | None  # None: the one in the snapshot
    created_at: datetime
    change: str | None = None  # why it has a strategy of its own, in words
    share: float | None = None  # of a blend: how far from the champion to its source
    curve: str | None = None  # of a blend: scores on validation rows
    model: str | None = None  # SHA-256 of its adapter; None: not made
    passed: bool | None = None  # None: not judged
    verdict: str | None = None
    note: str | None = None  # why it was set aside

    def __post_init__(self) -> None:
        _check_place(self.result)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersion:
    """What a version was made of. `parent` None: trained from the bare base."""

    version: int
    cycle_id: int
    parent: int | None
    result: str  # result directory, relative to the state directory
    adapter_hash: str
    base: str  # fingerprint
    created_at: datetime

    def __post_init__(self) -> None:
        _check_place(self.result)


def _check_place(result: str) -> None:
    """What is read there is trusted, and what is removed is gone: damaged records must not lead elsewhere."""
    parts = PurePosixPath(result).parts
    if parts[:1] != ("cycles",) or len(parts) < 2 or ".." in parts or "\0" in result:
        raise ValueError(f"{result!r} is no directory of a cycle")


@dataclass(frozen=True, kw_only=True, slots=True)
class Promotion:
    """A line in the history of `champion`. `version` None: the bare base."""

    seq: int
    version: int | None
    previous: int | None
    cycle_id: int | None
    kind: str  # gate | manual | rollback
    who: str
    why: str
    at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a model answered to one row of an exam, and what that was worth."""

    row_hash: str
    prediction: str
    exact_match: float
    token_f1: float
    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One cell of the accuracy matrix: a model's mean score on a suite, measured in a cycle."""

    cycle_id: int
    label: str  # base | champion | candidate
    task: str
    version: int  # of the suite
    model: str
    exam: str
    metric: str
    score: float
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened, for people."""

    seq: int
    at: datetime
    kind: str
    cycle_id: int | None
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruned:
    """Something that was removed on purpose. `done` False: MLflow has not been told yet."""

    path: str
    why: str
    at: datetime
    done: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Which rows are meant: those for which everything that is given holds. `row` is an id or a hash."""

    row: str | None = None
    task: str | None = None
    source: str | None = None
    question: str | None = None
    answer: str | None = None
    context: str | None = None
    before: datetime | None = None
    contains: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Erasure:
    """Rows that had to be forgotten: who asked, and whether it is done. `rebuild`: the champion knew them."""

    id: int
    who: str
    why: str
    at: datetime
    rebuild: bool
    done_at: datetime | None
